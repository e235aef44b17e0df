"""Batch norm over the batches of all processes, on CPU and GPU alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.private_names import BatchNorm, all_gather, all_reduce

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, for inputs (B, C, ...) on any device.

    Computes what torch's SyncBatchNorm computes, which refuses CPU tensors, waits for the device
    several times a pass and cannot be part of a compiled layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...); B has to be the same in all processes."""
        if not self.training:
            return super().forward(x)
        with torch.no_grad():  # `_Normalise` has the gradients through mean and variance
            mean, variance = _statistics(x)
            count = x.numel() // x.shape[1] * dist.get_world_size()
            if self.track_running_stats:
                self._track(mean, variance * count / (count - 1))
            inverse_deviation = (variance + self.eps).rsqrt()
        normalised: Tensor = _Normalise.apply(x, mean, inverse_deviation, self.weight, self.bias)
        return normalised

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept (B, C) too: the batch norm of the head is one-dimensional."""


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes, float32 (C,) each.

    Each process takes its squares from its own mean, and the difference of the means adds the
    rest: E[x^2] - E[x]^2 would lose the digits of a variance that is small beside the mean.
    """
    dims, wide = _all_but_channels(x), x.float()
    mean = wide.mean(dims)
    variance = (wide - _per_channel(mean, x)).square().mean(dims)
    means, variances = all_gather(torch.stack([mean, variance])).unbind(1)  # (processes, C)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, with mean and deviation functions of every x.

    As one function it keeps x alone for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        mean: Tensor,
        inverse_deviation: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, inverse_deviation, weight)
        scale = _per_channel(inverse_deviation * weight, x)
        centred = x.float() - _per_channel(mean, x)
        return (centred * scale + _per_channel(bias, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_deviation, weight = ctx.saved_tensors
        dims, wide = _all_but_channels(x), gradient.float()
        unit = (x.float() - _per_channel(mean, x)) * _per_channel(inverse_deviation, x)
        of_bias, of_weight = wide.sum(dims), (wide * unit).sum(dims)
        # Those of the parameters are this process's share, as everywhere in data parallelism.
        shared = all_reduce(torch.stack([of_bias, of_weight]))  # (2, C)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        through_mean, through_variance = (_per_channel(g, x) for g in shared / count)
        of_x = wide - through_mean - unit * through_variance
        of_x = of_x * _per_channel(inverse_deviation * weight, x)
        return of_x.to(x.dtype), None, None, of_weight, of_bias


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), of as many dimensions as x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))


def synchronise_batch_norms(network: nn.Module) -> None:
    """Replace batch norms, in place, by ones that use the batches of all processes.

    Their names, weights and statistics stay.

    Args:
        network: its batch norms, if any, have to be torch's BatchNorm1d or BatchNorm2d.

    Raises:
        UserError: a batch norm is of another class, so a replacement might compute something else
            (timm's BatchNormAct2d contains an activation).
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, BatchNorm) or isinstance(child, SyncBatchNorm):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                raise UserError(
                    f"the network has batch norms of the class {type(child).__name__}, which "
                    "cannot use the batches of several processes; expected BatchNorm1d or "
                    "BatchNorm2d. Set --devices 1 (and --num_nodes 1)"
                )
            synced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            synced.train(child.training).requires_grad_(child.weight.requires_grad)
            setattr(parent, name, synced)
