"""How an evaluation frames an image: resize the short side, centre crop."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.data.images import ImageSet


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """uint8 (B, C, H, W) -> uint8 (B, C, height, width), antialiased bicubic or bilinear."""
    return F.interpolate(images, (height, width), mode=mode, antialias=True)


SMALL = 96  # below this side nothing is cut off: small images are framed already


# -- images ----------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """How an image is framed and normalised."""

    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def default_resize(image_size: int) -> int:
    """8 / 7 of the crop (256 for 224); small images are not cut."""
    return image_size * 8 // 7 if image_size >= SMALL else image_size


def centre_crop(
    image: Tensor,
    size: int,
    short_side: int,
    resized: Callable[[Tensor, int, int], Tensor] = resize,
) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, size, size): the short side resized, then the centre. resized: (1, C, H, W) to a size."""
    _, H, W = image.shape
    image = resized(image[None], H * short_side // min(H, W), W * short_side // min(H, W))[0]
    top, left = (
        round((side - size) / 2) for side in image.shape[1:]
    )  # halves to the even number, as in torchvision
    return image[:, top : top + size, left : left + size]


class EvalDataset(Dataset[tuple[Tensor, bool]]):
    """Images of a set by number, framed: uint8 (C, size, size), and whether the image could be read."""

    def __init__(self, images: ImageSet, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        size = self.transform.image_size
        try:
            return centre_crop(self.images.read(index), size, self.transform.resize_size), True
        except (OSError, ValueError):
            return torch.zeros(len(self.transform.mean), size, size, dtype=torch.uint8), False
