"""The kinds of figures: one function each, and the table of them.

A new kind is one function that lays out a sheet, one row of `FIGURES`, and its name in
`FigureKind` (`dino_xcit/config/attention.py`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dino_xcit.figures.canvas import (
    Canvas,
    colour_bar,
    map_title,
    mask_title,
    selected_heads,
    selected_map,
    shared_limits,
)
from dino_xcit.figures.drawing import Cell, ColourBar, Sheet, as_cell, pack, wrap, wrap_beside
from dino_xcit.figures.head_files import PictureFolder, head_files
from dino_xcit.figures.maps import entropy, pca_colours, similarity
from dino_xcit.figures.pictures import heat, overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dino_xcit.config.attention import AttentionConfig, FigureKind
    from dino_xcit.figures.model import AttentionResult

SIGNED_COLORMAP = "RdBu_r"  # white at 0


# -- figures of one image --------------------------------------------------------------------------


def heads_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: every head, their mean, its mask and all heads in their colours."""
    (result,) = results
    canvas, mean = Canvas(result, config), result.attention.mean(0)
    *limits, mean_limits = shared_limits([[*result.attention, mean]], config)[0]
    nats = entropy(torch.from_numpy(result.attention)).tolist()
    cells = [
        as_cell(canvas.image, title="image"),
        *(
            as_cell(
                canvas.heat(one_map, limit), title=f"head {head}", note=f"{nats[head]:.2f} nats"
            )
            for head, (one_map, limit) in enumerate(zip(result.attention, limits, strict=True))
        ),
        as_cell(canvas.heat(mean, mean_limits), title="mean"),
        as_cell(canvas.cut_out(mean), title=mask_title(config)),
        as_cell(canvas.heads(result.attention), title="all heads"),
    ]
    return Sheet(
        name=f"heads_{result.name}",
        rows=wrap(cells),
        bar=colour_bar(config, limits[0]),
        data=sheet_data(results, config),
    )


def magnitude_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: length of each patch's query (above) and key (below), head by head."""
    (result,) = results
    assert result.queries is not None
    assert result.keys is not None
    canvas = Canvas(result, config)
    heads = selected_heads(result.queries, config)
    maps = {
        "queries": [result.queries[head] for head in heads],
        "keys": [result.keys[head] for head in heads],
    }
    limits = shared_limits([[*maps["queries"], *maps["keys"]]], config)[0]
    rows: list[list[Cell]] = []
    for start, (kind, of_kind) in zip((0, len(heads)), maps.items(), strict=True):
        scales = limits[start : start + len(heads)]
        cells = [
            as_cell(canvas.heat(one_map, limit), f"head {head}", kind)
            for head, one_map, limit in zip(heads, of_kind, scales, strict=True)
        ]
        rows += wrap_beside(as_cell(canvas.image, "image"), cells)
    return Sheet(
        name=f"magnitude_{result.name}",
        rows=rows,
        bar=colour_bar(config, limits[0], "magnitude"),
        data=sheet_data(results, config, "queries", "keys"),
    )


def covariance_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: the d x d cross-covariance of queries (rows) and keys (columns) of each head."""
    (result,) = results
    assert result.covariance is not None
    heads = selected_heads(result.covariance, config)
    cells = [
        as_cell(heat(result.covariance[head], -1, 1, SIGNED_COLORMAP), title=f"head {head}")
        for head in heads
    ]
    return Sheet(
        name=f"covariance_{result.name}",
        rows=wrap(cells),
        bar=ColourBar(colormap=SIGNED_COLORMAP, low=-1, high=1, label="cosine of query and key"),
        data=sheet_data(results, config, "covariance"),
    )


# -- figures of several images ---------------------------------------------------------------------


def grid_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: each head of `--head`, else every head."""
    rows: list[list[Cell]] = []
    heads = selected_heads(results[0].attention, config)
    maps = [[result.attention[head] for head in heads] for result in results]
    limits = shared_limits(maps, config)
    for result, maps_of_image, limits_of_image in zip(results, maps, limits, strict=True):
        canvas = Canvas(result, config)
        cells = [
            as_cell(canvas.heat(one_map, limit), f"head {head}")
            for head, one_map, limit in zip(heads, maps_of_image, limits_of_image, strict=True)
        ]
        rows += wrap_beside(as_cell(canvas.image, "image"), cells)
    return Sheet(
        name="grid",
        rows=pack(rows),
        bar=colour_bar(config, limits[0][0]),
        data=sheet_data(results, config),
    )


