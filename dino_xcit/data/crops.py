"""Image -> views: draws every random number of a sample, cuts and resizes uint8 crops (DINO, section 3.1).

The numbers are a function of (seed, epoch, index of the image) alone. So workers, processes, order and interruptions change
nothing, and the crops in `crops.png` are the crops that the network is trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dino_xcit.data.framing import resize
from dino_xcit.data.photometric import PhotometricParam

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import PretrainConfig

GLOBAL_CROPS = 2
ASPECT_RATIOS = (3 / 4, 4 / 3)
ATTEMPTS = 10  # of drawing a box that fits, before the centre is taken, as in torchvision's RandomResizedCrop


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of one image. G = 2 global, L local crops; S, s their sides."""

    global_crops: Tensor
    """uint8 (G, C, S, S)"""
    global_params: Tensor
    """float32 (G, len(Draw))"""
    global_paths: Tensor
    """float32 (G, layers, 3): stochastic depth, the factor of each residual branch, 0 or 1 / (1 - rate)"""
    local_crops: Tensor
    """uint8 (L, C, s, s)"""
    local_params: Tensor
    """float32 (L, len(Draw))"""
    local_paths: Tensor
    """float32 (L, layers, 3)"""


class MultiCrop:
    """Cuts the views of an image. Picklable, without state: a worker may hold one."""

    def __init__(self, config: PretrainConfig, path_shape: tuple[int, int]) -> None:
        """path_shape: layers and residual branches of the backbone's stochastic depth."""
        self.config, self.path_shape = config, path_shape
        local = config.local_crops_number
        self.views = GLOBAL_CROPS + local
        scales = [config.global_crops_scale] * GLOBAL_CROPS + [config.local_crops_scale] * local
        self.scale_low, self.scale_high = np.array(scales).T
        self.blur_prob = self._per_view(config.blur_prob)
        self.solarize_prob = self._per_view(config.solarize_prob)

    def _per_view(self, values: tuple[float, float, float]) -> np.ndarray:
        return np.array([values[0], values[1], *[values[2]] * self.config.local_crops_number])

    def __call__(self, image: Tensor, key: tuple[int, ...]) -> Views:
        """Image uint8 (C, H, W), key (seed, epoch, index) -> its views."""
        rng = np.random.default_rng(key)
        boxes = sample_boxes(rng, image.shape[1], image.shape[2], self.scale_low, self.scale_high)
        draws = torch.from_numpy(self.sample_photometric(rng))
        paths = torch.from_numpy(self.sample_paths(rng))
        c, g = self.config, GLOBAL_CROPS
        return Views(
            global_crops=crop_boxes(image, boxes[:g], c.global_crops_size),
            global_params=draws[:g],
            global_paths=paths[:g],
            local_crops=crop_boxes(image, boxes[g:], c.local_crops_size),
            local_params=draws[g:],
            local_paths=paths[g:],
        )

    def sample_photometric(self, rng: np.random.Generator) -> np.ndarray:
        """float32 (V, len(Draw))."""
        c, V = self.config, self.views
        draws = np.zeros((V, len(PhotometricParam)))
        draws[:, PhotometricParam.FLIP] = rng.random(V) < c.flip_prob
        strengths = np.array(c.color_jitter)
        jitter = (
            rng.uniform(-strengths, strengths, (V, 4))
            * (rng.random(V) < c.color_jitter_prob)[:, None]
        )
        draws[:, PhotometricParam.BRIGHTNESS : PhotometricParam.HUE] = 1 + jitter[:, :3]
        draws[:, PhotometricParam.HUE] = jitter[:, 3]
        draws[:, PhotometricParam.BRIGHTNESS_RANK : PhotometricParam.HUE_RANK + 1] = rng.permuted(
            np.tile(np.arange(4), (V, 1)), axis=1
        )
        draws[:, PhotometricParam.GRAYSCALE] = rng.random(V) < c.grayscale_prob
        draws[:, PhotometricParam.SIGMA] = rng.uniform(*c.blur_sigma, V) * (
            rng.random(V) < self.blur_prob
        )
        draws[:, PhotometricParam.SOLARIZE] = rng.random(V) < self.solarize_prob
        return draws.astype(np.float32)

    def sample_paths(self, rng: np.random.Generator) -> np.ndarray:
        """float32 (V, layers, branches). The rate is the same in every layer, as published."""
        rate = self.config.drop_path_rate
        kept = rng.random((self.views, *self.path_shape)) >= rate
        return kept.astype(np.float32) / max(1 - rate, 1e-9)


def sample_boxes(
    rng: np.random.Generator, height: int, width: int, scale_low: np.ndarray, scale_high: np.ndarray
) -> np.ndarray:
    """Shares of the area from and to (V,) -> a box per view, int (V, 4): top, left, height, width.

    The distribution is that of torchvision's RandomResizedCrop.
    """
    V = len(scale_low)
    share = scale_low[:, None] + rng.random((V, ATTEMPTS)) * (scale_high - scale_low)[:, None]
    area = height * width * share
    aspect = np.exp(
        rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]), (V, ATTEMPTS))
    )
    w = np.rint(np.sqrt(area * aspect)).astype(int)
    h = np.rint(np.sqrt(area / aspect)).astype(int)
    place = rng.random((V, 2))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, view = fits.argmax(1), np.arange(V)
    w, h = w[view, first], h[view, first]
    top = np.floor(place[:, 0] * (height - h + 1)).astype(int)
    left = np.floor(place[:, 1] * (width - w + 1)).astype(int)
    boxes = np.stack([top, left, h, w], axis=1)
    boxes[~fits.any(1)] = _centre_box(height, width)
    return boxes


def crop_boxes(image: Tensor, boxes: np.ndarray, size: int, mode: str = "bicubic") -> Tensor:
    """uint8 (C, H, W), boxes (V, 4) -> uint8 (V, C, size, size)."""
    views = torch.empty(len(boxes), image.shape[0], size, size, dtype=torch.uint8)
    for view, (top, left, height, width) in zip(views, boxes, strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        view.copy_(resize(crop, size, size, mode)[0])
    return views


def _centre_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centred box of an allowed aspect ratio."""
    low, high = ASPECT_RATIOS
    w = min(width, math.floor(height * high + 0.5))
    h = min(height, math.floor(width / low + 0.5))
    return (height - h) // 2, (width - w) // 2, h, w
