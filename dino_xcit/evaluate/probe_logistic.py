"""Protocol `logistic`: multinomial logistic regression by L-BFGS, with the best of several C.

The objective is scikit-learn's: C * sum of cross-entropies + |W|^2 / 2 (DINOv2's
`eval/log_regression.py`). It is minimised in coordinates in which its curvature is about the same
in every direction. Axes: n images, D channels of the chosen features, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.evaluate.probe import (
    BLOCK,
    FeatureChoice,
    Head,
    ProbeTask,
    cached,
    held_out_accuracy,
    hold_out,
)
from dino_xcit.runtime import FromFirstProcess, float64_device, progress, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

C_VALUES = tuple(float(c) for c in np.logspace(-6, 5, 45))
LBFGS_STEPS = 1000
LBFGS_TOLERANCE = 1e-5  # of the largest gradient of the mean loss; scikit-learn stops at 1e-4
IN_MEMORY = 4 * 2**30  # bytes of float64 features that are kept during a fit


class LinearModel(NamedTuple):
    """Weights and biases, float64."""

    weight: Tensor
    """(K, D)"""
    bias: Tensor
    """(K,)"""


class PrincipalAxes(NamedTuple):
    """Mean and principal axes of features, float64."""

    mean: Tensor
    """(D,)"""
    variance: Tensor
    """along each axis (D,)"""
    axes: Tensor
    """as columns (D, D)"""


class FitData(NamedTuple):
    """The data of one or more fits."""

    task: ProbeTask
    rows: np.ndarray
    """training images to use"""
    choice: FeatureChoice

    @property
    def device(self) -> torch.device:
        """Where to compute; has float64."""
        return float64_device(self.task.fabric)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate features, float64 (B, D), and labels (B,), in order."""
        features, labels = self.task.features.split("train")
        for rows in torch.split(torch.from_numpy(self.rows), BLOCK):
            chosen = self.choice.select(features[rows].to(self.device))
            yield chosen.double(), labels[rows].to(self.device)

    def principal_axes(self) -> PrincipalAxes:
        """Return mean and principal axes of the features."""
        n = len(self.rows)
        mean = torch.stack([x.sum(0) for x, _ in self.blocks()]).sum(0) / n
        covariance = sum((x - mean).T @ (x - mean) for x, _ in self.blocks()) / n
        variance, axes = torch.linalg.eigh(covariance)
        return PrincipalAxes(mean, variance.clamp(min=0), axes)


# -- the protocol ------------------------------------------------------------------------------


def logistic_protocol(task: ProbeTask) -> Head:
    """Return the fit with the best C on held-out images, on all of the task's images.

    The first process fits, for hours if there are many images; the others wait.
    """
    from_first = FromFirstProcess()
    choice = FeatureChoice.of_options(task.config)
    fitted: Any = None
    if task.fabric.is_global_zero:
        chosen = _choose_c(task, choice)
        data = FitData(task, task.rows, choice)
        fitted = fit(data, chosen["C"], data.principal_axes()), chosen
    model, chosen = from_first(fitted)
    return Head(model.weight.float(), model.bias.float(), choice, {**chosen, **choice.options()})


def _choose_c(task: ProbeTask, choice: FeatureChoice) -> dict[str, Any]:
    """The best C on held-out images, its accuracy there, and how many were tried."""
    values = sorted(task.config.c or C_VALUES)
    if len(values) == 1:
        return {"C": values[0]}
    split = task.features.split("train")
    train, held_out = hold_out(task)
    data = FitData(task, train, choice)
    device = data.device
    axes = data.principal_axes()
    model, best, best_accuracy = None, values[0], -1.0
    with progress(len(values), f"{task.features.name}: C", "fits", shown=True) as bar:
        for c in values:
            model = fit(data, c, axes, start=model)  # the last C's minimum is near
            weight, bias = (tensor[None].to(device) for tensor in model)
            accuracy = held_out_accuracy(weight, bias, choice, split, held_out, device).item()
            if accuracy > best_accuracy:
                best, best_accuracy = c, accuracy
            bar.update()
    if best in (values[0], values[-1]):
        say(f"the best C is at an end of those tried, {best:g}; try others with --c")
    return {"C": best, "held_out_top1": round(100 * best_accuracy, 3), "tried": len(values)}


# -- one fit -----------------------------------------------------------------------------------


def fit(
    data: FitData, c: float, axes: PrincipalAxes, start: LinearModel | None = None
) -> LinearModel:
    """Minimise C * sum of cross-entropies + |W|^2 / 2; return the minimum, on the CPU.

    Args:
        data: To fit.
        c: Inverse strength of the penalty.
        axes: Of the data.
        start: Where the minimisation starts; default: zeros.
    """
    path = data.task.file("logistic", len(data.rows), data.choice, c)
    found = cached(path, lambda: minimise(data, c, axes, start)._asdict())
    return LinearModel(found["weight"], found["bias"])


def minimise(
    data: FitData, c: float, axes: PrincipalAxes, start: LinearModel | None = None
) -> LinearModel:
    """`fit` without the cache.

    L-BFGS over V with W = V A. A scales each principal axis such that the objective's curvature is
    about the same in every direction. The bias is that of features without their mean.
    """
    n, dim, classes = len(data.rows), len(axes.mean), data.task.classes
    # Features are read again in every step only if they do not fit into memory.
    blocks = list(data.blocks()) if 8 * n * dim <= IN_MEMORY else None
    penalty = 1 / (c * n)
    scale = (axes.variance / classes + penalty).rsqrt()
    A, inverse = (axes.axes * scale) @ axes.axes.T, (axes.axes / scale) @ axes.axes.T
    start = start or LinearModel(torch.zeros(classes, dim), torch.zeros(classes))
    W, b = (tensor.to(data.device, torch.float64) for tensor in start)
    V = (W @ inverse).requires_grad_()
    bias = (b + W @ axes.mean).requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [V, bias],
        max_iter=LBFGS_STEPS,
        max_eval=2 * LBFGS_STEPS,
        tolerance_grad=LBFGS_TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        return _mean_objective(V, bias, A, axes.mean, penalty, n, blocks or data.blocks())

    optimizer.step(closure)
    W = (V @ A).detach()
    return LinearModel(W.cpu(), (bias.detach() - W @ axes.mean).cpu())


def _mean_objective(
    V: Tensor,
    bias: Tensor,
    A: Tensor,
    mean: Tensor,
    penalty: float,
    n: int,
    blocks: Iterable[tuple[Tensor, Tensor]],
) -> float:
    """The objective / (C n); adds its gradients to those of V and bias."""
    W = V @ A
    weight = W.detach().requires_grad_()  # collects the gradient of all blocks before A
    total = weight.square().sum() * penalty / 2
    torch.autograd.backward(total)
    total = total.detach()
    for x, y in blocks:
        logits = F.linear(x, weight, bias - weight @ mean)
        loss = F.cross_entropy(logits, y, reduction="sum") / n
        torch.autograd.backward(loss)
        total += loss.detach()
    torch.autograd.backward(W, weight.grad)
    return float(total)