def overlay_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: the image, the map over it, its mask, all heads in their colours."""
    rows = []
    limits = shared_limits([[selected_map(result.attention, config)] for result in results], config)
    for result, (limit,) in zip(results, limits, strict=True):
        canvas, one_map = Canvas(result, config), selected_map(result.attention, config)
        over = overlay(canvas.image, canvas.heat(one_map, limit))
        rows.append(
            [
                as_cell(canvas.image, "image"),
                as_cell(over, map_title(config)),
                as_cell(canvas.cut_out(one_map), mask_title(config)),
                as_cell(canvas.heads(result.attention), "all heads"),
            ]
        )
    return Sheet(
        name="overlay",
        rows=pack(rows),
        bar=colour_bar(config, limits[0][0]),
        data=sheet_data(results, config),
    )


def similarity_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: the image with one patch marked, and the cosine of every patch with it."""
    maps: list[np.ndarray] = []
    patches: list[tuple[int, int]] = []
    for result in results:
        assert result.features is not None
        patches.append(_reference_patch(result, config))
        maps.append(similarity(torch.from_numpy(result.features), *patches[-1]).numpy())
    low = min(0.0, *(float(one_map.min()) for one_map in maps))
    rows: list[list[Cell]] = []
    data = sheet_data(results, config)
    for number, (result, patch, one_map) in enumerate(zip(results, patches, maps, strict=True)):
        canvas = Canvas(result, config)
        picture = canvas.heat(one_map, (low, 1))
        rows.append([as_cell(canvas.marked(*patch), "image"), as_cell(picture, "similarity")])
        data |= {f"similarity_{number}": one_map, f"patch_{number}": np.array(patch)}
    bar = ColourBar(colormap=config.colormap, low=low, high=1, label="cosine")
    return Sheet(name="similarity", rows=pack(rows), bar=bar, data=data)


def pca_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: the image, and three principal components of its patch features as RGB.

    All images of the sheet share one basis.
    """
    features = [torch.from_numpy(r.features) for r in results if r.features is not None]
    colours = [colour.numpy() for colour in pca_colours(features)]
    rows: list[list[Cell]] = []
    data = sheet_data(results, config)
    for number, (result, colour) in enumerate(zip(results, colours, strict=True)):
        canvas = Canvas(result, config)
        picture = np.moveaxis(canvas.values(np.moveaxis(colour, -1, 0)), 0, -1)
        rows.append([as_cell(canvas.image, "image"), as_cell(picture, "patch features, PCA")])
        data[f"pca_{number}"] = colour
    return Sheet(name="pca", rows=pack(rows), data=data)


# -- figures of several models ---------------------------------------------------------------------


def models_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image, a column for each of `--weights`."""
    return columns_sheet("models", *_columns(results), config)


