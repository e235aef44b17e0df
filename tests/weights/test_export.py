"""What `dino-xcit export` writes, read back by the tools it is for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import dino_xcit
from dino_xcit.cli import main
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.errors import UserError
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.figures.maps import class_attention
from dino_xcit.model.xcit import XCiT
from dino_xcit.train.pretrain import pretrain
from dino_xcit.weights.config_json import with_assumed
from dino_xcit.weights.load import load_backbone, save_backbone

NANO = RunConfig(arch="xcit_n12_p16", in_chans=1, mean=(0.3,), std=(0.2,), global_crops_size=64)


@pytest.fixture(scope="module")
def nano() -> XCiT:
    torch.manual_seed(0)
    backbone = XCiT("xcit_n12_p16", in_chans=1).eval()
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.02 * torch.rand_like(tensor)
    return backbone


@pytest.fixture
def here(nano, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_backbone(nano, NANO, Path("w.safetensors"))
    return tmp_path


def export(*arguments: str) -> int:
    return main(["export", "--weights", "w.safetensors", *arguments])


def same_features(nano, other, size=(32, 48), batch=2):
    images = torch.randn(batch, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(other(images), nano(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_timm_opens_the_folder_with_its_size_and_normalisation(here, nano):
    assert export("--format", "timm") == 0
    network = timm.create_model("local-dir:export/xcit_n12_p16_timm", pretrained=True).eval()
    same_features(nano, network)
    data = timm.data.resolve_data_config({}, model=network)
    assert [list(data[name]) for name in ("input_size", "mean", "std")] == [
        [1, 64, 64],
        [0.3],
        [0.2],
    ]
    assert network.pretrained_cfg["crop_pct"] == 1  # below 96 pixels nothing is cut off
    again = load_backbone("timm:local-dir:export/xcit_n12_p16_timm")
    assert all(
        torch.equal(tensor, nano.state_dict()[name]) for name, tensor in again.state_dict().items()
    )


FRAMING = {"in_chans": 1, "global_crops_size": 64, "mean": [0.3], "std": [0.2]}


@pytest.mark.parametrize(
    "written",
    [
        "xcit_n12_p16_timm",
        "xcit_n12_p16_timm/model.safetensors",
        "dino_xcit_nano_12_p16.pth",
        "xcit_n12_p16_timm/renamed.safetensors",
    ],
)
@pytest.mark.slow
def test_size_and_normalisation_come_back_from_every_file(here, nano, written):
    assert export("--format", "timm", "official") == 0
    folder = Path("export/xcit_n12_p16_timm")
    if written.endswith("renamed.safetensors"):
        (folder / "model.safetensors").rename(Path("export") / written)
    again = load_backbone(Path("export") / written)
    assert {name: again.metadata[name] for name in FRAMING} == FRAMING
    same_features(nano, again)


def test_the_json_of_another_architecture_is_not_taken(here):
    torch.save(XCiT("xcit_pico2_p4").state_dict(), "other.pth")
    Path("config.json").write_text(
        json.dumps({"architecture": "xcit_nano_12_p16_224", "mean": [0.1] * 3})
    )
    assert "mean" not in load_backbone("other.pth").metadata
    Path("config.json").write_text("{no json")
    assert "mean" not in load_backbone("other.pth").metadata
    Path("config.json").write_text(
        json.dumps({"architecture": "xcit_pico_2_p4", "mean": [0.1] * 3})
    )
    assert load_backbone("other.pth").metadata["mean"] == [0.1] * 3


def test_a_folder_of_another_network_of_timm_is_taken_as_it_is(here):
    network = timm.create_model("test_vit", num_classes=0, img_size=96).eval()
    timm.models.save_for_hf(network, "vit", safe_serialization=True)
    backbone = load_backbone("vit")
    assert backbone.metadata["global_crops_size"] == 96
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), network(x))


def test_what_had_to_be_assumed_is_printed(here, capsys):
    torch.save(XCiT("xcit_n12_p16").state_dict(), "bare.pth")
    assert main(["export", "--weights", "bare.pth"]) == 0
    assert (
        "--weights bare.pth does not hold the framing of its images; assumed: --image_size 224, "
        "--mean 0.485 0.456 0.406, --std 0.229 0.224 0.225" in capsys.readouterr().err
    )
    about = {"mean": [0.5] * 3, "in_chans": 3, "global_crops_size": 64}
    assert with_assumed(about, "w", given=["std"])["std"] == (0.229, 0.224, 0.225)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"of its 1 channels are not known; set --mean and --std"):
        with_assumed({"in_chans": 1}, "w")


@pytest.mark.slow
def test_official_names_come_back(here, nano):
    assert export("--format", "official", "--output_dir", "out") == 0
    tensors = torch.load("out/dino_xcit_nano_12_p16.pth", weights_only=True)
    assert "pos_embeder.token_projection.weight" in tensors
    assert tensors["cls_attn_blocks.1.attn.qkv.weight"].shape == (3 * 128, 128)
    assert not any(name.startswith(("pos_embed.", "head")) for name in tensors)
    again = load_backbone("out/dino_xcit_nano_12_p16.pth")
    assert all(
        torch.equal(tensor, nano.state_dict()[name]) for name, tensor in again.state_dict().items()
    )


@pytest.mark.slow
def test_torch_export_takes_any_batch_and_size(here, nano):
    assert export("--format", "torch_export") == 0
    program = torch.export.load("export/xcit_n12_p16.pt2").module()
    same_features(nano, program)
    same_features(nano, program, size=(32, 160), batch=1)


@pytest.mark.slow
def test_onnx_takes_any_batch_and_size_and_gives_the_maps(here, nano, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export("--format", "onnx", "--attention") == 0
    assert [path.name for path in Path("export").iterdir()] == [
        "xcit_n12_p16.onnx"
    ]  # weights inside
    session = onnxruntime.InferenceSession(
        "export/xcit_n12_p16.onnx", providers=["CPUExecutionProvider"]
    )
    axes = [value.shape for value in (*session.get_inputs(), *session.get_outputs())]
    assert axes == [
        ["batch", 1, "height", "width"],
        ["batch", 128],
        ["batch", 4, "rows", "columns"],
    ]
    assert session.get_modelmeta().custom_metadata_map == {
        "arch": "xcit_n12_p16",
        "patch_size": "16",
        "image_size": "64",
        "mean": "[0.3]",
        "std": "[0.2]",
    }
    for batch, size in ((1, (16, 16)), (3, (80, 32))):
        images = torch.randn(batch, 1, *size)
        features, maps = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(features, nano(images), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(maps, class_attention(nano, images), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_graphs_in_half_precision_take_and_return_float32(here, nano):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export("--format", "onnx", "torch_export", "--half", "true", "--opset", "18") == 0
    model = onnx.load("export/xcit_n12_p16.onnx")
    assert model.opset_import[0].version == 18
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert weights < 2.2 * sum(p.numel() for p in nano.parameters())
    extra = {"dino_xcit.json": ""}
    program = torch.export.load("export/xcit_n12_p16.pt2", extra_files=extra).module()
    assert json.loads(extra["dino_xcit.json"])["mean"] == "[0.3]"
    images = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        features, expected = program(images), nano(images)
    assert features.dtype == torch.float32
    assert (features - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.slow
def test_a_run_becomes_a_folder_for_the_hub_with_its_recipe_scores_and_figure(tiny, tmp_path):
    config = dataclasses.replace(tiny, arch="xcit_n12_p8", epochs=1, num_images=16)
    folder = pretrain(config).folder
    report = knn_eval(
        KnnConfig(weights=str(folder), nb_knn=(5,), accelerator="cpu", no_cache=True, num_workers=0)
    )
    out = tmp_path / "out"
    assert (
        main(["export", "--weights", str(folder), "--format", "hf", "--output_dir", str(out)]) == 0
    )
    place = out / "xcit_n12_p8_hf"
    assert [path.name for path in out.iterdir()] == [place.name]
    files = {
        "README.md",
        "config.json",
        "model.safetensors",
        "config.yaml",
        "attention.png",
        "knn.json",
    }
    assert {path.name for path in place.iterdir()} == files
    card = (place / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert f"| {report['results'][0]['top1']:.1f} |" in card
    assert "arch: xcit_n12_p8" in card
    assert "![" in card
    network = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    images = torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            network(images), load_backbone(folder)(images), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "ablation", "message"),
    [
        ("xcit_pico2_p4", {}, "timm has no xcit_pico2_p4"),
        ("xcit_pico2_p4", {"lpi": False}, "timm has no XCiT without lpi"),
    ],
)
def test_networks_that_timm_lacks_are_refused(here, capsys, arch, ablation, message):
    config = dataclasses.replace(NANO, arch=arch, **ablation)
    save_backbone(XCiT(arch, in_chans=1, **ablation), config, Path("w.safetensors"))
    assert export() == 2
    assert message in capsys.readouterr().err
    assert list(Path("export").iterdir()) == []
    assert export("--format", "torch_export") == 0


def test_a_file_with_other_features_is_not_kept(here, monkeypatch):
    monkeypatch.setattr(
        "dino_xcit.weights.export.to_official_names",
        lambda tensors: {k: 2 * v for k, v in tensors.items()},
    )
    with pytest.raises(RuntimeError, match="gives other features"):
        dino_xcit.export(weights="w.safetensors", format=["official"])
    assert list(Path("export").iterdir()) == []


@pytest.mark.slow
def test_the_folder_of_timm_stays_when_the_hub_folder_is_written(here):
    assert export("--format", "timm") == 0
    assert export("--format", "hf") == 0
    folders = {path.name for path in Path("export").iterdir()}
    assert folders == {"xcit_n12_p16_timm", "xcit_n12_p16_hf"}
    card = Path("export/xcit_n12_p16_hf/README.md").read_text()
    assert "XCiT backbone (" in card
    assert "## Recipe" not in card  # these weights are of no run


def test_the_function_of_python_returns_what_it_wrote(here):
    (path,) = dino_xcit.export(weights="w.safetensors", format=["official"], output_dir="out")
    assert path == Path("out/dino_xcit_nano_12_p16.pth")
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tensorrt"], "--format"),
        (
            ["--attention"],
            "--attention is True; expected false without --format onnx or torch_export",
        ),
        (["--half", "true"], "--half is True; expected false without --format onnx"),
        (["--opset", "18"], "--opset is 18; expected none without --format onnx"),
        (["--weights", "gone.pth"], "--weights gone.pth does not exist; expected a run folder"),
        (["--output_dir", "w.safetensors"], "--output_dir w.safetensors is a file"),
    ],
)
def test_options_that_cannot_be_are_refused(here, capsys, arguments, message):
    assert export(*arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(here, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export("--format", "onnx") == 2
    assert (
        "--format onnx needs onnxruntime: pip install onnx onnxscript onnxruntime"
        in capsys.readouterr().err
    )
