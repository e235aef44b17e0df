"""Backbones in the checkpoints of other trainers."""

from __future__ import annotations

import pytest
import timm
import torch

from dino_xcit.errors import UserError
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.load import load_backbone


@pytest.fixture(scope="module")
def one() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return XCiT("xcit_pico2_p8").state_dict()


@pytest.fixture(scope="module")
def other(one) -> dict[str, torch.Tensor]:
    return {name: 2 * tensor for name, tensor in one.items()}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


HEAD = {"layers.0.weight": torch.zeros(3, 3), "last_layer.weight_g": torch.zeros(3, 1)}


def same(backbone, tensors) -> bool:
    found = backbone.state_dict()
    return all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "prefix",
    [
        *("model.", "net.", "encoder.", "0.", "model.encoder.", "module.net.0.", "backbone."),
        *("_orig_mod.model.", "model._fsdp_wrapped_module.backbone."),
    ],
)
@pytest.mark.parametrize("outer", [None, "state_dict", "whatever"])
@pytest.mark.slow
def test_a_backbone_is_found_under_any_prefix_and_key(one, tmp_path, prefix, outer):
    tensors = under(prefix, one)
    content = {outer: tensors, "epoch": 3} if outer else tensors
    torch.save(content, tmp_path / "w.pth")
    assert same(load_backbone(tmp_path / "w.pth"), one)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student_backbone.", "teacher_backbone."),
        ("backbone.student.", "backbone.teacher."),
        ("backbone.", "backbone_momentum."),
        ("encoder_q.", "encoder_k."),
        ("model.", "model_ema.module."),
        ("online.net.", "target.net."),
        ("student.backbone.", "teacher.backbone."),
    ],
)
def test_checkpoint_key_chooses_between_two_networks(
    one, other, tmp_path, capsys, student, teacher
):
    heads = under(f"{student.rstrip('.')}_head.", HEAD) | under("teacher_head.", HEAD)
    tensors = under(student, one) | under(teacher, other) | heads
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    assert same(load_backbone(tmp_path / "w.pth"), other)
    assert same(load_backbone(tmp_path / "w.pth", checkpoint_key="student"), one)
    assert "left behind: state_dict." in capsys.readouterr().err


@pytest.mark.parametrize(
    "head", ["dino_head.", "projection_head.", "student_head.", "head.", "predictor.0."]
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_heads_and_counters_are_left_behind_and_named(one, tmp_path, capsys, head, prefix):
    tensors = under(prefix, one) | under(head, HEAD) | {"n_averaged": torch.tensor(7)}
    torch.save(tensors, tmp_path / "w.pth")
    assert same(load_backbone(tmp_path / "w.pth"), one)
    assert f"left behind: {head.split('.')[0]}, n_averaged" in capsys.readouterr().err


def test_two_different_networks_without_names_are_refused(one, other, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(under("first.", one) | under("second.", one), path)
    assert same(load_backbone(path), one)
    torch.save(under("first.", one) | under("second.", other), path)
    with pytest.raises(UserError, match=r"different networks under the names first\. and second\."):
        load_backbone(path)


def test_a_backbone_has_to_be_whole_under_its_prefix(one, tmp_path):
    tensors = under("net.", one)
    del tensors["net.blocks.0.gamma1"]
    torch.save({**tensors, "net.extra.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.0\.gamma1; left over: extra\.weight"):
        load_backbone(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["test_vit", "resnet10t"])
def test_networks_of_timm_are_found_too(tmp_path, name, capsys):
    tensors = timm.create_model(name, num_classes=0).state_dict()
    head = under("model.projection_head.", HEAD)
    torch.save({"state_dict": under("model.net.", tensors) | head}, tmp_path / "w.pth")
    assert same(load_backbone(tmp_path / "w.pth", arch=f"timm:{name}"), tensors)
    assert "left behind: state_dict.model.projection_head" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused_in_one_line(one, tmp_path):
    broken = {**one, "norm.bias": torch.full((64,), torch.inf)}
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds values that are not finite .*: norm\.bias;"):
        load_backbone(tmp_path / "w.pth")
