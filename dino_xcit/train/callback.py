"""The callback that writes the run folder and stops the run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.files import on_one_line, replacing, sync
from dino_xcit.run_folder import (
    BAD_IMAGES,
    CONFIG,
    LAST,
    METRICS,
    SOUND,
    TEACHER,
    Metrics,
    read_bad_images,
    write_config,
)
from dino_xcit.runtime import say
from dino_xcit.train.attention_history import AttentionHistory
from dino_xcit.train.checkpoints import DurableIO, keep_as_sound, take_its_place
from dino_xcit.train.collapse import CollapseError, CollapseWarning, CollapseWatch
from dino_xcit.train.online_eval import OnlineEvaluator, StoppedError
from dino_xcit.train.plots import draw_curves
from dino_xcit.train.signals import StopConsensus, StopSignals, requeue
from dino_xcit.weights.load import save_backbone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.loader import Batch

SECONDS_BETWEEN_TRIES, LAST_TRIES = 60, 60  # to save the last step of a run
BAD_SHARE_TO_LOOK_AT = 0.01
ROWS_LOOKED_AT = 100  # for signs of collapse, when a run goes on


# -- what happens besides the steps ----------------------------------------------------------------------------------


class RunFolderWriter(L.Callback):
    """Writes the run folder while the run goes on, and stops the run when it is asked to.

    What cannot be written is told, and tried again; the run goes on.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        images: ImageSet,
        signals: StopSignals,
        io: DurableIO,
    ) -> None:
        self.config, self.folder, self.signals, self.io = config, folder, signals, io
        validation = open_images(config, "validation", images.classes)
        self.probe = OnlineEvaluator(config, images, validation)
        self.pictured = validation or images
        self.watch = CollapseWatch(config)
        self.stopped = self.to_be_requeued = self.requeued = False
        self.save_at = time.monotonic() + 60 * config.checkpoint_every_n_minutes
        self.bad_images = read_bad_images(folder)
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
        self.agreement = StopConsensus()
        step = trainer.global_step
        if trainer.is_global_zero:
            self.metrics = Metrics(self.folder, step)
            self.attention_history = AttentionHistory(self.config, self.pictured, self.folder, step)
            if module.teacher.backbone.class_attention is None:
                say(f"{module.teacher.backbone.arch} has no class attention: no attention.png")
            if not step:
                with torch.compiler.set_stance("force_eager"):
                    self.attention_history.add(0, module.teacher.backbone, module.device)
        if not step:
            return
        self.saved_step = step
        say(f"continuing {self.folder} from step {step}")
        for row in trainer.strategy.broadcast(
            self.metrics.rows[-ROWS_LOOKED_AT:] if trainer.is_global_zero else []
        ):
            self.watch({name: float(value) for name, value in row.items() if value})
        if trainer.strategy.broadcast(
            trainer.is_global_zero and self._was_stopped_in_evaluating(module, step)
        ):
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
            trainer.should_stop = self.stopped

    def _was_stopped_in_evaluating(self, module: Any, step: int) -> bool:
        last = self.metrics.rows[-1] if self.metrics.rows else {}
        return (
            self._evaluates(module, step)
            and last.get("step") == str(step)
            and not last.get("rankme")
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._note_bad_images(batch)
        if (batch_idx + 1) % self.config.accumulate_grad_batches:
            return  # in the middle of a step
        step, every = trainer.global_step, self.config.checkpoint_every_n_steps
        ends_epoch = not step % module.schedules.steps_per_epoch
        warning = None
        if module.row:
            self._write_row(trainer, {"step": step, **module.row})
            warning = self.watch(module.row)
        self.stopped, self.to_be_requeued, overdue = self.agreement(
            self.signals.asked is not None,
            self.signals.asked == signal.SIGUSR1,
            time.monotonic() >= self.save_at,
        )
        # What several processes want is heard a step late: the step after a save, it was wanted before it.
        overdue = overdue and not (trainer.world_size > 1 and step == self.saved_step + 1)
        if self.stopped or overdue or ends_epoch or (every is not None and step % every == 0):
            self.save(trainer, module)
        if warning is not None:
            self._tell(warning, step)
        if self._evaluates(module, step) and not self.stopped:
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
        if self.stopped:
            trainer.should_stop = True

    def _evaluates(self, module: Any, step: int) -> bool:
        epoch, into_epoch = divmod(step, module.schedules.steps_per_epoch)
        every = self.config.eval_every_n_epochs
        return not into_epoch and (
            epoch == self.config.epochs or (every > 0 and epoch % every == 0)
        )

    @torch.compiler.set_stance("force_eager")  # batches of other shapes would be compiled anew
    def _evaluate(self, trainer: L.Trainer, module: Any, step: int) -> tuple[bool, bool]:
        """By one process while the others wait -> whether it was asked to stop, and by SIGUSR1.

        The step is saved by then: an interrupted evaluation is made up for.
        """
        interrupted = False
        try:
            if trainer.is_global_zero:
                found = self.probe(
                    module.teacher.backbone, module.device, lambda: self.signals.asked is not None
                )
                values = {
                    name: value for name, value in found._asdict().items() if value is not None
                }
                with self._telling("metrics.csv"):
                    self.metrics.amend(values)
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)
                with self._telling("attention.png and curves.png"):
                    self.attention_history.add(step, module.teacher.backbone, module.device)
                    draw_curves(self.folder)
        except StoppedError:
            interrupted = True
        module.restart_clock()
        return trainer.strategy.broadcast(
            (interrupted, interrupted and self.signals.asked == signal.SIGUSR1)
        )

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            say(
                f"{self.folder}: {what} cannot be written now ({error.strerror or error}); the run goes on"
            )

    def _write_row(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        with self._telling(METRICS):
            self.metrics.write(row)
        for logger in trainer.loggers:
            logger.log_metrics(
                {key: value for key, value in row.items() if key != "step"}, int(row["step"])
            )

    def _tell(self, warning: CollapseWarning, step: int) -> None:
        """Raises CollapseError if that is what the run is to do."""
        sound = (
            f"{self.folder / SOUND} is from before the first sign of it"
            if (self.folder / SOUND).exists()
            else ""
        )
        if self.config.on_collapse == "stop":
            raise CollapseError(
                f"step {step}: {warning}. Stopped by --on_collapse stop; {sound or 'no checkpoint is from before'}"
            )
        say(f"step {step}: {warning}" + (f"; {sound}" if sound else ""))

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
            say(
                f"step {trainer.global_step} could not be saved in {self.folder} ({reason}); trying again in a minute"
            )
        self.save_at = time.monotonic() + 60 * (
            self.config.checkpoint_every_n_minutes if saved else 1
        )
        self.saved_step = trainer.global_step if saved else self.saved_step
        return saved

    def _put_in_place(self, beside: Path, trainer: L.Trainer, module: Any) -> None:
        if not (self.folder / CONFIG).exists():  # somebody took the folder away
            write_config(self.config, self.folder)
        if self.metrics.path.exists():
            sync(self.metrics.path)  # no checkpoint without the rows before it
        take_its_place(beside, self.folder)
        if not self.watch.suspects:
            keep_as_sound(self.folder)
        with replacing(self.folder / TEACHER) as path:
            save_backbone(module.teacher.backbone, self.config, path)
        epoch, into_epoch = divmod(trainer.global_step, module.schedules.steps_per_epoch)
        if not into_epoch and self.config.saveckp_freq and epoch % self.config.saveckp_freq == 0:
            with replacing((self.folder / LAST).with_name(f"epoch{epoch:04}.ckpt")) as path:
                shutil.copyfile(self.folder / LAST, path)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.agreement.settle()
        tries = 0
        while self.saved_step != trainer.global_step and not self.save(trainer, module):
            tries += 1
            # A scheduler that wants the machine back does not wait; a run that is done waits for room on the disk.
            if trainer.strategy.broadcast(self.signals.asked is not None or tries > LAST_TRIES):
                raise OSError(
                    f"step {trainer.global_step} is not saved; {self.folder}/{LAST} is of an earlier step"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        if self.stopped and self.to_be_requeued:
            self.requeued = trainer.strategy.broadcast(trainer.is_global_zero and requeue())

    def _note_bad_images(self, batch: Batch) -> None:
        self.images_seen += len(batch.views["global_crops"])
        self.bad_images_seen += len(batch.bad_images)
        for bad in batch.bad_images:
            name = on_one_line(bad.name)
            if name not in self.bad_images:
                self.bad_images.add(name)
                with self._telling(BAD_IMAGES), (self.folder / BAD_IMAGES).open("a") as file:
                    file.write(f"{name}\t{bad.reason}\n")
        share = self.bad_images_seen / self.images_seen
        if share > BAD_SHARE_TO_LOOK_AT and self.images_seen >= 100 and not self.told_of_bad_images:
            self.told_of_bad_images = True
            say(
                f"{self.bad_images_seen} of the first {self.images_seen} images could not be read ({share:.1%}); "
                f"look at {self.folder / BAD_IMAGES}"
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
