"""The attention history that pretraining leaves in the run folder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dino_xcit.data.images import ShapeSet
from dino_xcit.figures.maps import class_attention
from dino_xcit.model.xcit import XCiT
from dino_xcit.train.attention_history import AttentionHistory
from dino_xcit.train.pretrain import pretrain
from dino_xcit.weights.load import load_backbone

CPU = torch.device("cpu")


@pytest.fixture
def evaluating(tiny):
    """A run that evaluates after each of its two epochs."""
    return dataclasses.replace(tiny, eval_every_n_epochs=1, trainer={"enable_progress_bar": False})


@pytest.mark.slow
def test_a_run_shows_the_same_images_before_training_and_at_each_evaluation(evaluating):
    folder = pretrain(evaluating).folder
    saved = np.load(folder / "attention.npz")
    assert saved["steps"].tolist() == [0, 6, 12]
    assert saved["attention"].shape == (3, 4, 4, 4, 4)  # steps, images, heads, rows, columns
    images = ShapeSet(evaluating.seed, "validation", 4, evaluating.in_chans)
    for i in range(4):
        smaller = torch.nn.functional.interpolate(
            images.read(i)[None], (16, 16), mode="bicubic", antialias=True
        )
        assert np.array_equal(saved["images"][i], smaller[0].permute(1, 2, 0))
    mean, std = (torch.tensor(getattr(evaluating, name))[:, None, None] for name in ("mean", "std"))
    pixels = (torch.from_numpy(saved["images"]).permute(0, 3, 1, 2) / 255 - mean) / std
    expected = class_attention(load_backbone(folder), pixels).numpy()
    assert np.allclose(saved["attention"][-1], expected, atol=1e-5)
    assert not np.allclose(saved["attention"][0], expected, atol=1e-5)


@pytest.mark.slow
def test_the_history_does_not_change_what_is_trained(evaluating, monkeypatch):
    with_history = pretrain(evaluating).folder
    monkeypatch.setattr(AttentionHistory, "add", lambda *_: None)
    other = dataclasses.replace(evaluating, output_dir=f"{evaluating.output_dir}_without")
    without = pretrain(other).folder
    assert not (without / "attention.npz").exists()
    one, two = (load_backbone(folder).state_dict().values() for folder in (with_history, without))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_continued_run_keeps_the_maps_until_its_step_and_computes_the_rest_again(tiny, tmp_path):
    images = ShapeSet(0, "validation", 10, 3)
    backbone = XCiT("xcit_pico2_p4").train()
    history = AttentionHistory(tiny, images, tmp_path, 0)
    for step in (0, 5, 10):
        history.add(step, backbone, CPU)
    assert backbone.training
    continued = AttentionHistory(tiny, images, tmp_path, 7)
    assert list(continued.maps) == [0, 5]
    continued.add(10, backbone, CPU)
    assert np.load(tmp_path / "attention.npz")["steps"].tolist() == [0, 5, 10]
    assert not AttentionHistory(tiny, ShapeSet(1, "validation", 10, 3), tmp_path, 7).maps


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_replaced(tiny, tmp_path, damage):
    (tmp_path / "attention.npz").write_bytes(damage)
    history = AttentionHistory(tiny, ShapeSet(0, "validation", 10, 3), tmp_path, 7)
    history.add(7, XCiT("xcit_pico2_p4"), CPU)
    assert np.load(tmp_path / "attention.npz")["steps"].tolist() == [7]


def test_unreadable_images_are_left_out(tiny, tmp_path):
    class Broken(ShapeSet):
        def read(self, index):
            if index % 2:
                raise OSError("gone")
            return super().read(index)

    history = AttentionHistory(tiny, Broken(0, "validation", 10, 3), tmp_path, 0)
    assert history.pixels.shape == (4, 3, 16, 16)
    none = AttentionHistory(tiny, Broken(0, "validation", 0, 3), tmp_path, 0)
    none.add(0, XCiT("xcit_pico2_p4"), CPU)
    assert not (tmp_path / "attention.npz").exists()
