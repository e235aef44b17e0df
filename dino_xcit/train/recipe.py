"""Resolves the `auto` options of a run from its images, its time and its machine.

At the size of ImageNet the result is official DINO's defaults. `eval/recipes/README.md` names the
runs that support each rule, and the rules that no run of ours supports.

To add a rule, write a function and a row in `RULES`; a rule sees what the rows above it resolved.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from dino_xcit.config.pretrain import RunConfig, as_run, auto_options
from dino_xcit.model.architectures import OURS, resolve_architecture
from dino_xcit.model.build import build_backbone
from dino_xcit.model.timm_backbone import is_timm

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.config.pretrain import PretrainConfig

OFFICIAL = RunConfig()
IMAGENET = 1_000_000
"""images from which on a set counts as large as ImageNet"""
SMALL_VIEW = 64
"""pixels on a side of the global crops on a CPU"""
SMALLER = 5 / 7
"""side of the global crops on a CPU, relative to the images': 1.6 times as many seen in the time"""
IMAGES_PER_PROTOTYPE = 20
FEWEST_PROTOTYPES = 1024
IMAGES_SEEN, MOST_EPOCHS = 20_000_000, 1000
"""how long a run without a time limit takes: images seen over all epochs, and their bound"""
HOURS_ON_CPU = 1.0
WARMUP_SHARE, WARMUP_STEPS = 0.1, 12_500
FROZEN_SHARE, FROZEN_STEPS = 0.05, 1250
MEMORY_SHARE = 0.7
"""of the machine's memory, for what the estimate of a step counts"""
FEW_STEPS = 1000
"""optimizer steps below which a run learns little"""


class Setting(NamedTuple):
    """An option that was `auto`."""

    option: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules need to know of the images and the machine."""

    images: int
    """number of training images"""
    side: int
    """median of their shorter sides, in pixels"""
    on_cpu: bool
    processes: int
    """of the whole run"""
    fits: Callable[[RunConfig], bool]
    """whether a step fits in the memory"""
    images_per_second: Callable[[RunConfig], float]
    """measures the rate of a run of these options"""


Values: TypeAlias = dict[str, Any]
"""options by name: those that were given or are resolved, and official DINO's for all others"""
Rule: TypeAlias = "Callable[[Values, Facts], tuple[Any, str]]"


def resolve(config: PretrainConfig, facts: Facts) -> tuple[RunConfig, list[Setting]]:
    """Return the options of a run, and those that were `auto` with their reasons.

    Args:
        config: what was asked for; no value other than `auto` is changed.
        facts: of the images and the machine.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    autos = auto_options(config)
    values = {**given, **{name: getattr(OFFICIAL, name) for name in autos}}
    settings = []
    # A checkpoint of official DINO continues with official values.
    official = config.recipe == "official" or config.continue_from is not None
    rules = _official_rules(config) if official else RULES
    for name, rule in rules.items():
        if name in autos:
            values[name], why = rule(values, facts)
            settings.append(Setting(name, values[name], why))
    return as_run(config, **{name: values[name] for name in autos}), settings


def _official_rules(config: PretrainConfig) -> dict[str, Rule]:
    """Official values need no rule, except where a time decides the epochs."""
    if config.max_hours is None:
        return {}
    return {"epochs": _epochs, "warmup_epochs": _official_warmup_epochs}


def _official_warmup_epochs(values: Values, _facts: Facts) -> tuple[float, str]:
    return min(OFFICIAL.warmup_epochs, values["epochs"]), "official, at most the run"


def _trial(values: Values) -> RunConfig:
    """A run of one epoch with these options, to measure its memory or its rate."""
    one_epoch = {"epochs": 1, "warmup_epochs": 0, "warmup_teacher_temp_epochs": 0}
    return RunConfig(**{**values, **one_epoch, "max_hours": None})


# -- rules ---------------------------------------------------------------------------------------


def _arch(_values: Values, facts: Facts) -> tuple[str, str]:
    name = "xcit_n3" if facts.on_cpu else "xcit_s12"
    side = min(facts.side, SMALL_VIEW if facts.on_cpu else OFFICIAL.global_crops_size)
    patch = 16 if side > 128 else 8 if side > 48 else 4
    device = "a CPU" if facts.on_cpu else "a GPU"
    return f"{name}_p{patch}", f"{device}; patches for crops of {side} pixels"


def _global_crops_size(values: Values, facts: Facts) -> tuple[int, str]:
    patch = _patch_size(values["arch"])
    if _is_ours(values["arch"]):
        size = max(2 * patch, min(SMALL_VIEW, round(SMALLER * facts.side / patch) * patch))
        return size, f"5/7 of images of {facts.side} pixels, at most {SMALL_VIEW}; for speed"
    limit = OFFICIAL.global_crops_size
    size = max(2 * patch, min(limit, facts.side) // patch * patch)
    return size, f"images of {facts.side} pixels; at most {limit}"


def _local_crops_size(values: Values, _facts: Facts) -> tuple[int, str]:
    patch, share = _patch_size(values["arch"]), OFFICIAL.local_crops_size / 224
    size = max(patch, round(values["global_crops_size"] * share / patch) * patch)
    return size, "96/224 of the global crops"


def _is_ours(arch: str) -> bool:
    """Whether it is one of the small networks for CPUs."""
    return not is_timm(arch) and resolve_architecture(arch)[0].startswith(OURS)


def _patch_size(arch: str) -> int:
    """Pixels of which a crop's side has to be a multiple."""
    if is_timm(arch):
        return 32
    return resolve_architecture(arch)[2]


