"""`make demo`: pretrain on the embedded shapes, then compare k-NN accuracies on held-out images.

A run that was interrupted goes on where it stopped; a finished one is only evaluated. Takes the options of
`dino-xcit pretrain`; without any, `--config configs/demo.yaml`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from dino_xcit.cli import parse
from dino_xcit.config import PretrainConfig
from dino_xcit.pretrain import KnnProbe, open_images, pretrain
from dino_xcit.weights import load_backbone
from dino_xcit.xcit import XCiT

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main() -> None:
    start = time.perf_counter()
    config = parse("pretrain", PretrainConfig, sys.argv[1:] or ["--config", str(CONFIG)])
    outcome = pretrain(config)
    if outcome.interrupted:
        sys.exit(130)
    images = open_images(config, "train")
    assert images is not None
    probe = KnnProbe.of(config, images)
    assert probe is not None
    torch.manual_seed(config.seed)
    rows: list[tuple[str, nn.Module]] = [
        ("raw pixels", nn.Flatten()),
        (f"{config.arch}, untrained", XCiT(config.arch, in_chans=config.in_chans)),
        (f"{config.arch}, DINO teacher", load_backbone(outcome.folder)),
    ]
    print(f"\nk-NN top-1 (k = 20) on {len(probe.queries)} held-out images, {len(probe.neighbours)} neighbours")
    for name, features in rows:
        print(f"  {name:32} {probe(features, torch.device('cpu')):5.1f} %")
    print(f"{outcome.steps} steps; all of this took {time.perf_counter() - start:.0f} s; look at {outcome.folder}/crops.png")


if __name__ == "__main__":
    main()
