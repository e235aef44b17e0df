"""Sheets of synthetic results: which pictures stand where, with which arrays."""

import dataclasses
import json
from typing import get_args

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

from dino_xcit.config.attention import AttentionConfig, FigureKind
from dino_xcit.figures.canvas import Canvas
from dino_xcit.figures.drawing import write
from dino_xcit.figures.maps import mass_mask, pca_colours
from dino_xcit.figures.pictures import HEAD_COLOURS
from dino_xcit.figures.sheets import FIGURES, columns_sheet

OF_ONE_MODEL = [kind for kind, row in FIGURES.items() if row.models == "first" and kind != "files"]


# -- every sheet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_ONE_MODEL)
@pytest.mark.parametrize(
    "results",
    [
        [result()],
        [result(size=(37, 51), channels=1)],  # padded and grey
        [result(0), result(1, name="dog")],
        [
            result(0),
            result(1, size=(56, 24), name="dog"),
            result(2, size=(9, 70), patch=4, name="bird", channels=1),
        ],  # aspects differ
        [result(n, heads=8, name=f"image{n}", size=(24, 24)) for n in range(2)],
    ],
    ids=["one", "padded", "two", "aspects", "eight heads"],
)
@pytest.mark.slow
def test_every_sheet_can_be_written_and_its_options_read(kind, results, tmp_path):
    sheets = (
        [FIGURES[kind].draw([one], CONFIG) for one in results]
        if FIGURES[kind].per_image
        else [FIGURES[kind].draw(results, CONFIG)]
    )
    for sheet in sheets:
        assert len({len(row) for row in sheet.rows}) == 1  # as many in each row
        for row in sheet.rows:
            for cell in row:
                assert cell.picture.dtype == np.uint8
                assert cell.picture.shape[-1] == 3
        *_, numbers = write(sheet, tmp_path, ["png"], width=3, titles=True, dpi=30)
        with np.load(numbers, allow_pickle=False) as data:
            assert json.loads(str(data["options"]))["threshold"] == CONFIG.threshold
            assert AttentionConfig(**as_tuples(json.loads(str(data["options"])))) == CONFIG
            shown = [results[0]] if FIGURES[kind].per_image and len(results) == 1 else results
            if not FIGURES[kind].per_image:
                assert data["names"].tolist() == [one.name for one in shown]
                for number, one in enumerate(shown):
                    np.testing.assert_array_equal(data[f"image_{number}"], one.image)
                    np.testing.assert_array_equal(data[f"attention_{number}"], one.attention)
                    assert data["patch"][number] == one.patch
            else:
                assert data["names"].tolist() == [sheet.name.removeprefix(f"{kind}_")]
    names = [sheet.name for sheet in sheets]
    assert names == (
        [f"{kind}_{one.name}" for one in results] if FIGURES[kind].per_image else [kind]
    )


def as_tuples(options):
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }


def test_every_kind_of_figure_that_can_be_typed_has_a_row():
    assert set(FIGURES) == set(get_args(FigureKind))


# By image, then by model, as `FigureRow.draw` takes them.
@pytest.mark.parametrize("kind", ["models", "training"])
def test_figures_of_several_models_have_a_column_for_each(kind):
    results = [
        dataclasses.replace(result(10 * image + number, name=f"image{image}"), model=title)
        for image in range(2)
        for number, title in enumerate(("a", "b", "c"))
    ]
    sheet = FIGURES[kind].draw(results, CONFIG)
    expected = columns_sheet(kind, ["a", "b", "c"], [results[:3], results[3:]], CONFIG)
    assert sheet.name == kind
    assert titles_of(sheet) == titles_of(expected)
    for row, other in zip(sheet.rows, expected.rows, strict=True):
        for one, two in zip(row, other, strict=True):
            np.testing.assert_array_equal(one.picture, two.picture)
    np.testing.assert_array_equal(sheet.data["attention_1_of_c"], results[5].attention)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    [result(), result(size=(37, 51), channels=1), result(heads=8)],
    ids=["plain", "padded", "eight"],
)
def test_heads_are_drawn_from_the_arrays_beside_the_sheet(one):
    sheet = FIGURES["heads"].draw([one], CONFIG)
    heads = len(one.attention)
    cells = [cell for row in sheet.rows for cell in row]
    data = sheet.data
    image, maps, patch = data["image_0"], data["attention_0"], int(data["patch"][0])
    pixels, times = canvas_image(image)
    assert [cell.title for cell in cells][: heads + 4] == [
        *("image", *(f"head {i}" for i in range(heads)), "mean", "60 % mass", "all heads")
    ]
    assert all(is_blank(cell) for cell in cells[heads + 4 :])
    assert_same(cells[0].picture, as_uint8(pixels), share=1)
    for head in range(heads):
        assert_same(
            cells[1 + head].picture, drawn_map(maps[head], image, patch, ends_of(maps[head]))
        )
        p = maps[head].astype(float) / maps[head].astype(float).sum()
        assert cells[1 + head].note == f"{-(p * np.log(p)).sum():.2f} nats"
    mean = maps.mean(0)
    assert_same(cells[1 + heads].picture, drawn_map(mean, image, patch, ends_of(mean)))

    mask = mass_mask(torch.from_numpy(mean), 0.6).numpy()
    side = patch * times
    mask = mask.repeat(side, 0).repeat(side, 1)[: len(pixels), : pixels.shape[1], None]
    assert_same(
        cells[2 + heads].picture,
        as_uint8(np.where(mask, pixels, 0.25 * (pixels @ GREY)[..., None])),
    )

    places = np.stack([(m - m.min()) / (m.max() - m.min()) for m in maps])
    places = places.repeat(side, 1).repeat(side, 2)[:, : len(pixels), : pixels.shape[1]]
    colours = np.array([matplotlib.colors.to_rgb(HEAD_COLOURS[head]) for head in range(heads)])
    strongest = places.max(0)[..., None]
    expected = (
        0.6 * (1 - strongest) * (pixels @ GREY)[..., None] + strongest * colours[places.argmax(0)]
    )
    assert_same(cells[3 + heads].picture, as_uint8(expected))


