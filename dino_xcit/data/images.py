"""Sets of images: where they come from, and how one image of them is read.

To add a source, write a class with the `ImageSet` interface and a row in `SOURCES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch

from dino_xcit.data import shapes
from dino_xcit.data.decode import (
    EXTENSIONS,
    decode,
    from_pil,
    one_line,
    reading_images,
    require_readable,
    time_limit,
)
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dino_xcit.config.evaluation import EvalConfig
    from dino_xcit.config.pretrain import PretrainConfig

    Config: TypeAlias = PretrainConfig | EvalConfig
    """Options that name the images: data_path, dataset, num_images, in_chans and seed."""

SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "test", "eval")}
"""Names of each split's folder or list."""
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


class TimmSet:
    """A data set of timm's factory: an image folder, or one of torchvision or Hugging Face."""

    def __init__(self, dataset: Any, channels: int, labelled: bool = False) -> None:
        """Wrap the data set.

        Args:
            dataset: timm's set with a `reader` of files, or torchvision's, which returns PIL
                images.
            channels: Channels of the images that are read.
            labelled: Whether a single class is a class; else a set of one class has no labels.
        """
        require_readable(channels)
        self.dataset, self.channels = dataset, channels
        self.reader = getattr(dataset, "reader", None)
        labels = _labels(dataset)
        single = labels is not None and len(np.unique(labels)) <= 1
        self.labels = None if single and not labelled else labels
        self.classes: dict[str, int] | None = getattr(
            dataset, "class_to_idx", getattr(self.reader, "class_to_idx", None)
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        with time_limit():
            if self.reader is None:
                with reading_images():
                    image = self.dataset[index][0]
                    return from_pil(image, self.channels)
            with self.reader[index][0] as file:
                data = file.read()
            return decode(data, self.channels)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return str(self.reader.filename(index, absolute=True)) if self.reader else f"image {index}"

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        files = [path for path, _ in getattr(self.reader, "samples", [])]
        stats = [Path(path).stat() for path in files if Path(path).exists()]
        return [
            type(self.dataset).__name__,
            len(self),
            self.channels,
            files,
            [(s.st_size, s.st_mtime_ns) for s in stats],
        ]


def _labels(dataset: Any) -> np.ndarray | None:
    reader: Any = getattr(dataset, "reader", None)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if hasattr(reader, "samples"):
        labels = [target for _, target in reader.samples]
    elif hasattr(reader, "label_key"):
        labels = reader.dataset[reader.label_key]
    return None if labels is None else np.asarray(labels)


class Subset:
    """A number of images of a set, sampled by the seed."""

    def __init__(self, images: ImageSet, count: int, seed: int) -> None:
        self.images = images
        permutation = np.random.default_rng((seed, len(images))).permutation(len(images))
        self.indices = np.sort(permutation[:count])
        self.labels = None if images.labels is None else images.labels[self.indices]
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
    name = config.dataset or ("" if config.data_path else "shapes")
    for prefix, open_source in SOURCES.items():
        if name == prefix or (prefix.endswith("/") and name.startswith(prefix)):
            return open_source(config, split, classes)
    raise UserError(
        f"--dataset {name} is unknown; expected shapes, torch/NAME (torchvision) or hfds/NAME "
        "(Hugging Face)"
    )


def _open_shapes(config: Config, split: str, _classes: dict[str, int] | None) -> ImageSet:
    return ShapeSet(config.seed, split, shape_counts(config)[split], config.in_chans or 3)


def shape_counts(config: Config) -> dict[str, int]:
    """Return the number of embedded images in each split."""
    return {"train": config.num_images or shapes.COUNT, "validation": shapes.VALIDATION_COUNT}


def _open_folder(config: Config, split: str, classes: dict[str, int] | None) -> ImageSet | None:
    from timm.data.dataset_factory import create_dataset

    root = Path(config.data_path or "")
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise UserError(f"--data_path {root} {kind}; expected a folder of images")
    of_split = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if split == "validation" and of_split is None:
        return None
    folder = of_split or root
    try:
        dataset = create_dataset(
            "",
            root=str(folder),
            search_split=False,
            class_map=classes or {},
            input_key=";".join(EXTENSIONS),
        )
    except RuntimeError:  # timm: "Found 0 images"
        if split == "validation":
            return None
        files = sum(len(names) for _, _, names in os.walk(folder))
        raise UserError(
            f"no images in --data_path {folder} ({files} other files); expected files ending in "
            f"{' '.join(EXTENSIONS)}"
        ) from None
    images = TimmSet(dataset, config.in_chans or 3, labelled=classes is not None)
    return _limited(images, config, split)


def _open_named(config: Config, split: str, _classes: dict[str, int] | None) -> ImageSet | None:
    from timm.data.dataset_factory import create_dataset

    name = config.dataset or ""
    try:
        dataset = create_dataset(name, root=config.data_path, split=split)
    except ImportError as error:
        raise UserError(
            f"--dataset {name} needs a package that is not installed: {error}"
        ) from error
    except (AssertionError, RuntimeError, OSError, ValueError) as error:
        if split == "validation":  # the training images could be opened, so the split is missing
            return None
        raise UserError(
            f"--dataset {name} could not be opened at --data_path {config.data_path}: "
            f"{one_line(error)}"
        ) from error
    return _limited(TimmSet(dataset, config.in_chans or 3), config, split)


def _limited(images: ImageSet, config: Config, split: str) -> ImageSet:
    """Apply --num_images to the training images."""
    if split != "train" or not config.num_images:
        return images
    require_images(config.num_images, len(images))
    return Subset(images, config.num_images, config.seed)


def require_images(num_images: int, available: int) -> None:
    """Raise UserError if --num_images is more than there are."""
    if num_images > available:
        raise UserError(f"--num_images {num_images} is more than the {available} images found")


SOURCES: dict[str, Callable[[Config, str, dict[str, int] | None], ImageSet | None]] = {
    "": _open_folder,  # --data_path without --dataset
    "shapes": _open_shapes,
    "torch/": _open_named,
    "hfds/": _open_named,
}
"""Functions that open a source, by --dataset or, with a slash at its end, a prefix of it."""
