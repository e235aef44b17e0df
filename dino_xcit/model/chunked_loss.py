"""DINO's loss from logits that exist for one chunk of the prototypes at a time.

With DINO's K = 65536 and 10 views, all logits take 2.6 MB per image in float32, and their softmaxes
and gradients as much again. So each chunk is computed when it is needed: the teacher's for the
normaliser of its softmax, both for the loss, and both again in the backward pass. Only the
normalisers are kept in between.

Axes: B images, V views per image (the G global ones first), D channels of an embedding,
K prototypes, k of them in a chunk.
"""

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

CHUNK_ON_GPU = 2**26
"""elements in a chunk of logits, 256 MiB in float32"""
CHUNK_ON_CPU = 2**20
"""the same on a CPU, 4 MiB in float32, which its cache holds"""


class Embeddings(NamedTuple):
    """Head outputs before the last layer, and that layer's weights."""

    of_views: Tensor
    """(B, V, D), unit vectors"""
    weight_v: Tensor
    """(K, D), directions of the prototypes, of any norm"""
    weight_g: Tensor
    """(K, 1), norms of the prototypes"""

    def logits(self) -> Tensor:
        """All logits at once, (B, V, K)."""
        return F.linear(self.of_views, weight_normed(self.weight_v, self.weight_g))


def weight_normed(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """Prototypes (K, D): the rows of `weight_v`, rescaled to the norms in `weight_g`."""
    norm: Tensor = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)
    return weight_v * (weight_g / norm)


def chunked_loss(
    student: Embeddings,
    teacher: Embeddings,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """DINO's loss of all pairs of a global view and another view; see `DINOLoss`.

    Args:
        student: embeddings of all views; they and the weights get gradients.
        teacher: embeddings of the global views; no gradients.
        center: what is subtracted from the teacher's logits, (K,).
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's softmax.

    Returns:
        The loss; the mean entropy of the teacher's output in nats; the sum of the teacher's logits
        over images and views, (K,). The last two have no gradient.
    """
    return _ChunkedLoss.apply(*student, *teacher, center, student_temp, teacher_temp)  # type: ignore[no-any-return, no-untyped-call]


class _Side(NamedTuple):
    """Student or teacher: embeddings in the matmul dtype, and the weights of the last layer."""

    of_views: Tensor
    """(B, V, D), in the matmul dtype"""
    weight_v: Tensor
    """(K, D)"""
    weight_g: Tensor
    """(K, 1)"""
    norm: Tensor
    """(K, 1), norms of the rows of `weight_v`"""

    @classmethod
    def of(cls, of_views: Tensor, weight_v: Tensor, weight_g: Tensor) -> _Side:
        norm = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)
        return cls(_as_autocast(of_views), weight_v, weight_g, norm)

    def prototypes(self, chunk: slice) -> Tensor:
        """(k, D), in the matmul dtype."""
        scale = self.weight_g[chunk] / self.norm[chunk]
        return (self.weight_v[chunk] * scale).to(self.of_views.dtype)

    def log_zero(self) -> Tensor:
        """Logarithm of zero for each view, to start a sum of exponentials: (B, V) of -inf."""
        shape = self.of_views.shape[:2]
        return self.of_views.new_full(shape, -torch.inf, dtype=torch.float32)


