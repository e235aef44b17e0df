"""Config -> data, module, trainer -> a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import os
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
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from dino_xcit import run_folder
from dino_xcit.config import PretrainConfig, differing_options, validate
from dino_xcit.data import BadImage, Batch, CropDataset, CropLoader, ImageSet, Order, default_workers, open_images
from dino_xcit.features import DONE, WORTH_WORKERS, EvalDataset, Frozen, Store, Transform, default_resize, extract
from dino_xcit.knn import knn_classify, top1
from dino_xcit.machine import parse_devices, refusal, resolve_precision, say
from dino_xcit.module import COLUMNS, CollapseWatch, DINOModule
from dino_xcit.plan import draw_crop_sheet, plan, refuse_what_does_not_fit
from dino_xcit.schedules import Schedules
from dino_xcit.strip import AttentionStrip
from dino_xcit.weights import LAST, TEACHER, save_backbone, start_from
from dino_xcit.xcit import resolve_architecture

SECONDS_BETWEEN_CHECKPOINTS = 600
NOT_FOR_THE_TRAINER = {
    "fast_dev_run",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "sync_batchnorm",
}
BAD_SHARE_TO_LOOK_AT = 0.01
PROBE_NEIGHBOURS = 20
PROBE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    """optimizer steps done"""
    steps: int
    """optimizer steps of the whole run"""
    interrupted: bool


def pretrain(config: PretrainConfig) -> Outcome:
    """Run, or continue, the run in `config.output_dir`.

    Raises ValueError, naming the flag, for what the user can put right, and FloatingPointError if the loss is not finite.
    """
    validate(config)
    resolve_architecture(config.arch)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    torch.set_flush_denormal(True)  # denormals slow CPU training several times over
    images = open_images(config, "train")
    assert images is not None
    trainer = make_trainer(config)
    order = Order(config, len(images), world_size=trainer.world_size)
    schedules = Schedules(config=config, steps_per_epoch=order.steps_per_epoch, total_batch=order.total_batch)
    folder = Path(config.output_dir)
    checkpoint = prepare_folder(folder, config)
    L.seed_everything(config.seed, verbose=False)
    module = DINOModule(config, schedules)
    if config.init_weights is not None and checkpoint is None:
        say(start_from(config.init_weights, module.student, module.teacher, module.loss))
    rank_zero_only(draw_crop_sheet)(folder, module, images)
    if config.dry_run:
        rank_zero_only(print)(plan(config, module, len(images), trainer))
        return Outcome(folder=folder, step=0, steps=schedules.steps, interrupted=False)
    if trainer.strategy.root_device.type == "cpu":
        refuse_what_does_not_fit(config, trainer.precision)
    if config.compile:
        for network in (module.student, module.teacher):
            for block in network.backbone.blocks:
                block.compile(dynamic=False)
    saver = RunFolder(config, folder, images)
    trainer.callbacks.insert(0, saver)  # type: ignore[attr-defined]
    with warnings.catch_warnings(), saver.listening():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # it has one for every core
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)  # Lightning's own
        try:
            trainer.fit(module, datamodule=CropData(config, images), ckpt_path=checkpoint, weights_only=True)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory at --batch_size_per_gpu {config.batch_size_per_gpu}; lower it and raise "
                f"--accumulate_grad_batches, or set --grad_checkpointing true ({str(error).split('. ')[0]})"
            ) from error
    return Outcome(folder=folder, step=trainer.global_step, steps=schedules.steps, interrupted=saver.interrupted)


@rank_zero_only
def _write_config(folder: Path, config: PretrainConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(config, folder)


def prepare_folder(folder: Path, config: PretrainConfig) -> Path | None:
    """Write config.yaml -> the checkpoint to continue from, or None for a fresh start.

    Raises ValueError if the folder holds a run that this config must not continue.
    """
    checkpoint = folder / LAST
    if checkpoint.exists():
        if not config.resume:
            raise ValueError(f"--output_dir {folder} holds a run and --resume is false; name another --output_dir")
        differing = differing_options(run_folder.read_config(folder), config)
        if differing:
            listed = ", ".join(f"--{name} was {old}, now {new}" for name, (old, new) in differing.items())
            raise ValueError(f"--output_dir {folder} holds a run of other options: {listed}; name another --output_dir")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; expected a folder")
    if not config.dry_run or not checkpoint.exists():
        _write_config(folder, config)
    return checkpoint if checkpoint.exists() else None


# -- machine ---------------------------------------------------------------------------------------------------------


def make_trainer(config: PretrainConfig) -> L.Trainer:
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


class KnnProbe:
    """k-NN accuracy of a backbone on the run's own images, a seeded sample of them."""

    def __init__(self, config: PretrainConfig, train: ImageSet, validation: ImageSet | None) -> None:
        """Without a validation set, every tenth training image is held out of the neighbours."""
        self.config = config
        order = np.random.default_rng((config.seed, 0)).permutation(len(train))
        self.train, self.validation = train, validation or train
        if validation is None:
            held_out = max(1, len(order) // 10)
            order, self.queries = order[held_out:], order[:held_out]
        else:
            self.queries = np.random.default_rng((config.seed, 1)).permutation(len(validation))
        self.neighbours = order[: config.eval_num_images]
        self.queries = self.queries[: config.eval_num_images]

    @classmethod
    def of(cls, config: PretrainConfig, images: ImageSet, validation: ImageSet | None) -> KnnProbe | None:
        """The probe of a run; None if its images have no labels."""
        if images.labels is None:
            return None
        return cls(config, images, validation if validation is not None and validation.labels is not None else None)

    def __call__(self, backbone: nn.Module, device: torch.device) -> float:
        """Top-1 in percent. The backbone's mode is put back afterwards."""
        training, size = backbone.training, self.config.global_crops_size
        transform = Transform(size, default_resize(size), self.config.mean, self.config.std)
        frozen = Frozen(backbone, transform, device)
        features, labels = [], []
        for images, indices in ((self.train, self.neighbours), (self.validation, self.queries)):
            store = Store.in_memory((len(indices), *frozen.shape()))
            workers = default_workers() if len(indices) >= WORTH_WORKERS else 0
            extract(frozen, EvalDataset(images, transform), indices, store, batch_size=PROBE_BATCH, num_workers=workers)
            readable = store.state == DONE
            if not readable.any():
                raise ValueError(f"none of {len(indices)} images to evaluate on can be read, {images.name(0)} for one")
            assert images.labels is not None
            features.append(torch.from_numpy(store.features[readable, 0]))
            labels.append(torch.from_numpy(images.labels[indices][readable]))
        backbone.train(training)
        k = min(PROBE_NEIGHBOURS, len(labels[0]))
        return top1(knn_classify(features[0], labels[0], features[1], [k])[k], labels[1])


class RunFolder(L.Callback):
    """Writes the run folder while the run goes on, and stops the run when it is asked to."""

    def __init__(self, config: PretrainConfig, folder: Path, images: ImageSet) -> None:
        self.config, self.folder = config, folder
        validation = open_images(config, "validation", images.classes)
        self.probe = KnnProbe.of(config, images, validation)
        self.pictured = validation or images
        self.watch = CollapseWatch(config)
        self.interrupted = False
        self.saved_at = time.monotonic()
        self.bad_images = run_folder.read_bad_images(folder)
        self.images_seen = self.bad_images_seen = 0
        self.saved_step = -1
        self.told_of_bad_images = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C asks for a stop after the step instead of breaking into it."""
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.metrics = run_folder.Metrics(self.folder, COLUMNS, trainer.global_step)
            self.strip = AttentionStrip(self.config, self.pictured, self.folder, trainer.global_step)
            if not trainer.global_step:
                self.strip.add(0, module.teacher.backbone, module.device)
        if trainer.global_step:
            say(f"continuing {self.folder} from step {trainer.global_step}")

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:  # asked twice: at once
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping at the next chance; Ctrl-C again stops at once, without saving", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._note_bad_images(batch)
        if (batch_idx + 1) % self.config.accumulate_grad_batches:
            return  # in the middle of a step
        step = trainer.global_step
        epoch, into_epoch = divmod(step, module.schedules.steps_per_epoch)
        row = dict(module.row)
        evaluates = not into_epoch and self._evaluates(epoch)
        if evaluates and self.probe is not None:
            row["knn_top1"] = self._knn(self.probe, trainer, module)
        if row:
            self._write_row(trainer, {"step": step, **row})
        if evaluates and trainer.is_global_zero:
            self.strip.add(step, module.teacher.backbone, module.device)
            run_folder.draw_curves(self.folder)
        self._save_or_stop(trainer, module, epoch if not into_epoch else None)
        if evaluates:
            module.restart_clock()

    def _evaluates(self, epoch: int) -> bool:
        every = self.config.eval_every_n_epochs
        return epoch == self.config.epochs or (every > 0 and epoch % every == 0)

    def _knn(self, probe: KnnProbe, trainer: L.Trainer, module: Any) -> float:
        """The teacher's k-NN accuracy, computed by one process while the others wait."""
        accuracy = probe(module.teacher.backbone, module.device) if trainer.is_global_zero else 0.0
        return trainer.strategy.broadcast(accuracy)

    def _write_row(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        self.metrics.write(row)
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "step"}, int(row["step"]))
        warning = self.watch(row)
        if warning:
            say(f"step {row['step']}: {warning}")

    def _save_or_stop(self, trainer: L.Trainer, module: Any, ended_epoch: int | None) -> None:
        step, every = trainer.global_step, self.config.checkpoint_every_n_steps
        due = ended_epoch is not None or (every is not None and step % every == 0)
        stop = self.interrupted
        if trainer.world_size > 1:
            # Clocks and signals differ between processes; they agree when they meet to log anyway.
            stop = bool(module.row) and trainer.strategy.reduce_boolean_decision(stop, all=False)
            overdue = bool(module.row) and trainer.strategy.reduce_boolean_decision(self._is_overdue(), all=False)
        else:
            overdue = self._is_overdue()
        if due or overdue or stop:
            self.save(trainer, module, ended_epoch)
        if stop:
            self.interrupted = trainer.should_stop = True

    def _is_overdue(self) -> bool:
        return time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS

    def save(self, trainer: L.Trainer, module: Any, ended_epoch: int | None) -> None:
        """checkpoints/last.ckpt and teacher.safetensors; every `saveckp_freq` epochs a checkpoint that stays."""
        module.stop_if_broken()
        last = self.folder / LAST
        beside = last.with_name(".last.writing.ckpt")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, last)
            with run_folder.replacing(self.folder / TEACHER) as path:
                save_backbone(module.teacher.backbone, self.config, path)
            if ended_epoch and self.config.saveckp_freq and ended_epoch % self.config.saveckp_freq == 0:
                with run_folder.replacing(last.with_name(f"epoch{ended_epoch:04}.ckpt")) as path:
                    shutil.copyfile(last, path)
        self.saved_at = time.monotonic()
        self.saved_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if self.saved_step != trainer.global_step:  # a limit given to the trainer ended it early
            self.save(trainer, module, None)

    def _note_bad_images(self, batch: Batch) -> None:
        self.images_seen += len(batch.views["global_crops"])
        self.bad_images_seen += len(batch.bad_images)
        for bad in batch.bad_images:
            if bad.name not in self.bad_images:
                self.bad_images.add(bad.name)
                self._list_bad_image(bad)
        share = self.bad_images_seen / self.images_seen
        if share > BAD_SHARE_TO_LOOK_AT and self.images_seen >= 100 and not self.told_of_bad_images:
            self.told_of_bad_images = True
            say(
                f"{self.bad_images_seen} of the first {self.images_seen} images could not be read ({share:.1%}); "
                f"look at {self.folder / run_folder.BAD_IMAGES}"
            )

    def _list_bad_image(self, bad: BadImage) -> None:
        with (self.folder / run_folder.BAD_IMAGES).open("a") as file:
            file.write(f"{bad.name}\t{bad.reason}\n")


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
