"""Collapse and divergence are told, told apart, and leave a checkpoint from before."""

from __future__ import annotations

import dataclasses
import re
from math import log
from pathlib import Path

import pytest
import torch
from helpers import TINY, as_flags, logged_rows

from dino_xcit.cli import main
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.train.collapse import PATIENCE, CollapseError, CollapseWatch
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain

CONFIG = PretrainConfig(out_dim=16, freeze_last_layer=1)
HEALTHY = {
    "epoch": 1,
    "loss": 0.7 * log(16),
    "teacher_entropy": 0.3 * log(16),
    "teacher_temp": 0.04,
}
UNIFORM = {**HEALTHY, "loss": log(16), "teacher_entropy": log(16)}
SINGLE = {**HEALTHY, "loss": 0.001, "teacher_entropy": 0.0}


def signs(rows, config=CONFIG):
    watch = CollapseWatch(config)
    return [watch(row) for row in rows]


@pytest.mark.parametrize(
    ("row", "text"), [(UNIFORM, "collapse to uniform"), (SINGLE, "collapse to one")]
)
def test_collapse_is_told_after_patience_and_names_flags(row, text):
    said = signs([row] * PATIENCE)
    assert said[:-1] == [None] * (PATIENCE - 1)
    assert text in str(said[-1])
    flags = set(re.findall(r"--(\w+)", str(said[-1])))
    assert flags
    assert flags <= {field.name for field in dataclasses.fields(PretrainConfig)}


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_collapse_is_told_again_but_not_at_every_row(row):
    said = signs([row] * (3 * PATIENCE))
    assert [i + 1 for i, text in enumerate(said) if text] == [n * PATIENCE for n in (1, 2, 3)]


def test_a_temperature_that_does_not_sharpen_is_told_as_such():
    hot = dataclasses.replace(CONFIG, teacher_temp=0.5)
    (sign,) = filter(None, signs([{**UNIFORM, "teacher_temp": 0.5}] * PATIENCE, hot))
    assert sign.name == "temperature too high"
    assert "--teacher_temp 0.5" in sign.remedy


def test_a_loss_that_jumps_is_divergence_and_one_that_moves_is_not():
    jumping = [{**HEALTHY, "loss": 0.5 + 0.5 * log(16) * (i % 2), "epoch": 0} for i in range(40)]
    said = signs(jumping)
    first = next(i for i, sign in enumerate(said) if sign)
    assert first <= PATIENCE
    assert said[first].name == "divergence"
    moving = [{**HEALTHY, "loss": log(16) - 0.05 * i} for i in range(40)]
    assert not any(signs(moving))


def test_healthy_run_hears_nothing():
    assert not any(signs([HEALTHY] * 50))
    assert not any(signs([HEALTHY, UNIFORM, HEALTHY, HEALTHY, SINGLE, *[HEALTHY] * 30]))


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_young_run_hears_nothing(row):
    young = {**row, "epoch": 0}
    assert not any(signs([young] * 50))
    assert not any(signs([young] * 50 + [row] * (PATIENCE - 1)))


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_one_healthy_row_starts_the_count_anew(row):
    healthy = {**HEALTHY, "loss": row["loss"]}
    assert not any(signs(([row] * (PATIENCE - 1) + [healthy]) * 3))


# -- real runs -------------------------------------------------------------------------------------------------------

COLLAPSING = {
    "collapse to one prototype": {
        "center_momentum": 1.0,
        "teacher_temp": 0.01,
        "warmup_teacher_temp": 0.01,
        "lr": 0.05,
    },
    "temperature too high": {"teacher_temp": 2.0, "warmup_teacher_temp": 2.0},
    "divergence": {"lr": 20.0},
}


@pytest.mark.parametrize("name", COLLAPSING)
def test_a_run_that_collapses_is_stopped_with_a_checkpoint_from_before(tmp_path, name):
    config = dataclasses.replace(
        TINY,
        output_dir=str(tmp_path / "run"),
        num_images=96,
        epochs=8,
        checkpoint_every_n_steps=1,
        **COLLAPSING[name],
    )
    with pytest.raises(CollapseError, match=name):
        pretrain(dataclasses.replace(config, on_collapse="stop"))
    told_at = int(logged_rows(config)[-1]["step"])
    assert told_at < 96
    sound = torch.load(tmp_path / "run/checkpoints/sound.ckpt", weights_only=True)["global_step"]
    # Divergence is told once half of the last rows have jumped, and from the first that did nothing is kept as sound.
    assert sound <= told_at - PATIENCE // 2 if name == "divergence" else sound == told_at - PATIENCE


def test_a_warning_lets_the_run_go_on_and_a_resumed_run_remembers_the_signs(tmp_path, capsys):
    config = dataclasses.replace(
        TINY,
        output_dir=str(tmp_path / "run"),
        num_images=96,
        epochs=4,
        checkpoint_every_n_steps=1,
        teacher_temp=2.0,
    )
    config = dataclasses.replace(config, warmup_teacher_temp=2.0)
    pretrain(dataclasses.replace(config, trainer={"max_steps": 17}))  # five rows with the sign
    assert "temperature too high" not in capsys.readouterr().err
    assert pretrain(config).step == 48
    said = capsys.readouterr().err
    assert "step 22: temperature too high" in said
    assert "sound.ckpt is from before the first sign of it" in said
    assert (
        torch.load(tmp_path / "run/checkpoints/sound.ckpt", weights_only=True)["global_step"] == 12
    )


def test_a_temperature_that_does_not_sharpen_is_told_before_the_run(tmp_path, capsys):
    pretrain(
        dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), teacher_temp=0.1, dry_run=True)
    )
    assert (
        "--teacher_temp 0.1 (--warmup_teacher_temp 0.04) is not below --student_temp 0.1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_nan_in_a_weight_is_found_by_the_next_step_and_never_saved(
    tmp_path, monkeypatch, capsys, network
):
    step = DINOModule.training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == 7:
            with torch.no_grad():
                getattr(self, network).backbone.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DINOModule, "training_step", poisoned)
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), checkpoint_every_n_steps=1)
    assert main(["pretrain", *as_flags(config)]) == 1
    assert "by step 8: the loss or a gradient is not finite" in capsys.readouterr().err
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert all(t.isfinite().all() for t in saved["state_dict"].values())
    monkeypatch.setattr(DINOModule, "training_step", step)
    assert pretrain(config).step == 12


def test_a_weight_that_no_loss_has_seen_is_not_saved_either(tmp_path, monkeypatch, capsys):
    step = DINOModule.optimizer_step

    def poisoned(self, *arguments, **others):
        step(self, *arguments, **others)
        if self.global_step == 5:
            with torch.no_grad():
                self.teacher.backbone.norm.weight[3] = float("inf")

    monkeypatch.setattr(DINOModule, "optimizer_step", poisoned)
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), checkpoint_every_n_steps=1)
    assert main(["pretrain", *as_flags(config)]) == 1
    assert "teacher.backbone.norm.weight" in capsys.readouterr().err
    assert (
        torch.load(Path(config.output_dir) / "checkpoints/last.ckpt", weights_only=True)[
            "global_step"
        ]
        == 5
    )
