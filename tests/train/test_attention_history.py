"""The attention strip that pretraining leaves."""

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
def quiet(tiny):
    return dataclasses.replace(tiny, eval_every_n_epochs=1, trainer={"enable_progress_bar": False})


def test_a_run_shows_the_same_images_before_training_and_at_each_evaluation(quiet):
    folder = pretrain(quiet).folder
    numbers = np.load(folder / "attention.npz")
    assert numbers["steps"].tolist() == [0, 6, 12]
    assert numbers["attention"].shape == (
        3,
        4,
        4,
        4,
        4,
    )  # evaluations, images, heads, rows, columns
    images = ShapeSet(quiet.seed, "validation", 4, quiet.in_chans)
    smaller = torch.nn.functional.interpolate
    for i in range(4):
        expected = smaller(images.read(i)[None], (16, 16), mode="bicubic", antialias=True)[0]
        assert np.array_equal(numbers["images"][i], expected.permute(1, 2, 0))
    mean, std = (torch.tensor(getattr(quiet, name))[:, None, None] for name in ("mean", "std"))
    pixels = (torch.from_numpy(numbers["images"]).permute(0, 3, 1, 2) / 255 - mean) / std
    expected = class_attention(load_backbone(folder), pixels).numpy()
    assert np.allclose(numbers["attention"][-1], expected, atol=1e-5)
    assert not np.allclose(numbers["attention"][0], expected, atol=1e-5)


def test_the_strip_changes_nothing_that_is_trained(quiet, monkeypatch):
    with_strip = pretrain(quiet).folder
    monkeypatch.setattr(AttentionHistory, "add", lambda *_: None)
    without = pretrain(dataclasses.replace(quiet, output_dir=f"{quiet.output_dir}_without")).folder
    tensors = [load_backbone(folder).state_dict() for folder in (with_strip, without)]
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in tensors), strict=True))


def test_a_run_that_goes_on_keeps_what_was_seen_until_then_and_sees_the_rest_again(tiny, tmp_path):
    images = ShapeSet(0, "validation", 10, 3)
    backbone = XCiT("xcit_pico2_p4").train()
    history = AttentionHistory(tiny, images, tmp_path, 0)
    for step in (0, 5, 10):
        history.add(step, backbone, CPU)
    assert backbone.training
    again = AttentionHistory(tiny, images, tmp_path, 7)
    assert list(again.seen) == [0, 5]
    again.add(10, backbone, CPU)
    assert np.load(tmp_path / "attention.npz")["steps"].tolist() == [0, 5, 10]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_begun_anew(tiny, tmp_path, damage):
    (tmp_path / "attention.npz").write_bytes(damage)
    history = AttentionHistory(tiny, ShapeSet(0, "validation", 10, 3), tmp_path, 7)
    history.add(7, XCiT("xcit_pico2_p4"), CPU)
    assert np.load(tmp_path / "attention.npz")["steps"].tolist() == [7]


def test_unreadable_images_are_passed_over(tiny, tmp_path):
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
