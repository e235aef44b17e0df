"""Sheets: their layout, their text, and the bytes of the files."""

import re
import zipfile
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dino_xcit.config import attention as attention_options
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.errors import UserError
from dino_xcit.figures.drawing import (
    BAR_INCHES,
    GAP,
    STYLE,
    TITLE_INCHES,
    WIDTHS,
    ColourBar,
    Sheet,
    as_cell,
    draw,
    inches,
    shortened,
    text_width,
    write,
)


def plain_cell(value, *titles, height=10, width=20):
    return as_cell(np.full((height, width, 3), value), *titles)


def sheet(rows=2, columns=3, *, bar=None, title="head", note="", **shape):
    """Every cell in a grey of its own, none of them white."""
    greys = np.linspace(0.1, 0.8, rows * columns).reshape(rows, columns)
    cells = [[plain_cell(grey, title, note, **shape) for grey in row] for row in greys]
    return Sheet(name="sheet", rows=cells, bar=bar)


def written(one, folder, kind="png", *, width=2.0, titles=False, dpi=100):
    (path,) = write(one, folder, [kind], width=width, titles=titles, dpi=dpi)
    return path


def pixels_of(path):
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


BAR = ColourBar(colormap="viridis", low=0.00012, high=0.00034, label="class attention")


# -- widths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "expected"),
    [("neurips", 5.5), ("cvpr-column", 3.28), ("3.5", 3.5), ("1", 1.0), ("20", 20.0)],
)
def test_a_width_is_a_venue_or_inches(width, expected):
    assert inches(width) == expected


@pytest.mark.parametrize("width", ["0.99", "20.1", "-3", "nan", "inf", "nips", "", "3in"])
def test_other_widths_are_refused_with_every_name(width):
    with pytest.raises(
        UserError, match=re.escape(f"--width is {width!r}; expected inches from 1 to 20")
    ) as refusal:
        inches(width)
    for name, value in WIDTHS.items():
        assert f"{name} ({value:g})" in str(refusal.value)


def test_the_help_names_the_venues_that_there_are():
    source = Path(attention_options.__file__).read_text()
    (text,) = re.findall(r'\n    width: str = "\w+"\n    """(.*?)"""', source, re.DOTALL)
    named = re.findall(r"[a-z]+(?:-column)?", text)
    assert [name for name in WIDTHS if name not in named] == []
    assert {name for name in named if name.endswith("-column")} < set(WIDTHS)
    assert inches(AttentionConfig.width) == WIDTHS["neurips"]
    columns = [name for name in WIDTHS if name.endswith("-column")]
    assert all(WIDTHS[name] < WIDTHS[name.removesuffix("-column")] / 2 for name in columns)


# -- sheets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [None, BAR])
@pytest.mark.parametrize(("width", "dpi"), [(2.0, 100), (5.5, 150), (3.28, 300)])
def test_a_png_is_as_wide_as_requested(width, dpi, bar, tmp_path):
    path = written(sheet(bar=bar), tmp_path, width=width, dpi=dpi)
    assert path == tmp_path / "sheet.png"
    with Image.open(path) as file:
        assert file.size[0] == pytest.approx(width * dpi, abs=1)
        assert file.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)


def test_pictures_fill_the_page_but_for_the_gaps(tmp_path):
    rows, columns, dpi, width = 2, 3, 200, 2.0
    pixels = pixels_of(written(sheet(rows, columns), tmp_path, width=width, dpi=dpi))
    greys = np.rint(255 * np.linspace(0.1, 0.8, rows * columns)).reshape(rows, columns)
    cell_width = (width - GAP * (columns - 1)) / columns
    cell_height = cell_width * 10 / 20
    assert pixels.shape[0] == pytest.approx(dpi * (rows * cell_height + GAP * (rows - 1)), abs=1)
    found = np.zeros(pixels.shape[:2], bool)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (cell_height + GAP) * dpi, column * (cell_width + GAP) * dpi
        box = [
            round(v)
            for v in (top + 1, top + cell_height * dpi - 1, left + 1, left + cell_width * dpi - 1)
        ]
        inside = pixels[box[0] : box[1], box[2] : box[3]]
        assert (inside == greys[row, column]).all()
        found[max(0, box[0] - 2) : box[1] + 2, max(0, box[2] - 2) : box[3] + 2] = True
    assert (pixels[~found] == 255).all()
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge < 250).all(-1).mean() > 0.95  # no margin


