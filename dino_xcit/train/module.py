"""The Lightning module: student, teacher, one step, what is logged (DINO, algorithm 1).

Batch norms: XCiT's stem and LPI hold them. As in the official code, student and teacher both run
in train mode: each normalises by its own batch and keeps running statistics of its own batches;
only the teacher's parameters are averaged from the student's. Global and local crops are separate
forward passes, so separate batches. With several processes a batch is the batch of all of them
(`model/batch_norm.py`).

Axes: B images, V views of an image, C channels, S pixels on a side, K prototypes, D features.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from dino_xcit.data.photometric import WholeBatch, compiled_whole_batch, photometric
from dino_xcit.errors import NotFiniteError, UserError
from dino_xcit.files import plain
from dino_xcit.model.batch_norm import synchronise_batch_norms
from dino_xcit.model.dino import DINOLoss
from dino_xcit.model.koleo import koleo
from dino_xcit.private_names import loss_scale
from dino_xcit.run_folder import LAST
from dino_xcit.train.collapse import stabler
from dino_xcit.train.network import Network
from dino_xcit.train.optimizer import adamw, clip_per_parameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.loader import Batch
    from dino_xcit.train.schedules import Schedules

NOT_FINITE, NO_SCALE = 1.0, 2.0
"""Flags: a loss or gradient was not finite; float16's scale of the loss has become useless."""
SMALLEST_SCALE = 1.0
"""It begins at 65536 and is halved at each skipped step; below 1 it makes gradients smaller."""
IGNORES_FOUND_INF = {"mps"}
"""Types of devices whose fused AdamW does not read `found_inf`: every step there waits for it."""


