"""Check of an exported file: what is read back computes the same features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dino_xcit.model.xcit import XCiT
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dino_xcit.model.backbone import Backbone

TOLERANCE = 1e-4  # of features, in units of their standard deviation
HALF_TOLERANCE = 0.05  # of features computed in float16


@torch.no_grad()
def compare(
    backbone: Backbone,
    other: Callable[[Tensor], Any],
    tool: str,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare the features of the backbone and of what the tool has read back, and print a line.

    Args:
        backbone: in eval mode on the CPU.
        other: images -> features, or (features, attention maps).
        tool: name of the tool that has read the file.
        tolerance: of the features, in units of their standard deviation.

    Raises:
        RuntimeError: the features differ.
    """
    # XCiT takes any size: another batch and size than the graphs were traced with.
    p, size = backbone.patch_size, backbone.metadata.get("global_crops_size", 224)
    sides = (7 * p, 3 * p) if isinstance(backbone, XCiT) else (size, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, backbone.in_chans, *sides, generator=generator)
    expected, features = backbone(images), other(images)
    features = features[0] if isinstance(features, (tuple, list)) else features
    error = float((expected - features).abs().max() / expected.std())
    if not error < tolerance:
        raise RuntimeError(
            f"{tool} gives other features: they differ by {error:.2g} of their standard deviation"
        )
    say(f"{tool}: the same features, to {error:.1g} of their standard deviation")
