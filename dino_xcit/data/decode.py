"""Bytes of an image file -> uint8 pixels."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    from torchvision.io import ImageReadMode, decode_image
except (
    ImportError
):  # torchvision 0.29 announces their removal; PIL then reads everything, more slowly
    decode_image = None

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
JPEG = b"\xff\xd8"
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Those of the extensions: PIL goes by the content, and would start Ghostscript for a file that holds PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SECONDS_TO_READ = 60  # an image, after which it counts as unreadable: a file system that hangs must not hang the run


def decode(data: bytes, channels: int) -> Tensor:
    """The bytes of an image file -> uint8 (C, H, W), upright, in the channels asked for.

    torchvision decodes JPEG, PIL the rest: some damaged PNGs crash torchvision's decoder, and it is no faster. Raises
    ValueError if neither can, or if there are more than 179 million pixels, which is PIL's limit.
    """
    if decode_image is not None and channels in (1, 3) and data.startswith(JPEG):
        _open(data).close()  # reads the size alone: torchvision would take the memory for any
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        with contextlib.suppress(RuntimeError):
            return decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8),
                mode,
                apply_exif_orientation=True,
            )
    with reading_images(), _open(data) as file:
        return from_pil(ImageOps.exif_transpose(file), channels)


def _open(data: bytes) -> Image.Image:
    """Raises ValueError if these are not the bytes of an image, or of too large a one."""
    with reading_images():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def reading_images() -> Iterator[None]:
    """Raises ValueError in one line for whatever PIL lets through of the readers of its formats."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of odd metadata, and of sizes that are half of what is refused
            yield
    except ValueError:
        raise
    except UnidentifiedImageError:
        raise UserError("not an image") from None
    except Exception as error:
        raise UserError(one_line(error)) from error


@contextlib.contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if this takes longer. Elsewhere than in the main thread, where no signal comes: no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"not read within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def from_pil(image: Image.Image, channels: int) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip instead of scale
        image = Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        )
    if channels not in PIL_MODES:
        raise UserError(
            f"images of {channels} channels cannot be read from files; --in_chans takes 1, 3 or 4 here"
        )
    array = np.array(image.convert(PIL_MODES[channels]))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
