"""Pictures against naive loops and a simulation of colour blindness."""

import itertools

import matplotlib
import numpy as np
import pytest

from dino_xcit.figures.drawing import as_cell
from dino_xcit.figures.pictures import (
    HEAD_COLOURS,
    canvas_image,
    composite,
    cut_out,
    head_colours,
    heat,
    overlay,
    rgb,
    upsample,
)

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
COLOUR_VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
GREY = (0.299, 0.587, 0.114)


def picture(seed, height, width):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


# -- colours of heads ------------------------------------------------------------------------------


def cielab(colours, vision):
    """sRGB in [0, 1] (n, 3) -> CIELAB (D65), as seen with this colour vision."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(COLOUR_VISION[vision]).T).clip(0, 1)
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
    xyz = seen @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@pytest.mark.parametrize("vision", COLOUR_VISION)
@pytest.mark.parametrize(("heads", "distance"), [(4, 45), (8, 25), (16, 12)])
def test_colours_of_heads_are_distinguishable_with_any_colour_vision(heads, distance, vision):
    lab = cielab(head_colours(heads), vision)
    for one, other in itertools.combinations(range(heads), 2):
        assert np.linalg.norm(lab[one] - lab[other]) >= distance, (
            HEAD_COLOURS[one],
            HEAD_COLOURS[other],
        )


def test_beyond_sixteen_heads_colours_repeat():
    colours = head_colours(19)
    assert colours.shape == (19, 3)
    assert len(np.unique(colours, axis=0)) == 16
    np.testing.assert_array_equal(colours[16:], colours[:3])
    np.testing.assert_allclose(colours[0] * 255, [0xFF, 0xCC, 0x33])


# -- images to draw over ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (4, (0, 1, 2))]
)
def test_any_number_of_channels_becomes_rgb(channels, expected):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    np.testing.assert_array_equal(rgb(image), np.stack([image[..., i] for i in expected], axis=-1))


@pytest.mark.parametrize(
    ("height", "width", "times"),
    [(32, 20, 8), (3, 100, 3), (256, 10, 1), (255, 10, 2), (128, 128, 2), (129, 1, 2)],
)
def test_small_images_are_magnified_until_the_long_side_has_256_pixels(height, width, times):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels, patch = canvas_image(image, 4, 10_000)
    assert patch == 4 * times
    assert pixels.shape == (height * times, width * times, 3)
    for y, x in [(0, 0), (height * times - 1, width * times - 1), (height * times // 2, times)]:
        np.testing.assert_allclose(
            pixels[y, min(x, width * times - 1)],
            image[y // times, min(x // times, width - 1)] / 255,
        )


@pytest.mark.parametrize(
    ("height", "width", "patch", "largest", "block"),
    [
        (300, 400, 8, 400, 1),
        (300, 400, 8, 399, 2),
        (301, 403, 8, 202, 2),
        (301, 403, 8, 201, 4),
        (403, 301, 8, 10, 8),  # a patch is a pixel at least
        (303, 260, 4, 10, 4),
        (303, 260, 6, 10, 2),  # 4 does not divide 6
        (303, 260, 5, 10, 1),
        (256, 200, 8, 10, 1),  # not large
    ],
)
def test_of_large_images_the_mean_of_blocks_is_drawn(height, width, patch, largest, block):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels, canvas_patch = canvas_image(image, patch, largest)
    assert canvas_patch == patch // block
    assert pixels.shape == (-(-height // block), -(-width // block), 3)
    last = pixels.shape[0] - 1, pixels.shape[1] - 1
    for y, x in [(0, 0), last, (0, last[1]), (last[0], 0), (7, 11)]:  # the last blocks may be cut
        of_block = image[y * block : (y + 1) * block, x * block : (x + 1) * block]
        np.testing.assert_allclose(pixels[y, x], of_block.reshape(-1, 3).mean(0) / 255, rtol=1e-4)


# -- maps to pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 3, 8, 16, 24, 44, 64])
def test_nearest_repeats_each_patch_exactly(patch):
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    values = upsample(maps, 3 * patch, 4 * patch, patch, "nearest")
    np.testing.assert_array_equal(values, maps.repeat(patch, 1).repeat(patch, 2))


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_patches_beyond_the_image_are_cut(interpolation):
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    whole = upsample(maps, 24, 32, 8, interpolation)
    cut = upsample(maps, 19, 26, 8, interpolation)
    assert cut.shape == (2, 19, 26)
    np.testing.assert_array_equal(cut, whole[:, :19, :26])


def keys_kernel(t):
    """Keys' cubic convolution with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def naive_bicubic(one_map, patch):
    rows, columns = one_map.shape
    found = np.zeros((rows * patch, columns * patch))
    for y, x in np.ndindex(found.shape):
        v, u = (y + 0.5) / patch - 0.5, (x + 0.5) / patch - 0.5
        for i in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
            for j in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                neighbour = one_map[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
                found[y, x] += keys_kernel(v - i) * keys_kernel(u - j) * neighbour
    return found.clip(one_map.min(), one_map.max())


def test_bicubic_is_cubic_convolution_and_never_leaves_the_range_of_the_map():
    one_map = (
        np.random.default_rng(0).random((4, 5)).astype(np.float32) ** 6
    )  # sharp: the cubic overshoots
    values = upsample(one_map, 16, 20, 4, "bicubic")
    np.testing.assert_allclose(values, naive_bicubic(one_map, 4), atol=1e-5)
    assert values.min() == one_map.min()
    assert values.max() == one_map.max()
    assert len(np.unique(values)) > 100


def test_bicubic_keeps_the_symmetry_of_a_map():
    one_map = np.array([[0, 1, 0], [2, 5, 2], [0, 1, 0]], np.float32)
    values = upsample(one_map, 24, 24, 8, "bicubic")
    np.testing.assert_allclose(values, values[::-1, ::-1], atol=1e-5)
    np.testing.assert_allclose(values, values[:, ::-1], atol=1e-5)


def test_maps_may_have_any_strides():
    maps = np.random.default_rng(0).random((4, 3, 2)).transpose(2, 1, 0)[:, ::-1]
    values = upsample(maps, 6, 8, 2, "nearest")
    np.testing.assert_allclose(values, maps.repeat(2, 1).repeat(2, 2), rtol=1e-6)


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("colormap", ["inferno", "viridis", "gray"])
def test_heat_is_matplotlibs_colormap_between_the_limits(colormap):
    values = np.random.default_rng(0).random((5, 6)) * 4 - 1
    expected = matplotlib.colormaps[colormap](
        matplotlib.colors.Normalize(0, 2, clip=True)(values).filled()
    )[..., :3]
    found = heat(values, 0, 2, colormap)
    assert found.shape == (5, 6, 3)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(
        heat(np.array([0.0, 2.0]), 0, 2, colormap), heat(np.array([-9.0, 9.0]), 0, 2, colormap)
    )


def test_heat_of_a_flat_map_is_one_colour():
    colours = heat(np.full((3, 4), 0.2), 0.2, 0.2, "viridis")
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 1
    np.testing.assert_allclose(colours[0, 0], matplotlib.colormaps["viridis"](0.0)[:3])


def grey_of(pixel):
    return sum(weight * part for weight, part in zip(GREY, pixel, strict=True))


def test_overlay_and_cut_out_pixel_by_pixel():
    image, colours = picture(0, 4, 5), picture(1, 4, 5)
    mask = np.random.default_rng(2).random((4, 5)) < 0.5
    over, kept = overlay(image, colours), cut_out(image, mask)
    for y, x in np.ndindex(4, 5):
        np.testing.assert_allclose(
            over[y, x], 0.4 * grey_of(image[y, x]) + 0.6 * colours[y, x], rtol=1e-5
        )
        expected = image[y, x] if mask[y, x] else 3 * [0.25 * grey_of(image[y, x])]
        np.testing.assert_allclose(kept[y, x], expected, rtol=1e-5)


def test_composite_pixel_by_pixel():
    image = picture(0, 4, 5)
    values = np.random.default_rng(1).random((3, 4, 5)).astype(np.float32)
    limits = [(0.1, 0.8), (0.0, 2.0), (0.3, 0.4)]
    found = composite(image, values, limits)
    seen = set()
    for y, x in np.ndindex(4, 5):
        places = [
            min(max((values[h, y, x] - low) / (high - low), 0), 1)
            for h, (low, high) in enumerate(limits)
        ]
        strongest = max(range(3), key=lambda h: places[h])
        seen.add(strongest)
        colour = matplotlib.colors.to_rgb(HEAD_COLOURS[strongest])
        expected = [
            0.6 * (1 - places[strongest]) * grey_of(image[y, x]) + places[strongest] * part
            for part in colour
        ]
        np.testing.assert_allclose(found[y, x], expected, rtol=1e-4, atol=1e-6)
    assert len(seen) > 1


def test_a_head_that_looks_everywhere_alike_has_no_part_in_the_composite():
    image = picture(0, 2, 2)
    values = np.stack([np.full((2, 2), 0.25, np.float32), np.array([[0, 1], [0, 1]], np.float32)])
    found = composite(image, values, [(0.25, 0.25), (0, 1)])
    np.testing.assert_allclose(
        found[:, 1], [matplotlib.colors.to_rgb(HEAD_COLOURS[1])] * 2, atol=1e-6
    )
    np.testing.assert_allclose(found[0, 0], 3 * [0.6 * grey_of(image[0, 0])], rtol=1e-5)


def test_cells_round_to_the_nearest_of_256_and_never_wrap_around():
    one = as_cell(np.array([[[0, 1, 0.499 / 255], [0.501 / 255, 1.0000001, 0.5]]]), "title", "note")
    assert one.picture.tolist() == [[[0, 255, 0], [1, 255, 128]]]
    assert one.picture.dtype == np.uint8
    assert (one.title, one.note) == ("title", "note")
    white, most = np.ones((1, 1, 3), np.float32), np.ones((1, 1), np.float32)
    for brightest in (
        overlay(white, white),
        composite(white, most[None], [(0, 1)]),
        cut_out(white, most > 0),
    ):
        assert as_cell(brightest).picture.max() == 255
