"""What a checkpoint and the run that continues it have to agree in: options, images and steps."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dino_xcit.config.pretrain import differing_options
from dino_xcit.data.arrays import ArraySet
from dino_xcit.data.folder import FolderSet
from dino_xcit.data.images import Subset
from dino_xcit.data.joined import JoinedSet
from dino_xcit.data.shards import ShardSet
from dino_xcit.errors import UserError
from dino_xcit.run_folder import from_plain, read_config
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.train.schedules import Schedules

SIZES_COMPARED = 1_000  # files, evenly spaced: asking for the size of each takes long on NFS
DIFFERENCES = {
    "names": "have other file names",
    "sizes": "are other files of the same names",
    "labels": "have other classes",
}


def images_record(images: ImageSet) -> dict[str, Any]:
    """Return what identifies the images wherever their folder lies, as a checkpoint holds it.

    Returns:
        `count`, and hashes of `names` (below the folder) and `sizes` of files, if there are files,
        and of `labels`.
    """
    files = _files(images)
    count = files.number
    spaced = np.unique(np.linspace(0, max(0, count - 1), SIZES_COMPARED).astype(int)).tolist()
    labels = [] if images.labels is None else images.labels.tolist()
    return {
        "count": len(images),
        "names": _digest(files.name(index) for index in range(count)),
        "sizes": _digest(files.size(index) for index in spaced if count),
        "labels": _digest(labels),
    }


class _Files(NamedTuple):
    """The files of a set; none for sets of other sources."""

    number: int
    name: Callable[[int], str]
    """below the folder of all"""
    size: Callable[[int], int | None]


def _files(images: ImageSet) -> _Files:
    if isinstance(images, Subset):
        files, indices = _files(images.images), images.indices.tolist()
        count = len(indices) if files.number else 0
        return _Files(count, lambda i: files.name(indices[i]), lambda i: files.size(indices[i]))
    if isinstance(images, JoinedSet):
        return _files_of_all(images)
    if isinstance(images, ArraySet):
        path, bytes_of_all = images.path.name, _size(str(images.path))
        return _Files(len(images), lambda _: path, lambda _: bytes_of_all)
    if isinstance(images, ShardSet):
        sizes = images.size
        return _Files(len(images), images.name_below_folder, lambda i: int(sizes[i]))
    if isinstance(images, FolderSet):
        paths, root = images.files, str(images.folder)
        return _Files(
            len(paths), lambda i: os.path.relpath(paths[i], root), lambda i: _size(paths[i])
        )
    return _Files(0, lambda _: "", lambda _: None)


def _files_of_all(images: JoinedSet) -> _Files:
    every = [_files(one) for one in images.sets]

    def name(index: int) -> str:
        number, own = images.place(index)
        return f"{number}/{every[number].name(own)}"

    def size(index: int) -> int | None:
        number, own = images.place(index)
        return every[number].size(own)

    return _Files(len(images) if all(files.number for files in every) else 0, name, size)


def _size(file: str) -> int | None:
    try:
        return Path(file).stat().st_size
    except OSError:
        return None


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def require_same_run(
    checkpoint: Path, config: RunConfig, images: ImageSet, schedules: Schedules
) -> None:
    """Check that this config on these images continues the run of the checkpoint.

    Checkpoints of earlier versions, which have no record of the images, are checked without it.

    Raises:
        UserError: it is another run; the message names what differs and what to do.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    folder = checkpoint.parent.parent
    before = from_plain(saved["config"]) if "config" in saved else read_config(folder)
    _require_same_options(folder, before, config)
    if "images" in saved:
        _require_same_images(folder, saved["images"], images_record(images))
    else:
        _require_same_schedule(folder, saved, dataclasses.replace(schedules, config=before))
    if before.epochs != config.epochs:
        _describe_extension(before, config, schedules, saved["global_step"])
    # Another total batch is refused when the checkpoint is loaded.
    same_batch = saved.get("total_batch") == schedules.total_batch
    if same_batch and saved["global_step"] > schedules.steps:
        raise UserError(
            f"--output_dir {folder} holds a run at step {saved['global_step']}, but {len(images)} "
            f"images are {schedules.steps} steps: give it the images of before with --data_path, "
            "or name another --output_dir"
        )


def _require_same_options(folder: Path, before: RunConfig, now: RunConfig) -> None:
    differing = differing_options(before, now)
    if before.precision == "auto":  # of an earlier version, which did not settle it
        differing.pop("precision", None)
    longer = now.epochs > before.epochs
    if longer and now.extend:
        differing.pop("epochs")
    if not differing:
        return
    changes = ", ".join(f"--{name} was {old}, now {new}" for name, (old, new) in differing.items())
    way_out = "name another --output_dir"
    if longer and set(differing) == {"epochs"}:
        way_out = f"--extend continues it to --epochs {now.epochs}, or {way_out}"
    raise UserError(f"--output_dir {folder} holds a run of other options: {changes}; {way_out}")


def _require_same_images(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before == now:
        return
    if before["count"] != now["count"]:
        difference = f"{before['count']} images, now there are {now['count']}"
    else:
        kind = next(kind for kind in DIFFERENCES if before[kind] != now[kind])
        difference = f"other images: now the {now['count']} images {DIFFERENCES[kind]}"
    raise UserError(
        f"--output_dir {folder} holds a run on {difference}. Give it the images of before with "
        f"--data_path and --num_images; or start a run on these from its weights with "
        f"--init_weights {folder} and another --output_dir"
    )


def _require_same_schedule(folder: Path, saved: dict[str, Any], schedules: Schedules) -> None:
    """Check a checkpoint of an earlier version, which has no record of the images, by its steps.

    The learning rate of its last step depends on the steps of an epoch. An imported run has none.
    """
    step, states = saved["global_step"], saved.get("optimizer_states")
    lr = states[0]["param_groups"][0]["lr"] if states else 0.0
    same_batch = saved.get("total_batch") == schedules.total_batch
    if lr and step and same_batch and not math.isclose(lr, schedules.lr(step - 1), rel_tol=1e-6):
        raise UserError(
            f"--output_dir {folder} holds a run on another number of images: its learning rate at "
            f"step {step} was {lr:.4g}, of these images it is {schedules.lr(step - 1):.4g}. Give "
            "it the images of before with --data_path and --num_images, or name another "
            "--output_dir"
        )


def _describe_extension(
    before: RunConfig, config: RunConfig, schedules: Schedules, step: int
) -> None:
    """Print what more epochs do to the schedules, from the last step to the next."""
    then = dataclasses.replace(schedules, config=dataclasses.replace(config, epochs=before.epochs))
    last = max(0, step - 1)
    say(
        f"extended from {before.epochs} to {config.epochs} epochs: from step {step} on, all "
        f"schedules are those of a run of {config.epochs} epochs; learning rate "
        f"{then.lr(last):.3g} -> {schedules.lr(step):.3g}, weight decay "
        f"{then.weight_decay(last):.3g} -> {schedules.weight_decay(step):.3g}, teacher's momentum "
        f"{then.momentum(last):.4g} -> {schedules.momentum(step):.4g}"
    )
