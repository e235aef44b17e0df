"""XCiT, the Cross-Covariance Image Transformer (El-Nouby et al., 2021, arXiv:2106.09681).

Parameter names and shapes are timm's (`timm/models/xcit.py`), so a state dict loads strictly either
way. The docstring of `xcit_layers.py` lists how the layers differ from the paper's code.

Axes: B images, N patch tokens, C channels, h heads, H x W the grid of patches.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import BRANCHES, CLASS_ATTENTION_LAYERS, resolve_architecture
from dino_xcit.model.backbone import Backbone
from dino_xcit.model.xcit_layers import (
    LAYER_NORM_EPS,
    ClassAttentionBlock,
    ConvPatchEmbed,
    FourierPositions,
    XCABlock,
)
from dino_xcit.private_names import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class XCiT(Backbone):
    """Images (B, in_chans, H, W) -> normed class token (B, C) of the last layer.

    Stochastic depth, which only the XCA layers have, as published, comes with the images: see
    `paths` of `xca_tokens`.

    Args:
        arch: any name that `resolve_architecture` takes.
        in_chans: channels of the images.
        grad_checkpointing: recompute each XCA layer in the backward pass, which needs less memory
            and about a third more time.
        xca: False: no cross-covariance attention (the paper's ablation, table 4, as the rest).
        lpi: False: no local patch interaction.
        l2_norm: False: no L2 normalisation of queries and keys.
        learned_temperature: False: the temperature of XCA is 1.
    """

    def __init__(
        self,
        arch: str,
        *,
        in_chans: int = 3,
        grad_checkpointing: bool = False,
        xca: bool = True,
        lpi: bool = True,
        l2_norm: bool = True,
        learned_temperature: bool = True,
    ) -> None:
        super().__init__()
        self.arch, architecture, self.patch_size = resolve_architecture(arch)
        self.in_chans = in_chans
        self.metadata: dict[str, Any] = {}
        self.embed_dim = architecture.dim
        self.heads = architecture.heads
        self.path_shape = (architecture.depth, BRANCHES)
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed = ConvPatchEmbed(self.patch_size, in_chans, self.embed_dim)
        self.pos_embed = FourierPositions(self.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.blocks = nn.ModuleList(
            XCABlock(architecture, xca, lpi, l2_norm, learned_temperature)
            for _ in range(architecture.depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(architecture) for _ in range(CLASS_ATTENTION_LAYERS)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=LAYER_NORM_EPS)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_initialise)

    # -- features ------------------------------------------------------------------------------

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        tokens, _, _ = self.xca_tokens(images, paths)
        x, _ = self.attend(tokens, class_token_only=True)
        return self._normed(x[:, 0])

    def forward_features(self, images: Tensor) -> Tensor:
        """Every token of the last layer, normed, class token first, (B, 1 + N, C), as in timm."""
        tokens, _, _ = self.xca_tokens(images)
        x, _ = self.attend(tokens, class_token_only=False)
        return self._normed(x)

    def patch_tokens(self, images: Tensor) -> Tensor:
        """See `Backbone.patch_tokens`."""
        return self.forward_features(images)[:, 1:]

    def layer_features(self, images: Tensor) -> Tensor:
        """See `Backbone.layer_features`; P is the number of class-attention layers + 1.

        The class token of each class-attention layer, the last layer's first, then the mean of the
        last layer's patch tokens; all normed.
        """
        tokens, _, _ = self.xca_tokens(images)
        x = self._with_class_token(tokens)
        class_tokens = []
        for block in self.cls_attn_blocks:
            x, _ = block(x, class_token_only=False)
            class_tokens.append(self._normed(x[:, 0]))
        return torch.stack([*reversed(class_tokens), self._normed(x[:, 1:]).mean(1)], dim=1)

    def class_attention(self, images: Tensor) -> Tensor:
        """See `Backbone.class_attention`."""
        tokens, _, _ = self.xca_tokens(images)
        _, attentions = self.attend(tokens, class_token_only=True)
        return torch.stack(attentions, dim=1)

    def xca_features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens after some of the XCA layers, counted from 0, as feature maps (B, C, H, W)."""
        tokens, H, W = self._embed_patches(images)
        after: list[Tensor] = []
        for layer in range(max(layers) + 1):
            tokens = self._xca_layer(layer, tokens, H, W)
            after.append(tokens)
        return [after[layer].mT.unflatten(-1, (H, W)) for layer in layers]

    # -- the two halves of the network ---------------------------------------------------------

    def xca_tokens(self, images: Tensor, paths: Tensor | None = None) -> tuple[Tensor, int, int]:
        """First half: patch tokens after the XCA layers.

        Args:
            images: (B, in_chans, H, W).
            paths: stochastic depth, (B, layers, 3): the factors of the three residual branches of
                each layer; None: 1.

        Returns:
            Tokens (B, N, C) and the grid H, W.

        Raises:
            UserError: the images have other channels, or the patch size does not divide a side.
        """
        tokens, H, W = self._embed_patches(images)
        for layer in range(len(self.blocks)):
            tokens = self._xca_layer(layer, tokens, H, W, paths)
        return tokens, H, W

    def attend(self, tokens: Tensor, class_token_only: bool) -> tuple[Tensor, list[Tensor]]:
        """Second half: the class-attention layers.

        Args:
            tokens: patch tokens after the XCA layers, (B, N, C).
            class_token_only: do not compute the patch tokens of the last layer.

        Returns:
            Output of the last layer, not normed, class token first (B, 1 + N, C), or the class
            token (B, 1, C); and each layer's softmax weights (B, h, 1 + N).
        """
        x = self._with_class_token(tokens)
        attentions = []
        for block in self.cls_attn_blocks:
            x, attention = block(x, class_token_only and block is self.cls_attn_blocks[-1])
            attentions.append(attention)
        return x, attentions

    def _embed_patches(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Tokens before the first XCA layer (B, N, C) and the grid H, W."""
        self._check(images)
        tokens, H, W = self.patch_embed(images)
        # Under autocast both are of half precision, the tokens between layers are not: the first
        # layer takes what the others take, or it would be compiled a second time.
        return tokens + self.pos_embed(H, W).to(self.cls_token.dtype), H, W

    def _xca_layer(
        self, layer: int, tokens: Tensor, H: int, W: int, paths: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, C) after this XCA layer."""
        block = self.blocks[layer]
        factors = None if paths is None else paths[:, layer]
        run: Callable[..., Tensor] = block
        if self.grad_checkpointing and self.training:
            contexts = functools.partial(_checkpoint_contexts, block)
            run = functools.partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
        return run(tokens, H, W, factors)

    def _with_class_token(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, 1 + N, C)."""
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _normed(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.norm(tokens)
        return normed

    # -- compilation and checks ----------------------------------------------------------------

    def compiled_regions(self) -> Sequence[nn.Module]:
        """The stem and each XCA layer; the layers share their code, compiled once per crop size."""
        return (self.patch_embed, *self.blocks)

    def check_image_size(self, size: int, flag: str) -> None:
        """See `Backbone.check_image_size`."""
        try:
            self._check_sides(size, size)
        except UserError as error:
            raise UserError(f"--{flag} {size}: {error}") from None

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(
                f"images have the shape {tuple(images.shape)}; expected (B, {self.in_chans}, H, W)"
            )
        _, channels, height, width = images.shape
        if channels != self.in_chans:
            raise UserError(
                f"images have {channels} channels, this network takes {self.in_chans}; "
                f"set --in_chans {channels}"
            )
        self._check_sides(height, width)

    def _check_sides(self, height: int, width: int) -> None:
        p = self.patch_size
        if not (height % p or width % p):
            return
        smaller, larger = (height // p, width // p), (-(-height // p), -(-width // p))
        nearest = " or ".join(f"{h * p} x {w * p}" for h, w in (smaller, larger) if h and w)
        raise UserError(
            f"image of {height} x {width} pixels: patch size {p} must divide both; "
            f"nearest: {nearest}"
        )


def with_class_attention(backbone: nn.Module) -> XCiT:
    """The backbone itself, if its class token attends.

    Raises:
        UserError: it has no class attention.
    """
    if not isinstance(backbone, XCiT):
        name = getattr(backbone, "arch", type(backbone).__name__)
        raise UserError(f"{name} has no class-attention layers; expected the weights of an XCiT")
    return backbone


def _checkpoint_contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of a layer's forward pass and of its recomputation."""
    return contextlib.nullcontext(), _frozen_statistics(block)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics.

    The forward pass has updated the statistics; its recomputation for the backward pass must not
    count the batch a second time.
    """
    kept = [
        (norm, name, buffer)
        for norm in block.modules()
        if isinstance(norm, BatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
