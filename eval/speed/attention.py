"""Time and memory of attention maps by image size, each size in a process of its own.

    python eval/speed/attention.py [--arch xcit_s12_p16 --sides 512 1024 --repeats 3 --output FILE]

Each measurement is one float32 pass over one square image, which gives every head of the last
class-attention layer, as in `dino-xcit attention`. The exponents are the slopes of straight
lines through the logarithms: 1 means linear in the number of pixels. On a CPU memory is the
largest resident size minus that of a process that has run an image of one patch; on a GPU it is
the peak that torch allocated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import circumstances, peak

from dino_xcit.figures.maps import attention_maps, bytes_per_pixel
from dino_xcit.model.xcit import XCiT
from dino_xcit.runtime import keep_freed_memory


def measure(arch: str, side: int, repeats: int) -> dict[str, float]:
    """Return seconds and bytes of one pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    backbone = XCiT(arch).to(device).eval()
    attention_maps(
        backbone, torch.randn(1, 3, backbone.patch_size, backbone.patch_size, device=device)
    )
    image = torch.randn(1, 3, side, side, device=device)
    before, times = peak(device), []
    for _ in range(repeats):
        start = time.perf_counter()
        attention = attention_maps(backbone, image).attention
        assert bool(attention.isfinite().all())  # also waits for the GPU
        times.append(time.perf_counter() - start)
    return {
        "side": side,
        "seconds": statistics.median(times),
        "bytes": peak(device) - before,
        "estimate": int(bytes_per_pixel(backbone) * side**2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["xcit_s12_p16", "xcit_s12_p8"])
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument(
        "--one",
        action="store_true",
        help="measure the first arch and side in this process and print JSON",
    )
    options = parser.parse_args()
    if options.one:
        keep_freed_memory()
        print(json.dumps(measure(options.arch[0], options.sides[0], options.repeats)))
        return
    report = {}
    for arch in options.arch:
        rows = []
        for side in options.sides:
            command = [
                sys.executable,
                __file__,
                "--one",
                "--arch",
                arch,
                "--sides",
                str(side),
                "--repeats",
            ]
            done = subprocess.run([*command, str(options.repeats)], capture_output=True, text=True)
            if done.returncode:
                print(f"{arch}, {side} px: failed: {done.stderr.strip().splitlines()[-1:]}")
                continue
            rows.append(json.loads(done.stdout))
            row, mib = rows[-1], 2**20
            print(
                f"{arch}, {side:5} px: {row['seconds']:7.2f} s, "
                f"{1e6 * row['seconds'] / side**2:.2f} us per pixel, "
                f"{row['bytes'] / mib:6.0f} MiB (estimate {row['estimate'] / mib:.0f})"
            )
        pixels = np.log([row["side"] ** 2 for row in rows])
        slopes = {
            name: float(np.polyfit(pixels, np.log([row[name] for row in rows]), 1)[0])
            for name in ("seconds", "bytes")
        }
        print(f"{arch}: exponents {slopes['seconds']:.2f} of time, {slopes['bytes']:.2f} of memory")
        report[arch] = {"rows": rows, "exponents": slopes}
    report |= circumstances()
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
