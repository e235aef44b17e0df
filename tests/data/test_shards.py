"""Images in tars: the same as in a folder, in the same order; runs and evaluations on them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from evaluation_helpers import FOLDER, random_folder, save_run
from helpers import folder_config, last_state, make_folder, make_tar, png
from PIL import Image

from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data import byte_ranges, tar_index
from dino_xcit.data.byte_ranges import LocalFiles
from dino_xcit.data.census import report_start
from dino_xcit.data.folder import list_images
from dino_xcit.data.images import fingerprint, held_out, open_images
from dino_xcit.data.tar_index import NO_LABEL, RECORD, TarIndex
from dino_xcit.errors import ImageError, UserError
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.run_folder import BAD_IMAGES
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.resume import images_record

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def archived(root: Path, target: Path, shards: int = 1, below: str = "") -> list[Path]:
    """Write the files of a folder to tars, in the order of their names."""
    files = [Path(file) for file in list_images(root).files]
    parts = [part.tolist() for part in np.array_split(np.array(files, object), shards)]
    return [
        make_tar(
            target / f"part-{number:03}.tar",
            {f"{below}{file.relative_to(root)}": file.read_bytes() for file in part},
        )
        for number, part in enumerate(parts)
    ]


def opened(path, split="train", classes=None, **options):
    return open_images(folder_config(path, **options), split, classes)


def assert_equal_sets(one, other):
    assert len(one) == len(other) > 0
    assert one.classes == other.classes
    assert np.array_equal(one.labels, other.labels)
    assert all(torch.equal(one.read(i), other.read(i)) for i in range(len(one)))


# -- the same as a folder ----------------------------------------------------------------------

NAMES = [f"{kind}/img{i}.png" for kind in ("cat", "dog10", "dog9") for i in range(1, 6)]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("below", ["", "./", "photos/"])
def test_a_folder_and_its_tars_are_the_same_images(tmp_path, shards, below):
    root = make_folder(tmp_path / "folder", NAMES)
    archived(root, tmp_path / "tars", shards, below)
    assert_equal_sets(opened(root), opened(tmp_path / "tars"))
    assert opened(tmp_path / "tars").classes == {"cat": 0, "dog9": 1, "dog10": 2}


def test_a_folder_without_classes_and_one_class_have_no_labels_in_tars_either(tmp_path):
    for names in (["a.png", "b.png"], ["cat/a.png", "cat/b.png"]):
        root = make_folder(tmp_path / names[0] / "folder", names)
        archived(root, tmp_path / names[0] / "tars")
        images = opened(tmp_path / names[0] / "tars")
        assert images.labels is None
        assert images.classes == opened(root).classes


def test_braces_name_tars_in_order(tmp_path):
    root = make_folder(tmp_path / "folder", NAMES)
    archived(root, tmp_path, 3)
    assert_equal_sets(opened(tmp_path / "part-{000..002}.tar"), opened(root))
    assert_equal_sets(opened(tmp_path / "part-{002,000,001}.tar"), opened(root))
    assert len(opened(tmp_path / "part-{001..002}.tar")) == 10
    with pytest.raises(UserError, match=r"part-003.tar does not exist, 2 of 5 tars"):
        opened(tmp_path / "part-{000..004}.tar")


def test_given_classes_leave_others_out(tmp_path):
    path = archived(make_folder(tmp_path / "folder", NAMES), tmp_path)[0]
    images = opened(path, classes={"dog9": 7})
    assert images.labels.tolist() == [7] * 5
    assert images.name(0) == f"{path}/dog9/img1.png"


def test_labels_of_cls_and_json_are_taken_before_folders(tmp_path):
    files = {f"x/{i}.{e}": c for i in range(4) for e, c in (("png", png(i)), ("cls", str(i % 3)))}
    numbered = opened(make_tar(tmp_path / "a.tar", files))
    assert (numbered.labels.tolist(), numbered.classes) == ([0, 1, 2, 0], None)
    files = {
        f"{i}.{e}": c
        for i, name in enumerate(["dog", "cat", "dog"])
        for e, c in (("json", f'{{"label": "{name}"}}'), ("png", png(i)))
    }
    named = opened(make_tar(tmp_path / "b.tar", files))
    assert (named.labels.tolist(), named.classes) == ([1, 0, 1], {"cat": 0, "dog": 1})


def test_labels_that_some_samples_lack_are_not_used_and_that_is_said(tmp_path, capsys):
    files = {"a/1.png": png(1), "a/1.cls": "1", "b/2.png": png(2), "c/3.png": png(3)}
    images = opened(make_tar(tmp_path / "a.tar", files))
    report_start(images)
    assert images.labels is None
    assert "2 of 3 samples have no label in .cls or .json" in capsys.readouterr().err


def test_16_bit_images_have_the_depth_of_their_set(tmp_path):
    ramp = np.linspace(0, 4095, 2400).reshape(40, 60).astype(np.uint16)
    for number, factor in enumerate((1, 16)):
        (tmp_path / "f").mkdir(exist_ok=True)
        Image.fromarray(ramp * factor).save(tmp_path / f"f/{number}.png")
    assert_equal_sets(opened(tmp_path / "f"), opened(archived(tmp_path / "f", tmp_path)[0]))


# -- splits ------------------------------------------------------------------------------------

SPLIT = [f"{split}/{kind}/{i}.png" for split in ("train", "val") for kind in "ab" for i in (1, 2)]


def in_two_folders(root, target):
    for split in ("train", "val"):
        archived(root / split, target / split, 2)
    return target


def by_name(root, target):
    for split, name in (("train", "train"), ("val", "validation")):
        for number, path in enumerate(archived(root / split, target / split, 2)):
            path.rename(target / f"imagenet1k-{name}-{number:04}.tar")
        (target / split).rmdir()
    return target


def by_name_in_braces(root, target):
    return f"{by_name(root, target)}/imagenet1k-{{train,validation}}-{{0000..0001}}.tar"


def with_both_inside(root, target):
    return archived(root, target, below="imagenet/")[0]


@pytest.mark.parametrize("make", [in_two_folders, by_name, by_name_in_braces, with_both_inside])
def test_splits_of_tars_are_those_of_the_folder(tmp_path, make):
    root = make_folder(tmp_path / "folder", SPLIT)
    tars = make(root, tmp_path / "tars")
    for split in ("train", "validation"):
        assert_equal_sets(opened(tars, split), opened(root, split))


def test_tars_of_no_split_are_all_training_images(tmp_path):
    root = make_folder(tmp_path / "folder", NAMES)
    archived(root, tmp_path / "val", 2)  # named by the user, so not held out from him
    assert len(opened(tmp_path / "val")) == 15
    assert len(opened(f"{tmp_path}/val/part-{{000..001}}.tar")) == 15
    assert opened(tmp_path / "val", "validation") is None


def test_validation_tars_are_never_training_images(tmp_path):
    make_tar(tmp_path / "x-val-0.tar", {"1.png": png()})
    make_tar(tmp_path / "other.tar", {"1.png": png()})
    with pytest.raises(UserError, match=r"holds validation tars \(x-val-0.tar, ...\) and no train"):
        opened(tmp_path)
    make_tar(tmp_path / "train.tar", {"1.png": png()})
    images = opened(tmp_path)
    assert images.folder == str(tmp_path / "train.tar")
    assert "1 other files are not used" in images.notes[0]


def test_a_folder_of_images_with_a_tar_beside_them_is_a_folder_of_images(tmp_path):
    root = make_folder(tmp_path, ["train/cat/1.png", "train/dog/2.png"])
    make_tar(tmp_path / "train.tar", {"1.png": png()})
    assert [images.name(i) for images in [opened(root)] for i in range(2)] == [
        str(root / "train/cat/1.png"),
        str(root / "train/dog/2.png"),
    ]


# -- what is refused, and what is unreadable ---------------------------------------------------


def test_compressed_tars_and_tars_without_images_are_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    for path in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(UserError, match=r"a.tar.gz is compressed"):
            opened(path)
    path = make_tar(tmp_path / "b.tar", {"1.txt": "x", "2.mp4": "y", "3.cls": "0"})
    with pytest.raises(UserError, match=r"no images in --data_path .*1 .txt.*; expected tars of"):
        opened(path)


def test_the_folder_of_the_tars_is_no_output_folder(tmp_path):
    make_tar(tmp_path / "a.tar", {"1.png": png()})
    with pytest.raises(UserError, match=r"--output_dir .* is the folder of the tars"):
        opened(tmp_path, output_dir=str(tmp_path))


def test_a_member_that_is_no_image_and_a_tar_that_is_gone_or_cut_are_unreadable(tmp_path):
    make_tar(tmp_path / "a.tar", {"1.png": "no image", "2.png": png()})
    make_tar(tmp_path / "b.tar", {"3.png": png()})
    make_tar(tmp_path / "c.tar", {"4.png": png()})
    images = opened(tmp_path)
    with pytest.raises(ImageError, match="not an image"):
        images.read(0)
    assert images.read(1).shape == (3, 40, 60)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(FileNotFoundError):
        images.read(2)
    (tmp_path / "c.tar").write_bytes((tmp_path / "c.tar").read_bytes()[:600])
    with pytest.raises(ImageError, match=r"c.tar ends \d+ bytes too early"):
        images.read(3)
    make_tar(tmp_path / "c.tar", {"4.png": png()})
    assert images.read(3).shape == (3, 40, 60)  # a handle that failed is not kept


# -- handles, processes ------------------------------------------------------------------------


def test_few_files_are_open_at_once_and_all_are_closed_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_ranges, "HANDLES", 3)
    paths = [tmp_path / str(number) for number in range(10)]
    for path in paths:
        path.write_text(f"<{path.name}>")
    count = lambda: len(os.listdir("/dev/fd"))  # noqa: E731, PTH208
    before, files = count(), LocalFiles([str(path) for path in paths])
    order = [*range(10), 0, 9, 9, 1]
    assert [files.read(i, 1, 1) for i in order] == [str(i).encode() for i in order]
    assert count() == before + 3
    del files
    assert count() == before


def read_all(images, connection) -> None:
    connection.send([images.read(i).numpy() for i in range(len(images))])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_set_that_was_read_is_read_in_other_processes(tmp_path, method):
    archived(make_folder(tmp_path / "folder", NAMES), tmp_path, 4)
    images = opened(tmp_path / "part-{000..003}.tar")
    expected = [images.read(i).numpy() for i in range(len(images))]
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=read_all, args=(images, theirs))
    process.start()
    theirs.close()  # so that a process that fails ends the pipe
    got = ours.recv()
    process.join()
    assert all(map(np.array_equal, got, expected))


# -- runs and evaluations ----------------------------------------------------------------------

IMAGES = [f"{kind}/{i:02}.png" for kind in ("cat", "dog") for i in range(12)]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """A run of 6 steps on 24 images in 5 tars."""
    archived(make_folder(tmp_path / "folder", IMAGES), tmp_path / "tars", 5)
    return folder_config(tmp_path / "tars", output_dir=str(tmp_path / "run"))


def assert_equal_runs(one, other):
    first, second = last_state(one), last_state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_stopped_run_from_tars_continues_bit_for_bit_and_equals_one_from_the_folder(
    config, tmp_path
):
    pretrain(dataclasses.replace(config, trainer={"max_steps": 4}))
    assert pretrain(dataclasses.replace(config, num_workers=1)).step == 6
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    folder = dataclasses.replace(
        config, output_dir=str(tmp_path / "of_folder"), data_path=str(tmp_path / "folder")
    )
    for other in (whole, folder):
        assert pretrain(other).step == 6
        assert_equal_runs(config, other)


@pytest.mark.slow
def test_a_tar_that_vanishes_is_bad_images_and_the_run_continues_once_it_is_back(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(byte_ranges, "HANDLES", 0)
    gone = tmp_path / "tars/part-002.tar"
    read, done = LocalFiles.read, Counter()

    def vanishing(self, *place):
        done["reads"] += 1
        if done["reads"] == 60 and gone.exists():
            gone.rename(tmp_path / "away")
        return read(self, *place)

    monkeypatch.setattr(LocalFiles, "read", vanishing)
    pretrain(dataclasses.replace(config, trainer={"max_steps": 4}))
    assert not gone.exists()
    assert f"{gone}/" in (Path(config.output_dir) / BAD_IMAGES).read_text()
    with pytest.raises(UserError, match="holds a run on 24 images, now there are"):
        pretrain(config)
    (tmp_path / "away").rename(gone)
    assert pretrain(config).step == 6


def test_moved_tars_have_the_same_record_and_other_samples_another(tmp_path):
    paths = archived(make_folder(tmp_path / "folder", NAMES), tmp_path / "a", 2)
    before = images_record(opened(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert images_record(opened(tmp_path / "b")) == before
    paths[1].parent.mkdir()
    files = {f"cat/img{i}.png": png(i) for i in range(8)}
    make_tar(tmp_path / "b" / paths[1].name, {f"x{name}": data for name, data in files.items()})
    after = images_record(opened(tmp_path / "b"))
    assert before.keys() == after.keys()
    assert after["names"] != before["names"]
    subset = held_out(opened(tmp_path / "b"), 0.5, 0)[0]
    assert images_record(subset)["names"] != after["names"]


def test_another_tar_of_the_same_names_is_another_fingerprint(tmp_path):
    path = archived(make_folder(tmp_path / "folder", NAMES), tmp_path)[0]
    before = fingerprint(opened(path))
    assert fingerprint(opened(path)) == before
    os.utime(path, ns=(0, 0))
    assert fingerprint(opened(path)) != before


@pytest.mark.slow
def test_knn_on_tars_is_knn_on_the_folder(tmp_path):
    root = random_folder(tmp_path / "folder", FOLDER)
    tars = in_two_folders(root, tmp_path / "tars")
    results = [
        knn_eval(
            KnnConfig(
                weights=str(save_run(tmp_path / f"run{number}")),
                data_path=str(path),
                cache_dir=str(tmp_path / "features"),
                nb_knn=(3,),
                accelerator="cpu",
                devices="1",
                num_workers=0,
            )
        )
        for number, path in enumerate((root, tars))
    ]
    assert results[0]["results"] == results[1]["results"]
    assert (tmp_path / "features" / tar_index.FOLDER).is_dir()


# -- size --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_samples_fit_into_little_memory(tmp_path, cache):
    """An index as of ImageNet's 1,281,167 images in 1,024 tars of 1,251 samples."""
    folder = cache / "dino_xcit" / tar_index.FOLDER
    folder.mkdir(parents=True)
    count, rng = 1_251, np.random.default_rng(0)
    records = np.zeros(count, RECORD)
    records["offset"], records["size"] = 1024 + 110_000 * np.arange(count), 109_000
    names = [f"n{number:08}_{number:05}.JPEG".encode() + b"\0" for number in range(count)]
    records["name"] = np.cumsum([0, *map(len, names)])[:-1]
    records["text"], records["label"] = -1, NO_LABEL
    for number in range(1_024):
        path = tmp_path / f"imagenet1k-train-{number:04}.tar"
        path.touch()
        records["label"] = rng.integers(1_000, size=count)
        stat = path.stat()
        index = TarIndex(
            str(path), 0, stat.st_mtime_ns, records, b"".join(names), [], [""], Counter()
        )
        tar_index._keep(index, folder)
    tracemalloc.start()
    images = opened(tmp_path / "imagenet1k-train-{0000..1023}.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 1_281_024
    assert images.name(1_281_023).endswith("train-1023.tar/n00001250_01250.JPEG")
    assert len(np.unique(images.labels)) == 1_000
    assert peak < 300e6
