"""Framing and reading of images, against their definitions and against PIL."""

import re

import numpy as np
import pytest
import torch
from figure_helpers import noise, save_image
from PIL import Image

from dino_xcit.errors import UserError
from dino_xcit.figures import framing as framing_module
from dino_xcit.figures.framing import Framing, resized_sides, without_padding


def framing(patch=4, long_side=32, fit="crop", *, per_pixel=100.0, memory=2**40, cpu_memory=2**40):
    return Framing(
        patch=patch,
        long_side=long_side,
        fit=fit,
        bytes_per_pixel=per_pixel,
        memory=memory,
        cpu_memory=cpu_memory,
    )


# -- framing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (97, 61), (7, 31), (64, 64)])
@pytest.mark.parametrize(("patch", "long_side"), [(4, 32), (8, 50), (4, 99), (16, 480)])
def test_the_long_side_is_the_requested_one_and_the_aspect_is_kept(height, width, patch, long_side):
    image = noise(height, width)
    ideal = height * long_side / max(height, width), width * long_side / max(height, width)
    for fit in ("crop", "pad"):
        pixels, (H, W) = framing(patch, long_side, fit).apply(image)
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1] % patch == pixels.shape[2] % patch == 0
        if fit == "pad":
            assert max(H, W) == long_side
            for side, wanted, padded in zip((H, W), ideal, pixels.shape[1:], strict=True):
                assert abs(side - wanted) <= 0.5
                assert 0 <= padded - side < patch
        else:
            assert pixels.shape[1:] == (H, W)
            for side, wanted in zip((H, W), ideal, strict=True):
                assert -patch < side - round(wanted) <= 0


def test_a_crop_is_the_centre_of_the_image():
    image = noise(39, 58)
    pixels, size = framing(8, 0).apply(image)
    assert size == (32, 56)
    assert torch.equal(pixels, image[:, 3:35, 1:57])
    pixels, size = framing(8, 0).apply(image[:, :, :57])
    assert torch.equal(pixels, image[:, 3:35, :56])


def test_padding_repeats_the_edge():
    image = noise(39, 58)
    pixels, size = framing(8, 0, "pad").apply(image)
    assert size == (39, 58)
    expected = np.pad(image.numpy(), ((0, 0), (0, 1), (0, 6)), mode="edge")
    assert np.array_equal(pixels.numpy(), expected)
    np.testing.assert_array_equal(without_padding(pixels, size), image.permute(1, 2, 0).numpy())


def test_size_0_keeps_the_size():
    image = noise(64, 400)
    assert torch.equal(framing(8, 0).apply(image)[0], image)
    assert resized_sides(123, 45, 0) == (123, 45)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = noise(24, 32)
    for fit in ("crop", "pad"):
        assert torch.equal(framing(8, 32, fit).apply(image)[0], image)


def test_resizing_is_pils_bicubic_but_for_rounding():
    image = noise(60, 90)
    pixels, _ = framing(4, 48).apply(image)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (48, 32), Image.Resampling.BICUBIC
    )
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_masks_are_resized_without_new_values():
    mask = torch.zeros(1, 20, 30, dtype=torch.uint8)
    mask[:, 5:12, 8:21] = 7
    pixels, _ = framing(4, 60).apply(mask, mode="nearest-exact")
    assert set(pixels.unique().tolist()) == {0, 7}
    assert torch.equal(pixels, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(
    ("height", "width", "long_side"), [(3, 3, 0), (2, 100, 0), (100, 2, 0), (500, 10, 40)]
)
def test_an_image_smaller_than_a_patch_is_refused_unless_it_is_padded(height, width, long_side):
    image = noise(height, width)
    with pytest.raises(
        UserError,
        match=rf"^{width} x {height} pixels, .*smaller than a patch of 4 x 4; raise --image_size",
    ):
        framing(4, long_side).apply(image)
    pixels, size = framing(4, long_side, "pad").apply(image)
    assert min(pixels.shape[1:]) == 4
    assert size == resized_sides(height, width, long_side)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(1, 1000, (1, 32)), (1000, 1, (32, 1)), (1, 1, (32, 32))]
)
def test_no_side_vanishes(height, width, expected):
    assert resized_sides(height, width, 32) == expected


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(3000, 4000), (4000, 3000), (1000, 1000), (500, 4000)]
)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_an_image_too_large_for_memory_is_refused_with_a_size_that_fits(height, width, share):
    needed = 5000.0 * height * width
    memory = share * needed
    with pytest.raises(UserError, match="--image_size") as refusal:
        framing(8, 0, per_pixel=5000.0, memory=memory).check(height, width)
    needed_gib, memory_gib = needed / 2**30, memory / 2**30
    message = (
        f"{width} x {height} pixels need about {needed_gib:.1f} GiB, "
        f"there are {memory_gib:.1f} GiB; --image_size "
    )
    assert str(refusal.value).startswith(message)
    size = int(re.search(r"--image_size (\d+) fits$", str(refusal.value))[1])
    assert 0 < size < max(height, width)
    assert size % 8 == 0
    framing(8, size, per_pixel=5000.0, memory=memory).check(height, width)
    with pytest.raises(UserError, match="fits"):  # and not much larger ones
        framing(8, size + 16, per_pixel=5000.0, memory=memory).check(height, width)


