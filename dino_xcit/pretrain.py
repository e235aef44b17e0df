"""Config -> data, module, trainer -> a finished run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dino_xcit import run_folder
from dino_xcit.config import PretrainConfig, differing_options, validate
from dino_xcit.data import Batch, CropDataset, CropLoader, ImageSet, Order, default_workers, open_images
from dino_xcit.machine import (
    is_first_process,
    keep_freed_memory,
    parse_devices,
    refusal,
    require_folder,
    resolve_precision,
    say,
    why_nothing_compiles,
)
from dino_xcit.module import COLUMNS, DINOModule
from dino_xcit.plan import draw_crop_sheet, plan, refuse_what_does_not_fit
from dino_xcit.probe import Probe, StoppedError
from dino_xcit.saving import (
    SOUND,
    Agreement,
    DurableIO,
    StopSignals,
    checkpoints_of,
    keep_as_sound,
    locked,
    newest_whole,
    requeue,
    take_its_place,
)
from dino_xcit.schedules import Schedules
from dino_xcit.strip import AttentionStrip
from dino_xcit.takeover import take_over
from dino_xcit.watch import CollapseError, CollapseWatch, Sign, does_not_sharpen
from dino_xcit.weights import LAST, TEACHER, save_backbone, start_from
from dino_xcit.xcit import resolve_architecture

SECONDS_BETWEEN_TRIES, LAST_TRIES = 60, 60  # to save the last step of a run
NOT_FOR_THE_TRAINER = {
    "fast_dev_run",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "sync_batchnorm",
}
BAD_SHARE_TO_LOOK_AT = 0.01
STEPS_THAT_PAY_FOR_COMPILING = 10_000  # on a CPU
ROWS_LOOKED_AT = 100  # for signs of collapse, when a run goes on


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
        return self.stopped_by is not None


def pretrain(config: PretrainConfig) -> Outcome:
    """Run, or continue, the run in `config.output_dir`.

    Raises ValueError, naming the flag, for what the user can put right, FloatingPointError if the loss or a weight is not
    finite, CollapseError with --on_collapse stop, and OSError if the last step cannot be saved.
    """
    validate(config)
    resolve_architecture(config.arch)
    config = _with_precision(config)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    with StopSignals().listening() as signals:
        images = open_images(config, "train")
        assert images is not None
        io = DurableIO()
        trainer = make_trainer(config, io)
        order = Order(config, len(images), world_size=trainer.world_size)
        schedules = Schedules(config=config, steps_per_epoch=order.steps_per_epoch, total_batch=order.total_batch)
        folder = Path(config.output_dir)
        require_folder(folder, "output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), flushed_denormals():
            return _run(config, images, trainer, schedules, io, signals)


def _with_precision(config: PretrainConfig) -> PretrainConfig:
    """`--precision auto` is settled when a run begins, and stays so on whatever machine it goes on."""
    if config.precision != "auto":
        return config
    folder = Path(config.output_dir)
    precision = run_folder.read_config(folder).precision if checkpoints_of(folder) else resolve_precision(config)
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
    config: PretrainConfig, images: ImageSet, trainer: L.Trainer, schedules: Schedules, io: DurableIO, signals: StopSignals
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
        rank_zero_only(print)(plan(config, module, len(images), trainer))
        return Outcome(folder=folder, step=0, steps=schedules.steps)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    if _compiles(config, schedules.steps, trainer.strategy.root_device):
        module.compile_regions()  # keeps less than the estimate says
    elif on_cpu:
        refuse_what_does_not_fit(config, trainer.precision)
    saver = RunFolder(config, folder, images, signals, io)
    trainer.callbacks.insert(0, saver)  # type: ignore[attr-defined]
    signals.listen()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # it has one for every core
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)  # Lightning's own
        try:
            trainer.fit(module, datamodule=CropData(config, images), ckpt_path=checkpoint, weights_only=True)
        except SIGTERMException:  # a signal that Lightning's handler saw before; the step is saved
            saver.stopped = True
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory at --batch_size_per_gpu {config.batch_size_per_gpu}; lower it and raise "
                f"--accumulate_grad_batches, or set --grad_checkpointing true ({str(error).split('. ')[0]})"
            ) from error
    stopped_by = (signals.asked or signal.SIGTERM) if saver.stopped else None  # of another process: as if by SIGTERM
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
    run_folder.write_config(config, folder)


def _continue(config: PretrainConfig, module: DINOModule, trainer: L.Trainer, io: DurableIO) -> Path:
    """Somebody else's run becomes the last checkpoint of this one. Raises OSError if it cannot be written."""
    content, told = take_over(Path(config.continue_from or ""), module, trainer)
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
            raise ValueError(f"--output_dir {folder} holds a run and --resume is false; name another --output_dir")
        differing = differing_options(run_folder.read_config(folder), config)
        if differing:
            listed = ", ".join(f"--{name} was {old}, now {new}" for name, (old, new) in differing.items())
            raise ValueError(f"--output_dir {folder} holds a run of other options: {listed}; name another --output_dir")
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
        processes = config.num_nodes * (devices if isinstance(devices, int) else torch.cuda.device_count())
        if processes > 1:
            # Every process computes the same buffers from the same numbers, so broadcasting them would be wasted.
            options["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    taken = sorted(set(config.trainer) & {*options, *NOT_FOR_THE_TRAINER})
    if taken:
        raise ValueError(f"--trainer.{taken[0]} is not free: this command has an option for it or depends on it as it is")
    try:
        return L.Trainer(**{**options, **config.trainer})
    except (TypeError, ValueError, L.pytorch.utilities.exceptions.MisconfigurationException) as error:
        raise ValueError(refusal(config, error)) from error


def make_loggers(config: PretrainConfig) -> list[Logger]:
    """Loggers besides metrics.csv."""
    loggers: list[Logger] = []
    try:
        if "tensorboard" in config.logger:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(config.output_dir, name="", version="tensorboard"))
        if "wandb" in config.logger:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(save_dir=config.output_dir, project="dino_xcit", name=Path(config.output_dir).name))
    except ModuleNotFoundError as error:
        raise ValueError(f"--logger {' '.join(config.logger)} needs a package that is not installed: {error}") from error
    return loggers


