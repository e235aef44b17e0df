"""Seven short runs, six of which collapse or diverge: when is it reported, and what are their
curves?

    python eval/collapse.py --output_dir runs/collapse

The runs train on shapes and differ in one or two options from the first, healthy one. The script
writes the warnings with their steps to `eval/results/collapse.json` and the curves to
`eval/results/collapse.png`. Runs that already exist are not repeated. `eval/collapse.md`
explains them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dino_xcit.run_folder import read_metrics

HERE = Path(__file__).parent
OPTIONS = (
    f"--config {HERE.parent / 'configs/demo.yaml'} --num_images 6400 --epochs 4 "
    "--log_every_n_steps 10 --num_workers 0 --eval_num_images 1000 --eval_every_n_epochs 2"
)
PROTOTYPES = 512  # of configs/demo.yaml
NO_CENTERING = "--center_momentum 1"
RUNS = {
    "healthy": "",
    "teacher as warm as the student": "--teacher_temp 0.1 --warmup_teacher_temp 0.1",
    "teacher ten times warmer": "--teacher_temp 1 --warmup_teacher_temp 1",
    "no centering": NO_CENTERING,
    "no centering, very sharp": f"{NO_CENTERING} --teacher_temp 0.01 --warmup_teacher_temp 0.01",
    "learning rate x 10": "--lr 0.04",
    "learning rate x 100": "--lr 0.4",
}
PANELS = {
    "loss": "loss, nats",
    "teacher_entropy": "teacher entropy, nats (dotted: ln K)",
    "kl": "KL teacher to student, nats",
    "grad_norm": "gradient norm",
}
WARNING = re.compile(r"step (\d+): ([^:]+): ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/collapse"), help="folder of the runs"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder for the table and the figure"
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results_by_run = {
        name: run(name, flags, arguments.output_dir / name.replace(" ", "_"))
        for name, flags in RUNS.items()
    }
    (arguments.results / "collapse.json").write_text(json.dumps(results_by_run, indent=2) + "\n")
    draw(
        {name: read_metrics(arguments.output_dir / name.replace(" ", "_")) for name in RUNS},
        results_by_run,
        arguments.results,
    )


def run(name: str, flags: str, folder: Path) -> dict[str, Any]:
    """Make the run unless it exists; return its warnings and its last metrics."""
    log = folder.with_suffix(".log")
    if not log.exists():
        command = [
            sys.executable,
            "-m",
            "dino_xcit.cli",
            "pretrain",
            *shlex.split(OPTIONS),
            *flags.split(),
        ]
        done = subprocess.run(
            [*command, "--output_dir", str(folder)], stderr=subprocess.PIPE, text=True, check=True
        )
        log.write_text(
            "\n".join(line for line in done.stderr.splitlines() if not line.startswith("pretrain:"))
        )
    warnings = WARNING.findall(log.read_text())
    rows = read_metrics(folder)
    result = {
        "options": flags,
        "steps": int(rows[-1]["step"]),
        "told": [{"step": int(step), "sign": sign} for step, sign in warnings],
        "told_before_the_run": "does not sharpen" in log.read_text(),
        "last_row": {column: float(rows[-1][column]) for column in (*PANELS, "knn_top1", "rankme")},
    }
    print(name, json.dumps(result), flush=True)
    return result


def draw(
    runs: dict[str, list[dict[str, str]]], results_by_run: dict[str, dict[str, Any]], results: Path
) -> None:
    """Draw one row of panels for each run, with the healthy run in grey behind."""
    figure = Figure(figsize=(13, 1.75 * len(runs)), layout="constrained")
    for (name, rows), line in zip(
        runs.items(), figure.subplots(len(runs), len(PANELS), sharex=True), strict=True
    ):
        first_warning = next(iter(results_by_run[name]["told"]), None)
        for axes, (column, title) in zip(line, PANELS.items(), strict=True):
            for shown, colour in ((runs["healthy"], "0.75"), (rows, "#0072B2")):
                axes.plot(
                    [int(row["step"]) for row in shown],
                    [float(row[column]) for row in shown],
                    color=colour,
                )
            if column == "teacher_entropy":
                axes.axhline(math.log(PROTOTYPES), color="black", linestyle=":", linewidth=1)
            if column == "grad_norm":
                axes.set_yscale("log")
            if first_warning is not None:
                axes.axvline(first_warning["step"], color="#D55E00", linewidth=1)
            if name == "healthy":
                axes.set_title(title, fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("\n".join(name.rsplit(" ", 1)) if len(name) > 20 else name, fontsize=8)
        if first_warning is not None:
            label = f"{first_warning['sign'].split(',')[0]},\nstep {first_warning['step']}"
            line[1].text(
                0.97,
                0.3,
                label,
                transform=line[1].transAxes,
                ha="right",
                fontsize=8,
                color="#D55E00",
            )
    for axes in line:
        axes.set_xlabel("step", fontsize=8)
    figure.savefig(results / "collapse.png", dpi=90)


if __name__ == "__main__":
    main()
