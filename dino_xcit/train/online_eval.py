"""Evaluates the teacher during pretraining: k-NN accuracy on the run's own images, and RankMe."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_xcit.data.framing import EvalDataset, Transform, default_resize
from dino_xcit.data.workers import default_workers
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_store import DONE, WORTH_WORKERS, FeatureStore, extract
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.evaluate.knn import knn_classify, top1

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.model.backbone import Backbone

NEIGHBOURS = 20
BATCH_SIZE = 256
RANKME_EPSILON = 1e-7


class OnlineScores(NamedTuple):
    """Scores of one evaluation; the field names are columns of metrics.csv."""

    knn_top1: float | None
    """percent; None without labels"""
    rankme: float
    """from 1 to the number of channels"""


class StoppedError(Exception):
    """A request to stop the run interrupted the evaluation."""


def rankme(features: Tensor) -> float:
    """Effective number of directions that features use (RankMe, arXiv:2210.02885, equation 1).

    A low or falling value means dimensional collapse.

    Args:
        features: (n, D).

    Returns:
        The exponential of the entropy of the normalised singular values, from 1 to D.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum() + RANKME_EPSILON
    return torch.exp(-(share * share.log()).sum()).item()


class Subset(NamedTuple):
    """Some images of a set."""

    images: ImageSet
    indices: np.ndarray
    """int (n,)"""


class OnlineEvaluator:
    """Evaluates a backbone on a random subset of the run's own images, seeded by `--seed`.

    Without labelled validation images the queries are every tenth training image, which is then
    held out of the neighbours. Without labels there are no neighbours, only queries for RankMe.

    Args:
        config: options of the run.
        train: the images that the run trains on.
        validation: images of the same classes that it does not train on, if there are any.
    """

    def __init__(self, config: RunConfig, train: ImageSet, validation: ImageSet | None) -> None:
        self.config = config
        labelled = train.labels is not None
        if labelled and validation is not None and validation.labels is None:
            validation = None
        order = np.random.default_rng((config.seed, 0)).permutation(len(train))
        if validation is None:
            held_out = max(1, len(order) // 10) if labelled else len(order)
            order, queries = order[held_out:], order[:held_out]
        else:
            queries = np.random.default_rng((config.seed, 1)).permutation(len(validation))
        most = config.eval_num_images
        self.queries = Subset(train if validation is None else validation, queries[:most])
        self.neighbours = Subset(train, order[:most]) if labelled and len(order) else None

    def __call__(
        self,
        backbone: Backbone,
        device: torch.device,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> OnlineScores:
        """Evaluate a backbone; it is left in the mode (train or eval) that it had.

        Args:
            backbone: gives the features.
            device: where to compute them.
            asked_to_stop: called before each batch; once it returns true, the evaluation stops.

        Raises:
            StoppedError: `asked_to_stop` returned true.
            UserError: no image of a subset can be read.
        """
        size, training = self.config.global_crops_size, backbone.training
        transform = Transform(size, default_resize(size), self.config.mean, self.config.std)
        try:
            extractor = FeatureExtractor(backbone, transform, device)
            queries, query_labels = _features(extractor, self.queries, asked_to_stop)
            scores = OnlineScores(knn_top1=None, rankme=rankme(queries))
            if self.neighbours is None:
                return scores
            neighbours, labels = _features(extractor, self.neighbours, asked_to_stop)
        finally:
            backbone.train(training)
        k = min(NEIGHBOURS, len(neighbours))
        ranked = knn_classify(neighbours, labels, queries, [k])[k]
        return scores._replace(knn_top1=top1(ranked, query_labels))


def _features(
    extractor: FeatureExtractor, subset: Subset, asked_to_stop: Callable[[], bool]
) -> tuple[Tensor, Tensor]:
    """Features (n, C) of the readable images of a subset, and their labels (n,), 0 without any."""

    def extract_unless_stopped(images: Tensor) -> Tensor:
        if asked_to_stop():
            raise StoppedError
        return extractor(images)

    images, indices = subset
    store = FeatureStore.in_memory((len(indices), *extractor.shape()))
    extract(
        extract_unless_stopped,
        EvalDataset(images, extractor.transform),
        indices,
        store,
        batch_size=BATCH_SIZE,
        num_workers=default_workers() if len(indices) >= WORTH_WORKERS else 0,
        pin_memory=extractor.device.type == "cuda",
    )
    readable = store.state == DONE
    if not readable.any():
        raise UserError(
            f"none of the {len(indices)} images to evaluate on can be read, for example "
            f"{images.name(int(indices[0]))}; check the files under --data_path"
        )
    labels = np.zeros(len(images)) if images.labels is None else images.labels
    features = torch.from_numpy(store.features[readable, 0])  # of (n, P, C): the class token
    return features, torch.from_numpy(labels[indices][readable])
