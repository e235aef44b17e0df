"""Weighted k-nearest-neighbour classification, as in official `eval_knn.py` (DINO, section 4.1; Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 256 * 2**20  # of similarities held at a time


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Features (n, D) and (m, D), labels (n,) -> for each k, the classes of each test image by falling vote, at most five.

    Neighbours are the k most similar by cosine; each votes for its class with exp(similarity / temperature). One pass over
    the neighbours serves every k. Raises ValueError if some k exceeds the number of training images.
    """
    if max(nb_knn) > len(train_features):
        raise ValueError(f"--nb_knn {max(nb_knn)} asks for more neighbours than the {len(train_features)} training images")
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    chunk = max(1, CHUNK_BYTES // (4 * (len(train) + 2 * classes)))
    ranked: dict[int, list[Tensor]] = {k: [] for k in nb_knn}
    for part in test.split(chunk):
        similarity, neighbours = (part @ train.T).topk(max(nb_knn), dim=1)  # (chunk, k), most similar first
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor, lest exp overflow
        label = train_labels[neighbours]
        votes = torch.zeros(len(part), classes, device=part.device)
        counted = 0
        for k in sorted(ranked):
            votes.scatter_add_(1, label[:, counted:k], weight[:, counted:k])
            ranked[k].append(votes.topk(min(5, classes), dim=1).indices)
            counted = k
    return {k: torch.cat(parts) for k, parts in ranked.items()}


def top1(predictions: Tensor, labels: Tensor) -> float:
    """Share of images whose first class is right, in percent."""
    return 100 * (predictions[:, 0] == labels).float().mean().item()
