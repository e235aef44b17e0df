"""Weights -> attention models and their results, against a pass by hand; checkpoints of a run."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figure_helpers import noise, save_run_folder, save_weights

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.errors import UserError
from dino_xcit.figures import framing as framing_module
from dino_xcit.figures import model as model_module
from dino_xcit.figures.framing import Framing
from dino_xcit.figures.maps import attention_maps, bytes_per_pixel
from dino_xcit.figures.model import (
    AttentionModel,
    attention_result,
    open_checkpoints,
    open_models,
)
from dino_xcit.model.xcit import XCiT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "pico.safetensors")


def model_of(weights, **options):
    config = AttentionConfig(weights=(weights,), **options)
    return AttentionModel("pico", weights, config, CPU)


# -- models and results ---------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "size"), [("crop", (24, 28)), ("pad", (24, 30))])
def test_a_result_holds_the_maps_of_the_normalised_image(fit, size, tmp_path):
    path = save_weights(tmp_path / "w.safetensors", mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    model = model_of(path, image_size=30, layer=0, xca_layer=0)
    result = attention_result(
        "cat", noise(72, 90), model, Framing.of([model], fit), features=True, xca=True
    )
    assert result.name == "cat"
    assert result.patch == 4
    assert result.image.shape == (*size, 3)
    pixels, _ = Framing.of([model], fit).apply(noise(72, 90))
    np.testing.assert_array_equal(
        result.image, pixels[:, : size[0], : size[1]].permute(1, 2, 0).numpy()
    )
    x = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.4, 0.3]
    )[:, None, None]
    expected = attention_maps(model.backbone, x[None].float(), layer=0, xca_layer=0, features=True)
    for name, maps in expected._asdict().items():
        np.testing.assert_allclose(getattr(result, name), maps[0].numpy(), rtol=1e-3, atol=1e-5)
    assert result.attention.shape == (4, 6, -(-size[1] // 4))
    plain = attention_result("cat", noise(72, 90), model, Framing.of([model], fit))
    assert plain.queries is plain.keys is plain.covariance is plain.features is None


def test_backbones_of_one_framing_keep_their_own_patches(tmp_path):
    models = [
        model_of(save_weights(tmp_path / f"{patch}.safetensors", arch=f"xcit_pico2_p{patch}"))
        for patch in (4, 8)
    ]
    framing = Framing.of(models, "crop")
    results = [attention_result("cat", noise(32, 44), model, framing) for model in models]
    assert [result.patch for result in results] == [4, 8]
    assert [result.attention.shape for result in results] == [
        (4, 4, 8),
        (4, 2, 4),
    ]  # 32 x 23 is cropped to 32 x 16 for both
    np.testing.assert_array_equal(results[0].image, results[1].image)


def test_the_backbone_does_not_run_on_too_large_an_image(weights, monkeypatch):
    model = model_of(weights)
    framing = dataclasses.replace(Framing.of([model], "crop"), memory=10)
    monkeypatch.setattr(model_module, "attention_maps", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(UserError, match="32 x 32 pixels need about"):
        attention_result("cat", noise(32, 32), model, framing)


def test_weights_of_one_channel_take_grey_images(tmp_path):
    path = save_weights(tmp_path / "w.safetensors", in_chans=1, mean=(0.5,), std=(0.2,))
    model = model_of(path)
    result = attention_result("cat", noise(32, 32, 1), model, Framing.of([model], "crop"))
    assert result.image.shape == (32, 32, 1)
    assert result.attention.shape == (4, 8, 8)


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_without_their_normalisation_take_that_of_the_options(channels, tmp_path):
    path = str(tmp_path / "w.pth")
    torch.save(XCiT("xcit_pico2_p4", in_chans=channels).state_dict(), path)
    with pytest.raises(UserError, match=rf"{channels}-channel images, .* no mean; expected --mean"):
        model_of(path)
    with pytest.raises(UserError, match=rf"{channels}-channel images, and --std has 2 values"):
        model_of(path, mean=channels * (0.5,), std=(0.2, 0.2))
    model = model_of(path, mean=channels * (0.5,), std=channels * (0.25,), image_size=16)
    image = noise(16, 16, channels)
    result = attention_result("cat", image, model, Framing.of([model], "crop"))
    x = (image[None] / 255 - 0.5) / 0.25
    expected = attention_maps(model.backbone, x).attention[0]
    np.testing.assert_allclose(result.attention, expected.numpy(), rtol=1e-4, atol=1e-7)
    assert model.assumed == []


def test_the_normalisation_of_the_options_wins_and_an_assumed_one_is_named(tmp_path):
    path = save_weights(tmp_path / "w.safetensors", mean=(0.1, 0.2, 0.3))
    assert model_of(path).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model_of(path, mean=(0.4, 0.5, 0.6)).mean.flatten().tolist() == pytest.approx(
        [0.4, 0.5, 0.6]
    )
    bare = str(tmp_path / "w.pth")
    torch.save(XCiT("xcit_pico2_p4").state_dict(), bare)
    assert model_of(bare, std=(1.0, 1.0, 1.0)).assumed == ["mean"]


def test_maps_that_are_not_finite_are_refused(weights):
    model = model_of(weights)
    with torch.no_grad():
        model.backbone.norm.weight.fill_(float("nan"))  # of the patch features alone
    framing, image = Framing.of([model], "crop"), noise(16, 16)
    assert np.isfinite(attention_result("cat", image, model, framing).attention).all()
    with pytest.raises(UserError, match="values of its features are not finite"):
        attention_result("cat", image, model, framing, features=True)


@pytest.mark.parametrize(
    ("crop", "requested", "expected"),
    [(32, None, 32), (95, None, 95), (96, None, 480), (224, None, 480), (32, 100, 100), (32, 0, 0)],
)
def test_the_default_size_follows_the_crops_of_the_weights(crop, requested, expected, tmp_path):
    model = model_of(
        save_weights(tmp_path / "w.safetensors", global_crops_size=crop), image_size=requested
    )
    assert model.long_side == expected


def test_half_precision_is_near(weights):
    results = []
    for precision in ("32-true", "bf16-mixed"):
        model = model_of(weights, precision=precision)
        results.append(
            attention_result(
                "cat", noise(32, 32), model, Framing.of([model], "crop"), features=True
            )
        )
    assert results[1].attention.dtype == np.float32
    np.testing.assert_allclose(results[0].attention, results[1].attention, rtol=0.2, atol=1e-3)
    assert not np.array_equal(results[0].attention, results[1].attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 4}, r"--head is 4; xcit_pico2_p4 has the heads 0 to 3"),
        ({"layer": 2}, r"--layer is 2; expected 0 to 1"),
        ({"xca_layer": 99}, r"--xca_layer is 99; expected 0 to \d"),
    ],
)
def test_heads_and_layers_out_of_range_are_refused(options, message, weights):
    with pytest.raises(UserError, match=message):
        model_of(weights, **options)
    model_of(weights, head=(3,), layer=1, xca_layer=0)


def test_weights_of_another_network_are_refused(monkeypatch):
    monkeypatch.setattr(model_module, "load_backbone", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(
        UserError, match=r"^--weights timm:vit: Linear has no class-attention layers"
    ):
        model_of("timm:vit")


def test_a_model_with_another_backbone_keeps_its_options_and_leaves_the_first(tmp_path, weights):
    model = model_of(weights, image_size=24, layer=0)
    other = XCiT("xcit_pico2_p8")
    other.metadata = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "global_crops_size": 64}
    before = model(noise(16, 16)[None]).attention
    changed = model.with_backbone(other, "other")
    assert (changed.title, changed.backbone, changed.config, changed.long_side) == (
        "other",
        other,
        model.config,
        24,
    )
    assert changed.mean.flatten().tolist() == [0, 0, 0]
    assert not changed.backbone.training
    assert model.title == "pico"
    assert torch.equal(model(noise(16, 16)[None]).attention, before)


def titles(*weights, names=()):
    return [
        model.title for model in open_models(AttentionConfig(weights=weights, names=names), CPU)
    ]


def test_backbones_are_titled_by_their_names_folders_or_files(tmp_path):
    a, b = (
        save_weights(tmp_path / "a" / "one.safetensors"),
        save_weights(tmp_path / "b" / "two.safetensors"),
    )
    same = save_weights(tmp_path / "b" / "one.safetensors")
    run = save_run_folder(tmp_path / "run")
    assert titles(a, b) == ["one.safetensors", "two.safetensors"]
    assert titles(run, f"{run}/teacher.safetensors", names=("x", "y")) == ["x", "y"]
    assert titles(run, a) == ["run", "one.safetensors"]
    assert titles(a, same) == [a, same]  # file names alone are ambiguous
    assert len(set(titles(a, a))) == 2


def test_a_framing_serves_every_model(tmp_path):
    models = [
        model_of(
            save_weights(
                tmp_path / f"{patch}.safetensors",
                arch=f"xcit_pico2_p{patch}",
                global_crops_size=size,
            )
        )
        for patch, size in ((4, 48), (16, 32), (8, 40))
    ]
    framing = Framing.of(models, "pad")
    assert (framing.patch, framing.long_side, framing.fit) == (16, 48, "pad")
    assert framing.bytes_per_pixel == max(bytes_per_pixel(model.backbone) for model in models)


def test_a_failed_allocation_is_one_line(weights, monkeypatch):
    model = model_of(weights)

    def fail(*_, **__):
        raise RuntimeError("out of\nmemory " + 500 * "x")

    monkeypatch.setattr(model_module, "attention_maps", fail)
    with pytest.raises(
        UserError, match=r"^32 x 24 pixels: out of memory x+; lower --image_size$"
    ) as refusal:
        attention_result("name", noise(24, 32), model, Framing.of([model], "crop"))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError("Unable to allocate 9 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failed_allocation_names_the_flag(weights, monkeypatch, error):
    def fail(*_, **__):
        raise error

    model = model_of(weights)
    monkeypatch.setattr(model_module, "attention_maps", fail)
    with pytest.raises(UserError, match=r"llocate 9.*; lower --image_size$"):
        attention_result("name", noise(24, 32), model, Framing.of([model], "crop"))


@pytest.mark.parametrize("message", ["no such kernel", "an illegal memory access was encountered"])
def test_other_failures_are_not_taken_for_a_lack_of_memory(weights, monkeypatch, message):
    model = model_of(weights)

    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(model_module, "attention_maps", fail)
    with pytest.raises(RuntimeError, match=message):
        attention_result("name", noise(24, 32), model, Framing.of([model], "crop"))


def test_memory_of_the_device_and_of_the_machine_are_separate(weights, monkeypatch):
    devices = []
    monkeypatch.setattr(
        framing_module, "memory_there", lambda device: devices.append(device.type) or 1000
    )
    model = model_of(weights)
    Framing.of(
        [SimpleNamespace(device=torch.device("meta"), backbone=model.backbone, long_side=32)],
        "crop",
    )
    assert devices == ["meta", "cpu"]


# -- checkpoints over training ---------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run folder whose checkpoints are weights files; their number is their seed."""
    run = tmp_path / "run"
    save_run_folder(run)
    (run / "checkpoints").mkdir()
    load = model_module.load_backbone

    def load_any(path, *rest):
        if str(path).endswith(".ckpt"):
            path = save_weights(
                tmp_path / "loaded.safetensors", seed=int(re.findall(r"\d+", str(path))[-1])
            )
        return load(path, *rest)

    monkeypatch.setattr(model_module, "load_backbone", load_any)
    return run


