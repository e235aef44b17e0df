"""Maps -> what goes into a paper.

First pictures: arrays of colours made of an image and its maps, the same for figures, videos and the interactive page. Then
sheets: rows of pictures with titles, laid out to the width of a column and written as PNG, PDF or SVG.

Axes: h heads; a map is (rows, columns) of patches, an image (H, W, 3) of pixels. Patches that reach beyond the image (it was
padded) are cut.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from dino_xcit.errors import UserError
from dino_xcit.files import printable, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dino_xcit.config.attention import Interpolation

# Told apart with normal sight and with any of the three colour blindnesses, the first ones best (tests/test_figure.py).
HEAD_COLOURS = (
    *("#ffcc33", "#00ffee", "#7766ee", "#ee0055", "#9966aa", "#ccee99", "#cc6600", "#22aa88"),
    *("#ccaaff", "#ff9955", "#88ddaa", "#9977dd", "#cc88bb", "#eeee77", "#ee5544", "#bbaa77"),
)
GREY = np.array([0.299, 0.587, 0.114])
# Inches. A name is the width of the text, with -column that of one of its two columns.
WIDTHS = {
    **{
        "neurips": 5.5,
        "iclr": 5.5,
        "icml": 6.75,
        "icml-column": 3.25,
        "cvpr": 6.875,
        "cvpr-column": 3.28,
    },
    **{
        "eccv": 4.8,
        "aaai": 7.0,
        "aaai-column": 3.31,
        "ieee": 7.14,
        "ieee-column": 3.49,
        "acl": 6.3,
        "acl-column": 3.03,
    },
    **{"jmlr": 6.0, "tmlr": 6.5, "slide": 12.0},
}
GAP = 0.02  # inches between pictures
FONT_POINTS = 7
NARROWEST, TALLEST = 0.15, 2.5  # of a cell: inches of its width, and its height in widths
TITLE_INCHES = 0.16  # height of a line of title
BAR_GAP, BAR_THICKNESS = 0.06, 0.09  # inches
BAR_INCHES = (
    BAR_GAP + BAR_THICKNESS + 0.22
)  # width of a colour bar and its label, without the numbers
SMALLEST_PICTURE = 256  # pixels of the long side
STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: text stays text
    "svg.fonttype": "path",  # outlines, since an SVG would ask the reader's machine for the font
    "svg.hashsalt": "dino_xcit",  # the same figure is the same file
    "font.family": "DejaVu Sans",
    "font.size": FONT_POINTS,
    "axes.linewidth": 0.5,
    "image.composite_image": False,  # a picture stays one in PDF and SVG, to be moved about
}


# -- pictures --------------------------------------------------------------------------------------------------------


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> (H, W, 3): grey three times, of more than three channels the first three."""
    return (
        image[..., :3]
        if image.shape[-1] > 2
        else np.broadcast_to(image[..., :1], (*image.shape[:2], 3))
    )


