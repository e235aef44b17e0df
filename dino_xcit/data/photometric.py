"""uint8 views and the params sampled for them -> normalised float views, a batch at a time.

It computes the same function as official DINO's per-image augmentation (torchvision's operations on
PIL images): flip, colour jitter in random order, grayscale, Gaussian blur, solarize, normalise. It
differs in that values stay float32 between operations instead of being rounded to 8 bits, and that
the blur is the Gaussian itself, which PIL approximates by three box filters.

Nothing here is random: every view has a row of sampled params (columns: `PhotometricParam`), which
`MultiCrop` samples. On a GPU every operation runs on the whole batch and leaves a view unchanged
where its param says so, because choosing views would wait for the device. On CPU an operation runs
on the views that it changes.

To add an augmentation, append its column to `PhotometricParam`, sample it in `MultiCrop` from
`crops.own_generator`, and apply it in `_augment` with `_on_rows`. Runs without it do not change.

Axes: N views, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in PIL and torchvision
BLUR_REACH = 3.0  # standard deviations after which the Gaussian is cut off
FLOATS_IN_CACHE = 2**20  # 4 MiB: on a CPU all operations run on so many before the next ones


class PhotometricParam(IntEnum):
    """Columns of the sampled params, float32."""

    FLIP = 0  # 1: mirror left and right
    BRIGHTNESS = 1  # factor; 1 leaves the view unchanged
    CONTRAST = 2  # factor
    SATURATION = 3  # factor
    HUE = 4  # shift in turns of the colour circle, -0.5 to 0.5; 0 leaves the view unchanged
    BRIGHTNESS_RANK = 5  # position among the four jitter operations: 0 first, 3 last
    CONTRAST_RANK = 6
    SATURATION_RANK = 7
    HUE_RANK = 8
    GRAYSCALE = 9  # 1: remove colour
    SIGMA = 10  # standard deviation of the blur in pixels; 0: none
    SOLARIZE = 11  # 1: invert values of at least 128 of 255


class Constants(NamedTuple):
    """What every batch needs on the device, one value per channel, (C, 1, 1)."""

    mean: Tensor
    std: Tensor
    centre: Tensor
    """of `shift_hue`, as the next two"""
    sign: Tensor
    start: Tensor

    @classmethod
    def on(cls, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> Constants:
        """Constants on a device; copied there once."""
        hue = (3.0, 2.0, 4.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0)
        return cls(*(_constant(values, device) for values in (mean, std, *hue)))


WholeBatch: TypeAlias = "Callable[[Tensor, Tensor, Constants, float], Tensor]"
"""(views, params, constants, max_sigma) -> augmented views, all on one device"""


def compiled_whole_batch() -> WholeBatch:
    """The augmentation of a batch on a GPU as a few kernels instead of hundreds.

    It is compiled once for each size of crops.
    """
    compiled: WholeBatch = torch.compile(_augment, dynamic=False)
    return compiled


def photometric(
    views: Tensor,
    params: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    max_sigma: float,
    whole_batch: WholeBatch | None = None,
) -> Tensor:
    """Augment and normalise views, on their device.

    Hue, saturation and grayscale need colour, so they are skipped unless C is 3.

    Args:
        views: uint8 (N, C, H, W); not written to.
        params: (N, len(PhotometricParam)).
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        max_sigma: Largest sigma that can be sampled, in pixels; sets the size of the kernel.
        whole_batch: What computes it on a GPU; default: not compiled.

    Returns:
        float32 (N, C, H, W).
    """
    constants = Constants.on(views.device, mean, std)
    if not _chooses_rows(views):
        return (whole_batch or _augment)(views, params, constants, max_sigma)
    x = torch.empty(views.shape)
    # Sorted by the rank of their hue, those without hue last: so the views that one step of
    # `color_jitter` changes are adjacent.
    hue_rank, without_hue = (
        params[:, PhotometricParam.HUE_RANK],
        params[:, PhotometricParam.HUE] == 0,
    )
    order = (hue_rank + 4 * without_hue).argsort()
    rows_in_cache = max(1, FLOATS_IN_CACHE // views[0].numel())
    for rows in torch.split(order, rows_in_cache):
        part = _augment(views.index_select(0, rows), params[rows], constants, max_sigma)
        _put(x, rows, part)
    return x


def _augment(views: Tensor, params: Tensor, constants: Constants, max_sigma: float) -> Tensor:
    sigma = params[:, PhotometricParam.SIGMA]
    views = _on_rows(views, params[:, PhotometricParam.FLIP] > 0, lambda x, _: x.flip(-1))
    x = color_jitter(views.float().div_(255), params, constants)
    if x.shape[1] == 3:
        to_gray = params[:, PhotometricParam.GRAYSCALE] > 0
        x = _on_rows(x, to_gray, lambda x, _: gray(x).repeat(1, 3, 1, 1))
    x = _on_rows(x, sigma > 0, lambda x, rows: gaussian_blur(x, sigma[rows], max_sigma))
    x = _on_rows(x, params[:, PhotometricParam.SOLARIZE] > 0, lambda x, _: solarize(x))
    return x.sub_(constants.mean).div_(constants.std)


def color_jitter(x: Tensor, params: Tensor, constants: Constants) -> Tensor:
    """Apply brightness, contrast, saturation and hue to each view, in the view's own order.

    Brightness, contrast and saturation are one operation with three sets of coefficients
    (`_blend`). So the batch takes three blends, hue, and three blends; each view takes part in
    those that its order puts before or after its hue.

    Args:
        x: float (N, C, H, W) in [0, 1]; overwritten.
        params: (N, len(PhotometricParam)).
        constants: Of the device.
    """
    hue, hue_rank = params[:, PhotometricParam.HUE], params[:, PhotometricParam.HUE_RANK]
    first, last = PhotometricParam.BRIGHTNESS_RANK, PhotometricParam.SATURATION_RANK
    ranks = params[:, first : last + 1]  # (N, 3)
    factors = params[:, PhotometricParam.BRIGHTNESS : PhotometricParam.SATURATION + 1]  # (N, 3)
    for rank in (0, 1, 2):
        _blend_at(x, rank, ranks, factors, rank < hue_rank)
    if x.shape[1] == 3:
        x = _on_rows(x, hue != 0, lambda x, rows: shift_hue(x, hue[rows], constants))
    for rank in (1, 2, 3):
        _blend_at(x, rank, ranks, factors, rank > hue_rank)
    return x


def _blend_at(x: Tensor, rank: int, ranks: Tensor, factors: Tensor, active: Tensor) -> None:
    """Apply to each active view the blend that has this rank in its order, if one has. In place."""
    chosen = (ranks == rank) & active[:, None]  # (N, 3), at most one True per row
    factor = torch.where(chosen, factors, 1.0)  # 1 leaves a view unchanged
    if x.shape[1] != 3:
        factor[:, 2] = 1.0  # no saturation without colour
    if _chooses_rows(x):
        rows = (factor != 1).any(1).nonzero()[:, 0].tolist() or [0]
        x, factor = (tensor[rows[0] : rows[-1] + 1] for tensor in (x, factor))
    _blend(x, factor)


def _blend(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * f + (1 - f) * other, clamped to [0, 1], in place.

    `other` is black for brightness, the view's mean gray for contrast and each pixel's gray for
    saturation.

    Args:
        x: (N, C, H, W).
        factor: (N, 3), of brightness, contrast and saturation.
    """
    brightness, contrast, saturation = factor[:, :, None, None, None].unbind(1)  # (N, 1, 1, 1) each
    if _chooses_rows(x) and bool((factor[:, 1:] == 1).all()):
        return x.mul_(brightness).clamp_(0, 1)
    g = gray(x)  # (N, 1, H, W)
    offset = g.mean((-2, -1), keepdim=True) * (1 - contrast) + g.mul_(1 - saturation)
    return x.mul_(brightness * contrast * saturation).add_(offset).clamp_(0, 1)


