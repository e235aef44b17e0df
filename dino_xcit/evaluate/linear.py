"""Linear classification of frozen features, with one of three protocols.

    heads     A head for each learning rate and choice of features, all trained at once on features
              that are extracted once (DINOv2's `eval/linear.py`; it runs the backbone on augmented
              crops instead). The best on held-out training images is trained again on all.
    dino      One head on class tokens of augmented crops (official DINO's `eval_linear.py`).
    logistic  L-BFGS for each C (DINOv2's `eval/log_regression.py`, scikit-learn's objective).

Hyperparameters are selected on a held-out tenth of the training images, nothing on validation
images.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dino_xcit.errors import UserError
from dino_xcit.evaluate.class_figures import draw_classes
from dino_xcit.evaluate.frame import evaluate
from dino_xcit.evaluate.probe import Head, ProbeTask, Scratch, load_head, save_head, stratified
from dino_xcit.evaluate.probe_dino import dino_protocol
from dino_xcit.evaluate.probe_heads import heads_protocol
from dino_xcit.evaluate.probe_logistic import logistic_protocol
from dino_xcit.evaluate.report import (
    TOP,
    class_scores,
    hits,
    output_folder,
    scores,
    with_interval,
)
from dino_xcit.run_folder import (
    LINEAR,
    LINEAR_EVALUATED,
    LINEAR_SCRATCH,
    classes_picture,
    head_file,
)
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from dino_xcit.config.evaluation import LinearConfig
    from dino_xcit.evaluate.features import Features
    from dino_xcit.evaluate.frame import Evaluation
    from dino_xcit.evaluate.report import Report, Result

COLUMNS: Mapping[str, Callable[[Result], str]] = {
    "labels": lambda row: f"{100 * row['train_fraction']:g} %",
    "top-1 % [95 %]": lambda row: with_interval(row, "top1"),
    "top-5 % [95 %]": lambda row: with_interval(row, "top5"),
    "balanced % [95 %]": lambda row: with_interval(row, "balanced_accuracy"),
    "macro F1 % [95 %]": lambda row: with_interval(row, "macro_f1"),
    "chosen": lambda row: _chosen_text(row["chosen"]),
}
PROTOCOLS: Mapping[str, Callable[[ProbeTask], Head]] = {
    "heads": heads_protocol,
    "dino": dino_protocol,
    "logistic": logistic_protocol,
}


def linear_eval(config: LinearConfig) -> Report:
    """Run `dino-xcit linear-eval`; return the content of linear.json.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    scratch = Scratch(output_folder(config) / LINEAR_SCRATCH)
    if config.evaluate is not None:
        head, about = load_head(Path(config.evaluate))
        score = functools.partial(_score_saved, head=head, about=about)
        name, protocol = LINEAR_EVALUATED, head.chosen["protocol"]
    else:
        protocol = config.protocol
        name = LINEAR[protocol]
        score = functools.partial(_score_trained, name=name, scratch=scratch)
    title = f"linear, {protocol}"
    report = evaluate(config, score, name=name, protocol=protocol, title=title, columns=COLUMNS)
    scratch.remove()
    return report


# -- heads of this command ---------------------------------------------------------------------


def _score_trained(
    evaluation: Evaluation[LinearConfig], features: Features, *, name: str, scratch: Scratch
) -> list[Result]:
    """Train heads for each train_fraction and seed; one row of results per train_fraction."""
    config, results = evaluation.config, []
    for fraction in sorted(config.train_fraction):
        seeds = range(config.seed, config.seed + config.num_seeds)
        heads = [_train(evaluation, features, scratch, fraction, seed) for seed in seeds]
        labels = features.split("validation").labels
        result, ranked = _result(evaluation, features, heads, fraction, labels)
        results.append(result)
        if evaluation.writes(features):
            suffix = "" if fraction == 1 else f"_{fraction:g}"
            path = evaluation.file(head_file(name, suffix))
            save_head(heads[0], config, evaluation.class_names, path)
    if evaluation.writes(features):  # the classes with the largest fraction
        names = evaluation.class_names
        _draw(evaluation, features, classes_picture(name), ranked, labels, result, names)
    return results


def _train(
    evaluation: Evaluation[LinearConfig],
    features: Features,
    scratch: Scratch,
    fraction: float,
    seed: int,
) -> Head:
    """Train a head on a share of the training images."""
    protocol = evaluation.config.protocol
    if protocol != "dino":
        features.split("train")  # afterwards, labels are those of readable images
    labels = features.labels("train")
    rows = stratified(labels, fraction, (seed, 0)) if fraction < 1 else np.arange(len(labels))
    classes = int(labels.max()) + 1
    config, fabric = evaluation.config, evaluation.fabric
    head = PROTOCOLS[protocol](ProbeTask(config, features, fabric, rows, seed, classes, scratch))
    return head._replace(chosen={"protocol": protocol, "train_fraction": fraction, **head.chosen})


