"""Which images each step sees, and the loader that delivers their crops."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dino_xcit.data.crops import GLOBAL_CROPS, MultiCrop, Views
from dino_xcit.data.decode import one_line
from dino_xcit.data.workers import leave_signals_to_the_parent, restartable
from dino_xcit.errors import ImageError, LoaderError, UserError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet

BATCHES_AHEAD = 2  # of each worker, in shared memory
SHARED_MEMORY_FOLDER = "/dev/shm"
REPLACEMENTS_TRIED = 20  # for an unreadable image, before the run ends


# -- samples and batches -----------------------------------------------------------------------


class BadImage(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """The views of one image, and the unreadable images that were tried before it."""

    views: Views
    bad_images: list[BadImage]


class Batch(NamedTuple):
    """Input of one forward pass.

    `views` holds the fields of `Views` with a batch axis in front, `replaced` the number of images
    that were used instead of unreadable ones.
    """

    views: dict[str, Tensor]
    bad_images: list[BadImage]
    replaced: int = 0


Position: TypeAlias = tuple[int, int]
"""Epoch, and index of an image."""


class CropDataset(Dataset[Any]):
    """Samples by position, (epoch, index of the image).

    A sample depends on the seed and its position alone, so workers have no state.
    """

    def __init__(self, images: ImageSet, config: RunConfig, path_shape: tuple[int, int]) -> None:
        self.images, self.config = images, config
        self.crop = MultiCrop(config, path_shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: Position) -> Sample | LoaderError:
        """Return the sample, or what the user has to put right.

        The error is returned because torch puts a traceback into the message of one that a worker
        raises. `CropLoader` and `batch` raise it.
        """
        key = (self.config.seed, *position)
        rng = np.random.default_rng((*key, 1))
        replacements = rng.integers(len(self.images), size=REPLACEMENTS_TRIED).tolist()
        bad: list[BadImage] = []
        for candidate in (position[1], *replacements):
            try:
                image = self.images.read(candidate)
            except (ImageError, OSError) as error:
                bad.append(BadImage(self.images.name(candidate), one_line(error)))
                if self.config.on_bad_image == "raise":
                    break
            else:
                return Sample(self.crop(image, key), bad)
        problem = f"cannot read {bad[0].name}: {bad[0].reason}"
        if self.config.on_bad_image == "raise":
            return LoaderError(f"{problem}; --on_bad_image replace continues with another image")
        return LoaderError(
            f"{problem}, nor {len(bad) - 1} others picked in its place; is --data_path right?"
        )

    def batch(self, positions: Sequence[Position]) -> Batch:
        """Load a batch in this process.

        Raises:
            LoaderError: An image could not be read or replaced.
        """
        batch = collate([self[position] for position in positions])
        if isinstance(batch, LoaderError):
            raise batch
        return batch


def collate(samples: list[Sample | LoaderError]) -> Batch | LoaderError:
    """Stack the samples of a batch; return the first error if there is one."""
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, LoaderError):
            return sample
        whole.append(sample)
    return Batch(
        views=default_collate([vars(sample.views) for sample in whole]),
        bad_images=[bad for sample in whole for bad in sample.bad_images],
        replaced=sum(bool(sample.bad_images) for sample in whole),
    )


# -- order -------------------------------------------------------------------------------------


class StepBatchSampler(Sampler[list[Position]]):
    """Positions of the images of each forward pass of this process, from `first_step` to the end.

    Each epoch is a permutation of the images, a function of (seed, epoch). It is cut into optimizer
    steps, each step into forward passes, each pass into the shares of the processes. Images that do
    not fill a step are left out, as official DINO drops its last batch.
    """

    first_step: int
    """Optimizer steps that are done, over the whole run; to be set before iteration."""
    steps_per_epoch: int
    """Optimizer steps of an epoch."""
    total_batch: int
    """Images of a step, of all processes together."""

    def __init__(self, config: RunConfig, images: int, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.images, self.rank = config, images, rank
        self.first_step = 0
        self.pass_batch = config.batch_size_per_gpu * world_size
        self.total_batch = self.pass_batch * config.accumulate_grad_batches
        self.steps_per_epoch = images // self.total_batch
        if not self.steps_per_epoch:
            raise UserError(
                f"{images} images are fewer than one step takes ({self.total_batch}: "
                f"--batch_size_per_gpu {config.batch_size_per_gpu} x {world_size} processes x "
                f"--accumulate_grad_batches {config.accumulate_grad_batches}); "
                "lower --batch_size_per_gpu"
            )

    def __len__(self) -> int:
        """Forward passes from `first_step` to the end of the run."""
        steps = self.config.epochs * self.steps_per_epoch - self.first_step
        return steps * self.config.accumulate_grad_batches

    def __iter__(self) -> Iterator[list[Position]]:
        return self.passes()

    def passes(self, skipped: int = 0) -> Iterator[list[Position]]:
        """Iterate the passes from `first_step` on, without the first `skipped` of them."""
        share, accumulated = self.config.batch_size_per_gpu, self.config.accumulate_grad_batches
        per_epoch = self.steps_per_epoch * accumulated
        first_epoch, first_pass = divmod(self.first_step * accumulated + skipped, per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            permutation = np.random.default_rng((self.config.seed, epoch)).permutation(self.images)
            for number in range(first_pass if epoch == first_epoch else 0, per_epoch):
                start = number * self.pass_batch + self.rank * share
                yield [(epoch, int(index)) for index in permutation[start : start + share]]


# -- shared memory -----------------------------------------------------------------------------


def batch_bytes(config: RunConfig) -> int:
    """Return the size of the crops of a batch of one process, 8 bits a channel."""
    pixels = GLOBAL_CROPS * config.global_crops_size**2
    pixels += config.local_crops_number * config.local_crops_size**2
    return config.batch_size_per_gpu * config.in_chans * pixels


def report_scarce_shared_memory(config: RunConfig, num_workers: int, processes: int) -> None:
    """Print a line if the batches that wait in shared memory may not fit into it.

    A line only: they wait in full number only while the loader is faster than the training.

    Args:
        config: Options of the run.
        num_workers: Of each process.
        processes: On this machine.
    """
    needed = processes * num_workers * BATCHES_AHEAD * batch_bytes(config)
    try:
        status = os.statvfs(SHARED_MEMORY_FOLDER)
    except OSError:  # a system without this folder has no such limit
        return
    free = status.f_bavail * status.f_frsize
    if needed > free:
        several = f"{processes} processes x " if processes > 1 else ""
        say(
            f"the loader takes up to {needed / 2**30:.2f} GiB of shared memory ({several}"
            f"{num_workers} worker{'s' * (num_workers > 1)} x {BATCHES_AHEAD} batches), "
            f"{SHARED_MEMORY_FOLDER} has {free / 2**30:.2f} GiB: give the container more "
            f"(docker run --shm-size={math.ceil(needed / 2**30)}g) or lower --num_workers"
        )


# -- loader ------------------------------------------------------------------------------------


class CropLoader:
    """Iterates the run's batches in the sampler's order; dead workers are replaced.

    Raises LoaderError while iterating if an image can be neither read nor replaced.
    """

    def __init__(
        self, dataset: CropDataset, sampler: StepBatchSampler, num_workers: int, pin_memory: bool
    ) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        batch: Batch | LoaderError
        for batch in restartable(self._from):
            if isinstance(batch, LoaderError):
                raise batch
            yield batch

    def _from(self, skipped: int) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler.passes(skipped),
            num_workers=self.num_workers,
            prefetch_factor=BATCHES_AHEAD if self.num_workers else None,
            pin_memory=self.pin_memory,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader would sample from the caller's
        )
