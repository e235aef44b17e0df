"""Config -> data, module, trainer -> a finished run folder."""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng

from dino_xcit.data.census import report_start
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import StepBatchSampler
from dino_xcit.errors import UserError
from dino_xcit.private_names import compiling
from dino_xcit.run_folder import CONFIG, LAST, TEACHER, write_config
from dino_xcit.runtime import (
    is_first_process,
    memory_there,
    quiet_logger,
    require_folder,
    say,
    why_nothing_compiles,
)
from dino_xcit.train.callback import RunFolderWriter
from dino_xcit.train.checkpoints import DurableIO, FolderLock, locked, newest_whole
from dino_xcit.train.collapse import does_not_sharpen
from dino_xcit.train.dry_run import (
    describe_plan,
    draw_crop_sheet,
    memory_estimate,
    refuse_oversized_step,
)
from dino_xcit.train.module import DINOModule
from dino_xcit.train.official_resume import resume_official
from dino_xcit.train.recipe import FEW_STEPS
from dino_xcit.train.resume import require_same_run
from dino_xcit.train.schedules import Schedules
from dino_xcit.train.settle import settle, settle_precision
from dino_xcit.train.signals import StopSignals
from dino_xcit.train.trainer import CropData, ending_together, make_trainer
from dino_xcit.weights.start import start_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import lightning as L

    from dino_xcit.config.pretrain import PretrainConfig, RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.model.backbone import Backbone

STEPS_THAT_PAY_FOR_COMPILING = 10_000  # on a CPU
KEPT_FOR_BACKWARD = 0.3
"""Share of what a compiled region would keep; what is cheap to compute is computed again
(`eval/speed/README.md`). On a GPU only where memory is short, see `share_kept`."""


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
    ended_early: bool = False
    """whether it ended before its last step unasked: by a limit of --trainer or a callback"""

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to stop before its end."""
        return self.stopped_by is not None

    @property
    def exit_code(self) -> int:
        """Of the command: 0 if the run is finished or SLURM will start the job again.

        128 + the signal's number after a signal, 1 for a run that ended before its last step.
        """
        if self.stopped_by is None or self.requeued:
            return int(self.ended_early)
        return 128 + self.stopped_by


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of."""

    config: RunConfig
    images: ImageSet
    io: DurableIO
    trainer: L.Trainer
    schedules: Schedules
    signals: StopSignals

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)


