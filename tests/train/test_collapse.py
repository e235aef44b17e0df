"""Collapse and divergence are reported, distinguished, and leave a checkpoint from before."""

from __future__ import annotations

import dataclasses
import re
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, as_flags, folder_config, logged_rows
from PIL import Image

from dino_xcit.cli import main
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import Subset, open_images
from dino_xcit.errors import RunFailedError
from dino_xcit.train.collapse import (
    ALIKE,
    PATIENCE,
    CollapseError,
    CollapseWatch,
    all_alike,
)
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain

CONFIG = RunConfig(out_dim=16, freeze_last_layer=1)
HEALTHY = {
    "epoch": 1,
    "loss": 0.7 * log(16),
    "teacher_entropy": 0.3 * log(16),
    "teacher_temp": 0.04,
}
UNIFORM = {**HEALTHY, "loss": log(16), "teacher_entropy": log(16)}
SINGLE = {**HEALTHY, "loss": 0.001, "teacher_entropy": 0.0}


def warnings_of(rows, config=CONFIG):
    """The warning, or None, after each row."""
    watch = CollapseWatch(config)
    return [watch(row) for row in rows]


@pytest.mark.parametrize(
    ("row", "name"), [(UNIFORM, "collapse to uniform"), (SINGLE, "collapse to one")]
)
def test_collapse_is_reported_after_patience_with_existing_flags(row, name):
    *before, warning = warnings_of([row] * PATIENCE)
    assert before == [None] * (PATIENCE - 1)
    assert name in str(warning)
    flags = set(re.findall(r"--(\w+)", str(warning)))
    assert flags
    assert flags <= {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_collapse_is_reported_again_but_not_at_every_row(row):
    warnings = warnings_of([row] * (3 * PATIENCE))
    reported = [i + 1 for i, warning in enumerate(warnings) if warning]
    assert reported == [n * PATIENCE for n in (1, 2, 3)]


def test_a_temperature_that_does_not_sharpen_has_a_warning_of_its_own():
    hot = dataclasses.replace(CONFIG, teacher_temp=0.5)
    rows = [{**UNIFORM, "teacher_temp": 0.5}] * PATIENCE
    (warning,) = filter(None, warnings_of(rows, hot))
    assert warning.name == "temperature too high"
    assert "--teacher_temp 0.5" in warning.remedy


def test_a_loss_that_jumps_is_divergence_and_one_that_moves_is_not():
    jumping = [{**HEALTHY, "loss": 0.5 + 0.5 * log(16) * (i % 2), "epoch": 0} for i in range(40)]
    warnings = warnings_of(jumping)
    reported = [i for i, warning in enumerate(warnings) if warning]
    assert reported == list(range(PATIENCE, 40, PATIENCE))
    assert warnings[PATIENCE].name == "divergence"
    assert "student and teacher chase each other without converging" in str(warnings[PATIENCE])
    moving = [{**HEALTHY, "loss": log(16) - 0.05 * i} for i in range(40)]
    assert not any(warnings_of(moving))


def test_one_jump_of_the_loss_makes_the_watch_suspicious_for_patience_rows():
    watch = CollapseWatch(CONFIG)
    suspicions = []
    for loss in [0.5, 0.5, 2.5, *[2.5] * 2 * PATIENCE]:
        assert watch({**HEALTHY, "loss": loss}) is None
        suspicions.append(watch.suspects)
    assert suspicions == [False] * 2 + [True] * PATIENCE + [False] * (PATIENCE + 1)


def test_a_healthy_run_has_no_warning():
    assert not any(warnings_of([HEALTHY] * 50))
    assert not any(warnings_of([HEALTHY, UNIFORM, HEALTHY, HEALTHY, SINGLE, *[HEALTHY] * 30]))


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_no_warning_while_the_last_layer_is_frozen(row):
    young = {**row, "epoch": 0}
    assert not any(warnings_of([young] * 50))
    assert not any(warnings_of([young] * 50 + [row] * (PATIENCE - 1)))


@pytest.mark.parametrize("row", [UNIFORM, SINGLE])
def test_one_healthy_row_restarts_the_count(row):
    healthy = {**HEALTHY, "loss": row["loss"]}
    assert not any(warnings_of(([row] * (PATIENCE - 1) + [healthy]) * 3))


# -- real runs ----------------------------------------------------------------------------------

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


@pytest.mark.slow
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
    with pytest.raises(CollapseError, match=name) as error:
        pretrain(dataclasses.replace(config, on_collapse="stop"))
    assert isinstance(error.value, RunFailedError)
    reported_at = int(logged_rows(config)[-1]["step"])
    assert reported_at < 96
    sound = torch.load(tmp_path / "run/checkpoints/sound.ckpt", weights_only=True)["global_step"]
    # Divergence is reported once half of the last rows have jumped; no checkpoint since the first
    # of them is kept as sound.
    assert (
        sound <= reported_at - PATIENCE // 2
        if name == "divergence"
        else sound == reported_at - PATIENCE
    )


@pytest.mark.slow
def test_a_run_with_a_warning_continues_and_a_resumed_run_counts_the_rows_before_it(
    tmp_path, capsys
):
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
    printed = capsys.readouterr().err
    assert "step 22: temperature too high" in printed
    assert "sound.ckpt is from before the first sign of it" in printed
    assert (
        torch.load(tmp_path / "run/checkpoints/sound.ckpt", weights_only=True)["global_step"] == 12
    )


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
def test_collapse_on_images_that_are_all_alike_names_the_data(tmp_path, alike):
    noise = np.random.default_rng(0).integers(0, 256, (96, 24, 24, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i in range(96):
        Image.fromarray(noise[0 if alike else i]).save(tmp_path / f"images/{i}.png")
    config = folder_config(
        tmp_path / "images",
        output_dir=str(tmp_path / "run"),
        epochs=8,
        on_collapse="stop",
        **COLLAPSING["temperature too high"],
    )
    with pytest.raises(CollapseError, match="temperature too high") as error:
        pretrain(config)
    assert (ALIKE in str(error.value)) == alike


def test_images_are_alike_by_those_that_can_be_read(tmp_path):
    for i in range(20):
        Image.new("RGB", (24, 24), (90, 90, 90 + i % 2)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    images = open_images(folder_config(tmp_path), "train")
    assert all_alike(images)
    assert not all_alike(Subset(images, np.arange(1)))  # one image is like none
    Image.new("RGB", (24, 24), (90, 90, 200)).save(tmp_path / "0.png")
    assert not all_alike(images)


@pytest.mark.slow
def test_a_temperature_that_does_not_sharpen_is_reported_before_the_run(tmp_path, capsys):
    pretrain(
        dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), teacher_temp=0.1, dry_run=True)
    )
    assert (
        "--teacher_temp 0.1 (--warmup_teacher_temp 0.04) is not below --student_temp 0.1"
        in capsys.readouterr().err
    )


@pytest.mark.slow
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


@pytest.mark.slow
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
