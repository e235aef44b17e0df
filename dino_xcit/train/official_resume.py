"""A run of official DINO, from its full checkpoint, goes on as a run of ours, after the epoch at which it was saved.

Networks, heads, center and the optimizer's moments are in that file. What is not: the order of the images and the random
numbers of their crops, which are drawn as this run draws them. Schedules are this run's, from that epoch on.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from dino_xcit.config.pretrain import FREE_ON_RESUME, PretrainConfig
from dino_xcit.errors import UserError
from dino_xcit.train.module import DINOModule, adamw
from dino_xcit.weights.formats import read_file, to_our_names
from dino_xcit.weights.load import load_networks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EXPECTED = "a full checkpoint of official DINO, with student, teacher, optimizer and epoch"
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
MOMENTS = ("exp_avg", "exp_avg_sq")
FREE = (FREE_ON_RESUME | {"arch"}) - {
    "batch_size_per_gpu"
}  # the tensors have fitted the architecture


def resume_official(
    path: Path, module: DINOModule, trainer: L.Trainer
) -> tuple[dict[str, Any], str]:
    """An official checkpoint -> ours, from which `trainer` goes on, and a line that tells what was taken and what was not.

    The module's networks and center are filled. Raises ValueError, naming the flag, if there is no run to go on with.
    """
    config, schedules = module.config, module.schedules
    flag = f"--continue_from {path}"
    try:
        content, _ = read_file(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{flag} {error}; expected {EXPECTED}") from None
    lacking = [name for name in ("student", "teacher", "epoch") if name not in content]
    if lacking:
        raise UserError(
            f"{flag} has no {' and no '.join(lacking)}; expected {EXPECTED}; --init_weights takes weights alone"
        )
    epoch = content["epoch"]
    if not isinstance(epoch, int):
        raise UserError(f"{flag} has {epoch!r} for its epoch; expected {EXPECTED}")
    if not 0 < epoch < config.epochs:
        raise UserError(
            f"{flag} has {epoch} epochs behind it and --epochs is {config.epochs}; nothing is left to do"
        )
    taken = load_networks(str(path), module.student, module.teacher, module.loss, "continue_from")
    for network in ("student", "teacher"):
        if f"the {network}'s head" not in taken:
            raise UserError(
                f"{flag}: its {network}'s head is of another shape; set --out_dim, --head_hidden_dim, "
                "--head_bottleneck_dim, --use_bn_in_head and --norm_last_layer as they were"
            )
    state, problem = optimizer_state(content, module, trainer)
    steps = epoch * schedules.steps_per_epoch
    checkpoint = {
        "epoch": 0,  # of Lightning, to which the whole run is one
        "global_step": steps,
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        "loops": loops_after(trainer, steps, steps * config.accumulate_grad_batches),
        "callbacks": {},
        "optimizer_states": [state],
        "lr_schedulers": [],
    }
    module.on_save_checkpoint(checkpoint)
    anew = [
        *([] if "center" in taken else ["center"]),
        *([problem] if problem else []),
        "order and crops of the images",
    ]
    if trainer.precision == "16-mixed":
        anew.append("the scaler of float16")
    lines = [
        f"{flag}: goes on after epoch {epoch} of {config.epochs}, step {steps}; taken: "
        f"{', '.join([*taken, *([] if problem else ['optimizer'])])}; anew: {', '.join(anew)}"
    ]
    differing = ", ".join(
        f"--{name} was {old}, now {new}" for name, old, new in differing_arguments(content, config)
    )
    return checkpoint, "; ".join([*lines, *([differing] if differing else [])])


def optimizer_state(
    content: Mapping[str, Any], module: DINOModule, trainer: L.Trainer
) -> tuple[dict[str, Any], str]:
    """The state of this run's optimizer with the file's moments, or a new one and what is wrong with the file's."""
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
    """AdamW's state of each parameter under our names. Raises ValueError if it is not AdamW's of this student.

    Official DINO numbers parameters through two groups in the order of the model: first those with weight decay. The gain of
    the last layer has no number where it is fixed, and a layer that was frozen so far has no moments.
    """
    saved = content.get("optimizer") or {}
    of_groups = [len(group["params"]) for group in saved.get("param_groups", [])]
    tensors = {name: t for name, t in content["student"].items() if not name.endswith(BUFFERS)}
    for fixed in ((), ("weight_g", "original0")):
        trained = [name for name in tensors if not name.endswith(fixed)]
        spared = [name for name in trained if name.endswith(".bias") or tensors[name].ndim == 1]
        regularised = [name for name in trained if name not in set(spared)]
        if of_groups == [len(regularised), len(spared)]:
            break
    else:
        raise UserError(f"{sum(of_groups)} parameters for {len(tensors)} tensors of the student")
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
    backbone, head = to_our_names(values)
    return {
        f"{part}.{name}": tensor
        for part, of in (("backbone", backbone), ("head", head))
        for name, tensor in of.items()
    }


def loops_after(trainer: L.Trainer, steps: int, passes: int) -> dict[str, Any]:
    """What Lightning remembers of its loops when a run is saved after so many optimizer steps and forward passes."""
    fit = trainer.fit_loop.state_dict()
    fit["state_dict"] = {"combined_loader": [{"passes": passes}]}
    fit["epoch_loop.state_dict"] = {
        "_batches_that_stepped": steps - 1
    }  # the last is counted once it is saved
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for when in ("total", "current"):
        fit["epoch_loop.batch_progress"][when] = {
            "ready": passes,
            "started": passes,
            "processed": passes,
            "completed": passes - 1,
        }
        fit["epoch_progress"][when].update(ready=1, started=1)
        optimizer["step"][when] = {"ready": steps, "completed": steps}
        optimizer["zero_grad"][when] = {"ready": steps, "started": steps, "completed": steps}
    others = {
        f"{name}_loop": getattr(trainer, f"{name}_loop").state_dict()
        for name in ("validate", "test", "predict")
    }
    return {"fit_loop": fit, **others}


def differing_arguments(
    content: Mapping[str, Any], config: PretrainConfig
) -> list[tuple[str, Any, Any]]:
    """Options that the file's command line gave other values, as far as they have the same name: (name, then, now)."""
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
