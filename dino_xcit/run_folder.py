"""Names of all files in a run folder, and how config.yaml, metrics.csv and bad_images.txt are read.

Every file is written beside its place, synced and renamed, except two that grow by a line at a
time: metrics.csv and bad_images.txt.
"""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any

import yaml

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.errors import UserError
from dino_xcit.files import plain, read_yaml, replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "config.yaml"
METRICS = "metrics.csv"
OF_EVERY_RUN = {"arch", "data_path", "out_dim", "output_dir", "seed"}  # options in each CONFIG
BAD_IMAGES = "bad_images.txt"
CROPS = "crops.png"
CURVES = "curves.png"
ATTENTION = "attention.png"
ATTENTION_MAPS = "attention.npz"
TEACHER = "teacher.safetensors"
LOCK = ".lock"
WANDB_ID = "wandb_id.txt"  # of its run in Weights & Biases, which a continued run continues

LAST = "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"
SOUND = "checkpoints/sound.ckpt"  # the last one before a sign of collapse
DAMAGED = "checkpoints/damaged.ckpt"
KEPT_CHECKPOINTS = "checkpoints/epoch[0-9][0-9][0-9][0-9]*.ckpt"  # of --saveckp_freq, as a glob

KNN = "knn"
LINEAR = {"heads": "linear", "dino": "linear_dino", "logistic": "linear_logistic"}  # by protocol
LINEAR_EVALUATED = "linear_evaluate"  # of `linear-eval --evaluate`
LINEAR_SCRATCH = ".linear"  # folder that exists while linear-eval runs
SEG = "seg"
PREDICTED_CLASSES = "predictions.csv"  # of `linear-eval --predict`
PREDICTED_MASKS = "seg_masks"  # folder, of `seg-eval --predict`
EMBEDDINGS = "embeddings"  # of `embed`, with the ending of its format


def kept_checkpoint(epoch: int) -> str:
    """Return the name of the checkpoint that --saveckp_freq keeps after this epoch."""
    return f"checkpoints/epoch{epoch:04}.ckpt"


def result_file(evaluation: str) -> str:
    """Return the name of an evaluation's results: of KNN, one of LINEAR, SEG, ..."""
    return f"{evaluation}.json"


def classes_picture(evaluation: str) -> str:
    """Return the name of the picture of an evaluation's scores by class."""
    return f"{evaluation}_classes.png"


def head_file(evaluation: str, suffix: str = "") -> str:
    """Return the name of a trained linear head; the suffix distinguishes several."""
    return f"{evaluation}_head{suffix}.safetensors"


def folder_of_config(file: Path) -> Path | None:
    """Return the run folder of which this file is the config.yaml, or None if it is another."""
    is_own = file.name == CONFIG and (file.parent / LAST).parent.is_dir()
    return file.parent if is_own else None


def write_config(config: RunConfig, folder: Path) -> None:
    """Write every resolved option, except those that only concern one start of the run.

    `dino-xcit pretrain --config FILE` continues the run, wherever its folder lies by then.
    """
    options = {
        name: value
        for name, value in plain(dataclasses.asdict(config)).items()
        if name not in ("resume", "extend", "dry_run")
    }
    with replacing(folder / CONFIG) as path:
        path.write_text(yaml.safe_dump(options, sort_keys=False))


def require_no_others_files(folder: Path) -> None:
    """Check that a run that starts in this folder overwrites nothing that no run wrote.

    Raises:
        UserError: there is such a file.
    """
    if (folder / LAST).parent.is_dir() or _is_of_a_run(folder / CONFIG):
        return
    for name in (CONFIG, METRICS):
        if (folder / name).exists():
            raise UserError(
                f"--output_dir {folder} holds a {name} that no run wrote, which would be "
                "overwritten; name another --output_dir, or rename the file"
            )


def _is_of_a_run(path: Path) -> bool:
    """Whether this is a config as `write_config` writes it: with every option."""
    try:
        options = read_yaml(path)
    except (UserError, OSError):
        return False
    return isinstance(options, dict) and options.keys() >= OF_EVERY_RUN


def read_config(folder: Path) -> RunConfig:
    """Return the options of a run.

    Raises:
        UserError: the folder's config.yaml cannot be read, or is not one of this version.
    """
    path = folder / CONFIG
    options = read_yaml(path)
    try:
        return from_plain(options)
    except UserError as error:
        raise UserError(f"{path} is not a config of this version: {error}") from None


def from_plain(options: object) -> RunConfig:
    """Return the config of which these are the options: the inverse of `plain(asdict(config))`.

    Raises:
        UserError: they are not the options of a config of this version.
    """
    if not isinstance(options, dict):
        raise UserError(f"holds a {type(options).__name__}; expected options by their names")
    known = {field.name for field in dataclasses.fields(RunConfig)}
    unknown = [str(name) for name in options if name not in known]
    if unknown:
        raise UserError(f"unknown option {', '.join(unknown)}")
    try:
        return RunConfig(**options)
    except (TypeError, ValueError) as error:  # rules that meet a value of another type
        raise UserError(" ".join(str(error).split())) from None


class Metrics:
    """metrics.csv: a row for each logged step. Columns without a value are empty.

    The columns are the keys of the rows in their order of appearance, after those that the file
    already has. All rows are kept in memory too: a row that could not be written is written with
    the next one.

    Args:
        folder: the run folder.
        first_step: step from which the run continues; later rows of the file are dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / METRICS
        columns, rows = _read_table(self.path)
        self.rows: list[dict[str, Any]] = [
            dict(row) for row in rows if int(row["step"]) <= first_step
        ]
        self._columns = columns
        self._complete = False  # whether the file holds all rows and columns
        self._rewrite()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row.

        Raises:
            OSError: the file cannot be written.
        """
        self.rows.append(dict(row))
        new_column = any(name not in self._columns for name in row)
        if new_column or not self._complete or not self.path.exists():
            self._rewrite()
            return
        self._complete = False
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._complete = True

    def amend(self, values: Mapping[str, float]) -> None:
        """Add values to the last row.

        Raises:
            OSError: the file cannot be written.
        """
        self.rows[-1].update(values)
        self._rewrite()

    def _rewrite(self) -> None:
        self._complete = False
        self._columns = list(
            dict.fromkeys([*self._columns, *(key for r in self.rows for key in r)])
        )
        with replacing(self.path) as path, path.open("w", newline="") as file:
            if self._columns:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(self.rows)
        self._complete = True


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv; none if there is no such file.

    A last row that was cut off in writing is left out.
    """
    return _read_table(folder / METRICS)[1]


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the complete rows of metrics.csv."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [
            row for row in reader if None not in row and None not in row.values() and row["step"]
        ]
        return list(reader.fieldnames or []), rows


def read_bad_images(folder: Path) -> set[str]:
    """Return the images that bad_images.txt lists, named as `on_one_line` names them.

    Each line is an image's name, a tab and the reason.
    """
    path = folder / BAD_IMAGES
    if not path.exists():
        return set()
    return {line.split("\t")[0] for line in path.read_text().split("\n") if line}
