"""What an evaluation leaves behind: intervals, table, picture, folder."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image

from dino_xcit.config.evaluation import EvalConfig, KnnConfig
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.evaluate.report import (
    bootstrap,
    cell,
    draw_classes,
    hits,
    output_folder,
    scores,
    table,
)
from dino_xcit.files import write_json
from dino_xcit.run_folder import METRICS, write_config

# -- scores ----------------------------------------------------------------------------------------------------------


def resampled_interval(of_images, repetitions=4000):
    """The 95 % interval as it is defined: images drawn with replacement, again and again."""
    rng = np.random.default_rng(1)
    means = [
        of_images[rng.integers(0, len(of_images), len(of_images))].mean()
        for _ in range(repetitions)
    ]
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize(
    "values", [[0, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0.2, 0.4, 1], [-3.0, 5.5]]
)
@pytest.mark.parametrize("images", [50, 400])
def test_bootstrap_is_a_loop_over_resampled_images(values, images):
    of_images = np.random.default_rng(0).choice(np.array(values, dtype=float), images)
    spread = np.ptp(resampled_interval(of_images))
    assert bootstrap(of_images, 0) == pytest.approx(
        resampled_interval(of_images), abs=0.08 * spread
    )


@pytest.mark.parametrize(("share", "value"), [(True, 1.0), (False, 0.0), (0.4, 0.4)])
def test_bootstrap_of_equal_images_has_no_width(share, value):
    assert bootstrap(np.full(7, share), 0) == pytest.approx((value, value), abs=1e-12)


def test_bootstrap_depends_on_the_seed_alone():
    of_images = np.random.default_rng(0).random(200).round(1)
    assert bootstrap(of_images, 3) == bootstrap(of_images[::-1], 3)
    assert bootstrap(of_images, 3) != bootstrap(of_images, 4)


def test_scores_are_percent_with_an_interval_for_each_measure():
    right = np.arange(80) % 8 > 0
    values = scores(
        {"top1": right, "top5": np.ones(80, dtype=bool), "mean": np.full(80, 1 / 3)}, seed=2
    )
    assert list(values) == ["top1", "top1_ci95", "top5", "top5_ci95", "mean", "mean_ci95"]
    assert values["top1"] == 87.5
    assert values["top1_ci95"] == [round(100 * bound, 3) for bound in bootstrap(right, 2)]
    assert (values["top5"], values["top5_ci95"]) == (100.0, [100.0, 100.0])
    assert values["mean"] == 33.333
    assert json.loads(json.dumps(values)) == values


def test_hits_are_classes_among_the_first():
    ranked = torch.tensor([[2, 1, 0], [1, 2, -1], [0, -1, -1], [1, 0, 2]])
    labels = torch.tensor([2, 2, 1, 2])
    assert hits(ranked, labels, 1).tolist() == [True, False, False, False]
    assert hits(ranked, labels, 2).tolist() == [True, True, False, False]
    assert hits(ranked, labels, 5).tolist() == [True, True, False, True]
    assert hits(ranked, labels, 1).dtype == bool


# -- table and file --------------------------------------------------------------------------------------------------


def test_a_table_has_its_first_column_to_the_left_and_numbers_to_the_right():
    rows = [["a long name", "5", "99.1 [98.0, 100.0]"], ["b", "200", "-"]]
    assert table(["k-NN", "k", "top-1 %"], rows).splitlines() == [
        "k-NN           k             top-1 %",
        "------------------------------------",
        "a long name    5  99.1 [98.0, 100.0]",
        "b            200                   -",
    ]
    assert table(["network", "k"], []).splitlines() == ["network  k", "----------"]


def test_a_cell_is_a_value_with_its_interval_or_a_dash():
    values = {
        "top1": 87.06,
        "top1_ci95": [86.449, 100.0],
        "top5": None,
        "mean": 0.0,
        "mean_ci95": [0.0, 0.04],
    }
    assert cell(values, "top1") == "87.1 [86.4, 100.0]"
    assert cell(values, "top5") == cell(values, "absent") == "-"
    assert cell(values, "mean") == "0.0 [0.0, 0.0]"


def test_json_is_written_whole_into_a_new_folder(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "knn.json"
    write_json(path, {"results": [1, None]})
    monkeypatch.delattr("os.replace")  # stopped before the last step
    with pytest.raises(AttributeError):
        write_json(path, {"results": [2]})
    assert json.loads(path.read_text()) == {"results": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["knn.json"]


# -- picture ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
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


def test_the_picture_shows_confusions_and_the_accuracy_of_each_class(tmp_path, drawn):
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, -1, 0, 1])
    draw_classes(
        tmp_path / "classes.png", "k-NN, 50 %", predicted, labels, {0: "a", 1: "b", 2: "c"}
    )
    assert [p.name for p in tmp_path.iterdir()] == ["classes.png"]
    width, height = opened(tmp_path / "classes.png")
    assert width > height > 600
    left, right = drawn[0].axes[:2]
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
    assert drawn[0].get_suptitle() == "k-NN, 50 %"


def test_classes_without_validation_images_have_a_row_but_no_accuracy(tmp_path, drawn):
    draw_classes(
        tmp_path / "classes.png",
        "",
        np.array([7, 7, 3, 5]),
        np.array([3, 3, 3, 5]),
        {3: "a", 5: "b", 7: "c"},
    )
    left, right = drawn[0].axes[:2]
    np.testing.assert_allclose(
        left.images[0].get_array(), [[100 / 3, 0, 200 / 3], [0, 100, 0], [0, 0, 0]]
    )
    assert bars(right) == [("a", 33.333), ("b", 100)]
    assert right.lines[0].get_xdata()[0] == pytest.approx(200 / 3)


def test_classes_without_names_are_numbered(tmp_path, drawn):
    draw_classes(tmp_path / "classes.png", "", np.array([7, 10**12]), np.array([7, 10**12]), {})
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == [
        "class 7",
        "class 1000000000000",
    ]


@pytest.mark.parametrize("of_all", [-1, 0])
def test_a_picture_of_one_class_or_no_vote_opens(tmp_path, of_all):
    draw_classes(tmp_path / "classes.png", "", np.full(4, of_all), np.zeros(4, dtype=int), {0: "a"})
    assert opened(tmp_path / "classes.png")


@pytest.mark.parametrize("count", [16, 40, 41, 300])
def test_pictures_of_many_classes_open(tmp_path, drawn, count):
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
    left, right = drawn[0].axes[:2]
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
def test_few_classes_with_validation_images_among_many_open(tmp_path, drawn, present):
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
    named = [label.get_text() for label in drawn[0].axes[1].get_yticklabels()]
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


def test_names_are_written_as_they_are(tmp_path, drawn):
    labels = np.arange(len(NAMES))
    draw_classes(
        tmp_path / "classes.png", r"$\frac{$ <b> %s {}", labels, labels, dict(enumerate(NAMES))
    )
    assert opened(tmp_path / "classes.png")
    left, right = drawn[0].axes[:2]
    for ticks in (left.get_xticklabels(), left.get_yticklabels(), right.get_yticklabels()):
        assert [label.get_text() for label in ticks] == NAMES
    assert drawn[0].get_suptitle() == r"$\frac{$ <b> %s {}"


def test_names_of_folders_that_are_not_utf8_are_drawn(tmp_path):
    labels = np.arange(2)
    names = {0: os.fsdecode(b"caf\xe9"), 1: "tea"}
    draw_classes(tmp_path / "classes.png", names[0], labels, labels, names)
    assert opened(tmp_path / "classes.png")


# -- folder ----------------------------------------------------------------------------------------------------------


def test_results_go_to_the_folder_that_is_named(tmp_path):
    named = EvalConfig(weights="timm:resnet10t", output_dir=str(tmp_path / "results"))
    assert output_folder(named) == tmp_path / "results"
    assert output_folder(KnnConfig(load_features="dump", output_dir=str(tmp_path))) == tmp_path


@pytest.mark.parametrize("weights", ["", "checkpoints/last.ckpt", "teacher.safetensors"])
def test_results_go_to_the_run_folder_of_the_weights(tmp_path, weights):
    write_config(dataclasses.replace(TINY, output_dir=str(tmp_path)), tmp_path)
    (tmp_path / METRICS).touch()
    assert output_folder(EvalConfig(weights=str(tmp_path / weights))) == tmp_path


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("timm:resnet10t", "timm_resnet10t"),
        ("elsewhere/xcit_s12.safetensors", "xcit_s12"),
        ("a/b/last.ckpt", "last"),
    ],
)
def test_results_of_other_weights_go_to_a_folder_of_their_name(
    tmp_path, monkeypatch, weights, name
):
    monkeypatch.chdir(tmp_path)
    assert str(output_folder(EvalConfig(weights=weights))) == f"runs/{name}"


def test_results_of_two_sets_of_weights_of_timm_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (
        output_folder(EvalConfig(weights=f"timm:resnet50.{tag}_in1k")) for tag in ("a1", "a2")
    )
    assert one != other


def test_results_of_loaded_features_go_beside_them(tmp_path):
    assert output_folder(KnnConfig(load_features=str(tmp_path / "dump"))) == tmp_path / "dump"


@pytest.mark.parametrize("options", [{"load_features": "typo"}, {"weights": "typo"}])
def test_a_name_that_is_not_there_leaves_no_folder(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="typo"):
        knn_eval(KnnConfig(accelerator="cpu", devices="1", **options))
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_folders_place_is_an_error(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*results is "):
        output_folder(EvalConfig(weights="x", output_dir=str(tmp_path / "results")))