def training_sheet(results: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image, a column for each kept checkpoint of the run."""
    return columns_sheet("training", *_columns(results), config)


def columns_sheet(
    name: str,
    titles: Sequence[str],
    results: Sequence[Sequence[AttentionResult]],
    config: AttentionConfig,
) -> Sheet:
    """A row per image, a column for each of several backbones.

    Args:
        name: of the sheet.
        titles: of the backbones.
        results: of each image, by each backbone.
        config: options of the figures.
    """
    rows: list[list[Cell]] = []
    maps = [[selected_map(result.attention, config) for result in of_image] for of_image in results]
    limits = shared_limits(maps, config)
    for number, of_image in enumerate(results):
        cells = [as_cell(Canvas(of_image[0], config).image, "image")]
        columns = zip(titles, of_image, maps[number], limits[number], strict=True)
        for title, result, one_map, limit in columns:
            cells.append(as_cell(Canvas(result, config).heat(one_map, limit), title))
        rows.append(cells)
    data: dict[str, np.ndarray] = {}
    for number, title in enumerate(titles):
        of_backbone = sheet_data([of_image[number] for of_image in results], config)
        data |= {f"{key}_of_{title}": array for key, array in of_backbone.items()}
    return Sheet(name=name, rows=pack(rows), bar=colour_bar(config, limits[0][0]), data=data)


def _columns(
    results: Sequence[AttentionResult],
) -> tuple[list[str], list[Sequence[AttentionResult]]]:
    """Titles of the models, and the results of each image, by each model."""
    titles = list(dict.fromkeys(result.model for result in results))
    starts = range(0, len(results), len(titles))
    return titles, [results[start : start + len(titles)] for start in starts]


# -- arrays beside a sheet -------------------------------------------------------------------------


def sheet_data(
    results: Sequence[AttentionResult], config: AttentionConfig, *maps: str
) -> dict[str, np.ndarray]:
    """The arrays that a sheet is drawn from: images, maps, patch sizes, names, options as JSON."""
    data: dict[str, np.ndarray] = {}
    for number, result in enumerate(results):
        data |= {f"image_{number}": result.image, f"attention_{number}": result.attention}
        data |= {f"{name}_{number}": getattr(result, name) for name in maps}
    data["names"] = np.array([result.name for result in results])
    data["patch"] = np.array([result.patch for result in results])
    data["options"] = np.array(options_json(config))
    return data


def options_json(config: AttentionConfig) -> str:
    """The options of the command as JSON."""
    return json.dumps(dataclasses.asdict(config))


def _reference_patch(result: AttentionResult, config: AttentionConfig) -> tuple[int, int]:
    """Row and column of the patch at `--point`, else of the one with the most attention."""
    rows, columns = result.attention.shape[1:]
    if not config.point:
        row, column = divmod(int(selected_map(result.attention, config).argmax()), columns)
        return row, column
    x, y = config.point
    H, W = result.image.shape[:2]
    return min(rows - 1, int(y * H) // result.patch), min(columns - 1, int(x * W) // result.patch)


# -- table -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FigureRow:
    """A kind of figure: its function and the results that the function takes."""

    draw: Callable[[Sequence[AttentionResult], AttentionConfig], Sheet | PictureFolder]
    """draws results, which are in the order of the images, then of the models"""
    per_image: bool = False
    """one sheet for each image, named after it; else one for up to `--images_per_figure` images"""
    models: Literal["first", "all", "checkpoints"] = "first"
    """results of the first of `--weights`, of each, or of each checkpoint that the run kept"""
    features: bool = False
    """needs `AttentionResult.features`"""
    xca: bool = False
    """needs `AttentionResult.queries`, `keys` and `covariance`"""


FIGURES: dict[FigureKind, FigureRow] = {
    "heads": FigureRow(draw=heads_sheet, per_image=True),
    "files": FigureRow(draw=head_files, per_image=True),
    "grid": FigureRow(draw=grid_sheet),
    "overlay": FigureRow(draw=overlay_sheet),
    "training": FigureRow(draw=training_sheet, models="checkpoints"),
    "models": FigureRow(draw=models_sheet, models="all"),
    "magnitude": FigureRow(draw=magnitude_sheet, per_image=True, xca=True),
    "covariance": FigureRow(draw=covariance_sheet, per_image=True, xca=True),
    "similarity": FigureRow(draw=similarity_sheet, features=True),
    "pca": FigureRow(draw=pca_sheet, features=True),
}
DEFAULT_FIGURES: tuple[FigureKind, ...] = ("heads", "overlay")
DEFAULT_FIGURES_OF_SEVERAL_WEIGHTS: tuple[FigureKind, ...] = ("models",)
