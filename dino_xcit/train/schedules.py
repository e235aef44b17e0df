"""Learning rate, weight decay, momentum and temperature: pure functions of the step (DINO, arXiv:2104.14294, section 3).

Steps count from 0. As in official DINO, a cosine over n steps stops one step short of its final value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import PretrainConfig


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 towards `end` at step `steps`, half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(
    step: int, start: float, peak: float, end: float, warmup_steps: int, steps: int
) -> float:
    """Linear from `start` to `peak`, which the last warmup step reaches, then a cosine towards `end`."""
    if step >= warmup_steps:
        return cosine(step - warmup_steps, peak, end, steps - warmup_steps)
    return start + (peak - start) * step / (warmup_steps - 1) if warmup_steps > 1 else start


def warmup_by_epoch(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """Constant within an epoch: linear from `start` to `end`, which the last warmup epoch reaches."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """What each step of a run trains with."""

    config: PretrainConfig
    steps_per_epoch: int
    """optimizer steps"""
    total_batch: int
    """images per optimizer step, over all processes and accumulated passes"""

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def lr(self, step: int) -> float:
        c = self.config
        warmup_steps = int(c.warmup_epochs * self.steps_per_epoch)
        return warmup_cosine(
            step, c.warmup_lr, c.lr * self.total_batch / 256, c.min_lr, warmup_steps, self.steps
        )

    def weight_decay(self, step: int) -> float:
        return cosine(step, self.config.weight_decay, self.config.weight_decay_end, self.steps)

    def momentum(self, step: int) -> float:
        return cosine(step, self.config.momentum_teacher, 1.0, self.steps)

    def teacher_temp(self, step: int) -> float:
        c = self.config
        return warmup_by_epoch(
            self.epoch(step), c.warmup_teacher_temp, c.teacher_temp, c.warmup_teacher_temp_epochs
        )

    def last_layer_is_frozen(self, step: int) -> bool:
        return self.epoch(step) < self.config.freeze_last_layer