class CropData(L.LightningDataModule):
    """The loader of this process."""

    def __init__(self, config: PretrainConfig, images: ImageSet) -> None:
        super().__init__()
        self.config, self.images = config, images

    def train_dataloader(self) -> CropLoader:
        trainer = self.trainer
        assert trainer is not None
        order = Order(self.config, len(self.images), trainer.global_rank, trainer.world_size)
        workers = default_workers() if self.config.num_workers is None else self.config.num_workers
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return CropLoader(CropDataset(self.images, self.config), order, num_workers=workers, pin_memory=on_gpu)


# -- what happens besides the steps ----------------------------------------------------------------------------------


class RunFolder(L.Callback):
    """Writes the run folder while the run goes on, and stops the run when it is asked to.

    What cannot be written is told, and tried again; the run goes on.
    """

    def __init__(self, config: PretrainConfig, folder: Path, images: ImageSet, signals: StopSignals, io: DurableIO) -> None:
        self.config, self.folder, self.signals, self.io = config, folder, signals, io
        validation = open_images(config, "validation", images.classes)
        self.probe = Probe(config, images, validation)
        self.pictured = validation or images
        self.watch = CollapseWatch(config)
        self.stopped = self.to_be_requeued = self.requeued = False
        self.save_at = time.monotonic() + 60 * config.checkpoint_every_n_minutes
        self.bad_images = run_folder.read_bad_images(folder)
        self.images_seen = self.bad_images_seen = 0
        self.saved_step = -1
        self.told_of_bad_images = False

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.signals.listen()  # Lightning has put its own handlers in their place, which end a run with exit code 0
        # So nobody has to broadcast at each step, waiting for the device, whether Lightning's have seen a signal; one that
        # they have seen until now is ours to tell.
        if trainer.received_sigterm:
            self.signals.asked, trainer._signal_connector.received_sigterm = signal.SIGTERM, False
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.agreement = Agreement()
        step = trainer.global_step
        if trainer.is_global_zero:
            self.metrics = run_folder.Metrics(self.folder, COLUMNS, step)
            self.strip = AttentionStrip(self.config, self.pictured, self.folder, step)
            if not step:
                with torch.compiler.set_stance("force_eager"):
                    self.strip.add(0, module.teacher.backbone, module.device)
        if not step:
            return
        self.saved_step = step
        say(f"continuing {self.folder} from step {step}")
        for row in trainer.strategy.broadcast(self.metrics.rows[-ROWS_LOOKED_AT:] if trainer.is_global_zero else []):
            self.watch({name: float(value) for name, value in row.items() if value})
        if trainer.strategy.broadcast(trainer.is_global_zero and self._was_stopped_in_evaluating(module, step)):
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
            trainer.should_stop = self.stopped

    def _was_stopped_in_evaluating(self, module: Any, step: int) -> bool:
        last = self.metrics.rows[-1] if self.metrics.rows else {}
        return self._evaluates(module, step) and last.get("step") == str(step) and not last.get("rankme")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._note_bad_images(batch)
        if (batch_idx + 1) % self.config.accumulate_grad_batches:
            return  # in the middle of a step
        step, every = trainer.global_step, self.config.checkpoint_every_n_steps
        ends_epoch = not step % module.schedules.steps_per_epoch
        sign = None
        if module.row:
            self._write_row(trainer, {"step": step, **module.row})
            sign = self.watch(module.row)
        self.stopped, self.to_be_requeued, overdue = self.agreement(
            self.signals.asked is not None, self.signals.asked == signal.SIGUSR1, time.monotonic() >= self.save_at
        )
        # What several processes want is heard a step late: the step after a save, it was wanted before it.
        overdue = overdue and not (trainer.world_size > 1 and step == self.saved_step + 1)
        if self.stopped or overdue or ends_epoch or (every is not None and step % every == 0):
            self.save(trainer, module)
        if sign is not None:
            self._tell(sign, step)
        if self._evaluates(module, step) and not self.stopped:
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
        if self.stopped:
            trainer.should_stop = True

    def _evaluates(self, module: Any, step: int) -> bool:
        epoch, into_epoch = divmod(step, module.schedules.steps_per_epoch)
        every = self.config.eval_every_n_epochs
        return not into_epoch and (epoch == self.config.epochs or (every > 0 and epoch % every == 0))

    @torch.compiler.set_stance("force_eager")  # batches of other shapes would be compiled anew
    def _evaluate(self, trainer: L.Trainer, module: Any, step: int) -> tuple[bool, bool]:
        """By one process while the others wait -> whether it was asked to stop, and by SIGUSR1.

        The step is saved by then: an interrupted evaluation is made up for.
        """
        interrupted = False
        try:
            if trainer.is_global_zero:
                found = self.probe(module.teacher.backbone, module.device, lambda: self.signals.asked is not None)
                values = {name: value for name, value in found._asdict().items() if value is not None}
                with self._telling("metrics.csv"):
                    self.metrics.amend(values)
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)
                with self._telling("attention.png and curves.png"):
                    self.strip.add(step, module.teacher.backbone, module.device)
                    run_folder.draw_curves(self.folder)
        except StoppedError:
            interrupted = True
        module.restart_clock()
        return trainer.strategy.broadcast((interrupted, interrupted and self.signals.asked == signal.SIGUSR1))

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            say(f"{self.folder}: {what} cannot be written now ({error.strerror or error}); the run goes on")

    def _write_row(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        with self._telling(run_folder.METRICS):
            self.metrics.write(row)
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    def _tell(self, sign: Sign, step: int) -> None:
        """Raises CollapseError if that is what the run is to do."""
        sound = f"{self.folder / SOUND} is from before the first sign of it" if (self.folder / SOUND).exists() else ""
        if self.config.on_collapse == "stop":
            raise CollapseError(
                f"step {step}: {sign}. Stopped by --on_collapse stop; {sound or 'no checkpoint is from before'}"
            )
        say(f"step {step}: {sign}" + (f"; {sound}" if sound else ""))

    def save(self, trainer: L.Trainer, module: Any) -> bool:
        """checkpoints/last.ckpt and teacher.safetensors; every `saveckp_freq` epochs a checkpoint that stays -> whether that
        worked. If not, it is tried again after a minute."""
        module.stop_if_broken()
        module.refuse_broken_weights()
        beside = (self.folder / LAST).with_name(".last.writing.ckpt")
        trainer.save_checkpoint(beside)
        error: Exception | None = self.io.error
        if trainer.is_global_zero and error is None:
            try:
                self._put_in_place(beside, trainer, module)
            except OSError as found:
                error = found
        saved = trainer.strategy.broadcast(error is None)
        if error is not None:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            say(f"step {trainer.global_step} could not be saved in {self.folder} ({reason}); trying again in a minute")
        self.save_at = time.monotonic() + 60 * (self.config.checkpoint_every_n_minutes if saved else 1)
        self.saved_step = trainer.global_step if saved else self.saved_step
        return saved

    def _put_in_place(self, beside: Path, trainer: L.Trainer, module: Any) -> None:
        if not (self.folder / run_folder.CONFIG).exists():  # somebody took the folder away
            run_folder.write_config(self.config, self.folder)
        if self.metrics.path.exists():
            run_folder.sync(self.metrics.path)  # no checkpoint without the rows before it
        take_its_place(beside, self.folder)
        if not self.watch.suspects:
            keep_as_sound(self.folder)
        with run_folder.replacing(self.folder / TEACHER) as path:
            save_backbone(module.teacher.backbone, self.config, path)
        epoch, into_epoch = divmod(trainer.global_step, module.schedules.steps_per_epoch)
        if not into_epoch and self.config.saveckp_freq and epoch % self.config.saveckp_freq == 0:
            with run_folder.replacing((self.folder / LAST).with_name(f"epoch{epoch:04}.ckpt")) as path:
                shutil.copyfile(self.folder / LAST, path)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.agreement.settle()
        tries = 0
        while self.saved_step != trainer.global_step and not self.save(trainer, module):
            tries += 1
            # A scheduler that wants the machine back does not wait; a run that is done waits for room on the disk.
            if trainer.strategy.broadcast(self.signals.asked is not None or tries > LAST_TRIES):
                raise OSError(f"step {trainer.global_step} is not saved; {self.folder}/{LAST} is of an earlier step")
            time.sleep(SECONDS_BETWEEN_TRIES)
        if self.stopped and self.to_be_requeued:
            self.requeued = trainer.strategy.broadcast(trainer.is_global_zero and requeue())

    def _note_bad_images(self, batch: Batch) -> None:
        self.images_seen += len(batch.views["global_crops"])
        self.bad_images_seen += len(batch.bad_images)
        for bad in batch.bad_images:
            name = run_folder.on_one_line(bad.name)
            if name not in self.bad_images:
                self.bad_images.add(name)
                with self._telling(run_folder.BAD_IMAGES), (self.folder / run_folder.BAD_IMAGES).open("a") as file:
                    file.write(f"{name}\t{bad.reason}\n")
        share = self.bad_images_seen / self.images_seen
        if share > BAD_SHARE_TO_LOOK_AT and self.images_seen >= 100 and not self.told_of_bad_images:
            self.told_of_bad_images = True
            say(
                f"{self.bad_images_seen} of the first {self.images_seen} images could not be read ({share:.1%}); "
                f"look at {self.folder / run_folder.BAD_IMAGES}"
            )


class Progress(TQDMProgressBar):
    """Lightning's bar over all steps of the run, with epoch, loss and images per second."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.shown: dict[str, str] = {}
        # In a file every refresh is a line of its own.
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else config.log_every_n_steps)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("pretrain")
        self.train_progress_bar.initial = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def get_metrics(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        row = module.row
        if row:
            self.shown = {
                "epoch": f"{row['epoch'] + 1}/{self.config.epochs}",
                "loss": f"{row['loss']:.3f}",
                "images/s": f"{row['images_per_second']:.0f}",
            }
        return dict(self.shown)
