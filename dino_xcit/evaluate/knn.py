"""Weighted k-nearest-neighbour classification, as in official `eval_knn.py` (DINO, section 4.1; Wu et al. 2018).

Neighbours are found in blocks of fixed rows, so that memory has a bound whatever the number of images and classes, and
votes are whole numbers, whose sum does not depend on the order. Equally similar neighbours come in the order of the
training images, classes of equal votes in the order of the classes. Axes: m test rows, n training rows, k neighbours.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import dump_features, part_slice
from dino_xcit.evaluate.inputs import subjects
from dino_xcit.evaluate.report import (
    cell,
    describe,
    draw_classes,
    hits,
    output_folder,
    scores,
    table,
)
from dino_xcit.files import write_json
from dino_xcit.runtime import (
    float64_device,
    launch,
    progress,
    require_folder,
    resolve_precision,
    summed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import KnnConfig

ROWS, TRAIN_ROWS = (
    512,
    65536,
)  # of test and training images whose similarities are held at a time: 128 MiB
TEST_ROWS = 32 * ROWS  # for which neighbours are sought in one pass over the training images
RANKS = 5  # classes told per image
NOBODY = -1  # a rank for which no class has a vote
LOW_BITS, MAGNITUDE = 2**32 - 1, 2**31 - 1
PICTURED = 20  # neighbours, if asked for, whose confusions are drawn: the number that papers report


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """For each k, the classes of each test image by falling vote: int64 (m, 5), -1 where fewer classes have a vote.

    Features (n, ...) and (m, ...) of any float type, flattened and L2-normalised here; labels (n,). Neighbours are the k
    most similar by cosine; each votes for its class with exp(similarity / temperature). One pass serves every k. Works on
    `device` block by block, by default where test_features are; the features may be memory-mapped.
    Raises ValueError if some k exceeds the number of training images.
    """
    if max(nb_knn) > len(train_features):
        raise UserError(
            f"--nb_knn {max(nb_knn)} asks for more neighbours than the {len(train_features)} training images"
        )
    device = device or test_features.device
    train_labels = train_labels.to(device)
    ranked: dict[int, list[Tensor]] = {k: [] for k in nb_knn}
    for test in test_features.split(TEST_ROWS):
        similarity, index = nearest(train_features, test, max(nb_knn), device)
        label = train_labels[index]
        for k in ranked:
            ranked[k].append(vote(similarity[:, :k], label[:, :k], temperature).cpu())
    return {k: torch.cat(parts) for k, parts in ranked.items()}


def nearest(
    train_features: Tensor, test_features: Tensor, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine similarity (m, k) of the k training rows most similar to each test row, falling, and their numbers (m, k)."""
    blocks = [_normalised(rows, device) for rows in test_features.split(ROWS)]
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=device) for block in blocks]
    held = torch.empty(
        min(ROWS, len(test_features)) * min(TRAIN_ROWS, len(train_features)), device=device
    )
    for start in range(0, len(train_features), TRAIN_ROWS):
        train = _normalised(train_features[start : start + TRAIN_ROWS], device).T
        for number, test in enumerate(blocks):
            similarity = torch.mm(
                test, train, out=held[: len(test) * train.shape[1]].view(len(test), -1)
            )
            keys = torch.cat(
                [best[number], _largest(similarity, k) - start], dim=1
            )  # the key's row counts down
            best[number] = keys.topk(min(k, keys.shape[1]), dim=1).values if start else keys
    return _decode(torch.cat(best))