def pretrain(config: PretrainConfig, callbacks: Sequence[L.Callback] = ()) -> Outcome:
    """Pretrain a backbone, or continue the run in `config.output_dir`.

    Args:
        config: every option.
        callbacks: Lightning callbacks besides ours. `trainer.global_step` counts the steps of the
            whole run.

    Returns:
        How the run ended. The caller's signal handlers, random states, logging levels and torch
        settings are as before.

    Raises:
        UserError: the input cannot be used; the message names the flag.
        NotFiniteError: the loss or a weight is not finite.
        CollapseError: the run collapsed, with --on_collapse stop.
        RunFailedError: the last step cannot be saved.
    """
    with (
        StopSignals().listening() as signals,
        quiet_logger("lightning.pytorch"),
        isolate_rng(),
        flushed_denormals(),
    ):
        run = _open(config, signals, callbacks)
        require_folder(run.folder, "output_dir")
        run.folder.mkdir(parents=True, exist_ok=True)
        with locked(run.folder) as lock:
            outcome = _start(run, lock)
    if not config.dry_run:
        print_outcome(outcome)
    return outcome


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal floats as 0: they slow CPU training several times over."""
    smallest = torch.finfo(torch.float32).tiny
    before = (torch.tensor(smallest) / 2).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _open(asked: PretrainConfig, signals: StopSignals, callbacks: Sequence[L.Callback]) -> Run:
    io = DurableIO()
    asked = settle_precision(asked)
    trainer = make_trainer(asked, io, callbacks)
    images = open_images(asked, "train")
    assert images is not None
    config = settle(asked, images, trainer)
    sampler = StepBatchSampler(config, len(images), world_size=trainer.world_size)
    schedules = Schedules(
        config=config, steps_per_epoch=sampler.steps_per_epoch, total_batch=sampler.total_batch
    )
    return Run(
        config=config, images=images, io=io, trainer=trainer, schedules=schedules, signals=signals
    )


def _start(run: Run, lock: FolderLock) -> Outcome:
    """Prepare the folder and the networks, then train."""
    config, folder, trainer = run.config, run.folder, run.trainer
    checkpoint = prepare_folder(run)
    torch.manual_seed(config.seed)
    module = DINOModule(config, run.schedules)
    _check_backbone(config, module.student.backbone)
    if config.init_weights is not None and checkpoint is None:
        say(start_from(config.init_weights, module.student, module.teacher, module.loss))
    if config.continue_from is not None and checkpoint is None:
        checkpoint = _import_official(run, module)
    report_start(run.images)
    rank_zero_only(draw_crop_sheet)(folder, module, run.images)
    if does_not_sharpen(config):
        say(
            f"--teacher_temp {config.teacher_temp:g} (--warmup_teacher_temp "
            f"{config.warmup_teacher_temp:g}) is not below --student_temp "
            f"{config.student_temp:g}: a teacher that does not sharpen collapses to uniform; "
            "try 0.04"
        )
    if run.schedules.steps < FEW_STEPS and checkpoint is None:
        say(
            f"{run.schedules.steps:,} steps are few: runs that learn something take thousands; "
            "raise --epochs or --max_hours"
        )
    if config.dry_run:
        rank_zero_only(print)(describe_plan(config, module, run.images, trainer))
        return Outcome(folder=folder, step=0, steps=run.schedules.steps)
    device = trainer.strategy.root_device
    if _compiles(config, run.schedules.steps, device):
        module.compile_regions(device)  # keeps less than the estimate says
    elif device.type == "cpu":
        refuse_oversized_step(config, trainer.precision)
    return _fit(run, module, checkpoint, lock)


def _check_backbone(config: RunConfig, backbone: Backbone) -> None:
    """Check that the network takes the crops; report an option that it does not have.

    Raises:
        UserError: a crop's side does not suit the network; the message names the flag.
    """
    backbone.check_image_size(config.global_crops_size, "global_crops_size")
    if config.local_crops_number:
        backbone.check_image_size(config.local_crops_size, "local_crops_size")
    if config.drop_path_rate > 0 and not backbone.path_shape[0]:
        say(
            f"{backbone.arch} has no stochastic depth: --drop_path_rate {config.drop_path_rate:g} "
            "has no effect"
        )


def _fit(run: Run, module: DINOModule, checkpoint: Path | None, lock: FolderLock) -> Outcome:
    """Train to the end, or until the run is asked to stop."""
    trainer, signals = run.trainer, run.signals
    writer = RunFolderWriter(run.config, lock, run.images, signals, run.io)
    trainer.callbacks.insert(0, writer)  # type: ignore[attr-defined]
    data = CropData(run.config, run.images, module.student.backbone.path_shape)
    signals.listen()
    share = share_kept(run.config, trainer.precision, trainer.strategy.root_device)
    with warnings.catch_warnings(), compiling(share):
        # The loader has a worker for every core; a finished run has no more batches; the last
        # warning is of Lightning's own code.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
        try:
            with ending_together(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SIGTERMException:  # seen by Lightning's handler before ours; the step is saved
            writer.stopped = True
        except SystemExit as error:  # Lightning's, after a second Ctrl-C
            raise KeyboardInterrupt from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory at --batch_size_per_gpu {run.config.batch_size_per_gpu}; lower it "
                "and raise --accumulate_grad_batches, or set --grad_checkpointing true "
                f"({str(error).split('. ')[0]})"
            ) from error
    # Asked of another process only: as if by SIGTERM.
    stopped_by = (signals.asked or signal.SIGTERM) if writer.stopped else None
    return Outcome(
        folder=run.folder,
        step=trainer.global_step,
        steps=run.schedules.steps,
        stopped_by=stopped_by,
        requeued=writer.requeued,
        ended_early=stopped_by is None and trainer.global_step < run.schedules.steps,
    )


def _compiles(config: RunConfig, steps: int, device: torch.device) -> bool:
    """Whether compiling pays, or is asked for, and works here."""
    long_enough = device.type == "cpu" and steps >= STEPS_THAT_PAY_FOR_COMPILING
    pays = device.type == "cuda" or long_enough
    if not (pays if config.compile is None else config.compile):
        return False
    problem = why_nothing_compiles(device)
    if problem is not None:
        say(f"torch.compile does not work here ({problem}); the run is the same without it, slower")
    return problem is None


def share_kept(config: RunConfig, precision: str, device: torch.device) -> float:
    """Share of its activations that a compiled region keeps for the backward pass.

    On a GPU all of them, where they fit: there computing again costs more than memory is worth. The
    estimate is of layers that are not compiled, so it is on the safe side: compiled ones keep less,
    and the rest is room for temporary buffers.

    Args:
        config: options of the run.
        precision: as Lightning names it.
        device: of this process.
    """
    if device.type != "cuda":
        return KEPT_FOR_BACKWARD
    fits = memory_estimate(config, precision) <= memory_there(device)
    return 1.0 if fits else KEPT_FOR_BACKWARD


def _import_official(run: Run, module: DINOModule) -> Path:
    """Write official DINO's checkpoint as the last checkpoint of this run.

    Raises:
        OSError: it cannot be written.
    """
    content, summary = resume_official(Path(run.config.continue_from or ""), module, run.trainer)
    path = run.folder / LAST
    if is_first_process() and not run.config.dry_run:
        run.io.save_checkpoint(content, path)
        if run.io.error is not None:
            raise run.io.error
    say(summary)
    return path


def prepare_folder(run: Run) -> Path | None:
    """Write config.yaml and find the checkpoint to continue from.

    Returns:
        None for a fresh start.

    Raises:
        UserError: the folder holds a run that this config must not continue.
    """
    config, folder = run.config, run.folder
    checkpoint = newest_whole(folder)
    if checkpoint is not None:
        if not config.resume:
            raise UserError(
                f"--output_dir {folder} holds a run and --resume is false; name another "
                "--output_dir"
            )
        require_same_run(checkpoint, config, run.images, run.schedules)
    if not config.dry_run or checkpoint is None:
        rank_zero_only(write_config)(config, folder)
    return checkpoint


@rank_zero_only
def print_outcome(outcome: Outcome) -> None:
    """Print the last line of a run: its product, or how to continue it."""
    folder, done = outcome.folder, f"step {outcome.step} of {outcome.steps}"
    how = f"saved; continue with: dino-xcit pretrain --config {folder}/{CONFIG}"
    if outcome.interrupted:
        print(f"stopped at {done}, {how}", file=sys.stderr)
    elif outcome.ended_early:
        print(
            f"not finished: a limit of --trainer or a callback ended it at {done}, {how} "
            "--trainer={}",
            file=sys.stderr,
        )
    else:
        print(f"{done}: {folder}/{TEACHER}")
