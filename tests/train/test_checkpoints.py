"""Nothing that a run has computed is lost when its machine, disk or folder fails."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import LONG, TINY, as_flags, last_state, logged_rows, start_pretrain, wait_for_step
from safetensors import SafetensorError

from dino_xcit.cli import main
from dino_xcit.errors import RunFailedError, UserError
from dino_xcit.run_folder import LOCK, Metrics, read_metrics
from dino_xcit.train import callback
from dino_xcit.train.checkpoints import is_whole, locked, newest_whole
from dino_xcit.train.module import DINOModule
from dino_xcit.train.online_eval import OnlineEvaluator
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.signals import StopConsensus
from dino_xcit.weights import reading


def same_end(one, other) -> None:
    assert logged_rows(one) == logged_rows(other)
    ours, expected = last_state(other), last_state(one)  # each is read once
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    moments = [
        torch.load(Path(c.output_dir) / "checkpoints/last.ckpt", weights_only=True)[
            "optimizer_states"
        ]
        for c in (one, other)
    ]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps that nothing happened to."""
    config = dataclasses.replace(LONG, output_dir=str(tmp_path_factory.mktemp("whole") / "run"))
    pretrain(config)
    return config


def during(monkeypatch, happenings) -> None:
    """What happens before the training step of these numbers."""
    step = DINOModule.training_step

    def patched(self, batch, batch_idx):
        happenings.get(self.global_step, lambda: None)()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DINOModule, "training_step", patched)


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_scheduler_s_signal_saves_and_the_run_goes_on_from_there(whole, tmp_path, number, code):
    config = dataclasses.replace(
        whole, output_dir=str(tmp_path / "run"), checkpoint_every_n_steps=None, num_workers=1
    )
    process = start_pretrain(config)
    wait_for_step(config, 5, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"stopped at step {len(logged_rows(config))} of 24, saved" in err
    assert len(logged_rows(config)) < 24
    pretrain(dataclasses.replace(config, num_workers=0))
    same_end(whole, config)


@pytest.mark.slow
def test_under_slurm_the_job_is_asked_for_again(tmp_path):
    config = dataclasses.replace(LONG, output_dir=str(tmp_path / "run"))
    asked = tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {asked}\n')
    scontrol.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "dino",
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    job |= {
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    process = start_pretrain(config, **job)
    wait_for_step(config, 5, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert asked.read_text().split() == ["requeue", "77"]
    assert "saved" in err


def _vote(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    agreement = StopConsensus()
    heard = [agreement(rank == 1 and step == 2, False) for step in range(5)]
    agreement.settle()
    torch.save(heard, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_learn_at_the_same_step_what_one_of_them_wants(tmp_path):
    mp.start_processes(_vote, (str(tmp_path),), nprocs=2, start_method="spawn")
    heard = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert heard[0] == heard[1]
    assert [step for step, (stop, _) in enumerate(heard[0]) if stop] == [3]
    assert not any(other for _, other in heard[0])


def test_one_process_is_heard_at_once():
    assert StopConsensus()(True, False) == [True, False]


# -- checkpoints -------------------------------------------------------------------------------


def stopped_run(tmp_path) -> tuple[dataclasses.dataclass, Path]:
    """A run of 24 steps that ended after 8, with checkpoints of the steps 6 and 8."""
    config = dataclasses.replace(LONG, output_dir=str(tmp_path / "run"))
    pretrain(dataclasses.replace(config, trainer={"max_steps": 8}))
    return config, tmp_path / "run/checkpoints"


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor, where no format would notice."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [flip_a_bit, truncate, lambda path: path.write_bytes(b""), os.remove]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, tmp_path, capsys, damage):
    config, folder = stopped_run(tmp_path)
    damage(folder / "last.ckpt")
    outcome = pretrain(config)
    assert outcome.step == 24
    said = capsys.readouterr().err
    assert "from step 6" in said
    assert ("last.ckpt is damaged; continuing from" in said) == (damage is not os.remove)
    same_end(whole, config)


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_begins_anew(tmp_path, capsys):
    config, folder = stopped_run(tmp_path)
    for name in ("last.ckpt", "previous.ckpt"):
        truncate(folder / name)
    before = logged_rows(config)
    assert main(["pretrain", *as_flags(config)]) == 2
    assert "last.ckpt and " in (said := capsys.readouterr().err)
    assert "previous.ckpt are damaged; name another --output_dir, or remove them" in said
    (folder / "epoch0001.ckpt").write_bytes(b"")
    assert main(["pretrain", *as_flags(config)]) == 2
    assert (
        f"damaged; if one of {folder / 'epoch0001.ckpt'} is whole, copy it there"
        in capsys.readouterr().err
    )
    assert (folder / "last.ckpt").exists()
    assert logged_rows(config) == before


def test_a_checkpoint_that_would_run_code_is_no_whole_one(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    torch.save({"state_dict": Bad()}, tmp_path / "last.ckpt")
    assert not is_whole(tmp_path / "last.ckpt")
    assert not (tmp_path / "hacked").exists()
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "good.ckpt")
    assert is_whole(tmp_path / "good.ckpt")
    assert newest_whole(tmp_path) is None  # a folder without checkpoints


@pytest.mark.slow
def test_checkpoints_by_the_clock(tmp_path):
    config = dataclasses.replace(
        TINY,
        output_dir=str(tmp_path / "run"),
        checkpoint_every_n_minutes=0,
        trainer={"max_steps": 4},
        saveckp_freq=0,
    )
    pretrain(config)
    steps = [
        torch.load(tmp_path / f"run/checkpoints/{name}.ckpt", weights_only=True)["global_step"]
        for name in ("previous", "last")
    ]
    assert steps == [3, 4]


# -- disks and folders -------------------------------------------------------------------------


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_run_and_harms_nothing(whole, tmp_path, monkeypatch, capsys):
    """Files cannot grow beyond 50 kB for a while: no checkpoint can be written."""
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    last = tmp_path / "run/checkpoints/last.ckpt"
    saved: list[int] = []

    def look() -> None:
        assert is_whole(last)
        saved.append(torch.load(last, weights_only=True)["global_step"])

    during(
        monkeypatch,
        {7: lambda: limit_files(50_000), 14: look, 16: lambda: limit_files(resource.RLIM_INFINITY)},
    )
    try:
        pretrain(config)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert saved == [6]
    said = capsys.readouterr().err
    assert (
        f"step 9 could not be saved in {tmp_path}/run (File too large); trying again in a minute"
        in said
    )
    same_end(whole, config)


@pytest.mark.slow
def test_a_last_step_that_cannot_be_saved_is_an_error_and_the_one_before_stays(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(callback, "SECONDS_BETWEEN_TRIES", 0)
    monkeypatch.setattr(callback, "LAST_TRIES", 2)
    config = dataclasses.replace(LONG, output_dir=str(tmp_path / "run"))
    during(monkeypatch, {22: lambda: limit_files(50_000)})
    try:
        assert main(["pretrain", *as_flags(config)]) == 1
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert "step 24 is not saved; " in capsys.readouterr().err
    assert (
        torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 21
    )


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 1), (2, 0)])
def test_a_run_saved_after_its_last_loop_goes_on(tmp_path, accumulate, workers):
    """As when the disk has room again only once the run has been asked to stop."""
    config = dataclasses.replace(
        LONG,
        output_dir=str(tmp_path / "whole"),
        batch_size_per_gpu=8 // accumulate,
        accumulate_grad_batches=accumulate,
        checkpoint_every_n_steps=None,
        num_workers=workers,
    )
    pretrain(config)
    stopped = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    assert pretrain(dataclasses.replace(stopped, trainer={"max_steps": 17})).step == 17
    assert pretrain(stopped).step == 24
    same_end(config, stopped)


@pytest.mark.slow
def test_room_for_the_checkpoint_but_not_for_the_teacher(whole, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    save_file = reading.save_file

    def full(*_, **__):
        monkeypatch.setattr(reading, "save_file", save_file)
        raise SafetensorError("No space left on device")

    during(monkeypatch, {7: lambda: monkeypatch.setattr(reading, "save_file", full)})
    pretrain(config)
    assert "step 9 could not be saved" in capsys.readouterr().err
    same_end(whole, config)


@pytest.mark.slow
def test_a_folder_deleted_in_mid_run_is_made_again(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    during(monkeypatch, {10: lambda: shutil.rmtree(tmp_path / "run")})
    outcome = pretrain(config)
    assert outcome.step == 24
    same_end(whole, config)
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "teacher.safetensors", "curves.png"} <= there


@pytest.mark.slow
def test_a_second_run_on_the_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    config = dataclasses.replace(LONG, output_dir=str(tmp_path / "run"), epochs=40, warmup_epochs=1)
    first = start_pretrain(config)
    wait_for_step(config, 2, first)
    second = start_pretrain(config)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"--output_dir {tmp_path}/run is in use by another run" in err
    assert len(err.strip().splitlines()) == 1
    first.kill()
    first.communicate()
    logged = len(logged_rows(config))
    third = start_pretrain(config)
    wait_for_step(config, logged + 1, third)
    third.send_signal(signal.SIGTERM)
    third.communicate(timeout=60)
    assert third.returncode == 143


def test_a_lock_file_that_no_process_holds_does_not_lock(tmp_path):
    (tmp_path / LOCK).touch()
    with locked(tmp_path):
        pass
    with locked(tmp_path), pytest.raises(UserError, match="in use by another run"):
        locked(tmp_path).__enter__()


def test_a_folder_that_was_deleted_and_belongs_to_another_run_is_not_written_to(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"))

    def other_run_takes_the_folder() -> None:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOCK).touch()

    during(monkeypatch, {3: other_run_takes_the_folder})
    with pytest.raises(RunFailedError, match="was deleted during the run and now belongs to ano"):
        pretrain(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_deleted_folder_is_locked_again_when_it_is_made_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder) as lock:
        shutil.rmtree(folder)
        lock.require_own()
        folder.mkdir()
        lock.take_again()
        lock.require_own()
        with pytest.raises(UserError, match="in use by another run"):
            locked(folder).__enter__()


# -- rows --------------------------------------------------------------------------------------


def test_rows_that_could_not_be_written_are_written_with_the_next(tmp_path):
    metrics = Metrics(tmp_path, first_step=0)
    metrics.write({"step": 1, "loss": 0.5})
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        metrics.write({"step": 2, "loss": 0.25})
    tmp_path.mkdir()
    metrics.write({"step": 3, "loss": 0.125})
    metrics.amend({"knn": 7.0})
    assert [list(row.values()) for row in read_metrics(tmp_path)] == [
        ["1", "0.5", ""],
        ["2", "0.25", ""],
        ["3", "0.125", "7.0"],
    ]


@pytest.mark.slow
def test_a_run_killed_in_evaluating_evaluates_when_it_goes_on(whole, tmp_path, monkeypatch):
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    evaluate = OnlineEvaluator.__call__

    def killed(self, *_):
        raise KeyboardInterrupt

    for at, patched in ((24, killed), (24, evaluate)):
        monkeypatch.setattr(OnlineEvaluator, "__call__", patched)
        if patched is killed:
            with pytest.raises(KeyboardInterrupt):
                pretrain(config)
            assert not logged_rows(config)[-1].get("knn_top1")
        else:
            assert pretrain(config).step == at
    assert logged_rows(config)[-1]["knn_top1"]
    same_end(whole, config)


@pytest.mark.slow
def test_a_signal_in_evaluating_stops_it(tmp_path, monkeypatch):
    config = dataclasses.replace(LONG, output_dir=str(tmp_path / "run"), eval_every_n_epochs=1)
    evaluate = OnlineEvaluator.__call__

    def signalled(self, backbone, device, asked_to_stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, backbone, device, asked_to_stop)

    for step in (12, 24):
        monkeypatch.setattr(OnlineEvaluator, "__call__", signalled)
        for _ in range(2):  # the second time in making up for it
            outcome = pretrain(config)
            assert outcome.stopped_by == signal.SIGTERM
            assert outcome.step == step
            assert not logged_rows(config)[step - 1].get("rankme")
        monkeypatch.setattr(OnlineEvaluator, "__call__", evaluate)
        pretrain(dataclasses.replace(config, trainer={"max_steps": 23}))
    assert pretrain(config).stopped_by is None
    assert all(logged_rows(config)[step - 1]["rankme"] for step in (12, 24))


# -- other numbers of processes ----------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_killed_go_on_bit_for_bit(tmp_path):
    base = dataclasses.replace(LONG, devices="2", batch_size_per_gpu=4)
    ran, killed = (
        dataclasses.replace(base, output_dir=str(tmp_path / name)) for name in ("ran", "killed")
    )
    process = start_pretrain(ran)
    process.communicate(timeout=200)
    process = start_pretrain(killed)
    wait_for_step(killed, 8, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 120
    while len(logged_rows(killed)) < 24 and time.monotonic() < deadline:
        process = start_pretrain(
            killed
        )  # refused while the other process of the first start is still dying
        process.communicate(timeout=200)
    same_end(ran, killed)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_either_of_two_processes_stops_both(tmp_path, asked):
    config = dataclasses.replace(
        LONG, devices="2", batch_size_per_gpu=4, output_dir=str(tmp_path / "run"), epochs=40
    )
    process = start_pretrain(config)
    wait_for_step(config, 4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill([process.pid, int(children[0])][asked], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "saved; continue with" in err
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert saved == len(logged_rows(config))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_to_float_rounding(whole, tmp_path, run_cli):
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    pretrain(dataclasses.replace(config, trainer={"max_steps": 9}))
    finished = run_cli(
        "pretrain", *as_flags(dataclasses.replace(config, devices="2", batch_size_per_gpu=4))
    )
    assert finished.returncode == 0, finished.stderr
    for one, other in zip(logged_rows(whole), logged_rows(config), strict=True):
        for column in ("loss", "grad_norm", "center_norm"):
            assert float(other[column]) == pytest.approx(float(one[column]), rel=5e-3), (
                one["step"],
                column,
            )
