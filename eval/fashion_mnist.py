"""Evaluates the Fashion-MNIST runs and writes their tables into README.md.

    dino-xcit pretrain --config configs/fashion_mnist_60k.yaml --data_path DIR
    python eval/fashion_mnist.py --run runs/fashion_mnist_60k --data_path DIR

k-NN, linear heads and heads on 1 and 10 % of the labels, beside raw pixels, the untrained network
and, if `eval/results/fashion_mnist_supervised.json` exists (`eval/supervised.py`), the supervised
one. The minutes to each accuracy are those of training, from the run's metrics.csv, whose
evaluations use all images. Writes `eval/results/fashion_mnist.json`.
`--tables` writes the tables from that file alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from dino_xcit.run_folder import read_config, read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval/results/fashion_mnist.json"
SUPERVISED = ROOT / "eval/results/fashion_mnist_supervised.json"
TARGETS = (80, 82, 84, 85, 86, 87, 88, 89, 90)
K = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/fashion_mnist_60k"))
    parser.add_argument("--data_path", help="folder of the data")
    parser.add_argument("--tables", action="store_true", help="do not evaluate")
    arguments = parser.parse_args()
    if not arguments.tables:
        results = evaluate(arguments.run, arguments.data_path)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    block = "\n".join(["<!-- eval/fashion_mnist.py -->", "", *tables(), "", "<!-- end -->"])
    pattern = r"<!-- eval/fashion_mnist.py -->.*?<!-- end -->"
    readme.write_text(re.sub(pattern, lambda _: block, readme.read_text(), flags=re.DOTALL))


def evaluate(run: Path, data_path: str) -> dict[str, Any]:
    """Make every evaluation of a run."""
    common = ["--weights", str(run), "--data_path", data_path, "--dataset", "torch/fashion_mnist"]
    knn = command("knn-eval", [*common, "--baselines"], run / "knn.json")
    linear = command("linear-eval", [*common, "--baselines"], run / "linear.json")
    few = ["--train_fraction", "0.01", "0.1", "--num_seeds", "3"]
    labels = command("linear-eval", [*common, *few], run / "linear.json")
    last, config = read_metrics(run)[-1], read_config(run)
    return {
        "run": {
            "arch": config.arch,
            "epochs": config.epochs,
            "step": int(last["step"]),
            "images": int(last["step"]) * config.batch_size_per_gpu,
        },
        "knn": scores(knn),
        "linear": scores(linear),
        "labels": {f"{row['train_fraction']:g}": row for row in labels["results"]},
        "curve": curve(run, config.batch_size_per_gpu),
    }


def command(name: str, arguments: list[str], result: Path) -> dict[str, Any]:
    """Run a command and return what it wrote."""
    subprocess.run([sys.executable, "-m", "dino_xcit.cli", name, *arguments], check=True)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Top-1 with its interval of the teacher and of each baseline; of k-NN that of `K`."""
    rows = {"teacher": result["results"], **result["baselines"]}
    picked = {name: next(row for row in of if row.get("k", K) == K) for name, of in rows.items()}
    return {name: {key: row[key] for key in ("top1", "top1_ci95")} for name, row in picked.items()}


def curve(run: Path, batch: int) -> list[dict[str, float]]:
    """Minutes of training and k-NN at each evaluation."""
    minutes, before, points = 0.0, 0, []
    for row in read_metrics(run):
        step = int(row["step"])
        minutes += (step - before) * batch / float(row["images_per_second"]) / 60
        before = step
        if row.get("knn_top1"):
            points.append({"step": step, "minutes": minutes, "knn_top1": float(row["knn_top1"])})
    return points


def tables() -> list[str]:
    """The lines of the README between its marks."""
    results = json.loads(RESULTS.read_text())
    run, knn, linear = results["run"], results["knn"], results["linear"]
    rows = [
        f"| {name} | {percent(knn[name])} | {percent(linear[name])} |"
        for name in knn
        if name in linear
    ]
    lines = ["| features | k-NN, k = 20 | linear, `heads` |", "|---|---|---|", *reversed(rows)]
    if SUPERVISED.exists():
        supervised = json.loads(SUPERVISED.read_text())
        lines.append(
            f"| trained with labels for {supervised['hours']:g} h, its own classifier | "
            f"| {supervised['top1']:.1f} % |"
        )
    few = ", ".join(
        f"{100 * float(share):g} % of the labels {row['top1']:.1f} %"
        for share, row in results["labels"].items()
    )
    lines += ["", f"The teacher of {run['arch']} after {run['images']:,} images seen; {few}.", ""]
    reached = [
        (target, next((p for p in results["curve"] if p["knn_top1"] >= target), None))
        for target in TARGETS
    ]
    hit = [(target, point) for target, point in reached if point]
    lines += [
        "| k-NN (k = 20) | " + " | ".join(f"{target} %" for target, _ in hit) + " |",
        "|---|" + "---|" * len(hit),
        "| minutes of training | " + " | ".join(f"{p['minutes']:.0f}" for _, p in hit) + " |",
    ]
    return lines


def percent(row: dict[str, Any]) -> str:
    low, high = row["top1_ci95"]
    return f"{row['top1']:.1f} % [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
