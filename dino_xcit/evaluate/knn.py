"""Weighted k-nearest-neighbour classification, as official `eval_knn.py`.

DINO, section 4.1; Wu et al. 2018. Neighbours are found in blocks of fixed size, so memory is
bounded for any number of images and classes. Votes are integers, whose sum does not depend on the
order. Equally similar neighbours are ordered as the training images, classes with equal votes by
label.
Axes: m test images, n training images, k neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.errors import UserError
from dino_xcit.evaluate.class_figures import draw_classes
from dino_xcit.evaluate.feature_files import dump_features
from dino_xcit.evaluate.features import chosen_parts, select_parts
from dino_xcit.evaluate.frame import evaluate
from dino_xcit.evaluate.report import class_scores, hits, scores, with_interval
from dino_xcit.run_folder import KNN, classes_picture
from dino_xcit.runtime import float64_device, progress, require_folder, say, summed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.fabric import Fabric

    from dino_xcit.evaluate.features import Features
    from dino_xcit.evaluate.frame import Evaluation
    from dino_xcit.evaluate.report import Report, Result

TEST_BLOCK, TRAIN_BLOCK = 512, 65536  # images whose similarities are in memory at a time: 128 MiB
TEST_PASS = 32 * TEST_BLOCK  # test images per pass over the training images
RANKS = 5  # classes returned per image
NO_CLASS = -1  # at a rank for which no class has a vote
LOW_BITS, MAGNITUDE = 2**32 - 1, 2**31 - 1
DRAWN_K = 20  # k whose confusions are drawn, if it is one of --nb_knn: the value in papers


# -- classification ----------------------------------------------------------------------------


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | None = None,
    parts: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """Classify by a weighted vote of the k most similar training images, for each k.

    Similarity is the cosine; a neighbour's vote is exp(similarity / temperature). One pass over the
    training images serves all k.

    Args:
        train_features: (n, ...), any float dtype, may be memory-mapped. Are flattened and
            L2-normalised.
        train_labels: Integers, (n,).
        test_features: (m, ...), like `train_features`.
        nb_knn: Numbers of neighbours k.
        temperature: Of the vote.
        device: Where to compute, block by block; default: the device of test_features.
        parts: Indices along axis 1 of the features to use; default: all.

    Returns:
        For each k, each test image's classes in descending order of votes: int64 (m, 5), -1 where
        fewer classes have a vote.

    Raises:
        UserError: Some k exceeds the number of training images.
    """
    require_neighbours(nb_knn, len(train_features))
    device = device or test_features.device
    train_labels = train_labels.to(device)
    ranked: dict[int, list[Tensor]] = {k: [] for k in nb_knn}
    for test in torch.split(test_features, TEST_PASS):
        similarity, index = nearest(train_features, test, max(nb_knn), device, parts)
        label = train_labels[index]
        votes = [vote(similarity[:, :k], label[:, :k], temperature) for k in ranked]
        for k, classes in zip(ranked, torch.stack(votes).cpu(), strict=True):  # waits once
            ranked[k].append(classes)
    return {k: torch.cat(blocks) for k, blocks in ranked.items()}


def nearest(
    train_features: Tensor,
    test_features: Tensor,
    k: int,
    device: torch.device,
    parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k training images most similar to each test image.

    Returns:
        Cosine similarities in descending order (m, k), and the indices of the training images
        (m, k).
    """
    normalised = functools.partial(_normalised, device=device, parts=parts)
    blocks = [normalised(rows) for rows in torch.split(test_features, TEST_BLOCK)]
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=device) for block in blocks]
    block_size = min(TEST_BLOCK, len(test_features)) * min(TRAIN_BLOCK, len(train_features))
    buffer = torch.empty(block_size, device=device)  # reused for all blocks
    for start in range(0, len(train_features), TRAIN_BLOCK):
        train = normalised(train_features[start : start + TRAIN_BLOCK]).T
        for number, test in enumerate(blocks):
            out = buffer[: len(test) * train.shape[1]].view(len(test), -1)
            similarity = torch.mm(test, train, out=out)
            # Keys hold the row's complement: subtracting the start adds it to the row.
            keys = torch.cat([best[number], _largest(similarity, k) - start], dim=1)
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values if start else keys
    return _decode(torch.cat(best))


