"""What only a CUDA device can show."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import PICO_PATHS, TINY, last_state

from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset, collate
from dino_xcit.data.photometric import photometric
from dino_xcit.model.xcit import XCiT
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain

pytestmark = pytest.mark.gpu


def test_photometric_gives_on_the_device_what_it_gives_on_cpu():
    dataset = CropDataset(open_images(TINY, "train"), TINY, PICO_PATHS)
    views = collate([dataset[0, i] for i in range(16)]).views
    crops, draws = views["global_crops"].flatten(0, 1), views["global_params"].flatten(0, 1)
    on_cpu = photometric(crops, draws, TINY.mean, TINY.std, TINY.blur_sigma[1])
    on_device = photometric(crops.cuda(), draws.cuda(), TINY.mean, TINY.std, TINY.blur_sigma[1])
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_the_backbone_gives_on_the_device_what_it_gives_on_cpu():
    torch.manual_seed(0)
    backbone, images = XCiT("xcit_n12_p16").eval(), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.cuda()(images.cuda()).cpu(), backbone.cpu()(images), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_on_the_device_starts_with_the_loss_of_cpu(tmp_path, precision):
    losses = []
    for accelerator in ("cpu", "gpu"):
        folder = tmp_path / accelerator
        on_gpu = accelerator == "gpu"
        config = dataclasses.replace(
            TINY, accelerator=accelerator, precision=precision if on_gpu else "32-true"
        )
        pretrain(dataclasses.replace(config, output_dir=str(folder)))
        table = list(csv.DictReader(Path(folder / "metrics.csv").read_text().splitlines()))
        assert len(table) == 12
        losses.append(float(table[0]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_that_does_not_log_never_waits_for_the_device(tmp_path, precision, monkeypatch):
    strict, step = [], DINOModule.optimizer_step

    def strict_step(module, *arguments, **options):
        logs = (
            module._logs(module.global_step) or module.global_step < 2
        )  # constants go to the device in the first steps
        torch.cuda.set_sync_debug_mode("default" if logs else "error")
        try:
            step(
                module, *arguments, **options
            )  # views, both networks, loss, gradients, optimizer, teacher, center
        finally:
            torch.cuda.set_sync_debug_mode("default")
        strict.append(not logs)

    monkeypatch.setattr(DINOModule, "optimizer_step", strict_step)
    config = dataclasses.replace(
        TINY, accelerator="gpu", precision=precision, log_every_n_steps=100, compile=False
    )
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path)))
    assert (
        sum(strict) == 8
    )  # of 12: not the first two, and not the last of each epoch, which are told


class StopAt(L.Callback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_a_stopped_run_continues_bit_for_bit_with_deterministic_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = dataclasses.replace(
        TINY, accelerator="gpu", compile=False, trainer={"deterministic": True}
    )
    whole, parted = (dataclasses.replace(config, output_dir=str(tmp_path / n)) for n in "ab")
    pretrain(whole)
    assert pretrain(parted, callbacks=[StopAt(7)]).step == 7
    assert pretrain(parted).step == 12
    expected, found = last_state(whole), last_state(parted)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
