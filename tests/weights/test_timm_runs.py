"""A pretrained timm network: every way to load, evaluate and export it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import timm
import torch
from helpers import TINY
from run_pictures import empty_pictures

import dino_xcit
from dino_xcit.cli import main
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.errors import UserError
from dino_xcit.model.timm_backbone import TimmBackbone
from dino_xcit.run_folder import CONFIG, LAST, TEACHER, read_config
from dino_xcit.train.module import DINOModule
from dino_xcit.train.schedules import Schedules
from dino_xcit.weights.build import build
from dino_xcit.weights.load import load_backbone, save_backbone
from dino_xcit.weights.start import start_from

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["--accelerator", "cpu", "--num_workers", "0", "--no_cache", "--precision", "32-true"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run folder of a few steps of a ResNet."""
    folder = tmp_path_factory.mktemp("timm") / "run"
    options = dataclasses.asdict(TINY) | {
        "arch": "timm:resnet10t",
        "num_images": 16,
        "epochs": 1,
        "trainer": {"enable_progress_bar": False},
        "output_dir": str(folder),
    }
    with empty_pictures():
        dino_xcit.pretrain(**options)
    return folder


def part(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_files_of_a_run_have_timms_names_and_its_own_arch(run):
    names = timm.create_model("resnet10t", num_classes=0).state_dict().keys()
    assert safetensors.torch.load_file(run / TEACHER).keys() == names
    assert part(run / LAST, "student.backbone.").keys() == names
    assert load_backbone(run).metadata["arch"] == "timm:resnet10t"


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_a_checkpoint_gives_the_network_that_is_named(run, network):
    backbone = load_backbone(run / LAST, checkpoint_key=network)
    assert isinstance(backbone, TimmBackbone)
    assert not backbone.training
    assert same(backbone.state_dict(), part(run / LAST, f"{network}.backbone."))


def test_the_run_folder_and_its_teacher_give_timms_features(run):
    theirs = timm.create_model("resnet10t", num_classes=0).eval()
    theirs.load_state_dict(safetensors.torch.load_file(run / TEACHER))
    images = torch.randn(2, 3, 32, 48)
    for weights in (run, run / TEACHER, run / LAST):
        with torch.no_grad():
            torch.testing.assert_close(load_backbone(weights)(images), theirs(images))


def test_tensors_of_timm_without_metadata_need_their_arch(tmp_path):
    network = timm.create_model("resnet10t", num_classes=0)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"is not of an XCiT: .* --arch timm:NAME"):
        load_backbone(tmp_path / "w.safetensors")
    backbone = load_backbone(tmp_path / "w.safetensors", arch="timm:resnet10t")
    assert same(backbone.state_dict(), network.state_dict())
    with pytest.raises(UserError, match=r"does not fit timm:resnet14t: missing: "):
        load_backbone(tmp_path / "w.safetensors", arch="timm:resnet14t")


def test_a_new_run_starts_from_a_run(run):
    config = read_config(run)
    schedules = Schedules(config=config, steps_per_epoch=2, total_batch=8)
    module = DINOModule(config, schedules)
    taken = start_from(str(run / LAST), module.student, module.teacher, module.loss)
    assert "the student's head, the teacher's head, center; anew: optimizer" in taken
    for name in ("student", "teacher"):
        ours = getattr(module, name).backbone.state_dict()
        assert same(ours, part(run / LAST, f"{name}.backbone."))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "result"),
    [
        (["knn-eval", "--nb_knn", "5", "--baselines"], "knn.json"),
        (["linear-eval", "--lr", "0.1", "--epochs", "1", "--batch_size", "8"], "linear.json"),
    ],
)
def test_evaluations_take_a_run(run, tmp_path, command, result):
    options = ["--weights", str(run), "--output_dir", str(tmp_path), *QUICK]
    assert main([*command, *options]) == 0
    report = json.loads((tmp_path / result).read_text())
    assert 0 <= report["results"][0]["top1"] <= 100
    if "--baselines" in command:
        assert "timm:resnet10t, untrained" in json.dumps(report)


def read_back(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_timm_opens_the_export_of_a_run(run, tmp_path):
    assert main(["export", "--weights", str(run), "--output_dir", str(tmp_path)]) == 0
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            read_back(tmp_path / "resnet10t_timm")(images), load_backbone(run)(images)
        )


def test_the_hub_folder_of_a_run_has_its_recipe_and_says_what_it_is(run, tmp_path):
    arguments = ["--weights", str(run), "--format", "hf", "--output_dir", str(tmp_path)]
    assert main(["export", *arguments]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == "resnet10t_hf"
    card = (folder / "README.md").read_text()
    assert "timm backbone (" in card
    assert "xcit" not in card.split("## Recipe")[0].replace("dino_xcit", "")
    assert (folder / CONFIG).read_text().strip() in card
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(read_back(folder)(images), load_backbone(run)(images))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_networks_of_another_size_and_channels_come_back_from_timm(name, tmp_path):
    config = RunConfig(
        arch=f"timm:{name}", in_chans=1, mean=(0.3,), std=(0.2,), global_crops_size=64
    )
    torch.manual_seed(0)
    metadata = {"arch": config.arch, "in_chans": 1, "global_crops_size": 64}
    backbone = build(metadata).eval()
    save_backbone(backbone, config, tmp_path / "w.safetensors")
    weights = ["--weights", str(tmp_path / "w.safetensors")]
    assert main(["export", *weights, "--output_dir", str(tmp_path)]) == 0
    network = read_back(tmp_path / f"{name}_timm")
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), backbone(images))
    data = timm.data.resolve_model_data_config(network)
    assert data["input_size"] == (1, 64, 64)
    again = load_backbone(f"timm:local-dir:{tmp_path / f'{name}_timm'}")
    assert same(again.state_dict(), backbone.state_dict())
    assert again.metadata["mean"] == [0.3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--format", "official"], "--format official needs an XCiT"),
        (["export", "--format", "timm", "onnx"], "--format onnx needs an XCiT"),
        (["export", "--format", "torch_export", "--attention"], "needs an XCiT"),
        (["attention"], "timm:resnet10t has no class-attention layers"),
    ],
)
def test_what_needs_an_xcit_refuses_in_one_line(run, tmp_path, capsys, arguments, message):
    options = ["--weights", str(run), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert "timm:resnet10t" in lines[0] or str(run) in lines[0]
    assert not (tmp_path / "out").exists()
