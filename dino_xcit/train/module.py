"""The Lightning module: student, teacher, one step, what is logged (DINO, algorithm 1).

Batch norm policy, in one place. XCiT's stem and LPI hold batch norms. As in the official code, the student and the teacher
both run in train mode: each normalises by its own batch, and each keeps running statistics of its own batches; the teacher's
are not averaged from the student's, only its parameters are. Global and local crops are separate forward passes, so separate
batches. With several processes a batch is the batch of all of them: torch's SyncBatchNorm on GPU, `CpuSyncBatchNorm` on CPU.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch._functorch.config as partitioner
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_xcit.data.photometric import photometric
from dino_xcit.errors import NotFiniteError, UserError
from dino_xcit.files import plain
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.batch_norm import synchronise_batch_norms
from dino_xcit.model.build import build_backbone
from dino_xcit.model.chunked_loss import Embeddings
from dino_xcit.model.dino import DINOHead, DINOLoss, LossStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.loader import Batch
    from dino_xcit.train.schedules import Schedules

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temp",
    "teacher_entropy",
    "kl",
    "center_norm",
    "grad_norm",
    "images_per_second",
    "knn_top1",
    "rankme",
)
"""Columns of metrics.csv. `step` counts finished optimizer steps; entropy and KL are in nats, k-NN in percent."""

KEPT_FOR_BACKWARD = 0.3
"""Share of what a compiled region would keep; what is cheap to compute is computed again (`eval/speed/README.md`)."""


class Network(nn.Module):
    """Backbone and projection head; the student is one, the teacher another."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(
            config.arch,
            in_chans=config.in_chans,
            image_size=config.global_crops_size,
            grad_checkpointing=config.grad_checkpointing,
            sampled_paths=config.drop_path_rate > 0,
            ablations={switch: getattr(config, switch) for switch in ABLATIONS},
        )
        self.head = DINOHead(
            self.backbone.embed_dim,
            config.out_dim,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=config.norm_last_layer,
        )

    def forward(
        self, groups: list[Tensor], paths: Sequence[Tensor | None] = (None, None)
    ) -> Tensor:
        """Groups of views of one size each, (B, views, C, H, W) -> logits (B, all views, K)."""
        return self.embed(groups, paths).logits()

    def embed(
        self, groups: list[Tensor], paths: Sequence[Tensor | None] = (None, None)
    ) -> Embeddings:
        """`forward` before its last product, which the loss makes a few prototypes at a time.

        paths: stochastic depth of each group, (B, views, layers, 3), or None.
        """
        features = [
            self.backbone(
                views.flatten(0, 1), None if of_group is None else of_group.flatten(0, 1)
            ).unflatten(0, views.shape[:2])
            for views, of_group in zip(groups, paths, strict=False)
        ]
        views = torch.cat(features, dim=1)  # (B, V, D)
        return Embeddings(
            of_views=self.head.embed(views.flatten(0, 1)).unflatten(0, views.shape[:2]),
            weight_v=self.head.last_layer.weight_v,
            weight_g=self.head.last_layer.weight_g,
        )


