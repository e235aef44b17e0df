"""What a run promises, the test that holds each promise, and that the test fails when the promise is broken.

    python eval/promises.py --output eval/results/promises.json

Breaks the code once for each promise, in a copy, and runs its test: it must pass before and fail after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent.parent
COPIED = ("dino_xcit", "tests", "eval", "configs", "pyproject.toml", "README.md", "hubconf.py")
SECONDS = 120  # for a test; one that hangs has failed


class Promise(NamedTuple):
    """What is promised, by which test it is held, and a change to a room of dino_xcit/ that breaks it."""

    promise: str
    test: str
    room: str
    old: str
    new: str


PROMISES = (
    Promise(
        "Killed at any moment, a CPU float32 run ends with the same weights, center, optimizer state and rows of "
        "metrics.csv, bit for bit: in mid-epoch, with accumulation, with other loader workers after",
        "test_interruptions.py::test_a_run_killed_in_mid_epoch_ends_bit_for_bit_as_if_it_had_not_been",
        "data",
        'return {"passes": self.handed_out}',
        'return {"passes": self.handed_out - 1}',
    ),
    Promise(
        "So do two processes",
        "test_saving.py::test_two_processes_killed_go_on_bit_for_bit",
        "data",
        "permutation = np.random.default_rng((self.config.seed, epoch)).permutation(self.images)",
        "permutation = np.random.default_rng().permutation(self.images)",
    ),
    Promise(
        "With another number of processes and the same total batch: the same images at each step, equal to float rounding",
        "test_saving.py::test_another_number_of_processes_goes_on_to_float_rounding",
        "data",
        "start = number * self.pass_batch + self.rank * share",
        "start = number * self.pass_batch",
    ),
    Promise(
        "No row of metrics.csv is doubled or missing; rows that could not be written are written with the next",
        "test_saving.py::test_rows_that_could_not_be_written_are_written_with_the_next",
        "run_folder",
        "            self.whole = True\n        else:\n            self._rewrite()",
        "            self.whole = True",
    ),
    Promise(
        "Ctrl-C finishes the step, saves, says how to go on: exit code 130",
        "test_interruptions.py::test_ctrl_c_saves_and_says_how_to_go_on",
        "saving",
        "self.asked = signal.Signals(number)",
        "return",
    ),
    Promise(
        "SIGTERM and SIGUSR1 save within seconds: exit codes 143 and 138",
        "test_saving.py::test_a_scheduler_s_signal_saves_and_the_run_goes_on_from_there",
        "pretrain",
        "stopped_by=stopped_by,",
        "stopped_by=None,",
    ),
    Promise(
        "Under SLURM, SIGUSR1 asks for the job again: exit code 0",
        "test_saving.py::test_under_slurm_the_job_is_asked_for_again",
        "saving",
        '["scontrol", "requeue", job]',
        '["scontrol", "show", job]',
    ),
    Promise(
        "A signal to one of several processes stops all at the same step",
        "test_saving.py::test_a_signal_to_either_of_two_processes_stops_both",
        "saving",
        "return (votes > 0).tolist()",
        "return (votes > 1).tolist()",
    ),
    Promise(
        "Checkpoints are verified on load; a damaged last.ckpt falls back to the one before, with a warning",
        "test_saving.py::test_a_damaged_checkpoint_falls_back_to_the_one_before",
        "saving",
        "if file.testzip() is not None:",
        "if False:",
    ),
    Promise(
        "The checkpoint before is kept until the next is good; a full disk stops nothing and harms nothing",
        "test_saving.py::test_a_full_disk_does_not_stop_the_run_and_harms_nothing",
        "pretrain",
        'beside = (self.folder / LAST).with_name(".last.writing.ckpt")',
        "beside = self.folder / LAST",
    ),
    Promise(
        "A last step that cannot be saved is tried for an hour, then told; the checkpoint before stays",
        "test_saving.py::test_a_last_step_that_cannot_be_saved_is_an_error_and_the_one_before_stays",
        "pretrain",
        "while self.saved_step != trainer.global_step and not self.save(trainer, module):",
        "while False:",
    ),
    Promise(
        "Checkpoints by time and by steps",
        "test_saving.py::test_checkpoints_by_the_clock",
        "pretrain",
        "time.monotonic() >= self.save_at\n",
        "False\n",
    ),
    Promise(
        "A run folder deleted in mid-run is made again",
        "test_saving.py::test_a_folder_deleted_in_mid_run_is_made_again",
        "saving",
        "path.parent.mkdir(parents=True, exist_ok=True)\n            with",
        "with",
    ),
    Promise(
        "A second run on a folder is refused until the first has ended, however it ended",
        "test_saving.py::test_a_second_run_on_the_folder_is_refused_until_the_first_one_is_dead",
        "saving",
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
    ),
    Promise(
        "An evaluation that was interrupted is made up for",
        "test_saving.py::test_a_run_killed_in_evaluating_evaluates_when_it_goes_on",
        "pretrain",
        "if trainer.strategy.broadcast(trainer.is_global_zero and self._was_stopped_in_evaluating(module, step)):",
        "if False:",
    ),
    Promise(
        "A loader worker that dies takes no batch with it",
        "test_faults.py::test_a_worker_that_dies_takes_no_batch_with_it",
        "data",
        "items = loaded_from(done)",
        "items = loaded_from(done) if not deaths else iter(())",
    ),
    Promise(
        "Files that vanish or become unreadable are replaced and listed",
        "test_faults.py::test_files_that_vanish_or_become_unreadable_in_mid_run_are_replaced_and_listed",
        "data",
        "except (OSError, ValueError) as error:\n                bad.append",
        "except ValueError as error:\n                bad.append",
    ),
    Promise(
        "A file that hangs counts as unreadable after a minute",
        "test_faults.py::test_a_file_that_nothing_ever_writes_to_counts_as_unreadable",
        "data",
        "signal.setitimer(signal.ITIMER_REAL, seconds)",
        "pass",
    ),
    Promise(
        "Images of 100,000 x 100,000 pixels are refused at once, without the memory",
        "test_faults.py::test_image_bombs_take_neither_memory_nor_time",
        "data",
        "T = TypeVar",
        "Image.MAX_IMAGE_PIXELS = None\nT = TypeVar",
    ),
    Promise(
        "Collapse of either kind and divergence are told apart; --on_collapse stop leaves a checkpoint from before",
        "test_watch.py::test_a_run_that_collapses_is_stopped_with_a_checkpoint_from_before",
        "pretrain",
        "if not self.watch.suspects:",
        "if True:",
    ),
    Promise(
        "A weight that is not finite is told by the next step, and never saved",
        "test_watch.py::test_nan_in_a_weight_is_found_by_the_next_step_and_never_saved",
        "module",
        "self._broken.copy_((~sound).float().maximum(self._broken))",
        "pass",
    ),
    Promise(
        "Checkpoints, configs, images and labels from strangers run no code and write nowhere",
        "test_fuzz.py::test_files_from_strangers_are_taken_or_refused",
        "formats",
        'content = torch.load(path, map_location="cpu", weights_only=True)',
        'content = torch.load(path, map_location="cpu", weights_only=False)',
    ),
    Promise(
        "Names with quotes, line ends, any script and <script> go through runs, figures, pages and tables",
        "test_faults.py::test_names_of_any_kind_go_through_a_run_its_evaluation_and_its_figures",
        "page",
        '.replace("<", "\\\\u003c")',
        "",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; what it says of promises not tried stays"
    )
    parser.add_argument(
        "--only", default="", help="try only promises whose test has this in its name"
    )
    arguments = parser.parse_args()
    there = arguments.output is not None and arguments.output.exists()
    found = {one["test"]: one for one in json.loads(arguments.output.read_text())} if there else {}
    with tempfile.TemporaryDirectory(prefix="dino_xcit_promises_") as folder:
        for name in COPIED:
            source, target = HERE / name, Path(folder) / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        for promise in (promise for promise in PROMISES if arguments.only in promise.test):
            before = passes(Path(folder), promise.test)
            with broken(Path(folder), promise):
                after = passes(Path(folder), promise.test)
            found[promise.test] = {**promise._asdict(), "holds": before, "holds_when_broken": after}
            print(f"{'ok' if before and not after else 'WRONG':6}{promise.test}", flush=True)
    if arguments.output:
        report = [found[promise.test] for promise in PROMISES if promise.test in found]
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if not all(one["holds"] and not one["holds_when_broken"] for one in found.values()):
        sys.exit("a promise is not held by its test")


@contextlib.contextmanager
def broken(folder: Path, promise: Promise) -> Iterator[None]:
    """The copy with the promise's change in it."""
    path = folder / "dino_xcit" / f"{promise.room}.py"
    text = path.read_text()
    path.write_text(text.replace(promise.old, promise.new))
    yield
    path.write_text(text)


def passes(folder: Path, test: str) -> bool:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/{test}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    assert run.returncode in (0, 1), run.stdout.decode()[-2000:]
    return run.returncode == 0


if __name__ == "__main__":
    main()
