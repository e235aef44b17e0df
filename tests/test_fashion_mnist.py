"""Real images, where they are at hand: FASHION_MNIST names the folder in which torchvision finds Fashion-MNIST."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_xcit.cli import parse
from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_images
from dino_xcit.pretrain import pretrain

ROOT = os.environ.get("FASHION_MNIST")
CONFIG = Path(__file__).parent.parent / "configs" / "fashion_mnist.yaml"
pytestmark = pytest.mark.skipif(not ROOT, reason="FASHION_MNIST is not set")


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    config = parse("pretrain", PretrainConfig, ["--config", str(CONFIG), "--data_path", str(ROOT)])
    return dataclasses.replace(
        config, output_dir=str(tmp_path / "run"), num_images=128, epochs=1, warmup_epochs=1, num_workers=0
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
