"""What only a GPU can show, in one call of a few minutes.

    python eval/gpu.py --minutes 8 [--official_dino CLONE --official_xcit CLONE --data_path DIR]

The parts run one after the other, the most important first; each is a process of its own, so that
one that fails takes nothing with it. `--output` is written after each part, and a part for which no
time is left is named in it. Without a GPU the same parts run on the CPU with small networks and few
steps: that shows that the script works, and its numbers mean nothing.

DIR contains torchvision's FashionMNIST folder. Needs no network and no installation of this package
(run it from the root of the repository).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.files import write_json
from dino_xcit.run_folder import read_metrics
from dino_xcit.train.dry_run import memory_estimate

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
SPEED = ROOT / "eval/speed"
CUDA = torch.cuda.is_available()
LEAST_SECONDS = 20
"""left, for a part to begin"""


class Part(NamedTuple):
    """A measurement: a command, and what to keep of what it left."""

    name: str
    words: list[str]
    result: Callable[[str], Any]
    """what the command printed -> values for the JSON file"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--official_dino", default="", help="a clone of facebookresearch/dino")
    parser.add_argument("--official_xcit", default="", help="a clone of facebookresearch/xcit")
    parser.add_argument("--data_path", help="folder of Fashion-MNIST, for a real training")
    parser.add_argument("--only", default="", help="parts whose names contain this")
    parser.add_argument("--output", type=Path, default=ROOT / "eval/results/gpu.json")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    kept: dict[str, Any] = {"machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory() as made:
        for part in parts(options, Path(made)):
            if options.only in part.name:
                kept["parts"][part.name] = measured(part, deadline - time.monotonic())
                print(f"{part.name}: {json.dumps(kept['parts'][part.name])[:2000]}", flush=True)
                write_json(options.output, kept)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else "CPU stand-in",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def measured(part: Part, seconds: float) -> Any:
    """Run a part for at most the seconds; return its values, or why there are none."""
    if seconds < LEAST_SECONDS:
        return {"left out": "no time left"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                [sys.executable, *part.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                cwd=ROOT,
                env=environment,
            )
            failed = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failed = "stopped: no time left"
        log.seek(0)
        printed = log.read()
    took = {"seconds": round(time.monotonic() - start, 1)}
    if failed:
        return {**took, "failed": failed, "last lines": printed.strip().splitlines()[-8:]}
    return {**took, "result": part.result(printed)}


# -- parts ---------------------------------------------------------------------------------------


def parts(options: argparse.Namespace, made: Path) -> list[Part]:
    """All parts, the most important first."""
    clones = ["--official_dino", options.official_dino, "--official_xcit", options.official_xcit]
    steps = [step(arch, sizes, made, clones) for arch, sizes in STEPS if CUDA or arch == SMALL]
    training = [fashion_mnist(options.data_path, made)] if options.data_path else []
    return [tests(), steps[0], end_to_end(made), *training, *steps[1:]]


SMALL = "xcit_n12_p16"
STEPS = [("xcit_s12_p16", (224, 96)), (SMALL, (224, 96)), ("xcit_s12_p8", (224, 96))]


def tests() -> Part:
    """The tests that need a device."""
    return Part(
        "tests marked gpu",
        ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/train/test_gpu.py"],
        lambda printed: printed.strip().splitlines()[-1],
    )


def step(arch: str, sizes: tuple[int, int], made: Path, clones: list[str]) -> Part:
    """Time and memory of a step, by turns with official code under its float16 autocast."""
    output = made / f"{arch}.json"
    batch, precisions = ("64", ["16-mixed", "bf16-mixed"]) if CUDA else ("2", ["32-true"])
    fewer = [] if CUDA else ["--steps", "1", "--warmup", "1", "--out_dim", "512"]
    words = [str(SPEED / "step.py"), "--arch", arch, "--precision", *precisions]
    words += ["--batch", batch, "--sizes", *map(str, sizes), "--output", str(output), *fewer]
    words += ["--contenders", "official", "ours", "compiled"] if CUDA else ["--contenders", "ours"]

    def result(_printed: str) -> Any:
        rows = json.loads(output.read_text())["rows"]
        return [{**row, "planned_bytes": planned(row)} for row in rows]

    return Part(f"step of {arch}", [*words, *clones], result)


def planned(row: dict[str, Any]) -> int:
    """The memory that `--dry_run` states for the step, in bytes."""
    config = RunConfig(
        arch=row["arch"],
        global_crops_size=row["global_size"],
        local_crops_size=row["local_size"],
        local_crops_number=row["local_crops"],
        out_dim=row["out_dim"],
        batch_size_per_gpu=row["batch"],
    )
    return memory_estimate(config, row["precision"])


def end_to_end(made: Path) -> Part:
    """Images per second from JPEG files, and the share of time in which the GPU computes."""
    output = made / "end_to_end.json"
    words = [str(SPEED / "end_to_end.py"), "--output", str(output)]
    words += ["--batch", "256", "--steps", "60"] if CUDA else ["--batch", "2", "--steps", "20"]
    small = ["--arch", "xcit_pico2_p4", "--", "--global_crops_size", "32"]
    small += ["--local_crops_size", "16", "--out_dim", "512", "--compile", "false"]
    return Part(
        "end to end", [*words, *([] if CUDA else small)], lambda _: json.loads(output.read_text())
    )


def fashion_mnist(data_path: str, made: Path) -> Part:
    """A real training: all of Fashion-MNIST, for two minutes."""
    run = made / "fashion_mnist"
    words = ["-m", "dino_xcit.cli", "pretrain", "--config", "configs/fashion_mnist_60k.yaml"]
    words += ["--data_path", data_path, "--output_dir", str(run), "--log_every_n_steps", "20"]
    if CUDA:
        words += ["--epochs", "auto", "--warmup_epochs", "auto", "--max_hours", "0.035"]
        words += ["--batch_size_per_gpu", "512"]
    else:
        words += ["--num_images", "256", "--epochs", "1", "--eval_num_images", "256"]

    def result(_printed: str) -> Any:
        rows = read_metrics(run)
        scores = [(int(row["step"]), float(row["knn_top1"])) for row in rows if row["knn_top1"]]
        return {"knn_top1": scores, "images_per_second": rows[-1]["images_per_second"]}

    return Part("training on Fashion-MNIST", words, result)


if __name__ == "__main__":
    main()