def test_each_picture_keeps_its_aspect_and_rows_have_their_own_heights(tmp_path):
    rows = [[plain_cell(0.2, height=10, width=10)] * 2, [plain_cell(0.6, height=20, width=10)] * 2]
    pixels = pixels_of(written(Sheet(name="sheet", rows=rows), tmp_path, width=2.0, dpi=100))
    side = (2.0 - GAP) / 2 * 100
    assert pixels.shape[0] == pytest.approx(side + 2 * side + 100 * GAP, abs=1)
    assert (pixels[: int(side) - 1, 5] == 51).all()
    assert (pixels[int(side) + 4 :, 5] == 153).all()


def test_pixels_of_a_picture_keep_their_places(tmp_path):
    """Upright, not mirrored, and not blurred."""
    corners = np.zeros((2, 2, 3))
    corners[0, 0], corners[0, 1], corners[1, 0] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    pixels = pixels_of(
        written(Sheet(name="sheet", rows=[[as_cell(corners)]]), tmp_path, width=1.0, dpi=100)
    )
    assert pixels.shape == (100, 100, 3)
    assert pixels[10, 10].tolist() == pixels[48, 48].tolist() == [255, 0, 0]
    assert pixels[10, 90].tolist() == [0, 255, 0]
    assert pixels[90, 10].tolist() == [0, 0, 255]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 4


@pytest.mark.parametrize(("note", "lines"), [("", 1), ("1.2 nats", 2)])
def test_titles_take_a_line_above_the_row_and_notes_another(note, lines, tmp_path):
    bare = pixels_of(written(sheet(1, 2, note=note), tmp_path, titles=False))
    titled = pixels_of(written(sheet(1, 2, note=note), tmp_path, titles=True))
    added = titled.shape[0] - bare.shape[0]
    assert added == pytest.approx(100 * lines * TITLE_INCHES, abs=1)
    np.testing.assert_allclose(titled[added + 1 : -1], bare[1:-1], atol=1)
    for line in range(lines):  # each has text in the middle of each cell; the border stays white
        written_in = (titled[16 * line : 16 * line + 15] < 200).any(-1).any(0)
        for left in (0, 101):
            places = np.flatnonzero(written_in[left : left + 99])
            assert len(places) > 5
            assert (places[0] + places[-1]) / 2 == pytest.approx(49, abs=4)
    assert (titled[0] == 255).all()
    without = pixels_of(written(sheet(1, 2, title="", note=""), tmp_path, titles=True))
    assert without.shape == bare.shape


