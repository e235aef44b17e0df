"""Config -> data, module, trainer -> a finished run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dino_xcit.config.pretrain import PretrainConfig, differing_options
from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.data.loader import CropDataset, CropLoader, StepBatchSampler, default_workers
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, LAST, TEACHER, read_config, write_config
from dino_xcit.runtime import (
    is_first_process,
    keep_freed_memory,
    parse_devices,
    refusal,
    require_folder,
    resolve_precision,
    say,
    why_nothing_compiles,
)
from dino_xcit.train.callback import Progress, RunFolderWriter
from dino_xcit.train.checkpoints import DurableIO, checkpoints_of, locked, newest_whole
from dino_xcit.train.collapse import does_not_sharpen
from dino_xcit.train.dry_run import describe_plan, draw_crop_sheet, refuse_oversized_step
from dino_xcit.train.module import DINOModule
from dino_xcit.train.official_resume import resume_official
from dino_xcit.train.schedules import Schedules
from dino_xcit.train.signals import StopSignals
from dino_xcit.weights.load import start_from

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.loggers import Logger

NOT_FOR_THE_TRAINER = {
    "fast_dev_run",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "sync_batchnorm",
}
STEPS_THAT_PAY_FOR_COMPILING = 10_000  # on a CPU


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    """optimizer steps done"""
    steps: int
    """optimizer steps of the whole run"""
    stopped_by: signal.Signals | None = None
    """what asked it to stop, if something did"""
    requeued: bool = False
    """whether SLURM will start it again"""

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to stop before its end."""
        return self.stopped_by is not None

    @property
    def exit_code(self) -> int:
        """Of the command: 128 + the signal's number, or 0 if SLURM will start the job again."""
        return 0 if self.stopped_by is None or self.requeued else 128 + self.stopped_by


@rank_zero_only
def print_outcome(outcome: Outcome) -> None:
    """The last line of a run: its product, or how to continue it."""
    folder, done = outcome.folder, f"step {outcome.step} of {outcome.steps}"
    if outcome.interrupted:
        continues = f"continue with: dino-xcit pretrain --config {folder}/{CONFIG}"
        print(f"stopped at {done}, saved; {continues}", file=sys.stderr)
    else:
        print(f"{done}: {folder}/{TEACHER}")


def pretrain(config: PretrainConfig) -> Outcome:
    """Run, or continue, the run in `config.output_dir`.

    Raises ValueError, naming the flag, for what the user can put right, FloatingPointError if the loss or a weight is not
    finite, CollapseError with --on_collapse stop, and OSError if the last step cannot be saved.
    """
    config = _with_precision(config)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    with StopSignals().listening() as signals:
        images = open_images(config, "train")
        assert images is not None
        io = DurableIO()
        trainer = make_trainer(config, io)
        order = StepBatchSampler(config, len(images), world_size=trainer.world_size)
        schedules = Schedules(
            config=config, steps_per_epoch=order.steps_per_epoch, total_batch=order.total_batch
        )
        folder = Path(config.output_dir)
        require_folder(folder, "output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), flushed_denormals():
            outcome = _run(config, images, trainer, schedules, io, signals)
    if not config.dry_run:
        print_outcome(outcome)
    return outcome


def _with_precision(config: PretrainConfig) -> PretrainConfig:
    """`--precision auto` is settled when a run begins, and stays so on whatever machine it goes on."""
    if config.precision != "auto":
        return config
    folder = Path(config.output_dir)
    precision = (
        read_config(folder).precision if checkpoints_of(folder) else resolve_precision(config)
    )
    return dataclasses.replace(config, precision=precision)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormals slow CPU training several times over."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _run(
    config: PretrainConfig,
    images: ImageSet,
    trainer: L.Trainer,
    schedules: Schedules,
    io: DurableIO,
    signals: StopSignals,
) -> Outcome:
    folder = Path(config.output_dir)
    checkpoint = prepare_folder(folder, config)
    L.seed_everything(config.seed, verbose=False)
    module = DINOModule(config, schedules)
    if config.init_weights is not None and checkpoint is None:
        say(start_from(config.init_weights, module.student, module.teacher, module.loss))
    if config.continue_from is not None and checkpoint is None:
        checkpoint = _continue(config, module, trainer, io)
    rank_zero_only(draw_crop_sheet)(folder, module, images)
    if does_not_sharpen(config):
        say(
            f"--teacher_temp {config.teacher_temp:g} (--warmup_teacher_temp {config.warmup_teacher_temp:g}) is not below "
            f"--student_temp {config.student_temp:g}: a teacher that does not sharpen collapses to uniform; try 0.04"
        )
    if config.dry_run:
        rank_zero_only(print)(describe_plan(config, module, len(images), trainer))
        return Outcome(folder=folder, step=0, steps=schedules.steps)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    if _compiles(config, schedules.steps, trainer.strategy.root_device):
        module.compile_regions()  # keeps less than the estimate says
    elif on_cpu:
        refuse_oversized_step(config, trainer.precision)
    saver = RunFolderWriter(config, folder, images, signals, io)
    trainer.callbacks.insert(0, saver)  # type: ignore[attr-defined]
    signals.listen()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*does not have many workers.*"
        )  # it has one for every core
        warnings.filterwarnings(
            "ignore", message=".*treespec, LeafSpec.*", category=FutureWarning
        )  # Lightning's own
        try:
            trainer.fit(
                module,
                datamodule=CropData(config, images, module.student.backbone.path_shape),
                ckpt_path=checkpoint,
                weights_only=True,
            )
        except SIGTERMException:  # a signal that Lightning's handler saw before; the step is saved
            saver.stopped = True
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory at --batch_size_per_gpu {config.batch_size_per_gpu}; lower it and raise "
                f"--accumulate_grad_batches, or set --grad_checkpointing true ({str(error).split('. ')[0]})"
            ) from error
    stopped_by = (
        (signals.asked or signal.SIGTERM) if saver.stopped else None
    )  # of another process: as if by SIGTERM
    return Outcome(
        folder=folder,
        step=trainer.global_step,
        steps=schedules.steps,
        stopped_by=stopped_by,
        requeued=saver.requeued,
    )


