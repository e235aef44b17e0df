"""Which batch norms are replaced when several processes train; tests/train compares the results."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from dino_xcit.errors import UserError
from dino_xcit.model.batch_norm import SyncBatchNorm, synchronise_batch_norms


def test_names_weights_statistics_and_settings_stay():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, eps=0.1, momentum=0.3),
        nn.Sequential(nn.BatchNorm1d(5)),
    )
    network[2].requires_grad_(False).eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    synchronise_batch_norms(network)
    synchronise_batch_norms(network)  # a second time changes nothing
    first, second = network[1], network[2][0]
    assert type(first) is type(second) is SyncBatchNorm
    assert (first.eps, first.momentum) == (0.1, 0.3)
    assert (first.training, second.training) == (True, False)
    assert [norm.weight.requires_grad for norm in (first, second)] == [True, False]
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_batch_norm_that_computes_more_is_refused_not_replaced():
    network = timm.create_model("test_byobnet", num_classes=0)  # its norms contain activations
    with pytest.raises(UserError, match=r"class BatchNormAct2d.*--devices 1"):
        synchronise_batch_norms(network)
    assert not any(isinstance(m, SyncBatchNorm) for m in network.modules())


def test_a_network_without_batch_norms_stays():
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    modules = list(network.modules())
    synchronise_batch_norms(network)
    assert list(network.modules()) == modules


@pytest.fixture
def alone(tmp_path):
    """A group of processes with this one alone in it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def passed(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a pass; the output's gradient has few digits."""
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(torch.linspace(0, 1, x.numel()).bfloat16().view_as(x).to(out.dtype))
    return (out.detach(), x.grad, *(p.grad for p in norm.parameters()))


@pytest.mark.usefixtures("alone")
def test_a_small_variance_beside_a_large_mean_keeps_its_digits():
    """Float32 has seven digits: the difference of the mean squares would have none left."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 5000
    expected = passed(nn.BatchNorm1d(3).double(), x.double())
    torch.testing.assert_close(
        passed(SyncBatchNorm(3), x)[0].double(), expected[0], rtol=0, atol=2e-3
    )


@pytest.mark.usefixtures("alone")
def test_a_half_precision_input_is_normalised_in_float32():
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 2
    half, whole = (passed(SyncBatchNorm(3), x.bfloat16().to(t)) for t in (torch.bfloat16, x.dtype))
    assert [t.dtype for t in half] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for one, other in zip(half[:2], whole[:2], strict=True):
        torch.testing.assert_close(one, other.bfloat16())  # a rounding at the end, and no other
    torch.testing.assert_close(half[2:], whole[2:])


@pytest.mark.usefixtures("alone")
def test_the_backward_pass_keeps_the_input_and_three_numbers_a_channel():
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(8, 3, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        SyncBatchNorm(3)(x)
    assert sum(kept.values()) == x.nbytes + 3 * 3 * 4


@pytest.mark.usefixtures("alone")
def test_in_eval_mode_it_uses_the_running_statistics():
    norm, expected = SyncBatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4)
    for one in (norm, expected):
        one(x)
        one.eval()
    torch.testing.assert_close(norm(2 * x), expected(2 * x))
    torch.testing.assert_close(norm.state_dict(), expected.state_dict())
