"""Real images, if there are any: FASHION_MNIST is the folder where torchvision finds them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_xcit.cli import parse
from dino_xcit.config.evaluation import KnnConfig, LinearConfig
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import open_images
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.evaluate.linear import linear_eval
from dino_xcit.train.pretrain import pretrain

ROOT = os.environ.get("FASHION_MNIST")
CONFIG = Path(__file__).parent.parent.parent / "configs" / "fashion_mnist.yaml"
pytestmark = pytest.mark.skipif(not ROOT, reason="FASHION_MNIST is not set")


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = parse("pretrain", RunConfig, ["--config", str(CONFIG), "--data_path", str(ROOT)])
    return dataclasses.replace(
        config,
        output_dir=str(tmp_path / "run"),
        num_images=128,
        epochs=1,
        warmup_epochs=1,
        num_workers=0,
    )


def test_both_splits_open_with_labels(config):
    train = open_images(dataclasses.replace(config, num_images=None), "train")
    validation = open_images(config, "validation")
    assert (len(train), len(validation)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert train.read(0).shape == (1, 28, 28)
    assert train.read(0).dtype == torch.uint8


def test_a_run_gives_a_knn_accuracy(config):
    outcome = pretrain(dataclasses.replace(config, eval_num_images=200))
    assert outcome.step == outcome.steps == 2
    assert "knn_top1" in (outcome.folder / "metrics.csv").read_text()


@pytest.fixture
def features(config, tmp_path) -> Path:
    """Official files with features of 2,000 training and all validation images.

    The network has hardly learned anything.
    """
    pretrain(config)
    dump = tmp_path / "features"
    knn_eval(
        KnnConfig(
            weights=config.output_dir,
            num_images=2000,
            cache_dir=str(tmp_path / "cache"),
            dump_features=str(dump),
            accelerator="cpu",
            precision="32-true",
            devices="1",
            num_workers=0,
        )
    )
    return dump


def test_both_evaluations_agree_with_scikit_learn(features, tmp_path):
    neighbors, linear_model = (
        pytest.importorskip("sklearn.neighbors"),
        pytest.importorskip("sklearn.linear_model"),
    )
    names = ("trainfeat", "trainlabels", "testfeat", "testlabels")
    train, train_labels, test, labels = (
        torch.load(features / f"{name}.pth").numpy() for name in names
    )
    knn = json.loads((tmp_path / "run/knn.json").read_text())
    assert knn["data"] == {"train": 2000, "validation": 10_000, "classes": 10, "unreadable": 0}
    for row in knn["results"]:
        reference = neighbors.KNeighborsClassifier(
            row["k"],
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / 0.07),
        ).fit(train, train_labels)
        assert row["top1"] == pytest.approx(
            100 * reference.score(test, labels), abs=0.03
        )  # rounding turns a few near ties
    options = {
        "load_features": str(features),
        "protocol": "logistic",
        "accelerator": "cpu",
        "devices": "1",
    }
    for c in (1.0, 100.0):
        row = linear_eval(LinearConfig(c=(c,), **options))["results"][0]
        reference = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=10_000).fit(
            train.astype(float), train_labels
        )
        assert row["top1"] == pytest.approx(100 * reference.score(test, labels), abs=0.05)
