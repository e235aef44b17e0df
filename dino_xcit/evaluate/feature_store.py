"""Features on disk or in memory, and the pass over the images that computes them.

Features are stored batch by batch, and the store holds the state of each row. So an interrupted
pass continues, several processes share one, and a set of images may be larger than the memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.workers import default_workers, leave_signals_to_the_parent, restartable
from dino_xcit.errors import NotFiniteError
from dino_xcit.files import replacing
from dino_xcit.runtime import progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.fabric import Fabric
    from torch import Tensor

    from dino_xcit.config.evaluation import EvalConfig

WORTH_WORKERS = 5000  # images; for fewer, starting workers costs more than they save
NOT_DONE, DONE, UNREADABLE = 0, 1, 2


class FeatureStore(NamedTuple):
    """Features of images, one row per image, and the state of each row."""

    features: np.ndarray
    """(n, ...), in memory or memory-mapped"""
    state: np.ndarray
    """uint8 (n,): NOT_DONE, DONE or UNREADABLE"""

    @classmethod
    def in_memory(cls, shape: tuple[int, ...], dtype: str = "float32") -> FeatureStore:
        """Return an empty store."""
        return cls(np.zeros(shape, dtype), np.zeros(shape[0], np.uint8))

    @classmethod
    def on_disk(cls, folder: Path, shape: tuple[int, ...], dtype: str) -> FeatureStore:
        """Open the store in this folder; create it if the folder holds no store of this shape.

        Raises:
            OSError: The files cannot be created, for example because the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        features, state = folder / "features.npy", folder / "state.npy"
        if not (_holds(features, shape, dtype) and _holds(state, shape[:1], "uint8")):
            for path in (
                state,
                features,
            ):  # this order never leaves an old state beside new features
                path.unlink(missing_ok=True)
            for path, dims, kind in ((features, shape, dtype), (state, shape[:1], "uint8")):
                with replacing(path) as beside:
                    np.lib.format.open_memmap(beside, "w+", kind, dims).flush()
                    _reserve(beside)
        return cls(*(np.lib.format.open_memmap(path, "r+") for path in (features, state)))

    @classmethod
    def shared(
        cls, fabric: Fabric, folder: Path, shape: tuple[int, ...], dtype: str
    ) -> FeatureStore:
        """Open the store in all processes; the first process creates it if needed."""
        if fabric.is_global_zero:
            cls.on_disk(folder, shape, dtype)
        fabric.barrier()
        return cls.on_disk(folder, shape, dtype)

    def mark(self, rows: np.ndarray, readable: np.ndarray) -> None:
        """Mark rows whose features are written as DONE or UNREADABLE.

        On disk the features are flushed first: no row is marked that a power failure could lose.
        """
        if isinstance(self.features, np.memmap):
            self.features.flush()
        self.state[rows] = np.where(readable, DONE, UNREADABLE)
        if isinstance(self.state, np.memmap):
            self.state.flush()


def _reserve(path: Path) -> None:
    """Allocate the file's blocks: a full disk is an OSError here, and a SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _holds(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether the file is complete and holds an array of this shape and dtype."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == dtype


def extract(
    function: Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, bool]],
    rows: np.ndarray,
    store: FeatureStore,
    *,
    batch_size: int,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
    description: str | None = None,
    pin_memory: bool = False,
) -> int:
    """Extract features for all unfinished rows; return how many.

    Images that could not be read are tried again: the cause may have been a network.

    Args:
        function: Images (B, ...) -> features (B, ...).
        dataset: Image by index, and whether it could be read.
        rows: Indices of the images; row i of the store belongs to image rows[i].
        store: Is filled.
        batch_size: Images per call of the function.
        num_workers: Loader processes.
        share: Rank of this process and number of processes. The batches are the same for any
            number of processes.
        description: Label of the progress bar; without one there is no bar.
        pin_memory: Whether to put the images into memory that a GPU copies from by itself.

    Raises:
        NotFiniteError: Features are not finite in the store's dtype.
    """
    batches = _unfinished_batches(store, batch_size, share)

    def loader_from(number: int) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # collating makes the pairs' bools a tensor
            batch_sampler=[rows[batch].tolist() for batch in batches[number:]],
            num_workers=min(num_workers, len(batches)),
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader would use the caller's global one
        )

    count = sum(map(len, batches))
    shown = description is not None and count > 0
    with progress(count, description or "", "images", shown=shown) as bar:
        for batch, (images, readable) in zip(batches, restartable(loader_from), strict=True):
            with np.errstate(over="ignore"):
                features = function(images).cpu().numpy().astype(store.features.dtype)
            if not np.isfinite(features).all():
                raise NotFiniteError(f"features are not finite in {features.dtype}")
            store.features[batch] = features
            store.mark(batch, readable.numpy())
            bar.update(len(batch))
    return count


def _unfinished_batches(
    store: FeatureStore, batch_size: int, share: tuple[int, int]
) -> list[np.ndarray]:
    """Rows of this process's batches that are not done."""
    rank, processes = share
    count = len(store.state)
    starts = range(0, count, batch_size)
    batches = [np.arange(start, min(start + batch_size, count)) for start in starts]
    # Shared before finished rows are dropped, which change while other processes work.
    unfinished = [batch[store.state[batch] != DONE] for batch in batches[rank::processes]]
    return [batch for batch in unfinished if len(batch)]


def extract_shared(
    function: Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, bool]],
    store: FeatureStore,
    config: EvalConfig,
    fabric: Fabric,
    description: str,
) -> int:
    """Extract features of the whole dataset with all processes; return how many this one extracted.

    The store is complete in every process when this returns.
    """
    images = len(store.state)
    workers = config.num_workers
    if workers is None:
        workers = default_workers(fabric.world_size)
    extracted = extract(
        function,
        dataset,
        np.arange(images),
        store,
        batch_size=config.batch_size_per_gpu,
        num_workers=workers if images >= WORTH_WORKERS else 0,
        share=(fabric.global_rank, fabric.world_size),
        description=description if fabric.is_global_zero else None,
        pin_memory=fabric.device.type == "cuda",
    )
    fabric.barrier()
    assert NOT_DONE not in store.state
    return extracted
