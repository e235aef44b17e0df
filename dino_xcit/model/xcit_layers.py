"""The layers of XCiT: stem, positions, XCA and class attention (arXiv:2106.09681).

Parameter names and shapes are timm's (`timm/models/xcit.py`). They compute the functions of the
paper's code in another way:

- XCA (section 3.2) forms the d x d matrix from unnormalised queries and keys and divides it by
  their norms.
- The LPI convolutions read the tokens (B, N, C) as a channels-last image, without a copy.
- Class attention folds the query into the key projection and pools tokens before the value
  projection: the two N x C x C products per layer become N x C x h.
- The sines and cosines of the Fourier positions are kept for the last few grid sizes.

Axes: B images, N patch tokens, C channels, h heads, d = C / h channels per head, H x W the grid of
patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from dino_xcit.model.architectures import BRANCHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.model.architectures import Architecture

LAYER_NORM_EPS = 1e-6
GRIDS = 8
"""grids whose Fourier positions are kept: more than the sizes of crops of a run"""


class FourierPositions(nn.Module):
    """Sines and cosines of the positions in a grid of any size, projected to C channels.

    Section 3.4. (H, W) -> (N, C).
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.0) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, kernel_size=1)
        self.hidden_dim = hidden_dim
        self.temperature = temperature
        self._waves: dict[tuple[int, int, torch.device], Tensor] = {}

    def waves(self, H: int, W: int, device: torch.device) -> Tensor:
        """Sines and cosines, (N, 2 * hidden_dim): the vertical code, then the horizontal one."""
        if torch.compiler.is_exporting():
            return self._compute(H, W, device)  # H and W are symbols, which no cache can hold
        key = (H, W, device)
        if key not in self._waves:
            if len(self._waves) == GRIDS:  # detectors and folders of photos have ever new sizes
                del self._waves[next(iter(self._waves))]
            with torch.inference_mode(False):  # training may use the cached tensor later
                self._waves[key] = self._compute(H, W, device)
        return self._waves[key]

    def _compute(self, H: int, W: int, device: torch.device) -> Tensor:
        rows = self._axis(H, device)[:, None].expand(H, W, self.hidden_dim)
        columns = self._axis(W, device)[None, :].expand(H, W, self.hidden_dim)
        return torch.cat([rows, columns], dim=-1).reshape(H * W, 2 * self.hidden_dim)

    def _axis(self, size: int, device: torch.device) -> Tensor:
        """Code of the positions along one axis, (size, hidden_dim)."""
        position = torch.arange(1, size + 1, device=device, dtype=torch.float32)
        position = position / (size + 1e-6) * (2 * math.pi)
        frequency = torch.arange(self.hidden_dim, device=device, dtype=torch.float32)
        frequency = self.temperature ** (
            2 * torch.div(frequency, 2, rounding_mode="floor") / self.hidden_dim
        )
        angle = position[:, None] / frequency  # (size, hidden_dim)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)

    def forward(self, H: int, W: int) -> Tensor:
        """Position code of the grid, (N, C)."""
        projection = self.token_projection
        waves = self.waves(H, W, projection.weight.device).to(projection.weight.dtype)
        return F.linear(waves, projection.weight.flatten(1), projection.bias)  # (N, C)