def _compiles(config: PretrainConfig, steps: int, device: torch.device) -> bool:
    """Whether it pays, or is asked for, and works here."""
    pays = device.type == "cuda" or (device.type == "cpu" and steps >= STEPS_THAT_PAY_FOR_COMPILING)
    if not (pays if config.compile is None else config.compile):
        return False
    problem = why_nothing_compiles(device)
    if problem is not None:
        say(f"torch.compile does not work here ({problem}); the run is the same without it, slower")
    return problem is None


@rank_zero_only
def _write_config(folder: Path, config: PretrainConfig) -> None:
    write_config(config, folder)


def _continue(
    config: PretrainConfig, module: DINOModule, trainer: L.Trainer, io: DurableIO
) -> Path:
    """Somebody else's run becomes the last checkpoint of this one. Raises OSError if it cannot be written."""
    content, told = resume_official(Path(config.continue_from or ""), module, trainer)
    path = Path(config.output_dir) / LAST
    if is_first_process() and not config.dry_run:
        io.save_checkpoint(content, path)
        if io.error is not None:
            raise io.error
    say(told)
    return path


def prepare_folder(folder: Path, config: PretrainConfig) -> Path | None:
    """Write config.yaml -> the checkpoint to continue from, or None for a fresh start.

    Raises ValueError if the folder holds a run that this config must not continue.
    """
    checkpoint = newest_whole(folder)
    if checkpoint is not None:
        if not config.resume:
            raise UserError(
                f"--output_dir {folder} holds a run and --resume is false; name another --output_dir"
            )
        differing = differing_options(read_config(folder), config)
        if differing:
            listed = ", ".join(
                f"--{name} was {old}, now {new}" for name, (old, new) in differing.items()
            )
            raise UserError(
                f"--output_dir {folder} holds a run of other options: {listed}; name another --output_dir"
            )
    if not config.dry_run or checkpoint is None:
        _write_config(folder, config)
    return checkpoint


# -- machine ---------------------------------------------------------------------------------------------------------


def make_trainer(config: PretrainConfig, io: DurableIO) -> L.Trainer:
    """Lightning's trainer for one long epoch: the loader hands out every batch of the run."""
    devices = parse_devices(config.devices)
    options: dict[str, Any] = {
        "accelerator": config.accelerator,
        "devices": devices,
        "num_nodes": config.num_nodes,
        "strategy": config.strategy,
        "precision": resolve_precision(config),
        "accumulate_grad_batches": config.accumulate_grad_batches,
        "max_epochs": 1,
        "logger": make_loggers(config),
        "callbacks": [Progress(config)] if config.trainer.get("enable_progress_bar", True) else [],
        "plugins": [io],
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": config.output_dir,
    }
    if config.strategy in ("auto", "ddp"):
        processes = config.num_nodes * (
            devices if isinstance(devices, int) else torch.cuda.device_count()
        )
        if processes > 1:
            # Every process computes the same buffers from the same numbers, so broadcasting them would be wasted.
            options["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    taken = sorted(set(config.trainer) & {*options, *NOT_FOR_THE_TRAINER})
    if taken:
        raise UserError(
            f"--trainer.{taken[0]} is not free: this command has an option for it or depends on it as it is"
        )
    try:
        return L.Trainer(**{**options, **config.trainer})
    except (
        TypeError,
        ValueError,
        L.pytorch.utilities.exceptions.MisconfigurationException,
    ) as error:
        raise UserError(refusal(config, error)) from error


def make_loggers(config: PretrainConfig) -> list[Logger]:
    """Loggers besides metrics.csv."""
    loggers: list[Logger] = []
    try:
        if "tensorboard" in config.logger:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(config.output_dir, name="", version="tensorboard"))
        if "wandb" in config.logger:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(
                WandbLogger(
                    save_dir=config.output_dir,
                    project="dino_xcit",
                    name=Path(config.output_dir).name,
                )
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"--logger {' '.join(config.logger)} needs a package that is not installed: {error}"
        ) from error
    return loggers


class CropData(L.LightningDataModule):
    """The loader of this process."""

    def __init__(
        self, config: PretrainConfig, images: ImageSet, path_shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.config, self.images, self.path_shape = config, images, path_shape

    def train_dataloader(self) -> CropLoader:
        trainer = self.trainer
        assert trainer is not None
        order = StepBatchSampler(
            self.config, len(self.images), trainer.global_rank, trainer.world_size
        )
        workers = default_workers() if self.config.num_workers is None else self.config.num_workers
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return CropLoader(
            CropDataset(self.images, self.config, self.path_shape),
            order,
            num_workers=workers,
            pin_memory=on_gpu,
        )
