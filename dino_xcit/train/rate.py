"""Measures how many images a second a run takes, before it begins."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from dino_xcit.data.loader import CropDataset, CropLoader, StepBatchSampler
from dino_xcit.data.workers import default_workers
from dino_xcit.runtime import HALF, say
from dino_xcit.train.module import DINOModule
from dino_xcit.train.schedules import Schedules

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet

FIRST_PASSES = 2  # slower than the others
SECONDS = 4.0


def images_per_second(
    config: RunConfig, images: ImageSet, device: torch.device, precision: str
) -> float:
    """Train for a few seconds on one process and forget it; return images per second.

    Args:
        config: options of the run.
        images: what it trains on.
        device: of the process.
        precision: as Lightning names it.
    """
    say("measuring the rate of the run on a few of its steps")
    sampler = StepBatchSampler(config, len(images))
    schedules = Schedules(
        config=config, steps_per_epoch=sampler.steps_per_epoch, total_batch=sampler.total_batch
    )
    module = DINOModule(config, schedules).to(device)
    dataset = CropDataset(images, config, module.student.backbone.path_shape)
    workers = default_workers() if config.num_workers is None else config.num_workers
    optimizer = torch.optim.AdamW(module.student.parameters(), fused=True)
    half = HALF.get(precision)
    passes, start = -FIRST_PASSES, time.perf_counter()
    while passes < 1 or time.perf_counter() - start < SECONDS:
        for batch in CropLoader(dataset, sampler, num_workers=workers, pin_memory=False):
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = module.training_step(module.transfer_batch_to_device(batch, device, 0), 0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            passes += 1
            if passes == 0:
                start = _now(device)
            if passes > 0 and time.perf_counter() - start > SECONDS:
                break
    return passes * config.batch_size_per_gpu / (_now(device) - start)


def _now(device: torch.device) -> float:
    """The time at which the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
