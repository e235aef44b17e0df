"""`dino_xcit.preprocess`: images of any kind become the batch that a backbone takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import RAMP
from PIL import Image

import dino_xcit
from dino_xcit.data.framing import centre_crop
from dino_xcit.errors import ImageError, UserError
from dino_xcit.model.xcit import XCiT

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def backbone() -> XCiT:
    network = XCiT("xcit_pico2_p8").eval()
    network.metadata = {"global_crops_size": 32, "mean": list(MEAN), "std": list(STD)}
    return network


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    pixels = centre_crop(torch.from_numpy(RAMP).permute(2, 0, 1), 32, 32).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return ((pixels - mean) / std).float()


def test_every_kind_of_image_gives_the_same_batch(backbone, expected, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    tensor = torch.from_numpy(RAMP).permute(2, 0, 1)
    kinds = [path, str(path), Image.fromarray(RAMP), RAMP, tensor, RAMP / 255, tensor / 255]
    prepare = dino_xcit.preprocess(backbone)
    for image in kinds:
        torch.testing.assert_close(prepare(image), expected[None])
    batch = prepare(kinds)
    assert batch.shape == (len(kinds), 3, 32, 32)
    torch.testing.assert_close(batch, expected.expand_as(batch))
    torch.testing.assert_close(prepare(torch.stack([tensor, tensor]))[1], expected)
    torch.testing.assert_close(prepare(np.stack([RAMP, RAMP]))[1], expected)
    with torch.no_grad():
        assert backbone(batch).shape == (len(kinds), 64)


def test_grey_arrays_serve_for_every_channel(backbone):
    prepare = dino_xcit.preprocess(backbone, mean=(0, 0, 0), std=(1, 1, 1))
    batch = prepare(RAMP[:, :, 0])
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert torch.equal(batch, prepare(Image.fromarray(RAMP[:, :, 0])))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RAMP.astype(np.int64), r"is torch\.int64; expected uint8, or floats from 0 to 1"),
        (RAMP.astype(np.float32), "has values from 0 to 255; expected uint8, or 0 to 1"),
        (RAMP[:, :, :2], r"of the shape \(2, 40, 60\); expected 3 channels"),
        (np.full((8, 8, 3), np.nan), "has values from nan to nan"),
    ],
)
def test_what_is_no_image_is_refused(backbone, image, message):
    with pytest.raises(UserError, match=message):
        dino_xcit.preprocess(backbone)(image)


def test_a_file_that_cannot_be_read_is_named(backbone, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"b\.png: not an image"):
        dino_xcit.preprocess(backbone)(tmp_path / "b.png")


def test_what_is_assumed_is_printed_and_what_is_not_known_refused(capsys):
    dino_xcit.preprocess(XCiT("xcit_pico2_p8"), 64)
    assert "xcit_pico2_p8 backbone does not hold" in capsys.readouterr().err
    with pytest.raises(UserError, match="set --mean and --std"):
        dino_xcit.preprocess(XCiT("xcit_pico2_p8", in_chans=1))
    grey = dino_xcit.preprocess(XCiT("xcit_pico2_p8", in_chans=1), 64, mean=[0.5], std=[0.2])
    assert grey(RAMP[:, :, 0]).shape == (1, 1, 64, 64)
    with pytest.raises(UserError, match=r"--image_size 30: .*patch size 8 must divide"):
        dino_xcit.preprocess(XCiT("xcit_pico2_p8"), 30)
