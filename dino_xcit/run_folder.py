"""What a run leaves behind: names of its files, and how each is written and read.

Every file is written beside its place, brought to the disk and then renamed, except metrics.csv, which grows by a row at a
time.
"""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any

import yaml

from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.errors import UserError
from dino_xcit.files import plain, read_yaml, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONFIG = "config.yaml"
METRICS = "metrics.csv"
BAD_IMAGES = "bad_images.txt"
CROPS = "crops.png"
CURVES = "curves.png"


def write_config(config: PretrainConfig, folder: Path) -> None:
    """Every resolved option but those of this one start: `dino-xcit pretrain --config FILE` repeats the run, or goes on."""
    options = {
        name: value
        for name, value in plain(dataclasses.asdict(config)).items()
        if name not in ("resume", "dry_run")
    }
    with replacing(folder / CONFIG) as path:
        path.write_text(yaml.safe_dump(options, sort_keys=False))


def read_config(folder: Path) -> PretrainConfig:
    """Raises ValueError if the folder's config.yaml is not one of this version."""
    path = folder / CONFIG
    try:
        return from_plain(read_yaml(path))
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a config of this version: {' '.join(str(error).split())}"
        ) from None


def from_plain(options: dict[str, Any]) -> PretrainConfig:
    """The inverse of `plain(asdict(config))`."""
    values: dict[str, Any] = {
        key: tuple(item) if isinstance(item, list) else item for key, item in options.items()
    }
    return PretrainConfig(**values)


class Metrics:
    """metrics.csv: a row per logged step. Columns without a value stay empty.

    All rows are kept here too: what could not be written is written with the next row.
    """

    def __init__(self, folder: Path, columns: Sequence[str], first_step: int) -> None:
        """Keeps the rows up to `first_step`, from which the run goes on; later ones will be written anew."""
        self.path, self.columns = folder / METRICS, columns
        self.whole = False  # whether the file holds all rows
        self.rows: list[dict[str, Any]] = [
            row for row in read_metrics(folder) if int(row["step"]) <= first_step
        ]
        self._rewrite()

    def write(self, row: dict[str, float]) -> None:
        """Raises OSError if the file cannot be written."""
        self.rows.append(dict(row))
        if self.whole and self.path.exists():
            self.whole = False
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
            self.whole = True
        else:
            self._rewrite()

    def amend(self, values: dict[str, float]) -> None:
        """Add to the last row. Raises OSError if the file cannot be written."""
        self.rows[-1].update(values)
        self._rewrite()

    def _rewrite(self) -> None:
        self.whole = False
        with replacing(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(
                {name: value for name, value in row.items() if name in self.columns}
                for row in self.rows
            )
        self.whole = True


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv; none if there is no such file. A last row that was cut off in writing is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return [row for row in reader if None not in row.values() and row["step"]]


def read_bad_images(folder: Path) -> set[str]:
    """What bad_images.txt lists, one image a line before a tab and the reason, named as `on_one_line` names it."""
    path = folder / BAD_IMAGES
    return (
        {line.split("\t")[0] for line in path.read_text().split("\n") if line}
        if path.exists()
        else set()
    )


PREVIOUS = "checkpoints/previous.ckpt"
SOUND = "checkpoints/sound.ckpt"  # the last one before a sign of collapse
DAMAGED = "checkpoints/damaged.ckpt"
LOCK = ".lock"

TEACHER = "teacher.safetensors"
LAST = "checkpoints/last.ckpt"
