"""Runs over files that hang, lie about their size or have odd names."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from helpers import folder_config, make_folder, png_bomb

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data import decode as decode_module
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.figures.command import attention
from dino_xcit.run_folder import read_bad_images, read_metrics
from dino_xcit.train.pretrain import pretrain

# -- files that hang ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_that_nothing_ever_writes_to_counts_as_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_module, "SECONDS_TO_READ", 0.2)
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    (folder / "03.png").unlink()
    os.mkfifo(folder / "03.png")
    config = folder_config(
        folder, output_dir=str(tmp_path / "run"), num_workers=1, epochs=1, batch_size_per_gpu=8
    )
    assert pretrain(config).step == 2
    (line,) = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert line == f"{folder / '03.png'}\tnot read within 0.2 s"


# -- images that lie about their size, names that break files ----------------------------------


@pytest.mark.slow
def test_a_run_goes_on_over_an_image_bomb(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    (folder / "07.png").write_bytes(png_bomb())
    config = folder_config(folder, output_dir=str(tmp_path / "run"), epochs=1, batch_size_per_gpu=8)
    pretrain(config)
    assert {Path(name).name for name in read_bad_images(tmp_path / "run")} == {"07.png"}
    assert "07.png" in (tmp_path / "run/bad_images.txt").read_text()
    assert "exceeds limit" in (tmp_path / "run/bad_images.txt").read_text()


NAMES = [
    "new\nline.png",
    "tab\there.png",
    "<script>alert(1)<\\script>.png",
    "quo\"te's, and comma.png",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f98a.png",
    os.fsdecode(b"latin-\xe9.png"),
]


@pytest.mark.slow
def test_bad_images_of_any_name_are_listed_one_a_line_and_once(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    for name in NAMES:
        (folder / name).write_bytes(b"no image")
    config = folder_config(
        folder, output_dir=str(tmp_path / "run"), epochs=3, batch_size_per_gpu=11
    )
    pretrain(dataclasses.replace(config, epochs=2))
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == len(NAMES)
    assert all(line.endswith("\tnot an image") and line.count("\t") == 1 for line in listed)
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_names_of_any_kind_go_through_a_run_its_evaluation_and_its_figures(tmp_path):
    classes = [
        "new\nline",
        "<script>alert(1)<",
        "quo\"te's, and comma",
        "\u0645\u0631\u062d\u0628\u0627 \U0001f98a",
    ]
    names = [
        f"{split}/{kind}/{i} {kind}.png"
        for split in ("train", "val")
        for kind in classes
        for i in range(6)
    ]
    folder = make_folder(tmp_path / "images", names)
    config = folder_config(folder, output_dir=str(tmp_path / "run"), epochs=1, batch_size_per_gpu=8)
    pretrain(config)
    # As a stranger may send it: nothing is written to the folders that its config.yaml names.
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(
        text.replace(f"output_dir: {tmp_path}/run", f"output_dir: {tmp_path}/elsewhere")
    )
    before = {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents}
    knn_eval(
        KnnConfig(weights=str(tmp_path / "run"), nb_knn=(3,), cache_dir=str(tmp_path / "run/cache"))
    )
    outcome = attention(
        AttentionConfig(
            weights=(str(tmp_path / "run"),),
            images=(str(folder / "val"),),
            output_dir=str(tmp_path / "run/figures"),
            image_size=32,
            figures=("overlay",),
            html=True,
        )
    )
    assert outcome.problems == []
    assert {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents} == before
    written = sorted((tmp_path / "run").rglob("*.json"))
    assert {path.name for path in written} >= {"knn.json", "attention.json"}
    for path in written:
        json.loads(path.read_text())
    page = (tmp_path / "run/figures/attention.html").read_text()
    assert "<script>alert" not in page
    assert len(read_metrics(tmp_path / "run")) == 3
