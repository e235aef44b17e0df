"""Sheets: rows of pictures with titles, laid out to the width of a text column, as PNG, PDF or SVG.

Lengths are in inches, y from the top down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from dino_xcit.errors import UserError
from dino_xcit.figures.pictures import heat
from dino_xcit.files import printable, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

# A name is the width of the text; with -column, that of one of its two columns.
WIDTHS = {
    "neurips": 5.5,
    "iclr": 5.5,
    "icml": 6.75,
    "icml-column": 3.25,
    "cvpr": 6.875,
    "cvpr-column": 3.28,
    "eccv": 4.8,
    "aaai": 7.0,
    "aaai-column": 3.31,
    "ieee": 7.14,
    "ieee-column": 3.49,
    "acl": 6.3,
    "acl-column": 3.03,
    "jmlr": 6.0,
    "tmlr": 6.5,
    "slide": 12.0,
}
GAP = 0.02  # between pictures
FONT_POINTS = 7
NARROWEST = 0.15  # width of a cell
TALLEST = 2.5  # height of a cell, in widths
TITLE_INCHES = 0.16  # height of a line of a title
BAR_GAP, BAR_THICKNESS = 0.06, 0.09
BAR_INCHES = BAR_GAP + BAR_THICKNESS + 0.22  # colour bar with its label, without the tick labels
CELLS_IN_A_ROW = 6
HEADS_IN_A_ROW = 8
STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: text stays text
    "svg.fonttype": "path",  # outlines: as text, an SVG would need the font on the reader's machine
    "svg.hashsalt": "dino_xcit",  # the same figure gives the same file
    "font.family": "DejaVu Sans",
    "font.size": FONT_POINTS,
    "axes.linewidth": 0.5,
    "image.composite_image": False,  # in PDF and SVG, each picture stays an object of its own
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture with its title."""

    picture: np.ndarray
    """uint8 (H, W, 3)"""
    title: str = ""
    note: str = ""
    """second line of the title"""


@dataclass(frozen=True, kw_only=True)
class ColourBar:
    """A colour bar for the whole sheet."""

    colormap: str
    low: float
    high: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One figure, and the arrays that it shows."""

    name: str
    """of its files, without an ending"""
    rows: list[list[Cell]]
    """as many cells in each row"""
    bar: ColourBar | None = None
    data: dict[str, np.ndarray] = field(default_factory=dict)
    """arrays of NAME.npz"""


def as_cell(picture: np.ndarray, title: str = "", note: str = "") -> Cell:
    """A picture in [0, 1], (H, W, 3), as a cell."""
    return Cell(picture=np.rint(255 * picture).astype(np.uint8), title=title, note=note)


# -- arrangement of cells --------------------------------------------------------------------------


def wrap(cells: list[Cell]) -> list[list[Cell]]:
    """Rows of equal length; blank cells fill the last."""
    rows = -(-len(cells) // CELLS_IN_A_ROW)
    return _even_rows(cells, rows, _blank(cells[0]))


def wrap_beside(first: Cell, cells: list[Cell]) -> list[list[Cell]]:
    """The first cell, and beside it the others in one row, or in several rows of equal length."""
    rows = -(-len(cells) // HEADS_IN_A_ROW)
    blank = _blank(first)
    wrapped = _even_rows(cells, rows, blank)
    return [[blank if number else first, *row] for number, row in enumerate(wrapped)]


def pack(rows: list[list[Cell]]) -> list[list[Cell]]:
    """Put short rows of pictures of one shape side by side; repeat no title that stands above."""
    together = min(max(1, CELLS_IN_A_ROW // len(rows[0])), len(rows))
    if together > 1 and len({cell.picture.shape for row in rows for cell in row}) == 1:
        missing = -len(rows) % together
        rows = rows + [[_blank(rows[0][0])] * len(rows[0])] * missing
        starts = range(0, len(rows), together)
        rows = [list(itertools.chain(*rows[start : start + together])) for start in starts]
    untitled = [
        [
            dataclasses.replace(cell, title="") if cell.title == above.title else cell
            for above, cell in zip(*pair, strict=True)
        ]
        for pair in itertools.pairwise(rows)
    ]
    return [rows[0], *untitled]


def _even_rows(cells: list[Cell], rows: int, blank: Cell) -> list[list[Cell]]:
    columns = -(-len(cells) // rows)
    cells = cells + [blank] * (rows * columns - len(cells))
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def _blank(like: Cell) -> Cell:
    return Cell(picture=np.full_like(like.picture, 255))


# -- layout ----------------------------------------------------------------------------------------


def inches(width: str) -> float:
    """Width in inches of `--width`, a number or the name of a venue.

    Raises:
        UserError: it is neither; the message lists the names.
    """
    with contextlib.suppress(ValueError):
        if 1 <= float(width) <= 20:
            return float(width)
    if width not in WIDTHS:
        names = ", ".join(f"{name} ({value:g})" for name, value in WIDTHS.items())
        raise UserError(f"--width is {width!r}; expected inches from 1 to 20, or one of {names}")
    return WIDTHS[width]


class _PlacedRow(NamedTuple):
    top: float
    """of the pictures"""
    height: float
    title_lines: int
    cells: list[Cell]


def draw(sheet: Sheet, width: float, titles: bool) -> Figure:
    """Lay the sheet out to a width in inches.

    The first picture of a row sets the height of its cells, within bounds; a picture of another
    shape is centred in its cell.

    Raises:
        UserError: the width is too narrow for the columns.
    """
    columns = len(sheet.rows[0])
    ticks = _ticks(sheet.bar) if sheet.bar else []
    bar_width = BAR_INCHES + max(map(text_width, ticks)) if ticks else 0
    cell_width = (width - bar_width - GAP * (columns - 1)) / columns
    if cell_width < NARROWEST:
        raise UserError(
            f"--width {width:g} is too narrow for {columns} pictures side by side; raise --width"
        )
    rows, total = _place_rows(sheet.rows, cell_width, titles)
    figure = Figure(figsize=(width, total))
    page = figure.add_axes((0, 0, 1, 1))  # one for all pictures: inches from the top left
    for row in rows:
        for number, cell in enumerate(row.cells):
            _draw_cell(page, cell, row, number * (cell_width + GAP), cell_width)
    page.set(xlim=(0, width), ylim=(total, 0), aspect="auto")
    page.set_axis_off()
    if sheet.bar:
        _draw_bar(figure, sheet.bar, ticks, rows[0].top, bar_width)
    return figure


def _place_rows(
    rows: list[list[Cell]], cell_width: float, titles: bool
) -> tuple[list[_PlacedRow], float]:
    """The rows with their places, and the height of all."""
    placed, y = [], 0.0
    for cells in rows:
        lines = max(2 * bool(cell.note) or bool(cell.title) for cell in cells) if titles else 0
        H, W = cells[0].picture.shape[:2]
        height = cell_width * min(TALLEST, H / W)
        y += lines * TITLE_INCHES
        placed.append(_PlacedRow(y, height, int(lines), cells))
        y += height + GAP
    return placed, y - GAP


def _draw_cell(page: Axes, cell: Cell, row: _PlacedRow, left: float, width: float) -> None:
    w, h = _picture_size(cell.picture, width, row.height)
    x, y = left + (width - w) / 2, row.top + (row.height - h) / 2
    page.imshow(cell.picture, extent=(x, x + w, y + h, y), interpolation="antialiased")
    lines = ((cell.note, "#555555"), (cell.title, "black"))[2 - row.title_lines :]  # from below
    for number, (text, colour) in enumerate(lines):
        place = (left + width / 2, row.top - 0.04 - number * TITLE_INCHES)
        page.text(*place, shortened(text, width), ha="center", color=colour, parse_math=False)


def _picture_size(picture: np.ndarray, width: float, height: float) -> tuple[float, float]:
    """Largest size of the picture in a cell; the cell's own if they differ by rounding alone."""
    h, w = picture.shape[:2]
    if abs(h / w - height / width) * min(w, h) < 1:
        return width, height
    return (width, width * h / w) if h / w < height / width else (height * w / h, height)


