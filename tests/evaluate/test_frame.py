"""A new evaluation is one file and one row in the command table; the frame does the rest."""

from __future__ import annotations

import json
import logging
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from evaluation_helpers import CPU_ONLY, save_run
from helpers import TINY

from dino_xcit import cli
from dino_xcit.config.evaluation import ClassificationConfig
from dino_xcit.data import shapes
from dino_xcit.evaluate.features import chosen_parts, select_parts
from dino_xcit.evaluate.frame import evaluate
from dino_xcit.evaluate.inputs import open_inputs
from dino_xcit.evaluate.report import hits, scores, with_interval
from dino_xcit.runtime import launch

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.evaluate.features import Features
    from dino_xcit.evaluate.frame import Evaluation
    from dino_xcit.evaluate.report import Report, Result

# -- the file: a toy evaluation -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeanConfig(ClassificationConfig):
    """Classification by the nearest mean of a class's features."""

    top: int = 2
    """classes per image that count as correct"""


def mean_eval(config: MeanConfig) -> Report:
    """Run `dino-xcit mean-eval`; return the content of mean.json."""
    return evaluate(
        config,
        score,
        name="mean",
        protocol="nearest class mean",
        title="nearest mean",
        columns={
            "top-1 % [95 %]": lambda row: with_interval(row, "top1"),
            "top-k % [95 %]": lambda row: with_interval(row, "topk"),
        },
    )


def score(evaluation: Evaluation[MeanConfig], features: Features) -> list[Result]:
    train, test = features.split("train"), features.split("validation")
    parts = chosen_parts(evaluation.config, features)
    x, y = (select_parts(split.features, parts).float() for split in (train, test))
    classes = torch.unique(train.labels)
    means = torch.stack([x[train.labels == c].mean(0) for c in classes])
    distance = torch.cdist(y, means)  # (m, K)
    ranked = classes[distance.argsort(dim=1)]
    if evaluation.writes(features):
        np.save(evaluation.file("means.npy"), means.numpy())
    measures = {
        "top1": hits(ranked, test.labels, 1),
        "topk": hits(ranked, test.labels, evaluation.config.top),
    }
    return [scores(measures, evaluation.config.seed)]


# -- the row in the command table -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def command(monkeypatch):
    row = cli.Command(
        MeanConfig, "evaluate.mean:mean_eval", "classify by class means", resumes=True
    )
    monkeypatch.setitem(cli.COMMANDS, "mean-eval", row)
    # Where the file would be.
    monkeypatch.setitem(sys.modules, "dino_xcit.evaluate.mean", sys.modules[__name__])


# -- what the frame does --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", 40)
    return save_run(tmp_path / "run", seed=1)  # not the untrained baseline's seed


def typed(run: Path, *more: str) -> list[str]:
    flags = ["--accelerator", "cpu", "--precision", "32-true", "--num_workers", "0"]
    return ["mean-eval", "--weights", str(run), "--cache_dir", str(run / "cache"), *flags, *more]


def test_the_toy_is_a_command_with_report_table_and_baselines(run, capsys):
    assert cli.main(typed(run, "--baselines", "--top", "3")) == 0
    report = json.loads((run / "mean.json").read_text())
    assert list(report) == [
        *("protocol", "results", "baselines", "seconds", "weights", "data"),
        *("feature_extraction", "precision", "options", "versions", "machine"),
    ]
    assert report["protocol"] == "nearest class mean"
    assert report["data"] == {
        "train": TINY.num_images,
        "validation": 40,
        "classes": 10,
        "unreadable": 0,
    }
    assert report["options"]["top"] == 3
    assert report["options"]["image_size"] == TINY.global_crops_size
    assert report["feature_extraction"]["images"] == 3 * (TINY.num_images + 40)
    assert list(report["baselines"]) == ["raw pixels", "xcit_pico2_p4, untrained"]
    (row,) = report["results"]
    assert 0 <= row["top1"] <= row["topk"] <= 100
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nearest mean ")
    assert "  top-1 % [95 %]  " in lines[0]
    for line, name in zip(lines[2:5], (str(run), *report["baselines"]), strict=True):
        assert line.startswith(name)
    assert f"{row['top1']:.1f} [" in lines[2]
    assert lines[5] == f"{run}: mean.json, means.npy"
    assert (run / "means.npy").exists()


def test_the_toys_function_returns_what_the_file_contains(run):
    config = MeanConfig(**{**vars(CPU_ONLY), "weights": str(run), "no_cache": True})
    report = mean_eval(config)
    assert report == json.loads((run / "mean.json").read_text())
    with open_inputs(config, launch(config)) as inputs:
        train, test = (inputs.features[0].split(name) for name in ("train", "validation"))
    means = [train.features[train.labels == c, 0].mean(0) for c in range(10)]
    nearest = [min(range(10), key=lambda c: (x[0] - means[c]).norm()) for x in test.features]
    right = np.mean([c == label for c, label in zip(nearest, test.labels.tolist(), strict=True)])
    assert report["results"][0]["top1"] == pytest.approx(100 * right, abs=1e-3)


def test_the_toy_takes_the_parts_of_features_that_are_named(run):
    options = {
        **vars(CPU_ONLY),
        "weights": str(run),
        "n_last_blocks": 2,
        "avgpool_patchtokens": True,
    }
    mean_eval(MeanConfig(**{**options, "no_cache": True}))
    assert np.load(run / "means.npy").shape == (10, 3 * 64)


def test_features_in_files_are_evaluated_too(run, tmp_path):
    dump, generator = tmp_path / "dump", torch.Generator().manual_seed(0)
    dump.mkdir()
    for split in ("train", "test"):
        torch.save(torch.randn(20, 8, generator=generator), dump / f"{split}feat.pth")
        torch.save(torch.arange(20) % 4, dump / f"{split}labels.pth")
    report = mean_eval(MeanConfig(load_features=str(dump), accelerator="cpu", devices="1"))
    assert report["weights"] == str(dump)
    assert report["data"] == {"train": 20, "validation": 20, "classes": 4, "unreadable": 0}


def test_an_error_of_the_toys_own_keeps_its_traceback(run, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("an error in score")

    monkeypatch.setattr(sys.modules[__name__], "score", broken)
    assert cli.main(typed(run)) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (run / "mean.json").exists()


def test_an_evaluation_leaves_random_numbers_and_logging_as_they_were(run):
    def states() -> list[object]:
        loggers = [logging.getLogger(name).level for name in ("", "lightning", "lightning.fabric")]
        numpy_state = [
            item.tolist() if hasattr(item, "tolist") else item for item in np.random.get_state()
        ]
        return [torch.get_rng_state().tolist(), numpy_state, random.getstate(), loggers]

    before = states()
    options = {**vars(CPU_ONLY), "weights": str(run), "baselines": True, "no_cache": True}
    mean_eval(MeanConfig(**options))
    assert states() == before
