"""Build the backbone that `--arch` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.timm_backbone import build_timm, is_timm
from dino_xcit.model.xcit import XCiT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dino_xcit.model.backbone import Backbone


def build_backbone(
    arch: str,
    *,
    in_chans: int = 3,
    image_size: int | None = None,
    grad_checkpointing: bool = False,
    sampled_paths: bool = False,
    ablations: Mapping[str, bool] | None = None,
) -> Backbone:
    """Build a backbone with random weights.

    Args:
        arch: short, official or timm name of an XCiT, `timm:NAME` or `hf-hub:ORG/NAME`.
        in_chans: channels of the images.
        image_size: side of the largest images in pixels, for networks with learned positions;
            None: their own.
        grad_checkpointing: recompute layers in the backward pass; XCiT only.
        sampled_paths: whether a timm network takes `paths`; XCiT always does.
        ablations: values of the switches in `ABLATIONS`; XCiT only.

    Raises:
        UserError: there is no such network, or only an XCiT has the option.
    """
    ablations = ablations or {}
    if not is_timm(arch):
        return XCiT(arch, in_chans=in_chans, grad_checkpointing=grad_checkpointing, **ablations)
    switched = [name for name in ABLATIONS if not ablations.get(name, True)]
    if switched or grad_checkpointing:
        flag = f"{switched[0]} false" if switched else "grad_checkpointing true"
        raise UserError(f"--{flag} needs an XCiT; --arch is {arch}")
    return build_timm(arch, in_chans=in_chans, image_size=image_size, sampled_paths=sampled_paths)
