"""The file names of a set in two arrays, which the loader workers share.

Reading a Python object writes its reference count, so each worker would come to have its own copy
of a list of strings: 255 MiB for the names of ImageNet. Arrays are read without writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from typing_extensions import override


class FileNames(Sequence[str]):
    """An unchangeable sequence of file names."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @override
    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> FileNames: ...
    @override
    def __getitem__(self, index: int | slice) -> str | FileNames:
        if isinstance(index, slice):
            return FileNames(self[i] for i in range(*index.indices(len(self))))
        number = range(len(self))[index]
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._bytes[start : self._ends[number]].tobytes())
