"""Features on disk or in memory, and the pass that fills them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.loader import leave_signals_to_the_parent, surviving
from dino_xcit.errors import NotFiniteError
from dino_xcit.files import replacing
from dino_xcit.runtime import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

WORTH_WORKERS = 5000  # images; starting workers for fewer costs more than it saves
NOT_DONE, DONE, UNREADABLE = 0, 1, 2


# -- store -----------------------------------------------------------------------------------------------------------


class FeatureStore(NamedTuple):
    """Features (n, P, C) and the state of each row: NOT_DONE, DONE or UNREADABLE, uint8 (n,)."""

    features: np.ndarray
    state: np.ndarray

    @classmethod
    def in_memory(cls, shape: tuple[int, ...], dtype: str = "float32") -> FeatureStore:
        return cls(np.zeros(shape, dtype), np.zeros(shape[0], np.uint8))

    @classmethod
    def on_disk(cls, folder: Path, shape: tuple[int, ...], dtype: str) -> FeatureStore:
        """Memory-mapped files in the folder: those that are there, else new ones."""
        folder.mkdir(parents=True, exist_ok=True)
        features, state = folder / "features.npy", folder / "state.npy"
        if not (_holds(features, shape, dtype) and _holds(state, shape[:1], "uint8")):
            for path in (state, features):  # in this order: no old state beside new features
                path.unlink(missing_ok=True)
            for path, dims, kind in ((features, shape, dtype), (state, shape[:1], "uint8")):
                with replacing(path) as beside:
                    np.lib.format.open_memmap(beside, "w+", kind, dims).flush()
                    _reserve(beside)
        return cls(*(np.lib.format.open_memmap(path, "r+") for path in (features, state)))

    def mark(self, rows: np.ndarray, readable: np.ndarray) -> None:
        """The rows are written. On disk they are flushed first: no row is marked that a dying machine could lose."""
        for array in self:
            if array is self.state:
                array[rows] = np.where(readable, DONE, UNREADABLE)
            if isinstance(array, np.memmap):
                array.flush()


def _reserve(path: Path) -> None:
    """Take the space now, while a full disk is an error and not yet the end of the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _holds(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether the file is whole and holds such an array."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == dtype


def extract(
    frozen: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
    rows: np.ndarray,
    store: FeatureStore,
    *,
    batch_size: int,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
    description: str | None = None,
) -> int:
    """Fill the rows of the store that are not done with the features of these images of the dataset -> how many were made.

    Images that could not be read are tried again: what failed may have been the network.

    Row i of the store belongs to image rows[i]. share: the number of this process and of all; batches are cut the same
    whatever their number. description: of the progress bar; none without. Raises FloatingPointError if features are not
    finite.
    """
    batches = [
        np.arange(start, min(start + batch_size, len(rows)))
        for start in range(0, len(rows), batch_size)
    ]
    # Shared first: what is not done changes while other processes work.
    batches = [batch[store.state[batch] != DONE] for batch in batches[share[0] :: share[1]]]
    batches = [batch for batch in batches if len(batch)]

    def loaded_from(number: int) -> Iterator[Any]:
        loader = DataLoader(
            dataset,
            batch_sampler=[rows[batch].tolist() for batch in batches[number:]],  # type: ignore[arg-type]
            num_workers=min(num_workers, len(batches)),
            worker_init_fn=leave_signals_to_the_parent,
        )
        return iter(loader)

    made = sum(map(len, batches))
    with progress(
        made, description or "", "images", shown=description is not None and made > 0
    ) as bar:
        for batch, (images, readable) in zip(batches, surviving(loaded_from), strict=True):
            with np.errstate(over="ignore"):
                features = frozen(images).cpu().numpy().astype(store.features.dtype)
            if not np.isfinite(features).all():
                raise NotFiniteError(f"features are not finite in {features.dtype}")
            store.features[batch] = features
            store.mark(batch, readable.numpy())
            bar.update(len(batch))
    return made
