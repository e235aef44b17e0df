"""The linear segmentation head: patch tokens with masks, the head, its training.

Tokens are standardised by the training images' mean and standard deviation, a linear layer gives
each patch its logits, and these are resized bilinearly to pixels. The loss is the cross-entropy of
all pixels that have a class, minimised by AdamW with a cosine schedule.
Axes: n images, B images of a batch, N patches, C channels, K classes, S side of the framed image.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_xcit.config.evaluation import SegConfig
from dino_xcit.data.images import fingerprint
from dino_xcit.data.masked import LARGEST, VOID, MaskDataset
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_store import DONE, FeatureStore, extract_shared
from dino_xcit.evaluate.features import digest_of
from dino_xcit.files import replacing
from dino_xcit.runtime import progress, say, summed
from dino_xcit.weights.reading import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.data.masked import MaskedSet
    from dino_xcit.evaluate.features import FrozenFeatures

WEIGHT_DECAY = 1e-4
BLOCK = 65536  # tokens that are processed at a time
MASK_BLOCK = 128  # masks that are read at a time
SAMPLED_MASKS = 64  # whose values are examined
LIKELY_CLASSES = 32  # in one image: ADE20K has about 10


# -- tokens and masks --------------------------------------------------------------------------


class MaskedFeatures(NamedTuple):
    """Patch tokens and masks of the images of a split whose pixels and mask can be read."""

    features: Tensor
    """(readable images, N, C), may be memory-mapped"""
    masks: Tensor
    """int16 (all images, S, S), may be memory-mapped; VOID: no class"""
    indices: Tensor
    """int64 (n,): which images, as rows of the masks"""
    positions: Tensor
    """int64 (n,): the same images, as rows of the features"""
    class_of: Tensor | None = None
    """int64 (LARGEST + 2,): class by the masks' value, the last for VOID, which is -1. None: the
    values are the classes"""

    def tokens_of(self, images: Tensor, device: torch.device) -> Tensor:
        """float32 (B, N, C) of these images, numbered from 0 to n - 1."""
        return self.features[self.positions[images]].to(device).float()

    def masks_of(self, images: Tensor, device: torch.device) -> Tensor:
        """int64 (B, S, S) of these images, numbered from 0 to n - 1."""
        values = self.masks[self.indices[images]].to(device).long()
        return values if self.class_of is None else self.class_of[values]


def masked_features(features: FrozenFeatures, images: MaskedSet, split: str) -> MaskedFeatures:
    """Extract features and read masks; the masks are cached beside the features.

    Raises:
        UserError: No image or no mask of the split can be read.
    """
    config, transform = features.config, features.extractor.transform
    assert isinstance(config, SegConfig)
    ignored = sorted(config.ignore_label)
    key = ["masks", fingerprint(images), list(transform), ignored, torch.__version__]
    folder = features.cache / digest_of(key)
    shape = (len(images), transform.image_size, transform.image_size)
    store = FeatureStore.shared(features.fabric, folder, shape, "int16")
    dataset = MaskDataset(images, transform, config.ignore_label)
    extract_shared(lambda masks: masks, dataset, store, config, features.fabric, f"masks, {split}")
    tokens, indices = features.split(split)  # an image's label is its index
    readable = torch.from_numpy(store.state == DONE)[indices]
    unreadable = indices[~readable]
    if len(unreadable):
        first = int(unreadable[0])
        example = f"{images.name(first)}: {dataset.problem(first)}"
        if not readable.any():
            every = f"{len(images)} {split} images"
            raise UserError(f"no mask of the {every} can be used; the first is of {example}")
        say(
            f"{len(unreadable)} of {len(images)} {split} images have no mask that can be used and "
            f"are left out; the first is {example}"
        )
        features.unreadable += len(unreadable)
    positions = readable.nonzero()[:, 0]
    return MaskedFeatures(tokens, torch.from_numpy(store.features), indices[readable], positions)


def mask_values(masked: MaskedFeatures, split: str) -> list[int]:
    """Return the values of the masks, sorted, without VOID.

    Raises:
        UserError: No pixel has a class.
    """
    pixels = torch.zeros(LARGEST + 2, dtype=torch.int64)  # by value + 1: VOID is -1
    for indices in torch.split(masked.indices, MASK_BLOCK):
        shifted = masked.masks[indices].flatten().long() + 1
        pixels += torch.bincount(shifted, minlength=len(pixels))
    values: list[int] = pixels[1:].nonzero()[:, 0].tolist()
    if not values:
        raise UserError(f"no pixel of the {split} masks has a class; --ignore_label leaves nothing")
    return values


def check_classes(config: SegConfig, masked: MaskedFeatures, values: Sequence[int]) -> None:
    """Check that the training masks can be learned from.

    Args:
        config: Options.
        masked: Training images.
        values: Of their masks.

    Raises:
        UserError: The masks have a single class.
    """
    sample = masked.masks[masked.indices[:SAMPLED_MASKS]]
    if len(values) == 1:
        ignored = " ".join(map(str, config.ignore_label))
        remedy = "expected masks of at least two classes"
        if (sample == VOID).any():
            remedy = (
                f"--ignore_label {ignored} leaves out the others; where they are a class, as in "
                "masks of 0 and 255, type --ignore_label without a value"
            )
        raise UserError(
            f"the training masks have a single class, {values[0]}, which any prediction hits; "
            f"{remedy}"
        )
    count = int(np.median([len(mask.unique()) for mask in sample]))
    if count > LIKELY_CLASSES:
        say(
            f"the masks have {count} values in an image (median): is each the number of a class? "
            "Pictures that were compressed or resized smoothly have such values"
        )
    if values[-1] != len(values) - 1:
        say(f"{len(values)} classes, the values of the training masks: {_shortened(values)}")


def _shortened(values: Sequence[int]) -> str:
    """`0, 7, 8, 9, 11, ...`."""
    shown = ", ".join(map(str, values[:5]))
    return f"{shown}, ..." if len(values) > 5 else shown


def with_classes(
    masked: MaskedFeatures, values: Sequence[int], device: torch.device
) -> MaskedFeatures:
    """Number the classes of these mask values from 0 to K - 1, in their order."""
    if list(values) == list(range(len(values))):
        return masked
    class_of = torch.full((LARGEST + 2,), VOID)
    class_of[torch.tensor(values)] = torch.arange(len(values))
    return masked._replace(class_of=class_of.to(device))


# -- the head ----------------------------------------------------------------------------------


class LinearSegHead(NamedTuple):
    """A linear layer on patch tokens."""

    weight: Tensor
    """(K, C)"""
    bias: Tensor
    """(K,)"""

    def to(self, device: torch.device) -> LinearSegHead:
        """Return the head on a device."""
        return LinearSegHead(self.weight.to(device), self.bias.to(device))

    def __call__(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens of a square grid (B, N, C) -> logits (B, K, side, side)."""
        logits = F.linear(tokens.to(self.weight.dtype), *self).mT  # (B, K, N)
        grid = math.isqrt(logits.shape[-1])
        logits = logits.reshape(*logits.shape[:2], grid, grid)
        return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)


