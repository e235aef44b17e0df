"""Masks that cannot be read or do not fit are left out; errors of our own are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino_xcit.config.evaluation import SegConfig
from dino_xcit.data import masked
from dino_xcit.data.framing import Transform
from dino_xcit.data.masked import MaskDataset, MaskedFiles, MaskedShapes, open_masked
from dino_xcit.errors import ImageError, UserError

TRANSFORM = Transform(24, 32, (0.5,) * 3, (0.2,) * 3)


def save(path, *shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ones(shape, np.uint8)).save(path)


@pytest.fixture
def files(tmp_path):
    """An image, and where its mask belongs."""
    save(tmp_path / "image.png", 40, 48, 3)
    return MaskedFiles([tmp_path / "image.png"], [tmp_path / "mask.png"], 3)


@pytest.mark.parametrize("fault", ["missing", "damaged", "in colour", "of another size"])
def test_a_mask_that_cannot_be_used_is_reported_as_unreadable(files, fault):
    path = files.masks[0]
    if fault == "damaged":
        path.write_bytes(b"no image")
    elif fault != "missing":
        save(path, *((40, 48, 3) if fault == "in colour" else (40, 47)))
    mask, readable = MaskDataset(files, TRANSFORM, ())[0]
    assert not readable
    assert torch.equal(mask, torch.zeros(24, 24, dtype=torch.uint8))


def test_reading_a_mask_raises_as_promised(files):
    with pytest.raises(FileNotFoundError):
        files.mask(0)
    save(files.masks[0], 40, 48, 3)
    with pytest.raises(ImageError, match="is in colour or of 16 bits"):
        files.mask(0)


def test_an_error_of_our_own_framing_is_not_an_unreadable_mask(monkeypatch):
    def broken(*_):
        raise ValueError("broken crop")

    monkeypatch.setattr(masked, "centre_crop", broken)
    with pytest.raises(ValueError, match="broken crop"):
        MaskDataset(MaskedShapes(0, "train", 4, 3), TRANSFORM, ())[0]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "has no images/; expected images/ and masks/ with train/ and val/ in each"),
        (["images/train/a.png"], "has no masks/; expected"),
        (["images/train/a.png", "masks/train/a.png"], "has no validation images; expected"),
        (["images/train/a.png", "masks/train/b.png"], "no image in .* has a mask of its name in"),
    ],
)
def test_folders_without_masks_say_what_was_expected(tmp_path, written, message):
    for name in written:
        save(tmp_path / name, 8, 8)
    with pytest.raises(UserError, match=message):
        open_masked(SegConfig(weights="any", data_path=str(tmp_path)))


def test_more_images_than_have_masks_are_an_error(tmp_path):
    for name in ("images/train/a.png", "masks/train/a.png", "images/val/b.png", "masks/val/b.png"):
        save(tmp_path / name, 8, 8)
    config = SegConfig(weights="any", data_path=str(tmp_path), num_images=2)
    with pytest.raises(UserError, match="--num_images 2 is more than the 1 images found"):
        open_masked(config)
