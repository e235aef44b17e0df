"""uint8 views and the numbers drawn for them -> normalised float views: a batch at a time, on whichever device.

The same function as official DINO's per-image augmentation (torchvision's operations on PIL images): flip, colour jitter in
random order, grayscale, Gaussian blur, solarize, normalise. It differs in that values stay float32 between operations
instead of being rounded to 8 bits, and that the blur is the Gaussian itself, which PIL approximates by three boxes.

Nothing here is random: every view has its own row of drawn numbers (columns: `Draw`). On a GPU every operation runs on the
whole batch and does nothing to the views that were not drawn for it, so nothing waits for the device; on CPU only the drawn
views are touched. Axes: N views, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in PIL and torchvision
BLUR_REACH = 3.0  # standard deviations after which the Gaussian is cut off


FLOATS_IN_CACHE = 2**20  # 4 MiB: on a CPU so many are taken through all operations before the next


class PhotometricParam(IntEnum):
    """Columns of the drawn numbers, float32."""

    FLIP = 0  # 1: mirror left and right
    BRIGHTNESS = 1  # factor; 1 leaves the view alone
    CONTRAST = 2  # factor
    SATURATION = 3  # factor
    HUE = 4  # shift in turns of the colour circle, -0.5 to 0.5; 0 leaves the view alone
    BRIGHTNESS_RANK = 5  # which of the four jitter operations this is: 0 first, 3 last
    CONTRAST_RANK = 6
    SATURATION_RANK = 7
    HUE_RANK = 8
    GRAYSCALE = 9  # 1: drop colour
    SIGMA = 10  # standard deviation of the blur in pixels; 0: none
    SOLARIZE = 11  # 1: invert what is at least as bright as half


def photometric(
    views: Tensor, draws: Tensor, mean: tuple[float, ...], std: tuple[float, ...], max_sigma: float
) -> Tensor:
    """uint8 (N, C, H, W), draws (N, len(Draw)) -> float32 (N, C, H, W).

    max_sigma: largest blur that can be drawn; sets the size of the kernel. Hue, saturation and grayscale need colour, so
    they are skipped unless C is 3.
    """
    if views.device.type != "cpu":
        return _photometric(views, draws, mean, std, max_sigma)
    x = torch.empty(views.shape)
    # By the rank of their hue, those without last: so the views that a step of `color_jitter` touches lie side by side.
    order = (
        draws[:, PhotometricParam.HUE_RANK] + 4 * (draws[:, PhotometricParam.HUE] == 0)
    ).argsort()
    for rows in order.split(max(1, FLOATS_IN_CACHE // views[0].numel())):
        _put(x, rows, _photometric(views.index_select(0, rows), draws[rows], mean, std, max_sigma))
    return x


def _photometric(
    views: Tensor, draws: Tensor, mean: tuple[float, ...], std: tuple[float, ...], max_sigma: float
) -> Tensor:
    views = _on_rows(views, draws[:, PhotometricParam.FLIP] > 0, lambda x, rows: x.flip(-1))
    x = color_jitter(views.float().div_(255), draws)
    if x.shape[1] == 3:
        x = _on_rows(
            x, draws[:, PhotometricParam.GRAYSCALE] > 0, lambda x, rows: gray(x).repeat(1, 3, 1, 1)
        )
    x = _on_rows(
        x,
        draws[:, PhotometricParam.SIGMA] > 0,
        lambda x, rows: gaussian_blur(x, draws[rows, PhotometricParam.SIGMA], max_sigma),
    )
    x = _on_rows(x, draws[:, PhotometricParam.SOLARIZE] > 0, lambda x, rows: solarize(x))
    return x.sub_(_constant(mean, x.device)).div_(_constant(std, x.device))


def color_jitter(x: Tensor, draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in each view's own order. Float (N, C, H, W) in [0, 1], overwritten.

    Brightness, contrast and saturation are one operation with three sets of coefficients (`_blend`). So the batch takes
    three blends, hue, three blends; each view takes part in those that its order puts before or after its hue.
    """
    hue_rank = draws[:, PhotometricParam.HUE_RANK]
    ranks = draws[
        :, PhotometricParam.BRIGHTNESS_RANK : PhotometricParam.SATURATION_RANK + 1
    ]  # (N, 3)
    factors = draws[:, PhotometricParam.BRIGHTNESS : PhotometricParam.SATURATION + 1]  # (N, 3)
    for rank in (0, 1, 2):
        _blend_at(x, rank, ranks, factors, rank < hue_rank)
    if x.shape[1] == 3:
        x = _on_rows(
            x,
            draws[:, PhotometricParam.HUE] != 0,
            lambda x, rows: shift_hue(x, draws[rows, PhotometricParam.HUE]),
        )
    for rank in (1, 2, 3):
        _blend_at(x, rank, ranks, factors, rank > hue_rank)
    return x


