"""Linear classification of frozen features: official DINO's protocol, DINOv2's many heads, logistic regression.

    heads     A head for each learning rate and choice of features, all at once on features extracted once (DINOv2's
              `eval/linear.py`; it runs the backbone on augmented crops instead). The best on held-out training images is
              trained again on all of them.
    dino      One head on class tokens of augmented crops (`eval_linear.py`). Reported is the last epoch; official DINO
              reports the best epoch on the validation images.
    logistic  L-BFGS for each C (DINOv2's `eval/log_regression.py`, scikit-learn's objective).

Validation images choose nothing. Axes: B images of a batch, P parts of a feature, D numbers of a chosen feature, H heads,
K classes.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.evaluate.inputs import subjects
from dino_xcit.evaluate.probe import Head, ProbeTask, load_head, save_head, stratified
from dino_xcit.evaluate.probe_dino import dino_protocol
from dino_xcit.evaluate.probe_heads import heads_protocol
from dino_xcit.evaluate.probe_logistic import logistic_protocol
from dino_xcit.evaluate.report import (
    TOP,
    cell,
    describe,
    draw_classes,
    hits,
    output_folder,
    scores,
    table,
)
from dino_xcit.files import write_json
from dino_xcit.runtime import launch, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import LinearConfig

EVALUATED = "linear_evaluate"  # the report's name with --evaluate
SCRATCH = ".linear"  # in the run folder, while a command runs


# -- the command -----------------------------------------------------------------------------------------------------


def linear_eval(config: LinearConfig) -> dict[str, Any]:
    """What `dino-xcit linear-eval` does -> the content of linear.json.

    Raises ValueError, naming the flag, for what the user can put right.
    """
    folder = output_folder(config)
    fabric = launch(config)
    start = time.perf_counter()
    with subjects(config, fabric) as (config, evaluated, names):
        folder.mkdir(parents=True, exist_ok=True)
        first = evaluated[0]
        kept: set[Path] = set()
        if config.evaluate is not None:
            stem, results = (
                EVALUATED,
                {first.name: [_evaluate(config, first, fabric, folder, names)]},
            )
        else:
            stem = "linear" if config.protocol == "heads" else f"linear_{config.protocol}"
            results = {
                s.name: _train_and_test(config, s, fabric, folder / stem, names, kept)
                for s in evaluated
            }
        report = {
            "protocol": results[first.name][0]["chosen"]["protocol"],
            "results": results[first.name],
            "baselines": {name: rows for name, rows in results.items() if name != first.name},
            "seconds": round(time.perf_counter() - start, 2),
            **describe(config, evaluated, resolve_precision(config)),
        }
        if fabric.is_global_zero:
            write_json(folder / f"{stem}.json", report)
        fabric.barrier()
        for path in kept:  # all is done; what other commands keep here stays
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty yet
            (folder / SCRATCH).rmdir()
    if fabric.is_global_zero:
        listed = [
            [
                name,
                f"{100 * row['train_fraction']:g} %",
                cell(row, "top1"),
                cell(row, "top5"),
                _chosen(row["chosen"]),
            ]
            for name, rows in results.items()
            for row in rows
        ]
        print(
            table(
                [
                    f"linear, {report['protocol']}",
                    "labels",
                    "top-1 % [95 %]",
                    "top-5 % [95 %]",
                    "chosen",
                ],
                listed,
            )
        )
        print(
            f"{folder}: {stem}.json, {stem}_classes.png{'' if config.evaluate else f', {stem}_head*.safetensors'}"
        )
    return report


def _evaluate(
    config: LinearConfig, subject: Any, fabric: Fabric, folder: Path, names: dict[int, str]
) -> dict[str, Any]:
    """The row of a head that an earlier run trained."""
    head, about = load_head(Path(str(config.evaluate)))
    found = head.choice.of(torch.zeros(1, *subject.shape)).shape[1]
    if found != head.weight.shape[1]:
        raise UserError(
            f"--evaluate {config.evaluate} takes {head.weight.shape[1]} numbers, these features have {found}"
        )
    for name in ("image_size", "resize_size"):
        if about[name] != getattr(config, name):
            raise UserError(
                f"--evaluate {config.evaluate} was trained at --{name} {about[name]}, not {getattr(config, name)}"
            )
    if about["classes"] != names:
        raise UserError(
            f"--evaluate {config.evaluate} knows the classes {_listed(about['classes'])}; the images have {_listed(names)}"
        )
    row, ranked = _result(config, subject, fabric, [head], head.chosen["train_fraction"])
    if fabric.is_global_zero:
        _draw(folder / f"{EVALUATED}_classes.png", subject, row, ranked, names)
    return row


def _listed(names: dict[int, str]) -> str:
    shown = [names[label] for label in sorted(names)[:3]]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"


def _train_and_test(
    config: LinearConfig,
    subject: Any,
    fabric: Fabric,
    stem: Path,
    names: dict[int, str],
    kept: set[Path],
) -> list[dict[str, Any]]:
    """A row for each train_fraction. The weights' own heads are written, and the classes of the largest one drawn."""
    rows = []
    for fraction in sorted(config.train_fraction):
        seeds = range(config.seed, config.seed + config.num_seeds)
        heads = [
            _train(config, subject, fabric, stem.parent / SCRATCH, fraction, seed, kept)
            for seed in seeds
        ]
        row, ranked = _result(config, subject, fabric, heads, fraction)
        rows.append(row)
        if subject.name in (config.weights, config.load_features) and fabric.is_global_zero:
            suffix = "" if fraction == 1 else f"_{fraction:g}"
            save_head(
                heads[0], config, names, stem.with_name(f"{stem.name}_head{suffix}.safetensors")
            )
            _draw(stem.with_name(f"{stem.name}_classes.png"), subject, row, ranked, names)
    return rows


