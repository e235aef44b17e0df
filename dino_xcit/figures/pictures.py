"""Images and maps -> pictures: arrays of colours for figures, videos and the interactive page.

Axes: h heads; a map is (rows, columns) of patches, an image (H, W, 3) of pixels. Where padding lets
patches reach beyond the image, what lies outside it is cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.attention import Interpolation

# Distinguishable with normal colour vision and with each of the three kinds of colour blindness,
# the first ones best (tests/figures/test_pictures.py).
HEAD_COLOURS = (
    *("#ffcc33", "#00ffee", "#7766ee", "#ee0055", "#9966aa", "#ccee99", "#cc6600", "#22aa88"),
    *("#ccaaff", "#ff9955", "#88ddaa", "#9977dd", "#cc88bb", "#eeee77", "#ee5544", "#bbaa77"),
)
GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue in luma (ITU-R BT.601)
SMALLEST_PICTURE = 256  # pixels of the long side


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> (H, W, 3): grey three times, or the first three of more channels."""
    if image.shape[-1] > 2:
        return image[..., :3]
    return np.broadcast_to(image[..., :1], (*image.shape[:2], 3))


def canvas_image(image: np.ndarray, patch: int, largest: int) -> tuple[np.ndarray, int]:
    """Resample an image by a whole factor, so that maps can be drawn over it.

    Pixels of small images are repeated, so that what is drawn over them is not as coarse. Large
    images are averaged over blocks of 2, 4, ... pixels until the long side is at most `largest`, or
    the patch cannot be halved again.

    Args:
        image: uint8 (H, W, C).
        patch: side of a patch in pixels of the image.
        largest: pixels that the long side needs in the figure.

    Returns:
        RGB in [0, 1] (H', W', 3), and the side of a patch in its pixels.
    """
    side = max(image.shape[:2])
    pixels = rgb(image).astype(np.float32) / 255
    if side <= SMALLEST_PICTURE:
        times = -(-SMALLEST_PICTURE // side)
        return pixels.repeat(times, 0).repeat(times, 1), patch * times
    block = 1
    while side > largest * block and patch % (2 * block) == 0:
        block *= 2
    return (_block_means(pixels, block) if block > 1 else pixels), patch // block


def _block_means(pixels: np.ndarray, block: int) -> np.ndarray:
    """Means over square blocks of pixels; the last blocks may be smaller."""
    H, W = pixels.shape[:2]
    tops, lefts = np.arange(0, H, block), np.arange(0, W, block)
    sums = np.add.reduceat(np.add.reduceat(pixels, tops, axis=0), lefts, axis=1)
    heights, widths = np.diff([*tops, H]), np.diff([*lefts, W])
    means: np.ndarray = sums / (heights[:, None] * widths)[..., None]
    return means


def upsample(
    maps: np.ndarray, height: int, width: int, patch: int, interpolation: Interpolation
) -> np.ndarray:
    """Maps (..., rows, columns) -> a value for each pixel (..., height, width).

    Values stay in the range of the maps: bicubic interpolation does not overshoot it.
    """
    rows, columns = maps.shape[-2:]
    flat = torch.from_numpy(np.ascontiguousarray(maps, np.float32)).reshape(1, -1, rows, columns)
    options: dict[str, Any] = {"align_corners": False} if interpolation == "bicubic" else {}
    pixels = F.interpolate(flat, (rows * patch, columns * patch), mode=interpolation, **options)
    values = pixels.numpy().reshape(*maps.shape[:-2], rows * patch, columns * patch)
    return values[..., :height, :width].clip(maps.min(), maps.max())


def heat(values: np.ndarray, low: float, high: float, colormap: str) -> np.ndarray:
    """Values of pixels -> colours (..., 3); one colour for all if low equals high."""
    places = ((values - low) / ((high - low) or 1)).clip(0, 1)
    colours: np.ndarray = matplotlib.colormaps[colormap](places)[..., :3]
    return colours


def overlay(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Blend a map's colours with the image in grey, whose own colours would falsify the map's."""
    blended: np.ndarray = 0.4 * (image @ GREY)[..., None] + 0.6 * colours
    return blended


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image inside the mask; dark grey outside it."""
    return np.where(mask[..., None], image, 0.25 * (image @ GREY)[..., None])


def composite(
    image: np.ndarray, values: np.ndarray, limits: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Show all heads in one picture: each pixel in the colour of the head that attends to it most.

    Heads are compared by where a value lies in the head's own limits, which is also the opacity of
    the colour. Colours do not mix: a mixture would be read as another head.

    Args:
        image: RGB in [0, 1], (H, W, 3).
        values: maps of the heads, (h, H, W).
        limits: lowest and highest value of each head's colour scale.

    Returns:
        RGB in [0, 1], (H, W, 3).
    """
    low, high = np.array(limits, np.float32).T[..., None, None]
    values = ((values - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
    strongest = values.max(0)[..., None]
    below = 0.6 * (1 - strongest) * (image @ GREY)[..., None]
    colours: np.ndarray = below + strongest * head_colours(len(values))[values.argmax(0)]
    return colours


def head_colours(heads: int) -> np.ndarray:
    """Colours of the heads, (heads, 3) in [0, 1]; they repeat after sixteen heads."""
    names = [HEAD_COLOURS[head % len(HEAD_COLOURS)] for head in range(heads)]
    return np.array([matplotlib.colors.to_rgb(name) for name in names])
