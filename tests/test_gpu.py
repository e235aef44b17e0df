"""What only a CUDA device can show."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY

from dino_xcit.data import CropDataset, collate, open_images
from dino_xcit.photometric import photometric
from dino_xcit.pretrain import pretrain
from dino_xcit.xcit import XCiT

pytestmark = pytest.mark.gpu


def test_photometric_gives_on_the_device_what_it_gives_on_cpu():
    dataset = CropDataset(open_images(TINY, "train"), TINY)
    views = collate([dataset[0, i] for i in range(16)]).views
    crops, draws = views["global_crops"].flatten(0, 1), views["global_draws"].flatten(0, 1)
    on_cpu = photometric(crops, draws, TINY.mean, TINY.std, TINY.blur_sigma[1])
    on_device = photometric(crops.cuda(), draws.cuda(), TINY.mean, TINY.std, TINY.blur_sigma[1])
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_the_backbone_gives_on_the_device_what_it_gives_on_cpu():
    torch.manual_seed(0)
    backbone, images = XCiT("xcit_n12_p16").eval(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(backbone.cuda()(images.cuda()).cpu(), backbone.cpu()(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_on_the_device_starts_with_the_loss_of_cpu(tmp_path, precision):
    losses = []
    for accelerator in ("cpu", "gpu"):
        folder = tmp_path / accelerator
        on_gpu = accelerator == "gpu"
        config = dataclasses.replace(TINY, accelerator=accelerator, precision=precision if on_gpu else "32-true")
        pretrain(dataclasses.replace(config, output_dir=str(folder)))
        table = list(csv.DictReader(Path(folder / "metrics.csv").read_text().splitlines()))
        assert len(table) == 12
        losses.append(float(table[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
