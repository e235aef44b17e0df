"""Protocol `logistic`: multinomial logistic regression by L-BFGS, a fit for each C."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.evaluate.probe import (
    ROWS,
    FeatureChoice,
    Head,
    ProbeTask,
    choice_options,
    held_out_accuracy,
    hold_out,
    remembered,
)
from dino_xcit.runtime import float64_device, progress, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dino_xcit.evaluate.features import Split

C_VALUES = tuple(float(c) for c in np.logspace(-6, 5, 45))
LBFGS_STEPS = 1000
LBFGS_TOLERANCE = 1e-5  # of the largest gradient of the mean loss; scikit-learn stops at 1e-4
HELD_BYTES = 4 * 2**30


# -- logistic: L-BFGS ------------------------------------------------------------------------------------------------


def logistic_protocol(work: ProbeTask) -> Head:
    """The best C on held-out images, fitted again on all. One process fits, the others wait."""
    choice = FeatureChoice(work.config.n_last_blocks or 1, bool(work.config.avgpool_patchtokens))
    fitted: Any = _choose_c(work, choice) if work.fabric.is_global_zero else None
    weight, bias, chosen = work.fabric.broadcast(fitted)
    return Head(weight.float(), bias.float(), choice, {**chosen, **choice_options(choice)})


def _choose_c(work: ProbeTask, choice: FeatureChoice) -> tuple[Tensor, Tensor, dict[str, Any]]:
    values = sorted(work.config.c or C_VALUES)
    if len(values) == 1:
        return *fit(
            work, work.rows, choice, values[0], principal_axes(work, work.rows, choice), None
        ), {"C": values[0]}
    train, held = hold_out(work)
    axes = principal_axes(work, train, choice)
    start, best, accuracy = None, values[0], -1.0
    with progress(len(values), f"{work.subject.name}: C", "fits", shown=True) as bar:
        for c in values:  # each fit starts where the last ended
            start = fit(work, train, choice, c, axes, start)
            weight, bias = (tensor[None].to(work.fabric.device) for tensor in start)
            found = held_out_accuracy(
                weight, bias, choice, work.subject.split("train"), held, work.fabric.device
            ).item()
            if found > accuracy:
                best, accuracy = c, found
            bar.update()
    if best in (values[0], values[-1]):
        say(f"the best C is at an end of those tried, {best:g}; try others with --c")
    chosen = {"C": best, "held_out_top1": round(100 * accuracy, 3), "tried": len(values)}
    return *fit(
        work, work.rows, choice, best, principal_axes(work, work.rows, choice), None
    ), chosen


class Axes(NamedTuple):
    """Of chosen features, float64: mean (D,), variance along each principal axis (D,), and the axes as columns (D, D)."""

    mean: Tensor
    variance: Tensor
    axes: Tensor


def chosen_batches(
    split: Split, rows: np.ndarray, choice: FeatureChoice, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features in float64 (B, D) and labels (B,), in order."""
    for part in torch.from_numpy(rows).split(ROWS):
        yield choice.of(split.features[part].to(device)).double(), split.labels[part].to(device)


def principal_axes(work: ProbeTask, rows: np.ndarray, choice: FeatureChoice) -> Axes:
    data = work.subject.split("train"), rows, choice, float64_device(work.fabric)
    mean = torch.stack([x.sum(0) for x, _ in chosen_batches(*data)]).sum(0) / len(rows)
    covariance = sum((x - mean).T @ (x - mean) for x, _ in chosen_batches(*data)) / len(rows)
    variance, axes = torch.linalg.eigh(covariance)
    return Axes(mean, variance.clamp(min=0), axes)


def fit(
    work: ProbeTask,
    rows: np.ndarray,
    choice: FeatureChoice,
    c: float,
    axes: Axes,
    start: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Minimise C * sum of cross-entropies + |W|^2 / 2, scikit-learn's objective -> W (K, D), bias (K,), float64 on CPU."""
    found = remembered(
        work.path("logistic", len(rows), choice, c),
        lambda: _minimise(
            work.subject.split("train"),
            rows,
            choice,
            c,
            work.classes,
            float64_device(work.fabric),
            axes,
            start,
        ),
    )
    return found["weight"], found["bias"]


def _minimise(
    split: Split,
    rows: np.ndarray,
    choice: FeatureChoice,
    c: float,
    classes: int,
    device: torch.device,
    axes: Axes,
    start: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """L-BFGS in coordinates V with W = V A, in which the objective curves about alike in every direction."""

    n, dim = len(rows), len(axes.mean)
    batches = functools.partial(chosen_batches, split, rows, choice, device)
    # Read again in every step only if they do not fit.
    held = list(batches()) if 8 * n * dim <= HELD_BYTES else None
    penalty = 1 / (c * n)
    scale = (axes.variance / classes + penalty).rsqrt()
    A, inverse = (axes.axes * scale) @ axes.axes.T, (axes.axes / scale) @ axes.axes.T
    W, b = start or (torch.zeros(classes, dim), torch.zeros(classes))
    W, b = W.to(device, torch.float64), b.to(device, torch.float64)
    V = (W @ inverse).requires_grad_()
    bias = (b + W @ axes.mean).requires_grad_()  # for features without their mean
    optimizer = torch.optim.LBFGS(
        [V, bias],
        max_iter=LBFGS_STEPS,
        max_eval=2 * LBFGS_STEPS,
        tolerance_grad=LBFGS_TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        W = V @ A
        weight = W.detach().requires_grad_()
        total = weight.square().sum() * penalty / 2
        total.backward()
        for x, y in held or batches():
            loss = (
                F.cross_entropy(F.linear(x, weight, bias - weight @ axes.mean), y, reduction="sum")
                / n
            )
            loss.backward()
            total = total + loss.detach()
        W.backward(weight.grad)
        return total.detach()

    optimizer.step(objective)
    W = (V @ A).detach()
    return {"weight": W.cpu(), "bias": (bias.detach() - W @ axes.mean).cpu()}
