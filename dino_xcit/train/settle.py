"""Settles every option of a run when it begins; a run keeps them on whatever machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_xcit.config.checks import AUTO
from dino_xcit.config.pretrain import RunConfig, as_run, auto_options
from dino_xcit.data.decode import one_line
from dino_xcit.errors import ImageError, UserError
from dino_xcit.run_folder import read_config
from dino_xcit.runtime import memory_there, resolve_precision, say
from dino_xcit.train.checkpoints import checkpoints_of
from dino_xcit.train.dry_run import memory_estimate
from dino_xcit.train.rate import images_per_second
from dino_xcit.train.recipe import MEMORY_SHARE, OFFICIAL, Facts, Setting, resolve

if TYPE_CHECKING:
    import lightning as L

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.images import ImageSet

IMAGES_MEASURED = 32  # for the size of the images


def settle_precision(asked: PretrainConfig) -> PretrainConfig:
    """Return the options with --precision resolved; a begun run keeps its own."""
    if asked.precision != AUTO:
        return asked
    folder = Path(asked.output_dir)
    begun = bool(checkpoints_of(folder))
    precision = read_config(folder).precision if begun else resolve_precision(asked)
    return dataclasses.replace(asked, precision=precision)


def settle(asked: PretrainConfig, images: ImageSet, trainer: L.Trainer) -> RunConfig:
    """Return the options of the run: what is `auto` is as in the run in --output_dir, or resolved.

    Args:
        asked: what was asked for.
        images: what the run trains on.
        trainer: knows the processes and the device.

    Raises:
        UserError: options cannot be resolved; the message names the flag.
    """
    folder, autos = Path(asked.output_dir), auto_options(asked)
    if checkpoints_of(folder):
        before = read_config(folder)
        return as_run(asked, **{name: getattr(before, name) for name in autos})
    if not autos:
        return as_run(asked)
    config, settings = resolve(asked, _facts(asked, images, trainer))
    if settings:
        say(table(settings))
    return config


def _facts(asked: PretrainConfig, images: ImageSet, trainer: L.Trainer) -> Facts:
    device, processes = trainer.strategy.root_device, trainer.world_size

    def fits(config: RunConfig) -> bool:
        needed = memory_estimate(config, asked.precision)
        return needed <= MEMORY_SHARE * memory_there(device)

    def rate(config: RunConfig) -> float:
        if processes > 1:
            raise UserError(
                f"--epochs is auto and the run has {processes} processes, each of which would "
                "measure another rate; set --epochs"
            )
        return images_per_second(config, images, device, asked.precision)

    return Facts(
        images=len(images),
        side=_median_side(images),
        on_cpu=device.type == "cpu",
        processes=processes,
        fits=fits,
        images_per_second=rate,
    )


def _median_side(images: ImageSet) -> int:
    """The median of the shorter sides of some images, in pixels.

    Raises:
        UserError: none of them can be read.
    """
    sides = []
    looked_at = np.unique(np.linspace(0, len(images) - 1, IMAGES_MEASURED).astype(int))
    for index in looked_at:
        try:
            sides.append(min(images.read(int(index)).shape[1:]))
        except (OSError, ImageError) as error:
            reason = f"{images.name(int(index))}: {one_line(error)}"
    if not sides:
        raise UserError(
            f"none of {len(looked_at)} images can be read ({reason}); is --data_path right?"
        )
    return int(np.median(sides))


def table(settings: list[Setting]) -> str:
    """Resolved settings in lines: option, value, why; those that are official's in one."""
    own = [setting for setting in settings if setting.value != getattr(OFFICIAL, setting.option)]
    rows = [(f"--{setting.option}", _typed(setting.value), setting.why) for setting in own]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"  {o:{widths[0]}}  {v:{widths[1]}}  {why}" for o, v, why in rows]
    others = [f"{s.option} {_typed(s.value)}" for s in settings if s not in own]
    if others:
        lines.append(f"  as official DINO: {', '.join(others)}")
    return "\n".join(["Resolved settings (a flag sets another value):", *lines])


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
