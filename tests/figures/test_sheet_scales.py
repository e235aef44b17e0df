"""Sheets of synthetic results: colour scales, resolution, and how cells are packed."""

import dataclasses
import math

import matplotlib
import numpy as np
import pytest
import torch
from sheet_helpers import (
    CONFIG,
    GREY,
    as_uint8,
    assert_same,
    canvas_image,
    drawn_map,
    ends_of,
    is_blank,
    result,
    titles_of,
    with_options,
)

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.figures.canvas import Canvas, clipped_range
from dino_xcit.figures.drawing import WIDTHS
from dino_xcit.figures.sheets import FIGURES, columns_sheet

# -- scales ----------------------------------------------------------------------------------------


def sheet_of(kind, results, config):
    if kind == "columns":
        return columns_sheet(
            "models",
            ["a", "b"],
            [[one, dataclasses.replace(one, attention=2 * one.attention)] for one in results],
            config,
        )
    return FIGURES[kind].draw(results if not FIGURES[kind].per_image else results[:1], config)


@pytest.mark.parametrize("scale", ["map", "image", "figure"])
@pytest.mark.parametrize("kind", ["grid", "columns"])
def test_maps_share_the_limits_that_the_scale_sets(kind, scale):
    """A value has the same colour exactly where the limits are shared."""
    results = [result(0, size=(40, 56)), result(1, size=(56, 40), name="dog", largest=3.0)]
    config = with_options(scale=scale)
    sheet = sheet_of(kind, results, config)
    if kind == "grid":
        maps = [list(one.attention) for one in results]
    else:
        maps = [[one.attention.mean(0), 2 * one.attention.mean(0)] for one in results]
    everything = [one for of_image in maps for one in of_image]
    for row, one, of_image in zip(sheet.rows, results, maps, strict=True):
        for cell, one_map in zip(row[1:], of_image, strict=True):
            limits = {"map": [one_map], "image": of_image, "figure": everything}[scale]
            assert_same(cell.picture, drawn_map(one_map, one.image, 8, ends_of(*limits)))
    if scale == "figure":
        assert (sheet.bar.low, sheet.bar.high) == ends_of(*everything)
        assert (sheet.bar.colormap, sheet.bar.label) == ("inferno", "class attention")
    else:
        assert sheet.bar is None


@pytest.mark.parametrize("scale", ["image", "figure"])
def test_heads_of_one_image_share_their_limits_with_the_mean(scale):
    one = result()
    sheet = FIGURES["heads"].draw([one], with_options(scale=scale))
    cells = [cell for row in sheet.rows for cell in row]
    limits = ends_of(*one.attention, one.attention.mean(0))
    for cell, one_map in zip(cells[1:5], [*one.attention, one.attention.mean(0)], strict=True):
        assert_same(cell.picture, drawn_map(one_map, one.image, 8, limits))
    assert (sheet.bar is not None) == (scale == "figure")


@pytest.mark.parametrize("scale", ["map", "figure"])
def test_overlays_share_limits_too(scale):
    results = [result(0), result(1, name="dog", largest=3.0)]
    sheet = FIGURES["overlay"].draw(results, with_options(scale=scale, head=(0,)))
    maps = [one.attention[0] for one in results]
    for row, one, one_map in zip(sheet.rows, results, maps, strict=True):
        limits = ends_of(one_map) if scale == "map" else ends_of(*maps)
        pixels = canvas_image(one.image)[0]
        colours = drawn_map(one_map, one.image, 8, limits) / 255
        assert_same(row[1].picture, as_uint8(0.4 * (pixels @ GREY)[..., None] + 0.6 * colours))


def test_clip_leaves_a_share_of_patches_beyond_either_end():
    one = result(size=(80, 160), heads=1)  # 200 patches
    sheet = FIGURES["grid"].draw([one], with_options(clip=0.05))
    ordered = np.sort(one.attention[0].ravel())
    limits = float(ordered[9]), float(ordered[-10])  # a twentieth of the 199 steps
    assert_same(sheet.rows[0][1].picture, drawn_map(one.attention[0], one.image, 8, limits))
    assert clipped_range([one.attention[0]], 0.0) == ends_of(one.attention[0])
    assert clipped_range([np.arange(3.0)], 0.49) == (0.0, 2.0)
    assert clipped_range([np.arange(60.0), np.arange(60.0, 101.0)], 0.1) == (10.0, 90.0)


def test_one_outlier_does_not_leave_the_other_patches_dark():
    one = result(size=(80, 160), heads=1)
    one.attention[0, 3, 4] = 100.0
    dark, clipped = (
        FIGURES["grid"].draw([one], with_options(clip=clip)).rows[0][1].picture.mean()
        for clip in (0.0, AttentionConfig.clip)
    )
    assert dark < 5
    assert clipped > 50


