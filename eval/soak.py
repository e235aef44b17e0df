"""Hours of pretraining with random kills: is anything lost?

    python eval/soak.py --hours 1 --output eval/results/soak.json

Each round makes one run three times: once undisturbed, and twice stopped again and again by a
random signal at a random moment, with a random number of loader workers at each start; some of
the workers are killed too. At the end all three must have the same weights, center, optimizer
state and rows of metrics.csv, bit for bit. Memory and file descriptors of the undisturbed run
are recorded, to see whether they grow. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import dino_xcit
from dino_xcit.train.checkpoints import is_whole

OPTIONS = (
    "--arch xcit_pico2_p4 --dataset shapes --num_images 640 --in_chans 1 --mean 0.5 --std 0.25 "
    "--global_crops_size 16 --local_crops_size 8 --local_crops_number 2 --drop_path_rate 0.1 "
    "--out_dim 64 --head_hidden_dim 64 --head_bottleneck_dim 16 --batch_size_per_gpu 8 "
    "--warmup_epochs 1 --accelerator cpu --devices 1 --precision 32-true --log_every_n_steps 5 "
    "--eval_num_images 200 --checkpoint_every_n_steps 20 --saveckp_freq 0 --eval_every_n_epochs 5"
)
STEPS_PER_EPOCH = 80
VICTIMS = 2  # killed runs that train side by side
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
LAST_STEPS = 20  # a signal this close to the end may arrive after the loop and have no effect
SECONDS_TRAINED = 2  # upper limit, from the first logged step to the signal
ANY_TIME = 0.1  # share of the kills at any moment, start-up included
WORKER_KILLED = 0.2  # share of the starts in which a loader worker is killed first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hours", type=float, default=1, help="start new rounds until this time has passed"
    )
    parser.add_argument(
        "--epochs", type=int, default=36, help=f"epochs of {STEPS_PER_EPOCH} steps in a round"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the kills and of the first run"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; rounds in it are kept")
    arguments = parser.parse_args()
    start = time.monotonic()
    exists = arguments.output is not None and arguments.output.exists()
    rounds: list[dict[str, Any]] = (
        json.loads(arguments.output.read_text())["rounds"] if exists else []
    )
    before = len(rounds)
    while len(rounds) == before or time.monotonic() - start < 3600 * arguments.hours:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="dino_xcit_soak_") as folder:
            rounds.append(one_round(Path(folder), arguments.epochs, arguments.seed + len(rounds)))
            rounds[-1]["hours"] = round((time.monotonic() - began) / 3600, 2)
            print(json.dumps(rounds[-1]), flush=True)
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "hours": round(sum(one["hours"] for one in rounds), 2),
            "kills": sum(sum(one["kills"].values()) for one in rounds),
            "workers_killed": sum(one["workers_killed"] for one in rounds),
            "steps": sum(one["steps"] for one in rounds),
            "all_identical": all(one["identical"] for one in rounds),
            "no_signal_without_effect": not any(one["signals_without_effect"] for one in rounds),
            "rounds": rounds,
            "versions": {
                "dino_xcit": dino_xcit.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if not (report["all_identical"] and report["no_signal_without_effect"]):
        sys.exit("something was lost")


def one_round(folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    steps = epochs * STEPS_PER_EPOCH
    flags = [*OPTIONS.split(), "--epochs", str(epochs), "--seed", str(seed)]
    watched: list[tuple[int, int, int]] = []
    undisturbed = threading.Thread(
        target=run_undisturbed, args=(folder / "undisturbed", flags, watched)
    )
    undisturbed.start()
    with ThreadPoolExecutor(VICTIMS) as pool:
        victims = [folder / f"killed{i}" for i in range(VICTIMS)]
        killed = list(
            pool.map(
                lambda i: run_killed(victims[i], flags, steps, random.Random(VICTIMS * seed + i)),
                range(VICTIMS),
            )
        )
    undisturbed.join()
    ends = [same(folder / "undisturbed", victim) for victim in victims]
    return {
        "seed": seed,
        "steps": steps,
        "starts": sum(one.starts for one in killed),
        "kills": dict(sum((one.kills for one in killed), collections.Counter())),
        "signals_without_effect": [one.ignored for one in killed if one.ignored],
        "workers_killed": sum(one.workers_killed for one in killed),
        "steps_made_again": sum(one.repeated for one in killed),
        "identical": not any(end.differing for end in ends),
        "differing": [name for end in ends for name in end.differing],
        "rows": ends[0].rows,
        "files_left_over": [name for end in ends for name in end.left_over],
        **growth(watched),
    }


class Killed(NamedTuple):
    """What happened to one killed run."""

    kills: collections.Counter[str]
    workers_killed: int
    starts: int
    repeated: int
    ignored: str  # a signal after which the run continued to its end, and its output


class End(NamedTuple):
    """Differences between the ends of two runs."""

    differing: list[str]
    rows: int
    left_over: list[str]


def start_run(folder: Path, flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dino_xcit.cli", "pretrain", *flags, "--output_dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_undisturbed(folder: Path, flags: list[str], watched: list[tuple[int, int, int]]) -> None:
    """Append (step, resident KiB, open file descriptors) to `watched` every two seconds."""
    process = start_run(folder, [*flags, "--num_workers", "1"])
    drain = threading.Thread(target=lambda: process.stderr.read())  # type: ignore[union-attr]
    drain.start()
    while process.poll() is None:
        time.sleep(2)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0])
            descriptors = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except (OSError, IndexError):
            break
        watched.append((step_of(folder), resident, descriptors))
    assert process.wait() == 0, "the undisturbed run failed"


def run_killed(folder: Path, flags: list[str], steps: int, rng: random.Random) -> Killed:
    kills: collections.Counter[str] = collections.Counter()
    workers_killed = starts = repeated = 0
    while True:
        starts += 1
        began = time.monotonic()
        process = start_run(folder, [*flags, "--num_workers", str(rng.choice([0, 1, 2]))])
        before = step_of(folder)
        if rng.random() < ANY_TIME:
            time.sleep(rng.uniform(0, 10))
        else:
            while process.poll() is None and not is_training(folder, process.pid, before):
                time.sleep(0.05)
            if rng.random() < WORKER_KILLED:
                time.sleep(rng.uniform(0, 1))
                workers_killed += kill_a_worker(process.pid, rng)
            time.sleep(rng.uniform(0, SECONDS_TRAINED))
        number = rng.choice(SIGNALS)
        reached = step_of(folder)
        after = time.monotonic() - began
        if process.poll() is None:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        if process.returncode == 0:
            stderr = stderr.replace(str(folder), folder.name)
            ignored = (
                f"{number.name} after {after:.2f} s, at step {reached}: {stderr}"
                if reached < steps - LAST_STEPS
                else ""
            )
            return Killed(kills, workers_killed, starts, repeated, ignored)
        # A signal that arrives before our handlers are installed ends the process directly.
        assert process.returncode in (CODES[number], -number), (
            number,
            process.returncode,
            stderr[-3000:],
        )
        # Workers of a process killed by signal 9 may print a traceback.
        assert "Traceback" not in stderr or number == signal.SIGKILL or process.returncode < 0, (
            stderr[-3000:]
        )
        kills[number.name] += 1
        checkpoints = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        present = [path for path in checkpoints if path.exists()]
        assert not present or any(map(is_whole, present)), "no checkpoint is whole"
        if present:
            newest = next(path for path in present if is_whole(path))
            saved = torch.load(newest, weights_only=True, mmap=True)["global_step"]
            repeated += max(0, reached - saved)


def is_training(folder: Path, pid: int, before: int) -> bool:
    """Whether this process holds the run's lock and has logged a step."""
    try:
        held = (folder / ".lock").read_text()
    except OSError:
        return False
    return f"process {pid} " in held and step_of(folder) != before


