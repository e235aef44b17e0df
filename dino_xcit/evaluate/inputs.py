"""What an evaluation opens: weights and baselines, images of both splits, the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data.framing import Transform, default_resize
from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_files import FileFeatures
from dino_xcit.evaluate.features import (
    FeatureExtractor,
    Features,
    FrozenFeatures,
    Pixels,
    Take,
    class_features,
)
from dino_xcit.runtime import require_folder, resolve_precision, say
from dino_xcit.weights.load import build, load_backbone, read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightning.fabric import Fabric

    from dino_xcit.model.backbone import Backbone

Config = TypeVar("Config", bound=EvalConfig)


# -- the task ----------------------------------------------------------------------------------


class Task(NamedTuple):
    """Hooks that differ between classification and segmentation."""

    open: Callable[[Any], tuple[Mapping[str, ImageSet], dict[str, int]]]
    """config -> images of each split, and the classes' labels by name"""
    take: Take
    """computes the features that are evaluated"""
    pixels: Callable[[Backbone], Backbone]
    """backbone -> the baseline whose features are raw pixels"""


def open_splits(config: EvalConfig) -> tuple[dict[str, ImageSet], dict[str, int]]:
    """Open training and validation images with common labels.

    Returns:
        The images of each split, and the classes' labels by name.

    Raises:
        UserError: There are no images, or they have no labels.
    """
    named = config.dataset is not None
    where = f"--dataset {config.dataset}" if named else f"--data_path {config.data_path}"
    train, validation = open_images(config, "train"), open_images(config, "validation")
    assert train is not None
    if validation is None:
        raise UserError(f"{where} has no validation images; expected val/ beside train/")
    for name, images in (("training", train), ("validation", validation)):
        in_one_folder = not named and "" in (images.classes or {})
        # A validation folder of one class has no labels yet: it gets those of the training images.
        may_lack_labels = name == "validation" and not named
        if in_one_folder or (images.labels is None and not may_lack_labels):
            raise UserError(
                f"the {name} images of {where} have no labels; expected a folder for each class"
            )
    classes = train.classes or {}
    if not named and validation.classes != train.classes:
        # Each split numbers its own classes, so both are opened again with the classes of both.
        names = sorted({*classes, *(validation.classes or {})})
        classes = {name: label for label, name in enumerate(names)}
        train = open_images(config, "train", classes)
        validation = open_images(config, "validation", classes)
        assert train is not None
        assert validation is not None
    assert train.labels is not None
    assert validation.labels is not None
    if min(validation.labels.min(), train.labels.min()) < 0:
        raise UserError(f"{where} has negative labels, which stand for labels that are kept secret")
    unseen = np.setdiff1d(validation.labels, train.labels)
    if len(unseen):
        say(
            f"{len(unseen)} classes of the validation images have no training images: "
            "they count as wrong"
        )
    return {"train": train, "validation": validation}, classes


CLASSIFICATION = Task(open_splits, class_features, lambda _: Pixels())


# -- everything an evaluation needs ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs(Generic[Config]):
    """What an evaluation works on."""

    config: Config
    """resolved"""
    features: list[Features]
    """of the weights, then of the baselines"""
    class_names: dict[int, str]
    """by label"""


@contextlib.contextmanager
def open_inputs(
    config: Config, fabric: Fabric, task: Task = CLASSIFICATION
) -> Iterator[Inputs[Config]]:
    """Open weights, baselines and images; features are extracted when they are first used.

    With `--no_cache` the features are deleted at the end of the context.

    Raises:
        UserError: Weights do not load, or images are missing or have no labels.
    """
    if isinstance(config, ClassificationConfig) and config.load_features is not None:
        files = FileFeatures(config)
        yield Inputs(config, [files], files.classes)
        fabric.barrier()
        return
    assert config.weights is not None
    backbone = load_backbone(config.weights, config.arch, config.checkpoint_key)
    config, images_seed = resolve(config, backbone.metadata)
    assert config.image_size is not None
    assert config.resize_size is not None
    images, classes = task.open(dataclasses.replace(config, seed=images_seed))
    networks = [(config.weights or "", backbone)]
    if config.baselines:
        networks += baselines(config, backbone, task.pixels(backbone))
    transform = Transform(config.image_size, config.resize_size, config.mean, config.std)
    precision = resolve_precision(config)
    with _feature_cache(config, fabric) as cache:
        features: list[Features] = [
            FrozenFeatures(
                name,
                config,
                fabric,
                dict(images),
                FeatureExtractor(network, transform, fabric.device, precision, task.take),
                cache,
            )
            for name, network in networks
        ]
        yield Inputs(config, features, {label: name for name, label in classes.items()})
        fabric.barrier()


@contextlib.contextmanager
def _feature_cache(config: EvalConfig, fabric: Fabric) -> Iterator[Path]:
    """The cache folder; with `--no_cache` one that all processes share and that is deleted."""
    if not config.no_cache:
        cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache()
        require_folder(cache, "cache_dir")
        yield cache
    elif fabric.is_global_zero:
        with tempfile.TemporaryDirectory(prefix="dino_xcit_") as folder:
            yield Path(fabric.broadcast(folder))
    else:
        yield Path(fabric.broadcast(""))


def default_cache() -> Path:
    """Return the cache folder without `--cache_dir`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_xcit"


def baselines(
    config: EvalConfig, backbone: Backbone, pixels: Backbone
) -> list[tuple[str, Backbone]]:
    """Networks that a pretrained one must beat, by name: raw pixels, and itself untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        untrained = build(backbone.metadata)
    return [("raw pixels", pixels), (f"{backbone.arch}, untrained", untrained)]


# -- defaults from the weights -----------------------------------------------------------------


def resolve(config: Config, metadata: Mapping[str, Any]) -> tuple[Config, int]:
    """Fill in the options that the weights determine.

    Args:
        config: Options as typed.
        metadata: The backbone's.

    Returns:
        The config with channels, sizes, mean and std, and the run's own data if no other are named;
        and the seed of the images, which is the run's if they are the shapes of its pretraining.

    Raises:
        UserError: Options do not fit the weights, or no data are known.
    """
    defaults = PretrainConfig()
    in_chans = config.in_chans or metadata.get("in_chans", defaults.in_chans)
    image_size = config.image_size or metadata.get("global_crops_size", defaults.global_crops_size)
    resize_size = config.resize_size or default_resize(image_size)
    if resize_size < image_size:
        raise UserError(f"--resize_size {resize_size} is smaller than --image_size {image_size}")
    mean = config.mean or tuple(metadata.get("mean", defaults.mean))
    std = config.std or tuple(metadata.get("std", defaults.std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            raise UserError(
                f"--{name} {values} does not have one value per channel (--in_chans {in_chans})"
            )
    resolved = dataclasses.replace(
        config,
        in_chans=in_chans,
        image_size=image_size,
        resize_size=resize_size,
        mean=mean,
        std=std,
    )
    if config.data_path is None and config.dataset is None:
        return _with_the_runs_images(resolved)
    return resolved, config.seed


def _with_the_runs_images(config: Config) -> tuple[Config, int]:
    """The config with the images of the run that the weights are from, and the images' seed."""
    run = read_run(config.weights or "")
    if run is None:
        raise UserError(
            "expected --data_path or --dataset: the weights are not in a run folder, "
            "whose images would be the default"
        )
    dataset = run.dataset or (None if run.data_path else "shapes")
    config = dataclasses.replace(config, data_path=run.data_path, dataset=dataset)
    if dataset != "shapes":
        return config, config.seed
    return dataclasses.replace(config, num_images=config.num_images or run.num_images), run.seed