@pytest.mark.parametrize(
    ("heads", "rows", "columns"),
    [(1, 1, 5), (2, 1, 6), (3, 2, 4), (4, 2, 4), (8, 2, 6), (16, 4, 5)],
)
def test_heads_are_wrapped_into_rows_as_even_as_can_be(heads, rows, columns):
    sheet = FIGURES["heads"].draw([result(heads=heads)], CONFIG)
    assert [len(row) for row in sheet.rows] == rows * [columns]
    blank = [is_blank(cell) for row in sheet.rows for cell in row]
    assert blank == (heads + 4) * [False] + (rows * columns - heads - 4) * [True]


def test_the_title_of_a_mask_has_its_share():
    sheet = FIGURES["heads"].draw([result()], with_options(threshold=0.125))
    assert "12.5 % mass" in [title for row in titles_of(sheet) for title in row]


# -- sheets of several images ----------------------------------------------------------------------


def test_grid_has_a_row_for_each_image_and_a_column_for_each_head():
    results = [result(0, heads=6), result(1, heads=6, size=(56, 24), name="dog")]
    sheet = FIGURES["grid"].draw(results, CONFIG)
    assert titles_of(sheet) == [["image", *(f"head {i}" for i in range(6))], 7 * [""]]
    for row, one in zip(sheet.rows, results, strict=True):
        assert_same(row[0].picture, as_uint8(canvas_image(one.image)[0]), share=1)
        for head, cell in enumerate(row[1:]):
            assert_same(
                cell.picture,
                drawn_map(one.attention[head], one.image, 8, ends_of(one.attention[head])),
            )


@pytest.mark.parametrize("head", [None, 2])
def test_overlay_shows_the_map_over_the_image_and_what_holds_the_mass(head):
    one = result(size=(37, 51))
    chosen = one.attention.mean(0) if head is None else one.attention[head]
    sheet = FIGURES["overlay"].draw([one], with_options(head=head, threshold=0.3))
    ((_, over, cut, heads),) = sheet.rows
    assert titles_of(sheet) == [
        ["image", "mean" if head is None else "head 2", "30 % mass", "all heads"]
    ]
    pixels, times = canvas_image(one.image)
    colours = drawn_map(chosen, one.image, 8, ends_of(chosen)) / 255
    assert_same(over.picture, as_uint8(0.4 * (pixels @ GREY)[..., None] + 0.6 * colours))
    mask = (
        mass_mask(torch.from_numpy(chosen), 0.3).numpy().repeat(8 * times, 0).repeat(8 * times, 1)
    )
    mask = mask[: len(pixels), : pixels.shape[1], None]
    assert_same(cut.picture, as_uint8(np.where(mask, pixels, 0.25 * (pixels @ GREY)[..., None])))
    np.testing.assert_array_equal(heads.picture, as_uint8(Canvas(one, CONFIG).heads(one.attention)))


def test_several_heads_are_the_columns_of_the_grid_and_averaged_over_the_image():
    one, options = result(heads=4), with_options(head=(3, 1))
    sheet = FIGURES["grid"].draw([one], options)
    assert titles_of(sheet) == [["image", "head 3", "head 1"]]
    of_head = one.attention[3]
    assert_same(sheet.rows[0][1].picture, drawn_map(of_head, one.image, 8, ends_of(of_head)))
    over = FIGURES["overlay"].draw([one], options)
    assert titles_of(over)[0][1] == "mean of heads 3, 1"
    mean = one.attention[[3, 1]].mean(0)
    expected = FIGURES["overlay"].draw(
        [dataclasses.replace(one, attention=np.stack([mean, mean]))], CONFIG
    )
    np.testing.assert_array_equal(over.rows[0][1].picture, expected.rows[0][1].picture)


