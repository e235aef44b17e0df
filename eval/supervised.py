"""The same network trained with labels for the same time, as a reference for pretraining.

    python eval/supervised.py --config configs/fashion_mnist_60k.yaml --data_path DIR --hours 1 \
        --output eval/results/fashion_mnist_supervised.json

Takes the images, the backbone, the size of the crops and the batch from the config of a
pretraining. The images are flipped and cropped (0.5 to 1 of the area); AdamW, cosine to 0 over the
time, 5 % warmup, label smoothing 0.1. One linear layer follows the class token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_xcit.cli import parse
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.crops import MultiCrop
from dino_xcit.data.framing import centre_crop, default_resize
from dino_xcit.data.images import open_images
from dino_xcit.data.photometric import photometric
from dino_xcit.model.build import build_backbone
from dino_xcit.runtime import HALF, progress, resolve_precision
from dino_xcit.train.schedules import warmup_cosine

LR, WEIGHT_DECAY, SMOOTHING, WARMUP = 1e-3, 0.05, 0.1, 0.05
SCALE = (0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    words = ["--config", str(arguments.config), "--data_path", arguments.data_path]
    config = dataclasses.replace(
        parse("pretrain", RunConfig, words),
        seed=arguments.seed,
        global_crops_scale=SCALE,
        color_jitter=(0.0, 0.0, 0.0, 0.0),
        solarize_prob=(0.0, 0.0, 0.0),
    )
    torch.manual_seed(config.seed)
    half = HALF.get(resolve_precision(config))
    network, seen = train(config, arguments.hours * 3600, half)
    top1 = accuracy(config, network, half)
    row = {"top1": top1, "images": seen, "hours": arguments.hours, "seed": config.seed}
    arguments.output.write_text(json.dumps(row, indent=1) + "\n")
    print(row)


def train(config: RunConfig, seconds: float, half: torch.dtype | None) -> tuple[nn.Module, int]:
    """Train for a time; return the network and the number of images that it saw."""
    images = open_images(config, "train")
    assert images is not None
    assert images.labels is not None
    backbone = build_backbone(
        config.arch, in_chans=config.in_chans, image_size=config.global_crops_size
    )
    network = nn.Sequential(backbone, nn.Linear(backbone.embed_dim, int(images.labels.max()) + 1))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    crop, labels = MultiCrop(config, backbone.path_shape), torch.from_numpy(images.labels).long()
    bar = progress(round(seconds), "supervised", "s", shown=True)
    start, seen, epoch, order = time.perf_counter(), 0, -1, np.zeros(0, int)
    while (elapsed := time.perf_counter() - start) < seconds:
        if len(order) < config.batch_size_per_gpu:
            epoch += 1
            order = np.random.default_rng((config.seed, epoch)).permutation(len(images))
        batch, order = order[: config.batch_size_per_gpu], order[config.batch_size_per_gpu :]
        views = [crop(images.read(int(i)), (config.seed, epoch, int(i))) for i in batch]
        x = _augmented(
            config, [v.global_crops[:1] for v in views], [v.global_params[:1] for v in views]
        )
        for group in optimizer.param_groups:
            position = round(elapsed * 1000)
            group["lr"] = warmup_cosine(
                position, 0, LR, 0, round(WARMUP * seconds * 1000), math.ceil(seconds * 1000)
            )
        with torch.autocast("cpu", half, enabled=half is not None):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(batch)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update(round(elapsed) - bar.n)
    bar.close()
    return network, seen


def _augmented(config: RunConfig, crops: list[Tensor], params: list[Tensor]) -> Tensor:
    return photometric(
        torch.cat(crops), torch.cat(params), config.mean, config.std, config.blur_sigma[1]
    )


@torch.no_grad()
def accuracy(config: RunConfig, network: nn.Module, half: torch.dtype | None) -> float:
    """Top-1 in percent on the validation images."""
    images = open_images(config, "validation")
    assert images is not None
    assert images.labels is not None
    network.eval()
    size, hits = config.global_crops_size, 0
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    for start in range(0, len(images), 256):
        rows = range(start, min(start + 256, len(images)))
        crops = [centre_crop(images.read(i), size, default_resize(size)) / 255 for i in rows]
        with torch.autocast("cpu", half, enabled=half is not None):
            predicted = network((torch.stack(crops) - mean) / std).argmax(-1)
        hits += int((predicted.numpy() == images.labels[list(rows)]).sum())
    return 100 * hits / len(images)


if __name__ == "__main__":
    main()