@pytest.mark.parametrize("colormap", ["viridis", "gray"])
def test_colormap_and_bicubic_maps(colormap):
    one = result()
    config = with_options(colormap=colormap, scale="figure")
    sheet = FIGURES["grid"].draw([one], config)
    assert sheet.bar.colormap == colormap
    limits = ends_of(*one.attention)
    assert_same(
        sheet.rows[0][1].picture, drawn_map(one.attention[0], one.image, 8, limits, colormap)
    )
    smooth = FIGURES["grid"].draw([one], dataclasses.replace(config, interpolation="bicubic"))
    first = one.attention[0]
    values = torch.nn.functional.interpolate(
        torch.from_numpy(first[None, None]), scale_factor=40, mode="bicubic"
    )[0, 0].numpy()
    values = values.clip(first.min(), first.max())
    expected = matplotlib.colormaps[colormap](
        ((values - limits[0]) / (limits[1] - limits[0])).clip(0, 1)
    )[..., :3]
    assert_same(smooth.rows[0][1].picture, as_uint8(expected))


@pytest.mark.parametrize("kind", ["heads", "overlay"])
def test_masks_stay_sharp_with_bicubic_maps(kind):
    one = result()
    sharp, smooth = (
        FIGURES[kind].draw([one], with_options(interpolation=how)) for how in ("nearest", "bicubic")
    )
    pairs = [
        (a.picture, b.picture)
        for row, other in zip(sharp.rows, smooth.rows, strict=True)
        for a, b in zip(row, other, strict=True)
        if a.title == "60 % mass"
    ]
    assert len(pairs) == 1
    np.testing.assert_array_equal(*pairs[0])


# -- large images ----------------------------------------------------------------------------------


def test_large_images_are_drawn_at_the_resolution_of_the_page():
    one = result(size=(400, 640), patch=16, heads=1)
    sheet = FIGURES["grid"].draw([one], with_options(width="2", dpi=100))
    assert {cell.picture.shape for cell in sheet.rows[0]} == {(100, 160, 3)}
    assert {
        c.picture.shape
        for c in FIGURES["grid"].draw([one], with_options(width="3.2", dpi=100)).rows[0]
    } == {(200, 320, 3)}
    width = WIDTHS["icml"]
    (row,) = (
        FIGURES["grid"].draw([one], with_options(width="icml", dpi=math.ceil(640 / width))).rows
    )
    assert {cell.picture.shape for cell in row} == {(400, 640, 3)}
    assert sheet.data["image_0"].shape == (400, 640, 3)  # in full resolution


# -- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "rows", "columns", "blank"),
    [(1, 1, 2, 0), (2, 1, 4, 0), (3, 1, 6, 0), (4, 2, 6, 4), (6, 2, 6, 0), (8, 3, 6, 2)],
)
def test_short_rows_of_one_shape_stand_side_by_side(images, rows, columns, blank):
    sheet = FIGURES["pca"].draw([result(n, name=f"image{n}") for n in range(images)], CONFIG)
    assert [len(row) for row in sheet.rows] == rows * [columns]
    cells = [cell for row in sheet.rows for cell in row]
    assert [is_blank(cell) for cell in cells] == (2 * images) * [False] + blank * [True]
    for n in range(images):
        assert_same(cells[2 * n].picture, as_uint8(canvas_image(result(n).image)[0]), share=1)
    assert [cell.title for cell in sheet.rows[0]] == (columns // 2) * [
        "image",
        "patch features, PCA",
    ]
    assert all(not cell.title for row in sheet.rows[1:] for cell in row)


def test_rows_of_different_shapes_or_of_many_pictures_are_not_packed():
    shapes = FIGURES["pca"].draw([result(0), result(1, size=(56, 40))], CONFIG)
    assert [len(row) for row in shapes.rows] == [2, 2]
    many = FIGURES["grid"].draw([result(n) for n in range(3)], CONFIG)  # four in each
    assert [len(row) for row in many.rows] == [4, 4, 4]
    few = FIGURES["grid"].draw(
        [result(n, heads=2) for n in range(3)], CONFIG
    )  # three in each, two side by side
    assert [len(row) for row in few.rows] == [6, 6]
    assert titles_of(few) == [2 * ["image", "head 0", "head 1"], 6 * [""]]
    assert [is_blank(cell) for cell in few.rows[1]] == 3 * [False] + 3 * [True]


# -- one image over time ---------------------------------------------------------------------------


def test_heads_may_be_compared_on_limits_of_a_whole_video():
    one = result(heads=2)
    canvas = Canvas(one, CONFIG)
    own = [ends_of(m) for m in one.attention]
    np.testing.assert_array_equal(canvas.heads(one.attention), canvas.heads(one.attention, own))
    wider = [(low, 10 * high) for low, high in own]
    assert canvas.heads(one.attention, wider).max() < canvas.heads(one.attention).max()


def test_sixteen_heads_are_wrapped_under_each_image():
    results = [result(1, heads=16), result(2, heads=16)]
    sheet = FIGURES["grid"].draw(results, with_options())
    assert [len(row) for row in sheet.rows] == [9] * 4
    assert titles_of(sheet)[:2] == [
        ["image", *(f"head {h}" for h in range(8))],
        ["", *(f"head {h}" for h in range(8, 16))],
    ]
    assert (sheet.rows[1][0].picture == 255).all()
    assert_same(sheet.rows[2][0].picture, as_uint8(canvas_image(results[1].image)[0]), share=1)
