"""Backbone + images -> attention maps of the class token (XCiT, section 3.4 and figure 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_xcit.xcit import XCiT


@torch.no_grad()
def class_attention(backbone: XCiT, images: Tensor, layer: int = -1) -> Tensor:
    """Normalised images (B, C, H, W) -> softmax weights on the patches (B, heads, H / patch, W / patch).

    layer: which class-attention layer, the last by default. A map sums to the share that goes to patches, which is one less
    what the class token keeps for itself. Raises ValueError if the patch size does not divide the image.
    """
    grid = [side // backbone.patch_size for side in images.shape[-2:]]
    return backbone.class_attention(images)[:, layer, :, 1:].unflatten(-1, grid)
