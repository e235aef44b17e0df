"""Features in the four files of official DINO."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import CPU_ONLY, TRAIN_IMAGES, opened, truncate

from dino_xcit.config.evaluation import ClassificationConfig
from dino_xcit.evaluate import feature_files
from dino_xcit.evaluate.feature_files import OFFICIAL_FILES, FileFeatures, dump_features
from dino_xcit.evaluate.features import select_parts
from dino_xcit.evaluate.inputs import open_inputs


def save_features(folder, **changes):
    """The four files, of 5 training and 3 test images."""
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "trainfeat": torch.randn(5, 8, generator=rng),
        "trainlabels": torch.tensor([0, 1, 2, 0, 1]),
        "testfeat": torch.randn(3, 8, generator=rng),
        "testlabels": torch.tensor([2, 1, 0]),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth")
    return dataclasses.replace(CPU_ONLY, weights=None, load_features=str(folder)), tensors


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.float32])
def test_features_in_files_are_evaluated_as_those_of_a_backbone(tmp_path, fabric, labels):
    config, tensors = save_features(
        tmp_path / "dump", testlabels=torch.tensor([2, 1, 0], dtype=labels)
    )
    resolved, frozen, classes, (train, validation) = opened(config, fabric, "train", "validation")
    assert (resolved, classes) == (config, {0: "0", 1: "1", 2: "2"})
    assert (frozen.extracted, frozen.seconds, frozen.unreadable, frozen.shape) == (
        0,
        0.0,
        0,
        (1, 8),
    )
    assert torch.equal(train.features[:, 0], tensors["trainfeat"])
    assert torch.equal(validation.features[:, 0], tensors["testfeat"])
    assert (train.labels.tolist(), validation.labels.tolist()) == ([0, 1, 2, 0, 1], [2, 1, 0])
    assert validation.labels.dtype == frozen.labels("validation").dtype == torch.int64


def test_labels_in_files_may_be_any_whole_numbers(tmp_path):
    config, _ = save_features(
        tmp_path,
        trainlabels=torch.tensor([7, 10**12, 3, 7, 3]),
        testlabels=torch.tensor([5, 10**12, 3]),
    )
    files = FileFeatures(config)
    assert files.classes == {0: "3", 1: "5", 2: "7", 3: "1000000000000"}
    assert files.labels("train").tolist() == [2, 3, 0, 2, 0]
    assert files.labels("validation").tolist() == [1, 3, 0]


def test_one_value_that_is_not_finite_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "CHECKED_ROWS", 2)
    rows = torch.zeros(5, 8)
    rows[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        FileFeatures(save_features(tmp_path, trainfeat=rows)[0])


def test_dumped_features_load_again(config, fabric, tmp_path):
    with open_inputs(config, fabric) as inputs:
        (frozen,) = inputs.features
        for number, parts in enumerate(([0], [0, 2])):
            folder = tmp_path / f"dump {number}"
            dump_features(frozen, parts, folder)
            assert {path.name for path in folder.iterdir()} == {
                f for files in OFFICIAL_FILES.values() for f in files
            }
            loaded = FileFeatures(ClassificationConfig(load_features=str(folder)))
            for name in ("train", "validation"):
                expected = F.normalize(select_parts(frozen.split(name).features, parts), dim=1)
                torch.testing.assert_close(loaded.split(name).features, expected[:, None])
                assert torch.equal(loaded.labels(name), frozen.split(name).labels)
            assert torch.load(folder / "trainfeat.pth", weights_only=True).shape == (
                TRAIN_IMAGES,
                64 * (1 + number),
            )


def test_dumped_features_are_float32_for_any_stored_dtype(config, fabric, tmp_path):
    config = dataclasses.replace(config, feature_dtype="float16")
    with open_inputs(config, fabric) as inputs:
        dump_features(inputs.features[0], [0], tmp_path / "dump")
    features = torch.load(tmp_path / "dump/testfeat.pth", weights_only=True)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("name", [file for files in OFFICIAL_FILES.values() for file in files])
def test_a_missing_file_of_features_is_named(tmp_path, name):
    config, _ = save_features(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        ValueError,
        match=rf"has no {name}; expected trainfeat\.pth, trainlabels\.pth, testfeat\.pth, test",
    ):
        FileFeatures(config)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"trainfeat": torch.zeros(5)}, r"trainfeat\.pth does not hold a tensor of 2 dimensions"),
        (
            {"testfeat": torch.zeros(3, 1, 8)},
            r"testfeat\.pth does not hold a tensor of 2 dimensions",
        ),
        (
            {"testlabels": torch.zeros(3, 1)},
            r"testlabels\.pth does not hold a tensor of 1 dimensions",
        ),
        ({"testlabels": torch.full((3,), 0.5)}, r"testlabels\.pth does not hold whole numbers"),
        (
            {"trainlabels": torch.arange(5) - 1},
            r"trainlabels\.pth does not hold whole numbers from 0",
        ),
        (
            {"testfeat": torch.full((3, 8), torch.inf)},
            r"testfeat\.pth holds values that are not finite",
        ),
        (
            {"trainfeat": torch.full((5, 8), torch.nan)},
            r"trainfeat\.pth holds values that are not finite",
        ),
        (
            {"testfeat": torch.zeros(0, 8), "testlabels": torch.zeros(0, dtype=torch.int64)},
            r"testfeat\.pth is empty",
        ),
        ({"trainfeat": {"features": torch.zeros(5, 8)}}, r"trainfeat\.pth does not hold a tensor"),
        ({"trainlabels": torch.zeros(4)}, r"trainfeat\.pth has 5 rows and trainlabels\.pth 4"),
        ({"testfeat": torch.zeros(2, 8)}, r"testfeat\.pth has 2 rows and testlabels\.pth 3"),
        ({"testfeat": torch.zeros(3, 6)}, "."),
    ],
)
def test_files_that_do_not_hold_features_are_errors(tmp_path, changes, problem):
    config, _ = save_features(tmp_path, **changes)
    with pytest.raises(ValueError, match=problem):
        FileFeatures(config)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
def test_files_of_features_that_hold_code_are_refused(tmp_path, save):
    config, _ = save_features(tmp_path)
    save(Code(tmp_path / "executed"), tmp_path / "trainfeat.pth")
    with pytest.raises(ValueError, match=r"trainfeat\.pth is not a tensor file"):
        FileFeatures(config)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_of_features_is_an_error(tmp_path):
    config, _ = save_features(tmp_path)
    truncate(tmp_path / "testfeat.pth")
    with pytest.raises(ValueError, match=r"testfeat\.pth is not a tensor file"):
        FileFeatures(config)


def test_the_key_of_files_changes_with_them(tmp_path):
    config, _ = save_features(tmp_path)
    key = FileFeatures(config).key
    assert FileFeatures(config).key == key
    os.utime(tmp_path / "trainfeat.pth", ns=(1, 10**18))
    assert FileFeatures(config).key != key