def text_width(text: str) -> float:
    """Width of a line of text in inches."""
    font = FontProperties(family=STYLE["font.family"], size=FONT_POINTS)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def shortened(text: str, width: float) -> str:
    """The text, with an ellipsis for its middle where it is wider than so many inches."""
    text = shown = printable(text)
    for letters in range(len(text), 2, -1):
        if text_width(shown) <= width:
            break
        shown = f"{text[: (letters - 1) // 2]}…{text[len(text) - (letters - 2) // 2 :]}"
    return shown


def _ticks(bar: ColourBar) -> list[str]:
    return [f"{value:.2g}" for value in np.linspace(bar.low, bar.high, 3)]


def _draw_bar(
    figure: Figure, bar: ColourBar, ticks: Sequence[str], top: float, bar_width: float
) -> None:
    """Draw the colour bar at the right edge, below the titles of the first row."""
    width, total = figure.get_size_inches()
    left = width - bar_width + BAR_GAP
    axes = figure.add_axes((left / width, 0, BAR_THICKNESS / width, 1 - top / total))
    colours = heat(np.linspace(bar.high, bar.low, 256)[:, None], bar.low, bar.high, bar.colormap)
    axes.imshow(colours, aspect="auto", extent=(0, 1, bar.low, bar.high))
    axes.yaxis.tick_right()
    axes.set(xticks=[], yticks=np.linspace(bar.low, bar.high, 3))
    low, middle, high = axes.set_yticklabels(ticks)
    low.set_verticalalignment("bottom")
    middle.set_verticalalignment("center")
    high.set_verticalalignment("top")
    axes.tick_params(length=1.5, width=0.5, pad=1.5)
    place = 1 - 0.02 / width, (1 - top / total) / 2
    label = shortened(bar.label, total - top)
    figure.text(*place, label, rotation=90, ha="right", va="center")


# -- files -----------------------------------------------------------------------------------------


def write(
    sheet: Sheet, folder: Path, formats: Sequence[str], *, width: float, titles: bool, dpi: int
) -> list[Path]:
    """Write the sheet in each format, and its arrays as NAME.npz.

    Args:
        sheet: the figure.
        folder: an existing folder.
        formats: of png, pdf, svg.
        width: inches.
        titles: whether pictures have titles.
        dpi: pixels per inch of PNG files and of the pictures in PDF and SVG files.

    Returns:
        The files.

    Raises:
        UserError: the width is too narrow for the columns.
    """
    paths = []
    with matplotlib.rc_context(STYLE):
        figure = draw(sheet, width, titles)
        for kind in formats:
            path = folder / f"{sheet.name}.{kind}"
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            with replacing(path) as beside:
                figure.savefig(beside, dpi=dpi, metadata=undated)
            paths.append(path)
    arrays: dict[str, Any] = dict(sheet.data)  # `savez` has keyword options too
    if arrays:
        path = folder / f"{sheet.name}.npz"
        with replacing(path) as beside:
            np.savez_compressed(beside, **arrays)
        paths.append(path)
    return paths
