"""Figures of an evaluation: confusions, accuracy of each class, segmented images."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from dino_xcit.evaluate.class_figures import SegmentedImage, draw_classes, draw_segmentation


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **o: (figures.append(figure), save(figure, *a, **o))
    )
    return figures


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def bars(axes):
    """Accuracy by the class's name, from below."""
    names = dict(
        zip(axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()], strict=True)
    )
    return [(names.get(i), round(bar.get_width(), 3)) for i, bar in enumerate(axes.patches)]


def test_the_picture_shows_confusions_and_the_accuracy_of_each_class(tmp_path, saved):
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, -1, 0, 1])
    draw_classes(
        tmp_path / "classes.png", "k-NN, 50 %", predicted, labels, {0: "a", 1: "b", 2: "c"}
    )
    assert [p.name for p in tmp_path.iterdir()] == ["classes.png"]
    width, height = opened(tmp_path / "classes.png")
    assert width > height > 600
    left, right = saved[0].axes[:2]
    assert left.images[0].get_array().tolist() == [
        [75, 25, 0],
        [0, 50, 0],
        [50, 50, 0],
    ]  # a row adds up to what got a vote
    assert [label.get_text() for label in left.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "c"]
    assert {(t.get_position(), t.get_text()) for t in left.texts} == {
        ((0, 0), "75"),
        ((1, 0), "25"),
        ((1, 1), "50"),
        ((0, 2), "50"),
        ((1, 2), "50"),
    }
    assert bars(right) == [("c", 0), ("b", 50), ("a", 75)]
    assert right.lines[0].get_xdata()[0] == pytest.approx(125 / 3)
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["mean 41.7 %"]
    assert saved[0].get_suptitle() == "k-NN, 50 %"


def test_classes_without_validation_images_have_a_row_but_no_accuracy(tmp_path, saved):
    draw_classes(
        tmp_path / "classes.png",
        "",
        np.array([7, 7, 3, 5]),
        np.array([3, 3, 3, 5]),
        {3: "a", 5: "b", 7: "c"},
    )
    left, right = saved[0].axes[:2]
    np.testing.assert_allclose(
        left.images[0].get_array(), [[100 / 3, 0, 200 / 3], [0, 100, 0], [0, 0, 0]]
    )
    assert bars(right) == [("a", 33.333), ("b", 100)]
    assert right.lines[0].get_xdata()[0] == pytest.approx(200 / 3)


def test_classes_without_names_are_numbered(tmp_path, saved):
    draw_classes(tmp_path / "classes.png", "", np.array([7, 10**12]), np.array([7, 10**12]), {})
    assert [label.get_text() for label in saved[0].axes[0].get_xticklabels()] == [
        "class 7",
        "class 1000000000000",
    ]


@pytest.mark.parametrize("of_all", [-1, 0])
def test_a_picture_of_one_class_or_no_vote_opens(tmp_path, of_all):
    draw_classes(tmp_path / "classes.png", "", np.full(4, of_all), np.zeros(4, dtype=int), {0: "a"})
    assert opened(tmp_path / "classes.png")


@pytest.mark.parametrize("count", [16, 40, 41, 300])
@pytest.mark.slow
def test_pictures_of_many_classes_open(tmp_path, saved, count):
    labels = np.repeat(np.arange(count), 2)
    predicted = labels.copy()
    predicted[:count:2] = (
        predicted[:count:2] + 1
    ) % count  # the first half of the classes is half right
    draw_classes(
        tmp_path / "classes.png",
        "many",
        predicted,
        labels,
        {c: f"class of {c}" for c in range(count)},
    )
    assert max(opened(tmp_path / "classes.png")) < 5000
    left, right = saved[0].axes[:2]
    assert not left.texts
    assert len(right.patches) == count
    assert right.patches[0].get_width() == 50
    assert right.patches[-1].get_width() == 100
    named = [label.get_text() for label in right.get_yticklabels()]
    if count <= 40:
        assert len(named) == len(left.get_xticklabels()) == count
    else:  # the worst and the best, in their order and on the axis
        assert named == [f"class of {c}" for c in [*range(5), *range(count - 5, count)]]
        assert sorted(right.get_yticks()) == list(right.get_yticks())
        assert right.get_yticks()[0] == 0
        assert right.get_yticks()[-1] == count - 1


@pytest.mark.parametrize("present", [1, 4, 7])
@pytest.mark.slow
def test_few_classes_with_validation_images_among_many_open(tmp_path, saved, present):
    predicted = np.arange(60)
    labels = predicted % present
    draw_classes(
        tmp_path / "classes.png",
        "few of many",
        predicted,
        labels,
        {c: f"class of {c}" for c in range(60)},
    )
    assert opened(tmp_path / "classes.png")
    named = [label.get_text() for label in saved[0].axes[1].get_yticklabels()]
    assert sorted(named) == [f"class of {c}" for c in range(present)]


NAMES = [
    "it's",
    'a "quoted" one',
    "$x^2",
    r"$\frac{$",
    "50 %",
    "<script>alert(1)</script>",
    "naïve Ω ж",
    "_hidden",
    "",
    "a\nb",
]


def test_names_are_written_as_they_are(tmp_path, saved):
    labels = np.arange(len(NAMES))
    draw_classes(
        tmp_path / "classes.png", r"$\frac{$ <b> %s {}", labels, labels, dict(enumerate(NAMES))
    )
    assert opened(tmp_path / "classes.png")
    left, right = saved[0].axes[:2]
    for ticks in (left.get_xticklabels(), left.get_yticklabels(), right.get_yticklabels()):
        assert [label.get_text() for label in ticks] == NAMES
    assert saved[0].get_suptitle() == r"$\frac{$ <b> %s {}"


def test_names_of_folders_that_are_not_utf8_are_drawn(tmp_path):
    labels = np.arange(2)
    names = {0: os.fsdecode(b"caf\xe9"), 1: "tea"}
    draw_classes(tmp_path / "classes.png", names[0], labels, labels, names)
    assert opened(tmp_path / "classes.png")


def test_a_segmentation_shows_images_masks_predictions_and_the_iou_of_each_class(tmp_path, saved):
    rng = np.random.default_rng(0)
    examples = [
        SegmentedImage(
            image=rng.integers(0, 256, (8, 8, channels), dtype=np.uint8),
            mask=np.array([[0, 255], [2, 1]], np.uint8).repeat(4, 0).repeat(4, 1),
            predicted=np.zeros((8, 8), np.int64),
        )
        for channels in (3, 1)
    ]
    iou = {"a": 80.0, "c": 20.0}
    path = tmp_path / "seg.png"
    draw_segmentation(path, "title", examples, ["a", "b", "c"], iou, miou=50.0)
    assert opened(path)
    pictures = [axes.images[0].get_array() for axes in saved[0].axes if axes.images]
    assert len(pictures) == 6
    assert np.array_equal(pictures[0], examples[0].image)
    mask = pictures[2]  # of the first example: row 1 of a 3 x 2 grid
    assert mask[0, 7].tolist() == [1, 1, 1]  # no class is white
    assert len({tuple(mask[y, x].tolist()) for y in (0, 7) for x in (0, 7)}) == 4
    assert np.array_equal(pictures[4][7, 7], mask[0, 0])  # class 0 everywhere
    assert bars(saved[0].axes[-1]) == [("c", 20), ("a", 80)]
