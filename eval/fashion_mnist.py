"""The tables of Fashion-MNIST in README.md, from a finished run and its supervised reference.

    python eval/fashion_mnist.py --run runs/fashion_mnist_60k --data_path DIR

Evaluates the teacher, raw pixels and the untrained network on the 10,000 test images of 28 pixels:
k-NN, linear heads with all labels, logistic regression with 1 and 10 % of them (three subsets).
What `eval/results/fashion_mnist.json` holds of the run is not evaluated again. The tables stand
between two marks of the README and are written from that file, and from the result of
`eval/supervised.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dino_xcit.run_folder import read_config, read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval/results/fashion_mnist.json"
SUPERVISED = ROOT / "eval/results/fashion_mnist_supervised.json"
README = ROOT / "README.md"
START, END = "<!-- eval/fashion_mnist.py -->", "<!-- end -->"
TARGETS = (80, 85, 88, 90)
"""percent of k-NN"""
PROTOCOLS = {
    "knn": ("knn-eval", "knn.json"),
    "linear": ("linear-eval", "linear.json"),
    "labels": (
        "linear-eval --protocol logistic --train_fraction 0.01 0.1 --num_seeds 3",
        "linear_logistic.json",
    ),
}
"""command and its report, by name"""
WHOLE = "--image_size 28 --baselines true"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder; without it, only the tables")
    parser.add_argument("--data_path", help="folder of the data")
    arguments = parser.parse_args()
    if arguments.run:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if results.get("curve") != (curve := knn_by_time(arguments.run)):
            results = {"run": plan(arguments.run), "curve": curve}
        for name, (command, report) in PROTOCOLS.items():
            if name not in results:
                results[name] = evaluated(name, command, report, arguments)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(json.loads(RESULTS.read_text()))


def plan(run: Path) -> dict[str, Any]:
    """What the table says of the run: network, epochs, minutes of training."""
    config = read_config(run)
    return {"arch": config.arch, "epochs": config.epochs, "minutes": round(minutes(run)[-1], 1)}


def minutes(run: Path) -> list[float]:
    """Minutes of training before each row of metrics.csv, evaluations not counted."""
    batch, passed, before, seconds = read_config(run).batch_size_per_gpu, [], 0, 0.0
    for row in read_metrics(run):
        step = int(row["step"])
        seconds += (step - before) * batch / float(row["images_per_second"])
        before = step
        passed.append(seconds / 60)
    return passed


def knn_by_time(run: Path) -> list[list[float]]:
    """Minutes of training and k-NN (k = 20, all images) of each evaluation of the run."""
    return [
        [round(time, 1), float(row["knn_top1"])]
        for time, row in zip(minutes(run), read_metrics(run), strict=True)
        if row["knn_top1"]
    ]


def evaluated(
    name: str, command: str, report: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run an evaluation, unless its report is there; return the part of the report that is kept."""
    folder = arguments.run / "tables" / name
    words = [*command.split(), *WHOLE.split(), "--weights", str(arguments.run)]
    words += ["--output_dir", str(folder)]
    if arguments.data_path:
        words += ["--data_path", arguments.data_path, "--dataset", "torch/fashion_mnist"]
    if not (folder / report).exists():
        subprocess.run([sys.executable, "-m", "dino_xcit.cli", *words], check=True)
    whole = json.loads((folder / report).read_text())
    kept = {part: whole[part] for part in ("results", "baselines", "precision")}
    return {"command": f"{command} {WHOLE}", "seconds": whole["seconds"], **kept}


# -- tables --------------------------------------------------------------------------------------


def write_tables(results: dict[str, Any]) -> None:
    """Write the tables between the marks of the README."""
    lines = [*scores_table(results), "", *times_table(results)]
    head, rest = README.read_text().split(START)
    README.write_text("\n".join([f"{head}{START}", *lines, END]) + rest.split(END, 1)[1])


def scores_table(results: dict[str, Any]) -> list[str]:
    """k-NN, linear, and few labels, of the teacher and what it is compared with."""
    arch, minutes = results["run"]["arch"], results["run"]["minutes"]
    reports = [results.get(part, {}) for part in PROTOCOLS]
    baselines = [report.get("baselines", {}) for report in reports]
    rows = [cells(name, [of_part.get(name) for of_part in baselines]) for name in baselines[0]]
    teacher = f"{arch}, DINO teacher after {minutes:.0f} minutes"
    rows.append(cells(teacher, [report.get("results") for report in reports]))
    if SUPERVISED.exists():
        of_labels = json.loads(SUPERVISED.read_text())
        name = f"{arch}, supervised for {60 * of_labels['hours']:.0f} minutes"
        rows.append([name, "", f"{of_labels['top1']:.1f} %", "", ""])
    header = ["features", "k-NN, k = 20", "linear, `heads`", "1 % of labels", "10 % of labels"]
    return markdown([header, *rows])


def cells(name: str, reports: list[list[dict[str, Any]] | None]) -> list[str]:
    """The table's row of one network; a dash for what was not evaluated."""
    knn, linear, labels = reports
    at_20 = [f"{row['top1']:.1f} %" for row in knn or () if row["k"] == 20]
    all_labels = [f"{row['top1']:.1f} %" for row in linear or ()]
    few = [f"{row['top1']:.1f} ± {row['top1_std']:.1f} %" for row in labels or ()]
    return [name, *(at_20 or ["-"]), *(all_labels or ["-"]), *(few or ["-", "-"])]


def times_table(results: dict[str, Any]) -> list[str]:
    """Minutes of training until the k-NN accuracy first reached each target."""
    times = []
    for target in TARGETS:
        reached = [time for time, knn in results["curve"] if knn >= target]
        times.append(f"{reached[0]:.0f}" if reached else "not reached")
    return markdown([["k-NN", *(f"{t} %" for t in TARGETS)], ["minutes on one core", *times]])


def markdown(rows: list[list[str]]) -> list[str]:
    """Rows as lines of a table, the first one as its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


if __name__ == "__main__":
    main()