class DINOModule(L.LightningModule):
    """Trains the student on `Batch`es; the teacher follows. The product is `teacher.backbone`.

    Attributes:
        row: the values of the step just made if it is one that logs, else empty.
        first_step: optimizer steps that were done when this start of the run began.
    """

    _broken: Tensor

    def __init__(self, config: RunConfig, schedules: Schedules) -> None:
        super().__init__()
        self.config, self.schedules = config, schedules
        self.student = Network(config)
        self.teacher = Network(config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = DINOLoss(config.out_dim, config.student_temp, config.center_momentum)
        # NOT_FINITE or NO_SCALE once one of them happened
        self.register_buffer("_broken", torch.zeros(()), persistent=False)
        self.row: dict[str, float] = {}
        self.first_step = 0
        self._sums: dict[str, Tensor] = {}  # of loss and scalars, over the passes of a step
        self._gradient_norm: Tensor | None = None
        self._whole_batch: WholeBatch | None = None  # the augmentation, if it is compiled
        self._clock = (time.perf_counter(), 0)

    def compile_regions(self, device: torch.device) -> None:
        """Compile the regions of both backbones, once for each kind of crop.

        On a GPU the augmentation too: it is hundreds of small kernels, which read and write every
        view. On a CPU compiling it saves no time (`eval/speed/README.md`).
        """
        if device.type == "cuda":
            self._whole_batch = compiled_whole_batch()
        for network in (self.student, self.teacher):
            for region in network.backbone.compiled_regions():
                region.compile(dynamic=False)

    @override
    def setup(self, stage: str) -> None:
        """Let batch norms use the batches of all processes."""
        if self.trainer.world_size > 1:
            for network in (self.student, self.teacher):
                synchronise_batch_norms(network)

    # -- one step ----------------------------------------------------------------------------

    def views(self, batch: Batch) -> list[Tensor]:
        """Augment the crops.

        Returns:
            What the networks see: (B, 2, C, S, S) and, if there are local crops, (B, L, C, s, s).
        """
        groups = ["global", "local"] if self.config.local_crops_number else ["global"]
        return [
            self._augment(batch.views[f"{group}_crops"], batch.views[f"{group}_params"])
            for group in groups
        ]

    def paths(self, batch: Batch) -> list[Tensor | None]:
        """Stochastic depth of the student on each group of views."""
        drops = self.config.drop_path_rate > 0 and self.student.backbone.path_shape[0] > 0
        return [batch.views[f"{group}_paths"] if drops else None for group in ("global", "local")]

    def _augment(self, crops: Tensor, params: Tensor) -> Tensor:
        c = self.config
        # Eight bits of a picture need more than bfloat16 has.
        with torch.autocast(crops.device.type, enabled=False):
            views = photometric(
                crops.flatten(0, 1),
                params.flatten(0, 1),
                c.mean,
                c.std,
                c.blur_sigma[1],
                self._whole_batch,
            )
        return cast("Tensor", views.unflatten(0, crops.shape[:2]))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass.

        A loss term returns `(loss, {name: scalar})`, the scalars detached. To add one, add its
        weighted loss and merge its scalars here: columns of metrics.csv and panels of curves.png
        follow, means over the passes of a step and over the processes.
        """
        groups = self.views(batch)
        temperature = self.schedules.teacher_temp(self.global_step)
        with torch.no_grad():
            teacher = self.teacher.embed(groups[:1])
        features = self.student.features(groups, self.paths(batch))
        student = self.student.project(features)
        loss, scalars = self.loss.of_embeddings(student, teacher, temperature)
        if self.config.koleo_weight:
            spread, more = koleo(features[0].transpose(0, 1))
            loss, scalars = loss + self.config.koleo_weight * spread, {**scalars, **more}
        for name, value in {"loss": loss.detach(), **scalars}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; each step sets its learning rate and weight decay."""
        return adamw(self.student, self.trainer.precision)

    @property
    def _is_float16(self) -> bool:
        return self.trainer.precision == "16-mixed"

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each gradient by its own norm, and remember whether all are finite."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = clip_per_parameter(gradients, self.config.clip_grad)
        self._gradient_norm = torch.linalg.vector_norm(norms)
        finite = self._mean("loss").isfinite()
        if self._is_float16:  # its scaler skips steps of infinite gradients by itself
            broken = (~finite).float() * NOT_FINITE
            no_scale = loss_scale(self.trainer) < SMALLEST_SCALE
            self._broken.copy_((no_scale.float() * NO_SCALE).maximum(broken).maximum(self._broken))
        else:
            finite = finite & self._gradient_norm.isfinite()
            self._broken.copy_(((~finite).float() * NOT_FINITE).maximum(self._broken))
            # The fused optimizer reads this flag on the device, and leaves weights and moments
            # alone once it is set (not on all devices, see `IGNORES_FOUND_INF`).
            optimizer.found_inf = self._broken.clone()  # type: ignore[attr-defined]
        if self.device.type in IGNORES_FOUND_INF:
            self.stop_if_broken()
        if self.schedules.last_layer_is_frozen(self.global_step):
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Move the student, then the teacher and the center: once per optimizer step."""
        step = self.global_step
        regularised, spared = optimizer.param_groups
        regularised["lr"] = spared["lr"] = self.schedules.lr(step)
        regularised["weight_decay"] = self.schedules.weight_decay(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.device.type == "cpu":  # a GPU would wait: there a row looks at the flag
            self.stop_if_broken()
        get_ema_multi_avg_fn(self.schedules.momentum(step))(
            list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()], None
        )
        self.loss.update_center()
        self.row = self._log_row(step) if self._logs(step) else {}
        self._sums.clear()

    # -- what is logged ----------------------------------------------------------------------

    def _logs(self, step: int) -> bool:
        done = step + 1
        every, epoch = self.config.log_every_n_steps, self.schedules.steps_per_epoch
        return done == 1 or done % every == 0 or done % epoch == 0

    def _log_row(self, step: int) -> dict[str, float]:
        """A row of metrics.csv; entropy and KL are in nats. Waits for the device once.

        Raises:
            NotFiniteError: see `stop_if_broken`.
        """
        assert self._gradient_norm is not None
        tensors = {
            "broken": self._broken,
            **{name: self._mean(name) for name in self._sums},
            "center_norm": self.loss.center.norm(),
            "grad_norm": self._gradient_norm,
        }
        values = torch.stack([tensor.float() for tensor in tensors.values()])
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        measured = dict(zip(tensors, values.tolist(), strict=True))
        self._raise_if_broken(measured.pop("broken"))
        then, step_then = self._clock
        self._clock = (time.perf_counter(), step + 1)
        images, schedules = (step + 1 - step_then) * self.schedules.total_batch, self.schedules
        return {
            "epoch": schedules.epoch(step),
            "loss": measured.pop("loss"),
            "lr": schedules.lr(step),
            "weight_decay": schedules.weight_decay(step),
            "momentum": schedules.momentum(step),
            "teacher_temp": schedules.teacher_temp(step),
            **measured,
            "images_per_second": images / (self._clock[0] - then),
        }

    def _mean(self, name: str) -> Tensor:
        return self._sums[name] / self.config.accumulate_grad_batches

    def restart_clock(self) -> None:
        """Count images per second anew: what ran since the last row was no training."""
        self._clock = (time.perf_counter(), self.global_step)

    def on_train_start(self) -> None:
        """Start the clock of images per second."""
        self.restart_clock()

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the config. A run's position is its number of steps; Lightning's counters go."""
        checkpoint["config"] = plain(dataclasses.asdict(self.config))
        checkpoint["total_batch"] = self.schedules.total_batch
        checkpoint["steps_per_epoch"] = self.schedules.steps_per_epoch
        checkpoint.pop("loops", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the position in the run.

        Raises:
            UserError: a step would take another number of images than before.
        """
        before, now = checkpoint["total_batch"], self.schedules.total_batch
        if before != now:
            raise UserError(
                f"the run was made with {before} images per step, now it would be {now}; set "
                "--devices, --num_nodes, --batch_size_per_gpu and --accumulate_grad_batches as "
                "before"
            )
        self.first_step = int(checkpoint["global_step"])
        checkpoint.pop("loops", None)  # of checkpoints written by version 0.1.0

    # -- numbers that are not finite ---------------------------------------------------------

    def refuse_broken_weights(self) -> None:
        """Wait for the device and look at every weight.

        Raises:
            NotFiniteError: a value in the student or the teacher is not finite.
        """
        tensors = {name: t for name, t in self.state_dict().items() if t.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        if not finite.all():
            names = [name for name, one in zip(tensors, finite.tolist(), strict=True) if not one]
            raise NotFiniteError(
                f"by step {self.global_step}: {names[0]} and {len(names) - 1} more hold values "
                f"that are not finite. They are not saved; {self._way_back()}"
            )

    def stop_if_broken(self) -> None:
        """Wait for the device and look at the flag of the steps so far.

        Raises:
            NotFiniteError: a loss or gradient was not finite.
        """
        broken = self._broken
        if self.trainer.world_size > 1:  # all stop, or none
            broken = self.trainer.strategy.reduce(broken.clone(), reduce_op="max")
        self._raise_if_broken(broken.item())

    def _raise_if_broken(self, flag: float) -> None:
        """Raise NotFiniteError if this value of the flag, a mean over processes, is not 0."""
        if not flag:
            return
        assert self._gradient_norm is not None
        way = {"32-true": "", "16-mixed": "--precision bf16-mixed or 32-true, "}
        precision = way.get(str(self.trainer.precision), "--precision 32-true, ")
        problem = (
            "the gradients are too large for float16 at any scale of the loss: step after step "
            "was skipped"
            if flag == NO_SCALE
            else "the loss or a gradient is not finite "
            f"(gradient norm {self._gradient_norm.item():.4g})"
        )
        raise NotFiniteError(
            f"by step {self.global_step + 1}: {problem}. It did not touch the weights; "
            f"{self._way_back()}. Try {precision}{stabler(self.config)}"
        )

    def _way_back(self) -> str:
        last = Path(self.config.output_dir) / LAST
        if not last.exists():
            return "no checkpoint was saved before it"
        return f"{last} is from before it: the same command continues there"
