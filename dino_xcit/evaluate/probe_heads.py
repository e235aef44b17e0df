"""Protocol `heads`: a head for each learning rate and choice of features, trained by SGD.

All learning rates are trained together. The best head on held-out images is trained again on all
training images (DINOv2's `eval/linear.py`, on features that are extracted once).
Axes: B images of a batch, P parts and D channels of a feature, H heads, K classes.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.evaluate.features import choose_parts
from dino_xcit.evaluate.probe import (
    FeatureChoice,
    Head,
    ProbeTask,
    held_out_accuracy,
    hold_out,
)
from dino_xcit.evaluate.probe_sgd import SavedSGD, cosine_decay, initial_heads
from dino_xcit.runtime import FromFirstProcess, progress, say, summed, upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.evaluation import LinearConfig

# DINOv2's, and three larger ones for networks with few channels.
HEADS_LR = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    *(0.2, 0.5, 1.0),
)
HEADS_STEPS, HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS = 12_500, 1000, 100


def choices(config: LinearConfig, parts: int) -> list[FeatureChoice]:
    """All choices of features that the options allow.

    Args:
        config: Options.
        parts: Number of parts P of a feature.

    Raises:
        UserError: The network does not have the parts that an option names.
    """
    blocks = [config.n_last_blocks] if config.n_last_blocks else range(1, max(2, parts))
    if config.avgpool_patchtokens is not None:
        avgpool = [config.avgpool_patchtokens]
    else:
        avgpool = [False, True] if parts > 1 else [False]
    allowed = [FeatureChoice(*pair) for pair in itertools.product(blocks, avgpool)]
    for choice in allowed:
        choose_parts(*choice, parts)
    return allowed


def heads_protocol(task: ProbeTask) -> Head:
    """Return the best head on held-out images, trained again on all of the task's images."""
    from_first = FromFirstProcess()
    tried = choices(task.config, task.features.split("train").features.shape[1])
    rates = task.config.lr or HEADS_LR
    accuracy = torch.zeros(len(tried), len(rates))
    if accuracy.numel() > 1:
        accuracy = _accuracies(task, tried, rates)
    best, best_rate = divmod(int(accuracy.argmax()), len(rates))
    choice, rate = tried[best], rates[best_rate]
    if best_rate == len(rates) - 1 and len(rates) > 1:
        say(f"the best learning rate is the largest tried, {rate:g}; try larger ones with --lr")
    trained: Any = None
    if task.fabric.is_global_zero:
        weight, bias = train_heads(task, task.rows, choice, [rate], "chosen head")
        trained = weight[0].cpu(), bias[0].cpu()
    weight, bias = from_first(trained)
    chosen = {"lr": rate, **choice.options()}
    if accuracy.numel() > 1:
        percent = round(100 * float(accuracy.max()), 3)
        chosen |= {"held_out_top1": percent, "tried": accuracy.numel()}
    return Head(weight, bias, choice, chosen)


def _accuracies(task: ProbeTask, tried: Sequence[FeatureChoice], rates: Sequence[float]) -> Tensor:
    """Held-out accuracy of each choice and learning rate; the processes share the choices."""
    split, fabric = task.features.split("train"), task.fabric
    train, held_out = hold_out(task)
    accuracy = torch.zeros(len(tried), len(rates))
    for number in range(fabric.global_rank, len(tried), fabric.world_size):
        choice, label = tried[number], f"heads of choice {number + 1}/{len(tried)}"
        weight, bias = train_heads(task, train, choice, rates, label)
        accuracy[number] = held_out_accuracy(weight, bias, choice, split, held_out, fabric.device)
    return summed(fabric, accuracy)


def train_heads(
    task: ProbeTask,
    rows: np.ndarray,
    choice: FeatureChoice,
    rates: Sequence[float],
    label: str,
) -> tuple[Tensor, Tensor]:
    """Train a head for each learning rate on these rows: weights (H, K, D) and biases (H, K).

    One step serves all heads: without weight decay, SGD on a loss times a learning rate equals SGD
    with that learning rate. The rates are those for 256 images per step; `label` is that of the
    progress bar.
    """
    features, labels = task.features.split("train")
    device = task.fabric.device
    batch = min(task.config.batch_size, len(rows))
    per_epoch = math.ceil(len(rows) / batch)
    steps = _steps(task.config, per_epoch)
    scale = torch.tensor(rates, device=device) * batch / 256
    dim = choice.dim(task.features)
    weight, bias = initial_heads(len(rates), task.classes, dim, task.seed, device)
    sgd = SavedSGD([weight, bias], task.file("heads", len(rows), choice, tuple(rates)))
    title, shown = f"{task.features.name}: {label}", task.fabric.is_global_zero
    with progress(steps, title, "steps", shown, initial=sgd.step) as bar:
        order_epoch, order = -1, rows
        while sgd.step < steps:
            epoch, number = divmod(sgd.step, per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng((task.seed, 2, epoch)).permutation(rows)
                order_epoch = epoch
            index = torch.from_numpy(order[number * batch : (number + 1) * batch])
            x, y = choice.select(upload(features[index], device)), upload(labels[index], device)
            loss = _losses(x.float(), y, weight, bias) @ scale
            sgd.optimizer.zero_grad()
            torch.autograd.backward(loss)
            sgd.update(cosine_decay(sgd.step / steps))
            sgd.save_if_due()
            bar.update()
    return weight.detach(), bias.detach()


def _steps(config: LinearConfig, per_epoch: int) -> int:
    if config.epochs:
        return config.epochs * per_epoch
    return min(HEADS_STEPS, max(HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS * per_epoch))


def _losses(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean cross-entropy of each head, (H,); x (B, D), y (B,)."""
    logits = torch.einsum("bd,hkd->bkh", x, weight) + bias.T
    target = y[:, None].expand(-1, len(weight))  # (B, H)
    return F.cross_entropy(logits, target, reduction="none").mean(0)
