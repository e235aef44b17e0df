"""The interface of a backbone. `xcit.py` implements it, and `timm_backbone.py` for timm's networks.

Axes: B images, P features per image, N patch tokens, C channels, h heads, H x W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMM, HUB = "timm:", "hf-hub:"
"""prefixes of the names of networks that timm builds"""


class Backbone(nn.Module):
    """What pretraining, evaluations and export need of a network.

    `backbone(images)` takes normalised images: x -> (x - mean) / std of each channel, with x in
    [0, 1] and mean and std as in `metadata`. `dino_xcit.preprocess(backbone)` makes such images.
    `torch.jit.trace` and `quantize_dynamic` take it; `torch.jit.script` does not.

    A subclass sets the attributes and implements `forward` and `patch_tokens`; the other methods
    have defaults. `build_backbone` chooses the subclass by the name that `--arch` gives.
    """

    arch: str
    """name that `build_backbone` takes"""
    in_chans: int
    """channels of the images"""
    patch_size: int
    """pixels on a side of a patch, which is a cell of the grid of `patch_tokens`"""
    embed_dim: int
    """channels C of a feature"""
    path_shape: tuple[int, int]
    """layers and residual branches per layer that stochastic depth may drop; (0, 0): none"""
    metadata: dict[str, Any]
    """what a weights file holds beside the tensors; `weights/` sets it"""
    class_attention: Callable[[Tensor], Tensor] | None = None
    """Softmax weights of the class token: images (B, in_chans, H, W) -> (B, layers, h, 1 + N).

    Each row sums to one. The class token's own weight is first, then the patches' in row-major
    order. None: the network has no class attention.
    """

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Compute the feature of each image.

        Args:
            images: normalised, (B, in_chans, H, W).
            paths: stochastic depth, (B, *path_shape): a factor for each residual branch of each
                sample, 0 where the branch is dropped; None: 1.

        Returns:
            Features, (B, C).
        """
        raise NotImplementedError

    def layer_features(self, images: Tensor) -> Tensor:
        """Compute the features that k-NN and linear probes select from.

        Returns:
            (B, P, C); [:, 0] is the result of `forward`.
        """
        features: Tensor = self(images)
        return features[:, None]

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Compute the normed patch tokens of the last layer, (B, N, C), in row-major order."""
        raise NotImplementedError

    def compiled_regions(self) -> Sequence[nn.Module]:
        """The modules that `--compile` compiles, each on its own."""
        return (self,)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which calls this first and cannot read these networks."""
        raise UserError(
            "torch.jit.script does not take this network; expected torch.jit.trace(backbone, "
            "images), for one image size, or torch.export (dino-xcit export --format torch_export)"
        )

    def check_image_size(self, size: int, flag: str) -> None:
        """Check that the network takes square images; called once, before training.

        Args:
            size: side of the images in pixels.
            flag: the option that sets it.

        Raises:
            UserError: the network does not take them; the message names the flag.
        """