def gray(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H, W): luma of RGB, the mean of any other channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.unbind(1)
    luma = red * GRAY_WEIGHTS[0]
    return luma.add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])[:, None]


def shift_hue(x: Tensor, turns: Tensor, constants: Constants) -> Tensor:
    """Shift the hue of RGB views (N, 3, H, W) by `turns` (N,), keeping value and chroma (HSV)."""
    red, green, blue = x.unbind(1)
    top, low = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = top - low
    # Hue in sixths of the circle, from red (0) over green (2) and blue (-2) to cyan (3 or -3). Its
    # absolute value is a sum without cases: on a CPU one `where` costs as much as twenty sums.
    hue = (green - red).add_(blue - low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue.copysign_(green - blue)
    hue.add_(6 * turns[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # 0 to 6
    # Distance below the top in units of the chroma, clamped to [0, 1]:
    # red 2 - |hue - 3|, green |hue - 2| - 1, blue |hue - 4| - 1.
    below = (hue[:, None] - constants.centre).abs_().mul_(constants.sign).add_(constants.start)
    below.clamp_(0, 1)
    return below.mul_(-chroma[:, None]).add_(top[:, None])


def solarize(x: Tensor) -> Tensor:
    """Invert values of at least 128 / 255."""
    return torch.lerp(x, 1 - x, (x >= 128 / 255).float())


def gaussian_blur(x: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur each view with its own standard deviation, reflecting at the borders.

    Args:
        x: (N, C, H, W).
        sigma: (N,), in pixels.
        max_sigma: The kernel of all views is cut off at three times this, or at the view's side.
    """
    N, C, H, W = x.shape
    reach = min(math.ceil(BLUR_REACH * max_sigma), H - 1, W - 1)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)  # (N, taps)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (N * C, taps)
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    x = x.reshape(1, N * C, H + 2 * reach, W + 2 * reach)
    x = F.conv2d(x, kernel[:, None, :, None], groups=N * C)
    return F.conv2d(x, kernel[:, None, None, :], groups=N * C).reshape(N, C, H, W)


def _chooses_rows(x: Tensor) -> bool:
    """Whether operations run on the views that they change; a GPU would wait for the choice."""
    return x.device.type == "cpu"


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel, (C, 1, 1); cached, because copying to a device waits for it."""
    return torch.tensor(values, device=device)[:, None, None]


def _on_rows(
    x: Tensor, active: Tensor, operation: Callable[[Tensor, Tensor | slice], Tensor]
) -> Tensor:
    """Apply `operation(views, their rows)` to the active views; on CPU in place."""
    if not _chooses_rows(x):
        return torch.where(active[:, None, None, None], operation(x, slice(None)), x)
    rows = active.nonzero()[:, 0]
    if len(rows) == len(x):
        return operation(x, slice(None))
    if len(rows):
        first, end = int(rows[0]), int(rows[-1]) + 1
        if end - first == len(rows):
            x[first:end] = operation(x[first:end], slice(first, end))
        else:
            _put(x, rows, operation(x.index_select(0, rows), rows))
    return x


def _put(x: Tensor, rows: Tensor, changed: Tensor) -> None:
    """Assign x[rows] = changed, which written like this takes four times as long."""
    for row, view in zip(rows.tolist(), changed, strict=True):
        x[row] = view
