"""XCiT, the Cross-Covariance Image Transformer (El-Nouby et al., 2021, arXiv:2106.09681), as a backbone.

Parameter names and shapes are timm's (`timm/models/xcit.py`), so a state dict goes either way with strict loading.
What differs from the paper's code is how the same function is computed:

- XCA (section 3.2) forms the d x d matrix from unnormalised queries and keys and divides it by their norms.
- Tokens (B, N, C) are seen by the LPI convolutions as a channels-last image: nothing is copied.
- Class attention folds the query into the key projection and pools tokens before the value projection: the two N x C x C
  products per layer become N x C x heads.
- The sines and cosines of the Fourier positions are computed once per grid size.

Axes: B images, N patch tokens, C channels, h heads, d = C / h channels per head, H x W grid of patches.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import (
    BRANCHES,
    CLASS_ATTENTION_LAYERS,
    Architecture,
    resolve_architecture,
)
from dino_xcit.model.backbone import Backbone

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYER_NORM_EPS = 1e-6


class FourierPositions(nn.Module):
    """Sine and cosine position code of a grid of any size, projected to C channels (section 3.4)."""

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.0) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, kernel_size=1)
        self.hidden_dim = hidden_dim
        self.temperature = temperature
        self._waves: dict[tuple[int, int, torch.device], Tensor] = {}

    def waves(self, H: int, W: int, device: torch.device) -> Tensor:
        """(H * W, 2 * hidden_dim) of constants: the vertical code, then the horizontal one."""
        if torch.compiler.is_exporting():
            return self._compute(H, W, device)  # H and W are symbols
        key = (H, W, device)
        if key not in self._waves:
            with torch.inference_mode(False):  # what is kept must serve training too
                self._waves[key] = self._compute(H, W, device)
        return self._waves[key]

    def _compute(self, H: int, W: int, device: torch.device) -> Tensor:
        rows = self._axis(H, device)[:, None].expand(H, W, self.hidden_dim)
        columns = self._axis(W, device)[None, :].expand(H, W, self.hidden_dim)
        return torch.cat([rows, columns], dim=-1).reshape(H * W, 2 * self.hidden_dim)

    def _axis(self, size: int, device: torch.device) -> Tensor:
        position = torch.arange(1, size + 1, device=device, dtype=torch.float32)
        position = position / (size + 1e-6) * (2 * math.pi)
        frequency = torch.arange(self.hidden_dim, device=device, dtype=torch.float32)
        frequency = self.temperature ** (
            2 * torch.div(frequency, 2, rounding_mode="floor") / self.hidden_dim
        )
        angle = position[:, None] / frequency  # (size, hidden_dim)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)

    def forward(self, H: int, W: int) -> Tensor:
        projection = self.token_projection
        waves = self.waves(H, W, projection.weight.device).to(projection.weight.dtype)
        return F.linear(waves, projection.weight.flatten(1), projection.bias)  # (N, C)


class ConvPatchEmbed(nn.Module):
    """Stem: strided 3 x 3 convolutions that halve the image until one pixel is one patch (section 3.4)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [in_chans] + [dim >> (halvings - 1 - i) for i in range(halvings)]
        layers: list[nn.Module] = []
        for i in range(halvings):
            convolution = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(widths[i + 1])), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(
            images.contiguous(memory_format=torch.channels_last)
        )  # (B, C, H, W), channels last
        H, W = x.shape[-2:]
        return x.permute(0, 2, 3, 1).flatten(1, 2), H, W  # (B, N, C)


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3 x 3 convolutions over the grid of tokens (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        x = tokens.unflatten(1, (H, W)).permute(0, 3, 1, 2)  # (B, C, H, W), channels last, a view
        x = self.conv2(self.bn(self.act(self.conv1(x))))
        return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)


