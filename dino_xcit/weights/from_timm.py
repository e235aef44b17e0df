"""Pretrained networks of timm, by name or from a folder, as backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import timm
from timm.data.config import resolve_data_config

from dino_xcit.errors import UserError
from dino_xcit.files import LONGEST_REASON
from dino_xcit.model.backbone import TIMM, Backbone
from dino_xcit.model.timm_backbone import TimmBackbone, create_network, own_size
from dino_xcit.weights.build import build, load_strict
from dino_xcit.weights.formats import describe

if TYPE_CHECKING:
    from torch import nn


def from_timm(weights: str, image_size: int | None = None) -> Backbone:
    """Return a pretrained network of timm; an XCiT as ours if it is of a size that ours has.

    Args:
        weights: timm:NAME, timm:local-dir:FOLDER or hf-hub:ORG/NAME.
        image_size: side of the images in pixels; default: as it was pretrained.

    Raises:
        UserError: timm cannot load it.
    """
    network = create_pretrained(weights, "weights", image_size)
    data = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
    channels, size, _ = data["input_size"]
    metadata = {
        "in_chans": channels,
        "global_crops_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    if isinstance(network, timm.models.xcit.Xcit):
        tensors = network.state_dict()
        arch = describe(tensors).get("arch")
        if arch is not None:
            backbone = build({**metadata, "arch": arch})
            load_strict(backbone, tensors)
            return backbone.eval()
    wrapped = TimmBackbone(network, weights, in_chans=channels)
    wrapped.metadata = {**metadata, "arch": weights, "global_crops_size": own_size(network)}
    return wrapped.eval()


def create_pretrained(weights: str, flag: str, image_size: int | None = None) -> nn.Module:
    """Create a pretrained network without its classifier.

    Args:
        weights: as of `from_timm`.
        flag: the option that names the weights.
        image_size: side of the images in pixels, for networks with learned positions.

    Raises:
        UserError: timm cannot load it; the message names the flag.
    """
    try:
        return create_network(
            weights.removeprefix(TIMM), image_size, pretrained=True, num_classes=0
        )
    except Exception as error:  # timm, Hugging Face and the network each have their own
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"--{flag} {weights} could not be loaded: {reason}") from error
