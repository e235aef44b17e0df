"""curves.png and crops.png of a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dino_xcit.files import printable, replacing
from dino_xcit.run_folder import CROPS, CURVES, read_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def draw_curves(folder: Path) -> None:
    """curves.png: each column of metrics.csv over the steps."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    panels = [
        ("loss", "cross-entropy, nats"),
        ("teacher_entropy", "teacher entropy, nats"),
        ("kl", "KL teacher to student, nats"),
        ("knn_top1", "k-NN top-1, %"),
        ("rankme", "RankMe of teacher features"),
        ("lr", "learning rate"),
        ("weight_decay", "weight decay"),
        ("grad_norm", "gradient norm"),
        ("center_norm", "norm of the center"),
        ("images_per_second", "images per second"),
    ]
    figure = Figure(figsize=(17, 6), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(2, 5).flat, panels, strict=True):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="." if len(points) < 30 else "", color="#0072B2"
            )
        else:
            axes.text(
                0.5,
                0.5,
                "not measured",
                ha="center",
                va="center",
                transform=axes.transAxes,
                color="grey",
            )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    with replacing(folder / CURVES) as path:
        figure.savefig(path, dpi=100)


def draw_crops(
    folder: Path, rows: Sequence[tuple[str, Sequence[Any]]], columns: Sequence[str]
) -> None:
    """crops.png: a row per image, (its name, pictures (H, W, C) in [0, 1] under the columns' titles)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(columns), 1.4 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=8)
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            grey = picture.shape[-1] != 3
            axes.imshow(
                picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=1
            )
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(printable(name)[-22:], fontsize=6, parse_math=False)
    with replacing(folder / CROPS) as path:
        figure.savefig(path, dpi=130)