def _local_crops_number(values: Values, _facts: Facts) -> tuple[int, str]:
    size = values["global_crops_size"]
    if size <= SMALL_VIEW:
        return 0, f"global crops of {size} pixels learn faster without"
    return OFFICIAL.local_crops_number, "official"


def _global_crops_scale(values: Values, _facts: Facts) -> tuple[tuple[float, float], str]:
    if not values["local_crops_number"]:
        return (0.25, 1.0), "no local crops"
    return OFFICIAL.global_crops_scale, "official"


def _local_crops_scale(_values: Values, _facts: Facts) -> tuple[tuple[float, float], str]:
    return OFFICIAL.local_crops_scale, "official"


def _blur_sigma(values: Values, _facts: Facts) -> tuple[tuple[float, float], str]:
    scale = min(1.0, values["global_crops_size"] / OFFICIAL.global_crops_size)
    low, high = OFFICIAL.blur_sigma
    return (round(low * scale, 3), round(high * scale, 3)), "in proportion to the global crops"


def _blur_prob(values: Values, _facts: Facts) -> tuple[tuple[float, ...], str]:
    if values["blur_sigma"][1] < 1:
        return (0.0, 0.0, 0.0), "a blur under a pixel changes little"
    return OFFICIAL.blur_prob, "official"


def _solarize_prob(_values: Values, _facts: Facts) -> tuple[tuple[float, ...], str]:
    return OFFICIAL.solarize_prob, "official"


def _drop_path_rate(values: Values, _facts: Facts) -> tuple[float, str]:
    if _is_ours(values["arch"]):
        return 0.0, "a network of few layers"
    return OFFICIAL.drop_path_rate, "official"


def _out_dim(_values: Values, facts: Facts) -> tuple[int, str]:
    power = round(math.log2(facts.images / IMAGES_PER_PROTOTYPE))
    value = min(OFFICIAL.out_dim, max(FEWEST_PROTOTYPES, 2**power))
    return value, f"{facts.images:,} images; about one for {IMAGES_PER_PROTOTYPE}"


def _head_hidden_dim(values: Values, _facts: Facts) -> tuple[int, str]:
    width = _embed_dim(values["arch"])
    value = min(OFFICIAL.head_hidden_dim, int(2 ** round(math.log2(width * 16 / 3))))
    return value, f"a backbone of {width} channels"


