"""The figures that papers show of attention: which pictures stand where.

Each function takes views (what a backbone saw of an image) and the options, and lays out one sheet.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from dino_xcit.figures.drawing import (
    Bar,
    Cell,
    Sheet,
    cell,
    composite,
    cut_out,
    heat,
    inches,
    overlay,
    scaled,
    spread,
)
from dino_xcit.figures.maps import entropy, mass_mask, pca_colours, similarity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.model import AttentionResult

CELLS_IN_A_ROW = 6
HEADS_IN_A_ROW = 8
MARK = np.array([1.0, 0.2, 0.1])  # of the patch that others are compared with
SIGNED = "RdBu_r"
Limits = tuple[float, float]  # of a colour scale


class Canvas:
    """The image of a view, large enough to draw maps over."""

    def __init__(self, view: AttentionResult, config: AttentionConfig) -> None:
        self.config = config
        self.image, self.patch = scaled(
            view.image, view.patch, int(config.dpi * inches(config.width))
        )

    def values(self, maps: np.ndarray) -> np.ndarray:
        """Maps (..., rows, columns) -> a value for each pixel of the image."""
        H, W = self.image.shape[:2]
        return spread(maps, H, W, self.patch, self.config.interpolation)

    def blocks(self, values: np.ndarray) -> np.ndarray:
        """Whatever must not be interpolated, such as masks, for each pixel of the image."""
        H, W = self.image.shape[:2]
        return values.repeat(self.patch, 0).repeat(self.patch, 1)[:H, :W]

    def heat(self, one_map: np.ndarray, limits: Limits) -> np.ndarray:
        return heat(self.values(one_map), *limits, self.config.colormap)

    def heads(self, maps: np.ndarray, limits: Sequence[Limits] = ()) -> np.ndarray:
        """All heads (h, rows, columns) in their colours; limits: the range of each, by default its own."""
        return composite(
            self.image, self.values(maps), limits or [ends([one], self.config.clip) for one in maps]
        )

    def cut_out(self, one_map: np.ndarray) -> np.ndarray:
        """What holds `--threshold` of the map's mass."""
        return cut_out(
            self.image,
            self.blocks(mass_mask(torch.from_numpy(one_map), self.config.threshold).numpy()),
        )


def heads_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: every head, their mean, its mask and all heads in their colours."""
    (view,) = views
    canvas, mean = Canvas(view, config), view.attention.mean(0)
    limits = _limits([[*view.attention, mean]], config)[0]
    nats = entropy(torch.from_numpy(view.attention)).numpy()
    cells = [
        cell(canvas.image, title="image"),
        *(
            cell(canvas.heat(one_map, limit), title=f"head {head}", note=f"{nats[head]:.2f} nats")
            for head, (one_map, limit) in enumerate(zip(view.attention, limits, strict=False))
        ),
        cell(canvas.heat(mean, limits[-1]), title="mean"),
        cell(canvas.cut_out(mean), title=_mask_title(config)),
        cell(canvas.heads(view.attention), title="all heads"),
    ]
    return Sheet(
        name=f"heads_{view.name}",
        rows=_wrapped(cells),
        bar=_bar(config, limits[0]),
        data=_data(views, config),
    )


def grid_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: every head."""
    rows = []
    limits = _limits([list(view.attention) for view in views], config)
    for view, of_row in zip(views, limits, strict=True):
        canvas = Canvas(view, config)
        titles = [f"head {head}" for head in range(len(view.attention))]
        maps = zip(view.attention, of_row, titles, strict=True)
        rows += _under(
            cell(canvas.image, "image"),
            [cell(canvas.heat(one, limit), title) for one, limit, title in maps],
        )
    return Sheet(
        name="grid", rows=_packed(rows), bar=_bar(config, limits[0][0]), data=_data(views, config)
    )


