"""Several processes do what one would have done."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import TINY, as_flags
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition

from dino_xcit.model.batch_norm import SyncBatchNorm, synchronise_batch_norms
from dino_xcit.model.xcit import XCiT
from dino_xcit.private_names import compiling
from dino_xcit.train.pretrain import pretrain

SHAPES = ((6, 5, 4, 3), (8, 5))


def _share_work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for number, shape in enumerate(SHAPES):
        for way in ("eager", "compiled"):
            torch.save(_normalise_share(rank, shape, way), f"{folder}/{way}_{number}_{rank}.pt")
    torch.save(_layers_within_ddp(rank), f"{folder}/layers_{rank}.pt")
    dist.destroy_process_group()


def _normalise_share(rank: int, shape: tuple[int, ...], way: str) -> tuple:
    torch.manual_seed(0)
    x, weight = torch.randn(shape) + 3, torch.randn(shape)
    norm = nn.Sequential(_batch_norm(shape))
    synchronise_batch_norms(norm)
    assert isinstance(norm[0], SyncBatchNorm)
    if way == "compiled":
        norm.compile(backend="aot_eager", fullgraph=True)
    half = shape[0] // 2
    share = x[rank * half : (rank + 1) * half].requires_grad_()
    out = norm(share)
    (out * weight[rank * half : (rank + 1) * half]).sum().backward()
    gradients = [p.grad for p in norm.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return out, share.grad, gradients, norm.state_dict()


def _batch_norm(shape: tuple[int, ...]) -> nn.Module:
    return nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])


def _collectives(graph: torch.fx.GraphModule) -> list[str]:
    """Names of the collective operations in a graph."""
    names = [node.name for node in graph.graph.nodes if "c10d" in str(node.target)]
    return [re.sub(r"_\d+$", "", name) for name in names if "wait" not in name]


def _layers_within_ddp(rank: int) -> dict:
    """A step of stem and layers as a run of two processes compiles them."""
    torch.manual_seed(0)
    backbone, images = XCiT("xcit_pico2_p4"), torch.randn(4, 3, 16, 16)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1)  # LayerScale begins so small that layers would hardly count
    synchronise_batch_norms(backbone)
    forward: list[list[str]] = []
    backward: list[list[str]] = []

    def compiler(passes):
        return lambda graph, inputs: passes.append(_collectives(graph)) or graph

    backend = aot_autograd(
        fw_compiler=make_boxed_compiler(compiler(forward)),
        bw_compiler=make_boxed_compiler(compiler(backward)),
        partition_fn=min_cut_rematerialization_partition,
    )
    for region in backbone.compiled_regions():
        region.compile(dynamic=False, backend=backend, fullgraph=True)
    # Buckets of a few kilobytes, as small beside these layers as DDP's first one beside real ones.
    network = nn.parallel.DistributedDataParallel(
        backbone, broadcast_buffers=False, bucket_cap_mb=0.02
    )
    with compiling(0.3):
        network(images[rank * 2 : rank * 2 + 2]).sum().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters()}
    return {"forward": forward, "backward": backward, "gradients": gradients}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """What two processes computed together."""
    folder = tmp_path_factory.mktemp("shared")
    mp.start_processes(_share_work, (str(folder),), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_batch_norm_over_two_processes_equals_one_over_the_whole_batch(shared, way):
    """Compiled as one graph, too."""
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(0)
        x, weight = (torch.randn(shape) + 3).requires_grad_(), torch.randn(shape)
        norm = nn.Sequential(_batch_norm(shape))
        out = norm(x)
        (out * weight).sum().backward()
        shares = [torch.load(shared / f"{way}_{number}_{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(torch.cat([s[0] for s in shares]), out)
        gradient_of_x = torch.cat([s[1] for s in shares])
        torch.testing.assert_close(gradient_of_x, x.grad, rtol=1e-4, atol=1e-5)
        for share in shares:
            for gradient, p in zip(share[2], norm.parameters(), strict=True):
                torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-5)
            for name, value in norm.state_dict().items():
                torch.testing.assert_close(share[3][name], value)


@pytest.mark.slow
def test_compiled_layers_of_two_processes_equal_one_process_with_one_collective_each_way(shared):
    """Stem and layer are one graph each, whatever DDP's buckets; no collective is repeated."""
    torch.manual_seed(0)
    backbone, images = XCiT("xcit_pico2_p4"), torch.randn(4, 3, 16, 16)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1)
    backbone(images).sum().div(2).backward()  # DDP takes the mean over the processes
    for rank in range(2):
        result = torch.load(shared / f"layers_{rank}.pt", weights_only=True)
        # The stem has two batch norms, a layer one; layers share their graph.
        gather, reduce = "all_gather_into_tensor", "all_reduce"
        assert result["forward"] == [[gather] * 2, [gather]]
        assert result["backward"] == [[reduce], [reduce] * 2]
        for name, parameter in backbone.named_parameters():
            torch.testing.assert_close(
                result["gradients"][name],
                parameter.grad,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda m, name=name: f"{name}: {m}",
            )


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
