"""Images -> attention maps of a backbone, and what is computed from the maps.

The softmax weights of the class token (XCiT, section 3.4 and figure 7) are what DINO shows of a
ViT. XCA adds the magnitudes of queries and keys at every patch and their cross-covariance (section
3.2 and the appendix on visualisation).

Axes: B images, h heads, H x W grid of patches, N = H W, C channels, d = C / h channels per head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import CLASS_ATTENTION_LAYERS
from dino_xcit.model.xcit import with_class_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.model.xcit import XCiT
    from dino_xcit.model.xcit_layers import XCA, XCABlock

PCA_COMPONENTS = 3  # red, green and blue
CLIPPED = 0.01  # share of patches beyond either end of each colour channel
MEMORY_MARGIN = 2.0  # for what the allocator keeps and the buffers of the convolutions


class AttentionMaps(NamedTuple):
    """Maps of a batch of images, from one pass of the backbone; float32."""

    attention: Tensor
    """(B, h, H, W): softmax weights of the class token; a map sums to the share of the patches"""
    queries: Tensor | None
    """(B, h, H, W): length of a patch's query, after XCA's L2 norm over patches"""
    keys: Tensor | None
    """(B, h, H, W): length of its key"""
    covariance: Tensor | None
    """(B, h, d, d): cross-covariance of queries (rows) and keys (columns), cosines from -1 to 1"""
    features: Tensor | None
    """(B, C, H, W): the last layer's patch tokens, normed, as in timm's `forward_features`"""


@torch.no_grad()
def attention_maps(
    backbone: XCiT,
    images: Tensor,
    *,
    layer: int = -1,
    xca_layer: int | None = None,
    features: bool = False,
) -> AttentionMaps:
    """Compute all requested maps in one pass of the backbone.

    Args:
        backbone: in eval mode.
        images: normalised, (B, C, H * patch, W * patch).
        layer: class-attention layer.
        xca_layer: XCA layer of queries, keys and covariance; None leaves them out.
        features: whether to return the patch tokens too.

    Raises:
        UserError: there is no such layer, or the patch size does not divide the image.
    """
    check_layer("layer", layer, CLASS_ATTENTION_LAYERS)
    xca = None if xca_layer is None else _xca(backbone, xca_layer)
    inputs: list[Tensor] = []
    hooks = []
    if xca is not None:
        hooks.append(xca.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
    try:
        tokens, H, W = backbone.xca_tokens(images)
    finally:
        for hook in hooks:
            hook.remove()
    x, attentions = backbone.attend(tokens, class_token_only=not features)
    attention = attentions[layer][:, :, 1:].unflatten(-1, (H, W)).float()
    patches = backbone.norm(x[:, 1:]).mT.unflatten(-1, (H, W)).float() if features else None
    if xca is None:
        return AttentionMaps(attention, None, None, None, patches)
    q, k = _queries_and_keys(xca, inputs[0])
    lengths = [t.norm(dim=-1).mT.unflatten(-1, (H, W)) for t in (q, k)]  # (B, h, H, W)
    with torch.autocast(images.device.type, enabled=False):
        covariance = torch.einsum("bnhi,bnhj->bhij", q, k)
    return AttentionMaps(attention, lengths[0], lengths[1], covariance, patches)


def class_attention(backbone: nn.Module, images: Tensor, layer: int = -1) -> Tensor:
    """Compute the class token's softmax weights on the patches (XCiT, section 3.4).

    Args:
        backbone: an XCiT in eval mode, as `load_backbone` returns it.
        images: normalised, (B, C, H, W).
        layer: class-attention layer, by default the last.

    Returns:
        (B, heads, H / patch, W / patch). A map sums to the share of the patches: one minus the
        weight of the class token on itself.

    Raises:
        UserError: the backbone is not an XCiT, it has no such layer, or the patch size does not
        divide
            the image.
    """
    return attention_maps(with_class_attention(backbone), images, layer=layer).attention


def check_layer(flag: str, layer: int, layers: int) -> None:
    """Raise a UserError that names the flag if there is no such layer."""
    if not -layers <= layer < layers:
        raise UserError(f"--{flag} is {layer}; expected 0 to {layers - 1}, or -1 for the last")


def _xca(backbone: XCiT, layer: int) -> XCA:
    check_layer("xca_layer", layer, len(backbone.blocks))
    block = cast("XCABlock", backbone.blocks[layer])
    if not block.has_xca:
        raise UserError(
            "these weights are of the ablation without XCA (--xca false): "
            "their layers have no queries and keys"
        )
    return block.attn


def _queries_and_keys(xca: XCA, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Input tokens of an XCA layer -> its queries and keys (B, N, h, d), as XCA normalises them."""
    qkv = xca.qkv(tokens).unflatten(-1, (3, xca.heads, -1)).float()  # (B, N, 3, h, d)
    return F.normalize(qkv[:, :, 0], dim=1), F.normalize(qkv[:, :, 1], dim=1)