def _head_bottleneck_dim(values: Values, _facts: Facts) -> tuple[int, str]:
    value = min(OFFICIAL.head_bottleneck_dim, max(64, values["head_hidden_dim"] // 8))
    return value, "an eighth of the hidden width, at least 64"


def _embed_dim(arch: str) -> int:
    if is_timm(arch):
        with torch.device("meta"):
            return build_backbone(arch).embed_dim
    return resolve_architecture(arch)[1].dim


def _use_bn_in_head(_values: Values, facts: Facts) -> tuple[bool, str]:
    if facts.images >= IMAGENET:
        return OFFICIAL.use_bn_in_head, "official"
    return True, "for accuracy; false for attention maps of objects"


def _koleo_weight(_values: Values, facts: Facts) -> tuple[float, str]:
    if facts.images >= IMAGENET:
        return OFFICIAL.koleo_weight, "official"
    return 0.1, "for accuracy; 0 for attention maps of objects"


def _batch_size_per_gpu(values: Values, facts: Facts) -> tuple[int, str]:
    passes = values["accumulate_grad_batches"] * facts.processes
    batch = OFFICIAL.batch_size_per_gpu
    while batch > 1 and batch * passes > facts.images:
        batch //= 2
    most = batch
    while batch > 1 and not facts.fits(_trial({**values, "batch_size_per_gpu": batch})):
        batch //= 2
    if batch < most:
        return batch, "what fits in the memory"
    return batch, "official" if batch == OFFICIAL.batch_size_per_gpu else f"{facts.images} images"


def _lr(values: Values, _facts: Facts) -> tuple[float, str]:
    if _is_ours(values["arch"]):
        return 0.004, "a small network"
    return OFFICIAL.lr, "official"


def _epochs(values: Values, facts: Facts) -> tuple[int, str]:
    hours = values["max_hours"]
    if hours is None and facts.on_cpu:
        hours = HOURS_ON_CPU
    if hours is None:
        epochs = min(MOST_EPOCHS, max(OFFICIAL.epochs, IMAGES_SEEN // facts.images))
        return epochs, f"{facts.images:,} images; --max_hours sets a time"
    rate = facts.images_per_second(_trial(values))
    epochs = max(1, int(hours * 3600 * rate / facts.images))
    if epochs > 2 * MOST_EPOCHS:
        return 2 * MOST_EPOCHS, f"more teach {facts.images:,} images nothing new"
    return epochs, f"--max_hours {hours:g} at {rate:.0f} images/s"


def _steps_per_epoch(values: Values, facts: Facts) -> int:
    passes = values["accumulate_grad_batches"] * facts.processes
    return max(1, facts.images // int(values["batch_size_per_gpu"] * passes))


def _warmup_epochs(values: Values, facts: Facts) -> tuple[float, str]:
    cap = max(OFFICIAL.warmup_epochs, WARMUP_STEPS / _steps_per_epoch(values, facts))
    return round(min(WARMUP_SHARE * values["epochs"], cap), 3), "a tenth of the run, capped"


def _freeze_last_layer(values: Values, facts: Facts) -> tuple[float, str]:
    cap = max(OFFICIAL.freeze_last_layer, FROZEN_STEPS / _steps_per_epoch(values, facts))
    value = round(min(FROZEN_SHARE * values["epochs"], cap), 3)
    return value, "a twentieth of the run, capped"


def _teacher_temp(_values: Values, _facts: Facts) -> tuple[float, str]:
    return OFFICIAL.teacher_temp, "official"


def _warmup_teacher_temp(values: Values, _facts: Facts) -> tuple[float, str]:
    return min(OFFICIAL.warmup_teacher_temp, values["teacher_temp"]), "official"


def _warmup_teacher_temp_epochs(values: Values, _facts: Facts) -> tuple[int, str]:
    if values["teacher_temp"] == values["warmup_teacher_temp"]:
        return 0, "the temperature is constant"
    return min(30, math.ceil(0.3 * values["epochs"])), "three tenths of the run, at most 30"


def _momentum_teacher(_values: Values, facts: Facts) -> tuple[float, str]:
    if facts.images >= IMAGENET:
        return OFFICIAL.momentum_teacher, "official"
    return 0.99, f"under {IMAGENET:,} images"


def _weight_decay_end(_values: Values, _facts: Facts) -> tuple[float, str]:
    return OFFICIAL.weight_decay_end, "official"


RULES: dict[str, Rule] = {
    "arch": _arch,
    "global_crops_size": _global_crops_size,
    "local_crops_size": _local_crops_size,
    "local_crops_number": _local_crops_number,
    "global_crops_scale": _global_crops_scale,
    "local_crops_scale": _local_crops_scale,
    "blur_sigma": _blur_sigma,
    "blur_prob": _blur_prob,
    "solarize_prob": _solarize_prob,
    "drop_path_rate": _drop_path_rate,
    "out_dim": _out_dim,
    "head_hidden_dim": _head_hidden_dim,
    "head_bottleneck_dim": _head_bottleneck_dim,
    "use_bn_in_head": _use_bn_in_head,
    "koleo_weight": _koleo_weight,
    "batch_size_per_gpu": _batch_size_per_gpu,
    "lr": _lr,
    "epochs": _epochs,
    "warmup_epochs": _warmup_epochs,
    "freeze_last_layer": _freeze_last_layer,
    "teacher_temp": _teacher_temp,
    "warmup_teacher_temp": _warmup_teacher_temp,
    "warmup_teacher_temp_epochs": _warmup_teacher_temp_epochs,
    "momentum_teacher": _momentum_teacher,
    "weight_decay_end": _weight_decay_end,
}
"""Rules by option, in the order in which they are resolved."""
