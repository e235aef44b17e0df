"""`auto` against official DINO's values, at equal time; and `auto` with one of them at a time.

    python eval/recipes/run.py --fashion_mnist DIR --output_dir runs/recipes

Each run trains the same network on crops of the same sizes for `--minutes` on one thread, then k-NN
(k = 20) classifies the held-out images by all training images. `eval/results/recipes.json` keeps
every run; runs that it holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from dino_xcit.run_folder import read_metrics

RESULTS = Path(__file__).parent.parent / "results/recipes.json"
FASHION = "--dataset torch/fashion_mnist"
DATA = {
    "Fashion-MNIST, 1,000": f"{FASHION} --num_images 1000",
    "Fashion-MNIST, 5,000": f"{FASHION} --num_images 5000",
    "Fashion-MNIST, 20,000": f"{FASHION} --num_images 20000",
    "Fashion-MNIST, 60,000": FASHION,
    "shapes, 10,000": "--dataset shapes",
}
CHANNELS = {
    "--dataset torch/fashion_mnist": "--in_chans 1 --mean 0.286 --std 0.353",
    "--dataset shapes": "--in_chans 1 --mean 0.5 --std 0.25",
}
NETWORK = "--arch xcit_pico2_p4 --global_crops_size 28 --local_crops_size 12"
OFFICIAL = "--recipe official"
ABLATED = "Fashion-MNIST, 20,000"
ABLATIONS = {  # values of official DINO, in a run that is otherwise auto
    "out_dim": "--out_dim 65536",
    "head_hidden_dim": "--head_hidden_dim 2048 --head_bottleneck_dim 256",
    "koleo_weight": "--koleo_weight 0",
    "use_bn_in_head": "--use_bn_in_head false",
    "momentum_teacher": "--momentum_teacher 0.996",
    "lr": "--lr 0.0005",
    "local_crops_number": "--local_crops_number 8",
    "global_crops_scale": "--global_crops_scale 0.4 1",
    "solarize_prob": "--solarize_prob 0 0.2 0",
    "weight_decay_end": "--weight_decay_end 0.4",
}


class Job(NamedTuple):
    name: str
    seed: int
    data: str
    """options that name the images, of both commands"""
    recipe: str
    """options of pretrain"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion_mnist", type=Path, required=True, help="folder of the data")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of training in each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    for job in jobs(arguments.seeds):
        if arguments.only in job.name:
            once(job, arguments)


def jobs(seeds: int) -> list[Job]:
    """Every run, the first seed of all of them first."""
    listed = []
    for seed in range(seeds):
        for name, data in DATA.items():
            listed.append(Job(f"{name}: auto", seed, data, ""))
            listed.append(Job(f"{name}: official", seed, data, OFFICIAL))
        if seed == 0:
            for option, flags in ABLATIONS.items():
                listed.append(Job(f"{ABLATED}: official {option}", seed, DATA[ABLATED], flags))
    return listed


def once(job: Job, arguments: argparse.Namespace) -> None:
    """Make the run and write its row, unless there is one."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if any((row["name"], row["seed"]) == (job.name, job.seed) for row in rows):
        return
    folder = arguments.output_dir / f"{job.name} {job.seed}".replace(" ", "_").replace(",", "")
    (channels,) = [flags for source, flags in CHANNELS.items() if source in job.data]
    root = f"--data_path {arguments.fashion_mnist}" if FASHION in job.data else ""
    flags = f"{job.data} {channels} {NETWORK} {job.recipe} --seed {job.seed}"
    time = f"--max_hours {arguments.minutes / 60:.4f}"
    machine = "--accelerator cpu --num_workers 0 --compile false"
    quiet = f"--log_every_n_steps 20 --saveckp_freq 0 --output_dir {shlex.quote(str(folder))}"
    run("pretrain", f"{flags} {time} {machine} {root} {quiet}", folder.with_suffix(".log"))
    evaluated = f"--weights {shlex.quote(str(folder))} {job.data} {root} --num_workers 0"
    run("knn-eval", evaluated, folder.with_suffix(".knn.log"))
    rows.append({**job._asdict(), "minutes": arguments.minutes, **measured(folder)})
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(rows[-1], flush=True)


def run(command: str, flags: str, log: Path) -> None:
    """Run a command on one thread; its output goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dino_xcit.cli", command, *shlex.split(flags)]
    with log.open("w") as file:
        subprocess.run(words, stdout=file, stderr=file, env=environment, check=True)


def measured(folder: Path) -> dict[str, Any]:
    """What a run and its evaluation gave."""
    last = read_metrics(folder)[-1]
    results = json.loads((folder / "knn.json").read_text())["results"]
    (knn,) = [row["top1"] for row in results if row["k"] == 20]
    kept = ("step", "loss", "teacher_entropy", "rankme")
    return {"knn_top1": knn, **{name: float(last[name]) for name in kept if last.get(name)}}


if __name__ == "__main__":
    main()