def kill_a_worker(pid: int, rng: random.Random) -> int:
    """Kill one loader worker, a child of the training process; return how many were killed."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
    except (OSError, IndexError, ProcessLookupError):
        return 0
    return 1


def step_of(folder: Path) -> int:
    """The last step in metrics.csv."""
    try:
        lines = (folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError, IndexError):
        return 0


def same(one: Path, other: Path) -> End:
    """Compare two runs that should have ended alike."""
    states = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (one, other)
    ]
    differing = [
        f"{part}/{path}"
        for part in ("state_dict", "optimizer_states", "global_step")
        for path, (a, b) in paired(states[0][part], states[1][part]).items()
        if not equal(a, b)
    ]
    tables = []
    for folder in (one, other):
        with (folder / "metrics.csv").open(newline="") as file:
            tables.append(
                [
                    {k: v for k, v in row.items() if k != "images_per_second"}
                    for row in csv.DictReader(file)
                ]
            )
    if tables[0] != tables[1]:
        differing.append("metrics.csv")
    kept = ("last.ckpt", "previous.ckpt", "sound.ckpt")
    left = [path.name for path in (other / "checkpoints").iterdir() if path.name not in kept]
    return End(differing=differing[:10], rows=len(tables[0]), left_over=left)


def paired(one: Any, other: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(one, (dict, list)):
        keys = one.keys() if isinstance(one, dict) else range(max(len(one), len(other)))
        return {
            k: v for key in keys for k, v in paired(one[key], other[key], f"{path}.{key}").items()
        }
    return {path: (one, other)}


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def growth(watched: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Fit straight lines to memory over the second half of the undisturbed run."""
    steps, resident, descriptors = np.array(
        [row for row in watched if row[0] > watched[-1][0] / 2], float
    ).T
    slope = np.polyfit(steps, resident / 1024, 1)[0] * 1000
    return {
        "resident_mib": round(resident[-1] / 1024),
        "resident_mib_per_1000_steps": round(slope, 2),
        "file_descriptors_first_and_most": [int(descriptors[0]), int(descriptors.max())],
    }


if __name__ == "__main__":
    main()
