"""What a run is going to do, before its first step: the sheet of crops and the plan in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

from dino_xcit.data.crops import GLOBAL_CROPS
from dino_xcit.data.framing import centre_crop, default_resize
from dino_xcit.data.loader import CropDataset, collate
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CROPS
from dino_xcit.runtime import HALF, memory_there
from dino_xcit.train.module import DINOModule, Network
from dino_xcit.train.plots import draw_crops

if TYPE_CHECKING:
    import lightning as L

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.images import ImageSet

SHEET_IMAGES = 6
SHEET_LOCAL_CROPS = 8


def draw_crop_sheet(folder: Path, module: DINOModule, images: ImageSet) -> None:
    """crops.png: the first images of the first epoch, whole and as the views that the network is shown."""
    config, size = module.config, module.config.global_crops_size
    dataset = CropDataset(images, config, module.student.backbone.path_shape)
    permutation = np.random.default_rng((config.seed, 0)).permutation(len(images))[:SHEET_IMAGES]
    batch = collate([dataset[0, int(index)] for index in permutation])
    groups = [views[:, :SHEET_LOCAL_CROPS] for views in module.views(batch)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    rows = []
    for i, index in enumerate(permutation):
        try:
            whole = [centre_crop(images.read(int(index)), size, default_resize(size)) / 255]
        except (OSError, ValueError):
            whole = [torch.zeros(config.in_chans, 8, 8)]
        pictures = whole + [view * std + mean for views in groups for view in views[i]]
        rows.append(
            (
                Path(images.name(int(index))).name,
                [p.permute(1, 2, 0).clamp(0, 1).numpy() for p in pictures],
            )
        )
    locals_shown = min(config.local_crops_number, SHEET_LOCAL_CROPS)
    titles = (
        ["image"]
        + [f"global {i + 1}" for i in range(GLOBAL_CROPS)]
        + [f"local {i + 1}" for i in range(locals_shown)]
    )
    draw_crops(folder, rows, titles)


def describe_plan(
    config: PretrainConfig, module: DINOModule, images: int, trainer: L.Trainer
) -> str:
    """What the run would do, in a few lines."""
    schedules = module.schedules
    sizes = [
        sum(p.numel() for p in part.parameters())
        for part in (module.student.backbone, module.student.head)
    ]
    memory = memory_estimate(config, trainer.precision)
    return "\n".join(
        [
            f"images      {images:,}",
            f"steps       {schedules.steps:,} ({config.epochs} epochs of {schedules.steps_per_epoch:,}, "
            f"{schedules.total_batch} images each, {trainer.world_size} processes)",
            f"parameters  {sizes[0] / 1e6:.1f} M {module.student.backbone.arch}, {sizes[1] / 1e6:.1f} M head",
            f"memory      {memory / 2**30:.1f} GiB per process for weights, optimizer and what a step keeps for its "
            "backward pass; buffers come on top",
            f"precision   {trainer.precision} on {trainer.strategy.root_device.type}",
            f"crops       {Path(config.output_dir) / CROPS}",
        ]
    )


def refuse_oversized_step(config: PretrainConfig, precision: str) -> None:
    """Raise ValueError for a step that needs more memory than a CPU's machine has, instead of being killed for it."""
    if config.grad_checkpointing:
        return  # the estimate is without
    needed, there = memory_estimate(config, precision), memory_there(torch.device("cpu"))
    if needed > there:
        raise UserError(
            f"a step of --batch_size_per_gpu {config.batch_size_per_gpu} with --arch {config.arch} needs more than "
            f"{needed / 2**30:.0f} GiB and this machine has {there / 2**30:.0f}; lower --batch_size_per_gpu and raise "
            "--accumulate_grad_batches, or start with --config configs/demo.yaml"
        )


def memory_estimate(config: PretrainConfig, precision: Any) -> int:
    """Bytes of weights (student, teacher), gradients, AdamW's two moments and what one forward pass on a CPU keeps for the
    backward pass. Counted on tensors without content: nothing is computed."""
    half = HALF.get(precision)
    with torch.device("meta"):
        student = Network(dataclasses.replace(config, grad_checkpointing=False))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        B, C = config.batch_size_per_gpu, config.in_chans
        groups = [
            torch.empty(B, GLOBAL_CROPS, C, config.global_crops_size, config.global_crops_size)
        ]
        if config.local_crops_number:
            side = config.local_crops_size
            groups.append(torch.empty(B, config.local_crops_number, C, side, side))
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", half, enabled=half is not None):
            student.embed(groups)  # the loss keeps no logits
    parameters = 4 * sum(p.numel() for p in student.parameters())
    return 5 * parameters + sum(kept.values())
