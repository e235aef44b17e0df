"""DINO's projection head and loss (Caron et al., 2021, arXiv:2104.14294, section 3.1, algorithm 1).

Axes: B images, V views per image (the G global ones first), D channels of an embedding,
K prototypes, which are the outputs of the head.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from dino_xcit.model.chunked_loss import Embeddings, chunked_loss, weight_normed


class WeightNormLinear(nn.Module):
    """Weight-normalised linear layer without a bias; each row is a prototype of norm `weight_g`.

    `weight_g` (K, 1) and `weight_v` (K, D) are named as in official checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        return F.linear(x, weight_normed(self.weight_v, self.weight_g))


class DINOHead(nn.Module):
    """Projection head: (N, in_dim) -> (N, out_dim).

    An MLP, L2 normalisation and a weight-normalised linear layer (appendix C).

    Args:
        in_dim: channels of the backbone's feature.
        out_dim: number K of prototypes.
        hidden_dim: width of the two hidden layers of the MLP.
        bottleneck_dim: width D of its output.
        use_bn: put a batch norm behind each hidden layer.
        norm_last_layer: fix the norm of each prototype at 1.
    """

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
        """Input of the last layer: (N, in_dim) -> unit vectors (N, D)."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_dim) -> logits (N, K)."""
        logits: Tensor = self.last_layer(self.embed(x))
        return logits


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's outputs on different views.

    The mean is taken over all pairs of a global view, which the teacher sees, and another view,
    which the student sees. The teacher's output is centered and sharpened.

    The center is a moving average of the teacher's logits. `update_center`, called once per
    optimizer step after the backward pass, moves it by the mean logits of all calls since the last
    update. With several processes, all must make these calls together.

    Both ways to compute the loss return `(loss, scalars)`, where the scalars are detached, in nats,
    and show whether training collapses:

    - `teacher_entropy`: mean entropy of the teacher's output; ln K is uniform, 0 is one prototype.
    - `kl`: mean Kullback-Leibler divergence of the student's output from the teacher's, which is
      the loss minus the entropy.

    Args:
        out_dim: number K of prototypes.
        student_temp: temperature of the student's softmax.
        center_momentum: share of the old center that an update keeps.
    """

    center: Tensor

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self._logit_sums: list[tuple[Tensor, dist.Work | None]] = []
        """sums over the teacher's logits since the last update (K,), with their all-reduces"""
        self._logit_count = 0
        """number of logit vectors in these sums, over all processes"""

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of logits that are all in memory; training uses `of_embeddings`.

        With q_g the teacher's and log p_v the student's output, it is the mean over pairs g != v
        of -q_g . log p_v. Since log p_v = s_v / temperature - logsumexp and every q_g sums to one,
        the sum over pairs needs one logsumexp per student view and two dot products per image; no
        softmax is stored per pair.

        Args:
            student: logits of all views, (B, V, K).
            teacher: logits of the global views, (B, G, K); they get no gradient.
            teacher_temp: temperature of the teacher's softmax.

        Returns:
            The loss and the scalars.
        """
        views, global_views = student.shape[1], teacher.shape[1]
        teacher = teacher.detach()
        log_q = ((teacher.float() - self.center) / teacher_temp).log_softmax(-1)  # (B, G, K)
        q = log_q.exp()
        s = student.float() / self.student_temp
        normaliser = torch.logsumexp(s, dim=-1).sum(0)  # (V,)
        teachers_of_view = torch.full_like(normaliser, global_views)
        teachers_of_view[:global_views] -= 1
        all_pairs = (q.sum(1) * s.sum(1)).sum()
        same_view = (q * s[:, :global_views]).sum()
        pairs = len(student) * global_views * (views - 1)
        loss = ((teachers_of_view * normaliser).sum() - all_pairs + same_view) / pairs
        self._add_logits(teacher.sum((0, 1), dtype=torch.float32), teacher[..., 0].numel())
        return loss, _scalars(loss, -(q * log_q).sum(-1).mean())

    def of_embeddings(
        self, student: Embeddings, teacher: Embeddings, teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of `forward`, from logits that exist for a few prototypes at a time.

        Args:
            student: embeddings of all views.
            teacher: embeddings of the global views; they get no gradient.
            teacher_temp: temperature of the teacher's softmax.

        Returns:
            The loss and the scalars.
        """
        loss, entropy, logit_sum = chunked_loss(
            student, teacher, self.center, self.student_temp, teacher_temp
        )
        self._add_logits(logit_sum, teacher.of_views[..., 0].numel())
        return loss, _scalars(loss, entropy)

    @torch.no_grad()
    def _add_logits(self, logit_sum: Tensor, count: int) -> None:
        """Add the sum (K,) over `count` logit vectors of the teacher to the next update."""
        if dist.is_available() and dist.is_initialized():
            # Asynchronous, so that the processes exchange it while the backward pass runs.
            self._logit_sums.append((logit_sum, dist.all_reduce(logit_sum, async_op=True)))
            count *= dist.get_world_size()
        elif self._logit_sums:
            self._logit_sums = [(logit_sum + self._logit_sums[0][0], None)]
        else:
            self._logit_sums = [(logit_sum, None)]
        self._logit_count += count

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center by the teacher's mean logits since the last call (equation 4)."""
        for _, all_reduce in self._logit_sums:
            if all_reduce is not None:
                all_reduce.wait()
        total = torch.stack([logit_sum for logit_sum, _ in self._logit_sums]).sum(0)
        self.center.lerp_(total / self._logit_count, 1 - self.center_momentum)
        self._logit_sums.clear()
        self._logit_count = 0


def _scalars(loss: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    return {"teacher_entropy": entropy, "kl": loss.detach() - entropy}
