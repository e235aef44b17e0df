"""KoLeo: spreads the features of a batch over the sphere (Sablayrolles et al., arXiv:1806.03198).

DINOv2 (arXiv:2304.07193, section 4) adds it to DINO's loss. DINO itself does not have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_DISTANCE = 1e-8


def koleo(features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the mean log distance of each feature to its nearest one (equation 2 of the paper).

    Neighbours are looked for among the images of one process and one forward pass, and within one
    view, so that no feature is driven away from another view of its own image.

    Args:
        features: (V, B, C), backbone features of V views of B images; any norm, they are
            L2-normalised.

    Returns:
        The loss, 0 for a batch of one image; and the scalar `nearest_distance`, the mean distance
        to the nearest feature, from 0 to 2.
    """
    if features.shape[1] < 2:
        zero = features.sum() * 0
        return zero, {"nearest_distance": zero.detach()}
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = unit @ unit.mT  # (V, B, B)
            similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = similarity.argmax(-1, keepdim=True).expand_as(unit)  # (V, B, C)
        distance = (unit - unit.gather(1, nearest)).norm(dim=-1)  # (V, B)
        loss = -(distance + SMALLEST_DISTANCE).log().mean()
    return loss, {"nearest_distance": distance.detach().mean()}
