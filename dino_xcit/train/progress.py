"""The progress bar of a run: all its steps, with epoch, loss and images per second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from typing_extensions import override

from dino_xcit.runtime import progress

if TYPE_CHECKING:
    from dino_xcit.data.loader import Batch
    from dino_xcit.train.module import DINOModule


class ProgressBar(L.Callback):
    """Shows the steps of the whole run, of which a continued run has done some."""

    @override
    def on_train_start(self, trainer: L.Trainer, module: DINOModule) -> None:  # type: ignore[override]
        """Begin the bar."""
        self.config = module.config
        self.bar = progress(
            module.schedules.steps,
            "pretrain",
            "steps",
            shown=trainer.is_global_zero,
            initial=trainer.global_step,
        )

    @override
    def on_train_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        module: DINOModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Move the bar once per optimizer step."""
        if module.row:
            self.bar.set_postfix(
                epoch=f"{int(module.row['epoch']) + 1}/{self.config.epochs}",
                loss=f"{module.row['loss']:.3f}",
                refresh=False,
                **{"images/s": f"{module.row['images_per_second']:.0f}"},
            )
        self.bar.update(trainer.global_step - self.bar.n)

    @override
    def on_train_end(self, trainer: L.Trainer, module: DINOModule) -> None:  # type: ignore[override]
        """Close the bar."""
        self.bar.close()

    @override
    def on_exception(  # type: ignore[override]
        self, trainer: L.Trainer, module: DINOModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        if hasattr(self, "bar"):
            self.bar.close()
