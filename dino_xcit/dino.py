"""DINO's projection head and loss (Caron et al., 2021, arXiv:2104.14294, section 3.1, algorithm 1).

Axes: B images, V views per image (the G global ones first), K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class WeightNormLinear(nn.Module):
    """Prototypes: each row of the weight has the length that its gain says. No bias.

    `weight_g` (K, 1) and `weight_v` (K, in_dim) are named as in official checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return Embeddings(x, self.weight_v, self.weight_g).logits()


class DINOHead(nn.Module):
    """Three-layer MLP, L2 normalisation, weight-normalised last layer (appendix C). (N, in_dim) -> (N, out_dim)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in ((in_dim, hidden_dim), (hidden_dim, hidden_dim)):
            layers += [nn.Linear(width_in, width_out), *([nn.BatchNorm1d(width_out)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, fixed_gain=norm_last_layer)

    def embed(self, x: Tensor) -> Tensor:
        """(N, in_dim) -> (N, bottleneck_dim) of length 1, which the prototypes are compared with."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.embed(x))


class LossStatistics(NamedTuple):
    """What tells a healthy run from a collapsed one; in nats."""

    teacher_entropy: Tensor
    """mean entropy of the teacher's output: ln K is uniform, 0 is one prototype"""
    kl: Tensor
    """mean divergence of the student's output from the teacher's: the loss less the entropy"""


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centered, sharpened output on the global views and the student's output on
    every other view, averaged over the pairs; and the center, a moving average of the teacher's output.

    The center moves in `update_center`, once per optimizer step and after its backward pass, by the mean over all outputs
    that `forward` and `of_embeddings` saw since. With several processes all have to call these together.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self._output_sums: list[tuple[Tensor, dist.Work | None]] = []  # with what is under way between processes
        self._output_count = 0

    def forward(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Student logits (B, V, K), teacher logits (B, G, K) of the first G views -> loss, a scalar.

        With q_g the teacher's and log p_v the student's output, the mean over pairs g != v of -q_g . log p_v. Since
        log p_v = s_v / temperature - logsumexp and every q_g sums to one, the sum over pairs needs one logsumexp per
        student view and two dot products per image; no softmax is stored per pair.
        """
        views, global_views = student.shape[1], teacher.shape[1]
        q = self.sharpen(teacher, teacher_temp)  # (B, G, K)
        s = student.float() / self.student_temp
        normaliser = torch.logsumexp(s, dim=-1).sum(0)  # (V,)
        teachers_of_view = torch.full_like(normaliser, global_views)
        teachers_of_view[:global_views] -= 1
        all_pairs = (q.sum(1) * s.sum(1)).sum()
        same_view = (q * s[:, :global_views]).sum()
        pairs = global_views * (views - 1)
        loss = ((teachers_of_view * normaliser).sum() - all_pairs + same_view) / (pairs * len(student))
        self._remember(teacher.detach().sum((0, 1), dtype=torch.float32), teacher[..., 0].numel())
        return loss

    def of_embeddings(self, student: Embeddings, teacher: Embeddings, teacher_temp: float) -> tuple[Tensor, LossStatistics]:
        """`forward` and `statistics` of the logits, a few prototypes at a time, so that never many are there.

        The teacher gets no gradient.
        """
        loss, entropy, output_sum = _LossInParts.apply(*student, *teacher, self.center, self.student_temp, teacher_temp)
        self._remember(output_sum, teacher.of_views[..., 0].numel())
        return loss, LossStatistics(entropy, loss.detach() - entropy)

    @torch.no_grad()
    def sharpen(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Teacher logits -> probabilities (B, G, K), centered and sharpened."""
        return ((teacher.float() - self.center) / teacher_temp).softmax(-1)

    @torch.no_grad()
    def statistics(self, loss: Tensor, teacher: Tensor, teacher_temp: float) -> LossStatistics:
        """Entropy and divergence for a loss that was computed with the present center."""
        log_q = ((teacher.float() - self.center) / teacher_temp).log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1).mean()
        return LossStatistics(entropy, loss.detach() - entropy)

    @torch.no_grad()
    def _remember(self, output_sum: Tensor, outputs: int) -> None:
        several = dist.is_available() and dist.is_initialized()
        if self._output_sums and not several:
            output_sum = output_sum + self._output_sums.pop()[0]
        work = dist.all_reduce(output_sum, async_op=True) if several else None  # while the backward pass runs
        self._output_sums.append((output_sum, work))
        self._output_count += outputs * (dist.get_world_size() if several else 1)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center by the mean teacher output since the last call, over all processes (equation 4)."""
        for _, work in self._output_sums:
            if work is not None:
                work.wait()
        mean = torch.stack([output_sum for output_sum, _ in self._output_sums]).sum(0) / self._output_count
        self.center.lerp_(mean, 1 - self.center_momentum)
        self._output_sums.clear()
        self._output_count = 0


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
        return (self.weight_v[some] * (self.weight_g[some] / self.norm[some])).to(self.of_views.dtype)


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
            side.of_views.new_full(side.of_views.shape[:2], -torch.inf, dtype=torch.float32) for side in (teacher, student)
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
            to_logits, targets = logits.of_student(prototypes).sub_(less).exp_(), logits.log_q(some, of_teacher).exp_()
            to_logits.sub_(targets.sum(1, keepdim=True))[:, : targets.shape[1]] += targets
            narrow = to_logits.flatten(0, 1).to(prototypes.dtype)
            to_views.flatten(0, 1).add_(narrow @ prototypes)
            to_prototypes = (narrow.mT @ student.of_views.flatten(0, 1)).to(to_v.dtype).mul_(factor)
            # A prototype is v g / |v|: what is along v goes to its length, the rest to its direction.
            v, norm = student.weight_v[some], student.norm[some]
            to_g[some] = torch.linalg.vecdot(to_prototypes, v).unsqueeze(1) / norm
            scale = student.weight_g[some] / norm
            torch.mul(to_prototypes, scale, out=to_v[some]).addcmul_(v, scale * to_g[some] / norm, value=-1)
        return (to_views * factor).to(ctx.dtype), to_v, to_g, *[None] * 6


def _side(of_views: Tensor, weight_v: Tensor, weight_g: Tensor) -> _Side:
    return _Side(_as_autocast(of_views), weight_v, weight_g, torch.linalg.vector_norm(weight_v, dim=1, keepdim=True))


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the numbers that autocast would multiply in."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
