"""The FLOPs behind the floor of `eval/speed/step.py` are those that one counts by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "eval" / "speed"))
from flops import flops_of

# 2 images, output of 5 x 7 pixels, kernel of 3 x 3; a multiplication and an addition are 2 FLOPs.
POSITIONS, KERNEL = 2 * 5 * 7, 9


@pytest.mark.parametrize(
    ("groups", "multiplications"),
    [
        (1, POSITIONS * 12 * 24 * KERNEL),
        (4, POSITIONS * 3 * 24 * KERNEL),
        (12, POSITIONS * 1 * 24 * KERNEL),  # depthwise: each output channel sees one input channel
    ],
)
@pytest.mark.parametrize("input_gradient", [True, False])
def test_a_convolution_and_its_gradients(groups, multiplications, input_gradient):
    convolution = nn.Conv2d(12, 24, 3, padding=1, groups=groups)
    x = torch.randn(2, 12, 5, 7, requires_grad=input_gradient)
    y: list[torch.Tensor] = []
    assert flops_of(lambda: y.append(convolution(x))) == 2 * multiplications
    gradients = 2 if input_gradient else 1
    assert flops_of(lambda: y[0].sum().backward()) == 2 * multiplications * gradients


def test_a_transposed_depthwise_convolution():
    convolution = nn.ConvTranspose2d(12, 12, 3, stride=2, groups=12)
    x = torch.randn(2, 12, 5, 7, requires_grad=True)
    y: list[torch.Tensor] = []
    forward = 2 * 2 * 5 * 7 * 12 * 9
    assert flops_of(lambda: y.append(convolution(x))) == forward
    assert flops_of(lambda: y[0].sum().backward()) == 2 * forward


def test_a_product_and_its_gradients():
    linear = nn.Linear(5, 3)
    x = torch.randn(7, 5, requires_grad=True)
    assert flops_of(lambda: linear(x).sum().backward()) == 3 * 2 * 7 * 5 * 3