def overlay_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: itself, the map over it, what holds the mass, all heads in their colours."""
    rows = []
    limits = _limits([[chosen(view, config)] for view in views], config)
    for view, of_row in zip(views, limits, strict=True):
        canvas, one_map = Canvas(view, config), chosen(view, config)
        pictures = {
            "image": canvas.image,
            map_title(config): overlay(canvas.image, canvas.heat(one_map, of_row[0])),
            _mask_title(config): canvas.cut_out(one_map),
            "all heads": canvas.heads(view.attention),
        }
        rows.append([cell(picture, title) for title, picture in pictures.items()])
    return Sheet(
        name="overlay",
        rows=_packed(rows),
        bar=_bar(config, limits[0][0]),
        data=_data(views, config),
    )


def columns_sheet(
    name: str,
    titles: Sequence[str],
    views: Sequence[Sequence[AttentionResult]],
    config: AttentionConfig,
) -> Sheet:
    """A row per image, a column for each of several backbones: checkpoints over training, or models."""
    rows: list[list[Cell]] = []
    data: dict[str, np.ndarray] = {}
    limits = _limits([[chosen(view, config) for view in of_image] for of_image in views], config)
    for of_image, of_row in zip(views, limits, strict=True):
        cells = [cell(Canvas(of_image[0], config).image, "image")]
        for title, view, limit in zip(titles, of_image, of_row, strict=True):
            picture = Canvas(view, config).heat(chosen(view, config), limit)
            cells.append(cell(picture, title))
        rows.append(cells)
    for number, title in enumerate(titles):
        data |= {
            f"{key}_of_{title}": array
            for key, array in _data([row[number] for row in views], config).items()
        }
    return Sheet(name=name, rows=_packed(rows), bar=_bar(config, limits[0][0]), data=data)


def magnitude_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: length of each patch's query (above) and key (below), head by head."""
    (view,) = views
    assert view.queries is not None
    assert view.keys is not None
    canvas = Canvas(view, config)
    rows: list[list[Cell]] = []
    heads = range(len(view.queries)) if config.head is None else [config.head]
    kinds = {"queries": view.queries, "keys": view.keys}
    limits = _limits([[maps[head] for maps in kinds.values() for head in heads]], config)[0]
    for (kind, maps), start in zip(kinds.items(), (0, len(heads)), strict=True):
        pictures = [
            canvas.heat(maps[head], limit)
            for head, limit in zip(heads, limits[start:], strict=False)
        ]
        cells = [
            cell(picture, f"head {head}", kind)
            for head, picture in zip(heads, pictures, strict=True)
        ]
        rows += _under(cell(canvas.image, "image"), cells)
    data = _data(views, config, "queries", "keys")
    return Sheet(
        name=f"magnitude_{view.name}",
        rows=rows,
        bar=_bar(config, limits[0], "magnitude"),
        data=data,
    )


def covariance_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """One image: the d x d cross-covariance of queries (rows) and keys (columns) of each head."""
    (view,) = views
    assert view.covariance is not None
    heads = range(len(view.covariance)) if config.head is None else [config.head]
    cells = [
        cell(heat(view.covariance[head], -1, 1, SIGNED), title=f"head {head}") for head in heads
    ]
    bar = Bar(colormap=SIGNED, low=-1, high=1, label="cosine of query and key")
    return Sheet(
        name=f"covariance_{view.name}",
        rows=_wrapped(cells),
        bar=bar,
        data=_data(views, config, "covariance"),
    )


def similarity_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: the image with one patch marked, and the cosine of every patch's features with that patch's."""
    maps: list[np.ndarray] = []
    rows: list[list[Cell]] = []
    data = _data(views, config)
    for number, view in enumerate(views):
        assert view.features is not None
        row, column = _pointed_at(view, config)
        maps.append(similarity(torch.from_numpy(view.features), row, column).numpy())
        data |= {f"similarity_{number}": maps[-1], f"patch_{number}": np.array([row, column])}
    low = min(0.0, min(float(one.min()) for one in maps))
    for number, (view, one_map) in enumerate(zip(views, maps, strict=True)):
        canvas = Canvas(view, config)
        marked = _marked(canvas, *data[f"patch_{number}"])
        pictures = {"image": marked, "similarity": canvas.heat(one_map, (low, 1))}
        rows.append([cell(picture, title) for title, picture in pictures.items()])
    bar = Bar(colormap=config.colormap, low=low, high=1, label="cosine")
    return Sheet(name="similarity", rows=_packed(rows), bar=bar, data=data)


def pca_sheet(views: Sequence[AttentionResult], config: AttentionConfig) -> Sheet:
    """A row per image: itself and its patch features' principal components as colours, one basis for the whole sheet."""
    features = [torch.from_numpy(view.features) for view in views if view.features is not None]
    colours = [colour.numpy() for colour in pca_colours(features)]
    rows = []
    for view, colour in zip(views, colours, strict=True):
        canvas = Canvas(view, config)
        painted = np.moveaxis(canvas.values(np.moveaxis(colour, -1, 0)), 0, -1)
        pictures = {"image": canvas.image, "patch features, PCA": painted}
        rows.append([cell(picture, title) for title, picture in pictures.items()])
    data = _data(views, config) | {f"pca_{number}": colour for number, colour in enumerate(colours)}
    return Sheet(name="pca", rows=_packed(rows), data=data)


OF_AN_IMAGE: dict[str, Callable[[Sequence[AttentionResult], AttentionConfig], Sheet]] = {
    "heads": heads_sheet,
    "magnitude": magnitude_sheet,
    "covariance": covariance_sheet,
}
OF_IMAGES: dict[str, Callable[[Sequence[AttentionResult], AttentionConfig], Sheet]] = {
    "grid": grid_sheet,
    "overlay": overlay_sheet,
    "similarity": similarity_sheet,
    "pca": pca_sheet,
}


def chosen(view: AttentionResult, config: AttentionConfig) -> np.ndarray:
    """The map of `--head`, else the mean of the heads."""
    return view.attention.mean(0) if config.head is None else view.attention[config.head]


