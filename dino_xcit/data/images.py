"""Where images come from, which are bad, and in which order they are visited.

Every sample is asked for by (epoch, index of the image), so that a loader's worker needs no state to draw its numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dino_xcit.data import shapes
from dino_xcit.data.decode import EXTENSIONS, decode, from_pil, one_line, time_limit
from dino_xcit.errors import UserError

SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "test", "eval")}
IMAGES_LOOKED_AT = 16  # for a set's fingerprint


class ImageOptions(Protocol):
    """The options that say which images a command works on."""

    @property
    def data_path(self) -> str | None: ...
    @property
    def dataset(self) -> str | None: ...
    @property
    def num_images(self) -> int | None: ...
    @property
    def in_chans(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


class ImageSet(Protocol):
    """Images by number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each image, or None if the set has no classes."""

    @property
    def classes(self) -> dict[str, int] | None:
        """Label of each class by its name, or None if the set has no names for them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """uint8 (C, H, W); raises OSError or ValueError if the image cannot be read."""

    def name(self, index: int) -> str:
        """What tells a person which image this is."""

    def identity(self) -> list[Any]:
        """Plain values that differ from those of other sets: every file with its size and time, where there are files."""


class ShapeSet:
    """The embedded set (`shapes.py`)."""

    def __init__(self, seed: int, split: str, count: int, channels: int) -> None:
        self.seed, self.split, self.count, self.channels = seed, split, count, channels
        self.labels = np.arange(count) % len(shapes.CLASSES)
        self.classes = {name: label for label, name in enumerate(shapes.CLASSES)}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        image = shapes.draw_shape(self.seed, self.split, index, self.channels).image
        return torch.from_numpy(image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"shape {index} ({shapes.CLASSES[index % len(shapes.CLASSES)]})"

    def identity(self) -> list[Any]:
        return ["shapes", self.seed, self.split, self.count, self.channels]


class TimmSet:
    """Any set that timm's dataset factory makes: a folder, torch/..., hfds/... ."""

    def __init__(self, dataset: Any, channels: int, labelled: bool = False) -> None:
        """labelled: one class is a class too; else all images in one folder have no labels."""
        self.dataset, self.channels = dataset, channels
        self.reader = getattr(dataset, "reader", None)
        labels = _labels(dataset)
        self.labels = (
            labels if labels is not None and (labelled or len(np.unique(labels)) > 1) else None
        )
        self.classes = getattr(dataset, "class_to_idx", getattr(self.reader, "class_to_idx", None))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        with time_limit():
            if self.reader is None:  # torchvision's sets hand out PIL images
                return from_pil(self.dataset[index][0], self.channels)
            with self.reader[index][0] as file:
                return decode(file.read(), self.channels)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True)) if self.reader else f"image {index}"

    def identity(self) -> list[Any]:
        files = [path for path, _ in getattr(self.reader, "samples", [])]
        stats = [os.stat(path) for path in files if os.path.exists(path)]
        return [
            type(self.dataset).__name__,
            len(self),
            self.channels,
            files,
            [(s.st_size, s.st_mtime_ns) for s in stats],
        ]


class Subset:
    """Some images of a set, picked by the seed."""

    def __init__(self, images: ImageSet, count: int, seed: int) -> None:
        self.images = images
        self.indices = np.sort(
            np.random.default_rng((seed, len(images))).permutation(len(images))[:count]
        )
        self.labels = None if images.labels is None else images.labels[self.indices]
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def identity(self) -> list[Any]:
        return [self.images.identity(), self.indices.tolist()]


def fingerprint(images: ImageSet) -> str:
    """Changes when the images do: their names, sizes, times and labels, and the pixels of a few."""
    digest = hashlib.sha256(json.dumps(images.identity()).encode())
    if images.labels is not None:
        digest.update(images.labels.astype(np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(images) - 1, IMAGES_LOOKED_AT).astype(int)):
        with contextlib.suppress(OSError, ValueError):
            digest.update(images.read(int(index)).contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_images(
    config: ImageOptions, split: str, classes: dict[str, int] | None = None
) -> ImageSet | None:
    """The images of a split, `train` or `validation`; None if the set has no validation images.

    classes: labels by folder name, so that the two splits of a folder agree; images of other classes are left out.
    Raises ValueError, naming the flag, if there is nothing to open.
    """
    name = config.dataset or ("" if config.data_path else "shapes")
    if name == "shapes":
        counts = {"train": config.num_images or shapes.COUNT, "validation": shapes.VALIDATION_COUNT}
        return ShapeSet(config.seed, split, counts[split], config.in_chans or 3)
    images = _open_folder(config, split, classes) if not name else _open_named(name, config, split)
    if images is not None and split == "train" and config.num_images:
        if config.num_images > len(images):
            raise UserError(
                f"--num_images {config.num_images} is more than the {len(images)} images found"
            )
        images = Subset(images, config.num_images, config.seed)
    return images


def _open_folder(
    config: ImageOptions, split: str, classes: dict[str, int] | None
) -> ImageSet | None:
    from timm.data import ImageDataset
    from timm.data.readers import set_img_extensions

    data_path = config.data_path
    root = Path(data_path or "")
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise UserError(f"--data_path {data_path} {kind}; expected a folder of images")
    found = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if split == "validation" and found is None:
        return None
    folder = found or root
    set_img_extensions(EXTENSIONS)
    try:
        return TimmSet(
            ImageDataset(str(folder), class_map=classes),
            config.in_chans or 3,
            labelled=classes is not None,
        )
    except RuntimeError:  # timm's "Found 0 images"
        if split == "validation":
            return None
        files = sum(len(names) for _, _, names in os.walk(folder))
        raise UserError(
            f"no images in --data_path {folder} ({files} other files); expected files ending in {' '.join(EXTENSIONS)}"
        ) from None


def _open_named(name: str, config: ImageOptions, split: str) -> ImageSet | None:
    from timm.data import create_dataset

    if not name.startswith(("torch/", "hfds/")):
        raise UserError(
            f"--dataset {name} is unknown; expected shapes, torch/NAME (torchvision) or hfds/NAME (Hugging Face)"
        )
    try:
        return TimmSet(
            create_dataset(name, root=config.data_path, split=split), config.in_chans or 3
        )
    except ImportError as error:
        raise UserError(
            f"--dataset {name} needs a package that is not installed: {error}"
        ) from error
    except (AssertionError, RuntimeError, OSError, ValueError) as error:
        if split == "validation":  # a set whose training images opened has no such split
            return None
        raise UserError(
            f"--dataset {name} could not be opened at --data_path {config.data_path}: {one_line(error)}"
        ) from error


def _labels(dataset: Any) -> np.ndarray | None:
    reader: Any = getattr(dataset, "reader", None)
    labels: Any = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if hasattr(reader, "samples"):
        labels = [target for _, target in reader.samples]
    elif hasattr(reader, "label_key"):
        labels = reader.dataset[reader.label_key]
    return None if labels is None else np.asarray(labels)
