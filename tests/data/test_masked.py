"""Masks that cannot be read or do not fit are left out; errors of our own are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dino_xcit.config.evaluation import SegConfig
from dino_xcit.data import masked
from dino_xcit.data.framing import Transform
from dino_xcit.data.mask_files import read_mask
from dino_xcit.data.masked import VOID, MaskDataset, MaskedFiles, MaskedShapes, open_masked
from dino_xcit.errors import ImageError, UserError

TRANSFORM = Transform(24, 32, (0.5,) * 3, (0.2,) * 3)


def save(path, *shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.ones(shape, np.uint8)
    if len(shape) == 3:
        pixels[..., 0] = 7  # no grey
    Image.fromarray(pixels).save(path)


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
    assert torch.equal(mask, torch.zeros(24, 24, dtype=torch.int16))


def test_reading_a_mask_raises_as_promised(files):
    with pytest.raises(FileNotFoundError):
        files.mask(0)
    save(files.masks[0], 40, 48, 3)
    with pytest.raises(ImageError, match=r"mask .*mask\.png: is in colour"):
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


LAYOUTS = {
    "ADE20K": (
        ["images/training/a.jpg", "images/validation/b.jpg"],
        ["annotations/training/a.png", "annotations/validation/b.png"],
    ),
    "Cityscapes": (
        ["leftImg8bit/train/x/x_1_leftImg8bit.png", "leftImg8bit/val/y/y_2_leftImg8bit.png"],
        [
            "gtFine/train/x/x_1_gtFine_labelTrainIds.png",
            "gtFine/val/y/y_2_gtFine_labelTrainIds.png",
        ],
    ),
    "COCO": (
        ["train2017/1.jpg", "val2017/2.jpg"],
        ["stuffthingmaps/train2017/1.png", "stuffthingmaps/val2017/2.png"],
    ),
    "COCO in images/": (
        ["images/train2017/1.jpg", "images/val2017/2.jpg"],
        ["annotations/train2017/1.png", "annotations/val2017/2.png"],
    ),
    "MMSegmentation": (
        ["img_dir/train/1.jpg", "img_dir/val/2.jpg"],
        ["ann_dir/train/1.png", "ann_dir/val/2.png"],
    ),
    "split first": (
        ["train/images/1.jpg", "val/images/2.jpg"],
        ["train/masks/1.png", "val/masks/2.png"],
    ),
    "ending": (
        ["images/train/1.jpg", "images/val/2.jpg"],
        ["masks/train/1_mask.png", "masks/val/2_mask.png"],
    ),
    "CamVid": (
        ["train/1.png", "val/2.png"],
        ["train_labels/1_L.png", "val_labels/2_L.png"],
    ),
    "in one folder": (
        ["train/p/1.tif", "val/p/2.tif"],
        ["train/p/1_mask.tif", "val/p/2_mask.tif"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_find_their_masks(tmp_path, layout, capsys):
    images, masks = LAYOUTS[layout]
    others = ["gtFine/train/x/x_1_gtFine_color.png", "gtFine/train/x/x_1_gtFine_instanceIds.png"]
    for name in (*images, *masks, *(others if layout == "Cityscapes" else [])):
        save(tmp_path / name, 8, 8)
    splits, _ = open_masked(SegConfig(weights="any", data_path=str(tmp_path)))
    assert [str(splits[s].images[0].relative_to(tmp_path)) for s in splits] == images
    assert [str(splits[s].masks[0].relative_to(tmp_path)) for s in splits] == masks
    assert [len(splits[s]) for s in splits] == [1, 1]
    assert "have no mask" not in capsys.readouterr().err


def test_images_without_a_mask_are_counted(tmp_path, capsys):
    for name in ("images/train/a.png", "masks/train/a.png", "images/val/b.png", "masks/val/b.png"):
        save(tmp_path / name, 8, 8)
    save(tmp_path / "images/train/c.png", 8, 8)
    open_masked(SegConfig(weights="any", data_path=str(tmp_path)))
    said = capsys.readouterr().err
    assert "1 of 2 train images have no mask in" in said
    assert "the first is " + str(tmp_path / "images/train/c.png") in said


# -- files of masks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "lines"),
    [
        ("label_colors.txt", "64 128 64\tAnimal\n192 0 128\tArchway\n"),
        ("class_dict.csv", "name,r,g,b\nAnimal,64,128,64\nArchway,192,0,128\n"),
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nAnimal:64,128,64::\nArchway:192,0,128::",
        ),
    ],
)
def test_colours_are_classes_by_their_list(tmp_path, file, lines):
    for name in ("images/train/a.png", "images/val/b.png"):
        save(tmp_path / name, 8, 8)
    colours = np.array([[64, 128, 64], [192, 0, 128]], np.uint8)
    expected = np.arange(64).reshape(8, 8) % 3 // 2
    for name in ("masks/train/a.png", "masks/val/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(colours[expected]).save(tmp_path / name)
    (tmp_path / file).write_text(lines)
    splits, classes = open_masked(SegConfig(weights="any", data_path=str(tmp_path)))
    assert classes == {"Animal": 0, "Archway": 1}
    np.testing.assert_array_equal(splits["train"].mask(0), expected)
    colours[0, 0] = 1
    Image.fromarray(colours[expected]).save(splits["train"].masks[0])
    with pytest.raises(ImageError, match=r"a\.png: has the colour 1 128 64, which .* lacks"):
        splits["train"].mask(0)


@pytest.mark.parametrize("kind", ["16 bits", "grey as colours", "grey with alpha"])
def test_the_kind_of_file_does_not_change_the_classes(tmp_path, kind):
    numbers = np.arange(64).reshape(8, 8)
    array = numbers.astype(np.uint8)
    if kind == "16 bits":
        numbers, array = numbers * 300, (numbers * 300).astype(np.uint16)
    elif kind == "grey as colours":
        array = array[..., None].repeat(3, -1)
    else:
        array = np.stack([array, np.full_like(array, 255)], -1)
    Image.fromarray(array).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), numbers)


def test_values_to_ignore_may_have_16_bits(tmp_path, files):
    array = np.full((40, 48), 65535, np.uint16)
    array[:20] = 3
    Image.fromarray(array).save(files.masks[0])
    mask, readable = MaskDataset(files, TRANSFORM, (65535,))[0]
    assert readable
    assert set(mask.unique().tolist()) == {3, VOID}


def test_more_images_than_have_masks_are_an_error(tmp_path):
    for name in ("images/train/a.png", "masks/train/a.png", "images/val/b.png", "masks/val/b.png"):
        save(tmp_path / name, 8, 8)
    config = SegConfig(weights="any", data_path=str(tmp_path), num_images=2)
    with pytest.raises(UserError, match="--num_images 2 is more than the 1 images found"):
        open_masked(config)
