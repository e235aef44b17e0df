"""Backbone + images -> what it looks at.

The class token's softmax weights (XCiT, section 3.4 and figure 7) are what DINO draws of a ViT. Of XCiT alone there are the
magnitudes of queries and keys at every patch and their cross-covariance (section 3.2 and the appendix on visualisation).

Axes: B images, h heads, H x W grid of patches, N = H W, C channels, d = C / h channels per head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import CLASS_ATTENTION_LAYERS
from dino_xcit.model.xcit import XCiT, with_class_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

FEATURE_PARTS = 3  # principal components that become red, green and blue
CLIPPED = 0.01  # share of patches beyond either end of each colour channel
SPARE = 2.0  # what the allocator keeps (`machine.keep_freed_memory`), buffers of the convolutions


class AttentionMaps(NamedTuple):
    """What one pass of the backbone over a batch showed."""

    attention: Tensor
    """(B, h, H, W): softmax weights of the class token; a map sums to the share that goes to patches"""
    queries: Tensor | None
    """(B, h, H, W): length of a patch's query, after the L2 norm over patches that XCA takes"""
    keys: Tensor | None
    """(B, h, H, W): length of its key"""
    covariance: Tensor | None
    """(B, h, d, d): cross-covariance of queries (rows) and keys (columns), cosines from -1 to 1"""
    features: Tensor | None
    """(B, C, H, W): the last layer's patch tokens, normed, as timm's `forward_features`"""


@torch.no_grad()
def look(
    backbone: XCiT,
    images: Tensor,
    *,
    layer: int = -1,
    xca_layer: int | None = None,
    features: bool = False,
) -> AttentionMaps:
    """Normalised images (B, C, H * patch, W * patch) -> everything asked for, in one pass.

    layer: which class-attention layer. xca_layer: which XCA layer's queries and keys, None for none. features: the patch
    tokens too. Raises ValueError if there is no such layer or the patch size does not divide the image.
    """
    check_layer("layer", layer, CLASS_ATTENTION_LAYERS)
    inputs: list[Tensor] = []
    if xca_layer is not None:
        check_layer("xca_layer", xca_layer, len(backbone.blocks))
        xca = _xca(backbone, xca_layer)
        hook = xca.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        tokens, H, W = backbone.xca_tokens(images)
    finally:
        if xca_layer is not None:
            hook.remove()
    x, attentions = backbone.attend(tokens, class_token_only=not features)
    attention = attentions[layer][:, :, 1:].unflatten(-1, (H, W)).float()
    patches = backbone.norm(x[:, 1:]).mT.unflatten(-1, (H, W)).float() if features else None
    if xca_layer is None:
        return AttentionMaps(attention, None, None, None, patches)
    q, k = _queries_and_keys(xca, inputs[0])
    lengths = [t.norm(dim=-1).mT.unflatten(-1, (H, W)) for t in (q, k)]  # (B, h, H, W)
    with torch.autocast(images.device.type, enabled=False):
        covariance = torch.einsum("bnhi,bnhj->bhij", q, k)
    return AttentionMaps(attention, lengths[0], lengths[1], covariance, patches)


def class_attention(backbone: nn.Module, images: Tensor, layer: int = -1) -> Tensor:
    """Normalised images (B, C, H, W) -> softmax weights on the patches (B, heads, H / patch, W / patch).

    layer: which class-attention layer, the last by default. A map sums to the share that goes to patches, which is one less
    what the class token keeps for itself. Raises ValueError if the backbone is not an XCiT, has no such layer, or the patch
    size does not divide the image.
    """
    return look(with_class_attention(backbone), images, layer=layer).attention


def check_layer(flag: str, layer: int, layers: int) -> None:
    """Raise ValueError, naming the flag, if there is no such layer."""
    if not -layers <= layer < layers:
        raise UserError(f"--{flag} is {layer}; expected 0 to {layers - 1}, or -1 for the last")


def _xca(backbone: XCiT, layer: int) -> Any:
    block: Any = backbone.blocks[layer]
    if not block.has_xca:
        raise UserError(
            "these weights are of the ablation without XCA (--xca false): no queries and keys in its layers"
        )
    return block.attn


