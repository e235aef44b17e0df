"""Results of an evaluation as numbers and text: scores with intervals, report, table."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import lightning
import numpy as np
import timm
import torch
import torchvision

import dino_xcit
from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.files import plain
from dino_xcit.runtime import require_folder, resolve_precision
from dino_xcit.weights.load import run_folder_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from dino_xcit.evaluate.features import Features

RESAMPLES = 10_000  # of a 95 % interval
CLASS_RESAMPLES = 1000  # of measures that are means over classes, which take longer
TOP = 5  # classes ranked per image

Result: TypeAlias = dict[str, Any]
"""One row of results, as plain values: a number or word by its name."""
Report: TypeAlias = dict[str, Any]
"""Content of an evaluation's JSON file, as plain values."""


def output_folder(config: EvalConfig) -> Path:
    """Folder of the results: `--output_dir`, else the run folder of the weights, else runs/NAME.

    With `--load_features` the default is the folder of the features.

    Raises:
        UserError: Nothing can be written there.
    """
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


# -- scores ------------------------------------------------------------------------------------


def hits(ranked: Tensor, labels: Tensor, top: int) -> np.ndarray:
    """Ranked classes (m, ranks) -> bool (m,): whether the label is among the first `top`."""
    hit: np.ndarray = (ranked[:, :top] == labels[:, None]).any(1).numpy()
    return hit


def scores(measures: Mapping[str, np.ndarray], seed: int) -> Result:
    """Mean of each measure in percent, and its 95 % interval as `NAME_ci95`.

    Args:
        measures: Values in [0, 1] by the measure's name, one per image, (m,).
        seed: Of the resampling.
    """
    result: Result = {}
    for name, values in measures.items():
        result[name] = round(100 * float(np.mean(values)), 3)
        result[f"{name}_ci95"] = [round(100 * bound, 3) for bound in bootstrap(values, seed)]
    return result


def bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over resampled images; values (m,), one per image.

    The mean depends only on how often each distinct value is sampled, so these counts are sampled
    at once, from the multinomial distribution that resampling image by image gives.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    m = counts.sum()
    sampled = np.random.default_rng(seed).multinomial(m, counts / m, size=RESAMPLES)
    low, high = np.quantile(sampled @ distinct / m, [0.025, 0.975])
    return float(low), float(high)


def class_scores(predictions: Sequence[Tensor], labels: Tensor, seed: int) -> Result:
    """Balanced accuracy and macro F1 in percent, and their 95 % intervals over resampled images.

    Both are means over the classes that occur, so that rare classes weigh as much as frequent ones.

    Args:
        predictions: Predicted class of each image (m,), of each classifier; the results are means
            over the classifiers.
        labels: True class of each image (m,).
        seed: Of the resampling.
    """
    m, rng = len(labels), np.random.default_rng(seed)
    _, numbered = np.unique(torch.stack([labels, *predictions]).numpy(), return_inverse=True)
    true, *predicted = numbered.reshape(-1, m)

    def measured(times: np.ndarray) -> np.ndarray:
        measures = [_class_measures(true, of_one, times) for of_one in predicted]
        mean: np.ndarray = np.array(measures).mean(axis=0)
        return mean

    resampled = [
        measured(np.bincount(rng.integers(m, size=m), minlength=m)) for _ in range(CLASS_RESAMPLES)
    ]
    bounds = np.quantile(resampled, [0.025, 0.975], axis=0).T
    result: Result = {}
    values = measured(np.ones(m))
    for name, value, interval in zip(
        ("balanced_accuracy", "macro_f1"), values, bounds, strict=True
    ):
        result[name] = round(100 * float(value), 3)
        result[f"{name}_ci95"] = [round(100 * float(bound), 3) for bound in interval]
    return result


def _class_measures(true: np.ndarray, predicted: np.ndarray, times: np.ndarray) -> list[float]:
    """Balanced accuracy and macro F1 of images that count `times` times each, all (m,)."""
    classes = max(true.max(), predicted.max()) + 1
    images, predictions = (np.bincount(of, times, classes) for of in (true, predicted))
    right = np.bincount(true, times * (true == predicted), classes)
    with np.errstate(invalid="ignore"):  # 0 / 0 for classes that do not occur
        measures = right / images, 2 * right / (images + predictions)
    return [float(np.nanmean(measure)) for measure in measures]


# -- report ------------------------------------------------------------------------------------


def provenance(config: EvalConfig, evaluated: Sequence[Features]) -> Report:
    """The part of a report that all evaluations share: data, rate, options, versions, machine.

    Args:
        config: Resolved options.
        evaluated: Features of the weights, then of the baselines.
    """
    first = evaluated[0]
    labels = {name: first.labels(name) for name in ("train", "validation")}
    extracted = sum(features.extracted for features in evaluated)
    seconds = sum(features.seconds for features in evaluated)
    modules = (torch, torchvision, timm, lightning)
    cuda = torch.cuda.is_available()
    return {
        "weights": config.weights or first.name,
        "data": {
            **{name: len(of_split) for name, of_split in labels.items()},
            "classes": len(torch.unique(torch.cat(list(labels.values())))),
            "unreadable": first.unreadable,
        },
        "feature_extraction": {
            "images": extracted,
            "seconds": round(seconds, 2),
            "images_per_second": round(extracted / seconds, 1) if seconds else None,
        },
        "precision": resolve_precision(config),
        "options": plain(dataclasses.asdict(config)),
        "versions": {
            "dino_xcit": dino_xcit.__version__,
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
    }


# -- table -------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Text columns under a header: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            f"{text:{'>' if i else '<'}{width}}"
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def with_interval(result: Result, name: str) -> str:
    """`87.1 [86.4, 87.8]`, or a dash if the result has no such score."""
    if result.get(name) is None:
        return "-"
    low, high = result[f"{name}_ci95"]
    return f"{result[name]:.1f} [{low:.1f}, {high:.1f}]"
