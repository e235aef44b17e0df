"""The embedded image set: textured objects on a smooth background, drawn from the seed, labelled, with object masks.

The class is the texture of the object; its place, outline, size, rotation, phase, brightness and contrast say nothing about
it, nor does the background. So neighbours in pixel space are poor witnesses, while a network that recognises a texture
wherever it lies tells the classes apart. NumPy only: this room imports no torch.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

TEXTURES = ("stripes", "checks", "rings", "rays", "dots", "coarse noise", "fine noise", "plain")
SIZE = 32
PERIOD = 5.0  # pixels, of the regular textures, at 32 x 32
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
    centre = rng.uniform(-6, 6, 2)
    angle = rng.uniform(0, 2 * np.pi)
    u = np.cos(angle) * (x - centre[0]) + np.sin(angle) * (y - centre[1])
    v = np.cos(angle) * (y - centre[1]) - np.sin(angle) * (x - centre[0])
    mask = _outline(rng, x - centre[0], y - centre[1])
    texture = _texture(rng, TEXTURES[label], u, v, size)
    object_level, background_level = rng.uniform(0.35, 0.65, 2)
    contrast = rng.uniform(0.15, 0.35) * rng.choice([-1, 1])
    gradient = rng.normal(0, 0.008, 2)
    background = background_level + gradient[0] * x + gradient[1] * y
    image = np.where(mask, object_level + contrast * texture, background)
    image = image + rng.normal(0, 0.02, image.shape)
    grey = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return Shape(np.repeat(grey[..., None], channels, axis=2), label, mask)


def _outline(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A blob around (0, 0): a circle whose radius wavers with the direction."""
    direction = np.arctan2(y, x)
    radius = rng.uniform(9, 13)
    for lobes in (2, 3, 5):
        radius = radius * (1 + rng.uniform(0, 0.15) * np.cos(lobes * direction + rng.uniform(0, 2 * np.pi)))
    return np.hypot(x, y) < radius


def _texture(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Values from -1 to 1 over rotated coordinates."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    wave = 2 * np.pi / (PERIOD * rng.uniform(0.85, 1.15))
    if name == "stripes":
        return np.sign(np.sin(wave * u + phase[0]))
    if name == "checks":
        return np.sign(np.sin(wave * u + phase[0]) * np.sin(wave * v + phase[1]))
    if name == "rings":
        return np.sign(np.sin(wave * np.hypot(u, v) + phase[0]))
    if name == "rays":
        return np.sign(np.sin(8 * np.arctan2(v, u) + phase[0]))
    if name == "dots":
        return np.where(np.sin(wave * u + phase[0]) + np.sin(wave * v + phase[1]) > 0.8, 1.0, -1.0)
    if name == "coarse noise":
        return np.sign(_noise(rng, u, v, 4.0))
    if name == "fine noise":
        return np.sign(_noise(rng, u, v, 1.5))
    return np.full((size, size), rng.uniform(-1, 1))


def _noise(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, grain: float) -> np.ndarray:
    """Random cells of `grain` pixels."""
    cells = rng.normal(size=(64, 64))
    return cells[np.floor(u / grain).astype(int) % 64, np.floor(v / grain).astype(int) % 64]
