"""Batch norm over the batches of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, by all-reduce: torch's SyncBatchNorm refuses CPU tensors."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        wide = x.float()
        count = (
            x.numel() // x.shape[1] * dist.get_world_size()
        )  # every process has a batch of the same size
        mean = dist_nn.all_reduce(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = dist_nn.all_reduce(centred.square().sum(dims)) / count
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Takes (B, C) too: the head's batch norm is one-dimensional."""


def synchronise_batch_norms(network: nn.Module, device_type: str) -> None:
    """Replace batch norms by ones that use the batches of all processes; names, weights and statistics stay."""
    synced_class = CpuSyncBatchNorm if device_type == "cpu" else nn.SyncBatchNorm
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                synced = synced_class(child.num_features, child.eps, child.momentum)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced.requires_grad_(child.weight.requires_grad))
