"""Says in plain words that a run has collapsed or diverges, from the rows that it logs (DINO, section 5.3).

Each sign has to stand for `PATIENCE` rows in a row: young runs look like collapsed ones for a while. Real runs with each of
them: `eval/collapse.md`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import PretrainConfig

PATIENCE = 10  # rows
NEAR_UNIFORM = 0.99  # of ln(prototypes)
NEAR_ZERO = 0.01  # of ln(prototypes)
UNSTEADY = 0.1  # of ln(prototypes), by which the loss changes from row to row


class CollapseError(ArithmeticError):
    """A run with --on_collapse stop collapsed."""


class CollapseWarning(NamedTuple):
    """What is seen, and what to try."""

    name: str
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. {self.remedy}"


class CollapseWatch:
    """Looks at each logged row."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.limit = math.log(config.out_dim)
        self.uniform = self.single = self.unsteady = 0
        self.since_told = PATIENCE  # rows since divergence was told
        self.losses: deque[float] = deque(maxlen=PATIENCE + 1)

    @property
    def suspects(self) -> bool:
        """Whether the last row showed a sign, or the loss has jumped in one of the last `PATIENCE`."""
        return (
            bool(self.uniform or self.single or self.unsteady)
            or max(self._changes(), default=0) > UNSTEADY * self.limit
        )

    def __call__(self, row: dict[str, float]) -> CollapseWarning | None:
        """A logged row -> what has stood for `PATIENCE` rows, or a multiple of that, or None."""
        self.losses.append(row["loss"])
        self.since_told += 1
        jump = self._jump()
        self.unsteady = self.unsteady + 1 if jump > UNSTEADY * self.limit else 0
        if row["epoch"] >= self.config.freeze_last_layer:
            self.uniform = (
                self.uniform + 1 if row["teacher_entropy"] > NEAR_UNIFORM * self.limit else 0
            )
            self.single = self.single + 1 if row["teacher_entropy"] < NEAR_ZERO * self.limit else 0
        if self.unsteady and self.since_told >= PATIENCE:  # the median is of as many rows already
            self.since_told = 0
            return self._unsteady(jump)
        if self.uniform and self.uniform % PATIENCE == 0:
            return self._uniform(row)
        if self.single and self.single % PATIENCE == 0:
            return self._single(row)
        return None

    def _jump(self) -> float:
        """By how much the loss changes from row to row: the median over the last rows, which one outlier does not move."""
        changes = self._changes()
        return statistics.median(changes) if len(changes) == PATIENCE else 0.0

    def _changes(self) -> list[float]:
        return [abs(after - before) for before, after in itertools.pairwise(self.losses)]

    def _uniform(self, row: dict[str, float]) -> CollapseWarning:
        temperature = row["teacher_temp"]
        hot = temperature >= self.config.student_temp
        return CollapseWarning(
            "temperature too high" if hot else "collapse to uniform, or nothing learned yet",
            f"the teacher's entropy has been at {row['teacher_entropy']:.3f} for {self.uniform} rows, and "
            f"ln({self.config.out_dim}) = {self.limit:.3f} is what a network has that finds every prototype equally likely",
            f"--teacher_temp {temperature:g} does not sharpen against --student_temp {self.config.student_temp:g}; try 0.04"
            if hot
            else "Try a lower --teacher_temp and --warmup_teacher_temp, a higher --lr, or --freeze_last_layer 2",
        )

    def _single(self, row: dict[str, float]) -> CollapseWarning:
        return CollapseWarning(
            "collapse to one prototype",
            f"the teacher's entropy has been at {row['teacher_entropy']:.3g} for {self.single} rows: every image goes to "
            "the same few prototypes",
            "Try a lower --center_momentum (0.9), a higher --warmup_teacher_temp, a higher --momentum_teacher, a lower --lr "
            "or --norm_last_layer true",
        )

    def _unsteady(self, jump: float) -> CollapseWarning:
        return CollapseWarning(
            "divergence",
            f"the loss changes by {jump:.2f} nats from row to row (median of {PATIENCE} rows) of the {self.limit:.2f} that "
            f"ln({self.config.out_dim}) has: student and teacher run after each other",
            "Try a lower --lr (a tenth), a longer --warmup_epochs, --clip_grad 0.3",
        )


def does_not_sharpen(config: PretrainConfig) -> bool:
    """Whether the teacher's softmax is as flat as the student's, or flatter: DINO then has one answer, the uniform one."""
    return max(config.teacher_temp, config.warmup_teacher_temp) >= config.student_temp
