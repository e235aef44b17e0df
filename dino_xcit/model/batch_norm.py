"""Batch norm over the batches of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.private_names import BatchNorm


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, by all-reduce, for inputs (B, C, ...).

    torch's SyncBatchNorm refuses CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...); B has to be the same in all processes."""
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        wide = x.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean: Tensor = dist_nn.all_reduce(wide.sum(dims)) / count  # (C,)
        centred = wide - mean.view(shape)
        variance: Tensor = dist_nn.all_reduce(centred.square().sum(dims)) / count  # (C,)
        if self.track_running_stats:
            self._track(mean, variance * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
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


SYNCHRONISED = (CpuSyncBatchNorm, nn.SyncBatchNorm)


def synchronise_batch_norms(network: nn.Module, device_type: str) -> None:
    """Replace batch norms, in place, by ones that use the batches of all processes.

    Their names, weights and statistics stay.

    Args:
        network: its batch norms, if any, have to be torch's BatchNorm1d or BatchNorm2d.
        device_type: `cpu` or the type of a GPU.

    Raises:
        UserError: a batch norm is of another class, so a replacement might compute something else
            (timm's BatchNormAct2d contains an activation).
    """
    synced_class = CpuSyncBatchNorm if device_type == "cpu" else nn.SyncBatchNorm
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, BatchNorm) or isinstance(child, SYNCHRONISED):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d):
                raise UserError(
                    f"the network has batch norms of the class {type(child).__name__}, which "
                    "cannot use the batches of several processes; expected BatchNorm1d or "
                    "BatchNorm2d. Set --devices 1 (and --num_nodes 1)"
                )
            synced = synced_class(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            synced.train(child.training).requires_grad_(child.weight.requires_grad)
            setattr(parent, name, synced)
