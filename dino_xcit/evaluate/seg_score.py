"""Scores of a segmentation: pixels of each class are counted per image, then summed and compared.

Axes: n images, B images of a batch, K classes, S side of the framed image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_xcit.data.masked import VOID
from dino_xcit.evaluate.report import RESAMPLES
from dino_xcit.runtime import progress, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.fabric import Fabric

    from dino_xcit.evaluate.report import Result
    from dino_xcit.evaluate.seg_head import LinearSegHead, MaskedFeatures

RESAMPLED_AT_ONCE = 500  # divides RESAMPLES


class PixelCounts(NamedTuple):
    """Pixels of each class in each image, int64 (n, K)."""

    both: Tensor
    """true and predicted"""
    true: Tensor
    predicted: Tensor


def count_pixels(
    head: LinearSegHead,
    masked: MaskedFeatures,
    classes: int,
    fabric: Fabric,
    batch_size: int,
    name: str,
) -> PixelCounts:
    """Compare predictions with masks; each process takes its share of the images.

    Args:
        head: Has at most K classes.
        masked: Images to test on.
        classes: K.
        fabric: The processes.
        batch_size: Images at a time.
        name: Of the network, for the progress bar.
    """
    images = len(masked.indices)
    counts = torch.zeros(3, images, classes, dtype=torch.int64)
    shown = fabric.is_global_zero
    with progress(images, f"{name}: pixels", "images", shown) as bar, torch.no_grad():
        for number, batch in enumerate(torch.split(torch.arange(images), batch_size)):
            if number % fabric.world_size == fabric.global_rank:
                truth = masked.masks_of(batch, fabric.device)
                predicted = predict(head, masked, batch, truth.shape[-1])
                counts[:, batch] = torch.stack(count_batch(predicted, truth, classes)).cpu()
            bar.update(len(batch))
    return PixelCounts(*summed(fabric, counts))  # rows of other processes are 0


def predict(head: LinearSegHead, masked: MaskedFeatures, images: Tensor, side: int) -> Tensor:
    """Class of each pixel, int64 (B, side, side), of images numbered from 0 to n - 1."""
    with torch.no_grad():
        return head(masked.tokens_of(images, head.weight.device), side).argmax(1)


def count_batch(predicted: Tensor, truth: Tensor, classes: int) -> list[Tensor]:
    """Count pixels in the images of a batch; pixels without a class in the mask do not count.

    Args:
        predicted: Class of each pixel (B, S, S).
        truth: The masks (B, S, S).
        classes: K.

    Returns:
        Correct, true and predicted pixels of each class, (B, K) each.
    """
    offset = torch.arange(len(truth), device=truth.device)[:, None, None] * classes
    has_class = truth != VOID
    kinds = (
        (truth, has_class & (predicted == truth)),
        (truth, has_class),
        (predicted, has_class),
    )
    return [
        torch.bincount((offset + label)[where], minlength=len(truth) * classes).view(-1, classes)
        for label, where in kinds
    ]


def measures(both: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Mean IoU over the classes that occur, and share of correct pixels.

    Args:
        both: Correct pixels of each class, summed over images, (..., K).
        true: Pixels of each class in the masks, (..., K).
        predicted: Pixels of each class in the predictions, (..., K).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = both / (true + predicted - both)  # NaN for classes that do not occur
    return {"miou": np.nanmean(iou, axis=-1), "pixel_accuracy": both.sum(-1) / true.sum(-1)}


def result(counts: PixelCounts, names: Sequence[str], seed: int) -> Result:
    """Measures in percent with 95 % intervals over resampled images, and the IoU of each class.

    Args:
        counts: Of all images.
        names: Of the K classes.
        seed: Of the resampling.
    """
    of_images = [part.double().numpy() for part in counts]
    sums = [array.sum(0) for array in of_images]
    intervals = _intervals(of_images, seed)
    row: Result = {}
    for name, value in measures(*sums).items():
        row[name] = round(100 * float(value), 3)
        row[f"{name}_ci95"] = [round(100 * bound, 3) for bound in intervals[name]]
    both, true, predicted = sums
    union = true + predicted - both
    row["iou"] = {
        name: round(100 * b / u, 3) for name, b, u in zip(names, both, union, strict=True) if u
    }
    return row


def _intervals(of_images: list[np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """95 % interval of each measure over resampled images."""
    rng, images = np.random.default_rng(seed), len(of_images[0])
    resampled: dict[str, list[np.ndarray]] = {"miou": [], "pixel_accuracy": []}
    for _ in range(RESAMPLES // RESAMPLED_AT_ONCE):
        # How often each image is sampled, (RESAMPLED_AT_ONCE, n).
        times = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLED_AT_ONCE)
        sums = (times.astype(float) @ array for array in of_images)
        for name, values in measures(*sums).items():
            resampled[name].append(values)
    quantiles = {
        name: np.quantile(np.concatenate(values), [0.025, 0.975])
        for name, values in resampled.items()
    }
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}
