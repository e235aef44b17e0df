"""Build the network that weights are of, and load tensors into it one to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.build import build_backbone
from dino_xcit.weights.formats import listed
from dino_xcit.weights.networks import COUNTER

if TYPE_CHECKING:
    from torch import nn

    from dino_xcit.model.backbone import Backbone
    from dino_xcit.weights.reading import Tensors


def build(metadata: dict[str, Any]) -> Backbone:
    """Build the network that the metadata of weights describe, with random weights."""
    backbone = build_backbone(
        metadata["arch"],
        in_chans=metadata.get("in_chans", 3),
        image_size=metadata.get("global_crops_size"),
        ablations={name: metadata[name] for name in ABLATIONS if name in metadata},
    )
    backbone.metadata = metadata
    return backbone


def load_strict(network: nn.Module, tensors: Tensors) -> None:
    """Load tensors that must be those of the network, one to one.

    Only the counters of batch norms, which nothing reads, may be missing: old official files lack
    them.

    Raises:
        UserError: lists tensors that are missing, left over or of another shape.
    """
    expected = network.state_dict()
    counters = {n: t for n, t in expected.items() if n.endswith(COUNTER)}
    tensors = {**{n: t for n, t in counters.items() if n not in tensors}, **tensors}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected
            if name in tensors and tensors[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        )
    network.load_state_dict(tensors, strict=True)


def require_finite(tensors: Tensors, what: str) -> None:
    """Raise UserError, beginning with `what`, if a tensor holds values that are not finite."""
    broken = [
        name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinite) in {len(broken)} of "
            f"{len(tensors)} tensors: {listed(broken)}; the training diverged, or the file is "
            "damaged: take an earlier checkpoint"
        )
