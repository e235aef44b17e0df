"""Layers of XCiT against timm's and against the paper's formulas."""

import pytest
import torch
from timm.models import xcit as timm_xcit
from torch import nn

from dino_xcit.model.xcit_layers import GRIDS, XCA, FourierPositions


@torch.no_grad()
def test_fourier_positions_are_timms_for_any_grid_in_any_order():
    ours = FourierPositions(40)
    theirs = timm_xcit.PositionalEncodingFourier(dim=40)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for H, W in [(1, 1), (2, 3), (3, 2), (14, 14), (7, 28), (2, 3)]:
        expected = theirs(1, H, W)[0].flatten(1).T  # (N, C)
        torch.testing.assert_close(ours(H, W), expected, rtol=1e-5, atol=1e-5)


def test_the_memory_of_fourier_positions_does_not_grow_with_the_number_of_sizes():
    positions = FourierPositions(8)
    for size in range(2, 60):
        positions(size, size + 1)
        kept = list(positions._waves.values())  # no public name tells the memory
        assert len(kept) <= GRIDS
    assert sum(tensor.nbytes for tensor in kept) <= GRIDS * 60 * 60 * 64 * 4
    again = [positions.waves(16, side, torch.device("cpu")) for side in (16, 8, 16, 8)]
    assert again[0] is again[2]  # the two crops of a run are computed once
    assert again[1] is again[3]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_xca_is_the_papers_formula(l2_norm):
    """Section 3.2, head by head: V softmax(K^T Q / tau), the columns of K and Q unit vectors."""
    torch.manual_seed(0)
    B, N, h, d = 2, 7, 3, 4
    xca = XCA(h * d, h, l2_norm=l2_norm).double()
    nn.init.uniform_(xca.temperature, 0.5, 2.0)
    tokens = torch.randn(B, N, h * d, dtype=torch.float64)
    qkv = tokens @ xca.qkv.weight.T + xca.qkv.bias
    images = []
    for b in range(B):
        heads = []
        for head in range(h):
            q, k, v = (qkv[b, :, i * h * d + head * d :][:, :d] for i in range(3))  # (N, d)
            if l2_norm:
                q, k = q / q.norm(dim=0), k / k.norm(dim=0)
            heads.append(v @ (q.T @ k * xca.temperature[head, 0, 0]).softmax(-1).T)
        images.append(torch.cat(heads, dim=1))
    expected = torch.stack(images) @ xca.proj.weight.T + xca.proj.bias
    outputs = [xca(tokens), expected]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((output * direction).sum(), list(xca.parameters()))
        for output in outputs
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_float16_products_over_many_tokens_stay_finite():
    """The sum over 784 tokens of squares of about a hundred exceeds float16's range."""
    attention = XCA(32, 4)
    with torch.no_grad():
        attention.qkv.weight.copy_(10 * torch.eye(32).repeat(3, 1))
    tokens = torch.randn(1, 784, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):
        half = attention(tokens)
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), attention(tokens), rtol=0.05, atol=0.05)
