"""Protocol `dino`: one head by SGD on class tokens of augmented crops.

As official `eval_linear.py`, with one difference: reported is the last epoch, not the one that is
best on the validation images.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.crops import crop_boxes, sample_boxes
from dino_xcit.data.workers import default_workers, leave_signals_to_the_parent, restartable
from dino_xcit.errors import ImageError
from dino_xcit.evaluate.features import FrozenFeatures
from dino_xcit.evaluate.probe import FeatureChoice, Head, ProbeTask
from dino_xcit.evaluate.probe_sgd import SavedSGD, cosine_decay, initial_heads
from dino_xcit.runtime import progress, summed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dino_xcit.data.images import ImageSet

DINO_LR, DINO_EPOCHS = 0.001, 100
CROP_SHARE = (0.08, 1.0)  # of the image's area, as torchvision's RandomResizedCrop

Position: TypeAlias = tuple[int, int]
"""Epoch, and index of an image."""


# -- crops -------------------------------------------------------------------------------------


class AugmentedCrops(Dataset[tuple[Tensor, int, bool]]):
    """Random crops, flipped or not, by (epoch, index of the image).

    An item is the crop, uint8 (C, S, S), its label, and whether the image could be read.
    """

    def __init__(self, images: ImageSet, size: int, channels: int, seed: int) -> None:
        self.images, self.size, self.channels, self.seed = images, size, channels, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: Position) -> tuple[Tensor, int, bool]:
        epoch, index = position
        rng = np.random.default_rng((self.seed, 3, epoch, index))
        assert self.images.labels is not None
        label = int(self.images.labels[index])
        try:
            image = self.images.read(index)
        except (ImageError, OSError):
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), label, False
        low, high = (np.array([share]) for share in CROP_SHARE)
        box = sample_boxes(rng, image.shape[1], image.shape[2], low, high)
        crop = crop_boxes(image, box, self.size, mode="bilinear")[0]
        return crop.flip(-1) if rng.random() < 0.5 else crop, label, True


# -- steps -------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Which images one optimizer step sees."""

    epoch: int
    images: int
    """in all processes together"""
    passes: list[list[Position]]
    """this process's images, divided into forward passes"""


class Steps:
    """The optimizer steps of all epochs; each epoch visits the task's images in a random order."""

    def __init__(self, task: ProbeTask, epochs: int) -> None:
        self.task, self.epochs = task, epochs
        self.batch = min(task.config.batch_size, len(task.rows))
        self.per_epoch = math.ceil(len(task.rows) / self.batch)

    def images_before(self, step: int) -> int:
        """Return how many images the steps before this one see."""
        epoch, number = divmod(step, self.per_epoch)
        return epoch * len(self.task.rows) + number * self.batch

    def start(self, first: int) -> Iterator[Step]:
        """Iterate the steps from `first` on."""
        rank, world_size = self.task.fabric.global_rank, self.task.fabric.world_size
        most = self.task.config.batch_size_per_gpu
        first_epoch, first_number = divmod(first, self.per_epoch)
        for epoch in range(first_epoch, self.epochs):
            rng = np.random.default_rng((self.task.seed, 2, epoch))
            order = rng.permutation(self.task.rows)
            for number in range(first_number if epoch == first_epoch else 0, self.per_epoch):
                rows = order[number * self.batch : (number + 1) * self.batch]
                share = np.array_split(rows, world_size)[rank]
                passes = np.array_split(share, math.ceil(len(share) / most)) if len(share) else []
                positions = [[(epoch, int(row)) for row in one] for one in passes]
                yield Step(epoch, len(rows), positions)


def _load(
    task: ProbeTask, crops: AugmentedCrops, steps: Steps, first: int
) -> Iterator[list[Tensor]]:
    """Iterate crops, labels and readability of each forward pass from the step `first` on."""
    workers = task.config.num_workers

    def loader_from(number: int) -> DataLoader[list[Tensor]]:
        passes = itertools.chain.from_iterable(step.passes for step in steps.start(first))
        return DataLoader(
            crops,  # type: ignore[arg-type]  # collating makes lists of tensors
            batch_sampler=itertools.islice(passes, number, None),
            num_workers=default_workers(task.fabric.world_size) if workers is None else workers,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader would use the caller's global one
        )

    return restartable(loader_from)


# -- the protocol ------------------------------------------------------------------------------


def dino_protocol(task: ProbeTask) -> Head:
    """Train one head with a learning rate that falls along a cosine from epoch to epoch."""
    features, config, fabric = task.features, task.config, task.fabric
    assert isinstance(features, FrozenFeatures)
    choice = FeatureChoice.of_options(config)
    epochs, lr = config.epochs or DINO_EPOCHS, (config.lr or (DINO_LR,))[0]
    dim = choice.dim(features)
    weights, biases = initial_heads(1, task.classes, dim, task.seed, fabric.device)
    weight, bias = (heads[0].detach().requires_grad_() for heads in (weights, biases))
    unreadable = torch.zeros(())  # images, counted in the first epoch
    transform = features.extractor.transform
    sgd = SavedSGD([weight, bias], task.file("dino", transform), counters=[unreadable])
    fabric.barrier()  # all processes have read the state before one writes it
    steps, first = Steps(task, epochs), sgd.step
    size, channels = transform.image_size, len(transform.mean)
    crops = AugmentedCrops(features.images["train"], size, channels, task.seed)
    loaded = _load(task, crops, steps, first)
    total, shown = steps.images_before(epochs * steps.per_epoch), fabric.is_global_zero
    with progress(total, f"{features.name}: dino", "images", shown) as bar:
        bar.update(steps.images_before(first))
        for step in steps.start(first):
            passes = itertools.islice(loaded, len(step.passes))
            count = _gradients(task, choice, passes, weight, bias)
            if step.epoch == 0:
                unreadable += step.images - count
            sgd.update(lr * steps.batch / 256 * cosine_decay(step.epoch / epochs))
            if fabric.is_global_zero:
                sgd.save_if_due()
            bar.update(step.images)
    next(loaded, None)  # ends the workers
    features.unreadable += int(unreadable)
    chosen = {"lr": lr, **choice.options()}
    return Head(weight.detach().cpu(), bias.detach().cpu(), choice, chosen)


def _gradients(
    task: ProbeTask,
    choice: FeatureChoice,
    passes: Iterator[list[Tensor]],
    weight: Tensor,
    bias: Tensor,
) -> int:
    """Set the gradients of one step's mean loss.

    Args:
        task: Features and processes.
        choice: Parts of the features.
        passes: Crops, labels and readability of each forward pass of this process.
        weight: (K, D)
        bias: (K,)

    Returns:
        Number of readable images, in all processes.
    """
    assert isinstance(task.features, FrozenFeatures)
    features, labels = [], []
    for crops, label, readable in passes:
        if readable.any():
            features.append(choice.select(task.features.extractor(crops[readable])))
            labels.append(label[readable])
    count = int(summed(task.fabric, torch.tensor(sum(map(len, labels)))))
    weight.grad = bias.grad = None
    if features:
        logits = F.linear(torch.cat(features), weight, bias)
        target = torch.cat(labels).to(logits.device)
        loss = F.cross_entropy(logits, target, reduction="sum") / max(1, count)
        torch.autograd.backward(loss)
    for tensor in (weight, bias):
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        tensor.grad = summed(task.fabric, gradient)
    return count
