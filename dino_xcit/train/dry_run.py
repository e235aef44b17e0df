"""What a run is going to do, shown before its first step: a sheet of crops, a plan, its memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dino_xcit.data.crops import GLOBAL_CROPS
from dino_xcit.data.framing import centre_crop, default_resize
from dino_xcit.data.loader import CropDataset
from dino_xcit.errors import ImageError, UserError
from dino_xcit.private_names import FakeTensorMode, storage_key
from dino_xcit.run_folder import CROPS
from dino_xcit.runtime import HALF, memory_there
from dino_xcit.train.network import Network
from dino_xcit.train.plots import draw_crops
from dino_xcit.train.rate import images_per_second

if TYPE_CHECKING:
    import lightning as L

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.train.module import DINOModule

SHEET_IMAGES = 6
SHEET_LOCAL_CROPS = 8
UNREADABLE_SIDE = 8  # pixels of the black square in place of an unreadable image
STATES = 5  # student, teacher, gradients and AdamW's two moments: each as large as the weights


def draw_crop_sheet(folder: Path, module: DINOModule, images: ImageSet) -> None:
    """Draw crops.png: the first images of the first epoch and the crops made of them."""
    config = module.config
    dataset = CropDataset(images, config, module.student.backbone.path_shape)
    permutation = np.random.default_rng((config.seed, 0)).permutation(len(images))
    indices = permutation[:SHEET_IMAGES].tolist()
    groups = module.views(dataset.batch([(0, index) for index in indices]))  # (B, V, C, H, W)
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    rows = []
    for row, index in enumerate(indices):
        crops = [crop * std + mean for group in groups for crop in group[row, :SHEET_LOCAL_CROPS]]
        pictures = [_whole(images, index, config), *crops]
        name = Path(images.name(index)).name
        rows.append((name, [p.permute(1, 2, 0).clamp(0, 1).numpy() for p in pictures]))
    local_crops = min(config.local_crops_number, SHEET_LOCAL_CROPS)
    titles = [
        "image",
        *(f"global {i + 1}" for i in range(GLOBAL_CROPS)),
        *(f"local {i + 1}" for i in range(local_crops)),
    ]
    draw_crops(folder, rows, titles)


def _whole(images: ImageSet, index: int, config: RunConfig) -> torch.Tensor:
    """The framed image, float (C, S, S) in [0, 1], or a black square if it cannot be read."""
    try:
        image = images.read(index)
    except (OSError, ImageError):
        return torch.zeros(config.in_chans, UNREADABLE_SIDE, UNREADABLE_SIDE)
    size = config.global_crops_size
    return centre_crop(image, size, default_resize(size)) / 255


def describe_plan(
    config: RunConfig, module: DINOModule, images: ImageSet, trainer: L.Trainer
) -> str:
    """Return what the run would do, in a few lines. Trains for seconds, to measure its rate.

    Args:
        config: options of the run.
        module: the networks and schedules.
        images: the training images.
        trainer: knows processes, precision and device.
    """
    schedules, student = module.schedules, module.student
    backbone, head = (
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (student.backbone, student.head)
    )
    memory = memory_estimate(config, trainer.precision) / 2**30
    processes, device = trainer.world_size, trainer.strategy.root_device
    rate = images_per_second(config, images, device, trainer.precision) * processes
    seconds = schedules.steps * schedules.total_batch / rate
    return "\n".join(
        [
            f"images      {len(images):,}",
            f"steps       {schedules.steps:,} ({config.epochs} epoch{'s' * (config.epochs > 1)} of "
            f"{schedules.steps_per_epoch:,}, {schedules.total_batch} images each, "
            f"{processes} process{'es' * (processes > 1)})",
            f"time        {duration(seconds)} at {rate:.0f} images/s, measured on one process",
            f"parameters  {backbone:.1f} M {student.backbone.arch}, {head:.1f} M head",
            f"memory      {memory:.1f} GiB per process for weights, optimizer and the activations "
            "kept for the backward pass, without temporary buffers",
            f"precision   {trainer.precision} on {device.type}",
            f"crops       {Path(config.output_dir) / CROPS}",
        ]
    )


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3 h 20 min`, `5 days 4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} day{'s' * (days > 1)} {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def refuse_oversized_step(config: RunConfig, precision: str) -> None:
    """Refuse a step that needs more memory than this machine has, before the system kills the run.

    Only for a run on the CPU. With `--grad_checkpointing`, which the estimate leaves out, nothing
    is refused.

    Raises:
        UserError: the estimate exceeds the machine's memory.
    """
    if config.grad_checkpointing:
        return
    needed, available = memory_estimate(config, precision), memory_there(torch.device("cpu"))
    if needed > available:
        raise UserError(
            f"a step of --batch_size_per_gpu {config.batch_size_per_gpu} with --arch {config.arch} "
            f"needs more than {needed / 2**30:.0f} GiB and this machine has "
            f"{available / 2**30:.0f}; lower --batch_size_per_gpu and raise "
            "--accumulate_grad_batches, or start with --config configs/demo.yaml"
        )


def memory_estimate(config: RunConfig, precision: str) -> int:
    """Estimate the memory of a process in bytes, without temporary buffers.

    The sum of student, teacher, gradients, AdamW's two moments and what one forward pass of the
    student on a CPU keeps for the backward pass. Runs on tensors without content, so nothing is
    computed and no memory is taken.

    Args:
        config: options of the run; `--grad_checkpointing` is not taken into account.
        precision: of the pass, as Lightning names it.
    """
    # On the meta device, since timm's networks cannot be built from fake tensors.
    with torch.device("meta"):
        student = Network(dataclasses.replace(config, grad_checkpointing=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        kept = _kept_for_backward(student, _empty_views(config), HALF.get(precision))
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    return STATES * weights + kept


def _empty_views(config: RunConfig) -> list[torch.Tensor]:
    """Groups of views of one batch, (B, V, C, H, W), without content."""
    crops = [(GLOBAL_CROPS, config.global_crops_size)]
    if config.local_crops_number:
        crops.append((config.local_crops_number, config.local_crops_size))
    B, C = config.batch_size_per_gpu, config.in_chans
    return [torch.empty(B, number, C, side, side) for number, side in crops]


def _kept_for_backward(
    student: Network, groups: list[torch.Tensor], half: torch.dtype | None
) -> int:
    """Bytes that a forward pass saves for the backward pass, besides the weights.

    Each storage counts once. The loss computes its logits in parts and keeps none.
    """
    weights = {storage_key(parameter) for parameter in student.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key not in weights:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", half, enabled=half is not None):
        student.embed(groups)
    return sum(kept.values())
