"""Sets of images: where they come from, and how one image of them is read.

To add a source, write a class with the `ImageSet` interface in a file of its own, and a row in
`SOURCES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from dino_xcit.data import shapes
from dino_xcit.data.named import open_hugging_face, open_torch
from dino_xcit.data.paths import open_path
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dino_xcit.config.evaluation import EvalConfig
    from dino_xcit.config.pretrain import PretrainConfig

    Config: TypeAlias = PretrainConfig | EvalConfig
    """Options that name the images: data_path, dataset, num_images, input_key, ..."""

FINGERPRINTED_IMAGES = 16  # whose pixels are part of a set's fingerprint


class ImageSet(Protocol):
    """Images by index."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each image (n,), or None if the set has no classes."""

    @property
    def classes(self) -> dict[str, int] | None:
        """Label of each class by its name, or None if the classes have no names."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Return the image as uint8 (C, H, W).

        Raises:
            ImageError: The file is not an image that can be decoded.
            OSError: The file cannot be read.
        """

    def name(self, index: int) -> str:
        """Return a name by which a person finds the image, such as its path."""

    def identity(self) -> list[Any]:
        """Return JSON values that differ from those of any other set.

        For files these are paths, sizes and times of modification.
        """


# -- sets --------------------------------------------------------------------------------------


class ShapeSet:
    """The embedded images (`shapes.py`)."""

    def __init__(self, seed: int, split: str, count: int, channels: int) -> None:
        self.seed, self.split, self.count, self.channels = seed, split, count, channels
        self.labels = np.arange(count) % len(shapes.CLASSES)
        self.classes = {name: label for label, name in enumerate(shapes.CLASSES)}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        image = shapes.draw_shape(self.seed, self.split, index, self.channels).image
        return torch.from_numpy(image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return f"shape {index} ({shapes.CLASSES[index % len(shapes.CLASSES)]})"

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        return ["shapes", self.seed, self.split, self.count, self.channels]


class Subset:
    """Some images of a set."""

    def __init__(self, images: ImageSet, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices
        self.labels = None if images.labels is None else images.labels[indices]
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return self.images.name(int(self.indices[index]))

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        return [self.images.identity(), self.indices.tolist()]


def sampled(images: ImageSet, count: int, seed: int) -> Subset:
    """Return a number of images of a set, sampled by the seed, in their order."""
    permutation = np.random.default_rng((seed, len(images))).permutation(len(images))
    return Subset(images, np.sort(permutation[:count]))


def held_out(images: ImageSet, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide a set into training and validation images by the seed.

    Args:
        images: The set.
        fraction: Share of each class's images that are held out; at least one, and never all.
        seed: Of the choice.

    Returns:
        The training images and those held out, each in the order of the set.
    """
    labels = np.zeros(len(images), dtype=int) if images.labels is None else images.labels
    permutation = np.random.default_rng((seed, len(images))).permutation(len(images))
    chosen: list[np.ndarray] = []
    by_class = permutation[np.argsort(labels[permutation], kind="stable")]
    for of_class in np.split(by_class, np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]):
        count = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
        chosen.append(of_class[:count])
    validation = np.sort(np.concatenate(chosen))
    train = np.setdiff1d(np.arange(len(images)), validation)
    return Subset(images, train), Subset(images, validation)


def fingerprint(images: ImageSet) -> str:
    """Return a hash of the set's identity, its labels and the pixels of a few of its images."""
    digest = hashlib.sha256(json.dumps(images.identity()).encode())
    if images.labels is not None:
        digest.update(images.labels.astype(np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(images) - 1, FINGERPRINTED_IMAGES).astype(int)):
        with contextlib.suppress(ImageError, OSError):
            digest.update(images.read(int(index)).contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- sources -----------------------------------------------------------------------------------


class Source(NamedTuple):
    """A kind of images that `--dataset` names."""

    open: Callable[[Config, str, dict[str, int] | None], ImageSet | None]
    """opens a split, with the labels of the classes if they are known; None if there is none"""
    expected: str
    """its name in messages"""
    generated: bool = False
    """whether the images are made from --seed, as many as --num_images; else --num_images is a
    subset that is sampled with the seed"""


def source_of(config: Config) -> Source:
    """Return the source that the options name.

    Raises:
        UserError: There is no source of this name.
    """
    name = config.dataset or ("" if config.data_path else "shapes")
    for prefix, source in SOURCES.items():
        if name == prefix or (prefix.endswith("/") and name.startswith(prefix)):
            return source
    expected = ", ".join(source.expected for source in SOURCES.values())
    raise UserError(f"--dataset {name} is unknown; expected {expected}")


def open_images(
    config: Config, split: str, classes: dict[str, int] | None = None
) -> ImageSet | None:
    """Open the images of a split.

    Args:
        config: The options that name the images.
        split: `train` or `validation`.
        classes: Labels by folder name, so that both splits of a folder agree; images of other
            classes are left out.

    Returns:
        The images, or None if there is no such split for validation.

    Raises:
        UserError: There are no images to open; the message names the flag.
    """
    source = source_of(config)
    images = source.open(config, split, classes)
    if images is None or source.generated or split != "train" or not config.num_images:
        return images
    require_images(config.num_images, len(images))
    return sampled(images, config.num_images, config.seed)


def require_images(num_images: int, available: int) -> None:
    """Raise UserError if --num_images is more than there are."""
    if num_images > available:
        raise UserError(f"--num_images {num_images} is more than the {available} images found")


def _open_shapes(config: Config, split: str, _classes: dict[str, int] | None) -> ImageSet:
    return ShapeSet(config.seed, split, shape_counts(config)[split], config.in_chans or 3)


def shape_counts(config: Config) -> dict[str, int]:
    """Return the number of embedded images in each split."""
    return {"train": config.num_images or shapes.COUNT, "validation": shapes.VALIDATION_COUNT}


SOURCES = {
    "shapes": Source(_open_shapes, "shapes (generated)", generated=True),
    "torch/": Source(open_torch, "torch/NAME (torchvision)"),
    "hfds/": Source(open_hugging_face, "hfds/NAME (Hugging Face)"),
    "": Source(open_path, "nothing, for files in --data_path"),
}
"""Sources by --dataset or, with a slash at its end, a prefix of it."""