# -- a saved head ------------------------------------------------------------------------------


def _score_saved(
    evaluation: Evaluation[LinearConfig], features: Features, *, head: Head, about: dict[str, Any]
) -> list[Result]:
    """Score the head of `--evaluate`.

    Raises:
        UserError: The head was trained on other features, sizes or classes.
    """
    config, flag = evaluation.config, f"--evaluate {evaluation.config.evaluate}"
    head_names: dict[int, str] = about["classes"]
    dim, expected = head.choice.dim(features), head.weight.shape[1]
    if dim != expected:
        raise UserError(f"{flag} takes features of {expected} channels, these have {dim}")
    for name in ("image_size", "resize_size"):
        if about[name] != getattr(config, name):
            raise UserError(
                f"{flag} was trained at --{name} {about[name]}, not {getattr(config, name)}"
            )
    split = features.split("validation")
    labels = as_numbered(head_names, evaluation.class_names, split.labels, flag)
    fraction = head.chosen["train_fraction"]
    result, ranked = _result(evaluation, features, [head], fraction, labels)
    if evaluation.writes(features):
        picture = classes_picture(LINEAR_EVALUATED)
        _draw(evaluation, features, picture, ranked, labels, result, head_names)
    return [result]


def as_numbered(
    head_names: Mapping[int, str], names: Mapping[int, str], labels: Tensor, flag: str
) -> Tensor:
    """Labels of images, numbered as a head's classes of the same names.

    Args:
        head_names: Names of the head's classes, by number.
        names: Names of the images' classes, by label; they may be some of the head's.
        labels: Of the images, (m,).
        flag: That named the head, for the error.

    Raises:
        UserError: The head lacks classes of the images, or only one of both has names.
    """
    numbers = {name: number for number, name in head_names.items()}
    if not set(names.values()) <= set(numbers) or bool(names) != bool(numbers):
        raise UserError(
            f"{flag} has the classes {_first_names(head_names)}; "
            f"the images have {_first_names(names)}"
        )
    if not names:
        return labels
    present = labels.unique().tolist()
    if len(present) < len(numbers):
        say(f"the images are of {len(present)} of the {len(numbers)} classes of {flag}")
    number_of = torch.zeros(max(names) + 1, dtype=torch.int64)
    for label, name in names.items():
        number_of[label] = numbers[name]
    return number_of[labels]


def _first_names(names: Mapping[int, str]) -> str:
    """`cat, cow, dog, ... (10)`."""
    shown = [names[label] for label in sorted(names)[:3]]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"


# -- results -----------------------------------------------------------------------------------


def _result(
    evaluation: Evaluation[LinearConfig],
    features: Features,
    heads: list[Head],
    fraction: float,
    labels: Tensor,
) -> tuple[Result, Tensor]:
    """A row of results, and the first head's ranked classes of the validation images.

    `labels` are those of the validation images, numbered as the heads' classes.
    """
    tested, seed = features.split("validation").features, evaluation.config.seed
    ranked = [head.rank(tested, evaluation.fabric.device) for head in heads]
    tops = {"top1": 1, "top5": TOP} if len(heads[0].bias) >= TOP else {"top1": 1}
    measures = {
        name: np.mean([hits(of_head, labels, top) for of_head in ranked], axis=0)
        for name, top in tops.items()
    }
    result: Result = {"train_fraction": fraction, "top1": None, "top5": None}
    result |= scores(measures, seed)
    result |= class_scores([of_head[:, 0] for of_head in ranked], labels, seed)
    if len(heads) > 1:
        of_seeds = [100 * float(hits(of_head, labels, 1).mean()) for of_head in ranked]
        result["top1_of_seeds"] = [round(value, 3) for value in of_seeds]
        result["top1_std"] = round(float(np.std(of_seeds, ddof=1)), 3)
    result["chosen"] = heads[0].chosen
    return result, ranked[0]


def _draw(
    evaluation: Evaluation[LinearConfig],
    features: Features,
    name: str,
    ranked: Tensor,
    labels: Tensor,
    result: Result,
    names: Mapping[int, str],
) -> None:
    protocol = result["chosen"]["protocol"]
    title = f"{features.name}: linear ({protocol}), top-1 {result['top1']:.1f} %"
    draw_classes(evaluation.file(name), title, ranked[:, 0].numpy(), labels.numpy(), names)


def _chosen_text(chosen: dict[str, Any]) -> str:
    """`lr 0.01, 2 blocks, avgpool`."""
    words = [f"{name} {chosen[name]:.3g}" for name in ("lr", "C") if name in chosen]
    words.append(f"{chosen['n_last_blocks']} block{'s' if chosen['n_last_blocks'] > 1 else ''}")
    return ", ".join(words + ["avgpool"] * chosen["avgpool_patchtokens"])
