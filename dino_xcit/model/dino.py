"""DINO's projection head and loss (Caron et al., 2021, arXiv:2104.14294, section 3.1, algorithm 1).

Axes: B images, V views per image (the G global ones first), K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from dino_xcit.model.chunked_loss import Embeddings, _LossInParts


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
            layers += [
                nn.Linear(width_in, width_out),
                *([nn.BatchNorm1d(width_out)] if use_bn else []),
                nn.GELU(),
            ]
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

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self._output_sums: list[
            tuple[Tensor, dist.ProbeTask | None]
        ] = []  # with what is under way between processes
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
        loss = ((teachers_of_view * normaliser).sum() - all_pairs + same_view) / (
            pairs * len(student)
        )
        self._remember(teacher.detach().sum((0, 1), dtype=torch.float32), teacher[..., 0].numel())
        return loss

    def of_embeddings(
        self, student: Embeddings, teacher: Embeddings, teacher_temp: float
    ) -> tuple[Tensor, LossStatistics]:
        """`forward` and `statistics` of the logits, a few prototypes at a time, so that never many are there.

        The teacher gets no gradient.
        """
        loss, entropy, output_sum = _LossInParts.apply(
            *student, *teacher, self.center, self.student_temp, teacher_temp
        )
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
        work = (
            dist.all_reduce(output_sum, async_op=True) if several else None
        )  # while the backward pass runs
        self._output_sums.append((output_sum, work))
        self._output_count += outputs * (dist.get_world_size() if several else 1)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center by the mean teacher output since the last call, over all processes (equation 4)."""
        for _, work in self._output_sums:
            if work is not None:
                work.wait()
        mean = (
            torch.stack([output_sum for output_sum, _ in self._output_sums]).sum(0)
            / self._output_count
        )
        self.center.lerp_(mean, 1 - self.center_momentum)
        self._output_sums.clear()
        self._output_count = 0
