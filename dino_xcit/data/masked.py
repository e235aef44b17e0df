"""Images with a mask each, for segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dino_xcit.data import shapes
from dino_xcit.data.decode import ImageReader, one_line
from dino_xcit.data.folder import one_path
from dino_xcit.data.framing import Transform, centre_crop
from dino_xcit.data.images import ImageSet, ShapeSet, require_images, sampled, shape_counts
from dino_xcit.data.mask_files import read_mask, read_palette
from dino_xcit.data.mask_layouts import find_pairs
from dino_xcit.data.pixels import require_readable
from dino_xcit.data.splits import SPLITS
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from dino_xcit.config.evaluation import SegConfig
    from dino_xcit.data.mask_files import Palette

VOID = -1
"""Value of the pixels without a class in framed masks."""
LARGEST = 32767  # number of a class, which is stored with 16 bits


# -- sets --------------------------------------------------------------------------------------


class MaskedSet(ImageSet, Protocol):
    """Images with a mask each. An image's label is its index, by which its mask is found."""

    def mask(self, index: int) -> np.ndarray:
        """Return the number of the class of each pixel, int32 (H, W).

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
        return np.where(shape.mask, shape.label + 1, 0).astype(np.int32)


class MaskedFiles:
    """Image files and the mask file of each."""

    classes = None

    def __init__(
        self,
        images: list[Path],
        masks: list[Path],
        channels: int,
        palette: Palette | None = None,
    ) -> None:
        require_readable(channels)
        self.images, self.masks, self.channels = images, masks, channels
        self.palette = palette
        self.reader = ImageReader(self._data, len(images), channels)
        self.labels = np.arange(len(images))

    def __len__(self) -> int:
        return len(self.images)

    def _data(self, index: int) -> bytes:
        return self.images[index].read_bytes()

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        return self.reader.read(index)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return str(self.images[index])

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        stats = [path.stat() for path in (*self.images, *self.masks)]
        colours = [self.palette.colours.tolist()] if self.palette else []
        return [
            list(map(str, self.images)),
            self.channels,
            [(s.st_size, s.st_mtime_ns) for s in stats],
            *colours,
        ]

    def mask(self, index: int) -> np.ndarray:
        """See `MaskedSet`."""
        try:
            return read_mask(self.masks[index], self.palette)
        except ImageError as error:
            raise ImageError(f"mask {self.masks[index]}: {error}") from error


# -- sources -----------------------------------------------------------------------------------


def open_masked(config: SegConfig) -> tuple[dict[str, MaskedSet], dict[str, int]]:
    """Open both splits with their masks.

    Returns:
        The images of each split, and the number of each class by its name, if it is known.

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
    root = Path(one_path(config) or "")
    palette = read_palette(root)
    train, validation = (
        MaskedFiles(*find_pairs(root, split), channels, palette) for split in SPLITS
    )
    if config.num_images:
        require_images(config.num_images, len(train))
        chosen = sampled(train, config.num_images, config.seed).indices
        images, masks = ([files[i] for i in chosen] for files in (train.images, train.masks))
        train = MaskedFiles(images, masks, channels, palette)
    names = palette.names if palette else []
    classes = {name: number for number, name in enumerate(names) if names.count(name) == 1}
    return {"train": train, "validation": validation}, classes


# -- framed masks ------------------------------------------------------------------------------


class MaskDataset(Dataset[tuple[Tensor, bool]]):
    """Masks by index, framed as their images."""

    def __init__(self, images: MaskedSet, transform: Transform, ignored: tuple[int, ...]) -> None:
        self.images, self.transform = images, transform
        self.ignored = np.array(ignored, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        """Return the mask, int16 (size, size), and whether it could be read and fits its image.

        The values to ignore are `VOID`.
        """
        size, resize_size = self.transform.image_size, self.transform.resize_size
        try:
            mask = self._read(index)
        except (ImageError, OSError):
            return torch.zeros(size, size, dtype=torch.int16), False
        return centre_crop(torch.from_numpy(mask)[None], size, resize_size, _nearest)[0], True

    def problem(self, index: int) -> str:
        """Return why the image has no mask; empty if it can be read now."""
        try:
            self._read(index)
        except (ImageError, OSError) as error:
            return one_line(error)
        return ""

    def _read(self, index: int) -> np.ndarray:
        """Return the whole mask, int16 (H, W).

        Raises:
            ImageError: The image or its mask cannot be decoded, or one does not fit the other.
            OSError: A file cannot be read.
        """
        mask, image = self.images.mask(index), self.images.read(index)
        if mask.shape != image.shape[1:]:
            of_mask, of_image = ("x".join(map(str, s)) for s in (mask.shape, image.shape[1:]))
            raise ImageError(f"the mask has {of_mask} pixels, the image {of_image}")
        mask = np.where(np.isin(mask, self.ignored) | (mask < 0), VOID, mask)
        if mask.max() > LARGEST:
            raise ImageError(
                f"the mask has the value {mask.max()}; expected classes up to {LARGEST}, or "
                "--ignore_label with this value"
            )
        return mask.astype(np.int16)


def _nearest(masks: Tensor, height: int, width: int) -> Tensor:
    """Resize int16 masks, (1, 1, H, W); float32 holds their values exactly."""
    return F.interpolate(masks.float(), (height, width), mode="nearest-exact").to(torch.int16)
