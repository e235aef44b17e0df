"""Folders of images: splits, classes, order, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import folder_config, make_folder
from timm.data.readers.reader_image_folder import ReaderImageFolder

from dino_xcit.data import folder as folder_module
from dino_xcit.data.decode import EXTENSIONS
from dino_xcit.data.folder import image_files
from dino_xcit.data.images import open_images
from dino_xcit.data.names import FileNames
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, METRICS


def paths(images) -> list[str]:
    return [str(Path(images.name(i))) for i in range(len(images))]


# -- names ---------------------------------------------------------------------------------------


def test_names_are_those_that_were_given_in_memory_that_reading_does_not_write():
    given = ["a.png", "", "d\u00e9/\u732b.png", os.fsdecode(b"not-utf8-\xff.png"), "b"]
    names = FileNames(given)
    assert list(names) == given
    assert (names[-1], list(names[1:3]), len(names)) == ("b", given[1:3], 5)
    assert given[3] in names
    with pytest.raises(IndexError):
        names[5]
    assert list(FileNames([])) == []


def test_a_set_of_files_holds_no_python_object_for_each_file(tmp_path):
    """Each worker would have a copy of them."""
    root = make_folder(tmp_path, [f"cat/{i}.png" for i in range(5)])
    images = open_images(folder_config(root), "train")
    held = [images.files, images.listing.files]
    assert not [names for names in held if isinstance(names, list)]
    assert paths(images) == [str(root / f"cat/{i}.png") for i in range(5)]


# -- classes and order -------------------------------------------------------------------------


def test_plain_class_folders_keep_timms_order_and_labels(tmp_path):
    names = ["img10", "img9", "Img2", "a", "B", "x1y20", "x1y3"]
    root = make_folder(
        tmp_path, [f"train/{c}/{name}.png" for c in ("n10", "n9", "Cat", "dog") for name in names]
    )
    images = open_images(folder_config(root), "train")
    timms = ReaderImageFolder(str(root / "train"), input_key=";".join(EXTENSIONS))
    assert paths(images) == [path for path, _ in timms.samples]
    assert images.labels.tolist() == [label for _, label in timms.samples]
    assert images.classes == timms.class_to_idx


def test_names_that_differ_in_case_or_zeros_have_an_order_of_their_own(tmp_path, monkeypatch):
    root = make_folder(tmp_path, ["img1.png", "img01.png", "IMG1.png"])
    first = paths(open_images(folder_config(root), "train"))
    walk = os.walk
    backwards = lambda *a, **k: ((p, d[::-1], f[::-1]) for p, d, f in walk(*a, **k))  # noqa: E731
    monkeypatch.setattr(folder_module.os, "walk", backwards)
    assert paths(open_images(folder_config(root), "train")) == first


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/2020/a.png", "train/dog/2020/b.png", "train/dog/2021/c.png"],
        ["train/cat/images/x.jpg", "train/dog/images/y.jpg"],
        ["cat/a.png", "dog/deep/er/b.png"],
    ],
)
def test_the_class_is_the_first_folder_below_the_split(tmp_path, names):
    images = open_images(folder_config(make_folder(tmp_path, names)), "train")
    assert images.classes == {"cat": 0, "dog": 1}
    assert ["cat" if "/cat/" in path else "dog" for path in paths(images)] == [
        ("cat", "dog")[label] for label in images.labels
    ]


def test_hidden_files_and_folders_and_those_of_archives_are_left_out(tmp_path):
    names = [".ipynb_checkpoints/a.png", "__MACOSX/cat/b.png", "cat/c.png", "cat/.x/d.png"]
    root = make_folder(tmp_path, [*names, "dog/e.png"])
    for name in ("._c.png", ".hidden.png", ".DS_Store"):
        (root / "cat" / name).write_bytes(b"metadata")
    images = open_images(folder_config(root), "train")
    assert [Path(path).name for path in paths(images)] == ["c.png", "e.png"]
    assert images.classes == {"cat": 0, "dog": 1}
    assert not images.listing.ignored
    assert [path.name for path in image_files(root)] == ["b.png", "c.png", "e.png"]


def test_a_folder_of_hidden_images_alone_is_no_class_beside_train(tmp_path):
    root = make_folder(tmp_path, ["train/a.png", "notes/.x.png"])
    assert not open_images(folder_config(root), "train").notes


# -- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("Train", "Val"),
        ("TRAIN", "valid"),
        ("training", "validation"),
        ("train_images", "val_images"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("trainset", "dev"),
    ],
)
def test_splits_are_found_by_their_usual_names(tmp_path, train, validation):
    names = [f"{train}/a/1.png", f"{train}/b/2.png", f"{validation}/a/3.png"]
    config = folder_config(make_folder(tmp_path, names))
    assert (len(open_images(config, "train")), len(open_images(config, "validation"))) == (2, 1)


def test_val_is_preferred_to_test(tmp_path):
    config = folder_config(make_folder(tmp_path, ["train/1.png", "test/2.png", "val/3.png"]))
    assert Path(paths(open_images(config, "validation"))[0]).name == "3.png"


def test_two_folders_for_one_split_are_refused(tmp_path):
    config = folder_config(make_folder(tmp_path, ["train2014/1.png", "train2017/2.png"]))
    with pytest.raises(UserError, match="both train2014/ and train2017/"):
        open_images(config, "train")


@pytest.mark.parametrize("names", [["cat/1.png", "dog/2.png"], ["my_photos/cat/1.png"], []])
@pytest.mark.parametrize("validation", ["val", "Valid"])
def test_validation_images_are_never_training_images(tmp_path, names, validation):
    root = make_folder(tmp_path, [*names, f"{validation}/cat/3.png"])
    folder = names[0].split("/")[0] if names else validation
    with pytest.raises(UserError, match=rf"has {validation}/ but no train/.*{root / folder}$"):
        open_images(folder_config(root), "train")


def test_a_class_named_as_a_split_is_one_of_the_classes_of_train(tmp_path):
    with pytest.raises(UserError, match=r"put the training .* into train/, test/ too if it is a"):
        open_images(folder_config(make_folder(tmp_path, ["cat/1.png", "test/2.png"])), "train")
    (tmp_path / "train").mkdir()
    for name in ("cat", "test"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert open_images(folder_config(tmp_path), "train").classes == {"cat": 0, "test": 1}


def test_a_class_named_train_is_one_of_the_classes_and_said(tmp_path):
    images = open_images(
        folder_config(make_folder(tmp_path, ["bus/1.png", "car/2.png", "train/3.png"])), "train"
    )
    assert images.classes == {"bus": 0, "car": 1, "train": 2}
    assert "train/ is taken as a class beside bus/, car/" in images.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        ["train/1.png", "masks/1.png"],  # one folder beside: no set of classes
        ["train/cat/1.png", "train/stray.png", "samples/2.png", "extra/3.png"],
    ],
)
def test_other_folders_beside_a_training_folder_are_not_trained_on(tmp_path, names):
    root = make_folder(tmp_path, names)
    images = open_images(folder_config(root), "train")
    assert {images.name(i) for i in range(len(images))} == {
        str(root / name) for name in names if name.startswith("train/")
    }
    assert "beside it not used" in images.notes[0]


def test_folders_beside_the_training_folder_are_named(tmp_path):
    names = ["train/cat/1.png", "extra/cat/2.png", "val/cat/3.png"]
    root = make_folder(tmp_path, names)
    (root / "docs").mkdir()
    images = open_images(folder_config(root), "train")
    assert len(images) == 1
    assert images.notes == ("training images are those in train/; extra/ beside it not used",)


# -- what is left out --------------------------------------------------------------------------


def test_an_output_folder_inside_the_data_is_no_class(tmp_path):
    root = make_folder(tmp_path, ["cat/1.png", "runs/mine/crops.png", "old/run/crops.png"])
    for name in (CONFIG, METRICS):
        (root / "old/run" / name).write_text("")
    images = open_images(folder_config(root, output_dir=str(root / "runs/mine")), "train")
    assert paths(images) == [str(root / "cat/1.png")]


def test_the_folder_of_the_images_is_no_output_folder(tmp_path):
    root = make_folder(tmp_path, ["1.png"])
    with pytest.raises(UserError, match=r"--output_dir .* is the folder of the images"):
        open_images(folder_config(root, output_dir=str(root)), "train")


def test_a_link_to_a_folder_above_is_not_followed_and_other_links_are(tmp_path):
    root = make_folder(tmp_path / "data", ["cat/1.png"])
    make_folder(tmp_path / "other", ["2.png"])
    (root / "cat" / "up").symlink_to(root)
    (root / "dog").symlink_to(tmp_path / "other")
    assert paths(open_images(folder_config(root), "train")) == [
        str(root / "cat/1.png"),
        str(root / "dog/2.png"),
    ]


def test_folders_that_cannot_be_opened_and_other_files_are_counted(tmp_path, monkeypatch):
    root = make_folder(tmp_path, ["cat/1.png", "dog/2.png"])
    for name in ("a.HEIC", "b.heic", "c.mp4", "README"):
        (root / "cat" / name).write_text("")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", guarded)
    monkeypatch.setattr(os, "scandir", guarded)
    listing = folder_module.list_images(root)
    assert [Path(file).name for file in listing.files] == ["1.png"]
    assert listing.ignored == {".heic": 2, ".mp4": 1, "README": 1}
    assert listing.unopened == [f"{root / 'dog'} (Permission denied)"]


def test_labels_of_given_classes_leave_other_classes_out(tmp_path):
    config = folder_config(make_folder(tmp_path, ["train/a/1.png", "train/b/2.png"]))
    images = open_images(config, "train", {"b": 7})
    assert np.array_equal(images.labels, [7])
    assert len(images) == 1


def test_validation_images_of_other_classes_alone_are_none(tmp_path):
    names = ["train/n01/images/1.png", "train/n02/images/2.png", "val/images/3.png"]
    config = folder_config(make_folder(tmp_path, names))
    train = open_images(config, "train")
    assert open_images(config, "validation", train.classes) is None
