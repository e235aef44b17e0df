"""What the two SGD protocols share: initial heads, momentum SGD with saved state, the schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_xcit.evaluate.probe import Saver

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MOMENTUM = 0.9
INITIAL_STD = 0.01


def initial_heads(
    heads: int, classes: int, dim: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Official DINO's initialisation, the same for all heads: weights (H, K, D), biases (H, K)."""
    weight = INITIAL_STD * torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))
    weights = weight.expand(heads, -1, -1).contiguous().to(device).requires_grad_()
    return weights, torch.zeros(heads, classes, device=device, requires_grad=True)


def cosine_decay(done: float) -> float:
    """Factor of the learning rate: from 1 to 0 as the share of training done goes from 0 to 1."""
    return (1 + math.cos(math.pi * done)) / 2


class SavedSGD:
    """SGD with momentum whose state is kept in a file; a restarted command continues from there.

    Args:
        parameters: Are trained. They are set to the saved values, if there are any.
        path: The file.
        counters: Tensors to save beside the parameters.
    """

    step: int
    """steps done"""

    def __init__(
        self, parameters: Sequence[Tensor], path: Path, counters: Sequence[Tensor] = ()
    ) -> None:
        self.optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM)
        self.tensors = [*parameters, *counters]
        self.saver = Saver(path)
        self.step = self._restore()

    def _restore(self) -> int:
        state = self.saver.load()
        if state is None:
            return 0
        with torch.no_grad():
            for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
                tensor.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def update(self, lr: float) -> None:
        """Do one step with the parameters' gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.step += 1

    def save_if_due(self) -> None:
        """Save the state, if enough time has passed since the last time."""
        if self.saver.due():
            self.saver.save(
                {
                    "step": self.step,
                    "tensors": [tensor.detach().cpu() for tensor in self.tensors],
                    "optimizer": self.optimizer.state_dict(),
                }
            )
