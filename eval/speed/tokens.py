"""Time and memory of XCiT, ViT and ResNet by image size: forward, and forward with backward.

    python eval/speed/tokens.py [--sides 224 448 896 1792 --output FILE --figure FILE]

Each measurement is one square image in float32 (on a GPU: a batch under bfloat16 autocast) in a
process of its own. ViT and ResNet are timm's. Sizes that do not fit in memory are left out. The
exponents are the slopes of straight lines through the logarithms: 1 means linear in the number
of pixels. Memory is the largest resident size minus that of a process that has run one small
image; on a GPU it is the peak that torch allocated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import circumstances, peak

from dino_xcit.model.xcit import XCiT
from dino_xcit.runtime import keep_freed_memory

ARCHS = ("xcit_s12_p16", "xcit_s12_p8", "vit_small_patch16_224", "resnet50")
SMALL = 64
MODES = ("forward", "forward and backward")


def build(arch: str) -> torch.nn.Module:
    if arch.startswith("xcit"):
        return XCiT(arch)
    import timm

    return timm.create_model(
        arch, num_classes=0, **({"dynamic_img_size": True} if arch.startswith("vit") else {})
    )


def measure(arch: str, side: int, mode: str, repeats: int, batch: int) -> dict[str, Any]:
    """Return seconds and bytes per image of one pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = build(arch).to(device).train(mode != "forward")

    def run(images: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if mode == "forward":
                with torch.inference_mode():
                    value = network(images)
            else:
                value = network(images)
                network.zero_grad()
                value.float().sum().backward()
        assert bool(value.isfinite().all())  # also waits for the GPU

    run(torch.randn(2, 3, SMALL, SMALL, device=device))
    images = torch.randn(batch, 3, side, side, device=device)
    before, times = peak(device), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return {
        "arch": arch,
        "side": side,
        "mode": mode,
        "seconds": statistics.median(times[1:]) / batch,
        "bytes": (peak(device) - before) / batch,
    }


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    pixels = np.log([row["side"] ** 2 for row in rows])
    return {
        name: round(float(np.polyfit(pixels, np.log([r[name] for r in rows]), 1)[0]), 3)
        for name in ("seconds", "bytes")
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, mode in enumerate(MODES):
        for axis, (name, label, unit) in zip(
            axes[:, column],
            (("seconds", "seconds per image", 1), ("bytes", "MiB per image", 2**20)),
            strict=True,
        ):
            for arch in dict.fromkeys(row["arch"] for row in rows):
                points = [row for row in rows if row["arch"] == arch and row["mode"] == mode]
                axis.plot(
                    [p["side"] for p in points],
                    [p[name] / unit for p in points],
                    marker="o",
                    label=arch,
                )
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(mode)
        axes[1, column].set_xlabel("side of the image in pixels")
        sides = sorted({row["side"] for row in rows})
        axes[1, column].set_xticks(sides, [str(side) for side in sides], minor=False)
        axes[1, column].set_xticks([], minor=True)
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", default=ARCHS, help="xcit_... is ours; any other name is timm's"
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[224, 448, 896, 1344, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--figure", type=Path, help="PNG file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        keep_freed_memory()
        print(json.dumps(measure(*json.loads(options.one))))
        return
    rows: list[dict[str, Any]] = []
    slopes: dict[str, dict[str, float]] = {}
    for mode in MODES:
        for arch in options.arch:
            arch_rows = []
            for side in options.sides:
                one = json.dumps([arch, side, mode, options.repeats, options.batch])
                done = subprocess.run(
                    [sys.executable, __file__, "--one", one], capture_output=True, text=True
                )
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
                    print(f"{arch}, {mode}, {side} px: left out: {reason}")
                    break
                arch_rows.append(json.loads(done.stdout))
                row = arch_rows[-1]
                print(
                    f"{arch:22} {mode:21} {side:5} px {row['seconds']:8.3f} s "
                    f"{row['bytes'] / 2**20:7.0f} MiB",
                    flush=True,
                )
            slopes[f"{arch}, {mode}"] = exponents(arch_rows)
            print(f"{arch:22} {mode:21} exponents {slopes[f'{arch}, {mode}']}", flush=True)
            rows += arch_rows
    if options.output:
        options.output.write_text(
            json.dumps({**circumstances(), "exponents": slopes, "rows": rows}, indent=2) + "\n"
        )
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
