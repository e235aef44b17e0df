"""Images, attention maps and patch features -> one HTML file to explore them, offline, in any browser.

page.html is the page; what it shows goes into it as one block of JSON:
- maps as uint16, linear from 0 to the maximum of their head: off by at most that maximum / 131070;
- features as int8, of length 1 and on at most 64 axes (those that keep most energy): enough for cosines, no more.

h, w: rows and columns of patches, the last of which may be cut by the image's edge.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
FEATURE_CELLS = 128  # a side of the grid of features; finer ones are pooled
LEVELS = 65535


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """An image with its maps."""

    name: str  # name of the file, may hold any character
    image: np.ndarray  # uint8 (H, W, 3), as shown
    patch: int  # side of a patch, pixels
    attention: (
        np.ndarray
    )  # float (heads, h, w): softmax weights of the class token; a head sums to at most 1
    features: np.ndarray | None = None  # float (C, h, w), for similarities of patches

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
                    f"{printable(self.name)}: attention or features are not finite numbers"
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
    """threshold: share of the mass that masks keep, in (0, 1). clip: share of patches beyond either end of a map's colours.
    colours: one for each head at least, in [0, 1]."""
    assert exhibits, "a page shows at least one image"
    assert 0 < threshold < 1, threshold
    assert len(colours) >= max(len(exhibit.attention) for exhibit in exhibits), (
        "each head needs a colour"
    )
    data = {
        "threshold": threshold,
        "clip": clip,
        "lut": matplotlib.colormaps.get_cmap(colormap)(np.linspace(0, 1, 256), bytes=True)[
            :, :3
        ].tolist(),
        "colours": [[round(255 * channel) for channel in colour] for colour in colours],
        "exhibits": [encode(exhibit) for exhibit in exhibits],
    }
    block = json.dumps(data, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no </script> in a name ends it
    filled = {
        "title": html.escape(printable(title)),
        "subtitle": html.escape(printable(subtitle)),
        "data": block,
    }
    page = re.sub(
        r"\{\{(\w+)\}\}", lambda place: filled[place[1]], TEMPLATE.read_text(encoding="utf-8")
    )
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def encode(exhibit: Exhibit) -> dict[str, Any]:
    """What page.html reads of an image."""
    (H, W), (heads, h, w) = exhibit.image.shape[:2], exhibit.attention.shape
    maps = exhibit.attention.astype(np.float64).reshape(heads, -1)  # (heads, h w)
    top = maps.max(1)
    levels = np.round(LEVELS * maps / np.maximum(top, np.finfo(float).tiny)[:, None]).astype("<u2")
    encoded: dict[str, Any] = {
        "name": printable(exhibit.name),
        "image": data_url(exhibit.image),
        "size": [W, H],
        "patch": exhibit.patch,
        "grid": [h, w],
        "top": top.tolist(),
        "attention": text_of(levels),
    }
    if exhibit.features is not None:
        values, side, energy = compress(exhibit.features)
        encoded["features"] = {
            "grid": list(values.shape[:2]),
            "side": side,
            "energy": energy,
            "values": text_of(values),
        }
    return encoded


def data_url(image: np.ndarray) -> str:
    """uint8 (H, W, 3) -> PNG if small, else JPEG, as a URL."""
    kind = "png" if image.shape[0] * image.shape[1] <= LOSSLESS_PIXELS else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def text_of(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def compress(features: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Features (C, h, w) -> int8 (rows, columns, axes) with nearly the same cosines, patches on a cell's side, energy kept.

    The axes are leading right singular vectors, uncentred: of all projections theirs keeps most of the inner products.
    """
    C, h, w = features.shape
    side = -(-max(h, w) // FEATURE_CELLS)
    # A sum has the direction of the mean, also in the last cells, which may hold fewer patches.
    cells = np.add.reduceat(
        np.add.reduceat(features.astype(np.float64), range(0, h, side), 1), range(0, w, side), 2
    )
    unit = np.moveaxis(cells, 0, -1)  # (rows, columns, C)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), np.finfo(float).tiny)
    energy = 1.0
    if C > FEATURE_AXES:
        flat = unit.reshape(-1, C)
        values, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
        energy = float(values[-FEATURE_AXES:].sum() / max(values.sum(), np.finfo(float).tiny))
        unit = unit @ vectors[:, -FEATURE_AXES:]
    return (
        np.round(127 * unit / max(np.abs(unit).max(), np.finfo(float).tiny)).astype(np.int8),
        side,
        energy,
    )
