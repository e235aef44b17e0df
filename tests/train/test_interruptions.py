"""Runs that are killed or stopped continue as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import LONG, TINY, last_state, logged_rows, start_pretrain, wait_for_step

from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain

if TYPE_CHECKING:
    from dino_xcit.train.pretrain import Run


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 2), (2, 0)])
def test_a_run_killed_in_mid_epoch_ends_bit_for_bit_as_if_it_had_not_been(
    tmp_path, accumulate, workers
):
    config = dataclasses.replace(
        LONG,
        output_dir=str(tmp_path / "whole"),
        batch_size_per_gpu=8 // accumulate,
        accumulate_grad_batches=accumulate,
    )
    pretrain(config)
    killed = dataclasses.replace(config, output_dir=str(tmp_path / "killed"), num_workers=workers)
    process = start_pretrain(killed)
    wait_for_step(killed, 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(logged_rows(killed)) < 24, "it was over before it could be killed"
    outcome = pretrain(dataclasses.replace(killed, num_workers=1 - min(workers, 1)))
    assert outcome.step == 24
    assert logged_rows(killed) == logged_rows(config)
    ours, expected = last_state(killed), last_state(config)  # each is read once
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_before_the_first_step_stops_at_once_or_where_it_is_swallowed_after_that_step(
    tmp_path, monkeypatch, swallowed
):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path))

    def interrupted(run: Run) -> None:
        with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dino_xcit.train.pretrain.prepare_folder", interrupted)
    if not swallowed:
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
        return
    outcome = pretrain(config)
    assert (outcome.step, outcome.stopped_by) == (1, signal.SIGINT)


def test_ctrl_c_is_the_callers_again_after_a_run_even_one_that_failed(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(DINOModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(dataclasses.replace(TINY, output_dir=str(tmp_path)))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):
    config = dataclasses.replace(
        LONG, output_dir=str(tmp_path / "run"), checkpoint_every_n_steps=None
    )
    process = start_pretrain(config)
    wait_for_step(config, 5, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    step = len(logged_rows(config))
    assert (
        f"stopped at step {step} of 24, saved; continue with: "
        f"dino-xcit pretrain --config {tmp_path}/run/config.yaml" in err
    )
    assert "Traceback" not in err
    assert pretrain(config).step == 24
    assert f"continuing {tmp_path}/run from step {step}" in capsys.readouterr().err
    assert [int(row["step"]) for row in logged_rows(config)] == list(range(1, 25))
