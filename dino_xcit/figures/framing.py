"""How images are framed for attention maps, and which fit into memory.

Each image keeps its own size and aspect: the long side is resized to `--image_size`, and sides that
the patch size does not divide are cropped or padded.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_xcit.data.decode import FORMATS, decode, reading_images
from dino_xcit.data.framing import resize
from dino_xcit.errors import UserError
from dino_xcit.figures.maps import bytes_per_pixel
from dino_xcit.runtime import memory_there

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from dino_xcit.figures.model import AttentionModel

COPIES = 3  # of the pixels of an image while it is decoded


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Lift PIL's limit on pixels; `Framing` refuses what does not fit into memory."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How images are framed for some backbones; refuses too large ones before decoding."""

    patch: int
    """pixels that divide both sides: a multiple of every backbone's patch size"""
    long_side: int
    """of images in pixels; 0 keeps each image's own"""
    fit: str
    """crop or pad: how sides become multiples of the patch"""
    bytes_per_pixel: float
    """memory of a pass"""
    memory: float
    """bytes that a pass may take on its device"""
    cpu_memory: float
    """bytes that decoding may take"""

    @classmethod
    def of(cls, models: Sequence[AttentionModel], fit: str) -> Framing:
        """The framing that serves all of these models, so that they get the same pixels."""
        return cls(
            patch=math.lcm(*(model.backbone.patch_size for model in models)),
            long_side=max(model.long_side for model in models),
            fit=fit,
            bytes_per_pixel=max(bytes_per_pixel(model.backbone) for model in models),
            memory=memory_there(models[0].device),
            cpu_memory=memory_there(torch.device("cpu")),
        )

    def __str__(self) -> str:
        size = self.long_side or "as it is"
        return f"long side {size}, {self.fit} to multiples of {self.patch} pixels"

    def read(self, path: Path, channels: int) -> Tensor:
        """Read an image file as uint8 (C, H, W).

        Raises:
            UserError: the file is not an image, or its image is too large to decode or for a pass.
            OSError: the file cannot be read.
        """
        if not path.exists():
            raise UserError("does not exist")
        data = path.read_bytes()
        if not data:
            raise UserError("an empty file (0 bytes)")
        with any_size():
            with reading_images(), Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
            self.check(height, width)
            needed = COPIES * max(3, channels) * height * width
            if needed > self.cpu_memory:
                raise UserError(
                    f"{width} x {height} pixels: decoding alone needs about {_gib(needed)}, "
                    f"there are {_gib(self.cpu_memory)}; expected a smaller image"
                )
            return decode(data, channels)

    def check(self, height: int, width: int) -> None:
        """Raise a UserError if a pass over an image of this size does not fit into memory.

        The message names the largest `--image_size` that fits.
        """
        needed = self._needed(height, width, self.long_side)
        if needed <= self.memory:
            return
        h, w = resized_sides(height, width, self.long_side)
        aspect = min(height, width) / max(height, width)
        estimate = min(int(math.sqrt(self.memory / self.bytes_per_pixel / aspect)), max(h, w))
        sizes = (patches * self.patch for patches in range(estimate // self.patch, 0, -1))
        fits = next((s for s in sizes if self._needed(height, width, s) <= self.memory), None)
        advice = f"--image_size {fits} fits" if fits else "no size fits"
        raise UserError(
            f"{w} x {h} pixels need about {_gib(needed)}, there are {_gib(self.memory)}; {advice}"
        )

    def _needed(self, height: int, width: int, long_side: int) -> float:
        """Bytes of a pass over an image of this size, resized to the long side."""
        h, w = resized_sides(height, width, long_side)
        if self.fit == "pad":
            h, w = (-(-side // self.patch) * self.patch for side in (h, w))
        return self.bytes_per_pixel * h * w

    def apply(self, image: Tensor, mode: str = "bicubic") -> tuple[Tensor, tuple[int, int]]:
        """Resize an image, and crop or pad it to multiples of the patch.

        Args:
            image: uint8 (C, H, W).
            mode: bicubic (antialiased), or a mode of `F.interpolate` without antialiasing.

        Returns:
            The pixels, uint8 (C, H', W'), and how many rows and columns of them are not padding.

        Raises:
            UserError: the image is smaller than a patch and not padded.
        """
        height, width = image.shape[-2:]
        h, w = resized_sides(height, width, self.long_side)
        if (h, w) != (height, width):
            bicubic = mode == "bicubic"
            resized = resize if bicubic else lambda x, h, w: F.interpolate(x, (h, w), mode=mode)
            image = resized(image[None], h, w)[0]
        p = self.patch
        if self.fit == "pad":
            down, across = (torch.arange(-(-side // p) * p).clamp_max(side - 1) for side in (h, w))
            return image[:, down][:, :, across], (h, w)  # the padding repeats the edge
        H, W = h // p * p, w // p * p
        if not H or not W:
            raise UserError(
                f"{width} x {height} pixels, {w} x {h} at --image_size {self.long_side}: "
                f"smaller than a patch of {p} x {p}; raise --image_size or take --fit pad"
            )
        top, left = (h - H) // 2, (w - W) // 2
        return image[:, top : top + H, left : left + W].contiguous(), (H, W)


def resized_sides(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width once the long side has so many pixels; 0 keeps them."""
    if not long_side:
        return height, width
    longest = max(height, width)
    return max(1, round(height * long_side / longest)), max(1, round(width * long_side / longest))


def without_padding(pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Result of `Framing.apply` -> the image that the backbone gets, uint8 (H, W, C)."""
    image: np.ndarray = pixels[:, : size[0], : size[1]].permute(1, 2, 0).contiguous().numpy()
    return image


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
