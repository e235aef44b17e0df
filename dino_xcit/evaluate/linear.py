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

from dino_xcit.evaluate.class_figures import draw_classes
from dino_xcit.evaluate.frame import evaluate
from dino_xcit.evaluate.predict import predict_classes
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
from dino_xcit.evaluate.saved_head import as_numbered, require_channels, with_sizes
from dino_xcit.run_folder import (
    LINEAR,
    LINEAR_EVALUATED,
    LINEAR_SCRATCH,
    classes_picture,
    head_file,
)

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
    if config.predict is not None:
        return predict_classes(config)
    scratch = Scratch(output_folder(config) / LINEAR_SCRATCH)
    if config.evaluate is not None:
        head, about = load_head(Path(config.evaluate))
        if config.load_features is None:
            config = with_sizes(config, about, f"--evaluate {config.evaluate}")
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
    flag = f"--evaluate {evaluation.config.evaluate}"
    head_names: dict[int, str] = about["classes"]
    require_channels(head.weight.shape[1], head.choice.dim(features), flag)
    split = features.split("validation")
    labels = as_numbered(head_names, evaluation.class_names, split.labels, flag)
    fraction = head.chosen["train_fraction"]
    result, ranked = _result(evaluation, features, [head], fraction, labels)
    if evaluation.writes(features):
        picture = classes_picture(LINEAR_EVALUATED)
        _draw(evaluation, features, picture, ranked, labels, result, head_names)
    return [result]


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
