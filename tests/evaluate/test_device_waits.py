"""What evaluations ask of a CUDA device, seen on tensors without content: no GPU is needed.

The host waits where it needs a result, for a whole block of images at a time.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import BEFORE, CUDA, Watch, fake_cuda, imagines_cuda

from dino_xcit.data.framing import Transform
from dino_xcit.evaluate import knn, probe_heads
from dino_xcit.evaluate.feature_store import FeatureStore, extract
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.evaluate.probe import FeatureChoice, Saver
from dino_xcit.model.xcit import XCiT
from dino_xcit.train import online_eval

pytestmark = pytest.mark.skipif(
    not imagines_cuda(), reason="this torch has no fake CUDA tensors without a driver"
)
TRANSFORM = Transform(16, 16, (0.5,) * 3, (0.5,) * 3)


class Images:
    """A data set of images without content."""

    labels = None

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index):
        return torch.empty(3, 16, 16, dtype=torch.uint8), True


def extractor() -> FeatureExtractor:
    with CUDA:
        backbone = XCiT("xcit_pico2_p4")
    backbone.to = lambda device: backbone  # where it is
    return FeatureExtractor(backbone, TRANSFORM, CUDA, "bf16-mixed")


def kinds(watch):
    return [event.kind for event in watch.events]


def test_features_wait_once_for_each_batch():
    with fake_cuda():
        function = extractor()
        store = FeatureStore.in_memory((7, *function.shape()))
        with Watch() as watch:
            extract(
                function,
                Images(),
                np.arange(7),
                store,
                batch_size=3,
                num_workers=0,
                pin_memory=True,
            )
    assert kinds(watch) == ["wait"] * 3


def test_the_probe_in_training_waits_for_its_features_only(monkeypatch):
    monkeypatch.setattr(online_eval, "EvalDataset", lambda images, transform: images)
    monkeypatch.setattr(online_eval, "BATCH_SIZE", 3)
    monkeypatch.setattr(online_eval, "DONE", 2)  # what is without content counts as unreadable
    with fake_cuda():
        function = extractor()
        with Watch() as watch:
            features, _ = online_eval._features(
                function, online_eval.Subset(Images(), np.arange(7)), lambda: False
            )
            online_eval.rankme(features)
            knn.knn_classify(features, torch.zeros(7, dtype=torch.long), features, [2])
    # One image tells the shape of the features, then there are three batches.
    assert kinds(watch) == ["upload", *["wait"] * 3]


@pytest.mark.parametrize("nb_knn", [(1,), (1, 5, 20)])
def test_neighbours_wait_once_for_each_pass_over_the_training_images(nb_knn, monkeypatch):
    monkeypatch.setattr(knn, "TEST_PASS", 8)
    monkeypatch.setattr(knn, "TEST_BLOCK", 4)
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 32)
    with fake_cuda(), Watch() as watch:
        knn.knn_classify(
            torch.empty(70, 6), torch.zeros(70).long(), torch.empty(16, 6), nb_knn, device=CUDA
        )
    passes, test_blocks, train_blocks = 2, 2, 3
    assert kinds(watch).count("wait") == passes
    labels = 1
    assert kinds(watch).count("upload") == labels + passes * (test_blocks + train_blocks)
    assert "mixed" not in kinds(watch)


def test_training_linear_heads_never_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "due", lambda self: False)
    with fake_cuda():
        split = torch.empty(20, 1, 6), torch.zeros(20, dtype=torch.long)
        task = SimpleNamespace(
            features=SimpleNamespace(split=lambda name: split, name="F", shape=(1, 6)),
            fabric=SimpleNamespace(device=CUDA, is_global_zero=False),
            config=SimpleNamespace(batch_size=5, epochs=2),
            classes=3,
            seed=0,
            file=lambda *names: tmp_path / "state.safetensors",
        )
        with Watch() as watch:
            weight, _ = probe_heads.train_heads(
                task, np.arange(20), FeatureChoice(1, False), [0.1, 0.2], "heads"
            )
    assert weight.shape == (2, 3, 6)
    # The learning rates and the initial weights; nothing in the eight steps.
    assert len(watch.events) == 2
    assert {event.kind for event in watch.events} == {"upload"}
    assert watch.launches(BEFORE) > 8 * 10
