"""A folder with weights and images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from figure_helpers import smooth_picture
from PIL import Image

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.load import save_backbone

GREY = RunConfig(arch="xcit_pico2_p4", in_chans=1, mean=(0.5,), std=(0.25,), global_crops_size=32)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with weights and images."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_backbone(XCiT("xcit_pico2_p4", in_chans=1), GREY, Path("w.safetensors"))
    torch.manual_seed(1)
    save_backbone(XCiT("xcit_n12_p8"), RunConfig(arch="xcit_n12_p8"), Path("colour.safetensors"))
    Path("photos").mkdir()
    for name, size in (("wide", (40, 64)), ("tall", (66, 42)), ("square", (48, 48))):
        Image.fromarray(smooth_picture(*size)).save(f"photos/{name}.png")
    return tmp_path
