"""The checkpoints of a run, and the lock on its folder.

A checkpoint is written beside its place, synced to the disk, and replaces the previous one, which
is kept as `previous.ckpt`: whenever the machine dies, one of the two is whole. torch's files carry
a checksum of every tensor, which is verified before a run continues from one.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from dino_xcit.errors import RunFailedError, UserError
from dino_xcit.files import sync
from dino_xcit.run_folder import (
    DAMAGED,
    LAST,
    LOCK,
    PREVIOUS,
    SOUND,
    require_no_others_files,
)
from dino_xcit.runtime import is_first_process, say

if TYPE_CHECKING:
    from collections.abc import Iterator


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint and waits until the disk has it.

    An error is kept in `error`, not raised: the run can continue without this checkpoint, and
    other processes wait for this one.
    """

    error: Exception | None = None

    @override
    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: object = None,
    ) -> None:
        """See the class."""
        self.error = None
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(checkpoint, file)
            sync(path)
        except (OSError, RuntimeError) as error:
            self.error = _os_error_behind(error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _os_error_behind(error: OSError | RuntimeError) -> Exception:
    """Return the OSError behind torch's RuntimeError: it fails again in closing the file."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def replace_last(new: Path, folder: Path) -> None:
    """A whole checkpoint becomes last.ckpt, and last.ckpt becomes previous.ckpt."""
    with contextlib.suppress(FileNotFoundError):
        (folder / LAST).replace(folder / PREVIOUS)
    new.replace(folder / LAST)
    sync((folder / LAST).parent)


def keep_as_sound(folder: Path) -> None:
    """Link last.ckpt as sound.ckpt; it takes no more space until there is a newer last.ckpt."""
    beside = (folder / SOUND).with_name(".sound.writing.ckpt")
    beside.unlink(missing_ok=True)
    try:
        beside.hardlink_to(folder / LAST)
    except OSError:  # a file system without links
        shutil.copyfile(folder / LAST, beside)
    beside.replace(folder / SOUND)


def is_whole(path: Path) -> bool:
    """Whether every tensor matches its checksum and the file holds nothing but plain values."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever damage does to zip files and pickles
        return False
    return True


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that a run can continue from, the newest first."""
    return [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to continue from; a damaged one is reported and renamed.

    Returns:
        None if there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    found = checkpoints_of(folder)
    if not found:
        return None
    whole = next(filter(is_whole, found), None)
    if whole is None:
        raise UserError(_all_damaged(folder, found))
    if whole != found[0]:
        say(f"{found[0]} is damaged; continuing from {whole}, which was written before it")
        if is_first_process():
            found[0].replace(folder / DAMAGED)
    return whole


def _all_damaged(folder: Path, damaged: list[Path]) -> str:
    others = sorted(set((folder / LAST).parent.glob("*.ckpt")) - set(damaged))
    way_out = (
        f"if one of {', '.join(map(str, others))} is whole, copy it there"
        if others
        else "name another --output_dir, or remove them"
    )
    verb = "are" if len(damaged) > 1 else "is"
    return f"{' and '.join(map(str, damaged))} {verb} damaged; {way_out}"


class FolderLock:
    """The lock by which this process alone writes a run folder.

    The system releases it when the process ends, however it ends. Where the file system has no
    locks, and in all processes but the first, there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self._lock: filelock.BaseFileLock | None = None
        self._inode = 0

    def take(self) -> None:
        """Take the lock.

        Raises:
            UserError: another run has the folder.
        """
        lock = filelock.FileLock(self.path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"--output_dir {self.folder} is in use by another run; wait for it, or name another"
            ) from None
        except NotImplementedError:
            return
        self._lock, self._inode = lock, self.path.stat().st_ino

    def take_again(self) -> None:
        """Lock a folder that was deleted and made again."""
        if self._lock is not None and not self.path.exists():
            self.take()

    def require_own(self) -> None:
        """Check that the folder is still the one that was locked, or deleted.

        Raises:
            RunFailedError: it was deleted, and another run has made it again.
        """
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino != self._inode:
                raise RunFailedError(
                    f"{self.folder} was deleted during the run and now belongs to another run; "
                    "this one ends without writing to it. Start it with another --output_dir"
                )

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Let this process alone write the run.

    Raises:
        UserError: another run has the folder, or it holds files of somebody else.
    """
    lock = FolderLock(folder)
    if is_first_process():
        require_no_others_files(folder)
        lock.take()
    try:
        yield lock
    finally:
        lock.release()