def test_checkpoints_come_in_the_order_of_their_epochs_and_the_teacher_last(kept):
    for epoch in (20, 5, 0):
        (kept / "checkpoints" / f"epoch{epoch:04}.ckpt").touch()
    save_weights(kept / "teacher.safetensors", seed=99)
    models = open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    assert [model.title for model in models] == ["epoch 0", "epoch 5", "epoch 20", "last"]
    for model, seed in zip(models, (0, 5, 20, 99), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(model.backbone.cls_token, XCiT("xcit_pico2_p4").cls_token)


def test_the_teacher_is_left_out_where_the_last_checkpoint_holds_it(kept):
    for epoch in (5, 20):
        (kept / "checkpoints" / f"epoch{epoch:04}.ckpt").touch()
    save_weights(kept / "teacher.safetensors", seed=20)
    assert [
        model.title for model in open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    ] == ["epoch 5", "epoch 20"]


def test_without_a_last_one_the_checkpoints_alone_are_shown(kept):
    (kept / "teacher.safetensors").unlink()
    (kept / "metrics.csv").touch()
    for name in ("epoch0005.ckpt", "epoch0020.ckpt", "epoch_best.ckpt"):
        (kept / "checkpoints" / name).touch()
    assert [
        model.title for model in open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    ] == ["epoch 5", "epoch 20"]


def test_without_checkpoints_the_message_names_the_flag_that_keeps_them(kept, weights):
    for given in (str(kept), weights):
        with pytest.raises(
            UserError,
            match=rf"{re.escape(given)} is not a run folder that kept .* --saveckp_freq N keeps",
        ):
            open_checkpoints(AttentionConfig(weights=(given,)), CPU)


def test_covariance_in_half_precision_is_float32(weights):
    seen = {}
    for precision in ("bf16-mixed", "32-true"):
        model = model_of(weights, precision=precision)
        seen[precision] = attention_result(
            "cat", noise(32, 32), model, Framing.of([model], "crop"), xca=True
        ).covariance
    assert seen["bf16-mixed"].dtype == np.float32
    np.testing.assert_allclose(seen["bf16-mixed"], seen["32-true"], atol=0.05)