class DINOModule(L.LightningModule):
    """Trains the student on `Batch`es; the teacher follows. The product is `teacher.backbone`.

    `row` holds the values of the step just made if it is one that logs, else it is empty.
    """

    _broken: Tensor

    def __init__(self, config: PretrainConfig, schedules: Schedules) -> None:
        super().__init__()
        self.config, self.schedules = config, schedules
        self.student = Network(config)
        self.teacher = Network(config).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = DINOLoss(config.out_dim, config.student_temp, config.center_momentum)
        self.register_buffer(
            "_broken", torch.zeros(()), persistent=False
        )  # 1 once a loss or gradient was not finite
        self.row: dict[str, float] = {}
        self._statistics: LossStatistics | None = None
        self._step_loss: Tensor | None = None
        self._gradient_norm: Tensor | None = None
        self._clock = (time.perf_counter(), 0)

    def compile_regions(self) -> None:
        """torch.compile of the stem and each XCA layer. The layers are one function of their weights, so each kind of crop
        is compiled once.

        What a compiler cannot do is then done without it, as torch tells; it ends no run.
        """
        torch._dynamo.config.suppress_errors = True
        partitioner.activation_memory_budget = KEPT_FOR_BACKWARD
        for network in (self.student, self.teacher):
            for region in network.backbone.compiled_regions():
                region.compile(dynamic=False)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            for network in (self.student, self.teacher):
                synchronise_batch_norms(network, self.trainer.strategy.root_device.type)

    # -- one step ------------------------------------------------------------------------------------------------

    def views(self, batch: Batch) -> list[Tensor]:
        """The batch's groups of views as the network sees them: (B, 2, C, S, S) and, if any, (B, L, C, s, s)."""
        groups = ["global", "local"] if self.config.local_crops_number else ["global"]
        return [
            self._augment(batch.views[f"{group}_crops"], batch.views[f"{group}_params"])
            for group in groups
        ]

    def paths(self, batch: Batch) -> list[Tensor | None]:
        """Stochastic depth of the student on each group of views."""
        drops = self.config.drop_path_rate > 0 and self.student.backbone.path_shape[0] > 0
        return [batch.views[f"{group}_paths"] if drops else None for group in ("global", "local")]

    def _augment(self, crops: Tensor, draws: Tensor) -> Tensor:
        c = self.config
        with torch.autocast(
            crops.device.type, enabled=False
        ):  # eight bits of a picture need more than bfloat16 has
            views = photometric(
                crops.flatten(0, 1), draws.flatten(0, 1), c.mean, c.std, c.blur_sigma[1]
            )
        return views.unflatten(0, crops.shape[:2])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        groups = self.views(batch)
        temperature = self.schedules.teacher_temp(self.global_step)
        with torch.no_grad():
            teacher = self.teacher.embed(groups[:1])
        student = self.student.embed(groups, self.paths(batch))
        loss, self._statistics = self.loss.of_embeddings(student, teacher, temperature)
        self._step_loss = (
            loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.student, self.trainer.precision)

    @property
    def _is_float16(self) -> bool:
        return self.trainer.precision == "16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = clip_per_parameter(gradients, self.config.clip_grad)
        self._gradient_norm = torch.linalg.vector_norm(norms)
        sound = self._mean_loss().isfinite()
        if not self._is_float16:  # whose scaler skips steps of infinite gradients on its own
            sound = sound & self._gradient_norm.isfinite()
            # The fused optimizer reads this flag on the device and leaves weights and moments alone once it is set.
            optimizer.found_inf = (~sound).float().maximum(self._broken)  # type: ignore[attr-defined]
        self._broken.copy_((~sound).float().maximum(self._broken))
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
        step = self.global_step
        regularised, spared = optimizer.param_groups
        regularised["lr"] = spared["lr"] = self.schedules.lr(step)
        regularised["weight_decay"] = self.schedules.weight_decay(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.device.type == "cpu" or self._logs(
            step
        ):  # on a GPU not at every step, since it waits for the device
            self.stop_if_broken()
        get_ema_multi_avg_fn(self.schedules.momentum(step))(
            list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()], None
        )
        self.loss.update_center()
        self.row = self._log_row(step) if self._logs(step) else {}
        self._step_loss = None

    # -- what is logged ------------------------------------------------------------------------------------------

    def _logs(self, step: int) -> bool:
        done = step + 1
        return (
            done == 1
            or done % self.config.log_every_n_steps == 0
            or done % self.schedules.steps_per_epoch == 0
        )

    def _log_row(self, step: int) -> dict[str, float]:
        assert self._statistics is not None
        assert self._gradient_norm is not None
        values = torch.stack([self._mean_loss(), *self._statistics])
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        loss, entropy, kl = values.tolist()
        then, step_then = self._clock
        self._clock = (time.perf_counter(), step + 1)
        schedules = self.schedules
        return {
            "epoch": schedules.epoch(step),
            "loss": loss,
            "lr": schedules.lr(step),
            "weight_decay": schedules.weight_decay(step),
            "momentum": schedules.momentum(step),
            "teacher_temp": schedules.teacher_temp(step),
            "teacher_entropy": entropy,
            "kl": kl,
            "center_norm": self.loss.center.norm().item(),
            "grad_norm": self._gradient_norm.item(),
            "images_per_second": (step + 1 - step_then)
            * schedules.total_batch
            / (self._clock[0] - then),
        }

    def _mean_loss(self) -> Tensor:
        assert self._step_loss is not None
        return self._step_loss / self.config.accumulate_grad_batches

    def restart_clock(self) -> None:
        """Begin to count images per second anew: what ran since the last row was no training."""
        self._clock = (time.perf_counter(), self.global_step)

    def on_train_start(self) -> None:
        self.restart_clock()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = plain(dataclasses.asdict(self.config))
        checkpoint["total_batch"] = self.schedules.total_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before, now = checkpoint["total_batch"], self.schedules.total_batch
        if before != now:
            raise UserError(
                f"the run was made with {before} images per step, now it would be {now}; set --devices, --num_nodes, "
                "--batch_size_per_gpu and --accumulate_grad_batches as before"
            )
        # Saved after Lightning's loop was left, it says that the one epoch which a run is to Lightning is over.
        for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            progress.update(processed=0, completed=0)

    def refuse_broken_weights(self) -> None:
        """Raise FloatingPointError if a number in the student or the teacher is not finite. Waits for the device."""
        tensors = {name: t for name, t in self.state_dict().items() if t.is_floating_point()}
        sound = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        if not sound.all():
            names = [name for name, one in zip(tensors, sound.tolist(), strict=True) if not one]
            raise NotFiniteError(
                f"by step {self.global_step}: {names[0]} and {len(names) - 1} more hold numbers that are not finite. "
                "They are not saved; checkpoints/last.ckpt is from before: the same command goes on there"
            )

    def stop_if_broken(self) -> None:
        """Raise FloatingPointError if a loss or gradient was not finite. Waits for the device."""
        broken = self._broken
        if self.trainer.world_size > 1:
            broken = self.trainer.strategy.reduce(
                broken.clone(), reduce_op="max"
            )  # all stop, or none
        if broken.item():
            assert self._gradient_norm is not None
            raise NotFiniteError(
                f"by step {self.global_step + 1}: the loss or a gradient is not finite (gradient norm "
                f"{self._gradient_norm.item():.4g}). The weights were not touched by it and checkpoints/last.ckpt is from "
                "before it. Try --precision 32-true, a lower --lr, a longer --warmup_epochs, --clip_grad 0.3 or "
                "--norm_last_layer true"
            )


def adamw(student: nn.Module, precision: Any) -> torch.optim.AdamW:
    """The optimizer; learning rate and weight decay are set at each step."""
    # The scaler of float16 has to see the gradients before they are clipped, which a fused optimizer hides from it.
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=precision != "16-mixed")


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Two groups for AdamW: regularised, and spared from weight decay.

    Official rule: biases and one-dimensional tensors are spared. XCA's temperature (h, 1, 1) and the class token are
    therefore decayed, which timm's `no_weight_decay` would not do.
    """
    regularised: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith(".bias") or parameter.ndim == 1 else regularised).append(
                parameter
            )
    return [{"params": regularised}, {"params": spared, "weight_decay": 0.0}]


@torch.no_grad()
def clip_per_parameter(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale down, in place, each gradient whose own norm exceeds the limit (0: none) -> the norms before, (tensors,)."""
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit:
        torch._foreach_mul_(gradients, (limit / (norms + 1e-6)).clamp(max=1.0).unbind())
    return norms
