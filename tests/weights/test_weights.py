"""Weights of timm's networks, and the run folder that weights are in."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from helpers import TINY

from dino_xcit.data.framing import Transform
from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.model.timm_backbone import TimmBackbone
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import CONFIG, LAST, METRICS, TEACHER, write_config
from dino_xcit.train.module import DINOModule
from dino_xcit.train.schedules import Schedules
from dino_xcit.weights.load import load_backbone, read_run, run_folder_of
from dino_xcit.weights.start import start_from

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


# -- timm:NAME ----------------------------------------------------------------------------------


@pytest.fixture
def created(monkeypatch):
    """Networks that timm created, with random weights instead of downloaded ones."""
    networks, create_model = [], timm.create_model

    def create(name, *, pretrained, **options):
        if not pretrained:  # the network of a run
            return create_model(name, pretrained=False, **options)
        torch.manual_seed(0)
        networks.append(create_model(name, pretrained=False, **options))
        return networks[-1]

    monkeypatch.setattr(timm, "create_model", create)
    return networks


def timms_features(network, x):
    with torch.no_grad():
        return network.eval().forward_head(network.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("tag", ["", ".fb_in1k"])
def test_an_xcit_of_timm_becomes_ours_with_the_same_features(created, tag):
    backbone = load_backbone(f"timm:xcit_nano_12_p16_224{tag}")
    assert isinstance(backbone, XCiT)
    assert not backbone.training
    assert backbone.metadata == {
        "arch": "xcit_n12_p16",
        "in_chans": 3,
        "global_crops_size": 224,
        **IMAGENET,
    }
    x = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), timms_features(created[0], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dim", "metadata"),
    [
        ("resnet10t", 512, {"in_chans": 3, "global_crops_size": 176, **IMAGENET}),
        (
            "test_vit",
            64,
            {"in_chans": 3, "global_crops_size": 160, "mean": [0.5] * 3, "std": [0.5] * 3},
        ),
        (
            "test_convnext",
            64,
            {"in_chans": 3, "global_crops_size": 160, "mean": [0.5] * 3, "std": [0.5] * 3},
        ),
    ],
)
def test_other_networks_of_timm_give_features_without_a_classifier(created, name, dim, metadata):
    network = load_backbone(f"timm:{name}")
    assert isinstance(network, TimmBackbone)
    assert network.network is created[0]
    assert not network.training
    assert network.metadata == {**metadata, "arch": f"timm:{name}"}
    size = metadata["global_crops_size"]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = network(x)
    assert features.shape == (2, dim)
    torch.testing.assert_close(features, timms_features(created[0], x))
    transform = Transform(size, size, tuple(metadata["mean"]), tuple(metadata["std"]))
    assert FeatureExtractor(network, transform, torch.device("cpu")).shape() == (1, dim)


def test_networks_that_timm_cannot_load_are_an_error_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("no connection\n  to the hub" + 1000 * "!")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match="--weights timm:resnet10t could not be loaded: no connection to the hub!"
    ) as raised:
        load_backbone("timm:resnet10t")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_unknown_networks_of_timm_are_an_error():
    with pytest.raises(
        UserError, match="--weights timm:resnet9000 could not be loaded: Unknown model"
    ):
        load_backbone("timm:resnet9000")


# -- the run that weights are of ----------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "one"
    (folder / "checkpoints").mkdir(parents=True)
    write_config(dataclasses.replace(TINY, output_dir=str(folder), seed=7), folder)
    (folder / METRICS).touch()
    return folder


@pytest.mark.parametrize("weights", ["", LAST, TEACHER, "other.safetensors"])
def test_the_run_folder_is_found_from_what_is_in_it(run, weights):
    assert run_folder_of(str(run / weights)) == run
    assert read_run(str(run / weights)) == dataclasses.replace(TINY, output_dir=str(run), seed=7)


@pytest.mark.parametrize(
    "weights", ["runs", "runs/other.safetensors", "runs/two/last.ckpt", "runs/one/a/b/deep.ckpt"]
)
def test_weights_outside_a_run_folder_have_none(run, tmp_path, weights):
    assert run_folder_of(str(tmp_path / weights)) is None
    assert read_run(str(tmp_path / weights)) is None


def test_the_run_folder_may_be_the_one_worked_in(run, monkeypatch):
    monkeypatch.chdir(run)
    assert run_folder_of(TEACHER).resolve() == run_folder_of(".").resolve() == run


def test_weights_of_timm_are_of_no_run_wherever_they_are_used(run, monkeypatch):
    monkeypatch.chdir(run)
    assert run_folder_of("timm:resnet10t") is None
    assert read_run("timm:resnet10t") is None


@pytest.mark.parametrize("lacking", [CONFIG, METRICS])
def test_a_file_of_another_program_makes_no_run_folder(run, lacking):
    (run / lacking).unlink()
    assert run_folder_of(str(run / TEACHER)) is None
    assert read_run(str(run / TEACHER)) is None


def test_a_run_of_another_version_is_an_error_that_names_its_config(run):
    (run / "config.yaml").write_text("unknown_option: 3\n")
    with pytest.raises(UserError, match=r"one/config\.yaml is not a config of this version"):
        read_run(str(run))


# -- another image size -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_s3_tiny_224", "resnet10t", "beit_base_patch16_224"]
)
@pytest.mark.slow
def test_networks_of_timm_take_the_image_size_that_is_asked_for(created, name):
    backbone = load_backbone(f"timm:{name}", image_size=96)
    assert backbone.metadata["global_crops_size"] == 96
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 96, 96)).shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_file_of_a_timm_network_takes_another_image_size(name, tmp_path):
    network = timm.create_model(name, num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(tmp_path / "w.pth", f"timm:{name}", image_size=96)
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 96, 96)).shape == (2, backbone.embed_dim)


def test_the_image_size_of_the_weights_leaves_the_features_as_they_are(created):
    backbone, resized = (load_backbone("timm:test_vit", image_size=size) for size in (None, 160))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(resized(x), backbone(x))


def test_an_image_size_that_a_network_does_not_take_is_refused(created, tmp_path):
    with pytest.raises(UserError, match=r"--image_size 90.*set --image_size to a multiple of 16"):
        load_backbone("timm:test_vit", image_size=90)
    torch.save(XCiT("xcit_pico2_p8").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"--image_size 90.*patch size 8 must divide both"):
        load_backbone(tmp_path / "w.pth", image_size=90)


def test_a_run_of_another_image_size_starts_from_pretrained_positions(created):
    arch = "timm:test_vit"
    config = dataclasses.replace(TINY, arch=arch, global_crops_size=64, local_crops_size=32)
    module = DINOModule(config, Schedules(config=config, steps_per_epoch=6, total_batch=8))
    start_from(arch, module.student, module.teacher, module.loss)
    positions = created[-1].state_dict()["pos_embed"]
    assert positions.shape == (1, 1 + (64 // 16) ** 2, 64)
    assert torch.equal(module.student.backbone.state_dict()["pos_embed"], positions)
