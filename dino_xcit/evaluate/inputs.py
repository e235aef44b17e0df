"""What is evaluated: weights, baselines, images of both splits."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data.framing import Transform, default_resize
from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import (
    FeatureExtractor,
    FileFeatures,
    FrozenFeatures,
    Pixels,
    Take,
    class_features,
)
from dino_xcit.runtime import require_folder, resolve_precision, say
from dino_xcit.weights.load import build, load_backbone, read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.fabric import Fabric

    from dino_xcit.model.backbone import Backbone

Config = TypeVar("Config", bound=EvalConfig)


@contextlib.contextmanager
def subjects(
    config: Config, fabric: Fabric, task: Task | None = None
) -> Iterator[tuple[Config, list[Any], dict[int, str]]]:
    """The resolved config, what is to be evaluated (the weights, then the baselines), and the classes' names by label.

    task: else `CLASSIFICATION`.
    Raises ValueError, naming the flag, for weights that do not load and images that are not there or have no labels.
    """
    if isinstance(config, ClassificationConfig) and config.load_features is not None:
        files = FileFeatures(config)
        yield config, [files], files.classes
        return
    assert config.weights is not None
    backbone = load_backbone(config.weights, config.arch, config.checkpoint_key)
    config, images_seed = resolve(config, backbone.metadata)
    task = task or CLASSIFICATION
    images, classes = task.open(dataclasses.replace(config, seed=images_seed))
    transform = Transform(config.image_size, config.resize_size, config.mean, config.std)  # type: ignore[arg-type]
    named = [(str(config.weights), backbone)]
    if config.baselines:
        named += baselines(config, backbone, task.pixels(backbone))
    with contextlib.ExitStack() as stack:
        if not config.no_cache:
            cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache()
            require_folder(cache, "cache_dir")
        else:
            made = (
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dino_xcit_"))
                if fabric.is_global_zero
                else ""
            )
            cache = Path(fabric.broadcast(made))
        precision = resolve_precision(config)
        yield (
            config,
            [
                FrozenFeatures(
                    name,
                    config,
                    fabric,
                    images,
                    FeatureExtractor(network, transform, fabric.device, precision, task.take),
                    cache,
                )
                for name, network in named
            ],
            {label: name for name, label in classes.items()},
        )
        fabric.barrier()


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_xcit"


def baselines(
    config: EvalConfig, backbone: Backbone, pixels: Backbone
) -> list[tuple[str, Backbone]]:
    """What a pretrained network must beat."""
    rows: list[tuple[str, Backbone]] = [("raw pixels", pixels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rows.append((f"{backbone.arch}, untrained", build(backbone.metadata)))
    return rows


def resolve(config: Config, metadata: dict[str, Any]) -> tuple[Config, int]:
    """Fill in what the weights say: channels, sizes, mean and std; and the run's own data if no other are named.

    Also the seed of the images, which is the run's if they are the shapes that it drew.
    """
    images_seed = config.seed
    defaults = PretrainConfig()
    in_chans = config.in_chans or metadata.get("in_chans", defaults.in_chans)
    image_size = config.image_size or metadata.get("global_crops_size", defaults.global_crops_size)
    resize_size = config.resize_size or default_resize(image_size)
    if resize_size < image_size:
        raise UserError(f"--resize_size {resize_size} is smaller than --image_size {image_size}")
    resolved: dict[str, Any] = {
        "in_chans": in_chans,
        "image_size": image_size,
        "resize_size": resize_size,
    }
    for name in ("mean", "std"):
        resolved[name] = getattr(config, name) or tuple(metadata.get(name, getattr(defaults, name)))
        if len(resolved[name]) != in_chans:
            raise UserError(
                f"--{name} {resolved[name]} does not have one value per channel (--in_chans {in_chans})"
            )
    if config.data_path is None and config.dataset is None:
        run = read_run(config.weights or "")
        if run is None:
            raise UserError(
                "expected --data_path or --dataset: the weights are not in a run folder that would name its own"
            )
        resolved |= {
            "data_path": run.data_path,
            "dataset": run.dataset or (None if run.data_path else "shapes"),
        }
        if resolved["dataset"] == "shapes":
            images_seed = run.seed
            resolved["num_images"] = config.num_images or run.num_images
    return dataclasses.replace(config, **resolved), images_seed


def open_splits(config: EvalConfig) -> tuple[dict[str, ImageSet], dict[str, int]]:
    """Training and validation images under common labels, and these labels by the classes' names."""
    where = (
        f"--data_path {config.data_path}"
        if config.dataset is None
        else f"--dataset {config.dataset}"
    )
    train, validation = open_images(config, "train"), open_images(config, "validation")
    if validation is None:
        raise UserError(f"{where} has no validation images; expected val/ beside train/")
    assert train is not None
    for name, opened in (("training", train), ("validation", validation)):
        in_one_folder = config.dataset is None and "" in (opened.classes or {})
        if in_one_folder or (
            opened.labels is None and (name == "training" or config.dataset is not None)
        ):
            raise UserError(
                f"the {name} images of {where} have no labels; expected a folder for each class"
            )
    classes = train.classes or {}
    if config.dataset is None and validation.classes != train.classes:
        # Labels count the classes of a split, so both are read again with those of either.
        names = sorted({*classes, *(validation.classes or {})})
        classes = {name: label for label, name in enumerate(names)}
        train, validation = (
            open_images(config, "train", classes),
            open_images(config, "validation", classes),
        )
        assert train is not None
        assert validation is not None
    images = {"train": train, "validation": validation}
    if min(validation.labels.min(), train.labels.min()) < 0:  # type: ignore[union-attr]
        raise UserError(f"{where} has negative labels, which stand for labels that are kept secret")
    unseen = np.setdiff1d(validation.labels, train.labels)  # type: ignore[arg-type]
    if len(unseen):
        say(
            f"{len(unseen)} classes of the validation images have no training images: they count as wrong"
        )
    return images, classes


class Task(NamedTuple):
    """What kinds of evaluation differ in."""

    open: Callable[[Any], tuple[dict[str, Any], dict[str, int]]]
    """a config -> the images of both splits, and the classes' labels by name"""
    take: Take
    """what of a network is evaluated"""
    pixels: Callable[[Any], nn.Module]
    """a backbone -> the network whose features are raw pixels"""


CLASSIFICATION = Task(open_splits, class_features, lambda backbone: Pixels())
