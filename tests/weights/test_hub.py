"""hubconf.py, as torch.hub reads it from a clone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.model.architectures import ARCHITECTURES, PATCH_SIZES
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.load import PUBLISHED, save_backbone

CLONE = str(Path(__file__).parent.parent.parent)


def load(name, **options):
    return torch.hub.load(CLONE, name, source="local", **options)


def test_each_backbone_has_its_official_name():
    entries = runpy.run_path(f"{CLONE}/hubconf.py")
    names = {
        name for name, entry in entries.items() if callable(entry) and not name.startswith("_")
    }
    assert {
        "xcit_small_12_p16",
        "xcit_nano_12_p8",
        "xcit_large_24_p16",
        "xcit_pico_2_p4",
        *PUBLISHED,
    } <= names
    assert len(names) == len(ARCHITECTURES) * len(PATCH_SIZES) + len(PUBLISHED)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_pico_2_p4"])
def test_without_weights_they_are_random(name):
    backbone = load(name, in_chans=1)
    assert isinstance(backbone, XCiT)
    assert backbone(torch.randn(1, 1, 32, 32)).shape == (1, backbone.embed_dim)


def test_given_weights_are_loaded(tmp_path):
    network = XCiT("xcit_pico2_p4")
    save_backbone(network, RunConfig(arch="xcit_pico2_p4"), tmp_path / "w.safetensors")
    found = load("xcit_pico_2_p4", weights=str(tmp_path / "w.safetensors")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in network.state_dict().items())