def texts_of(one, **options):
    with matplotlib.rc_context(STYLE):
        figure = draw(one, options.get("width", 5.5), options.get("titles", True))
        renderer = FigureCanvasAgg(figure).get_renderer()
        return figure, [
            (text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts
        ]


def test_titles_stand_above_notes_and_only_where_there_are_any():
    rows = [
        [plain_cell(0.2, "image"), plain_cell(0.3, "head 0", "1.23 nats")],
        [plain_cell(0.4), plain_cell(0.5)],
    ]
    _, texts = texts_of(Sheet(name="sheet", rows=rows))
    placed = {text: box for text, box in texts if text}
    assert set(placed) == {"image", "head 0", "1.23 nats"}
    assert placed["head 0"].y0 > placed["1.23 nats"].y1 - 1
    assert placed["image"].y0 == pytest.approx(placed["head 0"].y0, abs=2)
    assert [text for text, _ in texts_of(Sheet(name="sheet", rows=rows), titles=False)[1]] == []


@pytest.mark.parametrize(
    "title", ["xcit_small_12_p8_224.fb_dist_in1k", "mmmmmmmmmmmmmmmmmm", "queries, head 11"]
)
def test_titles_of_narrow_pictures_are_shortened_in_the_middle(title):
    figure, texts = texts_of(sheet(1, 8, title=title))
    for number, (text, box) in enumerate(texts):
        assert "…" in text
        assert text[0] == title[0]
        assert text[-1] == title[-1]
        if "m" * 4 not in title:  # a line of m alone is wider than any name
            middle = (number + 0.5) * figure.bbox.width / 8
            assert abs(box.x1 - middle) < figure.bbox.width / 8 / 2 + 2
            assert abs(middle - box.x0) < figure.bbox.width / 8 / 2 + 2


@pytest.mark.parametrize("note", ["", "gjpqy"])
def test_titles_do_not_touch_pictures_or_each_other(note):
    figure, texts = texts_of(sheet(2, 2, title="gjpqy|", note=note))
    pictures = [image.get_window_extent(None) for image in figure.axes[0].images]
    assert len(pictures) == 4
    boxes = [box for _, box in texts]
    for box in boxes:
        assert not any(box.overlaps(other) for other in [*pictures, *boxes] if other is not box)
        assert box.y1 <= figure.bbox.height


def test_shortened_texts_keep_both_ends():
    name = "abcdefghij"
    whole = text_width(name)
    assert shortened(name, whole) == name
    short = shortened(name, 0.9 * whole)
    start, end = short.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert len(start) + len(end) >= 7
    assert text_width(short) <= 0.9 * whole
    assert shortened(name, 0.001) == "a…"
    assert shortened("a\udcffb", 10) == "a?b"  # a file's name that is no UTF-8


def test_titles_are_no_formulas(tmp_path):
    _, texts = texts_of(sheet(1, 1, title="a_b$x^2$"))
    assert [text for text, _ in texts] == ["a_b$x^2$"]
    written(sheet(1, 1, title=r"$\frac{$"), tmp_path, titles=True)


# -- colour bar ------------------------------------------------------------------------------------


def test_a_colour_bar_stands_beside_the_pictures_and_shows_the_colours_of_its_limits(tmp_path):
    dpi, width = 200, 3.0
    pixels = pixels_of(written(sheet(2, 2, bar=BAR, height=20), tmp_path, width=width, dpi=dpi))
    bar_width = BAR_INCHES + max(
        text_width(f"{value:.2g}") for value in np.linspace(BAR.low, BAR.high, 3)
    )
    right = round((width - bar_width) * dpi)
    assert (pixels[5:-5, right - 3] < 250).all(-1).mean() > 0.9  # the pictures end there
    assert (pixels[:, right + 1 : right + 8] == 255).all()
    x = round((width - bar_width + 0.06 + 0.045) * dpi)
    high, low = (np.array(matplotlib.colormaps["viridis"](end)[:3]) * 255 for end in (1.0, 0.0))
    np.testing.assert_allclose(pixels[3, x], high, atol=10)
    np.testing.assert_allclose(pixels[-3, x], low, atol=10)
    np.testing.assert_allclose(
        pixels[len(pixels) // 2, x],
        np.array(matplotlib.colormaps["viridis"](0.5)[:3]) * 255,
        atol=8,
    )


def test_numbers_of_a_colour_bar_are_inside_the_page_and_beside_its_label():
    one = sheet(2, 3, bar=BAR, height=20)
    with matplotlib.rc_context(STYLE):
        figure = draw(one, 5.5, True)
        figure.canvas = FigureCanvasAgg(figure)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        ticks = figure.axes[-1].get_yticklabels()
        assert [tick.get_text() for tick in ticks] == ["0.00012", "0.00023", "0.00034"]
        boxes = [tick.get_window_extent(renderer) for tick in ticks]
        label = next(text for text in figure.texts if text.get_text() == "class attention")
        of_label = label.get_window_extent(renderer)
    page = figure.bbox
    for box in (*boxes, of_label):
        assert box.x0 >= 0
        assert box.y0 >= -1
        assert box.x1 <= page.width
        assert box.y1 <= page.height + 1
    assert max(box.x1 for box in boxes) < of_label.x0
    assert boxes[0].y1 < boxes[1].y0 < boxes[1].y1 < boxes[2].y0


# -- files -----------------------------------------------------------------------------------------


def test_a_pdf_is_as_wide_as_requested_and_has_its_fonts_in_it(tmp_path):
    data = written(
        sheet(note="note", bar=BAR), tmp_path, "pdf", width=5.5, titles=True
    ).read_bytes()
    (box,) = re.findall(rb"/MediaBox \[ ?([^\]]*?) ?\]", data)
    left, bottom, right, top = (float(number) for number in box.split())
    assert (left, bottom) == (0, 0)
    assert right == pytest.approx(5.5 * 72)
    pictures = pixels_of(
        written(sheet(note="note", bar=BAR), tmp_path, "png", width=5.5, titles=True)
    )
    assert top / right == pytest.approx(pictures.shape[0] / pictures.shape[1], rel=0.01)
    (font,) = set(re.findall(rb"/FontFile2 (\d+) 0 R", data))
    start = data.index(b"\n" + font + b" 0 obj")
    stream = data[data.index(b"stream\n", start) + 7 : data.index(b"endstream", start)]
    assert zlib.decompressobj().decompress(stream)[:4] == b"\x00\x01\x00\x00"  # of TrueType
    assert b"DejaVuSans" in data
    assert b"/Type3" not in data
    assert b"CreationDate" not in data


def test_an_svg_asks_for_no_font_and_for_nothing_elsewhere(tmp_path):
    text = written(sheet(note="note", bar=BAR), tmp_path, "svg", width=5.5, titles=True).read_text()
    assert "<text" not in text
    assert "font-family" not in text
    assert len(re.findall(r"<image", text)) == 7
    assert all(
        target.startswith(("#", "data:image/png;base64,"))
        for target in re.findall(r'href="([^"]*)"', text)
    )
    assert "@import" not in text
    assert f'width="{5.5 * 72:g}pt"' in text


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
@pytest.mark.slow
def test_the_same_sheet_is_the_same_file(kind, tmp_path):
    one = sheet(1, 2, note="note", bar=BAR)
    (tmp_path / "again").mkdir()
    files = [
        written(one, folder, kind, titles=True).read_bytes()
        for folder in (tmp_path, tmp_path / "again")
    ]
    assert files[0] == files[1]


def test_numbers_are_kept_beside_the_figure_and_load_without_pickle(tmp_path):
    data = {
        "map": np.arange(6.0).reshape(2, 3),
        "names": np.array(["ä", "b"]),
        "options": np.array("{}"),
    }
    one = Sheet(name="one", rows=sheet(1, 1).rows, data=data)
    paths = write(one, tmp_path, ["pdf", "png"], width=1, titles=True, dpi=50)
    assert [path.name for path in paths] == ["one.pdf", "one.png", "one.npz"]
    assert {path.name for path in tmp_path.iterdir()} == {"one.pdf", "one.png", "one.npz"}
    with np.load(paths[-1], allow_pickle=False) as loaded:
        assert set(loaded) == set(data)
        for name, array in data.items():
            np.testing.assert_array_equal(loaded[name], array)
    with zipfile.ZipFile(paths[-1]) as archive:
        assert all(info.compress_type == zipfile.ZIP_DEFLATED for info in archive.infolist())


def test_a_sheet_without_numbers_leaves_no_file_for_them(tmp_path):
    assert [
        p.name for p in write(sheet(1, 1), tmp_path, ["png"], width=1, titles=True, dpi=50)
    ] == ["sheet.png"]


def test_the_readers_matplotlib_settings_come_back(tmp_path):
    with matplotlib.rc_context({"font.size": 13, "pdf.fonttype": 3, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        written(sheet(1, 1), tmp_path, titles=True)
        assert dict(matplotlib.rcParams) == before


def test_a_picture_far_taller_than_wide_is_centred_in_a_cell_of_bounded_height(tmp_path):
    rows = [[plain_cell(0.2, height=100, width=2), plain_cell(0.6, height=10, width=10)]]
    pixels = pixels_of(written(Sheet(name="sheet", rows=rows), tmp_path, width=2.0, dpi=100))
    side = (2.0 - GAP) / 2 * 100
    assert pixels.shape[0] == pytest.approx(2.5 * side, abs=1)
    assert (pixels[10:-10, round(side / 2)] == 51).all()
    assert (pixels[10:-10, round(side / 2) + 6] == 255).all()
    square = pixels[:, round(side + 100 * GAP) + 3 : -3]
    assert (square == 153).all(-1).all(1).sum() == pytest.approx(side, abs=2)


def test_a_picture_of_another_shape_than_its_row_keeps_its_own_in_the_middle_of_its_cell(tmp_path):
    rows = [[plain_cell(0.2, height=10, width=10), plain_cell(0.6, height=10, width=40)]]
    pixels = pixels_of(written(Sheet(name="sheet", rows=rows), tmp_path, width=2.0, dpi=100))
    filled = np.flatnonzero((pixels[:, 150] == 153).all(-1))
    assert len(filled) == pytest.approx(99 / 4, abs=2)
    assert (filled[0] + filled[-1]) / 2 == pytest.approx(len(pixels) / 2, abs=1)


def test_a_sheet_too_narrow_for_its_columns_is_refused():
    with pytest.raises(UserError, match="--width 1 is too narrow for 9 pictures side by side"):
        draw(sheet(1, 9), 1.0, True)


def test_the_label_of_a_colour_bar_is_inside_a_low_sheet():
    bar = ColourBar(colormap="inferno", low=0, high=1, label="cosine of query and key")
    one = Sheet(name="low", rows=[[as_cell(np.full((8, 8, 3), 0.2), "head")] * 9], bar=bar)
    with matplotlib.rc_context(STYLE):
        figure = draw(one, 5.5, True)
        renderer = FigureCanvasAgg(figure).get_renderer()
        label = next(text for text in figure.texts if text.get_rotation() == 90).get_window_extent(
            renderer
        )
    assert label.y0 >= 0
    assert label.y1 <= figure.bbox.height