def map_title(config: AttentionConfig) -> str:
    return "mean" if config.head is None else f"head {config.head}"


def _mask_title(config: AttentionConfig) -> str:
    return f"{100 * config.threshold:g} % mass"


def _limits(maps: Sequence[Sequence[np.ndarray]], config: AttentionConfig) -> list[list[Limits]]:
    """Both ends of the colour scale of each map, by rows."""
    if config.scale == "map":
        return [[ends([one], config.clip) for one in row] for row in maps]
    if config.scale == "figure":
        whole = ends([one for row in maps for one in row], config.clip)
        return [[whole] * len(row) for row in maps]
    return [[ends(row, config.clip)] * len(row) for row in maps]


def ends(maps: Sequence[np.ndarray], clip: float) -> Limits:
    """The values that a share `clip` of all patches of these maps are below and above."""
    values = np.sort(np.concatenate([one.ravel() for one in maps]))
    beyond = int(clip * (len(values) - 1))
    return float(values[beyond]), float(values[-1 - beyond])


def _bar(config: AttentionConfig, limits: Limits, label: str = "class attention") -> Bar | None:
    """Where one scale holds for the whole sheet."""
    if config.scale != "figure":
        return None
    return Bar(colormap=config.colormap, low=limits[0], high=limits[1], label=label)


def _wrapped(cells: list[Cell]) -> list[list[Cell]]:
    """Rows as long as each other, the last filled up with nothing."""
    rows = -(-len(cells) // CELLS_IN_A_ROW)
    columns = -(-len(cells) // rows)
    blank = Cell(picture=np.full_like(cells[0].picture, 255))
    cells = cells + [blank] * (rows * columns - len(cells))
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def _under(first: Cell, cells: list[Cell]) -> list[list[Cell]]:
    """One row, or of many cells several rows as long as each other, the first cell in front of the first."""
    rows = -(-len(cells) // HEADS_IN_A_ROW)
    columns = -(-len(cells) // rows)
    blank = Cell(picture=np.full_like(first.picture, 255))
    cells = cells + [blank] * (rows * columns - len(cells))
    starts = range(0, len(cells), columns)
    return [[first if start == 0 else blank, *cells[start : start + columns]] for start in starts]


def _packed(rows: list[list[Cell]]) -> list[list[Cell]]:
    """Short rows of pictures of one shape go side by side; a title that stands above is not repeated."""
    together = max(1, CELLS_IN_A_ROW // len(rows[0]))
    if together > 1 and len({cell.picture.shape for row in rows for cell in row}) == 1:
        blank = Cell(picture=np.full_like(rows[0][0].picture, 255))
        rows = rows + [[blank] * len(rows[0])] * (-len(rows) % min(together, len(rows)))
        together = min(together, len(rows))
        rows = [
            list(itertools.chain(*rows[start : start + together]))
            for start in range(0, len(rows), together)
        ]
    pairs = [zip(above, row, strict=True) for above, row in itertools.pairwise(rows)]
    untitled = [
        [dataclasses.replace(c, title="") if c.title == above.title else c for above, c in pair]
        for pair in pairs
    ]
    return [rows[0], *untitled]


def _pointed_at(view: AttentionResult, config: AttentionConfig) -> tuple[int, int]:
    """The patch at `--point`, else the one with the most attention."""
    rows, columns = view.attention.shape[1:]
    if not config.point:
        row, column = np.unravel_index(chosen(view, config).argmax(), (rows, columns))
        return int(row), int(column)
    x, y = config.point
    H, W = view.image.shape[:2]
    return min(rows - 1, int(y * H) // view.patch), min(columns - 1, int(x * W) // view.patch)


def _marked(canvas: Canvas, row: int, column: int) -> np.ndarray:
    """The image with a frame around one patch."""
    picture, p = canvas.image.copy(), canvas.patch
    thick = max(1, max(picture.shape[:2]) // 100)
    top, left = max(0, row * p - thick), max(0, column * p - thick)
    inside = picture[row * p : (row + 1) * p, column * p : (column + 1) * p].copy()
    picture[top : (row + 1) * p + thick, left : (column + 1) * p + thick] = MARK
    picture[row * p : (row + 1) * p, column * p : (column + 1) * p] = inside
    return picture


def _data(
    views: Sequence[AttentionResult], config: AttentionConfig, *maps: str
) -> dict[str, np.ndarray]:
    """What a reader needs to draw the sheet again: images, maps, patch sizes, names, options as JSON."""
    data: dict[str, np.ndarray] = {}
    for number, view in enumerate(views):
        data |= {f"image_{number}": view.image, f"attention_{number}": view.attention}
        data |= {f"{name}_{number}": getattr(view, name) for name in maps}
    data["names"] = np.array([view.name for view in views])
    data["patch"] = np.array([view.patch for view in views])
    data["options"] = np.array(options_of(config))
    return data


def options_of(config: AttentionConfig) -> str:
    return json.dumps(dataclasses.asdict(config))
