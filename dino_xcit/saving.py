"""What keeps a run from being lost: its checkpoints, the signals that stop it, the lock on its folder.

A checkpoint is written beside its place, brought to the disk, and takes the place of the one before, which is kept as
`previous.ckpt`: whenever the machine dies, one of the two is whole. torch's files carry a checksum of every tensor, which is
compared before a run goes on from one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_xcit.machine import is_first_process, say
from dino_xcit.run_folder import sync
from dino_xcit.weights import LAST

PREVIOUS = "checkpoints/previous.ckpt"
SOUND = "checkpoints/sound.ckpt"  # the last one before a sign of collapse
DAMAGED = "checkpoints/damaged.ckpt"
LOCK = ".lock"
STOPPED_BY = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


# -- checkpoints -----------------------------------------------------------------------------------------------------


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint and waits until the disk has it. An error is kept, not raised: the run can go on without it, and
    other processes wait for this one."""

    error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.error = None
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(checkpoint, file)
            sync(path)
        except (OSError, RuntimeError) as error:
            self.error = _cause(error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def keep_as_sound(folder: Path) -> None:
    """last.ckpt under a second name, for which it takes no more room until there is a newer one."""
    beside = (folder / SOUND).with_name(".sound.writing.ckpt")
    beside.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, beside)
    except OSError:  # a file system without links
        shutil.copyfile(folder / LAST, beside)
    os.replace(beside, folder / SOUND)


def _cause(error: BaseException) -> Exception:
    """torch fails once more, by its own error, in closing the file that the disk had no room for."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error  # type: ignore[return-value]


def take_its_place(beside: Path, folder: Path) -> None:
    """A checkpoint that is whole becomes last.ckpt, and last.ckpt becomes previous.ckpt."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(beside, folder / LAST)
    sync((folder / LAST).parent)


def is_whole(path: Path) -> bool:
    """Whether every tensor has the checksum that it was written with, and the file holds nothing but plain values."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever damage does to zip files and pickles
        return False
    return True


def checkpoints_of(folder: Path) -> list[Path]:
    """Those that a run goes on from, the newest first."""
    return [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from, or None if there is none. A damaged one is told, and put aside.

    Raises ValueError if there are checkpoints, but none that is whole.
    """
    there = checkpoints_of(folder)
    whole = next(filter(is_whole, there), None)
    if there and whole is None:
        kept = sorted(str(path) for path in (folder / LAST).parent.glob("*.ckpt") if path not in there)
        raise ValueError(
            f"{' and '.join(map(str, there))} {'are' if there[1:] else 'is'} damaged; "
            + (
                f"if one of {', '.join(kept)} is whole, copy it there"
                if kept
                else "name another --output_dir, or remove them"
            )
        )
    if whole != there[0] if there else False:
        say(f"{there[0]} is damaged; going on from {whole}, which was written before it")
        if is_first_process():
            os.replace(there[0], folder / DAMAGED)
    return whole


# -- signals ---------------------------------------------------------------------------------------------------------


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for a stop after the step instead of breaking into it, once there are steps."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Ctrl-C stops at once until `listen` is called."""
        before = {number: signal.getsignal(number) for number in STOPPED_BY}
        signal.signal(signal.SIGINT, self._at_once)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        for number in STOPPED_BY:
            signal.signal(number, self._on_signal)

    def _at_once(self, number: int, frame: Any) -> None:
        self.asked = signal.SIGINT  # the exception may be swallowed by what it breaks into: then the first step is the last
        raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.asked is not None:  # asked twice: at once
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = signal.Signals(number)
            again = "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
            print(f"\n{STOPPED_BY[self.asked]}: stopping at the next chance{again}", file=sys.stderr, flush=True)


class Agreement:
    """Processes tell each other what they want, and all learn it at the same step, the next one.

    By a group of its own on CPU, so that no step waits for the device.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, *wanted: bool) -> list[bool]:
        if self.group is None:
            return list(wanted)
        before = self.settle() or [False] * len(wanted)
        votes = torch.tensor(wanted, dtype=torch.int32)
        self.pending = dist.all_reduce(votes, group=self.group, async_op=True), votes
        return before

    def settle(self) -> list[bool] | None:
        """What was last asked, once all have answered."""
        if self.pending is None:
            return None
        (work, votes), self.pending = self.pending, None
        work.wait()
        return (votes > 0).tolist()


def requeue() -> bool:
    """Ask SLURM, if this is its job, to start it again, as Lightning's own handler does -> whether it will."""
    if not SLURMEnvironment.detect():
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"scontrol requeue {job}: {error}")
        return False
    say(f"scontrol requeue {job}: {asked.stderr.strip() or 'done'}")
    return asked.returncode == 0


# -- one run a folder ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This process alone writes the run. The system takes the lock back when the process ends, however it ends.

    Raises ValueError if another run has the folder.
    """
    if not is_first_process():
        yield
        return
    path = folder / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"--output_dir {folder} is in use by {holder}; wait for it, or name another") from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder ended and took it away
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
        file.close()
