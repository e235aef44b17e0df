"""`auto` against official DINO's values at equal compute; and `auto` with one of them at a time.

    python eval/recipes/run.py --fashion_mnist DIR --output_dir runs/recipes

Each run trains the same small network on one thread. A run of `auto` sees `--images` images; the
others see as many as take the same time, by the rates that are measured first, the best of three by
turns (so that other work on the machine changes no result). Then k-NN (k = 20) classifies the
held-out images by all training images, at the size of the crops. `eval/results/recipes.json` keeps
the rates and every run; what it holds is not repeated. `--table` writes the tables of
`eval/recipes/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from dino_xcit.files import write_json
from dino_xcit.run_folder import read_metrics

RESULTS = Path(__file__).parent.parent / "results/recipes.json"
README = Path(__file__).parent / "README.md"
MARKS = "<!-- run.py: {} -->", "<!-- end -->"
FASHION = "--dataset torch/fashion_mnist"
DATA = {
    "Fashion-MNIST, 1,000": (1000, FASHION),
    "Fashion-MNIST, 5,000": (5000, FASHION),
    "Fashion-MNIST, 20,000": (20_000, FASHION),
    "Fashion-MNIST, 60,000": (60_000, FASHION),
    "shapes, 10,000": (10_000, "--dataset shapes"),
}
CHANNELS = {
    FASHION: "--in_chans 1 --mean 0.286 --std 0.353",
    "--dataset shapes": "--in_chans 1 --mean 0.5 --std 0.25",
}
COMMON = "--arch xcit_pico2_p4 --accelerator cpu --precision 32-true --num_workers 0"
AUTO = "--global_crops_size 20"
RECIPES = {
    "auto": AUTO,
    "official": "--recipe official --global_crops_size 28 --local_crops_size 12",
}
SLOWER = (
    "official",
    "global crops of 28 pixels",
    "out_dim",
    "head_hidden_dim",
    "local_crops_number",
)
"""recipes that take more time an image than auto"""
ABLATED = "Fashion-MNIST, 5,000"
ABLATIONS = {  # values of official DINO, in a run that is otherwise auto
    "global crops of 28 pixels": "--global_crops_size 28",
    "out_dim": f"{AUTO} --out_dim 65536",
    "head_hidden_dim": f"{AUTO} --head_hidden_dim 2048 --head_bottleneck_dim 256",
    "koleo_weight": f"{AUTO} --koleo_weight 0",
    "use_bn_in_head": f"{AUTO} --use_bn_in_head false",
    "momentum_teacher": f"{AUTO} --momentum_teacher 0.996",
    "lr": f"{AUTO} --lr 0.0005",
    "local_crops_number": f"{AUTO} --local_crops_number 8",
    "global_crops_scale": f"{AUTO} --global_crops_scale 0.4 1",
    "solarize_prob": f"{AUTO} --solarize_prob 0 0 0",
    "weight_decay_end": f"{AUTO} --weight_decay_end 0.04",
}


class Job(NamedTuple):
    data: str
    recipe: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion_mnist", type=Path, help="folder of the data")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--images", type=int, default=40_000, help="seen in a run of auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
        if "rates" not in kept:
            kept = {"images": arguments.images, "rates": rates(arguments), "runs": kept["runs"]}
            write_json(RESULTS, kept)
        done = {Job(*(row[name] for name in Job._fields)) for row in kept["runs"]}
        for job in jobs(arguments.seeds):
            if job not in done:
                kept["runs"].append({**job._asdict(), **once(job, kept, arguments)})
                write_json(RESULTS, kept)
                print(kept["runs"][-1], flush=True)
    write_tables(json.loads(RESULTS.read_text()))


def jobs(seeds: int) -> list[Job]:
    """Every run, the first seed of all of them first."""
    listed = []
    for seed in range(seeds):
        listed += [Job(data, recipe, seed) for data in DATA for recipe in RECIPES]
        if seed == 0:
            listed += [Job(ABLATED, option, seed) for option in ABLATIONS]
    return listed


def rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second of auto and of the slower recipes: the best of three plans, by turns."""
    best = dict.fromkeys(("auto", *SLOWER), 0.0)
    for _ in range(3):
        for name in best:
            flags = {**RECIPES, **ABLATIONS}[name]
            folder = arguments.output_dir / "rates"
            log = run(
                "pretrain",
                f"{FASHION} --data_path {arguments.fashion_mnist} --num_images {DATA[ABLATED][0]} "
                f"{CHANNELS[FASHION]} {COMMON} {flags} --epochs 1 --warmup_epochs 0 "
                f"--dry_run --output_dir {folder}",
                folder,
            )
            (rate,) = re.findall(r"at ([\d,]+) images/s", log.read_text())
            best[name] = max(best[name], float(rate.replace(",", "")))
    return best


