"""Time of features and attention figures, compared with official DINO's loop on timm's XCiT.

    python eval/speed/evaluation.py [--arch xcit_s12_p16 --images 64 --rounds 5 --output FILE]

Features: JPEG files of 500 x 375 pixels -> class tokens at 224 pixels, in batches of 32, read in
the same process. Ours is the extraction of `knn-eval`, in float32 and in bfloat16, which is the
default on CPUs with bfloat16 products. The other is the loop of official eval_knn.py (PIL,
torchvision's transforms, one image after another) on timm's XCiT in float32. Ours also returns
the features of the other layers, which the linear probes use.

Figures: one photograph at 480 pixels -> all heads of the last layer. Ours is `dino-xcit
attention --figures heads`, from the weights file to PNG and NPZ on disk. The floor is the
forward pass alone; there is no other implementation for XCiT.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from common import circumstances
from loader import write_photographs
from torchvision import datasets, transforms

import dino_xcit
from dino_xcit import AttentionConfig, RunConfig, XCiT
from dino_xcit.data.framing import EvalDataset, Transform
from dino_xcit.data.images import open_images
from dino_xcit.evaluate.feature_store import FeatureStore, extract
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.figures.maps import attention_maps
from dino_xcit.model.architectures import timm_name
from dino_xcit.runtime import keep_freed_memory
from dino_xcit.weights.load import save_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, SHORT_SIDE, FIGURE, BATCH = 224, 256, 480, 32


def extractors(arch: str, folder: Path, count: int) -> dict[str, Callable[[], object]]:
    """Return functions that compute the features of `count` images."""
    config = RunConfig(data_path=str(folder))
    images = open_images(config, "train")
    assert images is not None
    transform = Transform(SIZE, SHORT_SIDE, config.mean, config.std)
    backbone = XCiT(arch)
    frozen, in_bfloat16 = (
        FeatureExtractor(backbone, transform, torch.device("cpu"), precision)
        for precision in ("32-true", "bf16-mixed")
    )
    dataset = EvalDataset(images, transform)
    rows = np.arange(count) % len(images)

    def ours(frozen: FeatureExtractor) -> object:
        return extract(
            frozen,
            dataset,
            rows,
            FeatureStore.in_memory((count, *frozen.shape())),
            batch_size=BATCH,
            num_workers=0,
        )

    network = timm.create_model(timm_name(arch), num_classes=0).eval()
    normalise = transforms.Normalize(config.mean, config.std)
    resize = transforms.Resize(SHORT_SIDE, interpolation=transforms.InterpolationMode.BICUBIC)
    steps = transforms.Compose(
        [resize, transforms.CenterCrop(SIZE), transforms.ToTensor(), normalise]
    )
    dataset_of_torchvision = datasets.ImageFolder(str(folder / "train"), steps)

    @torch.no_grad()
    def official() -> object:
        batches = (rows[start : start + BATCH] for start in range(0, count, BATCH))
        return [
            network(torch.stack([dataset_of_torchvision[i][0] for i in batch])) for batch in batches
        ]

    return {
        "features, ours": functools.partial(ours, frozen),
        "features, ours in bfloat16": functools.partial(ours, in_bfloat16),
        "features, official loop on timm's": official,
    }


def renderers(arch: str, folder: Path) -> dict[str, Callable[[], object]]:
    """Return functions that compute the attention maps of one image."""
    backbone = XCiT(arch).eval()
    weights = folder / "weights.safetensors"
    save_backbone(backbone, RunConfig(arch=arch), weights)
    image = str(next(folder.rglob("*.jpg")))
    config = AttentionConfig(
        weights=(str(weights),),
        images=(image,),
        image_size=FIGURE,
        figures=("heads",),
        output_dir=str(folder / "figures"),
    )
    pixels = torch.randn(1, 3, FIGURE * 3 // 4 // 16 * 16, FIGURE)

    @torch.inference_mode()
    def only_look() -> object:
        return attention_maps(backbone, pixels)

    def figure() -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return dino_xcit.attention(config)

    return {"figure, ours": figure, "figure, the pass alone": only_look}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="xcit_s12_p16")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_photographs(folder)
        runs = {
            **extractors(options.arch, folder, options.images),
            **renderers(options.arch, folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        rate = (
            f", {options.images / medians[name]:.1f} images/s"
            if name.startswith("features")
            else ""
        )
        print(f"{name:34} {medians[name]:7.3f} s ({min(times):.3f} to {max(times):.3f}){rate}")
    if options.output:
        about = {"arch": options.arch, "images": options.images, "seconds": seconds}
        options.output.write_text(json.dumps({**circumstances(), **about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
