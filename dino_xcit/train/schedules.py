"""Schedules of learning rate, weight decay, momentum and temperature (DINO, section 3).

Pure functions of the step, counted from 0. As in official DINO, a cosine over n steps stops one
step before its final value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(
    step: int, start: float, peak: float, end: float, warmup_steps: int, steps: int
) -> float:
    """Linear from `start` to `peak`, reached at the last warmup step, then a cosine to `end`."""
    if step >= warmup_steps:
        return cosine(step - warmup_steps, peak, end, steps - warmup_steps)
    return start + (peak - start) * step / (warmup_steps - 1) if warmup_steps > 1 else start


def warmup_by_epoch(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """Linear from `start` to `end`, reached at the last warmup epoch; constant within an epoch."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Values of all schedules at a step of a run."""

    config: RunConfig
    steps_per_epoch: int
    """optimizer steps"""
    total_batch: int
    """images per optimizer step, over all processes and accumulated passes"""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """Epoch of a step, counted from 0."""
        return step // self.steps_per_epoch

    def lr(self, step: int) -> float:
        """Learning rate; the peak is `--lr` for 256 images per step, scaled linearly."""
        c = self.config
        warmup_steps = int(c.warmup_epochs * self.steps_per_epoch)
        return warmup_cosine(
            step, c.warmup_lr, c.lr * self.total_batch / 256, c.min_lr, warmup_steps, self.steps
        )

    def weight_decay(self, step: int) -> float:
        """Weight decay of the regularised parameters."""
        return cosine(step, self.config.weight_decay, self.config.weight_decay_end, self.steps)

    def momentum(self, step: int) -> float:
        """Momentum of the teacher's moving average."""
        return cosine(step, self.config.momentum_teacher, 1.0, self.steps)

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher's softmax."""
        c = self.config
        return warmup_by_epoch(
            self.epoch(step), c.warmup_teacher_temp, c.teacher_temp, c.warmup_teacher_temp_epochs
        )

    def last_layer_is_frozen(self, step: int) -> bool:
        """Whether the head's last layer keeps its weights in this step."""
        return step < self.config.freeze_last_layer * self.steps_per_epoch
