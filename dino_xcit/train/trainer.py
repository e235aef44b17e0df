"""Lightning's trainer, loggers and data for a run."""

from __future__ import annotations

import contextlib
import subprocess
import time
import warnings
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from dino_xcit.data.loader import (
    CropDataset,
    CropLoader,
    StepBatchSampler,
    report_scarce_shared_memory,
)
from dino_xcit.data.workers import default_workers
from dino_xcit.errors import RunFailedError, UserError
from dino_xcit.runtime import parse_devices, refusal, resolve_precision
from dino_xcit.train.loggers import make_loggers
from dino_xcit.train.progress import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dino_xcit.config.pretrain import PretrainConfig, RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.train.checkpoints import DurableIO

SECONDS_TO_END = 5.0  # for processes to print their errors after the first one failed
USERS_ERROR = 2  # exit code of a UserError
NOT_FOR_THE_TRAINER = {
    "fast_dev_run",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "sync_batchnorm",
}


def make_trainer(
    config: PretrainConfig, io: DurableIO, callbacks: Sequence[L.Callback] = ()
) -> L.Trainer:
    """Lightning's trainer for one long epoch: the loader hands out every batch of the run.

    Raises:
        UserError: an option of `--trainer` is not the user's to set, Lightning refuses one, or
            SLURM or torchrun have not started a process for each device.
    """
    devices = parse_devices(config.devices)
    user = dict(config.trainer)
    bar = [ProgressBar()] if user.pop("enable_progress_bar", True) else []
    options: dict[str, Any] = {
        "accelerator": config.accelerator,
        "devices": devices,
        "num_nodes": config.num_nodes,
        "strategy": config.strategy,
        "precision": resolve_precision(config),
        "accumulate_grad_batches": config.accumulate_grad_batches,
        "max_epochs": 1,
        "logger": make_loggers(config),
        "callbacks": [*bar, *callbacks],
        "plugins": [io],
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": config.output_dir,
    }
    managed = sorted(set(user) & {*options, *NOT_FOR_THE_TRAINER})
    if managed:
        raise UserError(f"--trainer.{managed[0]} cannot be set; dino-xcit manages it")
    here = devices if isinstance(devices, int) else torch.cuda.device_count()
    if config.strategy in ("auto", "ddp") and config.num_nodes * here > 1:
        # Every process computes the same buffers from the same values: broadcasting is wasted.
        options["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        with warnings.catch_warnings():
            # The user has chosen another device.
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            trainer = L.Trainer(**options, **user)
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(refusal(config, error)) from error
    _require_all_processes(config, trainer)
    return trainer


def _require_all_processes(config: PretrainConfig, trainer: L.Trainer) -> None:
    """Check that there is a process for each device: Lightning takes as many as there are.

    With fewer the total batch would be smaller and the learning rate with it; of more, each would
    train a network of its own.

    Raises:
        UserError: SLURM, torchrun or another launcher has started another number of processes.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    if TorchElasticEnvironment.detect():
        launcher, way_out = "torchrun", f"torchrun --nproc-per-node={devices}"
        found = TorchElasticEnvironment().world_size()
    elif SLURMEnvironment.detect():
        launcher, way_out = "SLURM", f"srun --nodes={nodes} --ntasks-per-node={devices}"
        found = SLURMEnvironment().world_size()
    else:
        launcher, way_out, found = "the launcher", "one for each device", trainer.world_size
    if found != devices * nodes:
        raise UserError(
            f"{launcher} has started {found} process{'es' * (found > 1)}, but --devices "
            f"{config.devices} and --num_nodes {nodes} take {devices * nodes}; start as many "
            f"({way_out}), or set --devices to the processes of a machine"
        )


@contextlib.contextmanager
def ending_together(trainer: L.Trainer) -> Iterator[None]:
    """When this process fails, end the processes that it started: they would wait for it.

    Raises:
        UserError: another process has ended with the user's error.
        RunFailedError: another process has ended otherwise; this one would wait in vain.
    """
    try:
        yield
    except BaseException as error:
        codes = _end_launched(getattr(trainer.strategy.launcher, "procs", []))
        if trainer.world_size > 1 and _lost_another(error):
            failure = UserError if USERS_ERROR in codes else RunFailedError
            raise failure(
                "another process of this run has ended; its own message is the reason"
            ) from error
        raise


def _end_launched(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Let processes print their own errors, kill those that wait; return their exit codes.

    Lightning watches the list to kill this process as soon as one of them fails: it is emptied.
    """
    launched = list(processes)
    processes.clear()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in launched:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.returncode for process in launched]


def _lost_another(error: BaseException) -> bool:
    """Whether it is the error of a collective operation whose other side has gone."""
    of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return of_gloo or isinstance(error, (dist.DistBackendError, dist.DistNetworkError))


class CropData(L.LightningDataModule):
    """The loader of this process.

    Args:
        config: the run's options.
        images: the training images.
        path_shape: layers and residual branches of the backbone's stochastic depth.
    """

    def __init__(self, config: RunConfig, images: ImageSet, path_shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.images, self.path_shape = config, images, path_shape

    @override
    def train_dataloader(self) -> CropLoader:
        """The batches from the step at which this start of the run begins."""
        trainer = self.trainer
        assert trainer is not None
        images = len(self.images)
        sampler = StepBatchSampler(self.config, images, trainer.global_rank, trainer.world_size)
        sampler.first_step = trainer.global_step
        workers = self.config.num_workers
        if workers is None:
            workers = default_workers(trainer.num_devices)
        report_scarce_shared_memory(self.config, workers, trainer.num_devices)
        return CropLoader(
            CropDataset(self.images, self.config, self.path_shape),
            sampler,
            num_workers=workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
