"""Attention pages for tests: synthetic images, and a page in a browser."""

from __future__ import annotations

import numpy as np

from dino_xcit.figures.page import Exhibit, write_page

CLIP = 0.05
COLOURS = [(0.9, 0.6, 0.0), (0.3, 0.7, 0.9), (0.0, 0.6, 0.5)]
HOSTILE = "</script><img src=x onerror=window.hacked=1>.png"


def make_exhibit(seed=0, *, name="cat.png", size=(37, 45), patch=8, heads=3, axes=10):
    rng = np.random.default_rng(seed)
    h, w = -(-size[0] // patch), -(-size[1] // patch)
    attention = rng.random((heads, h, w)) ** 4 + 1e-4
    attention *= np.linspace(0.7, 0.9, heads)[:, None, None] / attention.sum((1, 2), keepdims=True)
    return Exhibit(
        name=name,
        image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        patch=patch,
        attention=attention.astype(np.float32),
        features=rng.standard_normal((axes, h, w)).astype(np.float32) + 0.7 if axes else None,
    )


def write_exhibits(path, *exhibits, **changes):
    options = {
        "title": "Attention",
        "threshold": 0.6,
        "clip": CLIP,
        "colormap": "viridis",
        "colours": COLOURS,
    }
    write_page(path, exhibits, **{**options, **changes})
    return path


def cosines(features):
    """(C, h, w) -> (h w, h w)"""
    unit = features.reshape(len(features), -1).T.astype(float)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T
