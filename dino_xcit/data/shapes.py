"""The embedded image set: textured objects on a plain ground, with labels and object masks.

An image is a function of the seed, the split and its index. Its class is the texture of the object.
The texture's phase and bend, the object's outline and place, brightness and contrast do not depend
on it. So nearest neighbours in pixel space often have another class, while a network that knows a
texture at any place and in any light separates the classes.

NumPy only: this module imports no torch.
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
PERIOD = 5.0  # of the regular textures, in pixels of a 32 x 32 image
COUNT = 10000  # training images, unless --num_images is given
VALIDATION_COUNT = 2000


class Shape(NamedTuple):
    """One embedded image."""

    image: np.ndarray
    """uint8 (size, size, channels)"""
    label: int
    """index into CLASSES"""
    mask: np.ndarray
    """bool (size, size): where the object is"""


def draw_shape(seed: int, split: str, index: int, channels: int = 3, size: int = SIZE) -> Shape:
    """Draw one image; it depends on the arguments alone."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    label = index % len(CLASSES)
    # In pixels of a 32 x 32 image, from the centre.
    y, x = (np.mgrid[:size, :size] + 0.5) / size * SIZE - SIZE / 2
    centre = rng.uniform(-6, 6, 2)
    mask = _outline(rng, x - centre[0], y - centre[1])
    angle = rng.uniform(-0.2, 0.2)
    u = np.cos(angle) * x + np.sin(angle) * y + _bend(rng, x, y)
    v = np.cos(angle) * y - np.sin(angle) * x + _bend(rng, x, y)
    texture = _texture(rng, CLASSES[label], u, v)
    # Standardised, so that brightness and contrast do not depend on the class.
    texture = (texture - texture[mask].mean()) / texture[mask].std()
    contrast = np.exp(rng.uniform(np.log(0.06), np.log(0.3)))
    slope = rng.normal(0, 0.005, 2)
    ground = rng.uniform(0.3, 0.7) + slope[0] * x + slope[1] * y
    image = np.where(mask, rng.uniform(0.3, 0.7) + contrast * texture, ground)
    image = image + rng.normal(0, 0.02, mask.shape)
    grey = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return Shape(np.repeat(grey[..., None], channels, axis=2), label, mask)


def _outline(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sample a blob around (0, 0): a circle whose radius varies with the direction."""
    direction = np.arctan2(y, x)
    radius = rng.uniform(10, 14)
    for lobes in (2, 3, 5):
        wave = rng.uniform(0, 0.15) * np.cos(lobes * direction + rng.uniform(0, 2 * np.pi))
        radius = radius * (1 + wave)
    inside: np.ndarray = np.hypot(x, y) < radius
    return inside


def _bend(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sample a smooth displacement, in pixels."""
    direction, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(14, 22)
    along = np.cos(direction) * x + np.sin(direction) * y
    displacement: np.ndarray = 1.2 * np.sin(frequency * along + phase)
    return displacement


def _texture(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Sample the texture of a class at the coordinates (u, v), in pixels."""
    wave = 2 * np.pi / (PERIOD * rng.uniform(0.85, 1.15))
    a, b = wave * u + rng.uniform(0, 2 * np.pi), wave * v + rng.uniform(0, 2 * np.pi)
    texture: np.ndarray
    if name == "rows":
        texture = np.sin(b)
    elif name == "columns":
        texture = np.sin(a)
    elif name == "slants":
        texture = np.sin((a + rng.choice([-1, 1]) * b) * 0.75)
    elif name == "checks":
        texture = np.sin(a) * np.sin(b)
    elif name == "diamonds":
        texture = np.sin(a) + np.sin(b)
    elif name == "rings":
        centre = rng.uniform(-8, 8, 2)
        texture = np.sin(wave * np.hypot(u - centre[0], v - centre[1]))
    elif name == "dots":
        texture = np.where(np.sin(a) + np.sin(b) > 0.9, 1.0, 0.0)
    elif name == "bricks":
        odd_row = np.floor(b / (2 * np.pi)) % 2
        texture = np.maximum(np.sin(b), np.sin(a + np.pi * odd_row) - 0.3)
    elif name == "waves":
        texture = np.sin(b + 1.5 * np.sin(0.5 * a))
    else:  # speckle
        cells = rng.choice([-1.0, 1.0], (32, 32))
        texture = cells[np.floor(u / 2).astype(int) % 32, np.floor(v / 2).astype(int) % 32]
    return texture
