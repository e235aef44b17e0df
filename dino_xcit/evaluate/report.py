"""What an evaluation leaves behind: a table on the terminal, a JSON file, a picture of the classes."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch
import torchvision
from torch import Tensor

import dino_xcit
from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.files import plain, printable, replacing
from dino_xcit.runtime import require_folder
from dino_xcit.weights.load import run_folder_of

RESAMPLES = 10_000
TOP = 5
NAMED_CLASSES = 40  # more names than this cannot be read in a figure
UNNAMED = "class {}"


def output_folder(config: EvalConfig) -> Path:
    """`--output_dir`, else the run folder of the weights, else runs/NAME or the folder of the features."""
    if config.output_dir is not None:
        folder = Path(config.output_dir)
    elif isinstance(config, ClassificationConfig) and config.load_features is not None:
        folder = Path(config.load_features)
    else:
        weights = config.weights or ""
        name = re.sub(r"\.(safetensors|ckpt|pth?)$", "", Path(weights.replace(":", "_")).name)
        folder = run_folder_of(weights) or Path("runs") / name
    require_folder(folder, "output_dir")
    return folder


def hits(ranked: Tensor, labels: Tensor, top: int) -> np.ndarray:
    """Ranked classes (m, ranks) -> bool (m,): whether the right class is among the first."""
    return (ranked[:, :top] == labels[:, None]).any(1).numpy()


def scores(hit: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Of each measure, right or not for every image (or the share of repetitions): percent, with a 95 % interval."""
    values: dict[str, Any] = {}
    for name, of_images in hit.items():
        values[name] = round(100 * float(np.mean(of_images)), 3)
        values[f"{name}_ci95"] = [round(100 * bound, 3) for bound in bootstrap(of_images, seed)]
    return values


def bootstrap(of_images: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over resampled images.

    Only how often each value is drawn matters for the mean, so the counts are drawn at once: the same distribution.
    """
    values, counts = np.unique(np.asarray(of_images, dtype=float), return_counts=True)
    m = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(m, counts / m, size=RESAMPLES)
    low, high = np.quantile(drawn @ values / m, [0.025, 0.975])
    return float(low), float(high)


def describe(config: EvalConfig, subjects: list[Any], precision: str) -> dict[str, Any]:
    """What every evaluation's file says: options, sizes, time, versions, machine."""
    made, seconds = sum(s.made for s in subjects), sum(s.seconds for s in subjects)
    first = subjects[0]
    labels = {name: first.labels(name) for name in ("train", "validation")}
    return {
        "weights": config.weights or first.name,
        "data": {
            **{name: len(of_split) for name, of_split in labels.items()},
            "classes": len(torch.unique(torch.cat(list(labels.values())))),
            "unreadable": first.unreadable,
        },
        "feature_extraction": {
            "images": made,
            "seconds": round(seconds, 2),
            "images_per_second": round(made / seconds, 1) if seconds else None,
        },
        "precision": precision,
        "options": plain(dataclasses.asdict(config)),
        "versions": {
            "dino_xcit": dino_xcit.__version__,
            "python": platform.python_version(),
            **{
                module.__name__: module.__version__
                for module in (torch, torchvision, timm, lightning)
            },
        },
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU",
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns under each other, the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            f"{text:{'>' if i else '<'}{width}}"
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(values: dict[str, Any], name: str) -> str:
    """`87.1 [86.4, 87.8]`, or a dash for what was not measured."""
    if values.get(name) is None:
        return "-"
    low, high = values[f"{name}_ci95"]
    return f"{values[name]:.1f} [{low:.1f}, {high:.1f}]"


def draw_classes(
    path: Path, title: str, predicted: np.ndarray, labels: np.ndarray, names: dict[int, str]
) -> None:
    """Confusion matrix (rows: true class, in percent of it) and the accuracy of each class, from worst to best."""
    from matplotlib.figure import Figure

    classes = np.unique(np.concatenate([labels, predicted[predicted >= 0]]))
    count = len(classes)
    confusion = np.zeros((count, count))
    voted = predicted >= 0
    np.add.at(
        confusion,
        (np.searchsorted(classes, labels[voted]), np.searchsorted(classes, predicted[voted])),
        1,
    )
    images = np.array([(labels == c).sum() for c in classes])
    confusion *= 100 / np.maximum(images, 1)[:, None]
    accuracy = confusion.diagonal()
    written = [printable(names.get(int(c), UNNAMED.format(c))) for c in classes]

    readable = count <= NAMED_CLASSES
    side = max(4.5, 0.28 * count) if readable else 7.0
    figure = Figure(figsize=(2.1 * side + 1, side), layout="constrained")
    left, right = figure.subplots(1, 2)
    picture = left.imshow(confusion, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=left, label="% of the class's images", shrink=0.8)
    left.set(xlabel="predicted", ylabel="true class")
    if readable:
        left.set_xticks(range(count), written, rotation=90, fontsize=7, parse_math=False)
        left.set_yticks(range(count), written, fontsize=7, parse_math=False)
        if count <= 15:
            for i, j in np.ndindex(count, count):
                if confusion[i, j] >= 0.5:
                    shade = "black" if confusion[i, j] > 60 else "white"
                    left.text(
                        j,
                        i,
                        f"{confusion[i, j]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color=shade,
                    )
    present = np.flatnonzero(images)
    ordered = present[np.argsort(accuracy[present], kind="stable")]
    right.barh(
        range(len(ordered)),
        accuracy[ordered],
        height=0.8 if len(ordered) <= NAMED_CLASSES else 1.0,
        color="#0072B2",
    )
    right.axvline(
        accuracy[present].mean(), color="#D55E00", label=f"mean {accuracy[present].mean():.1f} %"
    )
    right.set(xlim=(0, 100), xlabel="accuracy of the class, %", ylim=(-0.6, len(ordered) - 0.4))
    if len(ordered) <= NAMED_CLASSES:
        shown, places = list(range(len(ordered))), [float(i) for i in range(len(ordered))]
    else:  # names at both ends, spread so that they do not overlap
        last, step = len(ordered) - 1, len(ordered) / 60
        shown = [*range(5), *range(last - 4, last + 1)]
        places = [i * step if i < 5 else last - (last - i) * step for i in shown]
    right.set_yticks(places, [written[ordered[i]] for i in shown], fontsize=7, parse_math=False)
    right.legend(loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(printable(title), parse_math=False, fontsize=10)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