def _draw(
    path: Path, subject: Any, row: dict[str, Any], ranked: Tensor, names: dict[int, str]
) -> None:
    title = f"{subject.name}: linear ({row['chosen']['protocol']}), top-1 {row['top1']:.1f} %"
    draw_classes(path, title, ranked[:, 0].numpy(), subject.labels("validation").numpy(), names)


def _chosen(chosen: dict[str, Any]) -> str:
    """`lr 0.01, 2 blocks, avgpool` for the terminal."""
    words = [f"{name} {chosen[name]:.3g}" for name in ("lr", "C") if name in chosen]
    words.append(f"{chosen['n_last_blocks']} block{'s' if chosen['n_last_blocks'] > 1 else ''}")
    return ", ".join(words + ["avgpool"] * chosen["avgpool_patchtokens"])


def _train(
    config: LinearConfig,
    subject: Any,
    fabric: Fabric,
    scratch: Path,
    fraction: float,
    seed: int,
    kept: set[Path],
) -> Head:
    if config.protocol != "dino":
        subject.split("train")  # features first: unreadable images drop out
    labels = subject.labels("train")
    rows = stratified(labels, fraction, (seed, 0)) if fraction < 1 else np.arange(len(labels))
    if fabric.is_global_zero:
        scratch.mkdir(parents=True, exist_ok=True)
    fabric.barrier()
    head = PROTOCOLS[config.protocol](
        ProbeTask(config, subject, fabric, rows, seed, int(labels.max()) + 1, scratch, kept)
    )
    return head._replace(
        chosen={"protocol": config.protocol, "train_fraction": fraction, **head.chosen}
    )


def _result(
    config: LinearConfig, subject: Any, fabric: Fabric, heads: list[Head], fraction: float
) -> tuple[dict[str, Any], Tensor]:
    """The row of linear.json, and the first head's ranked classes of the validation images."""
    validation = subject.split("validation")
    ranked = [head.rank(validation.features, fabric.device) for head in heads]
    tops = {"top1": 1, "top5": TOP} if len(heads[0].bias) >= TOP else {"top1": 1}
    hit = {
        name: np.mean([hits(r, validation.labels, top) for r in ranked], axis=0)
        for name, top in tops.items()
    }
    of_seeds = [100 * float(hits(r, validation.labels, 1).mean()) for r in ranked]
    row = {"train_fraction": fraction, "top1": None, "top5": None, **scores(hit, config.seed)}
    if len(heads) > 1:
        row |= {
            "top1_of_seeds": [round(value, 3) for value in of_seeds],
            "top1_std": round(float(np.std(of_seeds, ddof=1)), 3),
        }
    return {**row, "chosen": heads[0].chosen}, ranked[0]


PROTOCOLS: dict[str, Callable[[ProbeTask], Head]] = {
    "heads": heads_protocol,
    "dino": dino_protocol,
    "logistic": logistic_protocol,
}