def mass_mask(maps: Tensor, threshold: float) -> Tensor:
    """Select the fewest patches that hold a share of each map's mass.

    As official `visualize_attention.py --threshold`: of the patches in ascending order, those whose
    running sum exceeds 1 - threshold.

    Args:
        maps: (..., H, W).
        threshold: share of the mass, between 0 and 1.

    Returns:
        bool (..., H, W)
    """
    values, order = maps.flatten(-2).double().sort(dim=-1, stable=True)
    kept = values.cumsum(-1) > (1 - threshold) * values.sum(-1, keepdim=True)
    mask: Tensor = torch.zeros_like(kept).scatter_(-1, order, kept)
    grid: Tensor = mask.unflatten(-1, maps.shape[-2:])
    return grid


def entropy(maps: Tensor) -> Tensor:
    """Entropy in nats of each map (..., H, W), as a distribution; at most ln(H W), if uniform."""
    p = maps.flatten(-2).double()
    nats: Tensor = torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1)
    return nats


def similarity(features: Tensor, row: int, column: int) -> Tensor:
    """Cosines (H, W) of the features (C, H, W) with those of the patch at (row, column)."""
    directions = F.normalize(features.float(), dim=0)
    return torch.einsum("chw,c->hw", directions, directions[:, row, column])


def pca_colours(features: Sequence[Tensor]) -> list[Tensor]:
    """Three leading principal components of patch features as red, green and blue.

    All images share one basis and one scale, so a colour means the same in each.

    Args:
        features: (C, H, W) of each image.

    Returns:
        (H, W, 3) in [0, 1] for each image.
    """
    rows = [f.flatten(1).mT.double() for f in features]  # (N, C)
    stacked = torch.cat(rows)
    mean = stacked.mean(0)
    _, vectors = torch.linalg.eigh((stacked - mean).mT @ (stacked - mean))  # ascending eigenvalues
    basis = vectors[:, -PCA_COMPONENTS:].flip(1)  # (C, 3)
    strongest = basis.abs().argmax(0)
    signs = basis[strongest, torch.arange(PCA_COMPONENTS)].sign()
    basis = basis * signs  # the sign of a component is arbitrary: fix it
    parts = [(r - mean) @ basis for r in rows]
    ranges = [_inner_range(torch.cat(parts)[:, i]) for i in range(PCA_COMPONENTS)]
    low, high = (torch.stack(bounds) for bounds in zip(*ranges, strict=True))
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return [
        ((p - low) / width).clamp(0, 1).unflatten(0, f.shape[1:]).float()
        for p, f in zip(parts, features, strict=True)
    ]


def _inner_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values that a share CLIPPED lies below and above; torch.quantile takes 16 million at most."""
    ordered = values.sort().values
    skipped = math.floor(CLIPPED * (len(ordered) - 1))
    return ordered[skipped], ordered[-1 - skipped]


def jaccard(masks: Tensor, truth: Tensor, counted: Tensor | None = None) -> Tensor:
    """Jaccard index (intersection over union) of masks and objects.

    Args:
        masks: bool (..., H, W).
        truth: bool, of a shape that broadcasts with the masks: the object.
        counted: bool, like `truth`: pixels that count; default: all.

    Returns:
        float64 (...); NaN where mask and object are both empty.
    """
    counted = torch.ones_like(truth) if counted is None else counted
    both, either = masks & truth & counted, (masks | truth) & counted
    return both.sum((-1, -2)).double() / either.sum((-1, -2))


def bytes_per_pixel(backbone: XCiT) -> float:
    """Estimate the memory of a pass over one image in bytes per pixel, float32, without weights.

    It is the image twice (as read and channels last), and the larger of what the first stage of the
    stem and an XCA layer hold at once; `eval/speed/attention.py` measures it. Queries, keys and
    features fit into the memory that the layers free.
    """
    C, p = backbone.embed_dim, backbone.patch_size
    first = next(m for m in backbone.patch_embed.modules() if isinstance(m, nn.Conv2d))
    stem = first.out_channels / 4 * 2
    # Hidden units of the MLP before and after GELU, tokens, queries; the waves of the positions.
    layer = (12 * C + 3 * 64) / p**2
    return MEMORY_MARGIN * 4 * (2 * backbone.in_chans + max(stem, layer))