def test_columns_have_a_row_for_each_image_and_a_column_for_each_backbone():
    results = [
        [result(10 * i + j, name=f"image{i}", size=(40 + 8 * i, 56)) for j in range(6)]
        for i in range(2)
    ]
    for of_image in results:  # backbones see the same pixels
        for j, one in enumerate(of_image):
            of_image[j] = dataclasses.replace(one, image=of_image[0].image)
    titles = [f"epoch {j}" for j in range(6)]
    sheet = columns_sheet("training", titles, results, with_options(head=(1,)))
    assert sheet.name == "training"
    assert titles_of(sheet) == [["image", *titles], 7 * [""]]
    for i, row in enumerate(sheet.rows):
        assert_same(row[0].picture, as_uint8(canvas_image(results[i][0].image)[0]), share=1)
        for title, one, cell in zip(titles, results[i], row[1:], strict=True):
            assert_same(
                cell.picture, drawn_map(one.attention[1], one.image, 8, ends_of(one.attention[1]))
            )
            np.testing.assert_array_equal(sheet.data[f"attention_{i}_of_{title}"], one.attention)
            assert sheet.data[f"patch_of_{title}"][i] == one.patch
            assert sheet.data[f"names_of_{title}"].tolist() == ["image0", "image1"]


def test_backbones_of_different_patches_are_drawn_on_the_same_image():
    fine, coarse = result(0, size=(48, 64), patch=8), result(1, size=(48, 64), patch=16)
    coarse = dataclasses.replace(coarse, image=fine.image)
    sheet = columns_sheet("models", ["fine", "coarse"], [[fine, coarse]], CONFIG)
    for cell, one in zip(sheet.rows[0][1:3], (fine, coarse), strict=True):
        mean = one.attention.mean(0)
        assert_same(cell.picture, drawn_map(mean, one.image, one.patch, ends_of(mean)))


# -- queries, keys, covariance ---------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, 1])
def test_magnitudes_have_queries_above_keys(head):
    one = result(size=(37, 51))
    sheet = FIGURES["magnitude"].draw([one], with_options(head=head))
    heads = range(3) if head is None else [head]
    assert titles_of(sheet) == [["image", *(f"head {h}" for h in heads)]] * 2
    assert [{cell.note for cell in row[1:]} for row in sheet.rows] == [{"queries"}, {"keys"}]
    for row, kind in zip(sheet.rows, ("queries", "keys"), strict=True):
        maps = sheet.data[f"{kind}_0"]
        np.testing.assert_array_equal(maps, getattr(one, kind))
        for h, cell in zip(heads, row[1:], strict=True):
            assert_same(cell.picture, drawn_map(maps[h], one.image, 8, ends_of(maps[h])))
        assert_same(row[0].picture, as_uint8(canvas_image(one.image)[0]), share=1)


@pytest.mark.parametrize("scale", ["image", "figure"])
def test_magnitudes_of_queries_and_keys_share_a_scale_on_request(scale):
    one = result()
    sheet = FIGURES["magnitude"].draw([one], with_options(scale=scale))
    limits = ends_of(one.queries, one.keys)
    for row, maps in zip(sheet.rows, (one.queries, one.keys), strict=True):
        for h, cell in enumerate(row[1:]):
            assert_same(cell.picture, drawn_map(maps[h], one.image, 8, limits))
    if scale == "figure":
        assert (sheet.bar.low, sheet.bar.high, sheet.bar.label) == (*limits, "magnitude")
    else:
        assert sheet.bar is None


@pytest.mark.parametrize("head", [None, 2])
@pytest.mark.parametrize("scale", ["map", "figure"])
def test_covariance_is_drawn_from_minus_one_to_one(scale, head):
    one = result()
    sheet = FIGURES["covariance"].draw(
        [one], with_options(scale=scale, head=head, colormap="viridis")
    )
    heads = range(3) if head is None else [head]
    cells = [cell for row in sheet.rows for cell in row]
    assert [cell.title for cell in cells] == [f"head {h}" for h in heads]
    for h, cell in zip(heads, cells, strict=True):
        expected = matplotlib.colormaps["RdBu_r"]((sheet.data["covariance_0"][h] + 1) / 2)[..., :3]
        assert_same(cell.picture, as_uint8(expected), share=0.98)
    assert (sheet.bar.colormap, sheet.bar.low, sheet.bar.high) == ("RdBu_r", -1, 1)


def test_zero_covariance_is_white_whatever_else_there_is():
    one = dataclasses.replace(
        result(), covariance=np.array([[[0, 0.1], [0.05, 0]]] * 3, np.float32)
    )
    (cells,) = FIGURES["covariance"].draw([one], CONFIG).rows
    assert (cells[0].picture[0, 0] > 240).all()
    assert (cells[0].picture[1, 0] > 215).all()


