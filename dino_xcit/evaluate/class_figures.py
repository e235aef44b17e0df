"""Figures of an evaluation: confusion matrix, accuracy of each class, segmented images."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dino_xcit.files import printable, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

UNNAMED = "class {}"
NAMED_CLASSES = 40  # with more, names do not fit beside an axis
NUMBERED_CLASSES = 15  # with more, percentages do not fit into the confusion matrix
ENDS = 5  # worst and best classes named where not all names fit
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's
PALETTE = "tab20"  # of classes in segmentations
DPI = 150


# -- classification ----------------------------------------------------------------------------


def draw_classes(
    path: Path,
    title: str,
    predicted: np.ndarray,
    labels: np.ndarray,
    names: Mapping[int, str],
) -> None:
    """Draw the confusion matrix, and the accuracy of each class from worst to best.

    Args:
        path: Of the PNG file.
        title: Of the figure.
        predicted: Class of each image (m,); -1: none.
        labels: True class of each image (m,).
        names: Of the classes, by label; the others are numbered.
    """
    from matplotlib.figure import Figure

    classes = np.unique(np.concatenate([labels, predicted[predicted >= 0]]))
    confusion = confusion_matrix(predicted, labels, classes)
    shown_names = [printable(names.get(int(c), UNNAMED.format(c))) for c in classes]
    side = max(4.5, 0.28 * len(classes)) if len(classes) <= NAMED_CLASSES else 7.0
    figure = Figure(figsize=(2.1 * side + 1, side), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_confusion(figure, left, confusion, shown_names)
    tested = np.flatnonzero(np.isin(classes, labels))
    accuracy = confusion.diagonal()[tested]
    _draw_bars(right, [shown_names[i] for i in tested], accuracy, float(accuracy.mean()))
    right.set(xlabel="accuracy of the class, %")
    _save(figure, title, path)


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Percentage of each true class (rows) that is predicted as each class (columns).

    A row adds up to less than 100 if images have no predicted class, and to 0 without images.
    """
    confusion = np.zeros((len(classes), len(classes)))
    has_class = predicted >= 0
    rows = np.searchsorted(classes, labels[has_class])
    columns = np.searchsorted(classes, predicted[has_class])
    np.add.at(confusion, (rows, columns), 1)
    images = np.array([(labels == c).sum() for c in classes])
    confusion *= 100 / np.maximum(images, 1)[:, None]
    return confusion


def _draw_confusion(figure: Figure, axes: Axes, confusion: np.ndarray, names: list[str]) -> None:
    count = len(names)
    picture = axes.imshow(confusion, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="% of the class's images", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true class")
    if count <= NAMED_CLASSES:
        axes.set_xticks(range(count), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=7, parse_math=False)
    if count <= NUMBERED_CLASSES:
        for i, j in np.ndindex(count, count):
            percent = confusion[i, j]
            if percent >= 0.5:
                colour = "black" if percent > 60 else "white"
                axes.text(
                    j, i, f"{percent:.0f}", fontsize=6, color=colour, ha="center", va="center"
                )


def _draw_bars(
    axes: Axes,
    names: Sequence[str],
    percent: np.ndarray,
    mean: float,
    colours: Sequence[np.ndarray] | None = None,
) -> None:
    """A bar for each class from the worst, below, to the best; and the mean as a line."""
    order = np.argsort(percent, kind="stable")
    count = len(order)
    axes.barh(
        range(count),
        percent[order],
        height=0.8 if count <= NAMED_CLASSES else 1.0,
        color=BLUE if colours is None else [colours[i] for i in order],
    )
    axes.axvline(mean, color=ORANGE, label=f"mean {mean:.1f} %")
    axes.set(xlim=(0, 100), ylim=(-0.6, count - 0.4))
    named, places = list(range(count)), [float(i) for i in range(count)]
    if count > NAMED_CLASSES:  # the worst and the best, spread so that names do not overlap
        last, step = count - 1, count / 60
        named = [*range(ENDS), *range(count - ENDS, count)]
        places = [i * step if i < ENDS else last - (last - i) * step for i in named]
    axes.set_yticks(places, [names[order[i]] for i in named], fontsize=7, parse_math=False)
    axes.legend(loc="lower right", frameon=False, fontsize=8)


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(printable(title), parse_math=False, fontsize=10)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=DPI)


# -- segmentation ------------------------------------------------------------------------------


class SegmentedImage(NamedTuple):
    """An image of S x S pixels with its mask and the prediction."""

    image: np.ndarray
    """uint8 (S, S, C)"""
    mask: np.ndarray
    """class of each pixel (S, S); other values: none"""
    predicted: np.ndarray
    """class of each pixel (S, S)"""


def draw_segmentation(
    path: Path,
    title: str,
    examples: Sequence[SegmentedImage],
    names: Sequence[str],
    iou: Mapping[str, float],
    miou: float,
) -> None:
    """Draw images with masks and predictions, and the IoU of each class from worst to best.

    Args:
        path: Of the PNG file.
        title: Of the figure.
        examples: Images to show.
        names: Of all classes, in the order of their numbers.
        iou: In percent, by the class's name.
        miou: Mean IoU in percent.
    """
    import matplotlib
    from matplotlib.figure import Figure

    palette = matplotlib.colormaps[PALETTE](range(20))[:, :3]
    white = np.ones((1, 3))
    colours = np.concatenate([palette[np.arange(len(names)) % 20], white])  # (K + 1, 3)
    figure = Figure(figsize=(10, max(3.4, 0.14 * len(iou))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1), squeeze=False)[0]
    _draw_examples(left, examples, colours)
    bars = right.subplots()
    scored = [names.index(name) for name in iou]
    _draw_bars(
        bars,
        [printable(name) for name in iou],
        np.array(list(iou.values())),
        miou,
        [colours[label] for label in scored],
    )
    bars.set(xlabel="intersection over union, %")
    _save(figure, title, path)


def _draw_examples(
    figure: SubFigure, examples: Sequence[SegmentedImage], colours: np.ndarray
) -> None:
    """Rows of images, masks and predictions; colours (K + 1, 3), the last for no class."""
    spacing = {"wspace": 0.04, "hspace": 0.04}
    grid = figure.subplots(3, len(examples), squeeze=False, gridspec_kw=spacing)
    for column, (image, mask, predicted) in enumerate(examples):
        rgb = image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1)
        pictures = (rgb, colours[np.minimum(mask, len(colours) - 1)], colours[predicted])
        for axes, picture in zip(grid[:, column], pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, row in zip(grid[:, 0], ("image", "mask", "predicted"), strict=True):
        axes.set_ylabel(row, fontsize=8)
