"""Protocol `heads`: a head for each learning rate and choice of features, trained together by SGD."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.evaluate.features import part_slice
from dino_xcit.evaluate.probe import (
    FeatureChoice,
    Head,
    ProbeTask,
    Saver,
    choice_options,
    held_out_accuracy,
    hold_out,
)
from dino_xcit.runtime import progress, say, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.evaluation import LinearConfig

HEADS_LR = (
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    0.1,
    0.2,
    0.5,
    1.0,
)  # DINOv2's, and three larger ones for narrow networks
HEADS_STEPS, HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS = 12_500, 1000, 100
MOMENTUM = 0.9
INITIAL_STD = 0.01


# -- heads: many at once on features ---------------------------------------------------------------------------------


def choices(config: LinearConfig, parts: int) -> list[FeatureChoice]:
    """Choices of features that the options leave open."""
    blocks = [config.n_last_blocks] if config.n_last_blocks else range(1, max(2, parts))
    pooled = (
        [config.avgpool_patchtokens]
        if config.avgpool_patchtokens is not None
        else [False, True][: min(2, parts)]
    )
    found = [FeatureChoice(n, avgpool) for n, avgpool in itertools.product(blocks, pooled)]
    for choice in found:
        part_slice(*choice, parts)  # raises for what the network does not have
    return found


def heads_protocol(work: ProbeTask) -> Head:
    """The best head on held-out images, trained again on all."""
    split, fabric = work.subject.split("train"), work.fabric
    of = choices(work.config, split.features.shape[1])
    rates = work.config.lr or HEADS_LR
    accuracy = torch.zeros(len(of), len(rates))
    if accuracy.numel() > 1:
        train, held = hold_out(work)
        for number in range(fabric.global_rank, len(of), fabric.world_size):
            weight, bias = train_heads(
                work, train, of[number], rates, f"heads of choice {number + 1}/{len(of)}"
            )
            accuracy[number] = held_out_accuracy(
                weight, bias, of[number], split, held, fabric.device
            )
        accuracy = summed(fabric, accuracy)
    best, rate = divmod(int(accuracy.argmax()), len(rates))
    if rate == len(rates) - 1 and len(rates) > 1:
        say(
            f"the best learning rate is the largest tried, {rates[rate]:g}; try larger ones with --lr"
        )
    trained: Any = None
    if fabric.is_global_zero:
        weight, bias = train_heads(work, work.rows, of[best], rates[rate : rate + 1], "chosen head")
        trained = weight[0].cpu(), bias[0].cpu()
    weight, bias = fabric.broadcast(trained)
    chosen = {"lr": rates[rate], **choice_options(of[best])}
    if accuracy.numel() > 1:
        chosen |= {
            "held_out_top1": round(100 * float(accuracy.max()), 3),
            "tried": accuracy.numel(),
        }
    return Head(weight, bias, of[best], chosen)


def train_heads(
    work: ProbeTask,
    rows: np.ndarray,
    choice: FeatureChoice,
    rates: Sequence[float],
    description: str,
) -> tuple[Tensor, Tensor]:
    """A head for each learning rate, trained together by SGD on these rows -> weights (H, K, D) and biases (H, K).

    One step serves all heads: without weight decay, SGD on a loss times a learning rate is SGD with that learning rate.
    """
    features, labels = work.subject.split("train")
    device, config = work.fabric.device, work.config
    batch = min(config.batch_size, len(rows))
    per_epoch = math.ceil(len(rows) / batch)
    steps = (
        config.epochs * per_epoch
        if config.epochs
        else min(HEADS_STEPS, max(HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS * per_epoch))
    )
    scale = torch.tensor(rates, device=device) * batch / 256
    weight, bias = initial_heads(
        len(rates), work.classes, choice.of(features[:1]).shape[1], work.seed, device
    )
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=MOMENTUM)
    saver = Saver(work.path("heads", len(rows), choice, rates))
    step = restore(saver, [weight, bias], optimizer)
    with progress(
        steps,
        f"{work.subject.name}: {description}",
        "steps",
        work.fabric.is_global_zero,
        initial=step,
    ) as bar:
        while step < steps:
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == bar.initial:
                order = np.random.default_rng((work.seed, 2, epoch)).permutation(rows)
            picked = torch.from_numpy(order[number * batch : (number + 1) * batch])
            x, y = choice.of(features[picked].to(device)).float(), labels[picked].to(device)
            logits = torch.einsum("bd,hkd->bkh", x, weight) + bias.T
            loss = (
                F.cross_entropy(logits, y[:, None].expand(-1, len(rates)), reduction="none").mean(0)
                @ scale
            )
            optimizer.param_groups[0]["lr"] = cosine(step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if saver.due():
                saver.save(training_state(step, [weight, bias], optimizer))
            bar.update()
    return weight.detach(), bias.detach()


def initial_heads(
    heads: int, classes: int, dim: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Official initialisation, the same for every head: weights (H, K, D) and biases (H, K)."""
    weight = INITIAL_STD * torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))
    weights = weight.expand(heads, -1, -1).contiguous().to(device).requires_grad_()
    return weights, torch.zeros(heads, classes, device=device, requires_grad=True)


def training_state(
    step: int, tensors: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    return {
        "step": step,
        "tensors": [t.detach().cpu() for t in tensors],
        "optimizer": optimizer.state_dict(),
    }


def restore(saver: Saver, tensors: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what the file holds, if there is one -> the steps done."""
    state = saver.load()
    if state is None:
        return 0
    with torch.no_grad():
        for tensor, saved in zip(tensors, state["tensors"], strict=True):
            tensor.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def cosine(done: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2
