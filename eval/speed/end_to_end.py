"""Images per second of `dino-xcit pretrain` from JPEG files, and the utilisation of the GPU.

    python eval/speed/end_to_end.py [--arch xcit_s12_p16 --batch 256 --steps 150] [-- --OPTION ...]

The files are the photographs of scikit-image at 500 x 375 pixels. Each is hard-linked under as
many names as the steps need images, so the script measures decoding and training, not a disk.
The rate is the median of images_per_second in metrics.csv over the second half of the steps;
during the first half workers start and layers are compiled. Utilisation is the share of time in
which the first GPU ran anything, sampled by nvidia-smi every second of that half.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import circumstances
from loader import write_photographs

LOG_EVERY = 10


def write_files(folder: Path, count: int) -> None:
    """Write a few photographs and hard-link them until there are `count` files."""
    write_photographs(folder)
    photographs = sorted(folder.rglob("*.jpg"))
    for number in range(len(photographs), count):
        original = photographs[number % len(photographs)]
        os.link(original, original.with_name(f"{original.stem}{number}.jpg"))


def run(options: argparse.Namespace, folder: Path) -> tuple[list[float], list[float]]:
    """Pretrain; return images/s by logged row, and GPU utilisation in percent (second half)."""
    output = folder / "run"
    flags = {
        "--arch": options.arch,
        "--data_path": folder,
        "--batch_size_per_gpu": options.batch,
        "--epochs": 1,
        "--warmup_epochs": 0,
        "--devices": 1,
        "--eval_every_n_epochs": 0,
        "--log_every_n_steps": LOG_EVERY,
        "--output_dir": output,
    }
    command = [sys.executable, "-m", "dino_xcit.cli", "pretrain"]
    command += [str(word) for flag in flags.items() for word in flag]
    busy: list[tuple[int, float]] = []  # (rows of metrics.csv so far, percent)
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*command, *options.options], stdout=subprocess.DEVNULL, stderr=stderr
        )
        while process.poll() is None:
            time.sleep(1)
            if shutil.which("nvidia-smi"):
                busy.append((len(rates_in(output / "metrics.csv")), utilisation()))
        if process.returncode:
            stderr.seek(0)
            sys.exit(stderr.read())
    rates = rates_in(output / "metrics.csv")
    return rates, [percent for rows, percent in busy if len(rates) / 2 <= rows < len(rates)]


def utilisation() -> float:
    """Return the utilisation of the first GPU in percent, over the last second or less."""
    query = [
        "nvidia-smi",
        "-i",
        "0",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
    ]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def rates_in(table: Path) -> list[float]:
    if not table.exists():
        return []
    with table.open() as file:
        return [float(row["images_per_second"]) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="xcit_s12_p16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("options", nargs="*", help="after --: options of dino-xcit pretrain")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), options.steps * options.batch)
        rates, busy = run(options, Path(made))
    later = rates[len(rates) // 2 :]
    result = {
        "images_per_second": statistics.median(later),
        "slowest": min(later),
        "fastest": max(later),
        "busy_percent": statistics.median(busy) if busy else None,
        "cores": os.cpu_count(),
    }
    utilised = f", GPU busy {result['busy_percent']:.0f} % of the time" if busy else ""
    print(
        f"{options.arch}, batch {options.batch}: {result['images_per_second']:.1f} images/s "
        f"({result['slowest']:.1f} to {result['fastest']:.1f}){utilised}"
    )
    if options.output:
        options.output.write_text(json.dumps({**circumstances(), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
