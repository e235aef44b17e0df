"""Pixels that are read faithfully, and those that are refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from helpers import folder_config
from PIL import Image

from dino_xcit.data.decode import decode
from dino_xcit.data.images import open_images
from dino_xcit.errors import ImageError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
OTHERS = np.stack([RAMP, RAMP[::-1], RAMP.T, RAMP[::-1].T], -1)  # four bands that differ


def encoded(image: np.ndarray | Image.Image, file_format: str = "TIFF", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def retagged(data: bytes, tag: int, value: int) -> bytes:
    """The TIFF with another value of a tag of one short."""
    at = data.index(struct.pack("<HHI", tag, 3, 1))
    return data[: at + 8] + struct.pack("<H", value) + data[at + 10 :]


def deep_colour_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, uint16 (H, W, 3), which PIL cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# -- depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(RAMP.astype(np.uint16) * 257), RAMP),
        (encoded(RAMP.astype(np.uint16) * 257, "PPM"), RAMP),
        (retagged(encoded(RAMP.astype(np.uint16) * 257), 262, 0), RAMP[::-1, ::-1]),
        (encoded(np.zeros((16, 16), np.uint16)), np.zeros((16, 16))),
        (encoded((RAMP / 255).astype(np.float32)), RAMP),
        (encoded(RAMP.astype(np.float32)), RAMP),
        (encoded((RAMP / 2550).astype(np.float32)), np.rint(RAMP / 10)),
    ],
    ids=["uint16", "PGM", "white is zero", "black", "0 to 1", "0 to 255", "0 to 0.1"],
)
def test_depths_of_a_known_scale_are_read(data, expected, channels):
    decoded = decode(data, channels).numpy()
    assert all(np.array_equal(band, expected) for band in decoded)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(RAMP.astype(np.uint16) * 16), "16-bit pixels of at most 4080, as of 12 bits"),
        (encoded(RAMP.astype(np.uint16) * 16, "PNG"), "16-bit pixels of at most 4080"),
        (deep_colour_png(OTHERS[..., :3].astype(np.uint16) * 16), "16-bit pixels that fill fewer"),
        (encoded(RAMP.astype(np.uint16) * 100, tiffinfo={339: 2}), "signed or 32-bit integers"),
        (encoded(RAMP.astype(np.int32)), "signed or 32-bit integers"),
        (encoded(RAMP.astype(np.int32) - 50), "signed or 32-bit integers"),
        (retagged(encoded(RAMP.astype(np.uint16)), 262, 7), "a TIFF that PIL cannot read"),
        (encoded(RAMP.astype(np.float32) - 1000), "floating-point pixels from -1000 to -745"),
        (encoded(RAMP.astype(np.float32) * 10), "floating-point pixels from 0 to 2550; expected"),
        (encoded((RAMP / 200).astype(np.float32)), "floating-point pixels from 0 to 1.275"),
        (encoded(np.full((4, 4), np.nan, np.float32)), "floating-point pixels from nan"),
    ],
)
def test_depths_of_an_unknown_scale_are_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data, 3)


def test_colours_of_16_bits_keep_their_upper_half():
    decoded = decode(deep_colour_png(OTHERS[..., :3].astype(np.uint16) * 257), 3)
    assert np.array_equal(decoded.permute(1, 2, 0), OTHERS[..., :3])


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_dark_images_are_read_where_others_of_the_set_fill_16_bits(tmp_path, ending):
    dark, bright = RAMP.astype(np.uint16), RAMP.astype(np.uint16) * 257
    for name, pixels in (("bright/0", bright), *((f"dark/{i}", dark + 256 * i) for i in range(3))):
        path = tmp_path / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    images = open_images(folder_config(tmp_path), "train")
    assert [int(images.read(i)[0, 0, 0]) for i in range(4)] == [0, 0, 1, 2]
    alone = open_images(folder_config(tmp_path / "dark"), "train")
    with pytest.raises(ImageError, match="as of 12 bits or fewer"):
        alone.read(2)


def test_colours_of_16_bits_may_be_dark_beside_bright_ones(tmp_path):
    for name, factor in (("bright", 257), ("dark", 8)):
        pixels = OTHERS[..., :3].astype(np.uint16) * factor
        (tmp_path / f"{name}.png").write_bytes(deep_colour_png(pixels))
    images = open_images(folder_config(tmp_path), "train")
    assert int(images.read(1).max()) == 255 * 8 >> 8


# -- bands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 2])
def test_near_infrared_is_the_fourth_channel(extra):
    data = retagged(encoded(OTHERS), 338, extra)
    assert np.array_equal(decode(data, 4).permute(1, 2, 0), OTHERS)


def test_a_band_that_is_not_alpha_changes_no_colour():
    data = retagged(encoded(OTHERS), 338, 0)
    assert np.array_equal(decode(data, 3).permute(1, 2, 0), OTHERS[..., :3])


# -- alpha -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_are_composited_on_white(file_format, channels):
    black = np.zeros((16, 16, 4), np.uint8)
    black[4:8, 4:8, 3] = 255
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = decode(encoded(black, file_format, **options), channels).numpy()
    assert (decoded[:, 4:8, 4:8] == 0).all()
    assert (decoded.sum() == 255 * channels * (256 - 16)).all()


def test_palettes_grey_and_half_transparent_pixels_are_composited():
    palette = Image.fromarray(RAMP // 128, "P")
    palette.putpalette([0, 0, 0, 200, 0, 0])
    decoded = decode(encoded(palette, "PNG", transparency=0), 3).permute(1, 2, 0).numpy()
    assert (decoded[0, 0].tolist(), decoded[15, 15].tolist()) == ([255] * 3, [200, 0, 0])
    grey = Image.fromarray(np.dstack([np.zeros_like(RAMP), np.full_like(RAMP, 51)]))
    assert set(decode(encoded(grey, "PNG"), 1).flatten().tolist()) == {204}


def test_opaque_alpha_changes_no_pixel():
    opaque = np.dstack([OTHERS[..., :3], np.full_like(RAMP, 255)])
    assert np.array_equal(decode(encoded(opaque, "PNG"), 3).permute(1, 2, 0), opaque[..., :3])


# -- pages -------------------------------------------------------------------------------------


def test_a_tiff_of_several_pages_is_refused_and_a_thumbnail_is_no_page():
    page = Image.fromarray(RAMP)
    data = encoded(page, "TIFF", save_all=True, append_images=[page])
    with pytest.raises(ImageError, match="a TIFF of several pages"):
        decode(data, 1)
    thumbnail = Image.fromarray(RAMP[:4, :4])
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    data = encoded(page, "TIFF", save_all=True, append_images=[thumbnail])
    assert np.array_equal(decode(data, 1)[0], RAMP)
