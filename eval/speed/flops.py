"""FLOPs of matrix products and convolutions, forward and backward.

torch's counter takes the weight gradient of a grouped convolution for that of a dense one: for the
depthwise convolutions of XCiT, a number of channels too many.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def convolution_backward_flops(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Sequence[int] | None,
    _stride: Sequence[int],
    _padding: Sequence[int],
    _dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    _groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """FLOPs of the gradients of a convolution; the tensors are given by their shapes.

    Every multiplication of the forward pass is one of the input's gradient, and one of the
    weight's: at each position of the output (of the input, if transposed) each weight is used once.
    """
    positions = math.prod((x if transposed else grad_out)[2:])
    gradients = sum(output_mask[:2])  # of input and weight; that of the bias multiplies nothing
    return 2 * x[0] * positions * math.prod(weight) * gradients


def flops_of(function: Callable[[], object]) -> int:
    """Call the function; return the FLOPs of its matrix products and convolutions."""
    corrected = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        function()
    return counter.get_total_flops()