@dataclass(frozen=True)
class _Logits:
    """Student's and teacher's logits, computed chunk by chunk."""

    student: _Side
    teacher: _Side
    center: Tensor
    """(K,)"""
    student_temp: float
    teacher_temp: float

    def chunks(self) -> Iterator[slice]:
        """Slices of prototypes, each small enough for the cache."""
        limit = CHUNK_ON_CPU if self.center.device.type == "cpu" else CHUNK_ON_GPU
        views = self.student.of_views
        size = max(1, limit // max(views[..., 0].numel(), views.shape[-1]))
        return (slice(start, start + size) for start in range(0, len(self.center), size))

    def of_student(self, prototypes: Tensor) -> Tensor:
        """Student's logits divided by the temperature, (B, V, k) in float32."""
        return F.linear(self.student.of_views, prototypes).float().div_(self.student_temp)

    def of_teacher(self, chunk: slice) -> Tensor:
        """Teacher's logits as the head gives them, (B, G, k) in the matmul dtype."""
        return F.linear(self.teacher.of_views, self.teacher.prototypes(chunk))

    def sharpen(self, of_teacher: Tensor, chunk: slice) -> Tensor:
        """Teacher's logits minus the center, divided by the temperature; overwrites float32."""
        return of_teacher.float().sub_(self.center[chunk]).div_(self.teacher_temp)

    def reduce_teacher(self) -> tuple[Tensor, Tensor]:
        """Logarithm of the teacher's softmax normaliser (B, G), and the sum of its logits (K,)."""
        log_z, logit_sum = self.teacher.log_zero(), torch.empty_like(self.center)
        for chunk in self.chunks():
            of_teacher = self.of_teacher(chunk)
            logit_sum[chunk] = of_teacher.sum((0, 1), dtype=torch.float32)
            log_z = log_z.logaddexp(self.sharpen(of_teacher, chunk).logsumexp(-1))
        return log_z, logit_sum

    def log_q(self, chunk: slice, log_z: Tensor) -> Tensor:
        """Logarithm of the teacher's output, (B, G, k), from its normaliser's, (B, G)."""
        return self.sharpen(self.of_teacher(chunk), chunk).sub_(log_z[..., None])

    def teachers_of_view(self) -> Tensor:
        """Number of the teacher's views that each view is paired with: all but itself. (V,)."""
        global_views = self.teacher.of_views.shape[1]
        count = self.center.new_full(self.student.of_views.shape[1:2], global_views)
        count[:global_views] -= 1
        return count

    def pairs(self) -> int:
        """Number of (teacher view, student view) pairs in the batch."""
        images, views = self.student.of_views.shape[:2]
        return images * self.teacher.of_views.shape[1] * (views - 1)


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` with its gradient.

    With n_v teacher views paired with view v, the gradient of its logit k is n_v p_v(k) minus the
    sum over g != v of q_g(k), divided by the student's temperature and the number of pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_views: Tensor,
        student_v: Tensor,
        student_g: Tensor,
        teacher_views: Tensor,
        teacher_v: Tensor,
        teacher_g: Tensor,
        center: Tensor,
        student_temp: float,
        teacher_temp: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = _Side.of(student_views, student_v, student_g)
        teacher = _Side.of(teacher_views, teacher_v, teacher_g)
        logits = _Logits(student, teacher, center, student_temp, teacher_temp)
        log_z_teacher, logit_sum = logits.reduce_teacher()  # (B, G), (K,)
        log_z_student = student.log_zero()  # (B, V)
        dot_products = entropy = torch.zeros((), device=center.device)
        for chunk in logits.chunks():
            s = logits.of_student(student.prototypes(chunk))
            log_q = logits.log_q(chunk, log_z_teacher)
            q = log_q.exp()
            log_z_student = log_z_student.logaddexp(s.logsumexp(-1))
            same_view = (q * s[:, : q.shape[1]]).sum()
            dot_products = dot_products + (q.sum(1) * s.sum(1)).sum() - same_view
            entropy = entropy - (q * log_q).sum() / log_z_teacher.numel()

        ctx.save_for_backward(*student, *teacher, center, log_z_student, log_z_teacher)
        ctx.temperatures, ctx.dtype = (student_temp, teacher_temp), student_views.dtype
        loss = ((logits.teachers_of_view() * log_z_student).sum() - dot_products) / logits.pairs()
        ctx.mark_non_differentiable(entropy, logit_sum)
        return loss, entropy, logit_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *sides, center, log_z_student, log_z_teacher = ctx.saved_tensors
        student, teacher = _Side(*sides[:4]), _Side(*sides[4:])
        logits = _Logits(student, teacher, center, *ctx.temperatures)
        factor = gradient / logits.pairs()
        # n_v p_v / temperature and q_g / temperature: fold both factors into the exponents to save
        # a pass over the logits.
        log_factor = (logits.teachers_of_view() / logits.student_temp).log()
        log_z_student = (log_z_student - log_factor)[..., None]
        log_z_teacher = log_z_teacher + math.log(logits.student_temp)
        to_views = torch.zeros_like(student.of_views, dtype=torch.float32)
        to_v, to_g = torch.empty_like(student.weight_v), torch.empty_like(student.weight_g)
        for chunk in logits.chunks():
            prototypes = student.prototypes(chunk)
            to_logits = logits.of_student(prototypes).sub_(log_z_student).exp_()
            q = logits.log_q(chunk, log_z_teacher).exp_()
            to_logits.sub_(q.sum(1, keepdim=True))[:, : q.shape[1]] += q
            to_logits = to_logits.flatten(0, 1).to(prototypes.dtype)  # (B * V, k)
            to_views.flatten(0, 1).add_(to_logits @ prototypes)
            to_prototypes = (to_logits.mT @ student.of_views.flatten(0, 1)).to(to_v.dtype)
            to_prototypes.mul_(factor)
            # A prototype is g v / |v|: the gradient along v goes to its norm g, the rest to v.
            v, norm = student.weight_v[chunk], student.norm[chunk]
            to_g[chunk] = torch.linalg.vecdot(to_prototypes, v).unsqueeze(1) / norm
            scale = student.weight_g[chunk] / norm
            torch.mul(to_prototypes, scale, out=to_v[chunk])
            to_v[chunk].addcmul_(v, scale * to_g[chunk] / norm, value=-1)
        return (to_views * factor).to(ctx.dtype), to_v, to_g, *[None] * 6


def _as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the matmul dtype, which autocast sets."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
