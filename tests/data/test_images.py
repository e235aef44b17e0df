"""Sets of images: folders, named sources, the embedded images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import TINY, folder_config, make_folder
from timm.data.readers import get_img_extensions

from dino_xcit.data import images as images_module
from dino_xcit.data.images import fingerprint, open_images
from dino_xcit.data.named import TorchSet
from dino_xcit.errors import ImageError, UserError

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a.jpg", "b.png", "c.webp"], None),
        (["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"], 2),
        (
            [
                "train/cat/a.jpg",
                "train/cat/b.jpg",
                "train/dog/c.jpg",
                "val/cat/d.jpg",
                "val/dog/e.jpg",
            ],
            2,
        ),
        (["2021/jan/a.jpg", "2022/feb/b.jpg", "2022/mar/c.TIF"], 2),
    ],
)
def test_folders_flat_labelled_split_and_nested(tmp_path, names, classes):
    config = folder_config(make_folder(tmp_path, names))
    train = open_images(config, "train")
    assert len(train) == 3
    assert train.read(0).shape == (3, 40, 60)
    assert (train.labels is None) if classes is None else (len(set(train.labels)) == classes)
    validation = open_images(config, "validation")
    assert (len(validation) == 2) if "val/cat/d.jpg" in names else validation is None


def test_a_class_has_the_same_label_in_both_splits(tmp_path):
    names = ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/4.png", "val/c/5.png"]
    config = folder_config(make_folder(tmp_path, names))
    train = open_images(config, "train")
    validation = open_images(config, "validation", train.classes)
    assert validation.labels.tolist() == [train.classes["b"], train.classes["c"]] == [1, 2]


def test_a_subset_is_picked_by_the_seed(tmp_path):
    root = make_folder(tmp_path, [f"{i % 2}/{i}.png" for i in range(20)])
    pick = lambda seed: names_of(dataclasses.replace(folder_config(root), seed=seed, num_images=5))  # noqa: E731
    assert len(pick(0)) == 5
    assert pick(0) == pick(0)
    assert pick(0) != pick(1)


def names_of(config: RunConfig) -> list[str]:
    images = open_images(config, "train")
    return [images.name(i) for i in range(len(images))]


def test_shapes_are_the_default_and_labelled():
    config = dataclasses.replace(TINY, dataset=None, data_path=None)
    images = open_images(config, "train")
    assert len(images) == TINY.num_images
    assert images.read(3).dtype == torch.uint8
    assert len(open_images(config, "validation")) > 0


def test_empty_and_wrong_folders_say_what_was_found(tmp_path):
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(UserError, match=r"no images in --data_path .*1 other files"):
        open_images(folder_config(tmp_path), "train")
    with pytest.raises(UserError, match="is a file"):
        open_images(folder_config(tmp_path / "notes.md"), "train")
    with pytest.raises(UserError, match="does not exist"):
        open_images(folder_config(tmp_path / "nowhere"), "train")


def test_only_known_kinds_of_named_sets_are_opened(tmp_path):
    make_folder(tmp_path, ["a.png"])
    with pytest.raises(
        UserError, match=r"--dataset photos is unknown; expected shapes .*, torch/NAME"
    ):
        open_images(dataclasses.replace(TINY, dataset="photos", data_path=str(tmp_path)), "train")


def test_more_images_than_there_are_is_an_error(tmp_path):
    root = make_folder(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="--num_images 2 is more than the 1 images"):
        open_images(dataclasses.replace(folder_config(root), num_images=2), "train")


def test_extensions_of_images_are_read_and_timms_table_stays_as_it_was(tmp_path):
    before = get_img_extensions()
    root = make_folder(tmp_path, ["a.webp", "b.TIF", "c.jpg", "d.gif"])
    (root / "e.txt").write_text("no image")
    assert len(open_images(folder_config(root), "train")) == 4
    assert get_img_extensions() == before


def test_a_file_that_is_no_image_and_one_that_is_gone_raise_as_promised(tmp_path):
    root = make_folder(tmp_path, ["a.png", "b.png"])
    images = open_images(folder_config(root), "train")
    (root / "a.png").write_bytes(b"no image")
    (root / "b.png").unlink()
    with pytest.raises(ImageError, match="not an image"):
        images.read(0)
    with pytest.raises(FileNotFoundError):
        images.read(1)


class Pictures(torch.utils.data.Dataset):
    """A set as torchvision's, whose images fail in ways of their own."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise SyntaxError("broken PNG file")


def test_errors_of_torchvisions_sets_are_unreadable_images():
    with pytest.raises(ImageError, match="broken PNG file"):
        TorchSet(Pictures(), 3).read(0)


def test_channels_that_no_file_has_are_refused_as_the_set_is_opened(tmp_path):
    root = make_folder(tmp_path, ["a.png"])
    config = folder_config(root, in_chans=2, mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(UserError, match=r"--in_chans 2; expected 1, 3 or 4"):
        open_images(config, "train")


def test_a_source_is_a_row_in_the_table(monkeypatch):
    class Own(images_module.ShapeSet):
        pass

    def open_own(config, split, classes):
        return Own(1, f"{config.dataset} {split}", 7, 3)

    own = images_module.Source(open_own, "own/NAME", generated=True)
    monkeypatch.setitem(images_module.SOURCES, "own/", own)
    images = open_images(dataclasses.replace(TINY, dataset="own/name"), "validation")
    assert isinstance(images, Own)
    assert (images.split, len(images)) == ("own/name validation", 7)


def test_the_fingerprint_changes_with_the_files_and_survives_unreadable_ones(tmp_path):
    root = make_folder(tmp_path, ["a.png", "b.png"])
    first = fingerprint(open_images(folder_config(root), "train"))
    assert fingerprint(open_images(folder_config(root), "train")) == first
    (root / "b.png").write_bytes(b"no image")
    assert fingerprint(open_images(folder_config(root), "train")) != first
