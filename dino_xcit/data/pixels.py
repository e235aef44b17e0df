"""Pixels of a decoded image -> uint8, by rules that keep what the file states.

    8 bits              as they are
    16 bits, unsigned   the upper 8 bits; inverted where the file states that 0 is white
    floating point      0 to 1 is scaled to 255; 0 to 255 is rounded
    alpha               composited on white, unless four channels are read

Everything else is refused, and so are pixels that would fill fewer than `LEVELS` of the 256 levels:
12 bits in a file of 16 would be nearly black. They are dark pixels of 16 bits if other files of the
set have brighter ones, see `decode.ImageReader`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

from dino_xcit.errors import ImageError, UserError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
LEVELS = 16
GROUND = "white"  # of transparent images, as a browser shows them
REDUCED_OR_MASK = 0b101  # flags of TIFF's NewSubfileType: a page that is no image of its own
NEW_SUBFILE_TYPE, PHOTOMETRIC, EXTRA_SAMPLES = 254, 262, 338  # tags of TIFF


class DarkError(ImageError):
    """Pixels of 16 bits that fill few levels: they are dark, or of fewer bits."""


class Storage(NamedTuple):
    """What a file states of its pixels and PIL does not keep."""

    bits: int = 8
    """of each value, before PIL decodes it"""
    white_is_zero: bool = False
    """of 16 bits and floats, which PIL does not invert"""
    has_alpha: bool = True
    """whether a fourth band is alpha"""
    may_be_dark: bool = False
    """whether 16 bits that fill few levels are known to be dark"""

    @classmethod
    def of(cls, file: Image.Image, data: bytes) -> Storage:
        """Read the header.

        Raises:
            ImageError: A TIFF of several images, or of integers without a scale.
        """
        if file.format == "PNG":
            return cls(bits=data[24])
        if isinstance(file, TiffImagePlugin.TiffImageFile):
            _require_one_page(file)
            if file.mode == "I":
                raise ImageError(
                    "signed or 32-bit integers, whose scale the file does not state; expected "
                    "unsigned integers of 8 or 16 bits"
                )
            bits, alpha = file.tag_v2.get(258, (8,)), file.tag_v2.get(EXTRA_SAMPLES, ())
            white_is_zero = file.tag_v2.get(PHOTOMETRIC) == 0
            return cls(max(bits), white_is_zero, alpha in ((1,), (2,)) or file.mode != "RGBA")
        # PIL scales a PGM of more than 8 bits to 16, in mode I.
        return cls(bits=16 if file.mode.startswith("I") else 8)


def _require_one_page(file: TiffImagePlugin.TiffImageFile) -> None:
    page = 0
    while True:
        try:
            file.seek(page := page + 1)
        except EOFError:
            break
        if not file.tag_v2.get(NEW_SUBFILE_TYPE, 0) & REDUCED_OR_MASK:
            raise ImageError("a TIFF of several pages; expected one image in a file")
    file.seek(0)


EIGHT_BITS = Storage()


def from_pil(image: Image.Image, channels: int, storage: Storage = EIGHT_BITS) -> Tensor:
    """Convert a PIL image to uint8 (channels, H, W).

    Raises:
        ImageError: Their scale is not known.
        UserError: Files cannot be read with this number of channels.
    """
    require_readable(channels)
    if image.mode.startswith("I"):
        image = Image.fromarray(_of_16_bits(np.asarray(image), storage))
    elif image.mode == "F":
        image = Image.fromarray(_of_floats(np.asarray(image), storage.white_is_zero))
    elif storage.bits == 16 and not storage.may_be_dark:
        _require_levels(image)
    if channels != 4 and image.has_transparency_data:
        image = _on_ground(image) if storage.has_alpha else image.convert("RGB")
    array = np.array(image.convert(PIL_MODES[channels]))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def require_readable(channels: int) -> None:
    """Raise UserError if image files cannot be read with this number of channels."""
    if channels not in PIL_MODES:
        raise UserError(
            f"image files cannot be read with --in_chans {channels}; expected 1, 3 or 4"
        )


def _of_16_bits(values: np.ndarray, storage: Storage) -> np.ndarray:
    highest = int(values.max())
    if 0 < highest < 256 * LEVELS and not storage.may_be_dark:
        raise _too_dark(f"of at most {highest}")
    levels = (values >> 8).astype(np.uint8)
    return 255 - levels if storage.white_is_zero else levels


def _require_levels(image: Image.Image) -> None:
    """Refuse colours of 16 bits that PIL has reduced to fewer than LEVELS levels."""
    if int(np.asarray(image.convert("RGB")).max()) < LEVELS:
        raise _too_dark(f"that fill fewer than {LEVELS} of 256 levels")


def _too_dark(found: str) -> DarkError:
    return DarkError(
        f"16-bit pixels {found}, as of 12 bits or fewer stored in 16, whose scale the file does "
        "not state; scale them to 65535 or convert the file to 8 bits"
    )


def _of_floats(values: np.ndarray, white_is_zero: bool) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and (high <= 1 or LEVELS <= high <= 255)):  # also refuses NaN
        raise ImageError(
            f"floating-point pixels from {low:g} to {high:g}; expected 0 to 1, or 0 to 255"
        )
    levels: np.ndarray = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    return 255 - levels if white_is_zero else levels


def _on_ground(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)


def with_fourth_band(data: bytes) -> bytes:
    """Return a TIFF whose fourth band PIL keeps.

    PIL drops a band that the file calls unspecified (ExtraSamples 0), such as near infrared; here
    the tag is set to that of alpha (2), of which nothing is premultiplied.
    """
    order = "<" if data[:2] == b"II" else ">"
    unspecified, alpha = (
        np.array([EXTRA_SAMPLES, 3], f"{order}u2").tobytes()
        + np.array([1], f"{order}u4").tobytes()
        + np.array([kind], f"{order}u2").tobytes()
        for kind in (0, 2)
    )
    start = int(np.frombuffer(data, f"{order}u4", 1, 4)[0])
    entries = int(np.frombuffer(data, f"{order}u2", 1, start)[0])
    for place in range(start + 2, start + 2 + 12 * entries, 12):
        if data[place : place + len(unspecified)] == unspecified:
            return data[:place] + alpha + data[place + len(alpha) :]
    return data
