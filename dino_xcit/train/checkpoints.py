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
import socket
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_xcit.errors import UserError
from dino_xcit.files import sync
from dino_xcit.run_folder import DAMAGED, LAST, LOCK, PREVIOUS, SOUND
from dino_xcit.runtime import is_first_process, say

if TYPE_CHECKING:
    from collections.abc import Iterator

# -- checkpoints -----------------------------------------------------------------------------------------------------


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint and waits until the disk has it. An error is kept, not raised: the run can go on without it, and
    other processes wait for this one."""

    error: Exception | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
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
        kept = sorted(
            str(path) for path in (folder / LAST).parent.glob("*.ckpt") if path not in there
        )
        raise UserError(
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
            raise UserError(
                f"--output_dir {folder} is in use by {holder}; wait for it, or name another"
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its holder ended and took it away
    try:
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
        file.close()