def relative_rate(kept: dict[str, Any], recipe: str) -> float:
    """Images that a recipe sees while auto sees one."""
    rates: dict[str, float] = kept["rates"]
    return rates.get(recipe, rates["auto"]) / rates["auto"]


def once(job: Job, kept: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a run and evaluate it; return its numbers."""
    there, source = DATA[job.data]
    share = relative_rate(kept, job.recipe)
    seen = round(max(kept["images"], there) * share)  # each image at least once
    epochs = max(1, round(seen / there))
    images = min(there, seen)
    name = f"{job.data}-{job.recipe}-{job.seed}".replace(" ", "_").replace(",", "")
    folder = arguments.output_dir / name
    root = f"--data_path {arguments.fashion_mnist}" if source == FASHION else ""
    flags = {**RECIPES, **ABLATIONS}[job.recipe]
    warmup = f"--warmup_epochs {0.1 * epochs}" if "official" in flags else ""
    run(
        "pretrain",
        f"{source} --num_images {images} {CHANNELS[source]} {COMMON} {flags} {root} {warmup} "
        f"--seed {job.seed} --epochs {epochs} --log_every_n_steps 20 --saveckp_freq 0 "
        f"--eval_every_n_epochs 0 --output_dir {shlex.quote(str(folder))}",
        folder,
    )
    run(
        "knn-eval",
        f"--weights {shlex.quote(str(folder))} {source} --num_images {there} {root} "
        "--num_workers 0 --accelerator cpu --precision 32-true --no_cache true",
        folder.with_name(name + "-knn"),
    )
    last = read_metrics(folder)[-1]
    results = json.loads((folder / "knn.json").read_text())["results"]
    (knn,) = [row["top1"] for row in results if row["k"] == 20]
    entropy = float(last["teacher_entropy"])
    return {"images_seen": images * epochs, "knn_top1": knn, "teacher_entropy": entropy}


def run(command: str, flags: str, folder: Path) -> Path:
    """Run a command on one thread; its output goes to the log beside the folder, returned."""
    log = folder.with_name(folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dino_xcit.cli", command, *shlex.split(flags)]
    with log.open("w") as file:
        subprocess.run(words, stdout=file, stderr=file, env=environment, check=True)
    return log


def write_tables(kept: dict[str, Any]) -> None:
    """Write both tables of the README from the results."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in kept["runs"]:
        scores.setdefault((row["data"], row["recipe"]), []).append(row["knn_top1"])
    compared = ["| images | `auto` | official |", "|---|---|---|"]
    for data in DATA:
        cells = [spread(scores.get((data, recipe), [])) for recipe in RECIPES]
        compared.append(f"| {data} | {' | '.join(cells)} |")
    base = scores.get((ABLATED, "auto"), [])
    ablated = ["| changed to | k-NN | rate |", "|---|---|---|"]
    ablated.append(f"| nothing (`auto`) | {spread(base[:1])} | 1 |")
    for option, flags in ABLATIONS.items():
        if (ABLATED, option) not in scores:
            continue
        changed = flags.removeprefix(AUTO).strip()
        rate = relative_rate(kept, option)
        cell = spread(scores.get((ABLATED, option), []))
        ablated.append(f"| `{changed}` | {cell} | {rate:.2f} |")
    text = README.read_text()
    for name, lines in {"compared": compared, "ablated": ablated}.items():
        start, end = MARKS[0].format(name), MARKS[1]
        head, rest = text.split(start)
        text = f"{head}{start}\n" + "\n".join(lines) + f"\n{end}" + rest.split(end, 1)[1]
    README.write_text(text)


def spread(values: list[float]) -> str:
    """`81.2`, or `81.2 ± 0.3` (standard deviation) and the number of seeds."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"


if __name__ == "__main__":
    main()
