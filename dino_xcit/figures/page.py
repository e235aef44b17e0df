"""Images, attention maps and patch features -> one HTML file to explore them in a browser, offline.

page.html is the template; the data goes into it as one block of JSON:
- maps as uint16, linear from 0 to the maximum of their head: off by at most that maximum / 131070;
- features as int8 unit vectors on at most 64 axes, those with most energy: precise enough for
cosines.

h, w: rows and columns of patches, the last of which may reach beyond the image.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from dino_xcit.errors import UserError
from dino_xcit.files import printable, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATE = Path(__file__).with_name("page.html")
LOSSLESS_PIXELS = 256 * 256  # larger images are JPEG
FEATURE_AXES = 64
FEATURE_BLOCKS = 128  # on a side of the grid of features; finer grids are pooled
LEVELS = 65535
TINY = np.finfo(float).tiny


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """An image with its maps.

    Raises:
        UserError: the maps or features are not finite.
    """

    name: str
    """of the file, may contain any character"""
    image: np.ndarray
    """uint8 (H, W, 3)"""
    patch: int
    """side of a patch in pixels"""
    attention: np.ndarray
    """float (heads, h, w): softmax weights of the class token; a head sums to at most 1"""
    features: np.ndarray | None = None
    """float (C, h, w), for similarities of patches"""

    def __post_init__(self) -> None:
        grid = tuple(-(-side // self.patch) for side in self.image.shape[:2])
        assert self.image.dtype == np.uint8, self.image.dtype
        assert self.image.shape[2:] == (3,), self.image.shape
        for values in (self.attention, *([] if self.features is None else [self.features])):
            assert values.shape[1:] == grid, (
                f"{values.shape} for patches of {self.patch} of an image of {self.image.shape}"
            )
            if not np.isfinite(values).all():
                raise UserError(
                    f"{printable(self.name)}: attention or features are not finite; "
                    "expected finite --weights, or --precision 32-true"
                )


def write_page(
    path: Path,
    exhibits: Sequence[Exhibit],
    *,
    title: str,
    threshold: float,
    clip: float,
    colormap: str,
    colours: Sequence[tuple[float, float, float]],
    subtitle: str = "",
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        exhibits: one at least.
        title: heading of the page.
        threshold: share of the mass that masks keep, in (0, 1).
        clip: share of patches beyond either end of a map's colours.
        colormap: matplotlib's name.
        colours: of the heads, RGB in [0, 1].
        subtitle: line below the heading.
    """
    assert exhibits, "a page shows at least one image"
    assert 0 < threshold < 1, threshold
    heads = max(len(exhibit.attention) for exhibit in exhibits)
    assert len(colours) >= heads, "each head needs a colour"
    scale = matplotlib.colormaps.get_cmap(colormap)(np.linspace(0, 1, 256), bytes=True)
    data = {
        "threshold": threshold,
        "clip": clip,
        "lut": scale[:, :3].tolist(),
        "colours": [[round(255 * channel) for channel in colour] for colour in colours],
        "exhibits": [encode(exhibit) for exhibit in exhibits],
    }
    block = json.dumps(data, separators=(",", ":"))
    texts = {
        "title": html.escape(printable(title)),
        "subtitle": html.escape(printable(subtitle)),
        "data": block.replace("<", "\\u003c"),  # a name may contain </script>
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: texts[place[1]], template)
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def encode(exhibit: Exhibit) -> dict[str, Any]:
    """An image as page.html reads it."""
    (H, W), (heads, h, w) = exhibit.image.shape[:2], exhibit.attention.shape
    maps = exhibit.attention.astype(np.float64).reshape(heads, -1)  # (heads, h w)
    top = maps.max(1)
    levels = np.round(LEVELS * maps / np.maximum(top, TINY)[:, None]).astype("<u2")
    encoded: dict[str, Any] = {
        "name": printable(exhibit.name),
        "image": data_url(exhibit.image),
        "size": [W, H],
        "patch": exhibit.patch,
        "grid": [h, w],
        "top": top.tolist(),
        "attention": base64_text(levels),
    }
    if exhibit.features is not None:
        compressed = compress(exhibit.features)
        encoded["features"] = {
            "grid": list(compressed.values.shape[:2]),
            "side": compressed.side,
            "energy": compressed.energy,
            "values": base64_text(compressed.values),
        }
    return encoded


def data_url(image: np.ndarray) -> str:
    """uint8 (H, W, 3) as a URL: PNG if it is small, else JPEG."""
    kind = "png" if image.shape[0] * image.shape[1] <= LOSSLESS_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def base64_text(values: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


class CompressedFeatures(NamedTuple):
    """Features whose cosines are nearly those of the original ones."""

    values: np.ndarray
    """int8 (rows, columns, axes)"""
    side: int
    """patches on the side of the block that shares one feature"""
    energy: float
    """share of the squared norms that the axes keep"""


def compress(features: np.ndarray) -> CompressedFeatures:
    """Pool, normalise, project and quantise features (C, h, w).

    The axes are the leading right singular vectors, uncentred: the projection that keeps most of
    the inner products.
    """
    C, h, w = features.shape
    side = -(-max(h, w) // FEATURE_BLOCKS)
    # A sum has the direction of the mean, also in the last blocks, which may hold fewer patches.
    sums = np.add.reduceat(features.astype(np.float64), range(0, h, side), 1)
    sums = np.add.reduceat(sums, range(0, w, side), 2)
    unit = np.moveaxis(sums, 0, -1)  # (rows, columns, C)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), TINY)
    energy = 1.0
    if C > FEATURE_AXES:
        flat = unit.reshape(-1, C)
        squares, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
        energy = float(squares[-FEATURE_AXES:].sum() / max(squares.sum(), TINY))
        unit = unit @ vectors[:, -FEATURE_AXES:]
    values = np.round(127 * unit / max(np.abs(unit).max(), TINY)).astype(np.int8)
    return CompressedFeatures(values, side, energy)
