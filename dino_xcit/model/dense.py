"""Features at four scales, for detection and segmentation (XCiT, sections 4.3 and 4.4).

As the XCiT authors feed Mask R-CNN and UperNet: tokens after four of the XCA layers, brought to strides 4, 8, 16 and 32 by
transposed convolutions and max pooling around the patch grid. What is transposed is new and has to be trained.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from dino_xcit.model.xcit import XCiT

STRIDES = (4, 8, 16, 32)


def default_layers(depth: int) -> tuple[int, int, int, int]:
    """The authors' layers: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, in the same places of any depth."""
    return tuple(max(1, round(depth * share)) - 1 for share in (4 / 12, 6 / 12, 8 / 12, 1))  # type: ignore[return-value]


class Pyramid(nn.Module):
    """Images (B, in_chans, H, W) -> {"0": ..., "3": ...}, each (B, C, H / stride, W / stride) for the strides 4 to 32.

    `out_channels` and the names are what torchvision's detectors and `FeaturePyramidNetwork` expect. layers: after which XCA
    layer each scale is taken, from 0. Images are padded at the right and the bottom to multiples of 32, so any size will do,
    and a scale has the size that padding gives it.
    """

    def __init__(self, backbone: XCiT, layers: tuple[int, int, int, int] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = layers or default_layers(len(backbone.blocks))
        for layer in self.layers:
            if not 0 <= layer < len(backbone.blocks):
                raise UserError(
                    f"layer {layer} of {len(backbone.blocks)}; expected 0 to {len(backbone.blocks) - 1}"
                )
        self.out_channels = backbone.embed_dim
        self.scales = nn.ModuleList(
            _scale(self.out_channels, backbone.patch_size, stride) for stride in STRIDES
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        down, right = (-side % STRIDES[-1] for side in images.shape[-2:])
        taken = self.backbone.xca_features(
            F.pad(images, (0, right, 0, down)), self.layers
        )  # (B, C, H, W) each
        return OrderedDict(
            (str(i), scale(x)) for i, (scale, x) in enumerate(zip(self.scales, taken, strict=True))
        )


def _scale(channels: int, patch: int, stride: int) -> nn.Module:
    """From one token a patch to one feature every `stride` pixels."""
    if patch == stride:
        return nn.Identity()
    if patch < stride:
        return nn.MaxPool2d(stride // patch)
    if patch == 2 * stride:
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
        nn.BatchNorm2d(channels),
        nn.GELU(),
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
    )
