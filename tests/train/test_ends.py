"""However a run ends, its process ends: with its exit code, and soon, also while workers live."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import TINY, as_flags, folder_config, make_folder
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.workers import SHARED_MEMORY, restartable
from dino_xcit.errors import LoaderError
from dino_xcit.train.signals import SECONDS_FOR_DOUBLES, StopSignals

if TYPE_CHECKING:
    import torch

    from dino_xcit.config.pretrain import RunConfig

LIMIT = 120  # seconds, of which most are imports; a process that hangs never ends

PATCHED = """
import sys
{patch}
from dino_xcit.cli import entry
sys.argv = ["dino-xcit", "pretrain", *sys.argv[1:]]
entry()
"""
WORKER = """
from dino_xcit.data.loader import CropDataset
from torch.utils.data import get_worker_info
read = CropDataset.__getitem__
CropDataset.__getitem__ = lambda *_: read(*_) if get_worker_info() is None else 1 / 0
"""
STEP = """
from dino_xcit.train.module import DINOModule
DINOModule.training_step = lambda *_: 1 / 0
"""
ENDLESS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from dino_xcit.train.module import DINOModule
def training_step(*_):
    print("step", flush=True)
    while True:
        time.sleep(0.1)
DINOModule.training_step = training_step
"""


def patched_run(config: RunConfig, patch: str) -> subprocess.Popen[str]:
    """Start a run after some Python code, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PATCHED.format(patch=patch), *as_flags(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_an_unreadable_image_ends_every_process_with_one_line(tmp_path, run_cli, devices):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(40)])
    (folder / "40.png").write_text("no image")
    permutations = (np.random.default_rng((seed, 0)).permutation(41) for seed in range(99))
    seed = next(s for s, order in enumerate(permutations) if order[20] == 40)  # in the third step
    config = folder_config(
        folder,
        output_dir=str(tmp_path / "run"),
        num_workers=1,
        seed=seed,
        on_bad_image="raise",
        devices=str(devices),
        batch_size_per_gpu=8 // devices,
    )
    finished = run_cli("pretrain", *as_flags(config), timeout=LIMIT)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("dino-xcit pretrain: cannot read") == 1
    assert "40.png: not an image; --on_bad_image replace" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("patch", [WORKER, STEP])
def test_a_fault_in_a_worker_or_in_a_step_ends_the_process(tmp_path, patch):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path), num_workers=1)
    process = patched_run(config, patch)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "ZeroDivisionError" in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_second_signal_ends_a_first_step_that_takes_long(tmp_path, number, code):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path), num_workers=1)
    process = patched_run(config, ENDLESS)
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    process.send_signal(number)
    assert process.stderr is not None
    while "again stops at once, without saving" not in (line := process.stderr.readline()):
        assert line, "the first signal had no effect"
    time.sleep(SECONDS_FOR_DOUBLES + 0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err
    assert "Traceback" not in err


def test_a_signal_that_is_sent_twice_at_once_is_one(capsys):
    """As launchers send SIGTERM to processes that a scheduler has sent it to."""
    with StopSignals().listening() as signals:
        signals.listen()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signals.asked == signal.SIGTERM
    assert capsys.readouterr().err.count("stopping after this step") == 1


class FullSharedMemory(Dataset):
    """Batches for which there is no shared memory: torch's error, or the system's signal."""

    def __init__(self, by_signal: bool) -> None:
        self.by_signal = by_signal

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.by_signal:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGBUS)
        reason = f"{os.strerror(errno.ENOSPC)} ({errno.ENOSPC})"
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {reason}")


@pytest.mark.parametrize("by_signal", [False, True])
@pytest.mark.slow
def test_too_little_shared_memory_is_one_line_with_what_to_do(by_signal):
    images = FullSharedMemory(by_signal)
    with pytest.raises(LoaderError) as raised:
        list(restartable(lambda _: DataLoader(images, num_workers=1)))
    assert str(raised.value) == SHARED_MEMORY
    assert all(way in SHARED_MEMORY for way in ("--shm-size", "--ipc=host", "--num_workers 0"))