def _blend_at(x: Tensor, rank: int, ranks: Tensor, factors: Tensor, on_this_side: Tensor) -> None:
    """Apply to each view the operation (of brightness, contrast, saturation) that has this rank, if it has one. In place."""
    chosen = (ranks == rank) & on_this_side[:, None]  # (N, 3), at most one True per row
    factor = torch.where(chosen, factors, 1.0)  # which leaves a view as it is
    if x.shape[1] != 3:
        factor[:, 2] = 1.0  # no saturation without colour
    if x.device.type == "cpu":
        rows = (factor != 1).any(1).nonzero()[:, 0].tolist() or [0]
        x, factor = (tensor[rows[0] : rows[-1] + 1] for tensor in (x, factor))
    _blend(x, factor)


def _blend(x: Tensor, factor: Tensor) -> Tensor:
    """x * f + (1 - f) * other, in [0, 1], in place: other is black, the view's mean gray, or each pixel's gray.

    factor: (N, 3), of brightness, contrast and saturation.
    """
    brightness, contrast, saturation = factor[:, :, None, None, None].unbind(1)  # (N, 1, 1, 1) each
    if x.device.type == "cpu" and bool((factor[:, 1:] == 1).all()):
        return x.mul_(brightness).clamp_(0, 1)
    g = gray(x)  # (N, 1, H, W)
    offset = g.mean((-2, -1), keepdim=True) * (1 - contrast) + g.mul_(1 - saturation)
    return x.mul_(brightness * contrast * saturation).add_(offset).clamp_(0, 1)


def gray(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H, W): luma of RGB, the mean of any other channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.unbind(1)
    return (
        (red * GRAY_WEIGHTS[0])
        .add_(green, alpha=GRAY_WEIGHTS[1])
        .add_(blue, alpha=GRAY_WEIGHTS[2])[:, None]
    )


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB views (N, 3, H, W) by `turns` (N,), keeping value and chroma (the HSV model)."""
    red, green, blue = x.unbind(1)
    top, low = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = top - low
    # Hue in sixths of the circle, from red (0) over green (2) and blue (-2) to cyan (3 or -3). Its size is a sum that has no
    # cases; a comparison with `where` costs a CPU as much as twenty sums.
    hue = (
        (green - red).add_(blue - low).div_(chroma.clamp_min(1e-12)).add_(1).copysign_(green - blue)
    )
    hue.add_(6 * turns[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # 0 to 6
    # How far below the top, in units of the chroma: red 2 - |hue - 3|, green |hue - 2| - 1, blue |hue - 4| - 1.
    centre, sign, start = (
        _constant(values, x.device)
        for values in ((3.0, 2.0, 4.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0))
    )
    below = (hue[:, None] - centre).abs_().mul_(sign).add_(start).clamp_(0, 1)
    return below.mul_(-chroma[:, None]).add_(top[:, None])


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least as bright as half."""
    return torch.lerp(x, 1 - x, (x >= 128 / 255).float())


def gaussian_blur(x: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur each view (N, C, H, W) with its own standard deviation (N,), mirrored at the borders, cut off at 3 deviations
    of the largest."""
    N, C, H, W = x.shape
    reach = min(math.ceil(BLUR_REACH * max_sigma), H - 1, W - 1)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)  # (N, taps)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (N * C, taps)
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect").reshape(
        1, N * C, H + 2 * reach, W + 2 * reach
    )
    x = F.conv2d(x, kernel[:, None, :, None], groups=N * C)
    return F.conv2d(x, kernel[:, None, None, :], groups=N * C).reshape(N, C, H, W)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel (C, 1, 1); made once, since copying it to a device waits for the device."""
    return torch.tensor(values, device=device)[:, None, None]


def _on_rows(
    x: Tensor, active: Tensor, operation: Callable[[Tensor, Tensor | slice], Tensor]
) -> Tensor:
    """Apply the operation to the active views, on CPU in place. It gets them and their rows."""
    if x.device.type != "cpu":  # choosing rows would wait for the device
        return torch.where(active[:, None, None, None], operation(x, slice(None)), x)
    rows = active.nonzero()[:, 0]
    if len(rows) == len(x):
        return operation(x, slice(None))
    if len(rows):
        first, beyond = rows[0].item(), rows[-1].item() + 1
        if beyond - first == len(rows):
            x[first:beyond] = operation(x[first:beyond], slice(first, beyond))
        else:
            _put(x, rows, operation(x.index_select(0, rows), rows))
    return x


def _put(x: Tensor, rows: Tensor, changed: Tensor) -> None:
    """x[rows] = changed, in a quarter of the time that this takes."""
    for row, view in zip(rows.tolist(), changed, strict=True):
        x[row] = view
