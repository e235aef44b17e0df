"""k-NN accuracy and RankMe of the teacher, computed during pretraining."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch

from dino_xcit.data.images import ShapeSet
from dino_xcit.errors import UserError
from dino_xcit.model.xcit import XCiT
from dino_xcit.train.online_eval import OnlineEvaluator, StoppedError, rankme
from dino_xcit.train.pretrain import pretrain

CPU = torch.device("cpu")


def shapes(count, split="train"):
    return ShapeSet(0, split, count, 3)


class Unlabelled(ShapeSet):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.labels = self.classes = None


class Unreadable(ShapeSet):
    def read(self, index):
        raise OSError("gone")


def test_rankme_is_the_number_of_directions_that_are_used():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(50, 6, generator=generator))[0]
    assert rankme(orthogonal) == pytest.approx(6, rel=1e-3)
    direction = torch.randn(1, 6, generator=generator)
    assert rankme(orthogonal[:, :1] @ direction) == pytest.approx(1, rel=1e-3)
    values = torch.tensor([3.0, 1.0])
    share = values / 4
    expected = torch.exp(-(share * share.log()).sum()).item()
    assert rankme(orthogonal[:, :2] * values) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("validation", [None, Unlabelled(0, "validation", 30, 3)])
def test_without_labelled_validation_images_a_tenth_of_the_training_images_is_held_out(
    tiny, validation
):
    config = dataclasses.replace(tiny, eval_num_images=1000)
    evaluator = OnlineEvaluator(config, shapes(60), validation)
    queries, neighbours = (part.indices for part in (evaluator.queries, evaluator.neighbours))
    assert (len(queries), len(neighbours)) == (6, 54)
    assert sorted([*queries, *neighbours]) == list(range(60))


def test_labelled_validation_images_are_the_queries(tiny):
    train, validation = shapes(60), shapes(30, "validation")
    config = dataclasses.replace(tiny, eval_num_images=20)
    evaluator = OnlineEvaluator(config, train, validation)
    assert evaluator.queries.images is validation
    assert evaluator.neighbours.images is train
    assert len(evaluator.queries.indices) == len(evaluator.neighbours.indices) == 20


def test_scores_are_the_same_each_time_and_the_backbone_keeps_its_mode(tiny):
    backbone = XCiT("xcit_pico2_p4").train()
    evaluator = OnlineEvaluator(tiny, shapes(60), None)
    first, again = evaluator(backbone, CPU), evaluator(backbone, CPU)
    assert first == again
    assert 0 <= first.knn_top1 <= 100
    assert 1 <= first.rankme <= 64
    assert backbone.training
    backbone.eval()
    evaluator(backbone, CPU)
    assert not backbone.training


def test_images_without_labels_have_a_rankme_and_no_accuracy(tiny):
    evaluator = OnlineEvaluator(tiny, Unlabelled(0, "train", 60, 3), None)
    scores = evaluator(XCiT("xcit_pico2_p4"), CPU)
    assert scores.knn_top1 is None
    assert 1 <= scores.rankme <= 64


@pytest.mark.slow
def test_a_run_without_labels_leaves_the_column_of_the_accuracy_empty(tiny, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(40):
        image = Image.effect_noise((20, 20), 50 + i).convert("RGB")
        image.save(tmp_path / f"images/{i}.png")
    config = dataclasses.replace(
        tiny, dataset=None, num_images=None, data_path=str(tmp_path / "images")
    )
    with (pretrain(config).folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert not last.get("knn_top1")
    assert 1 <= float(last["rankme"]) <= 64


def test_a_request_to_stop_interrupts_the_evaluation(tiny):
    backbone = XCiT("xcit_pico2_p4").train()
    with pytest.raises(StoppedError):
        OnlineEvaluator(tiny, shapes(60), None)(backbone, CPU, lambda: True)
    assert backbone.training


def test_images_of_which_none_can_be_read_are_an_error_that_names_one_of_them(tiny):
    images = Unreadable(0, "train", 60, 3)
    evaluator = OnlineEvaluator(tiny, images, None)
    with pytest.raises(UserError, match=r"none of the 6 images .* --data_path") as error:
        evaluator(XCiT("xcit_pico2_p4"), CPU)
    assert images.name(int(evaluator.queries.indices[0])) in str(error.value)
