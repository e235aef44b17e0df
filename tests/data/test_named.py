"""Named data sets: the columns of Hugging Face's sets, which are replaced by a small imitation."""

from __future__ import annotations

import dataclasses
import io
import sys
import types

import numpy as np
import pytest
from helpers import TINY
from PIL import Image

from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data.images import open_images
from dino_xcit.errors import ImageError, UserError


class HFImage:
    """`datasets.Image`."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class HFClasses:
    """`datasets.ClassLabel`."""

    names = ("cat", "dog")


class HFDataset:
    """`datasets.Dataset`: rows of named columns."""

    def __init__(self, features, rows, column="") -> None:
        self.features, self.rows, self.undecoded = features, rows, column

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self.rows]
        assert self.undecoded
        return self.rows[key]

    def cast_column(self, column, kind):
        assert not kind.decode
        return HFDataset(self.features, self.rows, column)


def png(grey: int) -> dict:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{grey}.png"}


@pytest.fixture
def hugging_face(monkeypatch):
    """Splits by name; add to the returned dict."""
    splits: dict[str, HFDataset] = {}

    def load_dataset(name, split, cache_dir):
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}")
        return splits[split]

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=HFImage)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return splits


def config(**options):
    return dataclasses.replace(TINY, dataset="hfds/org/name", num_images=None, **options)


def rows(image="image", label="label"):
    return [{image: png(10 * i), label: i % 2} for i in range(4)]


def test_labels_and_names_of_classes_come_from_the_columns(hugging_face):
    hugging_face["train"] = HFDataset({"image": HFImage(), "label": HFClasses()}, rows())
    images = open_images(config(), "train")
    assert (images.labels.tolist(), images.classes) == ([0, 1, 0, 1], {"cat": 0, "dog": 1})
    assert np.unique(images.read(3)).tolist() == [30]
    assert images.name(3) == "30.png"
    assert open_images(config(), "validation") is None


def test_a_set_without_labels_is_read(hugging_face):
    hugging_face["train"] = HFDataset({"picture": HFImage()}, [{"picture": png(7)}])
    images = open_images(config(), "train")
    assert images.labels is None
    assert np.unique(images.read(0)).tolist() == [7]


def test_columns_of_other_names_are_options(hugging_face):
    columns = {"img": HFImage(), "fine": HFClasses(), "thumb": HFImage()}
    hugging_face["test"] = HFDataset(columns, rows("img", "fine"))
    images = open_images(config(input_key="img", target_key="fine"), "validation")
    assert images.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(
        UserError, match=r"--target_key coarse is no column of hfds/org/name; .*img"
    ):
        open_images(config(target_key="coarse"), "validation")


@pytest.mark.parametrize("values", [["cat", "dog"], [[0, 1], [1]], [0, None]])
def test_a_column_of_anything_but_integers_holds_no_labels(hugging_face, values):
    found = [{"image": png(1), "label": value} for value in values]
    hugging_face["train"] = HFDataset({"image": HFImage(), "label": None}, found)
    assert open_images(config(), "train").labels is None
    with pytest.raises(UserError, match="--target_key label holds no labels; expected an integer"):
        open_images(config(target_key="label"), "train")


def test_a_null_image_is_unreadable(hugging_face):
    hugging_face["train"] = HFDataset({"image": HFImage()}, [{"image": None}])
    images = open_images(config(), "train")
    with pytest.raises(ImageError, match=r"no image in this row \(null\)"):
        images.read(0)
    assert images.name(0) == "image 0"


def test_a_set_that_is_not_there_is_the_users_mistake(hugging_face):
    with pytest.raises(
        UserError, match=r"--dataset hfds/org/name could not be opened .*split 'trai"
    ):
        open_images(config(), "train")


@pytest.mark.parametrize("flag", ["input_key", "target_key"])
def test_columns_are_of_hugging_faces_sets_only(flag):
    for make in (
        lambda **o: dataclasses.replace(TINY, **o),
        lambda **o: KnnConfig(weights="W", **o),
    ):
        with pytest.raises(UserError, match=f"--{flag} is 'x'; expected nothing without --dataset"):
            make(**{flag: "x"})
