"""Loggers beside metrics.csv: what they hold, and what becomes of a run when they fail."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import lightning.pytorch.loggers
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dino_xcit.errors import UserError
from dino_xcit.run_folder import WANDB_ID, read_metrics
from dino_xcit.train.pretrain import pretrain


@pytest.mark.slow
def test_tensorboard_has_the_options_of_the_run(tiny):
    pytest.importorskip("tensorboard")
    folder = pretrain(dataclasses.replace(tiny, logger=("tensorboard",), epochs=1)).folder
    assert "arch: xcit_pico2_p4" in (folder / "tensorboard/hparams.yaml").read_text()


@pytest.mark.slow
def test_a_full_disk_under_tensorboard_does_not_end_the_run(tiny, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log_metrics(*_) -> None:
        raise ValueError("you tried to log") from full  # as Lightning does

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
    outcome = pretrain(dataclasses.replace(tiny, logger=("tensorboard",)))
    assert outcome.exit_code == 0
    assert len(read_metrics(outcome.folder)) == 12
    line = "--logger tensorboard cannot write (No space left on device) and is left out"
    assert capsys.readouterr().err.count(line) == 1


@pytest.fixture
def wandb_runs(monkeypatch):
    """Stand-in for W&B's logger; returns the ids and options of the runs it was given."""
    runs = []

    class WandbLogger(CSVLogger):
        def __init__(self, *, save_dir: Path, project: str, name: str, id: str) -> None:
            super().__init__(save_dir, name=f"wandb{len(runs)}", version=id)
            runs.append((id, {}))

        def log_hyperparams(self, params) -> None:
            runs[-1][1].update(params)

    monkeypatch.setattr(lightning.pytorch.loggers, "WandbLogger", WandbLogger)
    return runs


@pytest.mark.slow
def test_a_continued_run_is_the_same_run_of_wandb_and_has_its_options_there(tiny, wandb_runs):
    config = dataclasses.replace(tiny, logger=("wandb",))
    pretrain(dataclasses.replace(config, trainer={"max_steps": 4}))
    pretrain(config)
    assert wandb_runs[0][0] == wandb_runs[1][0]
    assert wandb_runs[1][1]["arch"] == tiny.arch
    assert (Path(tiny.output_dir) / WANDB_ID).read_text().strip() == wandb_runs[0][0]


def test_wandb_without_a_login_is_one_line(tiny, wandb_runs, monkeypatch):
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})

    def experiment(_) -> None:
        raise error("api_key not configured (no-tty)")

    logger = lightning.pytorch.loggers.WandbLogger
    monkeypatch.setattr(logger, "experiment", property(experiment))
    with pytest.raises(UserError, match=r"--logger wandb cannot start \(api_key .*wandb login"):
        pretrain(dataclasses.replace(tiny, logger=("wandb",)))
