"""What the toolkit needs of a network. XCiT is one; `timm_backbone.py` makes any timm network one.

Axes: B images, V views, P features of an image, N patch tokens, C channels, H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMM, HUB = "timm:", "hf-hub:"  # how names of other networks begin


class Backbone(nn.Module):
    """Interface of a backbone: what pretraining, evaluations and export call."""

    arch: str
    """name that `build_backbone` takes"""
    in_chans: int
    """channels of the images"""
    patch_size: int
    """pixels on a side of a patch"""
    embed_dim: int
    """channels C of a feature"""
    path_shape: tuple[int, int]
    """layers and residual branches that stochastic depth may drop; (0, 0): none"""
    metadata: dict[str, Any]
    """what a weights file says beside the tensors; `weights/` fills it"""
    class_attention: Callable[[Tensor], Tensor] | None = None
    """images -> softmax weights of the class token (B, layers, heads, 1 + N); None: it has none"""

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Give the feature of each image.

        Args:
            images: normalised, (B, in_chans, H, W).
            paths: stochastic depth, (B, *path_shape): a factor for each branch; None: 1.

        Returns:
            (B, C)
        """
        raise NotImplementedError

    def layer_features(self, images: Tensor) -> Tensor:
        """Give what k-NN and linear probes choose from, (B, P, C); [:, 0] is what `forward` gives."""
        return self(images)[:, None]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Give the normed patch tokens of the last layer, (B, N, C), in row-major order."""
        raise NotImplementedError

    def compiled_regions(self) -> Sequence[nn.Module]:
        """Modules that `--compile` compiles, each on its own."""
        return (self,)
