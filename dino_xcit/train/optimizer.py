"""AdamW with official DINO's parameter groups, and clipping by each parameter's own norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.private_names import foreach_multiply, foreach_norm


def adamw(student: nn.Module, precision: str | int | None) -> torch.optim.AdamW:
    """The optimizer; learning rate and weight decay are set at each step."""
    # The scaler of float16 has to see the gradients before they are clipped, which a fused
    # optimizer hides from it. None, not False: that would also rule out foreach operations.
    fused = None if precision == "16-mixed" else True
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=fused)


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Two groups for AdamW: regularised, and spared from weight decay.

    Official rule: biases and one-dimensional tensors are spared. XCA's temperature (h, 1, 1) and
    the class token are therefore decayed, which timm's `no_weight_decay` would not do.
    """
    regularised: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            is_spared = name.endswith(".bias") or parameter.ndim == 1
            (spared if is_spared else regularised).append(parameter)
    return [{"params": regularised}, {"params": spared, "weight_decay": 0.0}]


@torch.no_grad()
def clip_per_parameter(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale each gradient whose own norm exceeds the limit down to it, in place.

    Args:
        gradients: one tensor for each parameter.
        limit: largest norm; 0: none.

    Returns:
        The norms before, (tensors,).
    """
    norms = torch.stack(foreach_norm(gradients))
    if limit:
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        foreach_multiply(gradients, factors.unbind())
    return norms
