"""Weighted k-NN against a naive vote and against scikit-learn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.evaluate import knn
from dino_xcit.evaluate.features import Split
from dino_xcit.evaluate.knn import classify_shared, knn_classify, nearest, top1, vote

CPU = torch.device("cpu")
BLOCKS = [
    (512, 16384, 65536),
    (1, 1, 1),
    (3, 6, 7),
    (2, 3, 4),
    (4, 5, 100),
]  # of test rows, of a pass, of training rows


def problem(classes, train=60, test=13, dim=8, seed=0):
    """Training features, their labels, and test features.

    Features are near the centre of their class, but far enough from it that neighbours disagree.
    """
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, train - classes)])
    features = rng.normal(size=(classes, dim))[labels] + 1.5 * rng.normal(size=(train, dim))
    arrays = features, labels, rng.normal(size=(test, dim))
    return tuple(
        torch.from_numpy(a).float() if a.dtype == float else torch.from_numpy(a) for a in arrays
    )


def naive_votes(train, labels, test, k, temperature):
    """(m, classes), in float64."""
    train, test = train.double().numpy(), test.double().numpy()
    votes = np.zeros((len(test), int(labels.max()) + 1))
    for i, feature in enumerate(test):
        similarity = train @ feature / np.linalg.norm(train, axis=1) / np.linalg.norm(feature)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[i, labels[neighbour]] += np.exp(similarity[neighbour] / temperature)
    return votes


def assert_ranked_by(votes, predictions):
    """The classes are distinct, with the largest votes first; equal votes in any order."""
    for row, of_row in zip(predictions.numpy(), votes, strict=True):
        ranked = row[row >= 0]
        assert len(set(ranked)) == len(ranked) == min(5, (of_row > 0).sum())
        np.testing.assert_allclose(of_row[ranked], -np.sort(-of_row)[: len(ranked)], rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("classes", [2, 4, 5, 12])
def test_ranking_is_that_of_a_naive_vote(classes, temperature):
    train, labels, test = problem(classes)
    ranked = knn_classify(train, labels, test, nb_knn=(20, 1, 5, 60), temperature=temperature)
    assert set(ranked) == {1, 5, 20, 60}
    for k, predictions in ranked.items():
        assert predictions.shape == (13, 5)
        assert_ranked_by(naive_votes(train, labels, test, k, temperature), predictions)


def test_length_of_features_does_not_matter():
    train, labels, test = problem(4)
    scale = torch.linspace(0.1, 10, len(train))[:, None]
    expected = knn_classify(train, labels, test, nb_knn=(7,))[7]
    assert torch.equal(knn_classify(train * scale, labels, 5 * test, nb_knn=(7,))[7], expected)


def test_tied_classes_share_the_first_places():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([3, 1, 0, 2])
    ranked = knn_classify(train, labels, torch.tensor([[2.0, 0.1]]), nb_knn=(3,), temperature=0.1)[
        3
    ]
    assert ranked[0].tolist() == [1, 3, 0, -1, -1]


def test_one_near_neighbour_outvotes_two_distant_ones_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # similarities 1, 0.6, 0.6
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    # e^(1 / 0.1) > 2 e^(0.6 / 0.1), but e^(1 / 1) < 2 e^(0.6 / 1)
    assert knn_classify(train, labels, test, nb_knn=(3,), temperature=0.1)[3][:, :2].tolist() == [
        [0, 1]
    ]
    assert knn_classify(train, labels, test, nb_knn=(3,), temperature=1.0)[3][:, :2].tolist() == [
        [1, 0]
    ]


def test_three_test_images_and_one_class():
    train, labels, test = problem(1, test=3)
    assert knn_classify(train, labels, test, nb_knn=(10,))[10].tolist() == 3 * [[0, -1, -1, -1, -1]]


def test_more_neighbours_than_images_is_an_error_that_names_the_flag():
    train, labels, test = problem(3, train=9)
    assert knn_classify(train, labels, test, nb_knn=(9,))[9].shape == (13, 5)
    with pytest.raises(ValueError, match=r"--nb_knn 10 .* 9 training images"):
        knn_classify(train, labels, test, nb_knn=(5, 10))


def test_top1_is_the_percentage_of_right_first_classes():
    assert top1(torch.tensor([[2, 0], [1, 2], [0, 1], [0, 1]]), torch.tensor([2, 2, 0, 1])) == 50.0


@pytest.mark.parametrize("k", [1, 5, 25, 200])
def test_first_class_and_accuracy_are_scikit_learns(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels, test = problem(7, train=1500, test=300)
    truth = torch.arange(300) % 7
    reference = neighbors.KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    ).fit(train.numpy(), labels.numpy())
    predictions = knn_classify(train, labels, test, nb_knn=(k,))[k]
    assert predictions[:, 0].tolist() == reference.predict(test.numpy()).tolist()
    assert top1(predictions, truth) == pytest.approx(
        100 * reference.score(test.numpy(), truth.numpy()), rel=1e-6
    )


# -- exactly the same neighbours and ranks, ties included -----------------------------------------


def exact_problem(seed, train, test, dim=16, distinct=9, classes=6):
    """Features with 0, 1, 4 or 16 entries of +-1, whose norms and products are exact.

    Few of them are distinct, so most neighbours are tied.
    """
    rng = np.random.default_rng(seed)
    filled = [count for count in (0, 1, 4, 16) if count <= dim]
    pool = np.zeros((distinct, dim), dtype=np.float32)
    for row in pool:
        places = rng.permutation(dim)[: rng.choice(filled)]
        row[places] = rng.choice([-1, 1], len(places))
    features = pool[rng.integers(0, distinct, train + test)]
    labels = rng.permutation(50)[:classes][rng.integers(0, classes, train)]
    return (
        torch.from_numpy(features[:train]),
        torch.from_numpy(labels),
        torch.from_numpy(features[train:]),
    )


def naive_similarity(train, test):
    """(m, n), in float64; a zero vector is similar to nothing."""
    train, test = (x.double().numpy() for x in (train, test))
    return unit(test) @ unit(train).T


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def naive_neighbours(of_row, k):
    return sorted(range(len(of_row)), key=lambda i: (-of_row[i], i))[:k]


def naive_ranking(train, labels, test, k, temperature):
    ranked = []
    for of_row in naive_similarity(train, test):
        votes = {}
        for neighbour in naive_neighbours(of_row, k):
            votes.setdefault(int(labels[neighbour]), []).append(
                math.exp(of_row[neighbour] / temperature)
            )
        classes = sorted(votes, key=lambda c: (-math.fsum(votes[c]), c))[:5]
        ranked.append(classes + [-1] * (5 - len(classes)))
    return ranked


def set_blocks(monkeypatch, blocks):
    for name, value in zip(("TEST_BLOCK", "TEST_PASS", "TRAIN_BLOCK"), blocks, strict=True):
        monkeypatch.setattr(knn, name, value)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("dim", [2, 4, 16])
@pytest.mark.slow
def test_every_k_ranks_as_the_naive_vote_with_ties(monkeypatch, dim, blocks):
    set_blocks(monkeypatch, blocks)
    for seed in range(6):
        train, labels, test = exact_problem(
            seed, train=3 + 5 * seed, test=(1, 3, 7)[seed % 3], dim=dim
        )
        every_k = tuple(range(1, len(train) + 1))
        for k, predictions in knn_classify(
            train, labels, test, nb_knn=every_k, temperature=0.3
        ).items():
            assert predictions.dtype == torch.int64
            assert predictions.tolist() == naive_ranking(train, labels, test, k, 0.3), (seed, k)


@pytest.mark.parametrize("blocks", [*BLOCKS, (512, 16384, 61)])
@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_neighbours_are_the_naive_ones_with_ties(monkeypatch, k, blocks):
    set_blocks(monkeypatch, blocks)
    for seed, n in enumerate((30, 100, 131, 250)):
        train, _, test = exact_problem(seed, train=n, test=7, distinct=20)
        similarity, index = nearest(train, test, k, CPU)
        expected = naive_similarity(train, test)
        assert index.tolist() == [naive_neighbours(of_row, k) for of_row in expected]
        assert torch.equal(
            similarity.double(), torch.from_numpy(np.take_along_axis(expected, index.numpy(), 1))
        )


@pytest.mark.parametrize("blocks", BLOCKS)
def test_neighbours_that_are_all_opposite(monkeypatch, blocks):
    set_blocks(monkeypatch, blocks)
    train = torch.ones(20, 16)
    for row in range(20):
        train[row, : row % 5] = -1
    labels, test = torch.arange(20) % 7, -torch.ones(3, 16)
    similarity, index = nearest(train, test, 20, CPU)
    assert similarity.max() == -0.5
    assert index[0].tolist() == [
        row for flipped in (4, 3, 2, 1, 0) for row in range(flipped, 20, 5)
    ]
    assert knn_classify(train, labels, test, nb_knn=(9,))[9].tolist() == naive_ranking(
        train, labels, test, 9, 0.07
    )


def test_zero_vectors_are_similar_to_nothing():
    train, labels, test = (
        torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
        torch.arange(4),
        torch.zeros(2, 2),
    )
    test[1, 1] = -2
    similarity, index = nearest(train, test, 4, CPU)
    assert similarity.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]
    assert index.tolist() == [[0, 1, 2, 3], [0, 1, 3, 2]]
    assert knn_classify(train, labels, test, nb_knn=(4,))[4].tolist() == [
        [0, 1, 2, 3, -1],
        [0, 1, 3, 2, -1],
    ]


def test_zeros_of_either_sign_are_equally_similar():
    train, labels, test = (
        torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]),
        torch.arange(4),
        torch.zeros(2, 1),
    )
    assert nearest(train, test, 4, CPU)[1].tolist() == 2 * [[0, 1, 2, 3]]  # 0 times -1 is -0
    assert knn_classify(train, labels, test, nb_knn=(1,))[1][:, 0].tolist() == [0, 0]


def as_memory_map(features, path):
    held = np.memmap(path, np.float32, "w+", shape=tuple(features.shape))
    held[:] = features.numpy()
    return torch.from_numpy(held)


@pytest.mark.parametrize(
    "kept", ["float16", "bfloat16", "float64", "parts", "memory map", "every other row"]
)
def test_dtype_and_storage_of_features_do_not_matter(monkeypatch, tmp_path, kept):
    set_blocks(monkeypatch, (3, 6, 7))
    train, labels, test = exact_problem(1, train=25, test=8)
    keep = {
        "parts": lambda x: x.view(len(x), 4, 4),
        "memory map": lambda x: as_memory_map(x, tmp_path / f"{len(x)}"),
        "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    }.get(kept, lambda x: x.to(getattr(torch, kept)))
    ranked = knn_classify(keep(train), labels, keep(test), nb_knn=(1, 6, 25))
    for k, predictions in ranked.items():
        assert predictions.tolist() == naive_ranking(train, labels, test, k, 0.07)


def test_blocks_of_rows_rank_as_the_whole():
    train, labels, test = problem(6)
    whole = knn_classify(train, labels, test, nb_knn=(4, 9))
    assert list(whole) == [4, 9]
    for row in range(len(test)):
        alone = knn_classify(train, labels, test[row : row + 1], nb_knn=(9, 4))
        assert list(alone) == [9, 4]
        assert all(torch.equal(alone[k][0], whole[k][row]) for k in (4, 9))


@pytest.mark.parametrize("seed", range(10))
def test_votes_do_not_depend_on_their_order(seed):
    rng = np.random.default_rng(seed)
    falling = -np.sort(-rng.uniform(0.2, 0.8, 10)).astype(np.float32)
    similarity = torch.from_numpy(np.r_[np.float32(0.9), falling.repeat(3)])
    label = torch.from_numpy(
        np.r_[2, rng.permuted(np.tile([4, 5, 6], (10, 1)), axis=1).ravel()]
    )  # the same votes for three
    assert vote(similarity[None], label[None], 1.0).tolist() == [[4, 5, 6, 2, -1]]


def test_a_class_without_any_vote_worth_counting_still_has_its_rank():
    ranked = vote(
        torch.tensor([[1.0, -1.0]]), torch.tensor([[4, 2]]), 0.001
    )  # e^-2000 of the first
    assert ranked.tolist() == [[4, 2, -1, -1, -1]]


def test_distant_classes_are_ranked_by_their_votes_at_a_low_temperature():
    similarity, label = torch.tensor([[0.95, 0.6, 0.5, 0.4, 0.3]]), torch.tensor([[9, 8, 7, 6, 5]])
    assert vote(similarity, label, 0.01).tolist() == [[9, 8, 7, 6, 5]]


def test_a_vote_of_very_many_neighbours_does_not_overflow():
    k = 70_000
    label = torch.ones(1, k, dtype=torch.int64)
    label[0, : k // 2 + 1] = 3
    assert vote(torch.ones(1, k), label, 0.07).tolist() == [[3, 1, -1, -1, -1]]


def test_labels_may_be_any_number():
    labels = torch.tensor([10**12, 7, 10**12, 3, 10**12 + 1])
    predictions = knn_classify(torch.eye(5), labels, torch.ones(1, 5), nb_knn=(5,))[5]
    assert predictions.tolist() == [[10**12, 3, 7, 10**12 + 1, -1]]


@pytest.mark.parametrize("processes", [2, 3, 5, 9])
def test_processes_share_the_test_images(monkeypatch, processes):
    set_blocks(monkeypatch, (2, 4, 7))
    train, labels, test = exact_problem(2, train=25, test=15)
    splits = {
        "train": Split(train[:, None], labels),
        "validation": Split(test[:, None], torch.zeros(15)),
    }
    features = SimpleNamespace(name="features", split=splits.__getitem__)
    config = KnnConfig(weights="x", nb_knn=(9, 4))

    def of_process(rank):
        fabric = SimpleNamespace(
            world_size=processes,
            global_rank=rank,
            is_global_zero=False,
            device=CPU,
            all_reduce=lambda t, reduce_op: t,
        )
        return classify_shared(config, features, [0], fabric)

    shares = [of_process(rank) for rank in range(processes)]
    for k in (9, 4):
        assert sum(share[k] for share in shares).tolist() == naive_ranking(
            train, labels, test, k, 0.07
        )


def test_chosen_parts_are_classified_as_if_alone(monkeypatch):
    set_blocks(monkeypatch, (3, 6, 7))
    train, labels, test = exact_problem(3, train=25, test=8)
    noise = torch.randn(33, 3, 16, generator=torch.Generator().manual_seed(0))
    for parts in ([0], [1], [0, 2]):
        features = noise.clone()
        features[:, parts] = 0
        features[:25, parts[0]], features[25:, parts[0]] = train, test
        ranked = knn_classify(features[:25], labels, features[25:], nb_knn=(6,), parts=parts)[6]
        assert ranked.tolist() == naive_ranking(train, labels, test, 6, 0.07)
