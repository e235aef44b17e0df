"""Weighted k-NN against a naive vote and against scikit-learn."""

import numpy as np
import pytest
import torch

from dino_xcit import knn
from dino_xcit.knn import knn_classify, top1


def problem(classes, train=60, test=13, dim=8, seed=0):
    """Features near the centre of their class, far enough from it that neighbours disagree; labels; test features."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, train - classes)])
    features = rng.normal(size=(classes, dim))[labels] + 1.5 * rng.normal(size=(train, dim))
    arrays = features, labels, rng.normal(size=(test, dim))
    return tuple(torch.from_numpy(a).float() if a.dtype == float else torch.from_numpy(a) for a in arrays)


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
    """The classes are distinct and hold the largest votes in falling order. Equal votes may come in any order."""
    for row, of_row in zip(predictions.numpy(), votes, strict=True):
        told = row[row >= 0]
        assert len(set(told)) == len(told) == min(5, (of_row > 0).sum())
        np.testing.assert_allclose(of_row[told], -np.sort(-of_row)[: len(told)], rtol=1e-4)


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
    ranked = knn_classify(train, labels, torch.tensor([[2.0, 0.1]]), nb_knn=(3,), temperature=0.1)[3]
    assert ranked[0].tolist() == [1, 3, 0, -1, -1]


def test_one_near_neighbour_outvotes_two_distant_ones_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])  # similarities 1, 0.6, 0.6
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    # e^(1 / 0.1) > 2 e^(0.6 / 0.1), but e^(1 / 1) < 2 e^(0.6 / 1)
    assert knn_classify(train, labels, test, nb_knn=(3,), temperature=0.1)[3][:, :2].tolist() == [[0, 1]]
    assert knn_classify(train, labels, test, nb_knn=(3,), temperature=1.0)[3][:, :2].tolist() == [[1, 0]]


def test_three_test_images_and_one_class():
    train, labels, test = problem(1, test=3)
    assert knn_classify(train, labels, test, nb_knn=(10,))[10].tolist() == 3 * [[0, -1, -1, -1, -1]]


def test_chunks_of_test_images_change_nothing(monkeypatch):
    train, labels, test = problem(6)
    whole = knn_classify(train, labels, test, nb_knn=(4, 9))
    monkeypatch.setattr(knn, "ROWS", 3)
    monkeypatch.setattr(knn, "TEST_ROWS", 6)
    monkeypatch.setattr(knn, "TRAIN_ROWS", 7)
    for k, predictions in knn_classify(train, labels, test, nb_knn=(4, 9)).items():
        assert_ranked_by(naive_votes(train, labels, test, k, 0.07), predictions)
        assert torch.equal(predictions[:, 0], whole[k][:, 0])


def test_more_neighbours_than_images_is_an_error_that_names_the_flag():
    train, labels, test = problem(3, train=9)
    assert knn_classify(train, labels, test, nb_knn=(9,))[9].shape == (13, 5)
    with pytest.raises(ValueError, match=r"--nb_knn 10 .* 9 training images"):
        knn_classify(train, labels, test, nb_knn=(5, 10))


def test_top1_is_the_percentage_of_right_first_classes():
    assert top1(torch.tensor([[2, 0], [1, 2], [0, 1], [0, 1]]), torch.tensor([2, 2, 0, 1])) == 50.0


@pytest.mark.parametrize("k", [1, 5, 25])
def test_first_class_is_scikit_learns(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels, test = problem(7, train=80, test=40)
    reference = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.numpy(), labels.numpy())
    predictions = knn_classify(train, labels, test, nb_knn=(k,))[k]
    assert predictions[:, 0].tolist() == reference.predict(test.numpy()).tolist()
