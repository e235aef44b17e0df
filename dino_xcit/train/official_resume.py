"""Continue a run of official DINO from its full checkpoint, after the epoch at which it was saved.

The file holds networks, heads, center and the optimizer's moments. It does not hold the order of
the images and the random numbers of their crops: those are sampled as this run samples them.
Schedules are this run's, from that epoch on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from dino_xcit.config.pretrain import FREE_ON_RESUME, RunConfig
from dino_xcit.errors import UserError
from dino_xcit.train.optimizer import adamw
from dino_xcit.weights.formats import to_our_names
from dino_xcit.weights.reading import read_file
from dino_xcit.weights.start import load_networks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dino_xcit.train.module import DINOModule

EXPECTED = "a full checkpoint of official DINO, with student, teacher, optimizer and epoch"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
MOMENTS = ("exp_avg", "exp_avg_sq")
# The tensors fit the architecture, whatever its name.
FREE = (FREE_ON_RESUME | {"arch"}) - {"batch_size_per_gpu"}


@dataclass(frozen=True, kw_only=True)
class OfficialRun:
    """A full checkpoint of official DINO that was found sound."""

    flag: str
    """the option and its file, for messages"""
    content: Mapping[str, Any]
    epoch: int
    """epochs it was trained for"""


def resume_official(
    path: Path, module: DINOModule, trainer: L.Trainer
) -> tuple[dict[str, Any], str]:
    """Convert an official checkpoint into one of ours, from which `trainer` continues.

    Args:
        path: the official checkpoint.
        module: its networks and center are filled.
        trainer: the run's.

    Returns:
        The checkpoint, and a line of what was taken from the file, what begins anew and which of
        its options differ.

    Raises:
        UserError: it is not a run that can be continued; the message names the flag.
    """
    config = module.config
    official = open_official(path, config)
    taken = load_networks(str(path), module.student, module.teacher, module.loss, "continue_from")
    for network in ("student", "teacher"):
        if f"the {network}'s head" not in taken:
            raise UserError(
                f"{official.flag}: its {network}'s head is of another shape; set --out_dim, "
                "--head_hidden_dim, --head_bottleneck_dim, --use_bn_in_head and "
                "--norm_last_layer as they were"
            )
    state, problem = optimizer_state(official.content, module, trainer)
    step = official.epoch * module.schedules.steps_per_epoch
    checkpoint = {
        "epoch": 0,  # of Lightning, for which the whole run is one
        "global_step": step,
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        "callbacks": {},
        "optimizer_states": [state],
        "lr_schedulers": [],
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint, _summary(official, config, taken, problem, trainer.precision, step)


def _summary(
    official: OfficialRun,
    config: RunConfig,
    taken: list[str],
    problem: str,
    precision: str | int | None,
    step: int,
) -> str:
    """One line: where the run continues, what was taken and what starts anew, other options."""
    taken = [*taken, *([] if problem else ["optimizer"])]
    anew = [*([] if "center" in taken else ["center"]), *([problem] if problem else [])]
    anew.append("order and crops of the images")
    if precision == "16-mixed":
        anew.append("the scaler of float16")
    line = (
        f"{official.flag}: continues after epoch {official.epoch} of {config.epochs}, step {step}; "
        f"taken: {', '.join(taken)}; anew: {', '.join(anew)}"
    )
    differing = ", ".join(
        f"--{name} was {then}, now {now}"
        for name, then, now in differing_arguments(official.content, config)
    )
    return f"{line}; {differing}" if differing else line


def open_official(path: Path, config: RunConfig) -> OfficialRun:
    """Read an official checkpoint.

    Raises:
        UserError: the file is something else, or nothing is left to do.
    """
    flag = f"--continue_from {path}"
    try:
        content, _ = read_file(path)
    except UserError as error:
        raise UserError(f"{flag} {error}; expected {EXPECTED}") from None
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}; expected {EXPECTED}") from None
    lacking = [name for name in ("student", "teacher", "epoch") if name not in content]
    if lacking:
        raise UserError(
            f"{flag} has no {' and no '.join(lacking)}; expected {EXPECTED}; --init_weights takes "
            "weights alone"
        )
    epoch = content["epoch"]
    if not isinstance(epoch, int):
        raise UserError(f"{flag} has {epoch!r} for its epoch; expected {EXPECTED}")
    if not 0 < epoch < config.epochs:
        raise UserError(
            f"{flag} was trained for {epoch} epochs and --epochs is {config.epochs}; nothing is "
            "left to do"
        )
    return OfficialRun(flag=flag, content=content, epoch=epoch)


def optimizer_state(
    content: Mapping[str, Any], module: DINOModule, trainer: L.Trainer
) -> tuple[dict[str, Any], str]:
    """The optimizer's state with the file's moments.

    Returns:
        The state and "", or a new state and why the file's moments cannot be used.
    """
    optimizer = adamw(module.student, trainer.precision)
    state = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in module.student.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        moments = official_moments(content)
        for index, parameter in enumerate(parameters):
            found = moments.get(names[id(parameter)], {})
            if found and {found[moment].shape for moment in MOMENTS} != {parameter.shape}:
                raise UserError(f"those of {names[id(parameter)]} are of another shape")
            if found:
                state["state"][index] = found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return optimizer.state_dict(), f"optimizer (the file's moments cannot be used: {error})"
    return state, ""


def official_moments(content: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """AdamW's state of each parameter under our names.

    Official DINO numbers the parameters of its two groups in the order of the model: first those
    with weight decay. The gain of the last layer has no number where it is fixed, and a layer
    that was frozen until then has no moments.

    Raises:
        UserError: it is not AdamW's state of this student.
    """
    saved = content.get("optimizer") or {}
    group_sizes = [len(group["params"]) for group in saved.get("param_groups", [])]
    tensors = {name: t for name, t in content["student"].items() if not name.endswith(BUFFERS)}
    for fixed in ((), ("weight_g", "original0")):
        trained = [name for name in tensors if not name.endswith(fixed)]
        spared = [name for name in trained if name.endswith(".bias") or tensors[name].ndim == 1]
        regularised = [name for name in trained if name not in set(spared)]
        if group_sizes == [len(regularised), len(spared)]:
            break
    else:
        raise UserError(f"{sum(group_sizes)} parameters for {len(tensors)} tensors of the student")
    in_order = [*regularised, *spared]
    states = {in_order[index]: state for index, state in saved["state"].items() if state}
    if not states:
        raise UserError("there are none")
    if any(moment not in state for state in states.values() for moment in MOMENTS):
        raise UserError("not AdamW's")
    # Three copies of the number of steps, since class attention's qkv is cut in three.
    steps = under_our_names(
        {name: torch.full((3,), float(state["step"])) for name, state in states.items()}
    )
    found = {name: {"step": step[0].clone()} for name, step in steps.items()}
    for moment in MOMENTS:
        for name, tensor in under_our_names(
            {name: state[moment] for name, state in states.items()}
        ).items():
            found[name][moment] = tensor
    return found


def under_our_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename official tensors, or whatever belongs to them, to the names of `Network`."""
    backbone, head = to_our_names(values)
    return {
        f"{part}.{name}": tensor
        for part, of in (("backbone", backbone), ("head", head))
        for name, tensor in of.items()
    }


def differing_arguments(
    content: Mapping[str, Any], config: RunConfig
) -> list[tuple[str, Any, Any]]:
    """Options of the same name that had other values in the file's run: (name, then, now)."""
    arguments = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}
    found = []
    for field in dataclasses.fields(config):
        if field.name not in arguments or field.name in FREE:
            continue
        then, now = arguments[field.name], getattr(config, field.name)
        then = tuple(then) if isinstance(then, list) else then
        if then != now:
            found.append((field.name, then, now))
    return found