def save_head(head: LinearSegHead, config: SegConfig, names: Mapping[int, str], path: Path) -> None:
    """Write weight (K, C) and bias (K,) as safetensors; they take normed patch tokens.

    Metadata `dino_xcit`: sizes of the framed image, names of the classes by their masks' value, in
    the order of the head's classes.
    """
    about = {
        "weights": config.weights,
        "image_size": config.image_size,
        "resize_size": config.resize_size,
        "classes": dict(names),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head._asdict().items()}
    with replacing(path) as beside:
        write_safetensors(tensors, beside, about)


def load_seg_head(path: Path) -> tuple[LinearSegHead, dict[str, Any]]:
    """Return a head and its file's metadata, as `save_head` writes them.

    Raises:
        UserError: The file is not such a head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["dino_xcit"])
            head = LinearSegHead(file.get_tensor("weight"), file.get_tensor("bias"))
        values = list(map(int, about["classes"]))
        is_linear = "chosen" in about
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--predict {path} is not a head that seg-eval wrote: {error}") from None
    if is_linear or len(values) < len(head.bias):
        raise UserError(f"--predict {path} is a head of linear-eval; expected one of seg-eval")
    return head, about


# -- training ----------------------------------------------------------------------------------


def standardisation(masked: MaskedFeatures) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens, float32 (C,)."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for positions in torch.split(masked.positions, max(1, BLOCK // masked.features.shape[1])):
        tokens = masked.features[positions].flatten(0, 1).double()
        total = total + tokens.sum(0)
        squares = squares + tokens.square().sum(0)
        count += len(tokens)
    mean = total / count
    variance = squares / count - mean.square()
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


def train(
    config: SegConfig, masked: MaskedFeatures, classes: int, fabric: Fabric, name: str
) -> LinearSegHead:
    """Train a head on these images; each process takes its share of every batch.

    Args:
        config: Options.
        masked: Training images.
        classes: K.
        fabric: The processes.
        name: Of the network, for the progress bar.

    Returns:
        The head, for tokens that are not standardised.
    """
    mean, std = (values.to(fabric.device) for values in standardisation(masked))
    weight = torch.zeros(classes, len(mean), device=fabric.device, requires_grad=True)
    bias = torch.zeros(classes, device=fabric.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=WEIGHT_DECAY)
    steps = config.epochs * math.ceil(len(masked.indices) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(steps, f"{name}: linear layer", "steps", fabric.is_global_zero) as bar:
        for tokens, truth in _batches(config, masked, fabric):
            logits = LinearSegHead(weight, bias)((tokens - mean) / std, truth.shape[-1])
            loss = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            pixels = summed(fabric, (truth != VOID).sum()).clamp(min=1)
            for parameter in (weight, bias):
                assert parameter.grad is not None
                parameter.grad = summed(fabric, parameter.grad) / pixels
            optimizer.step()
            schedule.step()
            bar.update()
    with torch.no_grad():
        return LinearSegHead(weight / std, bias - (weight / std) @ mean)


def _batches(
    config: SegConfig, masked: MaskedFeatures, fabric: Fabric
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch: tokens (B, N, C), masks (B, S, S)."""
    for epoch in range(config.epochs):
        rng = np.random.default_rng((config.seed, epoch))
        order = torch.from_numpy(rng.permutation(len(masked.indices)))
        for batch in torch.split(order, config.batch_size):
            share = batch[fabric.global_rank :: fabric.world_size]
            yield masked.tokens_of(share, fabric.device), masked.masks_of(share, fabric.device)
