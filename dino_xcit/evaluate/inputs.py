"""What an evaluation opens: weights and baselines, images of both splits, the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.census import report_left_out
from dino_xcit.data.folder import paths_of
from dino_xcit.data.framing import Transform, default_resize
from dino_xcit.data.images import (
    ImageSet,
    Subset,
    held_out,
    open_images,
    require_images,
    sampled,
    source_of,
)
from dino_xcit.data.splits import NoImagesError, NoTrainingImagesError
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
from dino_xcit.runtime import default_cache, require_folder, resolve_precision, say
from dino_xcit.weights.build import build
from dino_xcit.weights.config_json import FLAGS, with_assumed
from dino_xcit.weights.load import load_backbone, read_run

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

    Without a folder of validation images, `--val_fraction` holds out some of the training images.
    With `linear-eval --evaluate`, which does not train, there may be no training images.

    Returns:
        The images of each split, and the classes' labels by name.

    Raises:
        UserError: There are no images, or their labels cannot be scored.
    """
    fraction: float | None = getattr(config, "val_fraction", None)
    train, validation = _training_images(config), open_images(config, "validation")
    where = _where(config)
    if fraction is not None and train is not None:
        if validation is not None:
            raise UserError(f"--val_fraction {fraction:g}: {where} has validation images already")
        train, validation = _hold_out(config, fraction)
    if validation is None:
        expected = (
            "val/ beside train/, or --val_fraction 0.2 to hold out some of the training images"
        )
        if getattr(config, "evaluate", None) is not None:
            expected = (
                "the images to score in val/, a folder for each class, or --val_fraction and "
                "--seed as the head was trained with"
            )
        raise UserError(f"{where} has no validation images; expected {expected}")
    if config.dataset is not None:
        classes = (train or validation).classes or {}
    else:
        train, validation, classes = _with_common_labels(config, train, validation)
    train = train or Subset(validation, np.arange(0))
    for name, images in (("training", train), ("validation", validation)):
        if images.labels is None:
            expected = "a folder for each class" if config.dataset is None else "--target_key"
            raise UserError(f"the {name} images of {where} have no labels; expected {expected}")
    _check_labels(where, train, validation)
    report_left_out(train, validation)
    return {"train": train, "validation": validation}, classes


def _where(config: EvalConfig) -> str:
    if config.dataset is not None:
        return f"--dataset {config.dataset}"
    return f"--data_path {' '.join(paths_of(config))}"


def _training_images(config: EvalConfig) -> ImageSet | None:
    """The training images, or None if they are neither there nor needed."""
    try:
        return open_images(config, "train")
    except NoTrainingImagesError:
        if getattr(config, "evaluate", None) is None:
            raise
        return None
    except NoImagesError as error:
        run = read_run(config.weights or "")
        if run is None or run.dataset is None:
            raise
        raise UserError(
            f"{error}; the run of --weights {config.weights} used --dataset {run.dataset}"
        ) from None


def _hold_out(config: EvalConfig, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Divide the training images, class by class, by the seed; --num_images is then applied."""
    every = open_images(dataclasses.replace(config, num_images=None), "train")
    assert every is not None
    train, validation = held_out(every, fraction, config.seed)
    say(
        f"{len(validation)} of the {len(every)} images, {fraction:.3g} of each class, are held out "
        f"by --seed {config.seed} as validation images"
    )
    if config.num_images:
        require_images(config.num_images, len(train))
        train = sampled(train, config.num_images, config.seed)
    return train, validation


def _with_common_labels(
    config: EvalConfig, train: ImageSet | None, validation: ImageSet
) -> tuple[ImageSet | None, ImageSet, dict[str, int]]:
    """Number the classes of a folder's splits alike.

    Raises:
        UserError: Images lie outside of class folders, or the splits have no class in common.
    """
    where = _where(config)
    sides = {"training": train, "validation": validation}
    for name, images in sides.items():
        if images is not None and "" in (images.classes or {}):
            raise UserError(
                f"the {name} images of {where} have no labels; expected a folder for each class"
            )
    of_train, of_validation = (
        set(images.classes or {}) if images is not None else set() for images in sides.values()
    )
    if train is not None and len(of_train | of_validation) == 1:
        raise UserError(
            f"{where} has one class, {next(iter(of_validation))}/, so every score would be 100 %; "
            "expected a folder for each class"
        )
    if of_train == of_validation:
        return train, validation, validation.classes or {}
    if train is None:  # the only class of a head's validation images is a class
        classes = validation.classes or {}
        return None, open_images(config, "validation", classes) or validation, classes
    if not of_train & of_validation:
        raise UserError(
            f"the splits of {where} have no class in common: training {_first(of_train)}, "
            f"validation {_first(of_validation)}; expected the same folders in both"
        )
    # Each split numbers its own classes, so both are opened again with the classes of both.
    classes = {name: label for label, name in enumerate(sorted(of_train | of_validation))}
    common_train = open_images(config, "train", classes)
    common_validation = open_images(config, "validation", classes)
    assert common_train is not None
    assert common_validation is not None
    return common_train, common_validation, classes


def _first(names: set[str]) -> str:
    """`cat, dog, emu, ...`."""
    return ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])])


def _check_labels(where: str, train: ImageSet, validation: ImageSet) -> None:
    """Refuse labels that are kept secret; report classes that no training image has."""
    assert train.labels is not None
    assert validation.labels is not None
    if min(validation.labels.min(), train.labels.min(initial=0)) < 0:
        raise UserError(f"{where} has negative labels, which stand for labels that are kept secret")
    unseen = np.setdiff1d(validation.labels, train.labels)
    if len(unseen) and len(train):
        say(
            f"{len(unseen)} classes of the validation images have no training images: "
            "they count as wrong"
        )


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
    backbone = load_backbone(config.weights, config.arch, config.checkpoint_key, config.image_size)
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
        and the seed of the images, which is the run's if its own images are generated.

    Raises:
        UserError: Options do not fit the weights, or no data are known.
    """
    in_chans = config.in_chans or metadata.get("in_chans", RunConfig().in_chans)
    given = [flag for flag in FLAGS if getattr(config, flag)]
    known = with_assumed({**metadata, "in_chans": in_chans}, f"--weights {config.weights}", given)
    image_size = config.image_size or known["global_crops_size"]
    resize_size = config.resize_size or default_resize(image_size)
    if resize_size < image_size:
        raise UserError(f"--resize_size {resize_size} is smaller than --image_size {image_size}")
    mean = config.mean or tuple(known["mean"])
    std = config.std or tuple(known["std"])
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
    config = dataclasses.replace(
        config,
        data_path=run.data_path,
        dataset=dataset,
        input_key=run.input_key,
        target_key=run.target_key,
    )
    if not source_of(config).generated:
        return config, config.seed
    return dataclasses.replace(config, num_images=config.num_images or run.num_images), run.seed
