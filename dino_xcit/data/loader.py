"""Which images each step sees, and the loader that hands out their crops."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dino_xcit.data.crops import MultiCrop, Views
from dino_xcit.data.decode import one_line
from dino_xcit.errors import UserError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.images import ImageSet

REPLACEMENTS_TRIED = 20
T = TypeVar("T")
WORKER_DEATHS = 5  # without a batch between them, after which the run ends


class BadImage(NamedTuple):
    """An image that could not be read and what was wrong with it."""

    name: str
    reason: str


class Batch(NamedTuple):
    """What a step trains on: `Views` with a batch axis in front, and the unreadable images met on the way."""

    views: dict[str, Tensor]
    bad_images: list[BadImage]


class CropDataset(Dataset[Any]):
    """(epoch, index) -> the views of that image in that epoch."""

    def __init__(
        self, images: ImageSet, config: PretrainConfig, path_shape: tuple[int, int]
    ) -> None:
        self.images, self.config = images, config
        self.crop = MultiCrop(config, path_shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Views, list[BadImage]]:
        epoch, index = position
        key = (self.config.seed, epoch, index)
        bad: list[BadImage] = []
        for candidate in (
            index,
            *np.random.default_rng((*key, 1)).integers(len(self.images), size=REPLACEMENTS_TRIED),
        ):
            try:
                return self.crop(self.images.read(int(candidate)), key), bad
            except (OSError, ValueError) as error:
                bad.append(BadImage(name=self.images.name(int(candidate)), reason=one_line(error)))
                if self.config.on_bad_image == "raise":
                    break
        problem = f"cannot read {bad[0].name}: {bad[0].reason}"
        if self.config.on_bad_image == "raise":
            raise UserError(f"{problem}; --on_bad_image replace would go on without it")
        raise UserError(
            f"{problem}, nor {len(bad) - 1} others picked in its place; is --data_path right?"
        )


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Which images each forward pass of this process sees, over the whole run: lists of (epoch, index).

    Each epoch is a permutation drawn from (seed, epoch), cut into optimizer steps, each step into passes, each pass into
    the shares of the processes. What does not fill a step is left out, as official DINO drops its last batch.
    """

    def __init__(
        self, config: PretrainConfig, images: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.images, self.rank, self.world_size = config, images, rank, world_size
        self.passes_done = 0
        self.pass_batch = config.batch_size_per_gpu * world_size
        self.total_batch = self.pass_batch * config.accumulate_grad_batches
        self.steps_per_epoch = images // self.total_batch
        if not self.steps_per_epoch:
            raise UserError(
                f"{images} images are fewer than one step takes ({self.total_batch}: --batch_size_per_gpu "
                f"{config.batch_size_per_gpu} x {world_size} processes x --accumulate_grad_batches "
                f"{config.accumulate_grad_batches}); lower --batch_size_per_gpu"
            )
        self.passes_per_epoch = self.steps_per_epoch * config.accumulate_grad_batches

    def __len__(self) -> int:
        return self.config.epochs * self.passes_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.config.batch_size_per_gpu
        for epoch in range(self.passes_done // self.passes_per_epoch, self.config.epochs):
            permutation = np.random.default_rng((self.config.seed, epoch)).permutation(self.images)
            first = max(0, self.passes_done - epoch * self.passes_per_epoch)
            for number in range(first, self.passes_per_epoch):
                start = number * self.pass_batch + self.rank * share
                yield [(epoch, int(index)) for index in permutation[start : start + share]]


def surviving(loaded_from: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """The items of a loader that can start at any of them. A worker that dies takes nothing with it: others start where the
    items stopped. Raises ValueError if they die too."""
    done = deaths = 0
    while True:
        try:
            items = loaded_from(done)
            if threading.current_thread() is threading.main_thread():
                # torch would tell of the death by an exception in the middle of whatever runs; so it is told by the loader.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for item in items:
                done, deaths = done + 1, 0
                yield item
            return
        except (
            RuntimeError,
            ConnectionError,
            EOFError,
        ) as error:  # the latter two: it died while handing over a batch
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            deaths += 1
            reason = (
                one_line(error).rstrip(".")
                if isinstance(error, RuntimeError)
                else "a loader worker died"
            )
            if deaths > WORKER_DEATHS:
                raise UserError(
                    f"{deaths} loader workers died one after the other ({reason}); if the machine is out of memory, "
                    "lower --num_workers, else look for an image that a decoder cannot bear with --num_workers 0"
                ) from error
            say(f"{reason}; others start in its place")


class CropLoader(DataLoader[Batch]):
    """Loads the run's batches in order. Lightning saves and restores how many were handed out."""

    def __init__(
        self, dataset: CropDataset, order: StepBatchSampler, num_workers: int, pin_memory: bool
    ) -> None:
        self.order = order
        self.handed_out = 0
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.handed_out = self.order.passes_done
        try:
            for batch in surviving(self._from):
                self.handed_out += 1
                yield batch
        except ValueError as error:  # from a worker it comes with the traceback in its text
            raise UserError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from error

    def _from(self, number: int) -> Iterator[Batch]:
        self.order.passes_done = self.handed_out
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.passes_done = self.handed_out = state["passes"]


def collate(samples: list[tuple[Views, list[BadImage]]]) -> Batch:
    return Batch(
        views=default_collate([vars(views) for views, _ in samples]),
        bad_images=[bad for _, bads in samples for bad in bads],
    )


def leave_signals_to_the_parent(worker: int) -> None:
    """Of Ctrl-C, SIGTERM and SIGUSR1, which a terminal or a scheduler sends to all, the run makes its own end.

    A second SIGTERM is Python's, which ends its children by it when it ends.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def default_workers() -> int:
    """Cores that this process may use, less one for itself, at most 16."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(16, cores - 1))
