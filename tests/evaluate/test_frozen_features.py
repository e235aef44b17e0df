"""Features of a frozen backbone: what they are, what is cached, what cannot be read."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import (
    CPU,
    IMAGES,
    SIDE,
    TRAIN_IMAGES,
    backbone_of,
    extracted,
    opened,
    random_folder,
    save_run,
)
from helpers import TINY
from PIL import Image

from dino_xcit.data.framing import EvalDataset, Transform, centre_crop
from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.evaluate.inputs import open_inputs
from dino_xcit.run_folder import TEACHER
from dino_xcit.weights.load import load_backbone, save_backbone


def test_features_of_a_split_are_the_backbones_of_its_framed_images(config, fabric, tmp_path):
    _, frozen, classes, (train, validation) = opened(config, fabric, "train", "validation")
    transform = Transform(SIDE, SIDE, TINY.mean, TINY.std)
    extractor = FeatureExtractor(load_backbone(config.weights), transform, CPU)
    assert frozen.extractor.transform == transform
    assert classes == {0: "a", 1: "b"}
    for split, folder, count in ((train, "train", 3), (validation, "val", 2)):
        paths = [f"{folder}/{name}/{i}.png" for name in "ab" for i in range(count)]
        images = [
            torch.from_numpy(np.array(Image.open(tmp_path / "images" / path))).permute(2, 0, 1)
            for path in paths
        ]
        framed = torch.stack([centre_crop(image, SIDE, SIDE) for image in images])
        torch.testing.assert_close(split.features, extractor(framed), rtol=1e-4, atol=1e-5)
        assert split.labels.tolist() == count * [0] + count * [1]
        assert split.labels.dtype == torch.int64


def test_unreadable_images_are_left_out_of_features_and_labels(config, fabric, tmp_path):
    (tmp_path / "images/train/a/1.png").write_bytes(b"broken")
    for from_cache in (False, True):
        _, frozen, _, (train,) = opened(config, fabric, "train")
        assert frozen.extracted == (1 if from_cache else TRAIN_IMAGES)  # tried again
        assert frozen.unreadable == 1
        assert train.labels.tolist() == frozen.labels("train").tolist() == [0, 0, 1, 1, 1]
        assert train.features.shape == (5, 3, 64)
        last = EvalDataset(frozen.images["train"], frozen.extractor.transform)[5][0]
        torch.testing.assert_close(
            train.features[4], frozen.extractor(last[None])[0], rtol=1e-4, atol=1e-5
        )


def test_the_number_of_unreadable_images_is_printed(config, fabric, tmp_path, capsys):
    for name in ("a/1", "b/2"):
        (tmp_path / f"images/train/{name}.png").write_bytes(b"broken")
    opened(config, fabric, "train")
    printed = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(printed) == 1
    assert printed[0].startswith("2 of 6 images cannot be read")
    assert "train/a/1.png" in printed[0]


def test_a_full_disk_is_an_error_that_names_the_flag(config, fabric, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ValueError, match=r"--cache_dir .*cache .*No space left on device"):
        opened(config, fabric, "train")


def test_images_of_which_none_can_be_read_are_an_error(config, fabric, tmp_path):
    for path in (tmp_path / "images/val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 4 images .*val/a/0\.png: not an image$"):
        opened(config, fabric, "validation")


def test_weights_of_a_diverged_run_are_an_error(config, fabric, tmp_path):
    backbone = backbone_of()
    with torch.no_grad():
        backbone.norm.bias[0] = float("nan")
    save_backbone(backbone, TINY, tmp_path / "run" / TEACHER)
    with pytest.raises(UserError, match=r"--weights .*run holds values .*not finite.*norm\.bias"):
        opened(config, fabric, "train")


def test_features_beyond_the_range_of_floats_are_an_error(config, fabric, tmp_path):
    backbone = backbone_of()
    with torch.no_grad():
        backbone.norm.weight.fill_(3e38)
    save_backbone(backbone, TINY, tmp_path / "run" / TEACHER)
    with pytest.raises(FloatingPointError, match=r"--weights .*run: .*not finite"):
        opened(config, fabric, "train")


def test_features_are_extracted_once(config, fabric, capsys):
    _, frozen, _, first = opened(config, fabric, "train", "validation")
    assert frozen.extracted == IMAGES
    assert frozen.seconds > 0
    assert frozen.split("train") is first[0]
    capsys.readouterr()
    _, frozen, _, second = opened(config, fabric, "train", "validation")
    assert (frozen.extracted, frozen.seconds) == (0, 0.0)
    assert all(
        torch.equal(one.features, other.features) for one, other in zip(first, second, strict=True)
    )
    assert all(
        torch.equal(one.labels, other.labels) for one, other in zip(first, second, strict=True)
    )
    assert f"{frozen.name}, train: from {config.cache_dir}" in capsys.readouterr().err


def test_an_interrupted_evaluation_continues_where_it_stopped(config, fabric, monkeypatch):
    through, whole = [], FeatureExtractor.__call__

    def counted(frozen, images):
        through.append(len(images))
        if sum(through) > 1 + 4 + 2:  # the image for the shape, the first batch, the second
            raise KeyboardInterrupt
        return whole(frozen, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        opened(config, fabric, "train", "validation")
    assert through == [1, 4, 2, 4]
    monkeypatch.setattr(FeatureExtractor, "__call__", whole)
    assert extracted(config, fabric) == IMAGES - TRAIN_IMAGES


@pytest.mark.parametrize("options", [{"batch_size_per_gpu": 3}, {"num_workers": 1}, {"seed": 4}])
def test_options_that_change_no_features_leave_the_cache_valid(config, fabric, options):
    extracted(config, fabric)
    assert extracted(dataclasses.replace(config, **options), fabric) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 20},
        {"resize_size": 18},
        {"mean": (0.5, 0.456, 0.406)},
        {"std": (0.5, 0.224, 0.225)},
        {"precision": "bf16-mixed"},
        {"feature_dtype": "float16"},
    ],
)
@pytest.mark.slow
def test_options_that_change_features_need_new_features(config, fabric, options):
    extracted(config, fabric)
    assert extracted(dataclasses.replace(config, **options), fabric) == IMAGES
    assert extracted(config, fabric) == 0


@pytest.mark.parametrize(
    ("precision", "dtype", "stored"),
    [
        ("32-true", "auto", torch.float32),
        ("32-true", "float16", torch.float16),
        ("bf16-mixed", "auto", torch.float16),
        ("bf16-mixed", "float32", torch.float32),
    ],
)
def test_features_are_stored_in_the_dtype_asked_for(config, fabric, precision, dtype, stored):
    split = opened(
        dataclasses.replace(config, precision=precision, feature_dtype=dtype), fabric, "train"
    )[3][0]
    assert split.features.dtype == stored


def test_other_weights_need_new_features(config, fabric, tmp_path):
    extracted(config, fabric)
    other = save_run(tmp_path / "other", seed=1)
    assert extracted(dataclasses.replace(config, weights=str(other)), fabric) == IMAGES
    assert (
        extracted(dataclasses.replace(config, weights=str(tmp_path / "run" / TEACHER)), fabric) == 0
    )


def test_another_ablation_with_the_same_tensors_needs_new_features(config, fabric, tmp_path):
    _, _, _, (with_norm,) = opened(config, fabric, "train")
    save_backbone(
        backbone_of(), dataclasses.replace(TINY, l2_norm=False), tmp_path / "run" / TEACHER
    )
    _, frozen, _, (without,) = opened(config, fabric, "train")
    assert frozen.extracted == TRAIN_IMAGES
    assert not torch.allclose(with_norm.features, without.features, atol=1e-3)


def rewrite(path):
    random_folder(path.parent, [path.name], side=22)


def touch(path):
    os.utime(path, ns=(1, 10**18))


def move(path):
    path.rename(path.parent.parent / "b" / "moved.png")


def repaint(path):
    """Other pixels in as many bytes, at the same time."""
    stat = path.stat()
    data = path.read_bytes()
    random_folder(path.parent, 40 * [path.name])
    path.write_bytes(path.read_bytes()[: len(data)].ljust(len(data), b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, touch, move, repaint, Path.unlink])
@pytest.mark.slow
def test_a_changed_image_needs_new_features_of_its_split(config, fabric, tmp_path, change):
    extracted(config, fabric)
    change(tmp_path / "images/train/a/1.png")
    assert extracted(config, fabric) == TRAIN_IMAGES - (change is Path.unlink)


def lengthen(path):
    """More bytes, at the same time."""
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, lengthen])
def test_a_changed_image_among_many_needs_new_features(config, fabric, tmp_path, change):
    random_folder(tmp_path / "images", [f"val/a/{i}.png" for i in range(40)])
    opened(config, fabric, "validation")
    change(tmp_path / "images/val/a/1.png")  # whose pixels no fingerprint looks at
    assert opened(config, fabric, "validation").frozen.extracted == 42


def test_no_cache_leaves_no_files(config, fabric, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    forgetful = dataclasses.replace(config, no_cache=True)
    for _ in range(2):
        with open_inputs(forgetful, fabric) as inputs:
            (frozen,) = inputs.features
            frozen.split("train")
            assert frozen.extracted == TRAIN_IMAGES
            assert list(temporary.rglob("features.npy"))
        assert not list(temporary.iterdir())
    for path in (tmp_path / "images/val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 4 images"):
        opened(forgetful, fabric, "train", "validation")
    assert not list(temporary.iterdir())
    assert not (tmp_path / "home").exists()
    assert not Path(config.cache_dir).exists()


def test_the_default_cache_follows_xdg(config, fabric, tmp_path, monkeypatch):
    config = dataclasses.replace(config, cache_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened(config, fabric, "train")
    assert list((tmp_path / "caches/dino_xcit").glob("*/features.npy"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    opened(config, fabric, "train")
    assert list((tmp_path / "home/.cache/dino_xcit").glob("*/features.npy"))
    opened(dataclasses.replace(config, cache_dir="~/elsewhere"), fabric, "train")
    assert list((tmp_path / "home/elsewhere").glob("*/features.npy"))


def test_baselines_have_features_of_their_own(config, fabric):
    save_backbone(backbone_of(seed=1), TINY, Path(config.weights) / TEACHER)
    with open_inputs(dataclasses.replace(config, baselines=True), fabric) as inputs:
        assert [frozen.name for frozen in inputs.features] == [
            config.weights,
            "raw pixels",
            "xcit_pico2_p4, untrained",
        ]
        features = [frozen.split("train").features for frozen in inputs.features]
        assert [frozen.extracted for frozen in inputs.features] == 3 * [TRAIN_IMAGES]
    assert [tuple(f.shape[1:]) for f in features] == [(3, 64), (1, 3 * SIDE**2), (3, 64)]
    assert not torch.equal(features[0], features[2])


def test_the_key_differs_if_the_training_features_do(config, fabric, tmp_path):
    key = opened(config, fabric).frozen.key
    touch(tmp_path / "images/val/a/1.png")
    assert opened(config, fabric).frozen.key == key
    assert opened(dataclasses.replace(config, image_size=20), fabric).frozen.key != key
    touch(tmp_path / "images/train/a/1.png")
    assert opened(config, fabric).frozen.key != key
