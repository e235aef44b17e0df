"""Which batch norms are replaced when several processes train; tests/train compares the results."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from dino_xcit.errors import UserError
from dino_xcit.model.batch_norm import CpuSyncBatchNorm, synchronise_batch_norms


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", CpuSyncBatchNorm), ("cuda", nn.SyncBatchNorm)]
)
def test_names_weights_statistics_and_settings_stay(device, kind):
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
    synchronise_batch_norms(network, device)
    synchronise_batch_norms(network, device)  # a second time changes nothing
    first, second = network[1], network[2][0]
    assert type(first) is type(second) is kind
    assert (first.eps, first.momentum) == (0.1, 0.3)
    assert (first.training, second.training) == (True, False)
    assert [norm.weight.requires_grad for norm in (first, second)] == [True, False]
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batch_norm_that_computes_more_is_refused_not_replaced(device):
    network = timm.create_model("test_byobnet", num_classes=0)  # its norms contain activations
    with pytest.raises(UserError, match=r"class BatchNormAct2d.*--devices 1"):
        synchronise_batch_norms(network, device)
    assert not any(isinstance(m, (CpuSyncBatchNorm, nn.SyncBatchNorm)) for m in network.modules())


def test_a_network_without_batch_norms_stays():
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    modules = list(network.modules())
    synchronise_batch_norms(network, "cpu")
    assert list(network.modules()) == modules