def _queries_and_keys(xca: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What an XCA layer is given -> its queries and keys, L2-normalised over patches (B, N, h, d)."""
    qkv = xca.qkv(tokens).unflatten(-1, (3, xca.heads, -1)).float()  # (B, N, 3, h, d)
    return F.normalize(qkv[:, :, 0], dim=1), F.normalize(qkv[:, :, 1], dim=1)


def mass_mask(maps: Tensor, threshold: float) -> Tensor:
    """Maps (..., H, W) -> bool: the fewest patches that hold this share of each map's mass.

    As official `visualize_attention.py --threshold`: of the patches in rising order, those whose running sum is over
    1 - threshold.
    """
    values, order = maps.flatten(-2).double().sort(dim=-1, stable=True)
    kept = values.cumsum(-1) > (1 - threshold) * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept).unflatten(-1, maps.shape[-2:])


def entropy(maps: Tensor) -> Tensor:
    """Maps (..., H, W) -> entropy in nats of each, its mass brought to one; at most ln(H W), where it looks nowhere."""
    p = maps.flatten(-2).double()
    return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)


def similarity(features: Tensor, row: int, column: int) -> Tensor:
    """Patch features (C, H, W) -> cosine of each patch's with those of the patch at (row, column), (H, W)."""
    directions = F.normalize(features.float(), dim=0)
    return torch.einsum("chw,c->hw", directions, directions[:, row, column])


def pca_colours(features: Sequence[Tensor]) -> list[Tensor]:
    """Patch features (C, H, W) of several images -> the three leading principal components as red, green, blue in [0, 1],
    (H, W, 3). One basis and one scale for all of them, so the same colour means the same in each."""
    rows = [f.flatten(1).mT.double() for f in features]  # (N, C)
    everything = torch.cat(rows)
    mean = everything.mean(0)
    _, vectors = torch.linalg.eigh(
        (everything - mean).mT @ (everything - mean)
    )  # rising eigenvalues
    basis = vectors[:, -FEATURE_PARTS:].flip(1)  # (C, 3)
    strongest = basis.abs().argmax(0)
    basis = (
        basis * basis[strongest, torch.arange(FEATURE_PARTS)].sign()
    )  # a component's sign says nothing: fix it
    parts = [(r - mean) @ basis for r in rows]
    ends = [_quantiles(torch.cat(parts)[:, i]) for i in range(FEATURE_PARTS)]
    low, high = (torch.stack(end) for end in zip(*ends, strict=True))
    spread = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return [
        ((p - low) / spread).clamp(0, 1).unflatten(0, f.shape[1:]).float()
        for p, f in zip(parts, features, strict=True)
    ]


def _quantiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values that CLIPPED of the others are below and above. (torch.quantile takes 16 million at most.)"""
    ordered = values.sort().values
    skipped = math.floor(CLIPPED * (len(ordered) - 1))
    return ordered[skipped], ordered[-1 - skipped]


def jaccard(masks: Tensor, truth: Tensor, counted: Tensor | None = None) -> Tensor:
    """Jaccard index (intersection over union) of masks (..., H, W) with the truth, bool; NaN where both are empty.

    counted: pixels that count, all by default.
    """
    counted = torch.ones_like(truth) if counted is None else counted
    both, either = masks & truth & counted, (masks | truth) & counted
    return both.sum((-1, -2)).double() / either.sum((-1, -2))


def bytes_per_pixel(backbone: XCiT) -> float:
    """About how much memory a pass over one image takes, besides the weights, for each of its pixels, in float32.

    The image twice (as read and channels last), and the larger of what the stem's first stage and an XCA layer hold at once;
    `eval/speed/attention.py` measures it. Queries, keys and features fit into what the layers leave.
    """
    C, p = backbone.embed_dim, backbone.patch_size
    stem = backbone.patch_embed.proj[0][0].out_channels / 4 * 2  # type: ignore[index]
    layer = (
        12 * C + 3 * 64
    ) / p**2  # the MLP's hidden units before and after GELU, tokens, queries; the positions' waves
    return SPARE * 4 * (2 * backbone.in_chans + max(stem, layer))
