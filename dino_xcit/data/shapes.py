"""The embedded image set: textured objects on a plain ground, drawn from the seed, labelled, with object masks.

The class is the texture of the object. Its phase, its bending, the outline and place of the object, brightness and contrast
say nothing about it. So neighbours in pixel space are poor witnesses, while a network that recognises a texture
wherever it lies and however it is lit tells the classes apart. NumPy only: this room imports no torch.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

CLASSES = (
    "rows",
    "columns",
    "slants",
    "checks",
    "diamonds",
    "rings",
    "dots",
    "bricks",
    "waves",
    "speckle",
)
SIZE = 32  # pixels
PERIOD = 5.0  # pixels of a 32 x 32 image, of the regular textures
COUNT = 10000  # drawn when --num_images does not say otherwise
VALIDATION_COUNT = 2000


class Shape(NamedTuple):
    image: np.ndarray
    """uint8 (size, size, channels)"""
    label: int
    """index into CLASSES"""
    mask: np.ndarray
    """bool (size, size): where the object is"""


def draw_shape(seed: int, split: str, index: int, channels: int = 3, size: int = SIZE) -> Shape:
    """The same image for the same arguments, whatever was drawn before."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    label = index % len(CLASSES)
    y, x = (
        np.mgrid[:size, :size] + 0.5
    ) / size * SIZE - SIZE / 2  # in pixels of a 32 x 32 image, from the centre
    centre = rng.uniform(-6, 6, 2)
    mask = _outline(rng, x - centre[0], y - centre[1])
    angle = rng.uniform(-0.2, 0.2)
    u = np.cos(angle) * x + np.sin(angle) * y + _bend(rng, x, y)
    v = np.cos(angle) * y - np.sin(angle) * x + _bend(rng, x, y)
    texture = _texture(rng, CLASSES[label], u, v)
    texture = (texture - texture[mask].mean()) / texture[
        mask
    ].std()  # so that brightness and contrast do not tell the class
    contrast = np.exp(rng.uniform(np.log(0.06), np.log(0.3)))
    slope = rng.normal(0, 0.005, 2)
    ground = rng.uniform(0.3, 0.7) + slope[0] * x + slope[1] * y
    picture = np.where(mask, rng.uniform(0.3, 0.7) + contrast * texture, ground) + rng.normal(
        0, 0.02, mask.shape
    )
    grey = np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
    return Shape(np.repeat(grey[..., None], channels, axis=2), label, mask)


def _outline(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A blob around (0, 0): a circle whose radius wavers with the direction."""
    direction = np.arctan2(y, x)
    radius = rng.uniform(10, 14)
    for lobes in (2, 3, 5):
        radius = radius * (
            1 + rng.uniform(0, 0.15) * np.cos(lobes * direction + rng.uniform(0, 2 * np.pi))
        )
    return np.hypot(x, y) < radius


def _bend(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth displacement in pixels."""
    direction, phase = rng.uniform(0, 2 * np.pi, 2)
    return 1.2 * np.sin(
        2 * np.pi / rng.uniform(14, 22) * (np.cos(direction) * x + np.sin(direction) * y) + phase
    )


def _texture(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    wave = 2 * np.pi / (PERIOD * rng.uniform(0.85, 1.15))
    a, b = wave * u + rng.uniform(0, 2 * np.pi), wave * v + rng.uniform(0, 2 * np.pi)
    if name == "rows":
        return np.sin(b)
    if name == "columns":
        return np.sin(a)
    if name == "slants":
        return np.sin((a + rng.choice([-1, 1]) * b) * 0.75)
    if name == "checks":
        return np.sin(a) * np.sin(b)
    if name == "diamonds":
        return np.sin(a) + np.sin(b)
    if name == "rings":
        centre = rng.uniform(-8, 8, 2)
        return np.sin(wave * np.hypot(u - centre[0], v - centre[1]))
    if name == "dots":
        return np.where(np.sin(a) + np.sin(b) > 0.9, 1.0, 0.0)
    if name == "bricks":
        return np.maximum(np.sin(b), np.sin(a + np.pi * (np.floor(b / (2 * np.pi)) % 2)) - 0.3)
    if name == "waves":
        return np.sin(b + 1.5 * np.sin(0.5 * a))
    cells = rng.choice([-1.0, 1.0], (32, 32))  # speckle
    return cells[np.floor(u / 2).astype(int) % 32, np.floor(v / 2).astype(int) % 32]
