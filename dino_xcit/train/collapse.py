"""Detects collapse and divergence of a run from its logged rows (DINO, section 5.3).

A warning needs `PATIENCE` consecutive rows with the same sign, because young runs look collapsed
for a while. `eval/collapse.md` shows real runs with each sign.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d

from dino_xcit.errors import ImageError, RunFailedError

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet

PATIENCE = 10  # rows
# Thresholds as shares of ln K, the largest entropy over K prototypes.
NEAR_UNIFORM = 0.99
NEAR_ZERO = 0.01
UNSTEADY = 0.1  # change of the loss from one row to the next


LOOKED_AT = 8  # images, to see whether all are alike
THUMBNAIL = 8  # pixels on a side
LEVELS_APART = 2.0  # of 255, in some pixel of their thumbnails
ALIKE = (
    "The images are all alike (see crops.png), so that there is nothing to learn from them: look "
    "at --data_path and at how its images are read"
)


class CollapseError(RunFailedError):
    """A run with `--on_collapse stop` has collapsed or diverges."""


class CollapseWarning(NamedTuple):
    """What a run shows and what to try."""

    name: str
    symptom: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.symptom}. {self.remedy}"


class CollapseWatch:
    """Reads the logged rows of a run in order and returns a warning when a sign persists."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.max_entropy = math.log(config.out_dim)
        self.uniform_rows = self.single_rows = 0  # consecutive rows with this sign, until now
        self.rows_since_divergence = PATIENCE  # since the last warning of divergence
        self.losses: deque[float] = deque(maxlen=PATIENCE + 1)

    @property
    def suspects(self) -> bool:
        """Whether the last row shows a sign or the loss jumped within the last `PATIENCE` rows."""
        jumped = max(self._loss_changes(), default=0) > UNSTEADY * self.max_entropy
        return bool(self.uniform_rows or self.single_rows) or jumped

    def __call__(self, row: dict[str, float]) -> CollapseWarning | None:
        """Read the next row.

        Args:
            row: a logged row with `epoch`, `loss`, `teacher_entropy` (nats) and `teacher_temp`.

        Returns:
            A warning once a sign has persisted for `PATIENCE` rows, again after each further
            `PATIENCE` rows, else None.
        """
        self.losses.append(row["loss"])
        self.rows_since_divergence += 1
        self._count_collapsed(row)
        change = self._median_loss_change()
        if change > UNSTEADY * self.max_entropy and self.rows_since_divergence >= PATIENCE:
            self.rows_since_divergence = 0
            return self._divergence(change)
        if self.uniform_rows and self.uniform_rows % PATIENCE == 0:
            return self._uniform(row)
        if self.single_rows and self.single_rows % PATIENCE == 0:
            return self._single(row)
        return None

    def _count_collapsed(self, row: dict[str, float]) -> None:
        """Count consecutive collapsed rows, but not while the last layer is frozen."""
        if row["epoch"] < self.config.freeze_last_layer:
            return
        entropy = row["teacher_entropy"]
        is_uniform = entropy > NEAR_UNIFORM * self.max_entropy
        is_single = entropy < NEAR_ZERO * self.max_entropy
        self.uniform_rows = self.uniform_rows + 1 if is_uniform else 0
        self.single_rows = self.single_rows + 1 if is_single else 0

    def _median_loss_change(self) -> float:
        """Median change of the loss over the last `PATIENCE` rows, robust to an outlier."""
        changes = self._loss_changes()
        return statistics.median(changes) if len(changes) == PATIENCE else 0.0

    def _loss_changes(self) -> list[float]:
        return [abs(after - before) for before, after in itertools.pairwise(self.losses)]

    def _uniform(self, row: dict[str, float]) -> CollapseWarning:
        student_temp, teacher_temp = self.config.student_temp, row["teacher_temp"]
        symptom = (
            f"the teacher's entropy has been at {row['teacher_entropy']:.3f} for "
            f"{self.uniform_rows} rows, and ln({self.config.out_dim}) = {self.max_entropy:.3f} "
            "means that every prototype is equally likely"
        )
        if teacher_temp >= student_temp:
            return CollapseWarning(
                "temperature too high",
                symptom,
                f"--teacher_temp {teacher_temp:g} does not sharpen against --student_temp "
                f"{student_temp:g}; try 0.04",
            )
        return CollapseWarning(
            "collapse to uniform, or nothing learned yet",
            symptom,
            "Try a lower --teacher_temp and --warmup_teacher_temp, a higher --lr, or "
            "--freeze_last_layer 2",
        )

    def _single(self, row: dict[str, float]) -> CollapseWarning:
        momentum = " (0.9)" if self.config.center_momentum > 0.9 else ""
        return CollapseWarning(
            "collapse to one prototype",
            f"the teacher's entropy has been at {row['teacher_entropy']:.3g} for "
            f"{self.single_rows} rows: the teacher assigns every image to the same few prototypes",
            f"Try a lower --center_momentum{momentum}, a higher --warmup_teacher_temp, a higher "
            f"--momentum_teacher, {stabler(self.config)}",
        )

    def _divergence(self, change: float) -> CollapseWarning:
        return CollapseWarning(
            "divergence",
            f"the loss changes by {change:.2f} nats from row to row (median of {PATIENCE} rows; "
            f"ln({self.config.out_dim}) = {self.max_entropy:.2f}): student and teacher chase each "
            "other without converging",
            f"Try {stabler(self.config)}",
        )


def all_alike(images: ImageSet) -> bool:
    """Whether images from all over the set have the same thumbnail."""
    thumbnails = []
    for index in range(0, len(images), max(1, len(images) // LOOKED_AT)):
        with contextlib.suppress(ImageError, OSError):
            thumbnails.append(adaptive_avg_pool2d(images.read(index).float(), THUMBNAIL))
    if len(thumbnails) < 2:
        return False
    stacked = torch.stack(thumbnails)  # (images, C, THUMBNAIL, THUMBNAIL)
    return bool((stacked.amax(0) - stacked.amin(0)).max() < LEVELS_APART)


def stabler(config: RunConfig) -> str:
    """Return what makes training stabler and is not in force yet."""
    ways = ["a lower --lr (a tenth)", "a longer --warmup_epochs"]
    if not 0 < config.clip_grad <= 0.3:
        ways.append("--clip_grad 0.3")
    if not config.norm_last_layer:
        ways.append("--norm_last_layer true")
    return ", ".join(ways)


def does_not_sharpen(config: RunConfig) -> bool:
    """Whether the teacher's softmax is as flat as the student's or flatter.

    Such a run collapses to the uniform distribution.
    """
    return max(config.teacher_temp, config.warmup_teacher_temp) >= config.student_temp
