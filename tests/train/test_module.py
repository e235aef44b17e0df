"""Parts of a step: which parameters are decayed, how gradients are clipped, no device waits."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import TINY
from lightning.pytorch.plugins import MixedPrecision

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import Batch
from dino_xcit.data.photometric import PhotometricParam
from dino_xcit.errors import NotFiniteError
from dino_xcit.model.architectures import BRANCHES
from dino_xcit.train.module import DINOModule
from dino_xcit.train.network import Network
from dino_xcit.train.optimizer import clip_per_parameter, parameter_groups
from dino_xcit.train.schedules import Schedules
from dino_xcit.train.trainer import CropData

CONFIG = RunConfig(
    arch="xcit_pico2_p16", out_dim=16, head_hidden_dim=8, head_bottleneck_dim=4, freeze_last_layer=1
)


# -- weight decay ------------------------------------------------------------------------------


def decayed_and_spared(**options):
    network = Network(replace(CONFIG, **options))
    name_of = {parameter: name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network)
    return groups, *({name_of[p] for p in group["params"]} for group in groups), network


def test_biases_norms_and_layer_scales_are_spared_from_weight_decay():
    groups, decayed, spared, _ = decayed_and_spared()
    assert groups[1]["weight_decay"] == 0
    assert {name.split(".")[-1] for name in spared} == {
        "bias",
        "weight",
        "gamma1",
        "gamma2",
        "gamma3",
    }
    assert {
        "norm.weight",
        "patch_embed.proj.0.1.weight",
        "blocks.0.local_mp.bn.weight",
        "blocks.1.attn.qkv.bias",
    } <= {name.removeprefix("backbone.") for name in spared}
    assert {
        "backbone.cls_token",
        "backbone.blocks.0.attn.temperature",
        "backbone.blocks.0.local_mp.conv1.weight",
        "backbone.patch_embed.proj.0.0.weight",
        "backbone.pos_embed.token_projection.weight",
        "head.mlp.0.weight",
        "head.last_layer.weight_v",
    } <= decayed
    assert not [
        name for name in decayed if "norm" in name or ".bn." in name or name.endswith("bias")
    ]


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_every_parameter_that_learns_is_in_one_group(norm_last_layer):
    groups, decayed, spared, network = decayed_and_spared(
        norm_last_layer=norm_last_layer, use_bn_in_head=True
    )
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert decayed | spared == learning
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(learning)
    assert ("head.last_layer.weight_g" in decayed) == (not norm_last_layer)


# -- clipping ----------------------------------------------------------------------------------


def gradients():
    torch.manual_seed(0)
    return [
        scale * torch.randn(shape)
        for scale, shape in ((0.1, (4, 3)), (1.0, (50,)), (10.0, (2, 1, 5)), (0.0, (3,)))
    ]


@pytest.mark.parametrize("limit", [0.3, 3.0, 1e6])
def test_each_gradient_is_clipped_by_its_own_norm(limit):
    clipped = gradients()
    norms = clip_per_parameter(clipped, limit)
    for gradient, norm, original in zip(clipped, norms, gradients(), strict=True):
        expected = original.norm().item()
        assert norm.item() == pytest.approx(expected)
        if expected > limit:
            original = original * limit / (expected + 1e-6)
        torch.testing.assert_close(gradient, original)


def test_limit_zero_leaves_gradients_alone():
    clipped = gradients()
    norms = clip_per_parameter(clipped, 0.0)
    torch.testing.assert_close(clipped, gradients(), rtol=0, atol=0)
    torch.testing.assert_close(norms, torch.stack([g.norm() for g in gradients()]))


# -- steps that are not finite --------------------------------------------------------------------


def test_a_step_is_stopped_before_it_where_the_optimizer_would_make_it(monkeypatch):
    """As on MPS, whose fused AdamW does not read `found_inf`."""
    monkeypatch.setattr(DINOModule, "device", torch.device("mps"))
    monkeypatch.setattr(
        DINOModule, "trainer", SimpleNamespace(precision="32-true", world_size=1, global_step=0)
    )
    module = DINOModule(TINY, Schedules(config=TINY, steps_per_epoch=6, total_batch=8))
    optimizer = torch.optim.AdamW(module.student.parameters())
    for parameter in module.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module._sums = {"loss": torch.tensor(1.0)}
    module.configure_gradient_clipping(optimizer)
    next(module.student.parameters()).grad.fill_(torch.inf)
    with pytest.raises(NotFiniteError, match="did not touch the weights"):
        module.configure_gradient_clipping(optimizer)


# -- waiting for the device --------------------------------------------------------------------


def test_nothing_in_a_step_has_to_know_a_number(monkeypatch):
    """On torch's meta device no tensor can be read, so whatever waits for a GPU fails here."""
    for name, value in {
        "autocast": lambda *_, **__: contextlib.nullcontext(),
        "is_autocast_enabled": lambda *_: False,
    }.items():
        monkeypatch.setattr(torch, name, value)  # neither knows this device
    monkeypatch.setattr(DINOModule, "_is_float16", False)
    with torch.device("meta"):
        module = DINOModule(TINY, Schedules(config=TINY, steps_per_epoch=6, total_batch=8))
        views = {
            name: value
            for group, crops, side in (
                ("global", 2, TINY.global_crops_size),
                ("local", 2, TINY.local_crops_size),
            )
            for name, value in {
                f"{group}_crops": torch.zeros(8, crops, 3, side, side, dtype=torch.uint8),
                f"{group}_params": torch.zeros(8, crops, len(PhotometricParam)),
                f"{group}_paths": torch.ones(8, crops, 2, BRANCHES),
            }.items()
        }
        module.training_step(Batch(views=views, bad_images=[]), 0).backward()
        module.configure_gradient_clipping(torch.optim.AdamW(module.student.parameters()))
        module.loss.update_center()
        with pytest.raises(RuntimeError, match="meta"):  # as anything would that reads one
            module.loss.center.norm().item()
    assert all(p.grad is not None for p in module.student.backbone.parameters())


# -- float16 -----------------------------------------------------------------------------------


def train_in_float16(change_gradient):
    """30 steps on the CPU with the scaler that Lightning has on GPUs -> trainer and scaler."""
    scaler = torch.amp.GradScaler("cpu")
    trainer = L.Trainer(
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        accelerator="cpu",
        devices=1,
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    config = replace(TINY, epochs=10)
    module = DINOModule(config, Schedules(config=config, steps_per_epoch=6, total_batch=8))
    module.student.head.mlp[0].bias.register_hook(change_gradient)
    data = CropData(config, open_images(config, "train"), module.student.backbone.path_shape)
    trainer.fit(module, datamodule=data)
    return trainer, scaler


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*lr_scheduler.step")
def test_a_run_whose_every_step_float16_skips_is_stopped():
    with pytest.raises(NotFiniteError, match=r"too large for float16 .* --precision bf16-mixed"):
        train_in_float16(lambda gradient: gradient * float("inf"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*lr_scheduler.step")
def test_a_step_that_float16_skips_now_and_then_stops_nothing():
    seen = []

    def sometimes_infinite(gradient):
        seen.append(gradient)
        return gradient * float("inf") if len(seen) % 10 == 0 else gradient

    trainer, scaler = train_in_float16(sometimes_infinite)
    assert trainer.global_step == 30
    assert 1 <= scaler.get_scale() <= 2.0**13
