"""DINO's loss a few prototypes at a time, so that the logits are never all in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBERS_AT_ONCE, NUMBERS_IN_CACHE = 2**26, 2**20  # on a GPU, on a CPU: 256 MiB and 4 MiB in float32


class Embeddings(NamedTuple):
    """What a network says of the views, one product before its logits, and the last layer that makes them."""

    of_views: Tensor
    """(B, V, D), of length 1"""
    weight_v: Tensor
    """(K, D): directions of the prototypes"""
    weight_g: Tensor
    """(K, 1): their lengths"""

    def logits(self) -> Tensor:
        """(B, V, K)"""
        return F.linear(self.of_views, torch._weight_norm(self.weight_v, self.weight_g, 0))


class _Side(NamedTuple):
    """Student or teacher: what makes its logits, a few prototypes at a time."""

    of_views: Tensor
    """(B, V, D), in the numbers that are multiplied"""
    weight_v: Tensor
    """(K, D)"""
    weight_g: Tensor
    """(K, 1)"""
    norm: Tensor
    """(K, 1), of weight_v"""

    def prototypes(self, some: slice) -> Tensor:
        """(k, D), as the views are."""
        return (self.weight_v[some] * (self.weight_g[some] / self.norm[some])).to(
            self.of_views.dtype
        )


@dataclass(frozen=True)
class _Logits:
    """Of student and teacher, made for a few prototypes at a time."""

    student: _Side
    teacher: _Side
    center: Tensor
    student_temp: float
    teacher_temp: float

    def parts(self) -> Iterator[slice]:
        """Of the prototypes."""
        limit = NUMBERS_IN_CACHE if self.center.device.type == "cpu" else NUMBERS_AT_ONCE
        views = self.student.of_views
        some = max(1, limit // max(views[..., 0].numel(), views.shape[-1]))
        return (slice(start, start + some) for start in range(0, len(self.center), some))

    def of_student(self, prototypes: Tensor) -> Tensor:
        """(B, V, k), divided by the temperature."""
        return F.linear(self.student.of_views, prototypes).float().div_(self.student_temp)

    def of_teacher(self, some: slice) -> Tensor:
        """(B, G, k), as they are."""
        return F.linear(self.teacher.of_views, self.teacher.prototypes(some))

    def sharpened(self, of_teacher: Tensor, some: slice) -> Tensor:
        """(B, G, k), less the center, divided by the temperature; overwrites float32."""
        return of_teacher.float().sub_(self.center[some]).div_(self.teacher_temp)

    def log_q(self, some: slice, normaliser: Tensor) -> Tensor:
        return self.sharpened(self.of_teacher(some), some).sub_(normaliser[..., None])

    def teachers_of_view(self) -> Tensor:
        """How many each view has: all but itself. (V,)"""
        teachers = self.teacher.of_views.shape[1]
        count = self.center.new_full(self.student.of_views.shape[1:2], teachers)
        count[:teachers] -= 1
        return count

    def pairs(self) -> int:
        """Of all images."""
        images, views = self.student.of_views.shape[:2]
        return images * self.teacher.of_views.shape[1] * (views - 1)


class _LossInParts(torch.autograd.Function):
    """Loss, mean entropy of the teacher and sum of its logits (K,), of logits that are made and forgotten part by part,
    as are the prototypes.

    Only the normalisers of the softmaxes are kept. The backward pass makes the logits again: with n_v teachers of view v,
    the gradient of its logit k is n_v p_v(k) less the sum over g != v of q_g(k), divided by the temperature and the pairs.
    """

    @staticmethod
    def forward(ctx: Any, *of_logits: Any) -> tuple[Tensor, Tensor, Tensor]:
        """of_logits: `Embeddings` of student and teacher, center, their temperatures."""
        *tensors, student_temp, teacher_temp = of_logits
        student, teacher = (_side(*tensors[start : start + 3]) for start in (0, 3))
        logits = _Logits(student, teacher, tensors[6], student_temp, teacher_temp)
        output_sum = torch.empty_like(logits.center)
        of_teacher, of_student = (
            side.of_views.new_full(side.of_views.shape[:2], -torch.inf, dtype=torch.float32)
            for side in (teacher, student)
        )
        for some in logits.parts():
            raw = logits.of_teacher(some)
            output_sum[some] = raw.sum((0, 1), dtype=torch.float32)
            of_teacher = of_teacher.logaddexp(logits.sharpened(raw, some).logsumexp(-1))

        agreement = entropy = torch.zeros((), device=of_teacher.device)
        for some in logits.parts():
            s, log_q = logits.of_student(student.prototypes(some)), logits.log_q(some, of_teacher)
            q = log_q.exp()
            of_student = of_student.logaddexp(s.logsumexp(-1))
            agreement = agreement + (q.sum(1) * s.sum(1)).sum() - (q * s[:, : q.shape[1]]).sum()
            entropy = entropy - (q * log_q).sum() / of_teacher.numel()

        ctx.save_for_backward(*student, *teacher, logits.center, of_student, of_teacher)
        ctx.temperatures, ctx.dtype = (student_temp, teacher_temp), tensors[0].dtype
        loss = ((logits.teachers_of_view() * of_student).sum() - agreement) / logits.pairs()
        ctx.mark_non_differentiable(entropy, output_sum)
        return loss, entropy, output_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *sides, center, of_student, of_teacher = ctx.saved_tensors
        student, teacher = _Side(*sides[:4]), _Side(*sides[4:])
        logits = _Logits(student, teacher, center, *ctx.temperatures)
        factor = gradient / logits.pairs()
        # Number of teachers and temperature are factors of exponentials, so differences of exponents: no pass of their own.
        less = (of_student - (logits.teachers_of_view() / logits.student_temp).log())[..., None]
        of_teacher = of_teacher + math.log(logits.student_temp)
        to_views = torch.zeros_like(student.of_views, dtype=torch.float32)
        to_v, to_g = torch.empty_like(student.weight_v), torch.empty_like(student.weight_g)
        for some in logits.parts():
            prototypes = student.prototypes(some)
            to_logits, targets = (
                logits.of_student(prototypes).sub_(less).exp_(),
                logits.log_q(some, of_teacher).exp_(),
            )
            to_logits.sub_(targets.sum(1, keepdim=True))[:, : targets.shape[1]] += targets
            narrow = to_logits.flatten(0, 1).to(prototypes.dtype)
            to_views.flatten(0, 1).add_(narrow @ prototypes)
            to_prototypes = (narrow.mT @ student.of_views.flatten(0, 1)).to(to_v.dtype).mul_(factor)
            # A prototype is v g / |v|: what is along v goes to its length, the rest to its direction.
            v, norm = student.weight_v[some], student.norm[some]
            to_g[some] = torch.linalg.vecdot(to_prototypes, v).unsqueeze(1) / norm
            scale = student.weight_g[some] / norm
            torch.mul(to_prototypes, scale, out=to_v[some]).addcmul_(
                v, scale * to_g[some] / norm, value=-1
            )
        return (to_views * factor).to(ctx.dtype), to_v, to_g, *[None] * 6


def _side(of_views: Tensor, weight_v: Tensor, weight_g: Tensor) -> _Side:
    return _Side(
        as_autocast(of_views),
        weight_v,
        weight_g,
        torch.linalg.vector_norm(weight_v, dim=1, keepdim=True),
    )


def as_autocast(tensor: Tensor) -> Tensor:
    """In the numbers that autocast would multiply in."""
    device = tensor.device.type
    return (
        tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
    )
