"""The callback that writes the run folder, evaluates the teacher and stops the run when asked."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from typing_extensions import override

from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.errors import RunFailedError
from dino_xcit.files import replacing, sync
from dino_xcit.private_names import forget_sigterm, set_global_step, skip_sigterm_broadcast
from dino_xcit.run_folder import (
    ATTENTION,
    BAD_IMAGES,
    CONFIG,
    CURVES,
    LAST,
    METRICS,
    SOUND,
    TEACHER,
    WANDB_ID,
    Metrics,
    kept_checkpoint,
    write_config,
)
from dino_xcit.runtime import say
from dino_xcit.train.attention_history import AttentionHistory
from dino_xcit.train.bad_images import BadImageLog
from dino_xcit.train.checkpoints import DurableIO, FolderLock, keep_as_sound, replace_last
from dino_xcit.train.collapse import (
    ALIKE,
    CollapseError,
    CollapseWarning,
    CollapseWatch,
    all_alike,
)
from dino_xcit.train.loggers import describe_run
from dino_xcit.train.online_eval import OnlineEvaluator, StoppedError
from dino_xcit.train.plots import draw_curves
from dino_xcit.train.resume import images_record
from dino_xcit.train.signals import StopConsensus, StopSignals, requeue
from dino_xcit.weights.load import save_backbone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.loader import Batch
    from dino_xcit.train.module import DINOModule

SECONDS_BETWEEN_TRIES, LAST_TRIES = 60, 60  # to save the last step of a run
ROWS_WATCHED = 100  # earlier rows that a continued run checks for signs of collapse


class RunFolderWriter(L.Callback):
    """Writes the run folder during the run, and stops the run when it is asked to.

    What cannot be written is reported and tried again; the run continues.
    """

    def __init__(
        self,
        config: RunConfig,
        lock: FolderLock,
        images: ImageSet,
        signals: StopSignals,
        io: DurableIO,
    ) -> None:
        folder = lock.folder
        self.config, self.folder, self.signals, self.io = config, folder, signals, io
        self.lock, self.images = lock, images
        validation = open_images(config, "validation", images.classes)
        self.evaluator = OnlineEvaluator(config, images, validation)
        self.pictured = validation or images
        self.images_record = images_record(images)
        self.watch = CollapseWatch(config)
        self.bad_images = BadImageLog(folder)
        self.stopped = self.to_be_requeued = self.requeued = False
        self.save_at = time.monotonic() + 60 * config.checkpoint_every_n_minutes
        self.saved_step = -1

    # -- start -------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, module: DINOModule) -> None:  # type: ignore[override]
        """Open the files; make up an evaluation in which the run was stopped.

        A finished run has no more batches: Lightning calls this hook only.
        """
        step = module.first_step
        set_global_step(trainer, step)
        if trainer.is_global_zero:
            self.metrics = Metrics(self.folder, step)
            self.attention_history = self._open_attention_history(module, step)
        with self._reporting(WANDB_ID):
            describe_run(trainer.loggers, self.config)
        if not step:
            return
        self.saved_step = step
        say(f"continuing {self.folder} from step {step}")
        rows = self.metrics.rows[-ROWS_WATCHED:] if trainer.is_global_zero else []
        for row in trainer.strategy.broadcast(rows):
            self.watch({name: float(value) for name, value in row.items() if value})
        missed = trainer.is_global_zero and self._missed_evaluation(module, step)
        if trainer.strategy.broadcast(missed):
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
            trainer.should_stop = self.stopped

    def _open_attention_history(self, module: DINOModule, step: int) -> AttentionHistory | None:
        backbone = module.teacher.backbone
        if backbone.class_attention is None:
            say(f"{backbone.arch} has no class attention: {ATTENTION} is left out")
            return None
        history = AttentionHistory(self.config, self.pictured, self.folder, step)
        if not step:
            with torch.compiler.set_stance("force_eager"):
                history.add(0, backbone, module.device)
        return history

    def _missed_evaluation(self, module: DINOModule, step: int) -> bool:
        last = self.metrics.rows[-1] if self.metrics.rows else {}
        is_due = self._evaluates(module, step) and last.get("step") == str(step)
        return is_due and not last.get("rankme")

    @override
    def on_train_start(self, trainer: L.Trainer, module: DINOModule) -> None:  # type: ignore[override]
        """Replace Lightning's signal handlers, which end a run with exit code 0, by ours."""
        self.signals.listen()
        if trainer.received_sigterm:
            self.signals.asked = signal.SIGTERM
            forget_sigterm(trainer)
        skip_sigterm_broadcast(trainer)
        self.consensus = StopConsensus()

    # -- after each step ---------------------------------------------------------------------

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: DINOModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write the row, save, evaluate and stop, each when it is due."""
        with self._reporting(BAD_IMAGES):
            self.bad_images.add(batch)
        if (batch_idx + 1) % self.config.accumulate_grad_batches:
            return  # in the middle of a step
        step = trainer.global_step
        warning = None
        if module.row:
            self._write_row(trainer, {"step": step, **module.row})
            warning = self.watch(module.row)
        self.stopped, self.to_be_requeued, overdue = self.consensus(
            self.signals.asked is not None,
            self.signals.asked == signal.SIGUSR1,
            time.monotonic() >= self.save_at,
        )
        if self.stopped or self._saves(trainer, module, overdue):
            self.save(trainer, module)
        if warning is not None:
            self._warn(warning, step)
        if self._evaluates(module, step) and not self.stopped:
            self.stopped, self.to_be_requeued = self._evaluate(trainer, module, step)
        if self.stopped:
            trainer.should_stop = True

    def _saves(self, trainer: L.Trainer, module: DINOModule, overdue: bool) -> bool:
        step, every = trainer.global_step, self.config.checkpoint_every_n_steps
        # Across processes a request arrives one step late; ignore one made before the last save.
        overdue = overdue and not (trainer.world_size > 1 and step == self.saved_step + 1)
        ends_epoch = step % module.schedules.steps_per_epoch == 0
        return overdue or ends_epoch or (every is not None and step % every == 0)

    def _evaluates(self, module: DINOModule, step: int) -> bool:
        epoch, into_epoch = divmod(step, module.schedules.steps_per_epoch)
        every = self.config.eval_every_n_epochs
        is_due = epoch == self.config.epochs or (every > 0 and epoch % every == 0)
        return is_due and not into_epoch

    def _evaluate(self, trainer: L.Trainer, module: DINOModule, step: int) -> tuple[bool, bool]:
        """Evaluate the teacher on the first process while the others wait.

        The step is saved by then, so an interrupted evaluation is made up when the run continues.

        Returns:
            Whether it was asked to stop, and whether by SIGUSR1.
        """
        interrupted = False
        try:
            # Batches of other shapes would be compiled anew.
            with torch.compiler.set_stance("force_eager"):
                if trainer.is_global_zero:
                    self._evaluate_here(trainer, module, step)
        except StoppedError:
            interrupted = True
        module.restart_clock()
        asked = interrupted, interrupted and self.signals.asked == signal.SIGUSR1
        stop, requeues = trainer.strategy.broadcast(asked)
        return stop, requeues

    def _evaluate_here(self, trainer: L.Trainer, module: DINOModule, step: int) -> None:
        backbone = module.teacher.backbone
        scores = self.evaluator(backbone, module.device, lambda: self.signals.asked is not None)
        values = {name: value for name, value in scores._asdict().items() if value is not None}
        with self._reporting(METRICS):
            self.metrics.amend(values)
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        with self._reporting(f"{ATTENTION} or {CURVES}"):
            if self.attention_history is not None:
                self.attention_history.add(step, backbone, module.device)
            draw_curves(self.folder)

    def _write_row(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        self.lock.require_own()
        with self._reporting(METRICS):
            self.metrics.write(row)
        values = {name: value for name, value in row.items() if name != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(values, int(row["step"]))

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Report what cannot be written, instead of ending the run."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            say(f"{self.folder}: {what} cannot be written now ({reason}); the run continues")

    def _warn(self, warning: CollapseWarning, step: int) -> None:
        """Print the warning, or end the run with --on_collapse stop."""
        if all_alike(self.images):
            warning = warning._replace(remedy=ALIKE)
        exists = (self.folder / SOUND).exists()
        sound = f"{self.folder / SOUND} is from before the first sign of it" if exists else ""
        if self.config.on_collapse == "stop":
            raise CollapseError(
                f"step {step}: {warning}. Stopped by --on_collapse stop; "
                f"{sound or 'no checkpoint is from before'}"
            )
        say(f"step {step}: {warning}" + (f"; {sound}" if sound else ""))

    # -- saving ------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer, module: DINOModule) -> bool:
        """Write last.ckpt and teacher.safetensors, and every `saveckp_freq` epochs one that stays.

        Returns:
            Whether that worked. If not, it is tried again after a minute.
        """
        module.stop_if_broken()
        module.refuse_broken_weights()
        self.lock.require_own()
        beside = (self.folder / LAST).with_name(".last.writing.ckpt")
        trainer.save_checkpoint(beside)
        error = self.io.error
        if trainer.is_global_zero and error is None:
            try:
                self._put_in_place(beside, trainer, module)
            except OSError as found:
                error = found
        saved = bool(trainer.strategy.broadcast(error is None))
        step = trainer.global_step
        if error is not None:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            say(
                f"step {step} could not be saved in {self.folder} ({reason}); trying again in a "
                "minute"
            )
        minutes = self.config.checkpoint_every_n_minutes if saved else 1
        self.save_at = time.monotonic() + 60 * minutes
        self.saved_step = step if saved else self.saved_step
        return saved

    @override
    def on_save_checkpoint(  # type: ignore[override]
        self, trainer: L.Trainer, module: DINOModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what identifies the images; the time of --trainer.max_time is of one start."""
        checkpoint["images"] = self.images_record
        checkpoint.get("callbacks", {}).pop("Timer", None)

    def _put_in_place(self, beside: Path, trainer: L.Trainer, module: DINOModule) -> None:
        if not (self.folder / CONFIG).exists():  # somebody deleted the folder
            self.lock.take_again()
            write_config(self.config, self.folder)
        if self.metrics.path.exists():
            sync(self.metrics.path)  # no checkpoint without the rows before it
        replace_last(beside, self.folder)
        if not self.watch.suspects:
            keep_as_sound(self.folder)
        with replacing(self.folder / TEACHER) as path:
            save_backbone(module.teacher.backbone, self.config, path)
        epoch, into_epoch = divmod(trainer.global_step, module.schedules.steps_per_epoch)
        every = self.config.saveckp_freq
        if every and not into_epoch and epoch % every == 0:
            with replacing(self.folder / kept_checkpoint(epoch)) as path:
                shutil.copyfile(self.folder / LAST, path)

    @override
    def on_train_end(self, trainer: L.Trainer, module: DINOModule) -> None:  # type: ignore[override]
        """Save the last step, and wait for space on the disk if need be."""
        self.consensus.settle()
        tries = 0
        while self.saved_step != trainer.global_step and not self.save(trainer, module):
            tries += 1
            # A scheduler that wants the machine back does not wait; a finished run waits.
            gives_up = self.signals.asked is not None or tries > LAST_TRIES
            if trainer.strategy.broadcast(gives_up):
                raise RunFailedError(
                    f"step {trainer.global_step} is not saved; {self.folder}/{LAST} is of an "
                    "earlier step"
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        if self.stopped and self.to_be_requeued:
            requeued = trainer.is_global_zero and requeue()
            self.requeued = bool(trainer.strategy.broadcast(requeued))
