"""Files of object masks: which pixels are the object, and which are void."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_xcit.data.decode import FORMATS, reading_images
from dino_xcit.errors import UserError
from dino_xcit.figures.framing import any_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

VOID = 255  # in masks of PASCAL VOC: neither object nor background
VOID_COLOUR = (224, 224, 192)  # of such a mask in colours
WHITE = 255
MOST_COLOURS = 256  # more are those of a photograph or of a compressed picture
# How the values of a file are read.
BLACK_AND_WHITE = "black and white (white is the object)"
SHADES = "in shades of grey (over 127 is the object)"
NUMBERS = "with numbers (0 is the background, 255 void)"
COLOURS = "in colours (black is the background)"


class ObjectMask(NamedTuple):
    """The object of an image."""

    truth: Tensor
    """bool (H, W): the object"""
    counted: Tensor
    """bool (H, W): false where the mask is void"""
    reading: str
    """how the values of the file were read"""


def read_mask(path: Path, numbered: bool = False) -> ObjectMask:
    """Read a mask file.

    Values other than 0 are object. 255 is void, as in PASCAL VOC, in a mask that numbers its
    objects; in one of black and white, or of shades between them (a soft edge, JPEG), values above
    half are object. In a mask of colours, black is background and VOC's colour of void is void.

    Args:
        path: the file.
        numbered: whether other masks of the set number their objects. Then 255 is void beside 0
            alone too: the image has a border of void, or no object at all.

    Raises:
        UserError: the file is not an image, is transparent, or has values that are no labels.
    """
    values, reading = _open(path)
    if reading == SHADES:
        counted = torch.ones(values.shape, dtype=torch.bool)
        return ObjectMask(torch.from_numpy(values > WHITE // 2), counted, reading)
    if reading == BLACK_AND_WHITE and numbered:
        reading = NUMBERS
    void = (values == VOID) & (reading != BLACK_AND_WHITE)
    return ObjectMask(torch.from_numpy((values != 0) & ~void), torch.from_numpy(~void), reading)


def number_their_objects(paths: Iterable[Path]) -> bool:
    """Whether one of these masks numbers its objects; files that cannot be read are passed over."""
    for path in paths:
        try:
            _, reading = _open(path)
        except (UserError, OSError):  # `read_mask` raises it again, for its image
            continue
        if reading in (NUMBERS, COLOURS):
            return True
    return False


def _open(path: Path) -> tuple[np.ndarray, str]:
    """Values of a mask file as integers (H, W), and how they are read."""
    try:
        with any_size(), reading_images(), Image.open(path, formats=FORMATS) as file:
            image = file.copy()  # decodes it
        if not _is_opaque(image):
            raise UserError("transparent; expected grey or a palette")
        return _values(image)
    except UserError as error:
        raise UserError(f"mask {path}: {error}") from None


def _is_opaque(image: Image.Image) -> bool:
    has_alpha = image.mode in ("LA", "PA", "RGBA")
    return not has_alpha or image.getchannel("A").getextrema() == (WHITE, WHITE)


def _values(image: Image.Image) -> tuple[np.ndarray, str]:
    if image.mode == "P" and not _is_palette_of_black_and_white(image):
        values = np.array(image).astype(np.int64)
        return values, _reading(values)
    if image.mode == "F":
        values = np.array(image)
        if not (values == values.round()).all():
            raise UserError("values that are not whole numbers; expected a number for each object")
    elif image.mode in ("L", "1") or image.mode.startswith("I"):
        values = np.array(image)
    else:
        colours = np.array(image.convert("RGB")).astype(np.int64)
        if (colours != colours[..., :1]).any():
            return _numbers_of_colours(colours), COLOURS
        values = colours[..., 0]
    values = values.astype(np.int64) * (WHITE if image.mode == "1" else 1)
    return values, SHADES if _is_soft(values) else _reading(values)


def _is_palette_of_black_and_white(image: Image.Image) -> bool:
    """Whether its colours, not its indices, are the mask: index 0 may be white."""
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(np.array(image))
    return bool(used.max() < len(palette) and np.isin(palette[used].sum(1), (0, 3 * WHITE)).all())


def _numbers_of_colours(colours: np.ndarray) -> np.ndarray:
    """A number for each colour (H, W, 3): 0 for black, VOID for VOC's colour, else over 255."""
    packed = colours @ np.array([2**16, 2**8, 1])
    count = len(np.unique(packed))
    if count > MOST_COLOURS:
        raise UserError(
            f"{count} colours, as of a photograph or a compressed picture; expected one colour or "
            "number for each object, as PNG"
        )
    numbers = np.where(packed == 0, 0, packed + WHITE + 1)
    numbers[(colours == VOID_COLOUR).all(-1)] = VOID
    return numbers


def _reading(values: np.ndarray) -> str:
    return BLACK_AND_WHITE if np.isin(values, (0, WHITE)).all() else NUMBERS


def _is_soft(values: np.ndarray) -> bool:
    """Whether these are shades up to white: numbers of objects do not get so high."""
    return bool(values.max(initial=0) <= WHITE and ((values > WHITE // 2) & (values < WHITE)).any())