# -- similarity ------------------------------------------------------------------------------------


def cosines(features, row, column):
    unit = features / np.linalg.norm(features, axis=0)
    return np.einsum("chw,c->hw", unit, unit[:, row, column])


def test_similarity_shares_one_scale_from_at_most_zero_to_one():
    results = [result(0), result(1, size=(37, 51), name="dog")]
    sheet = FIGURES["similarity"].draw(results, with_options(point=(0.5, 0.5)))
    maps = [sheet.data[f"similarity_{i}"] for i in range(2)]
    low = min(float(one.min()) for one in maps)
    assert low < 0
    assert (sheet.bar.low, sheet.bar.high) == (low, 1)
    for number, (row, one) in enumerate(zip(sheet.rows, results, strict=True)):
        np.testing.assert_allclose(
            maps[number], cosines(one.features, *sheet.data[f"patch_{number}"]), atol=1e-6
        )
        assert_same(row[1].picture, drawn_map(maps[number], one.image, 8, (low, 1)))
    assert titles_of(sheet) == [["image", "similarity"], ["", ""]]
    alike = dataclasses.replace(result(), features=1 + 0.1 * np.abs(result().features))
    assert FIGURES["similarity"].draw([alike], CONFIG).bar.low == 0


@pytest.mark.parametrize(
    ("point", "patch"),
    [
        ((0.0, 0.0), (0, 0)),
        ((0.136, 0.19), (0, 0)),
        ((0.99, 0.0), (0, 6)),
        ((0.0, 0.99), (4, 0)),
        ((1.0, 1.0), (4, 6)),
        ((0.3, 0.65), (2, 1)),
    ],
)
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_a_point_is_in_shares_of_the_width_and_of_the_height(point, patch, size):
    """(0.3, 0.65) is pixel (16, 26) of 56 x 40, and pixel (15, 24) of 51 x 37."""
    if point == (0.3, 0.65):
        patch = (3, 2) if size == (40, 56) else (3, 1)
    sheet = FIGURES["similarity"].draw([result(size=size)], with_options(point=point))
    assert tuple(sheet.data["patch_0"]) == patch


@pytest.mark.parametrize("head", [None, 1])
def test_without_a_point_others_are_compared_with_the_patch_most_attended_to(head):
    one = result()
    chosen = one.attention.mean(0) if head is None else one.attention[head]
    sheet = FIGURES["similarity"].draw([one], with_options(head=head))
    row, column = sheet.data["patch_0"]
    assert chosen[row, column] == chosen.max()
    assert sheet.data["similarity_0"][row, column] == pytest.approx(1)


@pytest.mark.parametrize("point", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_a_frame_stands_around_the_patch_and_nothing_else_changes(point, size):
    one = result(size=size)
    one = dataclasses.replace(one, image=one.image // 2)  # no pixel is as red as the frame
    sheet = FIGURES["similarity"].draw([one], with_options(point=point))
    row, column = sheet.data["patch_0"]
    marked = sheet.rows[0][0].picture
    plain = as_uint8(canvas_image(one.image)[0])
    p = 8 * canvas_image(one.image)[1]
    changed = (marked != plain).any(-1)
    assert (marked[changed] == as_uint8([1.0, 0.2, 0.1])).all()
    top, left = row * p, column * p
    bottom, right = min(top + p, len(plain)), min(left + p, plain.shape[1])
    assert not changed[top:bottom, left:right].any()
    thick = max(plain.shape[:2]) // 100
    assert thick > 1
    frame = np.zeros_like(changed)
    frame[max(0, top - thick) : top + p + thick, max(0, left - thick) : left + p + thick] = True
    frame[top:bottom, left:right] = False
    np.testing.assert_array_equal(changed, frame)
    assert changed.any()


# -- principal components --------------------------------------------------------------------------


def test_components_share_a_basis_and_are_drawn_as_they_are():
    results = [result(0), result(1, size=(37, 51), name="dog")]
    sheet = FIGURES["pca"].draw(results, CONFIG)
    expected = pca_colours([torch.from_numpy(one.features) for one in results])
    for number, (row, one) in enumerate(zip(sheet.rows, results, strict=True)):
        colours = sheet.data[f"pca_{number}"]
        np.testing.assert_allclose(colours, expected[number].numpy())
        pixels, times = canvas_image(one.image)
        side = 8 * times
        painted = colours.repeat(side, 0).repeat(side, 1)[: len(pixels), : pixels.shape[1]]
        assert_same(row[1].picture, as_uint8(painted))
    assert titles_of(sheet) == [["image", "patch features, PCA"], ["", ""]]
    assert sheet.bar is None