class XCA(nn.Module):
    """Cross-covariance attention: channels attend to channels, within each head (section 3.2)."""

    def __init__(
        self, dim: int, heads: int, l2_norm: bool = True, learned_temperature: bool = True
    ) -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        temperature = torch.ones(heads, 1, 1)
        if learned_temperature:
            self.temperature = nn.Parameter(temperature)
        else:
            self.register_buffer("temperature", temperature, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.unbind(2)
        if self.l2_norm:
            # Over tokens, (B, 2, h, d). Here `vector_norm` takes ten times as long on a CPU.
            qk = qkv[:, :, :2].float() if qkv.dtype == torch.float16 else qkv[:, :, :2]
            dtype = torch.promote_types(qkv.dtype, torch.float32)
            norms = (qk * qk).sum(1, dtype=dtype).clamp_min(1e-24).sqrt()
            if (
                v.dtype == torch.float16
            ):  # whose range the products of unnormalised tokens may leave
                q, k = q / norms[:, None, 0], k / norms[:, None, 1]
                norms = torch.ones_like(norms)
        attention = torch.einsum("bnhi,bnhj->bhij", q, k)  # (B, h, d, d)
        if self.l2_norm:
            attention = attention / (norms[:, 0, :, :, None] * norms[:, 1, :, None, :])
        attention = (attention * self.temperature).softmax(-1).to(v.dtype)
        return self.proj(torch.einsum("bnhj,bhij->bnhi", v, attention).flatten(2))  # (B, N, C)


class XCABlock(nn.Module):
    """XCA, LPI and MLP, each a residual branch with LayerScale. The norms are numbered as in the official code."""

    def __init__(
        self,
        architecture: Architecture,
        xca: bool,
        lpi: bool,
        l2_norm: bool,
        learned_temperature: bool,
    ) -> None:
        super().__init__()
        dim = architecture.dim
        self.has_xca, self.has_lpi = xca, lpi
        if xca:
            self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.attn = XCA(dim, architecture.heads, l2_norm, learned_temperature)
            self.gamma1 = nn.Parameter(architecture.eta * torch.ones(dim))
        if lpi:
            self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
            self.local_mp = LPI(dim)
            self.gamma3 = nn.Parameter(architecture.eta * torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma2 = nn.Parameter(architecture.eta * torch.ones(dim))

    def forward(self, x: Tensor, H: int, W: int, paths: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C); paths (B, 3): factors of the three branches, by sample."""
        xca, lpi, mlp = (
            (1,) * BRANCHES if paths is None else paths.to(x.dtype)[..., None, None].unbind(1)
        )  # (B, 1, 1)
        # LayerScale times factor first: the backward pass then keeps no second copy of an update.
        if self.has_xca:
            x = x + self.gamma1 * xca * self.attn(self.norm1(x))
        if self.has_lpi:
            x = x + self.gamma3 * lpi * self.local_mp(self.norm3(x), H, W)
        return x + self.gamma2 * mlp * self.mlp(self.norm2(x))


class ClassAttention(nn.Module):
    """The class token attends to itself and to every patch token (CaiT, arXiv:2103.17239; section 3.4)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def _per_head(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (h, d, C) and bias (h, d)."""
        return linear.weight.unflatten(0, (self.heads, -1)), linear.bias.unflatten(
            0, (self.heads, -1)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, C), class token first -> its update (B, 1, C) and its softmax weights (B, h, 1 + N)."""
        q = self.q(tokens[:, 0]).unflatten(-1, (self.heads, -1))  # (B, h, d)
        q = q * q.shape[-1] ** -0.5
        weight, bias = self._per_head(self.k)
        query = torch.einsum("bhd,hdc->bhc", q, weight)
        # The key bias adds the same to every token; it stays because its gradient is part of the published function.
        logits = query @ tokens.transpose(1, 2) + (q * bias).sum(-1, keepdim=True)  # (B, h, 1 + N)
        attention = logits.softmax(-1)
        weight, bias = self._per_head(self.v)
        pooled = attention.to(tokens.dtype) @ tokens  # (B, h, C)
        update = torch.einsum("bhc,hdc->bhd", pooled, weight) + bias
        return self.proj(update.flatten(1))[:, None], attention


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token.

    As published, patch tokens are rescaled along the way (their normed copy is added, and the second residual doubles
    them), which the next layer's keys and values see.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim, eta = architecture.dim, architecture.eta
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(dim, architecture.heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.tokens_norm = architecture.tokens_norm

    def forward(self, x: Tensor, class_token_only: bool) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, C) -> the same, or (B, 1, C) without the work on patch tokens; and the weights (B, h, 1 + N)."""
        normed = self.norm1(x)
        update, attention = self.attn(normed)
        token = x[:, :1] + self.gamma1 * update
        token = self.norm2(token)
        token = token + self.gamma2 * self.mlp(token)
        if class_token_only:
            return token, attention
        patches = x[:, 1:] + self.gamma1 * normed[:, 1:]
        patches = 2 * (self.norm2(patches) if self.tokens_norm else patches)
        return torch.cat([token, patches], dim=1), attention


class XCiT(Backbone):
    """Backbone: images (B, in_chans, H, W) -> class token (B, C) of the last layer.

    Stochastic depth, in the XCA layers alone as published, comes with the images: `paths` of `xca_tokens`.

    arch: any name that `resolve_architecture` knows.
    in_chans: channels of the images.
    grad_checkpointing: recompute each XCA layer in the backward pass: less memory, about a third more time.
    xca, lpi, l2_norm, learned_temperature: the paper's ablations (table 4), each off when False.
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
        self.metadata: dict[
            str, Any
        ] = {}  # what a weights file says beside the tensors; `weights.py` fills it
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

    def xca_tokens(self, images: Tensor, paths: Tensor | None = None) -> tuple[Tensor, int, int]:
        """Images -> tokens after the XCA layers (B, N, C) and the grid H, W.

        paths: stochastic depth (B, layers, 3), the factors of each layer's three residual branches; none: 1.
        Raises ValueError if the image does not have this network's channels or the patch size does not divide it.
        """
        for layer in self._layers(images, paths):  # noqa: B007
            pass
        return layer

    def xca_features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Images -> tokens after these XCA layers, from 0, as images (B, C, H, W)."""
        after = {
            layer: tokens.mT.unflatten(-1, (H, W))
            for layer, (tokens, H, W) in enumerate(self._layers(images))
            if layer in layers
        }
        return [after[layer] for layer in layers]

    def _layers(
        self, images: Tensor, paths: Tensor | None = None
    ) -> Iterator[tuple[Tensor, int, int]]:
        """Tokens (B, N, C) and the grid, after each XCA layer."""
        self._check(images)
        tokens, H, W = self.patch_embed(images)
        tokens = tokens + self.pos_embed(H, W)
        for layer, block in enumerate(self.blocks):
            of_layer = None if paths is None else paths[:, layer]
            if self.grad_checkpointing and self.training:
                recompute = lambda block=block: (
                    contextlib.nullcontext(),
                    _frozen_statistics(block),
                )
                tokens = checkpoint(
                    block, tokens, H, W, of_layer, use_reentrant=False, context_fn=recompute
                )
            else:
                tokens = block(tokens, H, W, of_layer)
            yield tokens, H, W

    def patch_tokens(self, images: Tensor) -> Tensor:
        """See `Backbone.patch_tokens`."""
        return self.forward_features(images)[:, 1:]

    def compiled_regions(self) -> Sequence[nn.Module]:
        """The stem and each XCA layer: layers are one function, compiled once a kind of crop."""
        return (self.patch_embed, *self.blocks)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images -> every token of the last layer, normed, class token first (B, 1 + N, C), as in timm."""
        return self.norm(self.attend(self.xca_tokens(images)[0], class_token_only=False)[0])

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        return self.norm(
            self.attend(self.xca_tokens(images, paths)[0], class_token_only=True)[0][:, 0]
        )

    def layer_features(self, images: Tensor) -> Tensor:
        """Images -> what linear probes choose from, each normed: (B, class-attention layers + 1, C).

        The class token of each class-attention layer, the last layer's first (so [:, 0] is what `forward` gives), and the
        mean of the last layer's patch tokens.
        """
        tokens = self.xca_tokens(images)[0]
        x = torch.cat(
            [self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1
        )  # (B, 1 + N, C)
        class_tokens = []
        for block in self.cls_attn_blocks:
            x, _ = block(x, class_token_only=False)
            class_tokens.append(self.norm(x[:, 0]))
        return torch.stack([*reversed(class_tokens), self.norm(x[:, 1:]).mean(1)], dim=1)

    def class_attention(self, images: Tensor) -> Tensor:
        """Softmax weights of the class token: (B, class-attention layers, h, 1 + N), the class token itself first.

        Each row sums to one. Patches are in row-major order of the (H / patch, W / patch) grid.
        """
        return torch.stack(self.attend(self.xca_tokens(images)[0], class_token_only=True)[1], dim=1)

    def attend(self, tokens: Tensor, class_token_only: bool) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens after the XCA layers (B, N, C) -> the class-attention layers' output, not normed, class token first
        (B, 1 + N, C), or that token alone (B, 1, C); and each layer's softmax weights (B, h, 1 + N)."""
        x = torch.cat(
            [self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1
        )  # (B, 1 + N, C)
        attentions = []
        for block in self.cls_attn_blocks:
            x, attention = block(x, class_token_only and block is self.cls_attn_blocks[-1])
            attentions.append(attention)
        return x, attentions

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(
                f"images have the shape {tuple(images.shape)}; expected (B, {self.in_chans}, H, W)"
            )
        _, channels, height, width = images.shape
        if channels != self.in_chans:
            raise UserError(
                f"images have {channels} channels, this network takes {self.in_chans}; set --in_chans {channels}"
            )
        p = self.patch_size
        if height % p or width % p:
            near = " or ".join(
                f"{height // p * p + p * down} x {width // p * p + p * across}"
                for down, across in ((0, 0), (1 if height % p else 0, 1 if width % p else 0))
                if height // p + down and width // p + across
            )
            raise UserError(
                f"image of {height} x {width} pixels: patch size {p} must divide both; nearest: {near}"
            )


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their running statistics: these were updated once, in the forward pass, and
    recomputing it for the backward pass must not count the batch twice."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update(
            {name: None if b is None else b.clone() for name, b in norm._buffers.items()}
        )
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def with_class_attention(backbone: nn.Module) -> XCiT:
    """The backbone, which is one whose class token attends.

    Raises:
        UserError: it is another network.
    """
    if not isinstance(backbone, XCiT):
        name = getattr(backbone, "arch", type(backbone).__name__)
        raise UserError(f"{name} has no class-attention layers; expected the weights of an XCiT")
    return backbone
