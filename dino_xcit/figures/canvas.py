"""Maps over an image: their values on its pixels, and the ends of their colour scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dino_xcit.figures.drawing import ColourBar, inches
from dino_xcit.figures.maps import mass_mask
from dino_xcit.figures.pictures import canvas_image, composite, cut_out, heat, upsample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.model import AttentionResult

MARK = np.array([1.0, 0.2, 0.1])  # colour of the frame around a patch
Limits = tuple[float, float]  # lowest and highest value of a colour scale


class Canvas:
    """The image of a result, large enough to draw maps over.

    All pictures are RGB in [0, 1], (H, W, 3).
    """

    def __init__(self, result: AttentionResult, config: AttentionConfig) -> None:
        self.config = config
        largest = int(config.dpi * inches(config.width))
        self.image, self.patch = canvas_image(result.image, result.patch, largest)

    def values(self, maps: np.ndarray) -> np.ndarray:
        """Maps (..., rows, columns) -> values of the pixels, by `--interpolation`."""
        H, W = self.image.shape[:2]
        return upsample(maps, H, W, self.patch, self.config.interpolation)

    def blocks(self, values: np.ndarray) -> np.ndarray:
        """Values that must not be interpolated, such as masks, for each pixel of the image."""
        H, W = self.image.shape[:2]
        return values.repeat(self.patch, 0).repeat(self.patch, 1)[:H, :W]

    def heat(self, one_map: np.ndarray, limits: Limits) -> np.ndarray:
        """A map in the colours of `--colormap`."""
        return heat(self.values(one_map), *limits, self.config.colormap)

    def heads(self, maps: np.ndarray, limits: Sequence[Limits] = ()) -> np.ndarray:
        """All heads (h, rows, columns) in their colours.

        Args:
            maps: maps of the heads.
            limits: colour scale of each head; default: its own range.
        """
        own = [clipped_range([one_map], self.config.clip) for one_map in maps]
        return composite(self.image, self.values(maps), limits or own)

    def cut_out(self, one_map: np.ndarray) -> np.ndarray:
        """The patches that hold `--threshold` of the map's mass."""
        mask = mass_mask(torch.from_numpy(one_map), self.config.threshold).numpy()
        return cut_out(self.image, self.blocks(mask))

    def marked(self, row: int, column: int) -> np.ndarray:
        """The image with a frame around one patch."""
        p = self.patch
        picture: np.ndarray = self.image.copy()
        thick = max(1, max(picture.shape[:2]) // 100)
        top, left = max(0, row * p - thick), max(0, column * p - thick)
        inside = slice(row * p, (row + 1) * p), slice(column * p, (column + 1) * p)
        picture[top : (row + 1) * p + thick, left : (column + 1) * p + thick] = MARK
        picture[inside] = self.image[inside]
        return picture


def selected_heads(maps: np.ndarray, config: AttentionConfig) -> Sequence[int]:
    """Of maps of all heads (h, ...), the heads of `--head`, else all."""
    return config.head or range(len(maps))


def selected_map(attention: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """Of the maps of all heads (h, rows, columns), the mean of `--head`, else of all."""
    one_map: np.ndarray = attention[list(selected_heads(attention, config))].mean(0)
    return one_map


def map_title(config: AttentionConfig) -> str:
    """Title of `selected_map`."""
    if len(config.head) == 1:
        return f"head {config.head[0]}"
    return f"mean of heads {', '.join(map(str, config.head))}" if config.head else "mean"


def mask_title(config: AttentionConfig) -> str:
    """Title of `Canvas.cut_out`."""
    return f"{100 * config.threshold:g} % mass"


def clipped_range(maps: Sequence[np.ndarray], clip: float) -> Limits:
    """The values that a share `clip` of all patches of these maps lie below and above."""
    values = np.sort(np.concatenate([one_map.ravel() for one_map in maps]))
    beyond = int(clip * (len(values) - 1))
    return float(values[beyond]), float(values[-1 - beyond])


def shared_limits(
    maps: Sequence[Sequence[np.ndarray]], config: AttentionConfig
) -> list[list[Limits]]:
    """Colour scale of each map of each image; `--scale` sets which maps share one."""
    if config.scale == "map":
        return [[clipped_range([one_map], config.clip) for one_map in row] for row in maps]
    if config.scale == "figure":
        whole = clipped_range([one_map for row in maps for one_map in row], config.clip)
        return [[whole] * len(row) for row in maps]
    return [[clipped_range(row, config.clip)] * len(row) for row in maps]


def colour_bar(
    config: AttentionConfig, limits: Limits, label: str = "class attention"
) -> ColourBar | None:
    """The colour bar of a sheet whose maps all share one scale; None if they do not."""
    if config.scale != "figure":
        return None
    return ColourBar(colormap=config.colormap, low=limits[0], high=limits[1], label=label)
