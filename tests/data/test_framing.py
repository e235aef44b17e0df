"""How evaluations frame images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dino_xcit.data import framing
from dino_xcit.data.framing import EvalDataset, Transform, centre_crop, default_resize
from dino_xcit.data.images import ShapeSet
from dino_xcit.errors import ImageError


@pytest.mark.parametrize(
    ("image_size", "resize_size"), [(224, 256), (384, 438), (96, 109), (95, 95), (32, 32)]
)
def test_default_resize_is_eight_sevenths_of_crops_that_are_not_small(image_size, resize_size):
    assert default_resize(image_size) == resize_size


@pytest.mark.parametrize(
    ("height", "width", "size", "resize_size"),
    [
        (40, 60, 32, 32),
        (60, 40, 28, 32),
        (33, 33, 32, 36),
        (97, 64, 32, 36),
        (20, 90, 32, 36),  # enlarged
        (300, 400, 224, 256),
        (400, 300, 224, 256),
        (334, 500, 224, 256),  # the resized image has 383 columns, (383 - 224) / 2 = 79.5
        (500, 373, 224, 256),
        (98, 49, 224, 256),  # 256 / 49 * 98 is a hair less than 512
    ],
)
def test_framing_is_torchvisions_resize_and_centre_crop_of_pil_images(
    height, width, size, resize_size
):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    reference = Compose(
        [Resize(resize_size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)]
    )
    framed = centre_crop(torch.from_numpy(image).permute(2, 0, 1), size, resize_size)
    assert framed.dtype == torch.uint8
    assert framed.shape == (3, size, size)
    difference = framed.permute(1, 2, 0).numpy().astype(int) - np.asarray(
        reference(Image.fromarray(image))
    )
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("error", [ImageError("broken"), OSError("gone")])
def test_an_unreadable_image_is_framed_as_black(error):
    class Unreadable:
        def read(self, index):
            raise error

    transform = Transform(12, 16, (0.5,), (0.5,))
    image, readable = EvalDataset(Unreadable(), transform)[0]
    assert not readable
    assert torch.equal(image, torch.zeros(1, 12, 12, dtype=torch.uint8))


def test_an_error_of_our_own_framing_is_not_a_bad_image(monkeypatch):
    def broken(*_):
        raise ValueError("broken crop")

    monkeypatch.setattr(framing, "centre_crop", broken)
    with pytest.raises(ValueError, match="broken crop"):
        EvalDataset(ShapeSet(0, "train", 4, 1), Transform(12, 14, (0.5,), (0.2,)))[0]
