"""Every private name of torch and Lightning that the package uses, and why no public one serves.

`tests/test_private_names.py` fails when a new version renames one of them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as partitioner
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import lightning as L
    from torch import Tensor

__all__ = ["FakeTensorMode"]  # tensors without content; public only by way of the memory estimators

BatchNorm = _BatchNorm
"""Base class of all batch norms; the public ones are its subclasses, each for one input rank."""


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor in one launch; `torch.nn.utils` has only the norm of all."""
    return list(torch._foreach_norm(list(tensors)))


def foreach_multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by its factor, in place, in one launch."""
    torch._foreach_mul_(list(tensors), list(factors))


def loss_scale(trainer: L.Trainer) -> Tensor:
    """The factor of the loss in 16-mixed, on the device; the public getter waits for the device."""
    scale: Tensor = trainer.precision_plugin.scaler._get_scale_async()  # type: ignore[attr-defined]
    return scale


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share memory; fake tensors have no public address."""
    return int(tensor.untyped_storage()._cdata)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the tensor stays.

    These operations return their result, so a compiler can put them into a graph without a break;
    the public ones write into a tensor. Neither makes the host wait for a GPU. No gradient.
    """
    operations, group = torch.ops._c10d_functional, _all_processes()
    total: Tensor = operations.wait_tensor(operations.all_reduce(tensor, "sum", group))
    return total


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, (processes, ...), in their order. See `all_reduce`."""
    operations, group, world = torch.ops._c10d_functional, _all_processes(), dist.get_world_size()
    gathered: Tensor = operations.wait_tensor(
        operations.all_gather_into_tensor(tensor, world, group)
    )
    return gathered.view(world, *tensor.shape)


def _all_processes() -> str:
    """Name of the group of all processes."""
    world = dist.group.WORLD
    assert world is not None
    return str(world.group_name)


@contextlib.contextmanager
def compiling(kept_for_backward: float) -> Iterator[None]:
    """Set what torch.compile keeps for the backward pass, as a share; run uncompiled what fails.

    Leave a compiled region whole under DDP: it is a layer, so gradients are reduced early enough
    without cutting it at the borders of DDP's buckets, which it may not survive.

    They have no public setting but a decorator's or an environment variable's.
    """
    with (
        dynamo.patch(suppress_errors=True, optimize_ddp=False),
        partitioner.patch(activation_memory_budget=kept_for_backward),
    ):
        yield


@contextlib.contextmanager
def failing_compilation_raises() -> Iterator[None]:
    """Let a failing torch.compile raise its error, whatever the caller has set."""
    with dynamo.patch(suppress_errors=False):
        yield


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Disable Lightning's per-step SIGTERM broadcast, which waits for the device.

    Its handler is replaced by ours before the first step, so there is nothing to broadcast.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def forget_sigterm(trainer: L.Trainer) -> None:
    """Make Lightning forget a SIGTERM that our handler takes over; it would exit with code 0."""
    trainer._signal_connector.received_sigterm = False


def set_global_step(trainer: L.Trainer, step: int) -> None:
    """Let Lightning count optimizer steps from `step`, without the saved state of its loops.

    A run's position is its number of steps alone; Lightning takes it only as part of the state of
    a dozen counters.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    epoch_loop._batches_that_stepped = step
