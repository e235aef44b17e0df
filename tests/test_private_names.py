"""Fails when a new version of torch or Lightning renames what `private_names.py` uses."""

from __future__ import annotations

import lightning as L
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as partitioner
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from dino_xcit import private_names as private


def test_foreach_functions_do_what_a_loop_does():
    tensors = [torch.randn(3, 2), torch.randn(5)]
    norms = private.foreach_norm(tensors)
    torch.testing.assert_close(norms, [tensor.norm() for tensor in tensors])
    expected = [tensor * factor for tensor, factor in zip(tensors, norms, strict=True)]
    private.foreach_multiply(tensors, norms)
    torch.testing.assert_close(tensors, expected)


def test_tensors_that_share_memory_have_one_key_fake_ones_too():
    with private.FakeTensorMode():
        one, other = torch.empty(4), torch.empty(4)
        assert private.storage_key(one) == private.storage_key(one.view(2, 2))
        assert private.storage_key(one) != private.storage_key(other)


def test_every_batch_norm_is_one():
    for norm in (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.SyncBatchNorm(1)):
        assert isinstance(norm, private.BatchNorm)


def test_collectives_give_what_the_public_ones_write(tmp_path):
    """Of one process: tests/train/test_processes.py has two of them normalise a batch."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        tensor = torch.randn(2, 3)
        gathered = private.all_gather(tensor)
        assert gathered.shape == (1, 2, 3)
        for result in (gathered[0], private.all_reduce(tensor)):
            assert torch.equal(result, tensor)
            assert result.data_ptr() != tensor.data_ptr()
    finally:
        dist.destroy_process_group()


def test_compiling_sets_its_settings_and_puts_them_back():
    def settings() -> tuple[bool, bool, float]:
        budget = partitioner.activation_memory_budget
        return dynamo.suppress_errors, dynamo.optimize_ddp, budget

    before = settings()
    with private.compiling(0.25):
        assert settings() == (True, False, 0.25)
        with private.failing_compilation_raises():
            assert dynamo.suppress_errors is False
    assert settings() == before


def test_lightning_has_what_is_switched_off():
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    private.skip_sigterm_broadcast(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None
    trainer._signal_connector.received_sigterm = True
    private.forget_sigterm(trainer)
    assert trainer.received_sigterm is False


def test_lightning_counts_from_the_step_that_is_set():
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    private.set_global_step(trainer, 7)
    assert trainer.global_step == 7
    assert trainer.fit_loop.epoch_loop.state_dict()["state_dict"]["_batches_that_stepped"] == 7


def test_the_scale_of_the_loss_is_a_tensor_of_the_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(plugins=[plugin], **options)
    scaler.scale(torch.zeros(()))
    torch.testing.assert_close(private.loss_scale(trainer), torch.tensor(8.0))
