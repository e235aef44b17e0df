"""What is compiled, and how often: counted by a backend that runs graphs as they are."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import PICO_PATHS, TINY, last_state
from torch import nn

from dino_xcit.model.batch_norm import SyncBatchNorm, synchronise_batch_norms
from dino_xcit.model.xcit_layers import ConvPatchEmbed, XCABlock
from dino_xcit.private_names import compiling, storage_key
from dino_xcit.runtime import HALF
from dino_xcit.train.dry_run import memory_estimate
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import KEPT_FOR_BACKWARD, pretrain, share_kept

# torch's own, of its tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GRAPHS = 6
"""Stem and layer, each for the teacher and for global and local crops of the student."""

COMBINATIONS = {
    "plain": {},
    "bfloat16": {"precision": "bf16-mixed"},
    "drop path, bfloat16": {"precision": "bf16-mixed", "drop_path_rate": 0.1},
    "checkpointing": {"grad_checkpointing": True},
    "checkpointing, drop path, bfloat16": {
        "grad_checkpointing": True,
        "precision": "bf16-mixed",
        "drop_path_rate": 0.1,
    },
    "several processes": {"drop_path_rate": 0.1},
    "several processes, checkpointing, bfloat16": {
        "grad_checkpointing": True,
        "precision": "bf16-mixed",
    },
}


class Compiled(NamedTuple):
    """What was compiled."""

    regions: list[nn.Module]
    graphs: list[torch.fx.GraphModule]


@pytest.fixture
def compiled(monkeypatch):
    """Compile without a compiler, and fail on a graph break and on a graph after step 2."""
    found = Compiled(regions=[], graphs=[])
    step = DINOModule.training_step

    def backend(graph, inputs):
        found.graphs.append(graph)
        return graph

    def compile_region(region, **options):
        found.regions.append(region)
        nn.Module.compile(region, backend=backend, fullgraph=True, **options)

    def training_step(module, batch, batch_idx):
        with torch.compiler.set_stance(
            "fail_on_recompile" if module.global_step > 1 else "default"
        ):
            return step(module, batch, batch_idx)

    monkeypatch.setattr("dino_xcit.train.pretrain.why_nothing_compiles", lambda device: None)
    for region in (ConvPatchEmbed, XCABlock):
        monkeypatch.setattr(region, "compile", compile_region)
    monkeypatch.setattr(DINOModule, "training_step", training_step)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.fixture
def group(tmp_path):
    """A group of processes with this one alone in it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(module: DINOModule) -> None:
    """Passes of a step on random views, drawn anew each time."""
    config = module.config
    sizes = ((2, config.global_crops_size), (config.local_crops_number, config.local_crops_size))
    groups = [torch.rand(config.batch_size_per_gpu, n, 3, side, side) for n, side in sizes]
    half = HALF.get(config.precision)
    drops = config.drop_path_rate > 0
    paths = [torch.rand(len(g), g.shape[1], *PICO_PATHS) if drops else None for g in groups]
    with torch.autocast("cpu", half, enabled=half is not None):
        with torch.no_grad():
            module.teacher.embed(groups[:1])
        student = module.student.embed(groups, paths)
    student.of_views.float().sum().backward()


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_stem_and_layers_are_one_graph_each_for_every_size_of_crops(combination, compiled):
    """Of teacher, student's global crops and student's local crops; the layers share theirs."""
    config = dataclasses.replace(TINY, **{"drop_path_rate": 0.0, **COMBINATIONS[combination]})
    module = DINOModule(config, schedules=None)
    if "several" in combination:
        for network in (module.student, module.teacher):
            synchronise_batch_norms(network)
    assert any(isinstance(m, SyncBatchNorm) for m in module.modules()) == ("several" in combination)
    module.compile_regions(torch.device("cpu"))
    step(module)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(module)
        step(module)
    assert len(compiled.graphs) == GRAPHS


@pytest.mark.slow
def test_layers_can_be_compiled_and_are_not_compiled_again(tiny, compiled):
    config = dataclasses.replace(
        tiny, compile=True, drop_path_rate=0.1, eval_every_n_epochs=1, eval_num_images=37
    )
    pretrain(dataclasses.replace(config, trainer={"max_steps": 7}))
    assert pretrain(config).step == 12  # resumed, after an evaluation
    assert len(compiled.regions) == 2 * 6  # stem and two layers of student and teacher each
    assert len(compiled.graphs) == GRAPHS  # the same before and after
    whole = last_state(config)
    eager = dataclasses.replace(config, compile=False, output_dir=f"{config.output_dir}_eager")
    pretrain(eager)
    for name, tensor in last_state(eager).items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_long_runs_are_compiled_unasked(tiny, compiled, monkeypatch):
    monkeypatch.setattr("dino_xcit.train.pretrain.STEPS_THAT_PAY_FOR_COMPILING", 6)
    pretrain(
        dataclasses.replace(tiny, epochs=1, compile=False, output_dir=f"{tiny.output_dir}_asked")
    )
    assert not compiled.regions
    pretrain(dataclasses.replace(tiny, epochs=1))
    assert compiled.regions


@pytest.mark.slow
def test_a_compiled_layer_keeps_half_as_much_for_the_backward_pass(tiny, monkeypatch):
    def kept(module):
        sizes = {}

        def count(tensor):
            sizes[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        block = module.student.backbone.blocks[0]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            block(torch.randn(4, 64, module.student.backbone.embed_dim), 8, 8).sum().backward()
        return sum(sizes.values())

    torch._dynamo.reset()
    partition = functools.partialmethod(nn.Module.compile, backend="aot_eager_decomp_partition")
    for region in (ConvPatchEmbed, XCABlock):
        monkeypatch.setattr(region, "compile", partition)
    module = DINOModule(tiny, schedules=None)
    eager = kept(module)
    module.compile_regions(torch.device("cpu"))
    with compiling(KEPT_FOR_BACKWARD):
        assert kept(module) < eager / 2


def test_on_a_gpu_all_is_kept_where_it_fits(monkeypatch):
    needed = memory_estimate(TINY, "bf16-mixed")
    for there, device, share in (
        (needed, "cuda", 1.0),
        (needed - 1, "cuda", KEPT_FOR_BACKWARD),
        (needed, "cpu", KEPT_FOR_BACKWARD),
    ):
        monkeypatch.setattr(
            "dino_xcit.train.pretrain.memory_there", lambda device, there=there: there
        )
        assert share_kept(TINY, "bf16-mixed", torch.device(device)) == share


@pytest.mark.slow
def test_without_a_compiler_the_run_continues(tiny, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent"))
    pretrain(dataclasses.replace(tiny, compile=True, epochs=1))
    assert (
        "torch.compile does not work here (InvalidCxxCompiler: No working C++ compiler"
        in capsys.readouterr().err
    )
