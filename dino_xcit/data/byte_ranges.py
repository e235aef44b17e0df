"""Bytes of files at (file, offset, size): all that reading from shards needs of a file system."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from dino_xcit.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

HANDLES = 64  # files that are kept open; macOS allows a process 256, and there may be more shards


class LocalFiles:
    """Files of this machine, opened when they are first read.

    A position is given with every read, so forked processes can share the handles; a process that
    is spawned opens its own. A file that was replaced meanwhile is read as it was.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._handles: OrderedDict[int, _Handle] = OrderedDict()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Return bytes of the file with this number.

        Raises:
            ImageError: The file ends before.
            OSError: The file cannot be read.
        """
        handle = self._handles.pop(file, None) or _Handle(self.paths[file])
        data = os.pread(handle.descriptor, size, offset)
        if len(data) < size:
            raise ImageError(f"{self.paths[file]} ends {size - len(data)} bytes too early")
        # A handle that failed is not kept: the next read opens the file again.
        self._handles[file] = handle
        if len(self._handles) > HANDLES:
            self._handles.popitem(last=False)
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_handles": OrderedDict()}


class _Handle:
    """A descriptor that is closed when nothing uses it, in whichever thread that is."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
