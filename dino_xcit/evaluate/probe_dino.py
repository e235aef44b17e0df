"""Protocol `dino`: one head by SGD on class tokens of augmented crops, as official `eval_linear.py`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_xcit.data.crops import crop_boxes, sample_boxes
from dino_xcit.data.loader import default_workers, leave_signals_to_the_parent
from dino_xcit.evaluate.probe import FeatureChoice, Head, ProbeTask, Saver, choice_options
from dino_xcit.evaluate.probe_heads import MOMENTUM, cosine, initial_heads, restore, training_state
from dino_xcit.runtime import progress, summed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dino_xcit.data.images import ImageSet
    from dino_xcit.evaluate.features import FeatureExtractor

DINO_LR, DINO_EPOCHS = 0.001, 100
CROP_SHARE = (0.08, 1.0)  # of the image's area, torchvision's RandomResizedCrop


# -- dino: one head on augmented crops -------------------------------------------------------------------------------


class AugmentedCrops(Dataset[Any]):
    """(epoch, index) -> a random crop, flipped or not, uint8 (C, S, S), the label, and whether the image could be read."""

    def __init__(self, images: ImageSet, size: int, channels: int, seed: int) -> None:
        self.images, self.size, self.channels, self.seed = images, size, channels, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, int, bool]:
        epoch, index = position
        rng = np.random.default_rng((self.seed, 3, epoch, index))
        assert self.images.labels is not None
        label = int(self.images.labels[index])
        try:
            image = self.images.read(index)
        except (OSError, ValueError):
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), label, False
        low, high = (np.array([share]) for share in CROP_SHARE)
        box = sample_boxes(rng, image.shape[1], image.shape[2], low, high)
        crop = crop_boxes(image, box, self.size, mode="bilinear")[0]
        return crop.flip(-1) if rng.random() < 0.5 else crop, label, True


class Passes(Sampler[list[tuple[int, int]]]):
    """What this process puts through the backbone, from a step on: lists of (epoch, index), several for a step."""

    def __init__(self, work: ProbeTask, first_step: int, epochs: int) -> None:
        config, fabric = work.config, work.fabric
        self.rows, self.seed, self.epochs, self.first_step = (
            work.rows,
            work.seed,
            epochs,
            first_step,
        )
        self.batch, self.most = min(config.batch_size, len(self.rows)), config.batch_size_per_gpu
        self.rank, self.world_size = fabric.global_rank, fabric.world_size
        self.per_epoch = math.ceil(len(self.rows) / self.batch)

    def of_step(self, order: np.ndarray, number: int) -> list[np.ndarray]:
        share = np.array_split(
            order[number * self.batch : (number + 1) * self.batch], self.world_size
        )[self.rank]
        return np.array_split(share, math.ceil(len(share) / self.most)) if len(share) else []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first_step
        for epoch in range(first // self.per_epoch, self.epochs):
            order = np.random.default_rng((self.seed, 2, epoch)).permutation(self.rows)
            for number in range(
                first - epoch * self.per_epoch if first > epoch * self.per_epoch else 0,
                self.per_epoch,
            ):
                for rows in self.of_step(order, number):
                    yield [(epoch, int(row)) for row in rows]


def dino_protocol(work: ProbeTask) -> Head:
    """SGD with momentum on random crops and flips, the learning rate falling by a cosine from epoch to epoch."""
    config, subject, fabric = work.config, work.subject, work.fabric
    frozen: FeatureExtractor = subject.frozen
    choice = FeatureChoice(config.n_last_blocks or 1, bool(config.avgpool_patchtokens))
    dim = choice.of(torch.zeros(1, *subject.shape)).shape[1]
    epochs, lr = config.epochs or DINO_EPOCHS, (config.lr or (DINO_LR,))[0]
    weight, bias = (
        t[0].detach().requires_grad_()
        for t in initial_heads(1, work.classes, dim, work.seed, fabric.device)
    )
    optimizer = torch.optim.SGD([weight, bias], lr=0.0, momentum=MOMENTUM)
    lost = torch.zeros(())  # unreadable images, counted in the first epoch
    saver = Saver(work.path("dino", subject.frozen.transform))
    step = restore(saver, [weight, bias, lost], optimizer)
    fabric.barrier()  # all have read before one writes
    passes = Passes(work, step, epochs)
    images = subject.images["train"]
    crops = AugmentedCrops(
        images, frozen.transform.image_size, len(frozen.transform.mean), work.seed
    )
    workers = default_workers() if config.num_workers is None else config.num_workers
    loader = iter(
        DataLoader(
            crops,
            batch_sampler=passes,
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_parent,
        )
    )
    batch = passes.batch
    last = len(work.rows) - (passes.per_epoch - 1) * batch  # images of an epoch's last step
    in_a_step, in_last = (len(passes.of_step(np.zeros(images), 0)) for images in (batch, last))
    with progress(
        epochs * len(work.rows), f"{subject.name}: dino", "images", fabric.is_global_zero
    ) as bar:
        bar.update(step // passes.per_epoch * len(work.rows) + step % passes.per_epoch * batch)
        while step < epochs * passes.per_epoch:
            epoch, number = divmod(step, passes.per_epoch)
            ends = number == passes.per_epoch - 1
            features, labels = [], []
            for _ in range(in_last if ends else in_a_step):
                x, y, readable = next(loader)
                if readable.any():
                    features.append(choice.of(frozen(x[readable])))
                    labels.append(y[readable])
            count = int(summed(fabric, torch.tensor(sum(map(len, labels)))))
            lost += (last if ends else batch) - count if epoch == 0 else 0
            optimizer.zero_grad()
            if features:
                logits = F.linear(torch.cat(features), weight, bias)
                (
                    F.cross_entropy(logits, torch.cat(labels).to(fabric.device), reduction="sum")
                    / max(1, count)
                ).backward()
            for tensor in (weight, bias):
                tensor.grad = summed(
                    fabric, torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                )
            optimizer.param_groups[0]["lr"] = lr * batch / 256 * cosine(epoch / epochs)
            optimizer.step()
            step += 1
            if fabric.is_global_zero and saver.due():
                saver.save(training_state(step, [weight, bias, lost], optimizer))
            bar.update(last if ends else batch)
    subject.unreadable += int(lost)
    chosen = {"lr": lr, **choice_options(choice)}
    return Head(weight.detach().cpu(), bias.detach().cpu(), choice, chosen)
