"""A mask file -> the number of a class in each pixel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from dino_xcit.data.decode import FORMATS, reading_images
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from pathlib import Path

COLOUR = re.compile(r"(?:\b\d+[\s,;]+)?\b(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})\b")
"""of a line of a palette file"""
PALETTE_FILES = ("label_colors.txt", "class_dict.csv", "labelmap.txt", "palette.txt")
"""Lists of colours, a class a line; names as in CamVid and CVAT."""
GREY_MODES = ("P", "L", "1", "I", "I;16", "I;16L", "I;16B")  # PIL's, of masks without colours


class Palette(NamedTuple):
    """Colour and name of each class; the class's number is its place."""

    file: str
    colours: np.ndarray
    """int64 (K,): red * 65536 + green * 256 + blue"""
    names: list[str]

    def classes(self, rgb: np.ndarray) -> np.ndarray:
        """Colours (H, W, 3) -> the number of the class of each pixel, int32 (H, W).

        Raises:
            ImageError: A colour is not in the palette.
        """
        code = rgb.astype(np.int64) @ np.array([65536, 256, 1])
        order = np.argsort(self.colours)
        place = np.searchsorted(self.colours[order], code).clip(max=len(order) - 1)
        number: np.ndarray = order[place]
        unknown = self.colours[number] != code
        if unknown.any():
            colour = " ".join(map(str, rgb[unknown][0]))
            raise ImageError(f"has the colour {colour}, which {self.file} lacks")
        return number.astype(np.int32)


def read_palette(root: Path) -> Palette | None:
    """Read the list of colours in this folder, if there is one.

    A line of a class contains red, green and blue, each from 0 to 255, and the class's name; a
    number before them, the class's, is left out.

    Raises:
        UserError: The file has no such line.
    """
    path = next((root / name for name in PALETTE_FILES if (root / name).is_file()), None)
    if path is None:
        return None
    colours: list[int] = []
    names: list[str] = []
    for line in path.read_text().splitlines():
        found = COLOUR.search(line)
        if found:
            red, green, blue = map(int, found.groups())
            colours.append(red * 65536 + green * 256 + blue)
            rest = (line[: found.start()] + line[found.end() :]).strip(" \t,;:\"'")
            names.append(rest or f"class {len(names)}")
    if not colours:
        raise UserError(f"{path} has no line of a class; expected lines like `128 64 128 road`")
    return Palette(str(path), np.array(colours), names)


def read_mask(path: Path, palette: Palette | None = None) -> np.ndarray:
    """Return the number of the class of each pixel, int32 (H, W).

    Raises:
        ImageError: The file is no mask that can be decoded.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file, reading_images(), Image.open(file, formats=FORMATS) as image:
        if image.format == "JPEG":
            raise ImageError(
                "a JPEG, whose compression changes the numbers of classes; expected PNG"
            )
        if image.mode in GREY_MODES:
            return np.array(image).astype(np.int32)
        if palette is not None and image.mode != "F":
            return palette.classes(np.array(image.convert("RGB")))
        pixels = np.array(image)
        colours = pixels[..., :3] if pixels.shape[-1:] > (2,) else pixels[..., :1]
        if pixels.ndim < 3 or (colours != colours[..., :1]).any():
            raise ImageError(
                f"is in colour (mode {image.mode}); expected the number of a class in each pixel, "
                f"or a list of colours, {PALETTE_FILES[0]}, in --data_path"
            )
        return pixels[..., 0].astype(np.int32)
