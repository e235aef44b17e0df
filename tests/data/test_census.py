"""Lines about what was taken from a folder and what was left out."""

from __future__ import annotations

import dataclasses

from helpers import TINY, folder_config, make_folder
from PIL import Image

from dino_xcit.data.census import report_left_out, report_start
from dino_xcit.data.images import open_images


def lines(config, capsys, report=report_start) -> list[str]:
    report(open_images(config, "train"))
    return capsys.readouterr().err.splitlines()


def folder_with_odd_files(tmp_path):
    root = make_folder(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)])
    for name in ("a.heic", "b.HEIC", "c.avif", "d.mp4", "notes.txt"):
        (root / "cat" / name).write_bytes(b"x")
    return root


def test_the_start_counts_what_was_taken_and_left_out(tmp_path, capsys):
    root = folder_with_odd_files(tmp_path)
    (root / "cat" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (20, 20), "red").save(root / "dog" / "1.png")
    assert lines(folder_config(root), capsys) == [
        f"8 images in 2 classes of {root}; other files: 2 .heic, 1 .avif, 1 .mp4, 1 .txt",
        f"left out of {root}: 1 .avif, 2 .heic, images of kinds that are not read; convert them to "
        "use them",
        f"left out of {root}: 1 .mp4, videos of kinds that are not read; convert them to use them",
        f"of a sample of 8 images, 1 cannot be read (first: {root}/cat/0.png: not an image) and "
        f"1 of one colour (first: {root}/dog/1.png)",
    ]


def test_a_subset_is_counted_as_one(tmp_path, capsys):
    root = make_folder(tmp_path, [f"{i}.png" for i in range(6)])
    assert lines(folder_config(root, num_images=4), capsys) == [f"4 of 6 images of {root}"]


def test_evaluations_name_only_what_may_be_missed(tmp_path, capsys):
    root = folder_with_odd_files(tmp_path)
    twice = lambda images: report_left_out(images, images)  # noqa: E731  # both splits of a folder
    found = lines(folder_config(root), capsys, twice)
    assert [line.split(": ")[1].split(",")[0] for line in found] == ["1 .avif", "1 .mp4"]


def test_generated_images_are_not_looked_at(capsys):
    assert lines(dataclasses.replace(TINY, num_images=8), capsys) == []
