"""Feature maps at four scales, for detection and segmentation (XCiT, sections 4.3 and 4.4).

As the XCiT authors feed Mask R-CNN and UperNet: the tokens after four of the XCA layers, resampled
to strides 4, 8, 16 and 32 by transposed convolutions and max pooling. The transposed convolutions
start from random weights, so they have to be trained.
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
    """The authors' layers, scaled to the depth: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    first, second, third, last = (max(1, round(depth * s)) - 1 for s in (4 / 12, 6 / 12, 8 / 12, 1))
    return first, second, third, last


class Pyramid(nn.Module):
    """Feature maps of strides 4 to 32: a backbone for torchvision's detectors.

    `out_channels` and the names "0" to "3" are what torchvision's detectors and
    `FeaturePyramidNetwork` expect.

    Args:
        backbone: an XCiT.
        layers: the XCA layer that each scale comes after, counted from 0. Default: the authors'.

    Raises:
        UserError: the backbone has no such layer.
    """

    def __init__(self, backbone: XCiT, layers: tuple[int, int, int, int] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        depth = len(backbone.blocks)
        self.layers = layers or default_layers(depth)
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise UserError(f"layer {layer} of {depth}; expected 0 to {depth - 1}")
        self.out_channels = backbone.embed_dim
        self.scales = nn.ModuleList(
            _scale(self.out_channels, backbone.patch_size, stride) for stride in STRIDES
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the feature maps.

        Args:
            images: (B, in_chans, H, W) of any size; zeros pad H and W to multiples of 32.

        Returns:
            {"0": ..., "3": ...}, each (B, C, padded H / stride, padded W / stride).
        """
        down, right = (-side % STRIDES[-1] for side in images.shape[-2:])
        maps = self.backbone.xca_features(F.pad(images, (0, right, 0, down)), self.layers)
        return OrderedDict(
            (str(i), scale(x)) for i, (scale, x) in enumerate(zip(self.scales, maps, strict=True))
        )


def _scale(channels: int, patch: int, stride: int) -> nn.Module:
    """Resample a map of one token per patch to one feature every `stride` pixels."""
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