def vote(similarity: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Rank classes by their votes.

    Args:
        similarity: Of each image's neighbours, in descending order, (m, k).
        label: Of each neighbour, (m, k).
        temperature: A neighbour's vote is exp(similarity / temperature).

    Returns:
        Classes in descending order of votes, (m, 5), -1 where fewer classes have a vote.
    """
    k = similarity.shape[1]
    # Votes as integers. The nearest neighbour's is the largest power of two with which no sum of k
    # votes overflows.
    relative = (similarity.double() - similarity[:, :1].double()) / temperature
    weight = relative.exp() * 2.0 ** (62 - k.bit_length())
    label, order = label.flip(1).sort(dim=1, stable=True)  # the nearest of a class comes last
    total = weight.long().flip(1).gather(1, order).cumsum(1)
    last = torch.ones_like(label, dtype=torch.bool)  # whether it is the last of its class
    last[:, :-1] = label[:, 1:] != label[:, :-1]
    of_smaller_classes = F.pad(torch.where(last, total, 0).cummax(1).values, (1, -1))
    votes = torch.where(last, total - of_smaller_classes, NO_CLASS)
    # Classes whose votes are too small to differ are ranked by their nearest neighbour, classes
    # with the same neighbours by label: both sorts are stable.
    of_nearest = torch.where(last, similarity.flip(1).gather(1, order), -torch.inf)
    by_nearest = of_nearest.sort(dim=1, descending=True, stable=True).indices
    votes, by_votes = votes.gather(1, by_nearest).sort(dim=1, descending=True, stable=True)
    ranked = label.gather(1, by_nearest).gather(1, by_votes)
    classes = torch.where(votes == NO_CLASS, NO_CLASS, ranked)[:, :RANKS]
    return F.pad(classes, (0, RANKS - classes.shape[1]), value=NO_CLASS)


def top1(ranked: Tensor, labels: Tensor) -> float:
    """Percentage of images whose first class is their label."""
    return 100 * (ranked[:, 0] == labels).float().mean().item()


def _normalised(features: Tensor, device: torch.device, parts: Sequence[int] | None) -> Tensor:
    chosen = features if parts is None else select_parts(features, parts)
    return F.normalize(chosen.to(device).flatten(1).float(), dim=1)


# -- neighbours as keys ------------------------------------------------------------------------
# A key is one integer that sorts neighbours by similarity, and equally similar ones by row, the
# first largest. High half: bits of the float, mapped so that they sort as it does. Low half: the
# complement of the row.


def _encode(similarity: Tensor, row: Tensor) -> Tensor:
    bits = similarity.view(torch.int32)
    sign = bits >> 31  # 0 or -1; a float is sign and magnitude, and -0 becomes 0
    ordered = (bits & MAGNITUDE).bitwise_xor_(sign).sub_(sign)
    return ordered.long().bitwise_left_shift_(32).add_(LOW_BITS).sub_(row)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    sign = ordered >> 31
    bits = ((ordered ^ sign) - sign) | (sign & ~MAGNITUDE)
    return bits.view(torch.float32), LOW_BITS - (keys & LOW_BITS)


def _largest(similarity: Tensor, k: int) -> Tensor:
    """Similarities (m, n) -> keys of the k largest of each row, or of all if there are fewer.

    Columns are grouped, and the maximum of each group is found first: the k groups with the largest
    maxima contain the k largest values. That leaves about sqrt(n k) candidates instead of n.
    """
    n = similarity.shape[1]
    # Of this size, because a candidate costs about twice as much as a group.
    size = max(1, int((n / (2 * k)) ** 0.5))
    maxima = F.max_pool1d(similarity[None], size)[0]  # (m, groups), of complete groups
    groups = torch.arange(maxima.shape[1], device=similarity.device)
    keys = _encode(maxima, groups).topk(min(k, len(groups)), dim=1, sorted=False).values
    _, group = _decode(keys)  # (m, k)
    column = group[:, :, None] * size + torch.arange(size, device=similarity.device)  # (m, k, size)
    column = column.flatten(1)
    keys = _encode(similarity.gather(1, column), column)
    grouped = maxima.shape[1] * size
    if grouped < n:
        rest = torch.arange(grouped, n, device=similarity.device)
        keys = torch.cat([keys, _encode(similarity[:, grouped:].contiguous(), rest)], dim=1)
    return keys.topk(min(k, n), dim=1).values


# -- the command -------------------------------------------------------------------------------


COLUMNS = {
    "k": lambda row: str(row["k"]),
    "top-1 % [95 %]": lambda row: with_interval(row, "top1"),
    "top-5 % [95 %]": lambda row: with_interval(row, "top5"),
    "balanced % [95 %]": lambda row: with_interval(row, "balanced_accuracy"),
    "macro F1 % [95 %]": lambda row: with_interval(row, "macro_f1"),
}


def knn_eval(config: KnnConfig) -> Report:
    """Run `dino-xcit knn-eval`; return the content of knn.json.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    if config.dump_features is not None:
        require_folder(Path(config.dump_features), "dump_features")
    return evaluate(
        config,
        _score,
        name=KNN,
        protocol="weighted k-NN, as official eval_knn.py",
        title="k-NN",
        columns=COLUMNS,
    )


def _score(evaluation: Evaluation[KnnConfig], features: Features) -> list[Result]:
    config = evaluation.config
    parts = chosen_parts(config, features)
    neighbours(config, features)  # before the extraction, which may take hours
    for split in ("train", "validation"):
        features.split(split)  # extracted by all processes, before one dumps them
    nb_knn = neighbours(config, features)  # unreadable images are left out by now
    if nb_knn != config.nb_knn and evaluation.writes(features):
        say(f"--nb_knn {' '.join(map(str, nb_knn))}: there are {max(nb_knn)} training images")
    config = dataclasses.replace(config, nb_knn=nb_knn)
    if config.dump_features is not None and evaluation.writes(features):
        dump_features(features, parts, Path(config.dump_features))
    ranked = classify_shared(config, features, parts, evaluation.fabric)
    results = [_result(k, ranked[k], features, config.seed) for k in ranked]
    if evaluation.writes(features):
        k = DRAWN_K if DRAWN_K in ranked else max(ranked)
        accuracy = results[list(ranked).index(k)]["top1"]
        draw_classes(
            evaluation.file(classes_picture(KNN)),
            f"{features.name}: k-NN, k = {k}, top-1 {accuracy:.1f} %",
            ranked[k][:, 0].numpy(),
            features.labels("validation").numpy(),
            evaluation.class_names,
        )
    return results


def neighbours(config: KnnConfig, features: Features) -> tuple[int, ...]:
    """Numbers of neighbours k; the default ones are at most the number of training images.

    Raises:
        UserError: Another k than the default ones exceeds the number of training images.
    """
    images = len(features.labels("train"))
    if config.nb_knn == KnnConfig.nb_knn:
        return tuple(sorted({min(k, images) for k in config.nb_knn}))
    require_neighbours(config.nb_knn, images)
    return config.nb_knn


def require_neighbours(nb_knn: Sequence[int], images: int) -> None:
    """Raise UserError if some k exceeds the number of training images."""
    if max(nb_knn) > images:
        raise UserError(f"--nb_knn {max(nb_knn)} is more than the {images} training images")


def classify_shared(
    config: KnnConfig, features: Features, parts: Sequence[int], fabric: Fabric
) -> dict[int, Tensor]:
    """`knn_classify` the validation images with all processes, each with a share of the images.

    Shares are multiples of TEST_BLOCK, so the blocks are the same for any number of processes.
    """
    train, validation = features.split("train"), features.split("validation")
    m = len(validation.labels)
    share = TEST_BLOCK * -(-m // (TEST_BLOCK * fabric.world_size))
    own = range(min(m, fabric.global_rank * share), min(m, (fabric.global_rank + 1) * share))
    ranked = torch.zeros(len(config.nb_knn), m, RANKS, dtype=torch.int64)
    with progress(len(own), f"{features.name}: k-NN", "images", fabric.is_global_zero) as bar:
        for start in own[::TEST_PASS]:
            rows = slice(start, min(start + TEST_PASS, own.stop))
            ranked_rows = knn_classify(
                train.features,
                train.labels,
                validation.features[rows],
                config.nb_knn,
                config.temperature,
                float64_device(fabric),
                parts,
            )
            ranked[:, rows] = torch.stack([ranked_rows[k] for k in config.nb_knn])
            bar.update(rows.stop - rows.start)
    ranked = summed(fabric, ranked)  # rows of other processes are 0
    return dict(zip(config.nb_knn, ranked, strict=True))


def _result(k: int, ranked: Tensor, features: Features, seed: int) -> Result:
    """A row of results; with top-5 if at least five neighbours vote on at least five classes."""
    labels = features.labels("validation")
    measures = {"top1": hits(ranked, labels, 1)}
    if k >= RANKS and len(torch.unique(features.labels("train"))) >= RANKS:
        measures["top5"] = hits(ranked, labels, RANKS)
    of_images = scores(measures, seed)
    of_classes = class_scores([ranked[:, 0]], labels, seed)
    return {"k": k, "top1": None, "top5": None, **of_images, **of_classes}
