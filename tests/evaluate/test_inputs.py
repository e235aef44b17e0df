"""Which weights, images and classes an evaluation works on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    CPU_ONLY,
    IMAGES,
    backbone_of,
    extracted,
    opened,
    random_folder,
    save_run,
)
from helpers import TINY

from dino_xcit.config.evaluation import LinearConfig
from dino_xcit.data import shapes
from dino_xcit.data.images import open_images
from dino_xcit.errors import UserError
from dino_xcit.evaluate import inputs
from dino_xcit.evaluate.features import Pixels
from dino_xcit.evaluate.inputs import baselines, open_splits, resolve
from dino_xcit.evaluate.knn import knn_classify
from dino_xcit.evaluate.report import hits
from dino_xcit.run_folder import TEACHER
from dino_xcit.weights.load import save_backbone


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", 12)


def test_baselines_are_pixels_and_the_same_network_untrained():
    backbone = backbone_of(
        seed=1, config=dataclasses.replace(TINY, l2_norm=False, in_chans=1, mean=(0.5,), std=(0.5,))
    )
    (pixels, _), (name, untrained) = baselines(CPU_ONLY, backbone, Pixels())
    assert (pixels, name) == ("raw pixels", "xcit_pico2_p4, untrained")
    assert not untrained.blocks[0].attn.l2_norm
    assert untrained.in_chans == 1
    again = baselines(CPU_ONLY, backbone, Pixels())[1][1]
    other = baselines(dataclasses.replace(CPU_ONLY, seed=1), backbone, Pixels())[1][1]
    weight = [network.blocks[0].attn.qkv.weight for network in (untrained, again, other, backbone)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3])


def test_the_default_images_are_the_shapes_of_the_run(fabric, tmp_path):
    run = save_run(tmp_path / "run", dataclasses.replace(TINY, seed=3))
    config = dataclasses.replace(CPU_ONLY, weights=str(run / TEACHER), no_cache=True)
    for asked, count in ((None, TINY.num_images), (20, 20)):
        resolved, frozen, classes, _ = opened(dataclasses.replace(config, num_images=asked), fabric)
        assert (resolved.dataset, resolved.seed, resolved.image_size) == (
            "shapes",
            0,
            TINY.global_crops_size,
        )
        assert classes[2] == "slants"
        assert (len(frozen.images["train"]), len(frozen.images["validation"])) == (count, 12)
        expected = shapes.draw_shape(3, "train", 7).image
        assert np.array_equal(frozen.images["train"].read(7).permute(1, 2, 0).numpy(), expected)


def test_the_default_images_are_the_folder_of_the_run(fabric, tmp_path):
    root = random_folder(tmp_path / "images")
    run = save_run(
        tmp_path / "run",
        dataclasses.replace(TINY, dataset=None, data_path=str(root), num_images=None),
    )
    resolved, frozen, _, _ = opened(
        dataclasses.replace(CPU_ONLY, weights=str(run), no_cache=True), fabric
    )
    assert (resolved.data_path, resolved.dataset, resolved.seed) == (str(root), None, 0)
    assert Path(frozen.images["validation"].name(3)) == root / "val/b/1.png"


def test_a_folder_of_raw_files_names_the_data_set_of_the_run(tmp_path, fabric):
    named = dataclasses.replace(TINY, dataset="torch/fashion_mnist", data_path="elsewhere")
    run = save_run(tmp_path / "run", named)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"x")
    config = dataclasses.replace(CPU_ONLY, weights=str(run), data_path=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no images in .* used --dataset torch/fashion_mnist$"):
        opened(config, fabric)


def test_named_data_override_those_of_the_run(config, fabric):
    assert extracted(config, fabric) == IMAGES
    other = dataclasses.replace(
        config, data_path=None, dataset="shapes", num_images=15, seed=5, no_cache=True
    )
    resolved, frozen, _, _ = opened(other, fabric)
    assert resolved.seed == 5
    assert len(frozen.images["train"]) == 15


def test_weights_outside_a_run_folder_need_data(tmp_path, fabric):
    save_backbone(backbone_of(), TINY, tmp_path / "weights.safetensors")
    config = dataclasses.replace(CPU_ONLY, weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match="expected --data_path or --dataset"):
        opened(config, fabric)


def test_flags_override_the_weights_which_override_the_defaults():
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes"), {})
    assert (resolved.in_chans, resolved.image_size, resolved.resize_size) == (3, 224, 256)
    assert (resolved.mean, resolved.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    said = {"in_chans": 1, "mean": [0.3], "std": [0.2], "global_crops_size": 112}
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes"), said)
    assert (resolved.in_chans, resolved.image_size, resolved.resize_size) == (1, 112, 128)
    assert (resolved.mean, resolved.std) == ((0.3,), (0.2,))
    flags = {
        "in_chans": 4,
        "mean": 4 * (0.1,),
        "std": 4 * (0.2,),
        "image_size": 32,
        "resize_size": 40,
    }
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes", **flags), said)
    assert {name: getattr(resolved, name) for name in flags} == flags


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mean": (0.5,)}, r"--mean \(0.5,\) does not have one value per channel \(--in_chans 3\)"),
        ({"std": (0.5, 0.5)}, "--std .* does not have one value per channel"),
        ({"in_chans": 1}, "--mean .* does not have one value per channel"),
        ({"resize_size": 15}, "--resize_size 15 is smaller than --image_size 16"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_errors(config, fabric, options, problem):
    with pytest.raises(ValueError, match=problem):
        opened(dataclasses.replace(config, **options), fabric)


def names_and_labels(frozen, classes, split):
    """Folder of each image and the name of its label."""
    images = frozen.images[split]
    return [
        (Path(images.name(i)).parent.name, classes[label])
        for i, label in enumerate(frozen.labels(split).tolist())
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/4.png", "val/c/5.png"],
        ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/c/5.png"],
        ["train/a/1.png", "train/c/2.png", "val/a/3.png", "val/b/4.png", "val/c/5.png"],
        ["train/b/1.png", "train/c/2.png", "val/a/3.png", "val/b/4.png"],
    ],
)
def test_labels_agree_between_splits_with_other_classes(config, fabric, tmp_path, capsys, names):
    root = random_folder(tmp_path / "other", names)
    _, frozen, classes, _ = opened(dataclasses.replace(config, data_path=str(root)), fabric)
    for split, folder in (("train", "train"), ("validation", "val")):
        named = names_and_labels(frozen, classes, split)
        assert [folder_of_image for folder_of_image, _ in named] == [
            n.split("/")[1] for n in names if n.startswith(folder)
        ]
        assert all(folder_of_image == name for folder_of_image, name in named)
    unseen = {n.split("/")[1] for n in names if n.startswith("val")} - {
        n.split("/")[1] for n in names if n.startswith("train")
    }
    said = capsys.readouterr().err
    assert (
        f"{len(unseen)} classes of the validation images have no training images" in said
    ) == bool(unseen)


def test_images_of_a_class_without_training_images_count_as_wrong(config, fabric, tmp_path):
    root = random_folder(
        tmp_path / "other",
        ["train/a/1.png", "train/c/2.png", "val/a/3.png", "val/b/4.png", "val/c/5.png"],
    )
    random_folder(
        root, ["val/a/3.png", "val/c/5.png"], side=20
    )  # of class a and c, the same pictures as in training
    _, _, _, (train, validation) = opened(
        dataclasses.replace(config, data_path=str(root)), fabric, "train", "validation"
    )
    ranked = knn_classify(train.features, train.labels, validation.features, nb_knn=(1,))[1]
    assert hits(ranked, validation.labels, 1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (
            ["train/1.png", "train/2.png", "val/a/3.png", "val/b/4.png"],
            "the training images of --data_path .* have no labels",
        ),
        (
            ["train/a/1.png", "train/b/2.png", "val/3.png", "val/4.png"],
            "the validation images of --data_path .* no labels",
        ),
        (
            ["train/a/1.png", "train/a/2.png", "val/a/3.png"],
            "--data_path .* has one class, a/, so every score would be 100 %",
        ),
        (
            ["train/a/1.png", "train/b/2.png", "val/images/3.png"],
            "have no class in common: training a, b, validation images",
        ),
        (
            ["photos/a/1.png", "photos/b/2.png", "val/a/3.png"],
            "--data_path .* has val/ but no train/ .found photos/., and validation images must not",
        ),
        (
            ["train/a/1.png", "train/b/2.png"],
            "--data_path .* has no validation images; expected val/ beside train/",
        ),
        (["a/1.png", "b/2.png"], "--data_path .* has no validation images"),
    ],
)
def test_folders_without_labels_or_validation_images_are_errors(
    config, fabric, tmp_path, names, problem
):
    root = random_folder(tmp_path / "other", names)
    with pytest.raises(ValueError, match=problem):
        opened(dataclasses.replace(config, data_path=str(root)), fabric)


def test_classes_in_deep_folders_are_those_below_the_split(config, fabric, tmp_path):
    names = [
        f"{split}/{name}/{year}/1.png"
        for split in ("train", "val")
        for name, year in (("cat", "2020"), ("dog", "2020"), ("cat", "2021"))
    ]
    root = random_folder(tmp_path / "other", names)
    _, frozen, classes, _ = opened(dataclasses.replace(config, data_path=str(root)), fabric)
    assert classes == {0: "cat", 1: "dog"}
    assert frozen.labels("validation").tolist() == [0, 0, 1]


def test_a_saved_head_needs_no_training_images(tmp_path):
    root = random_folder(tmp_path / "other", ["val/a/1.png", "val/b/2.png"])
    config = LinearConfig(weights="W", evaluate="head.safetensors", data_path=str(root))
    images, classes = open_splits(config)
    assert classes == {"a": 0, "b": 1}
    assert (len(images["train"]), images["validation"].labels.tolist()) == (0, [0, 1])
    with pytest.raises(ValueError, match="has val/ but no train/"):
        open_splits(dataclasses.replace(config, evaluate=None))
    (root / "val").rename(root / "classes")
    with pytest.raises(
        ValueError, match=r"expected the images to score in val/, .* --val_fraction"
    ):
        open_splits(config)


def test_a_share_of_each_class_is_held_out_where_there_is_no_split(
    config, fabric, tmp_path, capsys
):
    root = random_folder(tmp_path / "other", [f"{c}/{i}.png" for c in "ab" for i in range(10)])
    splits = []
    for seed in (0, 0, 1):
        own = dataclasses.replace(config, data_path=str(root), val_fraction=0.3, seed=seed)
        _, frozen, _, _ = opened(own, fabric)
        assert np.bincount(frozen.labels("train")).tolist() == [7, 7]
        assert np.bincount(frozen.labels("validation")).tolist() == [3, 3]
        images = frozen.images
        names = [{of.name(i) for i in range(len(of))} for of in images.values()]
        assert not names[0] & names[1]
        splits.append(names)
    assert splits[0] == splits[1] != splits[2]
    assert (
        "6 of the 20 images, 0.3 of each class, are held out by --seed" in capsys.readouterr().err
    )


def test_a_share_is_held_out_of_images_without_a_split_only(config, fabric):
    with pytest.raises(ValueError, match=r"--val_fraction 0.3: .* has validation images already"):
        opened(dataclasses.replace(config, val_fraction=0.3), fabric)


def test_labels_that_are_kept_secret_are_an_error(config, fabric, monkeypatch):
    def with_secret_labels(*arguments):
        images = open_images(*arguments)
        images.labels = images.labels - 1
        return images

    monkeypatch.setattr(inputs, "open_images", with_secret_labels)
    with pytest.raises(ValueError, match=r"--data_path .* has negative labels"):
        opened(config, fabric)
