"""Bytes of an image file -> uint8 pixels."""

from __future__ import annotations

import contextlib
import functools
import io
import signal
import threading
import time
import warnings
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dino_xcit.data.pixels import LEVELS, DarkError, Storage, from_pil, with_fourth_band
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # announced for torchvision 0.29: PIL then decodes everything, more slowly
    decode_image = None

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# PIL's names of the formats with these extensions. PIL looks at the content, not at the extension:
# without this list it would start Ghostscript for a file that holds PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
JPEG = b"\xff\xd8"  # first bytes
TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
SAMPLED = 32  # images of a set in which brighter pixels are looked for
SECONDS_TO_READ = 60  # after which an image counts as unreadable, so a hanging file system ends


class ImageReader:
    """Reads the images of a set, whose 16-bit ones have one depth.

    Args:
        data: Bytes of an image file by index.
        count: Images of the set.
        channels: Of the pixels.
    """

    def __init__(self, data: Callable[[int], bytes], count: int, channels: int) -> None:
        self.data, self.count, self.channels = data, count, channels

    def read(self, index: int) -> Tensor:
        """Return the image as uint8 (C, H, W).

        A dark image of 16 bits is read where one of a sample of the set has brighter pixels.

        Raises:
            ImageError: See `decode`.
            OSError: The file cannot be read.
        """
        data = self.data(index)
        try:
            return decode(data, self.channels)
        except DarkError:
            if not self._fill_16_bits:
                raise
        return decode(data, self.channels, may_be_dark=True)

    @functools.cached_property
    def _fill_16_bits(self) -> bool:
        sample = np.unique(np.linspace(0, self.count - 1, SAMPLED).astype(int)).tolist()
        return any(self._fills_16_bits(index) for index in sample)

    def _fills_16_bits(self, index: int) -> bool:
        """Whether this image has 16 bits and pixels for which 12 do not suffice."""
        try:
            with time_limit():
                data = self.data(index)
                with reading_images(), _open(data) as file:
                    bits = Storage.of(file, data).bits
                return bits == 16 and int(decode(data, 3).max()) >= LEVELS
        except (ImageError, OSError):
            return False


def decode(data: bytes, channels: int, may_be_dark: bool = False) -> Tensor:
    """Decode an image file to upright pixels.

    torchvision decodes JPEG, PIL the rest: some damaged PNGs crash torchvision's decoder, and it is
    no faster for them.

    Args:
        data: Of the file.
        channels: Of the pixels.
        may_be_dark: Whether pixels of 16 bits that fill few levels are known to be dark.

    Returns:
        uint8 (channels, H, W).

    Raises:
        ImageError: Neither decoder can read it, its pixels cannot be read faithfully
            (`pixels.py`), or it has more than 179 million, PIL's limit.
        UserError: Files cannot be read with this number of channels.
    """
    if decode_image is not None and channels in (1, 3) and data.startswith(JPEG):
        _open(data).close()  # checks the size: torchvision would allocate memory for any
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        with contextlib.suppress(RuntimeError):
            pixels: Tensor = decode_image(encoded, mode, apply_exif_orientation=True)
            return pixels
    with reading_images():
        if channels == 4 and data.startswith(TIFF[:2]):
            data = with_fourth_band(data)
    with reading_images(), _open(data) as file:
        storage = Storage.of(file, data)._replace(may_be_dark=may_be_dark)
        return from_pil(ImageOps.exif_transpose(file), channels, storage)


def _open(data: bytes) -> Image.Image:
    with reading_images():
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data.startswith(TIFF):
                raise ImageError("a TIFF that PIL cannot read; expected 1, 3 or 4 bands") from None
            raise


@contextlib.contextmanager
def reading_images() -> Iterator[None]:
    """Raise ImageError, in one line, for whatever PIL raises.

    PIL lets through any exception of the readers of its formats. Its warnings are ignored: they are
    about odd metadata, and about sizes over half of its limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, ImageError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except Exception as error:
        raise ImageError(one_line(error)) from error


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError, an OSError, if reading takes more than `SECONDS_TO_READ`.

    It needs a signal, so there is no limit outside the main thread. The caller's handler and timer
    of that signal are restored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"not read within {SECONDS_TO_READ:g} s")

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_READ)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            remaining = max(1e-6, remaining - (time.monotonic() - start))
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)


def one_line(error: BaseException) -> str:
    """Return the error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
