"""What a run's teacher has learned so far: k-NN accuracy on the run's own images, and RankMe."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dino_xcit.data.framing import EvalDataset, Transform, default_resize
from dino_xcit.data.loader import default_workers
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_store import DONE, WORTH_WORKERS, FeatureStore, extract
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.evaluate.knn import knn_classify, top1

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.images import ImageSet

NEIGHBOURS = 20
BATCH = 256
EPSILON = 1e-7  # of RankMe


class OnlineScores(NamedTuple):
    knn_top1: float | None
    """percent; None without labels"""
    rankme: float


class StoppedError(Exception):
    """The run was asked to stop."""


def rankme(features: Tensor) -> float:
    """Features (n, D) -> how many directions they use, from 1 to D: the exponential of the entropy of their singular values
    (RankMe, arXiv:2210.02885, equation 1). What falls, or stays at a few, has collapsed in these dimensions."""
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum() + EPSILON
    return torch.exp(-(share * share.log()).sum()).item()


class OnlineEvaluator:
    """A seeded sample of the run's own images, on which a backbone is evaluated."""

    def __init__(
        self, config: PretrainConfig, train: ImageSet, validation: ImageSet | None
    ) -> None:
        """Without labelled validation images, every tenth training image is held out of the neighbours."""
        self.config = config
        self.labelled = train.labels is not None
        if self.labelled and validation is not None and validation.labels is None:
            validation = None
        order = np.random.default_rng((config.seed, 0)).permutation(len(train))
        self.train, self.validation = train, validation or train
        if validation is None:
            held_out = max(1, len(order) // 10) if self.labelled else len(order)
            order, self.queries = order[held_out:], order[:held_out]
        else:
            self.queries = np.random.default_rng((config.seed, 1)).permutation(len(validation))
        self.neighbours = order[: config.eval_num_images] if self.labelled else order[:0]
        self.queries = self.queries[: config.eval_num_images]

    def __call__(
        self,
        backbone: nn.Module,
        device: torch.device,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> OnlineScores:
        """The backbone's mode is put back afterwards. Raises StoppedError as soon as it is asked to."""
        training, size = backbone.training, self.config.global_crops_size
        transform = Transform(size, default_resize(size), self.config.mean, self.config.std)
        frozen = FeatureExtractor(backbone, transform, device)

        def unless_stopped(images: Tensor) -> Tensor:
            if asked_to_stop():
                raise StoppedError
            return frozen(images)

        try:
            queries, of_queries = self._features(
                unless_stopped, frozen, self.validation, self.queries
            )
            found = OnlineScores(None, rankme(queries))
            if self.labelled:
                neighbours, of_neighbours = self._features(
                    unless_stopped, frozen, self.train, self.neighbours
                )
                k = min(NEIGHBOURS, len(neighbours))
                ranked = knn_classify(neighbours, of_neighbours, queries, [k])[k]
                found = found._replace(knn_top1=top1(ranked, of_queries))
        finally:
            backbone.train(training)
        return found

    def _features(
        self,
        read: Callable[[Tensor], Tensor],
        frozen: FeatureExtractor,
        images: ImageSet,
        indices: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (n, C) of those that can be read, and their labels, if there are any."""
        store = FeatureStore.in_memory((len(indices), *frozen.shape()))
        dataset = EvalDataset(images, frozen.transform)
        workers = default_workers() if len(indices) >= WORTH_WORKERS else 0
        extract(read, dataset, indices, store, batch_size=BATCH, num_workers=workers)
        readable = store.state == DONE
        if not readable.any():
            raise UserError(
                f"none of {len(indices)} images to evaluate on can be read, {images.name(0)} for one"
            )
        labels = np.zeros(len(images)) if images.labels is None else images.labels
        return torch.from_numpy(store.features[readable, 0]), torch.from_numpy(
            labels[indices][readable]
        )
