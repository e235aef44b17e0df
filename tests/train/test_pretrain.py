"""A run from config to run folder, against plain loops of the published algorithm."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from helpers import PICO_PATHS, TINY, as_flags
from PIL import Image
from torch import nn

import dino_xcit
from dino_xcit import run_folder
from dino_xcit.cli import main, parse
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset, StepBatchSampler, collate
from dino_xcit.run_folder import LAST, PREVIOUS, TEACHER
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.schedules import Schedules
from dino_xcit.weights.load import load_backbone

COLUMNS = (
    *("step", "epoch", "loss", "lr", "weight_decay", "momentum", "teacher_temp"),
    *("teacher_entropy", "kl", "center_norm", "grad_norm", "images_per_second"),
    *("knn_top1", "rankme"),
)


def rows(folder: str | Path) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: str | Path) -> dict:
    return torch.load(Path(folder) / LAST, weights_only=True)


def network_states(folder: str | Path) -> dict[str, torch.Tensor]:
    return checkpoint(folder)["state_dict"]


def without_statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        k: v
        for k, v in state.items()
        if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


# -- the run folder ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_exactly_the_run_folder_of_the_design(tiny, drawn_pictures):
    config = dataclasses.replace(
        tiny, eval_every_n_epochs=1, trainer={"enable_progress_bar": False}
    )
    outcome = pretrain(config)
    folder = outcome.folder
    assert (outcome.step, outcome.steps, outcome.interrupted) == (12, 12, False)
    files = {str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file()}
    pictures = {"crops.png", "curves.png", "attention.png", "attention.npz"}
    assert files == {
        "config.yaml",
        "metrics.csv",
        LAST,
        PREVIOUS,
        TEACHER,
        *pictures,
    }  # too short and noisy to be sound
    assert all((folder / name).stat().st_size for name in pictures)
    table = rows(folder)
    assert tuple(table[0]) == COLUMNS
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    filled = [c for c in COLUMNS if c not in ("knn_top1", "rankme")]
    assert all(math.isfinite(float(row[c])) for row in table for c in filled)
    assert [row["step"] for row in table if row["knn_top1"]] == ["6", "12"]
    assert 0 <= float(table[-1]["knn_top1"]) <= 100


@pytest.mark.slow
def test_config_yaml_repeats_the_run(tiny):
    folder = pretrain(tiny).folder
    again = parse("pretrain", RunConfig, ["--config", str(folder / "config.yaml")])
    assert again == tiny
    repeated = pretrain(dataclasses.replace(again, output_dir=f"{folder}_again")).folder
    assert [row["loss"] for row in rows(repeated)] == [row["loss"] for row in rows(folder)]


@pytest.mark.slow
def test_the_teacher_loads_strictly_into_timm_and_gives_the_same_features(tiny):
    config = dataclasses.replace(
        tiny, arch="xcit_nano_12_p16", global_crops_size=32, local_crops_size=16, epochs=1
    )
    folder = pretrain(config).folder
    product = folder / TEACHER
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=0).eval()
    from safetensors.torch import load_file

    theirs.load_state_dict(load_file(product), strict=True)
    images = torch.randn(2, 3, 64, 48)
    ours = dino_xcit.load_backbone(folder)
    assert ours.metadata["arch"] == "xcit_n12_p16"
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            load_backbone(folder / LAST)(images), ours(images), rtol=0, atol=0
        )


@pytest.mark.slow
def test_checkpoints_are_tensors_and_plain_values(tiny):
    saved = checkpoint(pretrain(tiny).folder)  # weights_only refuses anything else
    assert "loss.center" in saved["state_dict"]
    assert saved["config"]["arch"] == tiny.arch


@pytest.mark.slow
def test_a_limit_given_to_the_trainer_ends_with_everything_saved(tiny):
    outcome = pretrain(dataclasses.replace(tiny, trainer={"max_steps": 4}))
    assert outcome.step == checkpoint(outcome.folder)["global_step"] == 4
    load_backbone(outcome.folder / TEACHER)


def test_the_augmentation_is_float32_under_mixed_precision(tiny):
    module = DINOModule(tiny, Schedules(config=tiny, steps_per_epoch=6, total_batch=8))
    dataset = CropDataset(open_images(tiny, "train"), tiny, PICO_PATHS)
    batch = collate([dataset[0, i] for i in range(4)])
    plain = module.views(batch)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(module.views(batch), plain, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_grey_images_and_no_local_crops(tiny):
    config = dataclasses.replace(
        tiny, in_chans=1, mean=(0.5,), std=(0.25,), local_crops_number=0, epochs=1
    )
    pretrain(config)
    assert load_backbone(config.output_dir)(torch.zeros(1, 1, 16, 16)).shape == (1, 64)


@pytest.mark.slow
def test_auto_is_bfloat16_where_the_cpu_multiplies_it_and_stays_what_it_was_when_the_run_began(
    tiny, monkeypatch, capsys
):
    config = dataclasses.replace(tiny, precision="auto", epochs=1)

    def planned(multiplies: bool) -> str:
        monkeypatch.setattr("dino_xcit.runtime.bfloat16_is_faster", lambda: multiplies)
        pretrain(dataclasses.replace(config, dry_run=True))
        return re.search(r"precision +(\S+) on cpu", capsys.readouterr().out)[1]

    assert (planned(False), planned(True)) == ("32-true", "bf16-mixed")
    folder = pretrain(config).folder
    assert planned(False) == "bf16-mixed"
    assert yaml.safe_load((folder / "config.yaml").read_text())["precision"] == "bf16-mixed"
    assert pretrain(config).step == 6


@pytest.mark.slow
def test_tensorboard_gets_every_row(tiny):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    folder = pretrain(dataclasses.replace(tiny, logger=("tensorboard",), epochs=1)).folder
    (written,) = (folder / "tensorboard").glob("events.*")
    steps = {
        e.step
        for e in event_file.EventFileLoader(str(written)).Load()
        for v in e.summary.value
        if v.tag == "loss"
    }
    assert steps == set(range(1, 7))


@pytest.mark.slow
def test_kept_checkpoints(tiny):
    pretrain(dataclasses.replace(tiny, saveckp_freq=1))
    assert {p.name for p in (Path(tiny.output_dir) / "checkpoints").iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "epoch0001.ckpt",
        "epoch0002.ckpt",
    }


@pytest.mark.slow
def test_load_backbone_says_what_is_wrong(tmp_path, tiny):
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder without"):
        load_backbone(tmp_path)
    for name in ("a.safetensors", "a.ckpt"):
        (tmp_path / name).write_bytes(b"<html>")
        with pytest.raises(ValueError, match="--weights"):
            load_backbone(tmp_path / name)
    folder = pretrain(dataclasses.replace(tiny, epochs=1)).folder
    with pytest.raises(
        ValueError, match=r"does not fit xcit_n12_p16: missing: patch_embed\.proj\.4"
    ):
        load_backbone(folder, arch="xcit_n12_p16")


# -- the algorithm -----------------------------------------------------------------------------


def plain_loop(config: RunConfig, steps: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Official DINO's training loop in plain torch, with loops over pairs and tensors."""
    images = open_images(config, "train")
    order = StepBatchSampler(config, len(images))
    schedules = Schedules(
        config=config, steps_per_epoch=order.steps_per_epoch, total_batch=order.total_batch
    )
    torch.manual_seed(config.seed)
    module = DINOModule(config, schedules)
    student, teacher = copy.deepcopy(module.student), copy.deepcopy(module.teacher)
    decayed = [
        p
        for n, p in student.named_parameters()
        if p.requires_grad and not (n.endswith(".bias") or p.ndim == 1)
    ]
    others = [
        p
        for n, p in student.named_parameters()
        if p.requires_grad and (n.endswith(".bias") or p.ndim == 1)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.0
    )
    center = torch.zeros(config.out_dim)
    dataset = CropDataset(images, config, PICO_PATHS)
    for step, positions in zip(range(steps), order, strict=False):
        groups = module.views(collate([dataset[position] for position in positions]))
        with torch.no_grad():
            teacher_logits = teacher(groups[:1])
        student_logits = student(groups)
        temperature = schedules.teacher_temp(step)
        q = F.softmax((teacher_logits - center) / temperature, dim=-1)
        log_p = F.log_softmax(student_logits / config.student_temp, dim=-1)
        terms = [
            (-q[:, g] * log_p[:, v]).sum(-1).mean()
            for g in range(2)
            for v in range(student_logits.shape[1])
            if v != g
        ]
        center = center * 0.9 + teacher_logits.flatten(0, 1).mean(0) * 0.1
        optimizer.zero_grad()
        (sum(terms) / len(terms)).backward()
        for name, p in student.named_parameters():
            if p.grad is not None:
                coefficient = config.clip_grad / (p.grad.norm() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
                if (
                    "last_layer" in name
                    and step // order.steps_per_epoch < config.freeze_last_layer
                ):
                    p.grad = None
        for group in optimizer.param_groups:
            group["lr"] = schedules.lr(step)
        optimizer.param_groups[0]["weight_decay"] = schedules.weight_decay(step)
        optimizer.step()
        m = schedules.momentum(step)
        with torch.no_grad():
            for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
                q.mul_(m).add_(p, alpha=1 - m)
    return student, teacher, center


def close_networks(
    state: dict[str, torch.Tensor], student: nn.Module, teacher: nn.Module, center: torch.Tensor
) -> None:
    expected = {f"student.{k}": v for k, v in student.state_dict().items()}
    expected |= {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
    expected["loss.center"] = center
    assert set(state) == set(expected)
    for name, value in expected.items():
        if "attn.k.bias" in name or "attn.qkv.bias" in name:
            continue  # a gradient of rounding errors alone, which AdamW scales up to a step
        torch.testing.assert_close(
            state[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_a_run_follows_the_published_algorithm(tiny, norm_last_layer):
    """Parameters, center and batch-norm statistics; half of the steps freeze the last layer."""
    config = dataclasses.replace(
        tiny, drop_path_rate=0.0, norm_last_layer=norm_last_layer, clip_grad=0.3
    )
    pretrain(config)
    close_networks(network_states(config.output_dir), *plain_loop(config, steps=12))


@pytest.fixture
def frozen_batch_norm(monkeypatch):
    """Batch norm that does not depend on the batch, so that two halves can equal the whole."""

    def freeze(module: DINOModule) -> None:
        module.restart_clock()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()

    monkeypatch.setattr(DINOModule, "on_train_start", freeze)


@pytest.mark.slow
@pytest.mark.usefixtures("frozen_batch_norm")
def test_accumulated_passes_equal_one_pass_of_the_total_batch(tiny):
    whole = tiny
    parts = dataclasses.replace(
        whole, batch_size_per_gpu=2, accumulate_grad_batches=4, output_dir=f"{tiny.output_dir}_4"
    )
    for config in (whole, parts):
        pretrain(config)
    one, other = network_states(whole.output_dir), network_states(parts.output_dir)
    for name, value in one.items():
        if "attn.k.bias" not in name and "attn.qkv.bias" not in name:
            torch.testing.assert_close(
                other[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert len(rows(parts.output_dir)) == len(rows(whole.output_dir)) == 12
    for a, b in zip(rows(whole.output_dir), rows(parts.output_dir), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


@pytest.mark.slow
def test_the_last_layer_does_not_learn_while_it_is_frozen(tiny):
    frozen = dataclasses.replace(tiny, epochs=1, warmup_epochs=0)
    torch.manual_seed(frozen.seed)
    first = DINOModule(
        frozen, Schedules(config=frozen, steps_per_epoch=6, total_batch=8)
    ).student.head.last_layer.weight_v
    pretrain(frozen)
    assert torch.equal(network_states(frozen.output_dir)["student.head.last_layer.weight_v"], first)
    free = dataclasses.replace(frozen, freeze_last_layer=0, output_dir=f"{tiny.output_dir}_free")
    pretrain(free)
    assert not torch.equal(
        network_states(free.output_dir)["student.head.last_layer.weight_v"], first
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    tiny, monkeypatch, precision
):
    config = dataclasses.replace(tiny, checkpoint_every_n_steps=1, precision=precision)
    forward, seen = DINOModule.training_step, []

    def spoiled(module, batch, batch_idx):
        loss = forward(module, batch, batch_idx)
        seen.append({name: p.clone() for name, p in module.named_parameters()})
        last_modules.append(module)
        return loss * float("nan") if module.global_step == 7 else loss

    last_modules: list[DINOModule] = []
    monkeypatch.setattr(DINOModule, "training_step", spoiled)
    with pytest.raises(
        FloatingPointError, match=r"by step 8: .*gradient norm nan.*last.ckpt is from.*--lr"
    ) as raised:
        pretrain(config)
    assert ("--precision 32-true" in str(raised.value)) == (precision != "32-true")
    for name, p in last_modules[-1].named_parameters():
        assert torch.equal(p, seen[-1][name]), name
    assert checkpoint(config.output_dir)["global_step"] == 7


# -- bad images --------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_files_are_listed_and_the_run_goes_on(tmp_path, tiny, capsys):
    noise = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
    for i in range(120):
        image = Image.fromarray(noise.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / ("a" if i < 60 else "b") / f"{i:03}.jpg")
    for i in (7, 50):
        (tmp_path / "images" / "a" / f"{i:03}.jpg").write_bytes(b"\xff\xd8 broken")
    (tmp_path / "images" / "a" / "051.jpg").write_bytes(b"")
    config = dataclasses.replace(
        tiny,
        dataset=None,
        data_path=str(tmp_path / "images"),
        num_images=None,
        num_workers=1,
        eval_num_images=200,
    )
    pretrain(config)
    listed = (Path(config.output_dir) / "bad_images.txt").read_text().splitlines()
    assert {Path(line.split("\t")[0]).name for line in listed} == {"007.jpg", "050.jpg", "051.jpg"}
    assert len(listed) == 3
    assert "bad_images.txt" in capsys.readouterr().err  # 2.5% are bad: look at them
    assert rows(config.output_dir)[-1]["step"] == "30"
    assert rows(config.output_dir)[-1]["knn_top1"]  # counted on the images that can be read


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_the_first_bad_image_ends_the_run_if_asked(tmp_path, capsys, workers):
    (tmp_path / "images").mkdir()
    for i in range(64):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{i:02}.png")
    order = np.random.default_rng((0, 0)).permutation(64)
    (tmp_path / "images" / f"{order[20]:02}.png").write_bytes(
        b"broken"
    )  # met after crops.png was drawn
    flags = as_flags(
        dataclasses.replace(
            TINY, dataset=None, num_images=None, on_bad_image="raise", num_workers=workers
        )
    )
    assert (
        main(
            [
                "pretrain",
                *flags,
                "--data_path",
                f"{tmp_path}/images",
                "--output_dir",
                f"{tmp_path}/run",
            ]
        )
        == 2
    )
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("dino-xcit pretrain: cannot read ")
    assert "--on_bad_image replace" in last_line


# -- resuming ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(tiny):
    pretrain(tiny)
    before = rows(tiny.output_dir)
    assert pretrain(tiny).step == 12
    assert rows(tiny.output_dir) == before


@pytest.mark.slow
def test_a_folder_with_another_config_is_refused_with_the_differing_options(tiny):
    pretrain(tiny)
    with pytest.raises(
        ValueError, match=r"other options: --lr was 0.0005, now 0.1; name another --output_dir"
    ):
        pretrain(dataclasses.replace(tiny, lr=0.1, num_workers=1))
    with pytest.raises(ValueError, match="--resume is false"):
        pretrain(dataclasses.replace(tiny, resume=False))
    assert not {"resume", "dry_run"} & set(
        yaml.safe_load((Path(tiny.output_dir) / "config.yaml").read_text())
    )
    assert yaml.safe_load((Path(tiny.output_dir) / "config.yaml").read_text())["lr"] == tiny.lr


def test_a_run_is_not_continued_with_another_total_batch(tiny):
    module = DINOModule(
        tiny, Schedules(config=tiny, steps_per_epoch=3, total_batch=16)
    )  # as on twice the devices
    with pytest.raises(
        ValueError, match=r"made with 8 images per step, now it would be 16; set --devices"
    ):
        module.on_load_checkpoint({"total_batch": 8})


def test_metrics_rows_after_the_checkpoint_are_written_anew(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,5.0\n2,4.0\n3,3.0\n4,")
    metrics = run_folder.Metrics(tmp_path, first_step=2)
    metrics.write({"step": 3, "loss": 2.5})
    assert rows(tmp_path) == [
        {"step": s, "loss": v} for s, v in (("1", "5.0"), ("2", "4.0"), ("3", "2.5"))
    ]