def vote(similarity: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Neighbours of falling similarity (m, k) and their labels (m, k) -> classes by falling vote (m, 5)."""
    k = similarity.shape[1]
    # The nearest neighbour has the largest power of two with which no sum of k votes overflows.
    weight = ((similarity.double() - similarity[:, :1].double()) / temperature).exp() * 2.0 ** (
        62 - k.bit_length()
    )
    label, order = label.flip(1).sort(dim=1, stable=True)  # the nearest of a class comes last
    total = weight.long().flip(1).gather(1, order).cumsum(1)
    last = torch.ones_like(label, dtype=torch.bool)
    last[:, :-1] = label[:, 1:] != label[:, :-1]
    before = F.pad(
        torch.where(last, total, 0).cummax(1).values, (1, -1)
    )  # total of the smaller classes
    votes = torch.where(last, total - before, NOBODY)
    # Votes too small to differ rank by the nearest neighbour; votes of equal neighbours by the class.
    nearest = (
        torch.where(last, similarity.flip(1).gather(1, order), -torch.inf)
        .sort(dim=1, descending=True, stable=True)
        .indices
    )
    votes, order = votes.gather(1, nearest).sort(dim=1, descending=True, stable=True)
    classes = torch.where(votes == NOBODY, NOBODY, label.gather(1, nearest).gather(1, order))[
        :, :RANKS
    ]
    return F.pad(classes, (0, RANKS - classes.shape[1]), value=NOBODY)


def _normalised(features: Tensor, device: torch.device) -> Tensor:
    return F.normalize(features.to(device).flatten(1).float(), dim=1)


# A neighbour as one whole number that orders by similarity, then by row, earlier first: the float's bits, then the row's
# complement.


def _encode(similarity: Tensor, row: Tensor) -> Tensor:
    bits = similarity.view(torch.int32)
    sign = bits >> 31  # 0 or -1; a float is sign and magnitude, and -0 is 0
    ordered = (bits & MAGNITUDE).bitwise_xor_(sign).sub_(sign)
    return ordered.long().bitwise_left_shift_(32).add_(LOW_BITS).sub_(row)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    sign = ordered >> 31
    bits = ((ordered ^ sign) - sign) | (sign & ~MAGNITUDE)
    return bits.view(torch.float32), LOW_BITS - (keys & LOW_BITS)


def _largest(similarity: Tensor, k: int) -> Tensor:
    """Similarities (m, n) -> keys of the k largest of each row, or of all.

    Looks at the largest of each group of neighbouring columns first: the k groups with the largest hold the k largest. That
    leaves some sqrt(n k) numbers to choose from instead of n.
    """
    n = similarity.shape[1]
    size = max(
        1, int((n / (2 * k)) ** 0.5)
    )  # a number to choose from costs about twice as much as a group
    largest = F.max_pool1d(similarity[None], size)[0]  # of each whole group
    whole = largest.shape[1] * size
    number = torch.arange(largest.shape[1], device=similarity.device)
    group = _decode(_encode(largest, number).topk(min(k, len(number)), dim=1, sorted=False).values)[
        1
    ]  # (m, k)
    column = group[:, :, None] * size + torch.arange(size, device=similarity.device)  # (m, k, size)
    column = column.flatten(1)
    keys = _encode(similarity.gather(1, column), column)
    if whole < n:
        rest = torch.arange(whole, n, device=similarity.device)
        keys = torch.cat([keys, _encode(similarity[:, whole:].contiguous(), rest)], dim=1)
    return keys.topk(min(k, n), dim=1).values


def top1(predictions: Tensor, labels: Tensor) -> float:
    """Share of images whose first class is right, in percent."""
    return 100 * (predictions[:, 0] == labels).float().mean().item()


# -- the command -----------------------------------------------------------------------------------------------------


def knn_eval(config: KnnConfig) -> dict[str, Any]:
    """What `dino-xcit knn-eval` does -> the content of knn.json.

    Raises ValueError, naming the flag, for what the user can put right.
    """
    folder = output_folder(config)
    if config.dump_features is not None:
        require_folder(Path(config.dump_features), "dump_features")
    fabric = launch(config)
    start = time.perf_counter()
    with subjects(config, fabric) as (config, evaluated, classes):
        folder.mkdir(parents=True, exist_ok=True)
        rows = {}
        for subject in evaluated:
            parts = part_slice(
                config.n_last_blocks or 1,
                bool(config.avgpool_patchtokens),
                subject.split("train").features.shape[1],
            )
            if (
                config.dump_features is not None
                and subject is evaluated[0]
                and fabric.is_global_zero
            ):
                dump_features(subject, parts, Path(config.dump_features))
            ranked = _ranked(config, subject, parts, fabric)
            labels = subject.split("validation").labels
            rows[subject.name] = [_result(k, ranked[k], subject, config.seed) for k in ranked]
            if subject is evaluated[0] and fabric.is_global_zero:
                k = PICTURED if PICTURED in ranked else max(ranked)
                first = rows[subject.name][list(ranked).index(k)]
                title = f"{subject.name}: k-NN, k = {k}, top-1 {first['top1']:.1f} %"
                draw_classes(
                    folder / "knn_classes.png",
                    title,
                    ranked[k][:, 0].numpy(),
                    labels.numpy(),
                    classes,
                )
        report = {
            "protocol": "weighted k-NN, as official eval_knn.py",
            "results": rows.pop(evaluated[0].name),
            "baselines": rows,
            "seconds": round(time.perf_counter() - start, 2),
            **describe(config, evaluated, resolve_precision(config)),
        }
    if fabric.is_global_zero:
        write_json(folder / "knn.json", report)
        listed = [
            [name, str(row["k"]), cell(row, "top1"), cell(row, "top5")]
            for name, results in {evaluated[0].name: report["results"], **rows}.items()
            for row in results
        ]
        print(table(["k-NN", "k", "top-1 % [95 %]", "top-5 % [95 %]"], listed))
        print(f"{folder}/knn.json, knn_classes.png")
    return report


def _ranked(config: KnnConfig, subject: Any, parts: slice, fabric: Fabric) -> dict[int, Tensor]:
    """`knn_classify` with the test images shared among the processes, in blocks cut the same whatever their number."""
    train, validation = subject.split("train"), subject.split("validation")
    m = len(validation.labels)
    share = ROWS * -(-m // (ROWS * fabric.world_size))
    mine = range(min(m, fabric.global_rank * share), min(m, (fabric.global_rank + 1) * share))
    ranked = torch.zeros(len(config.nb_knn), m, RANKS, dtype=torch.int64)
    with progress(len(mine), f"{subject.name}: k-NN", "images", fabric.is_global_zero) as bar:
        for start in mine[::TEST_ROWS]:
            rows = slice(start, min(start + TEST_ROWS, mine.stop))
            features = train.features[:, parts], train.labels, validation.features[rows, parts]
            of_rows = knn_classify(
                *features, config.nb_knn, config.temperature, float64_device(fabric)
            )
            ranked[:, rows] = torch.stack([of_rows[k] for k in config.nb_knn])
            bar.update(rows.stop - rows.start)
    return dict(
        zip(config.nb_knn, summed(fabric, ranked), strict=True)
    )  # rows of other processes are zero


def _result(k: int, ranked: Tensor, subject: Any, seed: int) -> dict[str, Any]:
    """top-5 where five neighbours vote and there are five classes."""
    labels = subject.labels("validation")
    hit = {"top1": hits(ranked, labels, 1)}
    if k >= RANKS and len(torch.unique(subject.labels("train"))) >= RANKS:
        hit["top5"] = hits(ranked, labels, RANKS)
    return {"k": k, "top1": None, "top5": None, **scores(hit, seed)}
