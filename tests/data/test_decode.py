"""Decoding of image files: every format, and files that are damaged or lie."""

from __future__ import annotations

import io
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from helpers import RAMP, png_bomb
from PIL import Image

from dino_xcit.data import decode as decode_module
from dino_xcit.data.decode import decode, time_limit
from dino_xcit.errors import ImageError, UserError


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# -- formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
        ("L", "PPM"),
    ],
)
def test_every_format_decodes_as_pil_reads_it(mode, file_format):
    data = encoded(Image.fromarray(RAMP).convert(mode), file_format)
    for channels, pil_mode in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(pil_mode)).reshape(
            40, 60, channels
        )
        decoded = decode(data, channels).permute(1, 2, 0).numpy()
        assert decoded.dtype == np.uint8
        assert (
            np.abs(decoded.astype(int) - expected).max() <= 2
        )  # grey from a colour JPEG is its own luma channel


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(file_format):
    data = encoded(Image.fromarray(RAMP[..., 0].astype(np.uint16) * 257), file_format)
    for channels in (1, 3):
        decoded = decode(data, channels)
        assert decoded.shape[0] == channels
        assert torch.equal(decoded[0], torch.from_numpy(RAMP[..., 0].copy()))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_images_are_turned_upright_by_their_exif(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    upright = decode(encoded(Image.fromarray(RAMP), file_format, exif=exif), 3)
    assert tuple(upright.shape) == (3, 60, 40)


def test_other_numbers_of_channels_are_the_users_mistake():
    with pytest.raises(UserError, match="--in_chans 2; expected 1, 3 or 4") as raised:
        decode(encoded(Image.fromarray(RAMP), "PNG"), 2)
    assert not isinstance(raised.value, ImageError)


def test_transparent_images_keep_four_channels_when_asked():
    decoded = decode(encoded(Image.fromarray(RAMP).convert("RGBA"), "PNG"), 4)
    assert tuple(decoded.shape) == (4, 40, 60)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_errors(file_format):
    data = encoded(Image.fromarray(RAMP), file_format)
    for broken in (data[: len(data) // 2], b"", b"not an image"):
        with pytest.raises(ImageError):
            decode(broken, 3)


# -- images that lie about their size -------------------------------------------------------

SIDE = 100_000


def jpeg_bomb() -> bytes:  # 65,500 is the most that libjpeg takes
    frame = struct.pack(">BHHB", 8, 65_500, 65_500, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    return (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">H", 2 + len(frame))
        + frame
        + b"\xff\xda\x00\x0c\x03"
        + bytes(9)
        + b"\xff\xd9"
    )


def gif_bomb() -> bytes:  # 16 bits a side
    screen = struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    return (
        b"GIF89a"
        + screen
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def tiff_bomb() -> bytes:
    tags = [
        (256, SIDE),
        (257, SIDE),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, SIDE),
        (279, 8),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp_bomb() -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, *[0] * 6)
    )


def ppm_bomb() -> bytes:
    return f"P6 {SIDE} {SIDE} 255\n".encode() + bytes(100)


def webp_bomb() -> bytes:  # 14 bits a side; the header of an extended file takes 24
    canvas = (SIDE - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    f.__name__: f for f in (png_bomb, jpeg_bomb, gif_bomb, tiff_bomb, bmp_bomb, ppm_bomb, webp_bomb)
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bomb", BOMBS)
def test_an_image_bomb_is_refused(bomb, channels):
    with pytest.raises(ImageError, match=r"\w"):
        decode(BOMBS[bomb](), channels)


@pytest.mark.slow
def test_image_bombs_take_no_memory(tmp_path):
    """In a process that may take 1 GiB above its libraries; a bomb would need 4 to 40."""
    for name, bomb in BOMBS.items():
        (tmp_path / name).write_bytes(bomb())
    code = """
import resource, sys
from pathlib import Path
from dino_xcit.data.decode import decode
from dino_xcit.errors import ImageError
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30,) * 2)
for path in Path(sys.argv[1]).iterdir():
    try:
        decode(path.read_bytes(), 3)
    except ImageError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(BOMBS)
    assert "MemoryError" not in run.stdout


# -- images that run code ------------------------------------------------------------------------

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"(touched) (w) file closefile\nshowpage\n%%EOF\n"
)


def test_postscript_named_png_starts_no_interpreter(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(
        subprocess, "check_call", lambda *_, **__: pytest.fail("a process was started")
    )
    with pytest.raises(ImageError, match="not an image"):
        decode(POSTSCRIPT, 3)


# -- time limit ----------------------------------------------------------------------------------


def test_reading_takes_at_most_the_limit(monkeypatch):
    monkeypatch.setattr(decode_module, "SECONDS_TO_READ", 0.05)
    with pytest.raises(TimeoutError, match=r"^not read within 0.05 s$"), time_limit():
        time.sleep(60)


def test_the_callers_alarm_still_comes():
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with time_limit():
            pass
        remaining, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < remaining <= 0.2
        signal.pause()
        assert came == [True]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_read_without_a_limit():
    def read():
        with time_limit():
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert done == [True]
