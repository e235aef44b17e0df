"""Framing of whole images for evaluations and figures: resize the short side, crop the centre."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dino_xcit.data.decode import one_line
from dino_xcit.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.data.images import ImageSet

SMALL = 96  # pixels: smaller images are framed already, so nothing of them is cut off


class Transform(NamedTuple):
    """How images are framed and normalised: x -> (x - mean) / std, with x in [0, 1]."""

    image_size: int
    """side of the centre crop, in pixels"""
    resize_size: int
    """short side of the resized image, in pixels"""
    mean: tuple[float, ...]
    """mean of each channel, in [0, 1]"""
    std: tuple[float, ...]
    """standard deviation of each channel, in [0, 1]"""


def default_resize(image_size: int) -> int:
    """Return the short side to resize to: 8 / 7 of the crop (256 for 224), a small crop's own."""
    return image_size * 8 // 7 if image_size >= SMALL else image_size


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize uint8 (B, C, H, W) with antialiasing, `mode` bicubic or bilinear."""
    return F.interpolate(images, (height, width), mode=mode, antialias=True)


def centre_crop(
    image: Tensor,
    size: int,
    short_side: int,
    resize_to: Callable[[Tensor, int, int], Tensor] = resize,
) -> Tensor:
    """Resize the short side, then crop the centre.

    Args:
        image: uint8 (C, H, W).
        size: Side of the crop, in pixels.
        short_side: Short side of the resized image, in pixels.
        resize_to: Resizes (1, C, H, W) to a height and a width.

    Returns:
        uint8 (C, size, size).
    """
    _, H, W = image.shape
    shorter = min(H, W)
    image = resize_to(image[None], H * short_side // shorter, W * short_side // shorter)[0]
    # Halves are rounded to the even number, as in torchvision.
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


class EvalDataset(Dataset[tuple[Tensor, bool]]):
    """Framed images by index."""

    def __init__(self, images: ImageSet, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        """Return the image, uint8 (C, size, size), and whether it could be read; if not, zeros."""
        size, resize_size = self.transform.image_size, self.transform.resize_size
        try:
            image = self.images.read(index)
        except (ImageError, OSError):
            return torch.zeros(len(self.transform.mean), size, size, dtype=torch.uint8), False
        return centre_crop(image, size, resize_size), True

    def problem(self, index: int) -> str:
        """Return why the image cannot be read; empty if it can be read now."""
        try:
            self.images.read(index)
        except (ImageError, OSError) as error:
            return one_line(error)
        return ""
