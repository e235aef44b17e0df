"""Several processes do what one would have done."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import TINY, as_flags
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn

from dino_xcit.model.batch_norm import CpuSyncBatchNorm, synchronise_batch_norms
from dino_xcit.train.pretrain import pretrain

SHAPES = ((6, 5, 4, 3), (8, 5))


def _normalise_a_share(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(0)
        x, weight = torch.randn(shape) + 3, torch.randn(shape)
        norm = nn.Sequential(_batch_norm(shape))
        synchronise_batch_norms(norm, "cpu")
        assert isinstance(norm[0], CpuSyncBatchNorm)
        half = shape[0] // 2
        share = x[rank * half : (rank + 1) * half].requires_grad_()
        out = norm(share)
        (out * weight[rank * half : (rank + 1) * half]).sum().backward()
        gradients = [p.grad for p in norm.parameters()]
        for gradient in gradients:
            dist.all_reduce(gradient)
        saved = (out, share.grad, gradients, norm.state_dict())
        torch.save(saved, f"{folder}/{number}_{rank}.pt")
    dist.destroy_process_group()


def _batch_norm(shape: tuple[int, ...]) -> nn.Module:
    return nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])


@pytest.mark.slow
def test_cpu_batch_norm_over_two_processes_equals_one_over_the_whole_batch(tmp_path):
    mp.start_processes(_normalise_a_share, (str(tmp_path),), nprocs=2, start_method="spawn")
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(0)
        x, weight = (torch.randn(shape) + 3).requires_grad_(), torch.randn(shape)
        norm = nn.Sequential(_batch_norm(shape))
        out = norm(x)
        (out * weight).sum().backward()
        shares = [torch.load(tmp_path / f"{number}_{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(torch.cat([s[0] for s in shares]), out)
        gradient_of_x = torch.cat([s[1] for s in shares])
        torch.testing.assert_close(gradient_of_x, x.grad, rtol=1e-4, atol=1e-5)
        for share in shares:
            for gradient, p in zip(share[2], norm.parameters(), strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)
            for name, value in norm.state_dict().items():
                torch.testing.assert_close(share[3][name], value)


@pytest.mark.slow
def test_two_processes_follow_one_with_the_same_total_batch(tmp_path, run_cli):
    """And no step waits for Lightning to broadcast signals: its function is gone."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    (tmp_path / "sitecustomize.py").write_text(
        "from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop\n"
        "_TrainingEpochLoop._broadcast_sigterm_tensor = None\n"
        f"open({str(tmp_path / 'gone')!r}, 'w').close()\n"
    )
    alone = dataclasses.replace(TINY, output_dir=str(tmp_path / "one"))
    pretrain(alone)
    together = dataclasses.replace(
        alone, output_dir=str(tmp_path / "two"), devices="2", batch_size_per_gpu=4
    )
    finished = run_cli("pretrain", *as_flags(together), PYTHONPATH=str(tmp_path))
    assert (tmp_path / "gone").exists()
    assert finished.returncode == 0, finished.stderr
    tables = [
        list(csv.DictReader((Path(c.output_dir) / "metrics.csv").read_text().splitlines()))
        for c in (alone, together)
    ]
    assert [row["step"] for row in tables[1]] == [str(step) for step in range(1, 13)]
    for one, two in zip(*tables, strict=True):
        for column in ("loss", "teacher_entropy", "grad_norm", "center_norm"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=2e-3), (
                one["step"],
                column,
            )
    states = [
        torch.load(Path(c.output_dir) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for c in (alone, together)
    ]
    for name, value in states[0].items():
        if (
            "attn.k.bias" not in name and "attn.qkv.bias" not in name
        ):  # gradients of nothing but rounding
            torch.testing.assert_close(
                states[1][name],
                value,
                rtol=5e-3,
                atol=1e-4,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.slow
def test_two_processes_refuse_what_one_would_refuse(tmp_path, run_cli):
    finished = run_cli(
        "pretrain",
        *as_flags(dataclasses.replace(TINY, devices="2", num_images=15)),
        "--output_dir",
        tmp_path / "run",
    )
    assert finished.returncode == 2
    assert "15 images are fewer than one step takes (16" in finished.stderr