def scaled(image: np.ndarray, patch: int, largest: int) -> tuple[np.ndarray, int]:
    """uint8 (H, W, C) -> RGB in [0, 1] to draw over, and the side of a patch there.

    Small images are magnified, a pixel becoming several, so that what is drawn over them is not as coarse; of those beyond
    `largest` pixels, blocks of pixels become one, as long as a patch is one at least.
    """
    side = max(image.shape[:2])
    pixels = rgb(image).astype(np.float32) / 255
    if side <= SMALLEST_PICTURE:
        times = -(-SMALLEST_PICTURE // side)
        return pixels.repeat(times, 0).repeat(times, 1), patch * times
    block = 1
    while side > largest * block and patch % (2 * block) == 0:
        block *= 2
    if block > 1:
        starts = [np.arange(0, length, block) for length in pixels.shape[:2]]
        sums = np.add.reduceat(np.add.reduceat(pixels, starts[0], axis=0), starts[1], axis=1)
        down, across = (
            np.diff([*start, length])
            for start, length in zip(starts, pixels.shape[:2], strict=True)
        )
        pixels = sums / (down[:, None] * across)[..., None]
    return pixels, patch // block


def spread(
    maps: np.ndarray, height: int, width: int, patch: int, interpolation: Interpolation
) -> np.ndarray:
    """Maps (..., rows, columns) -> a value for each pixel (..., height, width); nothing becomes negative that was not."""
    rows, columns = maps.shape[-2:]
    flat = torch.from_numpy(np.ascontiguousarray(maps, np.float32)).reshape(1, -1, rows, columns)
    options: dict[str, Any] = {"align_corners": False} if interpolation == "bicubic" else {}
    pixels = F.interpolate(flat, (rows * patch, columns * patch), mode=interpolation, **options)
    values = pixels.numpy().reshape(*maps.shape[:-2], rows * patch, columns * patch)[
        ..., :height, :width
    ]
    return values.clip(maps.min(), maps.max())


def heat(values: np.ndarray, low: float, high: float, colormap: str) -> np.ndarray:
    """Values of pixels -> colours (..., 3); one colour for all if low is high."""
    return matplotlib.colormaps[colormap](((values - low) / ((high - low) or 1)).clip(0, 1))[
        ..., :3
    ]


def overlay(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The image in grey below a map's colours: what the map says by its colour must not mix with the image's."""
    return 0.4 * (image @ GREY)[..., None] + 0.6 * colours


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image where the mask is; grey and dark elsewhere."""
    return np.where(mask[..., None], image, 0.25 * (image @ GREY)[..., None])


def composite(
    image: np.ndarray, values: np.ndarray, limits: Sequence[tuple[float, float]]
) -> np.ndarray:
    """Which head looks where: each pixel in the colour of the head that looks there most, (h, H, W) -> (H, W, 3).

    Heads are compared by where they are in their own range, the limits of each, which is also how opaque the colour is.
    Colours do not mix: a mixture would be read as another head.
    """
    low, high = np.array(limits, np.float32).T[..., None, None]
    values = ((values - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
    strongest = values.max(0)[..., None]
    return (
        0.6 * (1 - strongest) * (image @ GREY)[..., None]
        + strongest * head_colours(len(values))[values.argmax(0)]
    )


def head_colours(heads: int) -> np.ndarray:
    """(heads, 3) in [0, 1]; beyond sixteen heads they repeat."""
    return np.array(
        [matplotlib.colors.to_rgb(HEAD_COLOURS[head % len(HEAD_COLOURS)]) for head in range(heads)]
    )


# -- sheets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    picture: np.ndarray
    """uint8 (H, W, 3)"""
    title: str = ""
    note: str = ""
    """second line of the title"""


def cell(picture: np.ndarray, title: str = "", note: str = "") -> Cell:
    """A picture in [0, 1], (H, W, 3), as a cell."""
    return Cell(picture=np.rint(255 * picture).astype(np.uint8), title=title, note=note)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A colour bar for the whole sheet."""

    colormap: str
    low: float
    high: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One figure: rows of cells, as many in each, and the numbers that it shows."""

    name: str
    rows: list[list[Cell]]
    bar: Bar | None = None
    data: dict[str, np.ndarray] = field(default_factory=dict)


def inches(width: str) -> float:
    """A venue's name or a number of inches. Raises ValueError that lists the names."""
    with contextlib.suppress(ValueError):
        if 1 <= float(width) <= 20:
            return float(width)
    if width not in WIDTHS:
        listed = ", ".join(f"{name} ({value:g})" for name, value in WIDTHS.items())
        raise UserError(f"--width is {width!r}; expected inches from 1 to 20, or one of {listed}")
    return WIDTHS[width]


def draw(sheet: Sheet, width: float, titles: bool) -> Figure:
    """Lay the sheet out to a width in inches. Raises ValueError if that is too narrow for its columns.

    Cells of a row are as high as its first picture asks, within bounds; in a cell of another shape a picture is centred.
    """
    columns = len(sheet.rows[0])
    ticks = (
        []
        if sheet.bar is None
        else [f"{v:.2g}" for v in np.linspace(sheet.bar.low, sheet.bar.high, 3)]
    )
    bar_width = BAR_INCHES + max(map(text_width, ticks)) if ticks else 0
    cell_width = (width - bar_width - GAP * (columns - 1)) / columns
    if cell_width < NARROWEST:
        raise UserError(f"--width {width:g} is too narrow for {columns} pictures side by side")
    tops, y = [], 0.0
    for row in sheet.rows:
        lines = max(2 * bool(cell.note) or bool(cell.title) for cell in row) if titles else 0
        height = cell_width * min(TALLEST, row[0].picture.shape[0] / row[0].picture.shape[1])
        y += lines * TITLE_INCHES
        tops.append((y, height, lines))
        y += height + GAP
    total = y - GAP
    figure = Figure(figsize=(width, total))
    page = figure.add_axes((0, 0, 1, 1))  # one for all pictures, in inches from the top left
    for (top, height, lines), row in zip(tops, sheet.rows, strict=True):
        for number, cell in enumerate(row):
            left = number * (cell_width + GAP)
            w, h = _within(cell.picture, cell_width, height)
            x, y = left + (cell_width - w) / 2, top + (height - h) / 2
            page.imshow(cell.picture, extent=(x, x + w, y + h, y), interpolation="antialiased")
            for line, (text, colour) in enumerate(
                ((cell.note, "#555555"), (cell.title, "black"))[2 - lines :]
            ):
                place = (left + cell_width / 2, top - 0.04 - line * TITLE_INCHES)
                page.text(
                    *place, fitted(text, cell_width), ha="center", color=colour, parse_math=False
                )
    page.set(xlim=(0, width), ylim=(total, 0), aspect="auto")
    page.set_axis_off()
    if sheet.bar:
        _draw_bar(figure, sheet.bar, ticks, tops[0][0], bar_width)
    return figure


def _within(picture: np.ndarray, width: float, height: float) -> tuple[float, float]:
    """The largest size of the picture's shape in a cell, or the cell's own if they differ by no more than rounding."""
    h, w = picture.shape[:2]
    if abs(h / w - height / width) * min(w, h) < 1:
        return width, height
    return (width, width * h / w) if h / w < height / width else (height * w / h, height)


def text_width(text: str) -> float:
    """Inches that a line of text takes."""
    font = FontProperties(family=STYLE["font.family"], size=FONT_POINTS)
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def fitted(text: str, room: float) -> str:
    """The text, its middle left out where a line of so many inches cannot hold it."""
    text = shown = printable(text)
    for letters in range(len(text), 2, -1):
        if text_width(shown) <= room:
            break
        shown = f"{text[: (letters - 1) // 2]}…{text[len(text) - (letters - 2) // 2 :]}"
    return shown


def _draw_bar(figure: Figure, bar: Bar, ticks: Sequence[str], top: float, room: float) -> None:
    """In the rightmost inches, below the first row's titles."""
    width, total = figure.get_size_inches()
    left = width - room + BAR_GAP
    axes = figure.add_axes((left / width, 0, BAR_THICKNESS / width, 1 - top / total))
    ramp = np.linspace(bar.high, bar.low, 256)[:, None]
    axes.imshow(
        heat(ramp, bar.low, bar.high, bar.colormap), aspect="auto", extent=(0, 1, bar.low, bar.high)
    )
    axes.yaxis.tick_right()
    axes.set(xticks=[], yticks=np.linspace(bar.low, bar.high, 3))
    low, middle, high = axes.set_yticklabels(ticks)
    low.set_verticalalignment("bottom")
    middle.set_verticalalignment("center")
    high.set_verticalalignment("top")
    axes.tick_params(length=1.5, width=0.5, pad=1.5)
    label = fitted(bar.label, total - top)
    figure.text(
        1 - 0.02 / width, (1 - top / total) / 2, label, rotation=90, ha="right", va="center"
    )


def write(
    sheet: Sheet, folder: Path, formats: Sequence[str], *, width: float, titles: bool, dpi: int
) -> list[Path]:
    """The sheet in each format, and NAME.npz with the numbers in it -> the files."""
    paths = []
    with matplotlib.rc_context(STYLE):
        figure = draw(sheet, width, titles)
        for kind in formats:
            path = folder / f"{sheet.name}.{kind}"
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            with replacing(path) as beside:
                figure.savefig(beside, dpi=dpi, metadata=undated)
            paths.append(path)
    if sheet.data:
        path = folder / f"{sheet.name}.npz"
        with replacing(path) as beside:
            np.savez_compressed(beside, **sheet.data)  # type: ignore[arg-type]
        paths.append(path)
    return paths
