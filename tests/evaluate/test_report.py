"""Results of an evaluation as numbers and text: intervals, table, output folder."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import TINY
from sklearn.metrics import f1_score, recall_score

from dino_xcit.config.evaluation import EvalConfig, KnnConfig
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.evaluate.report import (
    bootstrap,
    class_scores,
    hits,
    output_folder,
    scores,
    table,
    with_interval,
)
from dino_xcit.files import write_json
from dino_xcit.run_folder import METRICS, write_config

# -- scores ---------------------------------------------------------------------------------------


def resampled_interval(of_images, repetitions=4000):
    """The 95 % interval by its definition: images sampled with replacement, repeatedly."""
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
@pytest.mark.slow
def test_bootstrap_is_a_loop_over_resampled_images(values, images):
    of_images = np.random.default_rng(0).choice(np.array(values, dtype=float), images)
    spread = np.ptp(resampled_interval(of_images))
    assert bootstrap(of_images, 0) == pytest.approx(
        resampled_interval(of_images), abs=0.08 * spread
    )


@pytest.mark.parametrize(("share", "value"), [(True, 1.0), (False, 0.0), (0.4, 0.4)])
def test_bootstrap_of_equal_images_has_no_width(share, value):
    assert bootstrap(np.full(7, share), 0) == pytest.approx((value, value), abs=1e-12)


def balanced_accuracy(labels, guess):
    return recall_score(labels, guess, labels=np.unique(labels), average="macro")


@pytest.mark.slow
@pytest.mark.parametrize("classifiers", [1, 2])
def test_scores_over_classes_are_those_of_scikit_learn(classifiers):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 7], 300, p=[0.8, 0.15, 0.05])  # class 1 is only predicted
    guesses = [np.where(rng.random(300) < 0.7, labels, rng.integers(0, 3, 300)) for _ in "ab"]
    guesses = guesses[:classifiers]
    found = class_scores([torch.from_numpy(g) for g in guesses], torch.from_numpy(labels), 0)
    balanced = [balanced_accuracy(labels, guess) for guess in guesses]
    f1 = [f1_score(labels, guess, average="macro") for guess in guesses]
    assert found["balanced_accuracy"] == pytest.approx(100 * np.mean(balanced), abs=1e-3)
    assert found["macro_f1"] == pytest.approx(100 * np.mean(f1), abs=1e-3)
    rows = [rng.integers(0, 300, 300) for _ in range(1000)]
    resampled = [np.mean([balanced_accuracy(labels[r], g[r]) for g in guesses]) for r in rows]
    expected = 100 * np.quantile(resampled, [0.025, 0.975])
    np.testing.assert_allclose(found["balanced_accuracy_ci95"], expected, atol=2)
    low, high = found["macro_f1_ci95"]
    assert low < found["macro_f1"] < high


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


# -- table and file -------------------------------------------------------------------------------


def test_a_table_has_its_first_column_to_the_left_and_numbers_to_the_right():
    rows = [["a long name", "5", "99.1 [98.0, 100.0]"], ["b", "200", "-"]]
    assert table(["k-NN", "k", "top-1 %"], rows).splitlines() == [
        "k-NN           k             top-1 %",
        "------------------------------------",
        "a long name    5  99.1 [98.0, 100.0]",
        "b            200                   -",
    ]
    assert table(["network", "k"], []).splitlines() == ["network  k", "----------"]


def test_a_score_is_printed_with_its_interval_or_as_a_dash():
    values = {
        "top1": 87.06,
        "top1_ci95": [86.449, 100.0],
        "top5": None,
        "mean": 0.0,
        "mean_ci95": [0.0, 0.04],
    }
    assert with_interval(values, "top1") == "87.1 [86.4, 100.0]"
    assert with_interval(values, "top5") == with_interval(values, "absent") == "-"
    assert with_interval(values, "mean") == "0.0 [0.0, 0.0]"


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"values": [1.5, float("nan"), (float("inf"), 2)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"values": [1.5, None, [None, 2]]}


def test_json_is_written_whole_into_a_new_folder(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "knn.json"
    write_json(path, {"results": [1, None]})
    monkeypatch.delattr("os.replace")  # stopped before the last step
    with pytest.raises(AttributeError):
        write_json(path, {"results": [2]})
    assert json.loads(path.read_text()) == {"results": [1, None]}
    assert [p.name for p in path.parent.iterdir()] == ["knn.json"]


# -- folder ---------------------------------------------------------------------------------------


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
