"""What a change of the code must not change: numbers of a short run, files of earlier versions.

`python tests/test_unchanged.py` writes golden.json again, for an intended change of the numbers.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dino_xcit
from dino_xcit.cli import parse
from dino_xcit.config.evaluation import KnnConfig, LinearConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data import shapes
from dino_xcit.evaluate.feature_store import FeatureStore
from dino_xcit.evaluate.inputs import open_inputs
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.evaluate.linear import linear_eval
from dino_xcit.evaluate.probe import load_head
from dino_xcit.runtime import launch
from dino_xcit.train.pretrain import pretrain

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden.json"
OLD = DATA / "before_folders"
COLUMNS = ("step", "loss", "teacher_entropy", "center_norm", "grad_norm", "knn_top1", "rankme")
FIRST_STEPS, FIRST_TOLERANCE = (
    5,
    1e-4,
)  # elsewhere than on the machine that wrote the file: relative differences
TOLERANCE = 2e-2
KNN_TOLERANCE = 3.0  # points


def machine() -> str:
    """What float rounding depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    cpu = sorted(
        {line for line in lines if re.match("model|flags|cpu family|stepping|Features", line)}
    )
    return "\n".join([*cpu, f"torch {torch.__version__}, numpy {np.__version__}"])


def golden_rows(folder: Path) -> list[dict[str, str]]:
    """The columns of metrics.csv that are compared, of 20 steps of the demo's config."""
    flags = "--num_images 256 --log_every_n_steps 1 --eval_every_n_epochs 0 --num_workers 0 "
    flags += "--accelerator cpu --devices 1"
    demo = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
    pretrain(
        parse(
            "pretrain",
            PretrainConfig,
            ["--config", demo, *flags.split(), "--output_dir", str(folder)],
        )
    )
    return [{name: row[name] for name in COLUMNS} for row in rows_of(folder / "metrics.csv")]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
def test_twenty_steps_of_the_demo_give_the_golden_numbers(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    rows = golden_rows(tmp_path)
    if golden["machine"] == machine():
        assert rows == golden["rows"]
    for row, expected in zip(rows, golden["rows"], strict=True):
        tolerance = FIRST_TOLERANCE if int(row["step"]) <= FIRST_STEPS else TOLERANCE
        for name in ("loss", "teacher_entropy", "center_norm", "grad_norm"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=tolerance), (
                row["step"],
                name,
            )
    assert float(rows[-1]["knn_top1"]) == pytest.approx(
        float(golden["rows"][-1]["knn_top1"]), abs=KNN_TOLERANCE
    )


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run folder, and the number of validation images that it was made with."""
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", 40)
    shutil.copytree(OLD, tmp_path / "flat")
    monkeypatch.chdir(tmp_path)  # its config says flat/
    return Path("flat")


@pytest.mark.slow
def test_an_old_run_goes_on_to_the_numbers_of_the_whole_run(old):
    config = parse("pretrain", PretrainConfig, ["--config", str(old / "config.yaml")])
    outcome = pretrain(dataclasses.replace(config, trainer={}))
    assert (outcome.step, outcome.steps) == (12, 12)
    rows, whole = rows_of(old / "metrics.csv"), rows_of(old / "metrics_whole.csv")
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    for row, expected in zip(rows, whole, strict=True):
        for name in ("loss", "lr", "momentum", "teacher_entropy", "center_norm", "grad_norm"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3), (
                row["step"],
                name,
            )


@pytest.mark.parametrize(
    "file", ["", "teacher.safetensors", "checkpoints/last.ckpt", "dino_xcit_pico_2_p4.pth"]
)
def test_old_weights_load(old, file):
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = dino_xcit.load_backbone(old / file, "xcit_pico2_p4")
    expected = dino_xcit.load_backbone(old / "teacher.safetensors")
    torch.testing.assert_close(backbone(images), expected(images), rtol=0, atol=0)
    assert expected.metadata["mean"] == [0.5]


def evaluation(old: Path) -> dict[str, Any]:
    machine = {"precision": "32-true", "accelerator": "cpu", "devices": "1", "num_workers": 0}
    return {
        "weights": str(old),
        "cache_dir": str(old / "cache"),
        "feature_dtype": "float16",
        **machine,
    }


def test_an_old_feature_cache_is_found_and_holds_these_features(old, monkeypatch):
    config = KnnConfig(nb_knn=(5,), **evaluation(old))
    with open_inputs(config, launch(config)) as inputs:
        (frozen,) = inputs.features
        found = {split: frozen.description(split) for split in ("train", "validation")}
        features = frozen.split("train").features
    described = [
        json.loads(path.read_text()) for path in sorted((old / "cache").glob("*/about.json"))
    ]
    for about in found.values():
        old_versions = described[0]["versions"]
        assert json.loads(json.dumps({**about, "versions": old_versions})) in described
    folder = next(p.parent for p in (OLD / "cache").glob("*/about.json") if "755d" in p.parent.name)
    before = np.load(folder / "features.npy")
    assert FeatureStore.on_disk(old / "cache" / folder.name, before.shape, "float16").state.all()
    np.testing.assert_allclose(features.numpy(), before, atol=2e-2)


@pytest.mark.slow
def test_old_heads_are_evaluated_to_the_old_scores(old):
    before = json.loads((old / "linear.json").read_text())["results"][0]
    head, about = load_head(old / "linear_head.safetensors")
    assert head.weight.shape == (10, 64 * 3)
    assert about["classes"][0] == "rows"
    report = linear_eval(
        LinearConfig(evaluate=str(old / "linear_head.safetensors"), **evaluation(old))
    )
    assert report["results"][0]["top1"] == pytest.approx(before["top1"], abs=2.5)
    before = json.loads((old / "knn.json").read_text())["results"][0]
    report = knn_eval(KnnConfig(nb_knn=(5,), **evaluation(old)))
    assert report["results"][0]["top1"] == pytest.approx(before["top1"], abs=2.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = golden_rows(Path(folder))
    GOLDEN.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    sys.exit()
