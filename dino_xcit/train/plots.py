"""Draws curves.png and crops.png of a run folder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dino_xcit.files import printable, replacing
from dino_xcit.run_folder import CROPS, CURVES, read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from matplotlib.axes import Axes

NOT_A_CURVE = ("step", "epoch")
PANELS_PER_ROW = 4
FEW_POINTS = 30  # below this each point gets a marker
NAME_LENGTH = 22  # characters of an image's name beside its crops
TITLES = {
    "loss": "loss, nats",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "momentum of the teacher",
    "teacher_temp": "teacher temperature",
    "teacher_entropy": "teacher entropy, nats",
    "kl": "KL teacher to student, nats",
    "center_norm": "norm of the center",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
    "knn_top1": "k-NN top-1, %",
    "nearest_distance": "distance to the nearest feature",
    "rankme": "RankMe of teacher features",
}
"""Titles of known columns of metrics.csv, with their units."""


def draw_curves(folder: Path) -> None:
    """Draw curves.png: one panel over the steps for each numeric column of metrics.csv."""
    from matplotlib.figure import Figure

    curves = _curves(read_metrics(folder))
    if not curves:
        return
    columns = min(len(curves), PANELS_PER_ROW)
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (column, points) in zip(panels, curves.items(), strict=False):
        marker = "." if len(points) < FEW_POINTS else ""
        axes.plot(*zip(*points, strict=True), marker=marker, color="#0072B2")
        axes.set_title(TITLES.get(column, column), parse_math=False)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.remove()
    with replacing(folder / CURVES) as path:
        figure.savefig(path, dpi=100)


def _curves(rows: Iterable[Mapping[str, str]]) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each numeric column that has a value."""
    curves: dict[str, list[tuple[int, float]]] = {}
    texts: set[str] = set()
    for row in rows:
        for column, value in row.items():
            if not value or column in NOT_A_CURVE:
                continue
            try:
                point = (int(row["step"]), float(value))
            except ValueError:
                texts.add(column)
                continue
            curves.setdefault(column, []).append(point)
    return {column: points for column, points in curves.items() if column not in texts}


def draw_crops(
    folder: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]
) -> None:
    """Draw crops.png: one image with its crops per row.

    Args:
        folder: the run folder.
        rows: the name of each image and its pictures, float (H, W, C) in [0, 1], one per column.
        columns: titles of the columns.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(columns), 1.4 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=8)
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            _show(axes, picture)
        label = printable(name)[-NAME_LENGTH:]
        axes_row[0].set_ylabel(label, fontsize=6, parse_math=False)
    with replacing(folder / CROPS) as path:
        figure.savefig(path, dpi=130)


def _show(axes: Axes, picture: np.ndarray) -> None:
    """Show RGB in colour; of any other number of channels the first, in grey."""
    if picture.shape[-1] == 3:
        axes.imshow(picture, vmin=0, vmax=1)
    else:
        axes.imshow(picture[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
