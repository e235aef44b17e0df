"""Break each promise of a run on purpose and check that its test notices.

    python eval/promises.py --output eval/results/promises.json

For each promise the script changes one line in a copy of the code. The promise's test must pass
before the change and fail after it. `--check` runs no test: it only verifies that every line to
change and every test still exist.
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
SECONDS = 300  # for one test; a test that takes longer counts as failed


class Promise(NamedTuple):
    """A promise, the test that holds it, and a code change that breaks it."""

    promise: str
    test: str
    """`FILE::NAME`, below `tests/`"""
    module: str
    """the file to change, below `dino_xcit/`"""
    old: str
    """code that occurs exactly once in it"""
    new: str
    """what replaces that code"""

    def problem(self) -> str | None:
        """Why the promise cannot be tried, or None."""
        file, _, name = self.test.partition("::")
        if not (HERE / "tests" / file).exists() or (
            f"def {name}(" not in (HERE / "tests" / file).read_text()
        ):
            return f"{self.test}: no such test"
        if not (HERE / "dino_xcit" / self.module).exists():
            return f"{self.test}: no file dino_xcit/{self.module}"
        count = (HERE / "dino_xcit" / self.module).read_text().count(self.old)
        if count != 1:
            return f"{self.test}: {self.old!r} occurs {count} times in dino_xcit/{self.module}"
        return None


PROMISES = (
    Promise(
        "A CPU float32 run that is killed at any moment ends with the same weights, center, "
        "optimizer state and rows of metrics.csv, bit for bit: in mid-epoch, with "
        "accumulation, with another number of loader workers afterwards",
        "train/test_interruptions.py::test_a_run_killed_in_mid_epoch_ends_bit_for_bit_as_if_it_had_not_been",
        "data/loader.py",
        "divmod(self.first_step * accumulated + skipped, per_epoch)",
        "divmod(skipped, per_epoch)",
    ),
    Promise(
        "The same holds for two processes",
        "train/test_checkpoints.py::test_two_processes_killed_go_on_bit_for_bit",
        "data/loader.py",
        "permutation = np.random.default_rng((self.config.seed, epoch)).permutation(self.images)",
        "permutation = np.random.default_rng().permutation(self.images)",
    ),
    Promise(
        "With another number of processes and the same total batch, each step sees the same "
        "images; results are equal to float rounding",
        "train/test_checkpoints.py::test_another_number_of_processes_goes_on_to_float_rounding",
        "data/loader.py",
        "start = number * self.pass_batch + self.rank * share",
        "start = number * self.pass_batch",
    ),
    Promise(
        "No row of metrics.csv is duplicated or missing; rows that could not be written are "
        "written with the next",
        "train/test_checkpoints.py::test_rows_that_could_not_be_written_are_written_with_the_next",
        "run_folder.py",
        "writer.writerows(self.rows)",
        "writer.writerows(self.rows[-1:])",
    ),
    Promise(
        "Ctrl-C finishes the step, saves and prints how to continue: exit code 130",
        "train/test_interruptions.py::test_ctrl_c_saves_and_says_how_to_go_on",
        "train/signals.py",
        "self.asked = signal.Signals(number)",
        "return",
    ),
    Promise(
        "SIGTERM and SIGUSR1 save within seconds: exit codes 143 and 138",
        "train/test_checkpoints.py::test_a_scheduler_s_signal_saves_and_the_run_goes_on_from_there",
        "train/pretrain.py",
        "stopped_by=stopped_by,",
        "stopped_by=None,",
    ),
    Promise(
        "Under SLURM, SIGUSR1 requeues the job: exit code 0",
        "train/test_checkpoints.py::test_under_slurm_the_job_is_asked_for_again",
        "train/signals.py",
        '["scontrol", "requeue", job]',
        '["scontrol", "show", job]',
    ),
    Promise(
        "A signal to one of several processes stops all of them at the same step",
        "train/test_checkpoints.py::test_a_signal_to_either_of_two_processes_stops_both",
        "train/signals.py",
        "(votes > 0).tolist()",
        "(votes > 1).tolist()",
    ),
    Promise(
        "Checkpoints are verified on load; if last.ckpt is damaged, the run warns and "
        "continues from the previous checkpoint",
        "train/test_checkpoints.py::test_a_damaged_checkpoint_falls_back_to_the_one_before",
        "train/checkpoints.py",
        "if file.testzip() is not None:",
        "if False:",
    ),
    Promise(
        "The previous checkpoint is kept until the next one is complete; a full disk neither "
        "stops the run nor damages it",
        "train/test_checkpoints.py::test_a_full_disk_does_not_stop_the_run_and_harms_nothing",
        "train/callback.py",
        'beside = (self.folder / LAST).with_name(".last.writing.ckpt")',
        "beside = self.folder / LAST",
    ),
    Promise(
        "If the last step cannot be saved, the run retries for an hour, then fails; the "
        "previous checkpoint is kept",
        "train/test_checkpoints.py::test_a_last_step_that_cannot_be_saved_is_an_error_and_the_one_before_stays",
        "train/callback.py",
        "while self.saved_step != trainer.global_step and not self.save(trainer, module):",
        "while False:",
    ),
    Promise(
        "Checkpoints are written by time and by steps",
        "train/test_checkpoints.py::test_checkpoints_by_the_clock",
        "train/callback.py",
        "time.monotonic() >= self.save_at,",
        "False,",
    ),
    Promise(
        "A run folder that is deleted during the run is created again",
        "train/test_checkpoints.py::test_a_folder_deleted_in_mid_run_is_made_again",
        "train/checkpoints.py",
        "path.parent.mkdir(parents=True, exist_ok=True)\n            with",
        "with",
    ),
    Promise(
        "A second run in the same folder is refused until the first has ended, however it ended",
        "train/test_checkpoints.py::test_a_second_run_on_the_folder_is_refused_until_the_first_one_is_dead",
        "train/checkpoints.py",
        "lock.acquire()",
        "pass",
    ),
    Promise(
        "An evaluation that was interrupted is repeated when the run continues",
        "train/test_checkpoints.py::test_a_run_killed_in_evaluating_evaluates_when_it_goes_on",
        "train/callback.py",
        "trainer.is_global_zero and self._missed_evaluation(module, step)",
        "False",
    ),
    Promise(
        "A loader worker that dies loses no batch",
        "data/test_workers.py::test_a_dead_worker_is_replaced_and_no_batch_is_lost",
        "data/workers.py",
        "loader_from(done),",
        "loader_from(done + deaths),",
    ),
    Promise(
        "Files that vanish or become unreadable are replaced and listed",
        "data/test_loader.py::test_files_that_vanish_or_become_unreadable_in_mid_run_are_replaced_and_listed",
        "data/loader.py",
        "except (ImageError, OSError) as error:",
        "except ImageError as error:",
    ),
    Promise(
        "A file whose read hangs counts as unreadable after a minute",
        "train/test_faults.py::test_a_file_that_nothing_ever_writes_to_counts_as_unreadable",
        "data/decode.py",
        "remaining, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_READ)",
        "remaining, interval = 0.0, 0.0",
    ),
    Promise(
        "Images of 100,000 x 100,000 pixels are refused at once, without allocating the memory",
        "data/test_decode.py::test_image_bombs_take_no_memory",
        "data/decode.py",
        "EXTENSIONS = (",
        "Image.MAX_IMAGE_PIXELS = None\nEXTENSIONS = (",
    ),
    Promise(
        "Both kinds of collapse and divergence are distinguished; --on_collapse stop leaves a "
        "checkpoint from before",
        "train/test_collapse.py::test_a_run_that_collapses_is_stopped_with_a_checkpoint_from_before",
        "train/callback.py",
        "if not self.watch.suspects:",
        "if True:",
    ),
    Promise(
        "A weight that is not finite is reported by the next step and never saved",
        "train/test_collapse.py::test_nan_in_a_weight_is_found_by_the_next_step_and_never_saved",
        "train/module.py",
        "self._broken.copy_(((~finite).float() * NOT_FINITE).maximum(self._broken))",
        "pass",
    ),
    Promise(
        "Checkpoints, configs, images and labels from untrusted sources run no code and write "
        "nowhere",
        "test_fuzz.py::test_files_from_strangers_are_taken_or_refused",
        "weights/reading.py",
        'content = torch.load(path, map_location="cpu", weights_only=True)',
        'content = torch.load(path, map_location="cpu", weights_only=False)',
    ),
    Promise(
        "Names with quotes, line ends, any script and <script> work in runs, figures, pages "
        "and tables",
        "train/test_faults.py::test_names_of_any_kind_go_through_a_run_its_evaluation_and_its_figures",
        "figures/page.py",
        '"<", "\\\\u003c"',
        '"<", "<"',
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file to write; its entries for promises not tried are kept",
    )
    parser.add_argument(
        "--only", default="", help="try only promises whose test has this in its name"
    )
    parser.add_argument(
        "--check", action="store_true", help="verify the table of promises; run no test"
    )
    arguments = parser.parse_args()
    problems = [problem for promise in PROMISES if (problem := promise.problem())]
    if problems:
        sys.exit("\n".join(problems))
    if arguments.check:
        print(f"{len(PROMISES)} promises: each test exists, each line to change occurs once")
        return
    exists = arguments.output is not None and arguments.output.exists()
    results = {}
    if exists:
        results = {one["test"]: one for one in json.loads(arguments.output.read_text())}
    with tempfile.TemporaryDirectory(prefix="dino_xcit_promises_") as folder:
        for name in COPIED:
            source, target = HERE / name, Path(folder) / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        for promise in (promise for promise in PROMISES if arguments.only in promise.test):
            before = passes(Path(folder), promise.test)
            with broken(Path(folder), promise):
                after = passes(Path(folder), promise.test)
            results[promise.test] = {
                **promise._asdict(),
                "holds": before,
                "holds_when_broken": after,
            }
            verdict = "ok" if not after else "PASSES WHEN BROKEN"
            print(f"{verdict if before else 'FAILS UNBROKEN'}: {promise.test}", flush=True)
    if arguments.output:
        report = [results[promise.test] for promise in PROMISES if promise.test in results]
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if not all(one["holds"] and not one["holds_when_broken"] for one in results.values()):
        sys.exit("at least one promise is not held by its test")


@contextlib.contextmanager
def broken(folder: Path, promise: Promise) -> Iterator[None]:
    """Apply the promise's change to the copy; undo it at the end."""
    path = folder / "dino_xcit" / promise.module
    text = path.read_text()
    path.write_text(text.replace(promise.old, promise.new))
    yield
    path.write_text(text)


def passes(folder: Path, test: str) -> bool:
    """Whether the test passes in the copy."""
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