class ConvPatchEmbed(nn.Module):
    """Stem: strided 3 x 3 convolutions halve the image until a pixel is a patch (section 3.4)."""

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
        """Images -> tokens (B, N, C) and the grid H, W."""
        images = images.contiguous(memory_format=torch.channels_last)
        x: Tensor = self.proj(images)  # (B, C, H, W), channels last
        H, W = x.shape[-2:]
        return x.permute(0, 2, 3, 1).flatten(1, 2), H, W  # (B, N, C)


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3 x 3 convolutions over the grid (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        # A view, (B, C, H, W), channels last.
        x: Tensor = tokens.unflatten(1, (H, W)).permute(0, 3, 1, 2)
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
        """(B, N, C) -> (B, N, C)."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.unbind(2)
        if self.l2_norm:
            # Norms over the tokens, (B, 2, h, d). `vector_norm` takes ten times as long on a CPU.
            qk = qkv[:, :, :2].float() if qkv.dtype == torch.float16 else qkv[:, :, :2]
            dtype = torch.promote_types(qkv.dtype, torch.float32)
            norms = (qk * qk).sum(1, dtype=dtype).clamp_min(1e-24).sqrt()
            if v.dtype == torch.float16:  # products of unnormalised tokens may exceed its range
                q, k = q / norms[:, None, 0], k / norms[:, None, 1]
                norms = torch.ones_like(norms)
        attention = torch.einsum("bnhi,bnhj->bhij", q, k)  # (B, h, d, d)
        if self.l2_norm:
            attention = attention / (norms[:, 0, :, :, None] * norms[:, 1, :, None, :])
        attention = (attention * self.temperature).softmax(-1).to(v.dtype)
        update: Tensor = self.proj(torch.einsum("bnhj,bhij->bnhi", v, attention).flatten(2))
        return update  # (B, N, C)


class XCABlock(nn.Module):
    """XCA layer: XCA, LPI and MLP, each a residual branch with LayerScale.

    The norms are numbered as in the official code.
    """

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
        """Update the tokens.

        Args:
            x: tokens, (B, N, C).
            H: rows of the grid.
            W: columns of the grid.
            paths: stochastic depth, (B, 3): each sample's factors of the three branches; None: 1.

        Returns:
            Tokens, (B, N, C).
        """
        factors: Sequence[Tensor | None] = (None,) * BRANCHES
        if paths is not None:
            factors = paths.to(x.dtype)[..., None, None].unbind(1)  # (B, 1, 1) each
        xca, lpi, mlp = factors
        # LayerScale times factor first: the backward pass then keeps no second copy of an update.
        if self.has_xca:
            x = x + _scale(self.gamma1, xca) * self.attn(self.norm1(x))
        if self.has_lpi:
            x = x + _scale(self.gamma3, lpi) * self.local_mp(self.norm3(x), H, W)
        update: Tensor = _scale(self.gamma2, mlp) * self.mlp(self.norm2(x))
        return x + update


def _scale(gamma: Tensor, factor: Tensor | None) -> Tensor:
    """LayerScale (C,), times each sample's factor (B, 1, 1) if there is one."""
    return gamma if factor is None else gamma * factor


class FoldedLinear(nn.Linear):
    """A linear layer whose weights are used without a call of it.

    As a class of its own, it stays as it is when `torch.ao.quantization.quantize_dynamic` replaces
    each `nn.Linear`.
    """

    def _get_name(self) -> str:
        return "Linear"  # the representation of a network is part of the key of cached features


class ClassAttention(nn.Module):
    """The class token attends to itself and to every patch token (section 3.4).

    From CaiT, arXiv:2103.17239.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = FoldedLinear(dim, dim)
        self.v = FoldedLinear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def _per_head(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (h, d, C) and bias (h, d)."""
        split = (self.heads, -1)
        return linear.weight.unflatten(0, split), linear.bias.unflatten(0, split)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Update of the class token, and where it attends.

        Args:
            tokens: (B, 1 + N, C), the class token first.

        Returns:
            The update (B, 1, C) and the softmax weights (B, h, 1 + N).
        """
        q = self.q(tokens[:, 0]).unflatten(-1, (self.heads, -1))  # (B, h, d)
        q = q * q.shape[-1] ** -0.5
        weight, bias = self._per_head(self.k)
        query = torch.einsum("bhd,hdc->bhc", q, weight)
        # The key bias adds the same to every token, so its gradient is rounding noise. It stays
        # because that gradient is part of the published function.
        logits = query @ tokens.transpose(1, 2) + (q * bias).sum(-1, keepdim=True)  # (B, h, 1 + N)
        attention = logits.softmax(-1)
        weight, bias = self._per_head(self.v)
        pooled = attention.to(tokens.dtype) @ tokens  # (B, h, C)
        update = torch.einsum("bhc,hdc->bhd", pooled, weight) + bias
        return self.proj(update.flatten(1))[:, None], attention


class ClassAttentionBlock(nn.Module):
    """Class-attention layer: class attention, then an MLP on the class token.

    As published, the layer also rescales the patch tokens (it adds their normed copy, and the
    second residual doubles them), which the keys and values of the next layer depend on.
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
        """Update the tokens.

        Args:
            x: (B, 1 + N, C), the class token first.
            class_token_only: do not compute the patch tokens.

        Returns:
            Tokens (B, 1 + N, C), or the class token (B, 1, C); and the softmax weights
            (B, h, 1 + N).
        """
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