def test_memory_is_needed_for_the_framed_size_alone():
    """A large photograph is reduced first."""
    framing(4, 100, per_pixel=1, memory=100 * 75).check(3000, 4000)
    with pytest.raises(UserError, match="fits"):
        framing(4, 100, per_pixel=1, memory=100 * 75 - 1).check(3000, 4000)


def test_a_file_too_large_to_decode_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save_image(tmp_path / "large.png", noise(50, 70))
    monkeypatch.setattr(framing_module, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"^70 x 50 pixels: decoding alone needs about 0.0 GiB"):
        framing(cpu_memory=3 * 3 * 50 * 70 - 1).read(path, 1)
    with pytest.raises(UserError, match="no size fits"):
        framing(memory=10).read(path, 3)


@pytest.mark.parametrize("size", [(20, 20), (1, 4000), (4, 4000), (30, 4000)])
@pytest.mark.parametrize("memory", [10, 300, 5000])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_size_that_the_message_names_fits(size, memory, fit):
    with pytest.raises(UserError, match=r"--image_size|no size fits") as refusal:
        framing(8, 8000, fit, per_pixel=1.0, memory=memory).check(*size)
    if "no size fits" in str(refusal.value):
        assert memory < 64  # one patch
        return
    message = int(str(refusal.value).split("--image_size ")[1].split(" ")[0])
    assert message > 0  # 0 would keep the size
    smaller = framing(8, message, fit, per_pixel=1.0, memory=memory)
    smaller.check(*size)
    if fit == "pad":
        assert np.prod(smaller.apply(torch.zeros(1, *size, dtype=torch.uint8))[0].shape) <= memory


# -- reading ---------------------------------------------------------------------------------------


def test_files_of_every_kind_are_read_in_the_requested_channels(tmp_path):
    colour = noise(6, 9)
    grey = noise(6, 9, 1)
    array = colour.permute(1, 2, 0).numpy()
    alpha = np.concatenate([array, np.full((6, 9, 1), 200, np.uint8)], axis=-1)
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    Image.fromarray(grey[0].numpy().astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey[0].numpy().astype(np.uint16) * 257).save(tmp_path / "sixteen.tif")
    Image.fromarray(array).convert("P", palette=Image.Palette.ADAPTIVE, colors=200).save(
        tmp_path / "palette.gif"
    )
    save_image(tmp_path / "grey.bmp", grey)
    save_image(tmp_path / "colour.tif", colour)
    reader = framing()
    read = {path.name: (reader.read(path, 1), reader.read(path, 3)) for path in tmp_path.iterdir()}
    assert all(one.shape == (1, 6, 9) and three.shape == (3, 6, 9) for one, three in read.values())
    assert all(one.dtype == three.dtype == torch.uint8 for one, three in read.values())
    for name in ("grey.bmp", "sixteen.png", "sixteen.tif"):
        assert (read[name][0].int() - grey).abs().max() <= 1, name
        assert torch.equal(read[name][1], read[name][0].expand(3, -1, -1)), name
    assert torch.equal(read["colour.tif"][1], colour)
    expected = array.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(read["colour.tif"][0][0].numpy() - expected).max() <= 1


def test_photographs_are_read_upright(tmp_path):
    image = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter clockwise
    path = save_image(tmp_path / "turned.png", image, exif=exif)
    assert torch.equal(framing().read(path, 3), image.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", "an empty file"),
        (b"hello", "not an image"),
        (b"\x89PNG\r\n", "not an image"),
    ],
)
def test_what_is_not_an_image_is_refused_with_the_reason(data, message, tmp_path):
    path = tmp_path / "image.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        framing().read(path, 3)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".webp"])
def test_an_image_cut_short_is_refused_in_one_line(ending, tmp_path):
    path = save_image(tmp_path / f"image{ending}", noise(64, 64))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises((UserError, OSError), match=r"^[^\n]+$"):
        framing().read(path, 3)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize(
    "limit", [20, 60]
)  # PIL warns beyond its limit and refuses beyond twice as many pixels
def test_pils_limit_on_pixels_does_not_apply_and_is_restored(ending, limit, tmp_path, monkeypatch):
    image = noise(8, 10)
    path = save_image(tmp_path / f"image{ending}", image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert torch.equal(framing().read(path, 3), image)
    assert limit == Image.MAX_IMAGE_PIXELS  # restored
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="not an image"):
        framing().read(path, 3)
    assert limit == Image.MAX_IMAGE_PIXELS
