"""Images with a mask each, for segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_xcit.data import shapes
from dino_xcit.data.decode import EXTENSIONS, FORMATS, decode, reading_images, require_readable
from dino_xcit.data.framing import Transform, centre_crop
from dino_xcit.data.images import ImageSet, ShapeSet, require_images, sampled, shape_counts
from dino_xcit.data.splits import SPLITS
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from dino_xcit.config.evaluation import SegConfig

IMAGE_FOLDERS = ("images", "JPEGImages")
MASK_FOLDERS = ("masks", "annotations", "labels", "SegmentationClass")
VOC_LISTS = "ImageSets/Segmentation"
VOID = 255
"""Value of the pixels without a class in framed masks."""


# -- sets --------------------------------------------------------------------------------------


class MaskedSet(ImageSet, Protocol):
    """Images with a mask each. An image's label is its index, by which its mask is found."""

    def mask(self, index: int) -> np.ndarray:
        """Return the class of each pixel, uint8 (H, W).

        Raises:
            ImageError: The file is no mask that can be decoded.
            OSError: The file cannot be read.
        """


class MaskedShapes(ShapeSet):
    """The embedded images; the classes are the plain ground, 0, and the ten textures."""

    def __init__(self, seed: int, split: str, count: int, channels: int) -> None:
        super().__init__(seed, split, count, channels)
        self.labels = np.arange(count)

    def mask(self, index: int) -> np.ndarray:
        """See `MaskedSet`."""
        shape = shapes.draw_shape(self.seed, self.split, index, self.channels)
        return np.where(shape.mask, shape.label + 1, 0).astype(np.uint8)


class MaskedFiles:
    """Image files and the mask file of each."""

    classes = None

    def __init__(self, images: list[Path], masks: list[Path], channels: int) -> None:
        require_readable(channels)
        self.images, self.masks, self.channels = images, masks, channels
        self.labels = np.arange(len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        return decode(self.images[index].read_bytes(), self.channels)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return str(self.images[index])

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        stats = [path.stat() for path in (*self.images, *self.masks)]
        return [
            list(map(str, self.images)),
            self.channels,
            [(s.st_size, s.st_mtime_ns) for s in stats],
        ]

    def mask(self, index: int) -> np.ndarray:
        """See `MaskedSet`."""
        path = self.masks[index]
        with path.open("rb") as file, reading_images(), Image.open(file, formats=FORMATS) as image:
            if image.mode not in ("P", "L", "1"):
                raise ImageError(
                    f"mask {path} is in colour or of 16 bits; expected the number of a class in "
                    "each pixel"
                )
            return np.array(image).astype(np.uint8)


# -- sources -----------------------------------------------------------------------------------


def open_masked(config: SegConfig) -> tuple[dict[str, MaskedSet], dict[str, int]]:
    """Open both splits with their masks.

    Returns:
        The images of each split, and the number of each class by its name (none for files).

    Raises:
        UserError: There are no images with masks; the message names the flag.
    """
    channels = config.in_chans or 3
    if config.dataset == "shapes":
        classes = {"ground": 0, **{name: label for label, name in enumerate(shapes.CLASSES, 1)}}
        embedded: dict[str, MaskedSet] = {
            split: MaskedShapes(config.seed, split, count, channels)
            for split, count in shape_counts(config).items()
        }
        return embedded, classes
    if config.dataset is not None or config.data_path is None:
        raise UserError(
            f"--dataset {config.dataset} has no masks; expected shapes, or --data_path with images "
            "and masks"
        )
    train, validation = (
        MaskedFiles(*_images_and_masks(Path(config.data_path), split), channels) for split in SPLITS
    )
    if config.num_images:
        require_images(config.num_images, len(train))
        chosen = sampled(train, config.num_images, config.seed).indices
        train = MaskedFiles(
            [train.images[i] for i in chosen], [train.masks[i] for i in chosen], channels
        )
    return {"train": train, "validation": validation}, {}


class SplitFiles(NamedTuple):
    """Where the images and masks of a split lie."""

    images: Path
    masks: Path
    listed: set[str] | None
    """names of the split's images, without their extension; None if all belong to it"""


def _images_and_masks(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the images of a split that have a mask, and their masks.

    A mask has the path of its image, from the folder of masks on, but for the extension.
    """
    images_folder, masks_folder, listed = _find_split(root, split)
    images, masks = _files_by_name(images_folder), _files_by_name(masks_folder)
    names = [name for name in images if name in masks and (listed is None or name in listed)]
    if not names:
        raise UserError(f"no image in {images_folder} has a mask of its name in {masks_folder}")
    return [images[name] for name in names], [masks[name] for name in names]


def _find_split(root: Path, split: str) -> SplitFiles:
    """Find the split as subfolders of the images and masks (ADE20K) or as a list (VOC)."""
    images, masks = _first_folder(root, IMAGE_FOLDERS), _first_folder(root, MASK_FOLDERS)
    expected = (
        "expected images/ and masks/ with train/ and val/ in each, or "
        f"{VOC_LISTS}/train.txt and val.txt beside"
    )
    if images is None or masks is None:
        missing = "images" if images is None else "masks"
        raise UserError(f"--data_path {root} has no {missing}/; {expected}")
    for name in SPLITS[split]:
        if (images / name).is_dir() and (masks / name).is_dir():
            return SplitFiles(images / name, masks / name, None)
        names = root / VOC_LISTS / f"{name}.txt"
        if names.is_file():
            return SplitFiles(images, masks, set(names.read_text().split()))
    raise UserError(f"--data_path {root} has no {split} images; {expected}")


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Return the image files below the folder by their path in it, without the extension."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*"))
        if is_image(path)
    }


def is_image(path: Path) -> bool:
    """Whether this is a file with the extension of an image."""
    return path.suffix.lower() in EXTENSIONS and path.is_file()


# -- framed masks ------------------------------------------------------------------------------


class MaskDataset(Dataset[tuple[Tensor, bool]]):
    """Masks by index, framed as their images."""

    def __init__(self, images: MaskedSet, transform: Transform, ignored: tuple[int, ...]) -> None:
        self.images, self.transform = images, transform
        self.ignored = torch.tensor(ignored, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        """Return the mask, uint8 (size, size), and whether it could be read and fits its image.

        The values to ignore are `VOID`.
        """
        size, resize_size = self.transform.image_size, self.transform.resize_size
        try:
            mask, image = self.images.mask(index), self.images.read(index)
        except (ImageError, OSError):
            return torch.zeros(size, size, dtype=torch.uint8), False
        if mask.shape != image.shape[1:]:
            return torch.zeros(size, size, dtype=torch.uint8), False
        framed = centre_crop(torch.from_numpy(mask)[None], size, resize_size, _nearest)[0]
        framed[torch.isin(framed, self.ignored)] = VOID
        return framed, True


def _nearest(masks: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(masks, (height, width), mode="nearest-exact")
