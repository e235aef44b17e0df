"""Options of `dino-xcit pretrain`, as they are asked for and as a run has them.

Names are official DINO's (`main_dino.py`) wherever it has the option. What depends on the images is
`auto` in `PretrainConfig`; `train/recipe.py` resolves it into the `RunConfig` of a run.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from dino_xcit.config.checks import AUTO, Auto, Checks, lists_to_tuples


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a backbone with DINO, without labels.

    Options that are `auto` are resolved from the images, the time and the machine.
    """

    recipe: Literal["auto", "official"] = "auto"
    """what auto options become: auto, values that suit the images; official, the defaults of
    official DINO"""

    # Data
    data_path: str | tuple[str, ...] | None = None
    """folder of images or tar files (directly, or in train/ and val/), tar files such as
    'shards/train-{000..099}.tar', a .txt file of paths, .npy or .npz arrays, several of these, or
    the root of a named data set"""
    dataset: str | None = None
    """images by name: torch/NAME (torchvision), hfds/NAME (Hugging Face) or a generated source
    such as shapes. Default: the folder --data_path, else shapes"""
    input_key: str | None = None
    """column of the images of hfds/NAME. Default: image, else the first column of images"""
    target_key: str | None = None
    """column of the labels of hfds/NAME. Default: label, else the images have no labels"""
    num_images: int | None = None
    """images to train on. Generated images: how many (shapes: default 10000); others: a subset
    sampled with the seed (default all)"""
    in_chans: int = 3
    """image channels: 1 grey, 3 RGB"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """mean of each channel in [0, 1], subtracted from the images"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """standard deviation of each channel in [0, 1], by which the images are divided"""
    on_bad_image: Literal["replace", "raise"] = "replace"
    """replace: use another image instead of an unreadable one and list it in bad_images.txt;
    raise: end the run"""
    num_workers: int | None = None
    """loader processes per training process. Default: its share of the CPU cores less one, at most
    16"""
    seed: int = 0
    """seed of all random numbers"""

    # Multi-crop
    global_crops_size: int | Auto = AUTO
    """side of the two global crops in pixels"""
    local_crops_size: int | Auto = AUTO
    """side of the local crops in pixels"""
    global_crops_scale: tuple[float, float] | Auto = AUTO
    """smallest and largest share of the image's area that a global crop covers"""
    local_crops_number: int | Auto = AUTO
    """local crops per image; 0 trains on the global crops alone"""
    local_crops_scale: tuple[float, float] | Auto = AUTO
    """smallest and largest share of the image's area that a local crop covers"""

    # Photometric augmentation; three values are for global crop 1, global crop 2, local crops
    flip_prob: float = 0.5
    """probability of a horizontal flip"""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strength of brightness, contrast, saturation and hue jitter"""
    color_jitter_prob: float = 0.8
    """probability of colour jitter"""
    grayscale_prob: float = 0.2
    """probability of conversion to grey"""
    blur_prob: tuple[float, float, float] | Auto = AUTO
    """probability of Gaussian blur in global crop 1, global crop 2, local crops"""
    blur_sigma: tuple[float, float] | Auto = AUTO
    """smallest and largest standard deviation of the blur in pixels"""
    solarize_prob: tuple[float, float, float] | Auto = AUTO
    """probability of solarization in global crop 1, global crop 2, local crops"""

    # Backbone
    arch: str = AUTO
    """backbone: xcit_{pico2,n3,n12,t12,t24,s12,s24,m24,l24}_p{16,8,4}, official and timm names of
    XCiT, or timm:NAME for any timm network with one feature vector per image"""
    init_weights: str | None = None
    """initial weights of student and teacher: anything that --weights of the evaluations takes.
    Default: random"""
    continue_from: str | None = None
    """full checkpoint of official DINO to continue after its last epoch, with heads, center and
    optimizer"""
    drop_path_rate: float | Auto = AUTO
    """stochastic depth rate of the student, the same in every layer"""
    grad_checkpointing: bool = False
    """recompute layers in the backward pass: less memory, more time"""
    xca: bool = True
    """cross-covariance attention (false: the paper's ablation)"""
    lpi: bool = True
    """local patch interaction (false: the paper's ablation)"""
    l2_norm: bool = True
    """L2-normalised queries and keys (false: the paper's ablation)"""
    learned_temperature: bool = True
    """learned temperature of XCA (false: the paper's ablation)"""

    # Head and loss
    out_dim: int | Auto = AUTO
    """prototypes: outputs of the projection head"""
    head_hidden_dim: int | Auto = AUTO
    """hidden width of the projection head"""
    head_bottleneck_dim: int | Auto = AUTO
    """width of the projection head's bottleneck, the input of the prototype layer"""
    use_bn_in_head: bool | Auto = AUTO
    """batch norm in the projection head"""
    norm_last_layer: bool = True
    """fix the norm of every prototype at 1 (false: better but less stable)"""
    freeze_last_layer: float | Auto = AUTO
    """epochs at the start, whole or not, during which the prototypes are frozen"""
    student_temp: float = 0.1
    """softmax temperature of the student"""
    warmup_teacher_temp: float | Auto = AUTO
    """softmax temperature of the teacher at the start"""
    teacher_temp: float | Auto = AUTO
    """softmax temperature of the teacher after its warmup"""
    warmup_teacher_temp_epochs: int | Auto = AUTO
    """epochs of linear warmup of the teacher's temperature"""
    momentum_teacher: float | Auto = AUTO
    """EMA momentum of the teacher at the start; rises to 1 along a cosine"""
    center_momentum: float = 0.9
    """EMA momentum of the center"""
    koleo_weight: float | Auto = AUTO
    """weight of KoLeo, which spreads the features of a batch (DINOv2; not in official DINO): better
    k-NN, but attention maps that follow objects less; 0: none"""

    # Optimization
    epochs: int | Auto = AUTO
    """passes over the images"""
    max_hours: float | None = None
    """hours that the run may take: auto --epochs become as many as fit, by the rate of its first
    steps. Default: 1 on a CPU, unlimited on a GPU"""
    batch_size_per_gpu: int | Auto = AUTO
    """images per process and forward pass"""
    accumulate_grad_batches: int = 1
    """forward passes per optimizer step"""
    lr: float | Auto = AUTO
    """peak learning rate for a total batch of 256 images; scaled linearly with the total
    batch"""
    warmup_epochs: float | Auto = AUTO
    """epochs of linear warmup of the learning rate"""
    warmup_lr: float = 0.0
    """learning rate at the start of the warmup (not scaled)"""
    min_lr: float = 1e-6
    """learning rate at the end (not scaled)"""
    weight_decay: float = 0.04
    """weight decay at the start; as in official DINO, not applied to biases and one-dimensional
    tensors"""
    weight_decay_end: float | Auto = AUTO
    """weight decay at the end, reached along a cosine"""
    clip_grad: float = 3.0
    """maximum gradient norm of each parameter tensor; 0: no clipping"""

    # Machine: options of Lightning's Trainer
    accelerator: str = "auto"
    """cpu, gpu, mps, ...: Lightning's names"""
    devices: str = "auto"
    """processes on this machine, or a list of device indices"""
    num_nodes: int = 1
    """number of machines"""
    strategy: str = "auto"
    """distributed strategy: auto, ddp or a variant of ddp; Lightning's names"""
    precision: str = "auto"
    """32-true, bf16-mixed or 16-mixed; auto, resolved when the run starts: bf16-mixed on GPUs
    with bfloat16 and CPUs that multiply it faster, else 32-true"""
    compile: bool | None = None
    """torch.compile each layer; takes a minute or more at the start. Default: on a GPU, and on
    CPU for 10000 steps or more"""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """any other option of Lightning's Trainer, such as --trainer.profiler simple"""

    # Run folder
    output_dir: str = "runs/pretrain"
    """run folder"""
    resume: bool = True
    """continue the run in --output_dir if it has the same options; false: refuse a folder that
    holds a run"""
    extend: bool = False
    """continue a run to more --epochs than it had: from the next step on, all schedules are those
    of a run of that many epochs"""
    checkpoint_every_n_steps: int | None = None
    """steps between checkpoints, in addition to those after every epoch and by
    --checkpoint_every_n_minutes"""
    checkpoint_every_n_minutes: float = 10
    """minutes between checkpoints"""
    saveckp_freq: int = 20
    """epochs between checkpoints that are kept; 0: keep only the last one"""
    log_every_n_steps: int = 50
    """steps between rows of metrics.csv"""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """loggers in addition to metrics.csv"""
    eval_every_n_epochs: int = 10
    """epochs between k-NN evaluations of the teacher, if the images have labels; 0: only at the
    end"""
    eval_num_images: int = 10000
    """maximum number of images of this k-NN evaluation, of the training and of the validation
    set each"""
    on_collapse: Literal["warn", "stop"] = "warn"
    """warn: print a warning when the run collapses or diverges; stop: also end the run"""
    dry_run: bool = False
    """write crops.png, print the plan and stop"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        lists_to_tuples(self)
        check = Checks(self)
        self._check_images(check)
        self._check_training(check)
        self._check_machine(check)

    def _check_images(self, check: Checks) -> None:
        check.columns()
        check.range("global_crops_scale", 1, "two shares with 0 < from <= to <= 1")
        check.range("local_crops_scale", 1, "two shares with 0 < from <= to <= 1")
        channels = f"one value per channel (--in_chans {self.in_chans})"
        for flag in ("mean", "std"):
            check(len(getattr(self, flag)) == self.in_chans, flag, channels)
        check.positive("std")
        check.range("blur_sigma", math.inf, "two numbers of pixels with 0 < from <= to")
        probabilities = ("flip_prob", "color_jitter_prob", "grayscale_prob", "blur_prob")
        check.within(0, 1, "probabilities from 0 to 1", *probabilities, "solarize_prob")
        *strengths, hue = self.color_jitter
        in_range = all(0 <= strength <= 1 for strength in strengths) and 0 <= hue <= 0.5
        check(in_range, "color_jitter", "strengths from 0 to 1, hue to 0.5")
        check.at_least(1, "in_chans", "num_images", "global_crops_size", "local_crops_size")
        check.at_least(0, "local_crops_number", "num_workers", "seed")

    def _check_training(self, check: Checks) -> None:
        shares = ("momentum_teacher", "center_momentum", "drop_path_rate")
        check.within(0, 1, "a number from 0 to 1", *shares)
        check.positive("student_temp", "warmup_teacher_temp", "teacher_temp", "max_hours")
        check.at_least(1, "out_dim", "head_hidden_dim", "head_bottleneck_dim")
        check.at_least(1, "epochs", "batch_size_per_gpu", "accumulate_grad_batches")
        check.at_least(0, "lr", "clip_grad", "freeze_last_layer", "koleo_weight")
        if self.epochs != AUTO:
            for flag in ("warmup_epochs", "warmup_teacher_temp_epochs"):
                value = getattr(self, flag)
                fits = value == AUTO or value <= self.epochs
                check(fits, flag, f"at most --epochs {self.epochs}")
            unlimited = self.max_hours is None
            check(unlimited, "max_hours", f"nothing beside --epochs {self.epochs}")
        both = self.init_weights is not None and self.continue_from is not None
        check(not both, "init_weights", "nothing beside --continue_from, which brings weights")

    def _check_machine(self, check: Checks) -> None:
        check.precision()
        whole = self.strategy == "auto" or self.strategy.startswith("ddp")
        forked = self.strategy.endswith(("spawn", "fork", "notebook"))  # these return no outcome
        check(whole and not forked, "strategy", "auto or ddp (every process is whole)")
        check.at_least(1, "num_nodes", "log_every_n_steps", "eval_num_images")
        check.at_least(1, "checkpoint_every_n_steps")
        check.at_least(0, "eval_every_n_epochs", "saveckp_freq", "checkpoint_every_n_minutes")


@dataclass(frozen=True, kw_only=True)
class RunConfig(PretrainConfig):
    """The options of a run, all resolved. The defaults are official DINO's."""

    global_crops_size: int = 224
    local_crops_size: int = 96
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_number: int = 8
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    arch: str = "xcit_s12_p16"
    drop_path_rate: float = 0.1
    out_dim: int = 65536
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    use_bn_in_head: bool = False
    freeze_last_layer: float = 1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    momentum_teacher: float = 0.996
    koleo_weight: float = 0.0
    epochs: int = 100
    batch_size_per_gpu: int = 64
    lr: float = 0.0005
    warmup_epochs: float = 10
    weight_decay_end: float = 0.4

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        for flag in auto_options(self):
            Checks(self)(False, flag, "a value; a run's options are resolved")


RESOLVED = tuple(name for name in RunConfig.__annotations__)
"""Options that may be `auto` until a run begins; --precision is another one, of all commands."""


def auto_options(config: PretrainConfig) -> list[str]:
    """Return the names of the options that are still to be resolved."""
    return [name for name in RESOLVED if getattr(config, name) == AUTO]


def as_run(config: PretrainConfig, **values: Any) -> RunConfig:
    """Return the options of a run, with these values in place of the config's.

    A run has no --max_hours: it is in its number of epochs.

    Raises:
        UserError: an option is still `auto`, or is not allowed.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return RunConfig(**{**given, "max_hours": None, **values})


# Options that a continued run may change: they set where it runs and what it reports, not what it
# computes. (Of batch_size_per_gpu, only the sum over all processes matters; that is compared when
# the checkpoint is loaded.)
FREE_ON_RESUME = frozenset(
    {
        "accelerator",
        "batch_size_per_gpu",
        "checkpoint_every_n_minutes",
        "checkpoint_every_n_steps",
        "compile",
        "data_path",
        "devices",
        "dry_run",
        "eval_every_n_epochs",
        "eval_num_images",
        "extend",
        "log_every_n_steps",
        "logger",
        "max_hours",
        "num_nodes",
        "num_workers",
        "on_collapse",
        "output_dir",
        "recipe",
        "resume",
        "saveckp_freq",
        "strategy",
        "trainer",
    }
)


def differing_options(one: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the options in which the runs differ and that affect results, with both values."""
    return {
        f.name: (getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(one)
        if f.name not in FREE_ON_RESUME and getattr(one, f.name) != getattr(other, f.name)
    }
