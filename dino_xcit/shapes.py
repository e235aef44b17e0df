"""The embedded image set: textured objects on a smooth background, drawn from the seed, labelled, with object masks.

The class is the texture of the object; its place, outline, size, rotation, phase, brightness and contrast say nothing about
it, nor does the background. So neighbours in pixel space are poor witnesses, while a network that recognises a texture
wherever it lies tells the classes apart. NumPy only: this room imports no torch.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

TEXTURES = ("stripes", "waves", "checks", "bricks", "rings", "rays", "dots", "speckle")
SIZE = 32
PERIOD = 5.0  # pixels of a 32 x 32 image, of the regular textures
COUNT = 10000  # drawn when --num_images does not say otherwise
VALIDATION_COUNT = 2000


class Shape(NamedTuple):
    image: np.ndarray
    """uint8 (size, size, channels)"""
    label: int
    """index into TEXTURES"""
    mask: np.ndarray
    """bool (size, size): where the object is"""


def draw_shape(seed: int, split: str, index: int, channels: int = 3, size: int = SIZE) -> Shape:
    """The same image for the same arguments, whatever was drawn before."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    label = index % len(TEXTURES)
    y, x = (np.mgrid[:size, :size] + 0.5) / size * SIZE - SIZE / 2  # in pixels of a 32 x 32 image, from the centre
    centre = rng.uniform(-7, 7, 2)
    mask = _outline(rng, x - centre[0], y - centre[1])
    angle = rng.uniform(0, 2 * np.pi)
    origin = centre + rng.uniform(-6, 6, 2)
    u = np.cos(angle) * (x - origin[0]) + np.sin(angle) * (y - origin[1]) + _warp(rng, x, y)
    v = np.cos(angle) * (y - origin[1]) - np.sin(angle) * (x - origin[0]) + _warp(rng, x, y)
    texture = _texture(rng, TEXTURES[label], u, v)
    texture = (texture - texture[mask].mean()) / texture[mask].std()  # brightness and contrast do not tell the classes
    scene = np.where(mask, 0.35 * texture, 0.0) + rng.normal(0, 0.04, mask.shape)
    image = rng.uniform(0.25, 0.75) + np.exp(rng.uniform(np.log(0.2), np.log(0.8))) * scene
    grey = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return Shape(np.repeat(grey[..., None], channels, axis=2), label, mask)


def _outline(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A blob around (0, 0): a circle whose radius wavers with the direction."""
    direction = np.arctan2(y, x)
    radius = rng.uniform(9, 13)
    for lobes in (2, 3, 5):
        radius = radius * (1 + rng.uniform(0, 0.15) * np.cos(lobes * direction + rng.uniform(0, 2 * np.pi)))
    return np.hypot(x, y) < radius


def _texture(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values from -1 to 1."""
    wave = 2 * np.pi / (PERIOD * rng.uniform(0.8, 1.2))
    a, b = wave * u + rng.uniform(0, 2 * np.pi), wave * v + rng.uniform(0, 2 * np.pi)
    if name == "stripes":
        return np.sin(a)
    if name == "checks":
        return np.sin(a) * np.sin(b)
    if name == "rings":
        return np.sin(wave * np.hypot(u, v) + rng.uniform(0, 2 * np.pi))
    if name == "rays":
        return np.sin(7 * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
    if name == "dots":
        return np.where(np.sin(a) + np.sin(b) > 0.9, 1.0, -0.4)
    if name == "bricks":
        return np.maximum(np.sin(b), np.sin(a + np.pi * (np.floor(b / (2 * np.pi)) % 2)) - 0.3).clip(-1, 1)
    if name == "waves":
        return np.sin(b + 1.5 * np.sin(0.5 * a))
    return np.sign(_noise(rng, u, v, 2.0))


def _warp(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth displacement in pixels."""
    direction, phase = rng.uniform(0, 2 * np.pi, 2)
    return 1.5 * np.sin(2 * np.pi / rng.uniform(14, 22) * (np.cos(direction) * x + np.sin(direction) * y) + phase)


def _noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, grain: float) -> np.ndarray:
    """Random cells of `grain` pixels."""
    cells = rng.normal(size=(64, 64))
    return cells[np.floor(u / grain).astype(int) % 64, np.floor(v / grain).astype(int) % 64]
