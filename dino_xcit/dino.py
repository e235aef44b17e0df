"""DINO's projection head and loss (Caron et al., 2021, arXiv:2104.14294, section 3.1, algorithm 1).

Axes: B images, V views per image (the G global ones first), K prototypes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

ROWS_AT_ONCE = 512  # of logits, in float32 128 MiB of 65536 prototypes


class WeightNormLinear(nn.Module):
    """Prototypes: each row of the weight has the length that its gain says. No bias.

    `weight_g` (K, 1) and `weight_v` (K, in_dim) are named as in official checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def prototypes(self) -> Tensor:
        """(K, in_dim), each of its length."""
        return self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.prototypes())


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


class Embeddings(NamedTuple):
    """What a network says of the views, one product before its logits."""

    of_views: Tensor
    """(B, V, D), of length 1"""
    prototypes: Tensor
    """(K, D)"""


class LossStatistics(NamedTuple):
    """What tells a healthy run from a collapsed one; in nats."""

    teacher_entropy: Tensor
    """mean entropy of the teacher's output: ln K is uniform, 0 is one prototype"""
    kl: Tensor
    """mean divergence of the student's output from the teacher's: the loss less the entropy"""


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centered, sharpened output on the global views and the student's output on
    every other view, averaged over the pairs; and the center, a moving average of the teacher's output.

    The center moves in `update_center`, once per optimizer step, by the mean over all outputs that `forward` saw since.
    """

    center: Tensor
    output_sum: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("output_sum", torch.zeros(out_dim), persistent=False)
        self.output_count = 0

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
        self._remember(teacher)
        return loss

    def of_embeddings(self, student: Embeddings, teacher: Embeddings, teacher_temp: float) -> Tensor:
        """`forward` of the logits, a few images at a time: no more than `ROWS_AT_ONCE` rows of logits are ever there."""
        return _LossInParts.apply(student.of_views, student.prototypes, teacher, self, teacher_temp)

    @torch.no_grad()
    def sharpen(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Teacher logits -> probabilities (B, G, K), centered and sharpened."""
        return ((teacher.float() - self.center) / teacher_temp).softmax(-1)

    @torch.no_grad()
    def statistics(self, loss: Tensor, teacher: Tensor, teacher_temp: float) -> LossStatistics:
        """Entropy and divergence for a loss that was computed with the present center."""
        entropy = self._entropies(teacher, teacher_temp).mean()
        return LossStatistics(entropy, loss.detach() - entropy)

    @torch.no_grad()
    def statistics_of_embeddings(self, loss: Tensor, teacher: Embeddings, teacher_temp: float) -> LossStatistics:
        """`statistics` of the logits, a few images at a time."""
        parts = _parts(teacher.of_views)
        entropy = torch.cat([self._entropies(F.linear(part, teacher.prototypes), teacher_temp) for part in parts]).mean()
        return LossStatistics(entropy, loss.detach() - entropy)

    def _entropies(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Logits (B, G, K) -> (B, G)."""
        log_q = ((teacher.float() - self.center) / teacher_temp).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1)

    @torch.no_grad()
    def _remember(self, teacher: Tensor) -> None:
        flat = teacher.flatten(0, 1)
        self.output_sum += flat.sum(0, dtype=torch.float32)
        self.output_count += len(flat)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center by the mean teacher output since the last call, over all processes (equation 4)."""
        processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.output_sum)
            processes = dist.get_world_size()
        self.center.lerp_(self.output_sum / (self.output_count * processes), 1 - self.center_momentum)
        self.output_sum.zero_()
        self.output_count = 0


class _LossInParts(torch.autograd.Function):
    """`DINOLoss.forward` of logits that are made, used and forgotten part by part, their gradients with them.

    The loss is a scalar, so its gradients are known up to a factor as soon as it is: the backward pass only multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, prototypes: Tensor, teacher: Embeddings, loss_of: DINOLoss, teacher_temp: float
    ) -> Tensor:
        narrow = [_as_autocast(tensor.detach()) for tensor in (student, prototypes, *teacher)]
        weight = narrow[1].requires_grad_()
        total = torch.zeros((), device=student.device)
        of_student, of_prototypes = [], torch.zeros_like(prototypes)
        for views, of_teacher in zip(_parts(narrow[0], like=student), _parts(narrow[2], like=student), strict=True):
            # Per image and pair, so that half precision holds the gradients of single logits.
            count = len(views) * views.shape[1]
            with torch.enable_grad():
                views = views.detach().requires_grad_()
                loss = loss_of(F.linear(views, weight), F.linear(of_teacher, narrow[3]), teacher_temp)
                gradients = torch.autograd.grad(loss * count, (views, weight))
            share = len(views) / len(student)
            total += share * loss.detach()
            of_student.append(gradients[0].to(student.dtype).mul_(share / count))
            of_prototypes.add_(gradients[1], alpha=share / count)
        ctx.save_for_backward(torch.cat(of_student), of_prototypes)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_student, of_prototypes = ctx.saved_tensors
        return of_student * gradient, of_prototypes * gradient, None, None, None


def _parts(tensor: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of `ROWS_AT_ONCE` views at most, of as many images each as can be. `like`: as many parts as this has."""
    images, views = (tensor if like is None else like).shape[:2]
    return tensor.chunk(min(images, math.ceil(images * views / ROWS_AT_ONCE)))


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the numbers that autocast would multiply in."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
