"""What a run leaves behind: names of its files, and how each is written and read.

Every file is written beside its place, brought to the disk and then renamed, except metrics.csv, which grows by a row at a
time.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dino_xcit.config import PretrainConfig

CONFIG = "config.yaml"
METRICS = "metrics.csv"
BAD_IMAGES = "bad_images.txt"
CROPS = "crops.png"
CURVES = "curves.png"
MOST_VALUES = 1_000_000  # in a file of options
LONGEST_REASON = 300  # characters of what others say of a file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside the path to write to; it takes the path's place once the block ends well."""
    beside = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has this file, or the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def write_config(config: PretrainConfig, folder: Path) -> None:
    """Every resolved option but those of this one start: `dino-xcit pretrain --config FILE` repeats the run, or goes on."""
    options = {name: value for name, value in plain(dataclasses.asdict(config)).items() if name not in ("resume", "dry_run")}
    with replacing(folder / CONFIG) as path:
        path.write_text(yaml.safe_dump(options, sort_keys=False))


def read_config(folder: Path) -> PretrainConfig:
    """Raises ValueError if the folder's config.yaml is not one of this version."""
    path = folder / CONFIG
    try:
        return from_plain(read_yaml(path))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a config of this version: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, which may be a stranger's.

    Raises ValueError if it is no YAML or has objects in it, or if a few lines stand for more than any options are.
    """
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text.decode())
        many = _values(content, {}) > MOST_VALUES
    except RecursionError:
        raise ValueError(f"{path} is no file of options: it is nested too deep") from None
    except Exception as error:  # YAML's own, and whatever it lets through of values that are not what their tags say
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())[:LONGEST_REASON]}") from None
    if many:
        raise ValueError(f"{path} is no file of options: its names stand for more than {MOST_VALUES} values")
    return content


def _values(item: Any, known: dict[int, float]) -> float:
    """How many values an item holds with all that its anchors stand for; no end of them if it holds itself."""
    if not isinstance(item, (dict, list)):
        return 1
    if id(item) not in known:
        known[id(item)] = math.inf  # until it is counted
        parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        known[id(item)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(item)]


def printable(name: str) -> str:
    """Names of files need not be UTF-8; figures are."""
    return name.encode(errors="replace").decode()


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: what YAML and checkpoints hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def from_plain(options: dict[str, Any]) -> PretrainConfig:
    """The inverse of `plain(asdict(config))`."""
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in options.items()}
    return PretrainConfig(**values)


class Metrics:
    """metrics.csv: a row per logged step. Columns without a value stay empty.

    All rows are kept here too: what could not be written is written with the next row.
    """

    def __init__(self, folder: Path, columns: Sequence[str], first_step: int) -> None:
        """Keeps the rows up to `first_step`, from which the run goes on; later ones will be written anew."""
        self.path, self.columns = folder / METRICS, columns
        self.whole = False  # whether the file holds all rows
        self.rows: list[dict[str, Any]] = [row for row in read_metrics(folder) if int(row["step"]) <= first_step]
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
            writer.writerows({name: value for name, value in row.items() if name in self.columns} for row in self.rows)
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
    return {line.split("\t")[0] for line in path.read_text().split("\n") if line} if path.exists() else set()


def on_one_line(name: str) -> str:
    """Names of files may hold line ends, tabs and bytes that are no text; lists of them must not."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
    return printable(escaped)


def draw_curves(folder: Path) -> None:
    """curves.png: each column of metrics.csv over the steps."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    panels = [
        ("loss", "cross-entropy, nats"),
        ("teacher_entropy", "teacher entropy, nats"),
        ("kl", "KL teacher to student, nats"),
        ("knn_top1", "k-NN top-1, %"),
        ("rankme", "RankMe of teacher features"),
        ("lr", "learning rate"),
        ("weight_decay", "weight decay"),
        ("grad_norm", "gradient norm"),
        ("center_norm", "norm of the center"),
        ("images_per_second", "images per second"),
    ]
    figure = Figure(figsize=(17, 6), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(2, 5).flat, panels, strict=True):
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", color="#0072B2")
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    with replacing(folder / CURVES) as path:
        figure.savefig(path, dpi=100)


def draw_crops(folder: Path, rows: Sequence[tuple[str, Sequence[Any]]], columns: Sequence[str]) -> None:
    """crops.png: a row per image, (its name, pictures (H, W, C) in [0, 1] under the columns' titles)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(columns), 1.4 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=8)
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            grey = picture.shape[-1] != 3
            axes.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(printable(name)[-22:], fontsize=6, parse_math=False)
    with replacing(folder / CROPS) as path:
        figure.savefig(path, dpi=130)
