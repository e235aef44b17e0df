"""Synthetic results, and the pictures that sheets must show of them, drawn in another way."""

import dataclasses
import math

import matplotlib
import numpy as np

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.figures.model import AttentionResult

CONFIG = AttentionConfig(weights=("run",), clip=0.0)
GREY = np.array([0.299, 0.587, 0.114])


def result(seed=0, *, size=(40, 56), patch=8, heads=3, name="cat", channels=3, d=6, largest=1.0):
    """A synthetic result: its grid covers the image, or more; `largest` scales its maps."""
    rng = np.random.default_rng(seed)
    rows, columns = (-(-side // patch) for side in size)
    attention = rng.random((heads, rows, columns)) ** 3
    attention = (
        largest
        * attention
        / attention.sum((1, 2), keepdims=True)
        * rng.uniform(0.5, 1, (heads, 1, 1))
    )
    return AttentionResult(
        name=name,
        image=rng.integers(0, 256, (*size, channels), dtype=np.uint8),
        patch=patch,
        attention=attention.astype(np.float32),
        queries=rng.random((heads, rows, columns)).astype(np.float32),
        keys=(2 * rng.random((heads, rows, columns))).astype(np.float32),
        covariance=rng.uniform(-1, 1, (heads, d, d)).astype(np.float32),
        features=rng.normal(size=(10, rows, columns)).astype(np.float32) + 0.3,
    )


def with_options(**options):
    if "point" in options:
        options["figures"] = ("similarity",)
    return dataclasses.replace(CONFIG, **options)


def canvas_image(image):
    """The image in [0, 1] as sheets show it, at least 256 pixels wide or high, and its factor."""
    times = math.ceil(256 / max(image.shape[:2]))
    image = image if image.shape[-1] == 3 else image.repeat(3, axis=-1)
    return image.repeat(times, 0).repeat(times, 1) / 255, times


def drawn_map(one_map, image, patch, limits, colormap="inferno"):
    """A map drawn from the arrays beside the sheet, nearest interpolation: uint8."""
    pixels, times = canvas_image(image)
    values = one_map.repeat(patch * times, 0).repeat(patch * times, 1)[
        : len(pixels), : pixels.shape[1]
    ]
    low, high = limits
    return as_uint8(
        matplotlib.colormaps[colormap](((values - low) / (high - low)).clip(0, 1))[..., :3]
    )


def as_uint8(picture):
    return np.rint(255 * np.asarray(picture, np.float64)).astype(np.uint8)


def assert_same(found, expected, share=0.999):
    """The same pixels, but for rounding."""
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int)).max(-1)
    assert (difference <= 2).mean() >= share


def ends_of(*maps):
    return min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)


def titles_of(sheet):
    return [[cell.title for cell in row] for row in sheet.rows]


def is_blank(cell):
    return bool((cell.picture == 255).all()) and not cell.title and not cell.note
