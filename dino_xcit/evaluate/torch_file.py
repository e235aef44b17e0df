"""Reading of files that torch.save wrote and that may be damaged."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

# What torch.load raises for files cut off, zeroed, with changed bytes, or of another kind: the ZIP
# reader a RuntimeError, the unpickler all others.
DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError)


class DamagedFileError(ValueError):
    """A file that does not hold what torch.save writes, or code."""


def read_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """Load tensors and plain values to the CPU.

    Args:
        path: File that torch.save wrote.
        mmap: Whether to memory-map the tensors instead of reading them.

    Raises:
        DamagedFileError: The file is damaged, is of another kind, or would execute code.
        OSError: The file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except DAMAGE as error:
        raise DamagedFileError(type(error).__name__) from error
