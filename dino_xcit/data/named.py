"""Data sets by name: those of torchvision and of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_xcit.data.decode import decode, one_line, reading_images, time_limit
from dino_xcit.data.folder import one_path
from dino_xcit.data.pixels import from_pil, require_readable
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dino_xcit.data.images import Config

HUGGING_FACE_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "test")}
"""Names of each split, the preferred ones first."""
CANNOT_OPEN = (AssertionError, RuntimeError, OSError, ValueError)
"""What torchvision and `datasets` raise for a set or split that is not there."""


class TorchSet:
    """A data set of torchvision, which returns PIL images."""

    def __init__(self, dataset: Any, channels: int) -> None:
        require_readable(channels)
        self.dataset, self.channels = dataset, channels
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
        self.labels = _usable(None if labels is None else np.asarray(labels))
        self.classes: dict[str, int] | None = getattr(dataset, "class_to_idx", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        with time_limit(), reading_images():
            return from_pil(self.dataset[index][0], self.channels)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return f"image {index}"

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        return [type(self.dataset).__name__, len(self), self.channels, [], []]


class HuggingFaceSet:
    """A data set of Hugging Face's `datasets`, whose image column holds undecoded files."""

    def __init__(self, dataset: Any, channels: int, input_key: str, target_key: str | None) -> None:
        """Read the labels.

        Args:
            dataset: The set.
            channels: Channels of the images that are read.
            input_key: Column of the images.
            target_key: Column of the labels; without integers there are none.
        """
        require_readable(channels)
        self.dataset, self.channels, self.input_key = dataset, channels, input_key
        self.labels, self.classes = None, None
        values = [] if target_key is None else list(dataset[target_key])
        if not values or not all(isinstance(value, (int, np.integer)) for value in values):
            return
        self.labels = _usable(np.asarray(values))
        names = getattr(dataset.features[target_key], "names", None)
        self.classes = {name: label for label, name in enumerate(names)} if names else None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        image = self.dataset[index][self.input_key]
        if image is None:
            raise ImageError("no image in this row (null)")
        with time_limit():
            return decode(image.get("bytes") or Path(image["path"]).read_bytes(), self.channels)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        image = self.dataset[index][self.input_key] or {}
        return str(image.get("path") or f"image {index}")

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        return ["ImageDataset", len(self), self.channels, [], []]


def _usable(labels: np.ndarray | None) -> np.ndarray | None:
    """The labels, or None where all images have the same."""
    return None if labels is None or len(np.unique(labels)) <= 1 else labels


# -- opening -----------------------------------------------------------------------------------


def open_torch(config: Config, split: str, _classes: dict[str, int] | None) -> TorchSet | None:
    """Open a split of `--dataset torch/NAME`; see `open_images`."""
    from timm.data.dataset_factory import create_dataset

    try:
        dataset = create_dataset(config.dataset or "", root=one_path(config), split=split)
    except ImportError as error:
        raise _missing_package(config, error) from error
    except CANNOT_OPEN as error:
        if split == "validation":  # the training images could be opened, so the split is missing
            return None
        raise _cannot_open(config, error) from error
    return TorchSet(dataset, config.in_chans or 3)


def open_hugging_face(
    config: Config, split: str, _classes: dict[str, int] | None
) -> HuggingFaceSet | None:
    """Open a split of `--dataset hfds/NAME`; see `open_images`."""
    try:
        import datasets
    except ImportError as error:
        raise _missing_package(config, error) from error
    name, problem = (config.dataset or "").partition("/")[2], None
    for candidate in HUGGING_FACE_SPLITS[split]:
        try:
            dataset = datasets.load_dataset(name, split=candidate, cache_dir=one_path(config))
        except CANNOT_OPEN as error:
            problem = problem or error
            continue
        return _with_columns(config, datasets, dataset)
    if split == "validation":
        return None
    raise _cannot_open(config, problem) from problem


def _with_columns(config: Config, datasets: Any, dataset: Any) -> HuggingFaceSet:
    """Choose the columns of images and labels."""
    columns = dict(dataset.features)
    of_images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    input_key = config.input_key or ("image" if "image" in columns else next(iter(of_images), None))
    target_key = config.target_key or ("label" if "label" in columns else None)
    listed = ", ".join(columns)
    if input_key is None:
        raise UserError(f"--dataset {config.dataset} has no column of images ({listed})")
    for flag, key in (("input_key", input_key), ("target_key", target_key)):
        if key is not None and key not in columns:
            raise UserError(f"--{flag} {key} is no column of {config.dataset}; expected {listed}")
    undecoded = dataset.cast_column(input_key, datasets.Image(decode=False))
    images = HuggingFaceSet(undecoded, config.in_chans or 3, input_key, target_key)
    if config.target_key is not None and images.labels is None:
        raise UserError(
            f"--target_key {target_key} holds no labels; expected an integer for each image, and "
            "more than one class"
        )
    return images


def _missing_package(config: Config, error: ImportError) -> UserError:
    return UserError(f"--dataset {config.dataset} needs a package that is not installed: {error}")


def _cannot_open(config: Config, error: BaseException | None) -> UserError:
    reason = one_line(error) if error else "no split"
    return UserError(
        f"--dataset {config.dataset} could not be opened at --data_path {config.data_path}: "
        f"{reason}"
    )
