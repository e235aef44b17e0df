"""Image -> views: samples every random number of a sample, crops and resizes (DINO, section 3.1).

The random numbers are a function of (seed, epoch, index of the image) alone. So workers, processes,
order and interruptions change nothing, and the crops in `crops.png` are those of the training.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dino_xcit.data.framing import resize
from dino_xcit.data.photometric import PhotometricParam as Param

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig

GLOBAL_CROPS = 2
ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10  # at a box that fits, before the centre is taken; as torchvision's RandomResizedCrop

Key: TypeAlias = tuple[int, ...]
"""(seed, epoch, index of the image)"""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of one image: G = 2 global and L local crops, of C channels and sides S and s."""

    global_crops: Tensor
    """uint8 (G, C, S, S)"""
    global_params: Tensor
    """float32 (G, len(PhotometricParam))"""
    global_paths: Tensor
    """float32 (G, layers, branches): stochastic depth, the factor of each residual branch, 0 or
    1 / (1 - rate)"""
    local_crops: Tensor
    """uint8 (L, C, s, s)"""
    local_params: Tensor
    """float32 (L, len(PhotometricParam))"""
    local_paths: Tensor
    """float32 (L, layers, branches)"""


def own_generator(key: Key, name: str) -> np.random.Generator:
    """Return the generator of one augmentation of one sample.

    It is independent of the generator that the published augmentations share and of those of other
    names, so an augmentation that samples from it changes no other one.
    """
    return np.random.default_rng((*key, zlib.crc32(name.encode())))


class MultiCrop:
    """Samples and crops the views of an image. Picklable and without state, for workers.

    The published augmentations sample from one shared generator, in an order that must not change:
    it decides the views of every run so far. A new augmentation appends a column to
    `PhotometricParam`, applies it in `photometric` and samples it in `__call__` from its own
    generator, for example

        params[:, Param.POSTERIZE] = own_generator(key, "posterize").random(V) < c.posterize_prob
    """

    def __init__(self, config: RunConfig, path_shape: tuple[int, int]) -> None:
        """Prepare the ranges of each view.

        Args:
            config: The options of the augmentation.
            path_shape: Layers and residual branches of the backbone's stochastic depth.
        """
        self.config, self.path_shape = config, path_shape
        local = config.local_crops_number
        self.views = GLOBAL_CROPS + local
        scales = [config.global_crops_scale] * GLOBAL_CROPS + [config.local_crops_scale] * local
        self.scale_low, self.scale_high = np.array(scales).T
        self.blur_prob = self._per_view(config.blur_prob)
        self.solarize_prob = self._per_view(config.solarize_prob)

    def _per_view(self, values: tuple[float, float, float]) -> np.ndarray:
        """Values of the first and the second global crop and of local crops -> (V,)."""
        return np.array([values[0], values[1], *[values[2]] * self.config.local_crops_number])

    def __call__(self, image: Tensor, key: Key) -> Views:
        """Return the views of the image, uint8 (C, H, W), that the key determines."""
        rng = np.random.default_rng(key)
        boxes = sample_boxes(rng, image.shape[1], image.shape[2], self.scale_low, self.scale_high)
        params, paths = self.sample_photometric(rng), self.sample_paths(rng)
        c, G = self.config, GLOBAL_CROPS
        return Views(
            global_crops=crop_boxes(image, boxes[:G], c.global_crops_size),
            global_params=torch.from_numpy(params[:G]),
            global_paths=torch.from_numpy(paths[:G]),
            local_crops=crop_boxes(image, boxes[G:], c.local_crops_size),
            local_params=torch.from_numpy(params[G:]),
            local_paths=torch.from_numpy(paths[G:]),
        )

    def sample_photometric(self, rng: np.random.Generator) -> np.ndarray:
        """Return the params of each view, float32 (V, len(PhotometricParam))."""
        c, V = self.config, self.views
        params = np.zeros((V, len(Param)))
        params[:, Param.FLIP] = rng.random(V) < c.flip_prob
        strengths = np.array(c.color_jitter)
        jitter = rng.uniform(-strengths, strengths, (V, 4))
        jitter *= (rng.random(V) < c.color_jitter_prob)[:, None]
        params[:, Param.BRIGHTNESS : Param.HUE] = 1 + jitter[:, :3]
        params[:, Param.HUE] = jitter[:, 3]
        ranks = np.tile(np.arange(4), (V, 1))
        params[:, Param.BRIGHTNESS_RANK : Param.HUE_RANK + 1] = rng.permuted(ranks, axis=1)
        params[:, Param.GRAYSCALE] = rng.random(V) < c.grayscale_prob
        sigma = rng.uniform(*c.blur_sigma, V)
        params[:, Param.SIGMA] = sigma * (rng.random(V) < self.blur_prob)
        params[:, Param.SOLARIZE] = rng.random(V) < self.solarize_prob
        return params.astype(np.float32)

    def sample_paths(self, rng: np.random.Generator) -> np.ndarray:
        """Return the stochastic depth of each view, float32 (V, layers, branches).

        The rate is the same in every layer, as published.
        """
        rate = self.config.drop_path_rate
        kept = rng.random((self.views, *self.path_shape)) >= rate
        return kept.astype(np.float32) / max(1 - rate, 1e-9)


def sample_boxes(
    rng: np.random.Generator, height: int, width: int, scale_low: np.ndarray, scale_high: np.ndarray
) -> np.ndarray:
    """Sample a box per view with the distribution of torchvision's RandomResizedCrop.

    Args:
        rng: Generator to sample from.
        height: Pixels of the image.
        width: Pixels of the image.
        scale_low: Smallest share of the image's area (V,).
        scale_high: Largest share of the image's area (V,).

    Returns:
        int (V, 4): top, left, height, width.
    """
    V = len(scale_low)
    share = scale_low[:, None] + rng.random((V, ATTEMPTS)) * (scale_high - scale_low)[:, None]
    area = height * width * share
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    aspect = np.exp(rng.uniform(low, high, (V, ATTEMPTS)))
    w = np.rint(np.sqrt(area * aspect)).astype(int)
    h = np.rint(np.sqrt(area / aspect)).astype(int)
    place = rng.random((V, 2))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first, view = fits.argmax(1), np.arange(V)  # the first attempt that fits
    w, h = w[view, first], h[view, first]
    top = np.floor(place[:, 0] * (height - h + 1)).astype(int)
    left = np.floor(place[:, 1] * (width - w + 1)).astype(int)
    boxes = np.stack([top, left, h, w], axis=1)
    boxes[~fits.any(1)] = _centre_box(height, width)
    return boxes


def _centre_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest centred box of an allowed aspect ratio."""
    low, high = ASPECT_RATIOS
    w = min(width, math.floor(height * high + 0.5))
    h = min(height, math.floor(width / low + 0.5))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_boxes(image: Tensor, boxes: np.ndarray, size: int, mode: str = "bicubic") -> Tensor:
    """Crop boxes (V, 4) of an image, uint8 (C, H, W), and resize to uint8 (V, C, size, size)."""
    views = torch.empty(len(boxes), image.shape[0], size, size, dtype=torch.uint8)
    for view, (top, left, height, width) in zip(views, boxes, strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        view.copy_(resize(crop, size, size, mode)[0])
    return views
