"""Frozen backbone + images -> features. The evaluation transform is official DINO's: resize the short side, centre crop.

Features go batch by batch into a store, in memory or on disk, which knows the rows that are done. So a pass that was
interrupted goes on, several processes share one, and no set of images is too large for the memory.
Axes: n images, P parts (what `XCiT.layer_features` gives; 1 for other networks), C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dino_xcit
from dino_xcit.config import ClassificationConfig, EvalConfig, PretrainConfig
from dino_xcit.crops import resize
from dino_xcit.data import ImageSet, default_workers, fingerprint, leave_signals_to_the_parent, open_images, surviving
from dino_xcit.machine import HALF, progress, require_folder, resolve_precision, say, summed
from dino_xcit.run_folder import replacing
from dino_xcit.weights import build, load_backbone, read_run
from dino_xcit.xcit import ABLATIONS, XCiT

Config = TypeVar("Config", bound=EvalConfig)
SMALL = 96  # below this side nothing is cut off: small images are framed already
WORTH_WORKERS = 5000  # images; starting workers for fewer costs more than it saves
ROWS = 65536  # features looked at in one go
PIXELS = 32  # side of the images whose raw pixels are a baseline
NOT_DONE, DONE, UNREADABLE = 0, 1, 2
OFFICIAL_FILES = {"train": ("trainfeat.pth", "trainlabels.pth"), "validation": ("testfeat.pth", "testlabels.pth")}


# -- images ----------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """How an image is framed and normalised."""

    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def default_resize(image_size: int) -> int:
    """8 / 7 of the crop (256 for 224); small images are not cut."""
    return image_size * 8 // 7 if image_size >= SMALL else image_size


def centre_crop(image: Tensor, size: int, short_side: int, resized: Callable[[Tensor, int, int], Tensor] = resize) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, size, size): the short side resized, then the centre. resized: (1, C, H, W) to a size."""
    _, H, W = image.shape
    image = resized(image[None], H * short_side // min(H, W), W * short_side // min(H, W))[0]
    top, left = (round((side - size) / 2) for side in image.shape[1:])  # halves to the even number, as in torchvision
    return image[:, top : top + size, left : left + size]


class EvalDataset(Dataset[tuple[Tensor, bool]]):
    """Images of a set by number, framed: uint8 (C, size, size), and whether the image could be read."""

    def __init__(self, images: ImageSet, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        size = self.transform.image_size
        try:
            return centre_crop(self.images.read(index), size, self.transform.resize_size), True
        except (OSError, ValueError):
            return torch.zeros(len(self.transform.mean), size, size, dtype=torch.uint8), False


# -- backbone --------------------------------------------------------------------------------------------------------


Take = Callable[[Any, Tensor], Tensor]


def class_features(network: Any, x: Tensor) -> Tensor:
    """What classifiers see: `XCiT.layer_features`, or the one feature of another network (B, 1, C)."""
    return network.layer_features(x) if isinstance(network, XCiT) else network(x)[:, None]


class Frozen:
    """A backbone as a function: framed uint8 images (B, C, S, S), on any device -> float32 features (B, P, C) on its own.

    take: (backbone, normalised images) -> features.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: Transform,
        device: torch.device,
        precision: str = "32-true",
        take: Take = class_features,
    ) -> None:
        self.backbone = backbone.to(device).eval()
        self.transform, self.device, self.precision, self.take = transform, device, precision, take
        self.offset = torch.tensor(transform.mean, device=device)[:, None, None]
        self.scale = torch.tensor(transform.std, device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = self.normalised(images)
        half = HALF.get(self.precision)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            return self.take(self.backbone, x).float()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 -> what the backbone takes."""
        return (images.to(self.device, non_blocking=True).float() / 255 - self.offset) / self.scale

    def shape(self) -> tuple[int, int]:
        """P and C. Raises ValueError if the network does not take such images."""
        size, channels = self.transform.image_size, len(self.transform.mean)
        try:
            parts, dim = self(torch.zeros(1, channels, size, size, dtype=torch.uint8)).shape[1:]
        except (ValueError, AssertionError, RuntimeError) as error:  # each network has its own
            raise ValueError(f"--image_size {size}: {' '.join(str(error).split())}") from error
        return parts, dim


class Pixels(nn.Module):
    """Baseline: the image itself, averaged down to at most 32 x 32."""

    def forward(self, x: Tensor) -> Tensor:
        side = min(PIXELS, x.shape[-1])
        return F.adaptive_avg_pool2d(x, side).flatten(1)


def part_slice(n_last_blocks: int, avgpool: bool, parts: int) -> slice:
    """Which of the P parts of a feature make up the choice. Raises ValueError if the network has no such parts."""
    layers = max(1, parts - 1)
    if n_last_blocks > layers:
        raise ValueError(f"--n_last_blocks {n_last_blocks}: this network has class tokens in {layers} layers")
    if avgpool and parts == 1:
        raise ValueError("--avgpool_patchtokens true: these features have no patch tokens")
    if avgpool and n_last_blocks < layers:
        return slice(0, parts, layers)
    return slice(0, n_last_blocks + avgpool)


# -- store -----------------------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """Features (n, P, C) and the state of each row: NOT_DONE, DONE or UNREADABLE, uint8 (n,)."""

    features: np.ndarray
    state: np.ndarray

    @classmethod
    def in_memory(cls, shape: tuple[int, ...], dtype: str = "float32") -> Store:
        return cls(np.zeros(shape, dtype), np.zeros(shape[0], np.uint8))

    @classmethod
    def on_disk(cls, folder: Path, shape: tuple[int, ...], dtype: str) -> Store:
        """Memory-mapped files in the folder: those that are there, else new ones."""
        folder.mkdir(parents=True, exist_ok=True)
        features, state = folder / "features.npy", folder / "state.npy"
        if not (_holds(features, shape, dtype) and _holds(state, shape[:1], "uint8")):
            for path in (state, features):  # in this order: no old state beside new features
                path.unlink(missing_ok=True)
            for path, dims, kind in ((features, shape, dtype), (state, shape[:1], "uint8")):
                with replacing(path) as beside:
                    np.lib.format.open_memmap(beside, "w+", kind, dims).flush()
                    _reserve(beside)
        return cls(*(np.lib.format.open_memmap(path, "r+") for path in (features, state)))

    def mark(self, rows: np.ndarray, readable: np.ndarray) -> None:
        """The rows are written. On disk they are flushed first: no row is marked that a dying machine could lose."""
        for array in self:
            if array is self.state:
                array[rows] = np.where(readable, DONE, UNREADABLE)
            if isinstance(array, np.memmap):
                array.flush()


def _reserve(path: Path) -> None:
    """Take the space now, while a full disk is an error and not yet the end of the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _holds(path: Path, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether the file is whole and holds such an array."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == dtype


def extract(
    frozen: Callable[[Tensor], Tensor],
    dataset: Dataset[Any],
    rows: np.ndarray,
    store: Store,
    *,
    batch_size: int,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
    description: str | None = None,
) -> int:
    """Fill the rows of the store that are not done with the features of these images of the dataset -> how many were made.

    Images that could not be read are tried again: what failed may have been the network.

    Row i of the store belongs to image rows[i]. share: the number of this process and of all; batches are cut the same
    whatever their number. description: of the progress bar; none without. Raises FloatingPointError if features are not
    finite.
    """
    batches = [np.arange(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    # Shared first: what is not done changes while other processes work.
    batches = [batch[store.state[batch] != DONE] for batch in batches[share[0] :: share[1]]]
    batches = [batch for batch in batches if len(batch)]

    def loaded_from(number: int) -> Iterator[Any]:
        loader = DataLoader(
            dataset,
            batch_sampler=[rows[batch].tolist() for batch in batches[number:]],  # type: ignore[arg-type]
            num_workers=min(num_workers, len(batches)),
            worker_init_fn=leave_signals_to_the_parent,
        )
        return iter(loader)

    made = sum(map(len, batches))
    with progress(made, description or "", "images", shown=description is not None and made > 0) as bar:
        for batch, (images, readable) in zip(batches, surviving(loaded_from), strict=True):
            with np.errstate(over="ignore"):
                features = frozen(images).cpu().numpy().astype(store.features.dtype)
            if not np.isfinite(features).all():
                raise FloatingPointError(f"features are not finite in {features.dtype}")
            store.features[batch] = features
            store.mark(batch, readable.numpy())
            bar.update(len(batch))
    return made


# -- one evaluation --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Features and labels of the readable images of one split."""

    features: Tensor
    """(n, P, C), may be memory-mapped"""
    labels: Tensor
    """int64 (n,)"""


@dataclasses.dataclass
class Subject:
    """A frozen backbone on the images of an evaluation: features of either split, made when first asked for."""

    name: str
    config: EvalConfig
    fabric: Fabric
    images: dict[str, ImageSet]
    frozen: Frozen
    cache: Path
    made: int = 0
    """images that went through the backbone"""
    seconds: float = 0.0
    """and how long that took"""
    unreadable: int = 0
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """P and C."""
        return self.frozen.shape()

    @functools.cached_property
    def key(self) -> str:
        """Differs between subjects whose training features do."""
        return digest_of(self._described("train"))

    def labels(self, split: str) -> Tensor:
        """Of the images whose features have been made, else of all images of the split."""
        if split in self.splits:
            return self.splits[split].labels
        labels = self.images[split].labels
        assert labels is not None
        return torch.from_numpy(labels.astype(np.int64))

    def split(self, name: str) -> Split:
        if name not in self.splits:
            self.splits[name] = self._extract(name)
        return self.splits[name]

    def _extract(self, split: str) -> Split:
        images, fabric = self.images[split], self.fabric
        described = self._described(split)
        dtype = described["dtype"]
        folder = self.cache / digest_of(described)
        shape = (len(images), *self.shape)
        if fabric.is_global_zero:
            try:
                Store.on_disk(folder, shape, dtype)
            except OSError as error:
                size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
                raise ValueError(f"--cache_dir {self.cache} cannot take {size:.2g} GiB of features: {error}") from None
            with replacing(folder / "about.json") as path:
                path.write_text(json.dumps(described, indent=1))
        fabric.barrier()
        store = Store.on_disk(folder, shape, dtype)
        workers = default_workers() if self.config.num_workers is None else self.config.num_workers
        start = time.perf_counter()
        try:
            made = extract(
                self.frozen,
                EvalDataset(images, self.frozen.transform),
                np.arange(len(images)),
                store,
                batch_size=self.config.batch_size_per_gpu,
                num_workers=workers if len(images) >= WORTH_WORKERS else 0,
                share=(fabric.global_rank, fabric.world_size),
                description=f"{self.name}, {split}" if fabric.is_global_zero else None,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"--weights {self.name}: {error}; a run that diverged?") from None
        fabric.barrier()
        total = int(summed(fabric, torch.tensor(made)))
        if total:
            self.made += total
            self.seconds += time.perf_counter() - start
        else:
            say(f"features of {self.name}, {split}: from {folder}")
        assert NOT_DONE not in store.state
        readable = store.state == DONE
        lost = np.flatnonzero(~readable)
        self.unreadable += len(lost)
        if len(lost) == len(images):
            raise ValueError(f"none of the {len(images)} images can be read, {images.name(0)} for one")
        if len(lost):
            say(f"{len(lost)} of {len(images)} images cannot be read and are left out, {images.name(int(lost[0]))} for one")
        features, labels = torch.from_numpy(store.features), self.labels(split)
        if not readable.all():
            features, labels = features[torch.from_numpy(readable)], labels[torch.from_numpy(readable)]
        return Split(features, labels)

    def _described(self, split: str) -> dict[str, Any]:
        """What features depend on: another value of any of these means other features."""
        dtype = self.config.feature_dtype
        if dtype == "auto":
            dtype = "float16" if self.frozen.precision in HALF else "float32"
        backbone = self.frozen.backbone
        about = getattr(backbone, "metadata", {})
        switches = [about.get(name) for name in ABLATIONS]  # which neither tensors nor modules always show
        digest = hashlib.sha256(f"{backbone} {switches}".encode())
        for tensor in backbone.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {
            "backbone": digest.hexdigest(),
            "features": self.frozen.take.__name__,
            "images": fingerprint(self.images[split]),
            "transform": list(self.frozen.transform),
            "precision": self.frozen.precision,
            "dtype": dtype,
            "device": self.frozen.device.type,
            "versions": [dino_xcit.__version__, torch.__version__, torchvision.__version__],
        }


def digest_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]


class FromFiles:
    """In a subject's place: features that official `eval_knn.py --dump_features` wrote."""

    made, seconds, unreadable = 0, 0.0, 0

    def __init__(self, config: ClassificationConfig) -> None:
        self.folder = Path(config.load_features or "")
        self.name = str(self.folder)
        self.splits = {name: self._load(*files) for name, files in OFFICIAL_FILES.items()}
        widths = [split.features.shape[2] for split in self.splits.values()]
        if widths[0] != widths[1]:
            raise ValueError(f"trainfeat.pth has {widths[0]} columns and testfeat.pth {widths[1]} in {self.folder}")
        # Labels may be any numbers; here they count the classes.
        classes = torch.unique(torch.cat([split.labels for split in self.splits.values()]))
        self.classes = {i: str(label) for i, label in enumerate(classes.tolist())}
        self.splits = {
            name: split._replace(labels=torch.searchsorted(classes, split.labels)) for name, split in self.splits.items()
        }

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.splits["train"].features.shape[1:])

    @property
    def key(self) -> str:
        stats = [(self.folder / name).stat() for files in OFFICIAL_FILES.values() for name in files]
        return digest_of([str(self.folder.resolve()), [(s.st_size, s.st_mtime_ns) for s in stats]])

    def labels(self, split: str) -> Tensor:
        return self.splits[split].labels

    def split(self, name: str) -> Split:
        return self.splits[name]

    def _load(self, features_file: str, labels_file: str) -> Split:
        tensors = []
        for name, dimensions in ((features_file, 2), (labels_file, 1)):
            try:
                tensor = torch.load(self.folder / name, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                expected = ", ".join(file for files in OFFICIAL_FILES.values() for file in files)
                raise ValueError(f"--load_features {self.folder} has no {name}; expected {expected}") from None
            except Exception as error:
                raise ValueError(
                    f"--load_features: {self.folder / name} is not a tensor file: {type(error).__name__}"
                ) from None
            if not isinstance(tensor, Tensor) or tensor.ndim != dimensions:
                raise ValueError(f"--load_features: {self.folder / name} does not hold a tensor of {dimensions} dimensions")
            tensors.append(tensor)
        if len(tensors[0]) != len(tensors[1]):
            raise ValueError(
                f"{features_file} has {len(tensors[0])} rows and {labels_file} {len(tensors[1])} in {self.folder}"
            )
        features, labels = tensors
        if not len(labels):
            raise ValueError(f"--load_features: {self.folder / features_file} is empty")
        if not all(bool(torch.isfinite(rows).all()) for rows in features.split(ROWS)):
            raise ValueError(f"--load_features: {self.folder / features_file} holds numbers that are not finite")
        if (labels.long() != labels).any() or labels.min() < 0:
            raise ValueError(f"--load_features: {self.folder / labels_file} does not hold whole numbers from 0")
        return Split(features[:, None], labels.long())


def dump_features(subject: Subject, parts: slice, folder: Path) -> None:
    """Write the four files of official `eval_knn.py --dump_features`: normalised features and labels of both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in OFFICIAL_FILES.items():
        features, labels = subject.split(name)
        features = F.normalize(features[:, parts].flatten(1).float(), dim=1)
        for file, tensor in zip(files, (features, labels), strict=True):
            with replacing(folder / file) as path:
                torch.save(tensor.clone(), path)


@contextlib.contextmanager
def subjects(config: Config, fabric: Fabric, task: Task | None = None) -> Iterator[tuple[Config, list[Any], dict[int, str]]]:
    """The resolved config, what is to be evaluated (the weights, then the baselines), and the classes' names by label.

    task: else `CLASSIFICATION`.
    Raises ValueError, naming the flag, for weights that do not load and images that are not there or have no labels.
    """
    if isinstance(config, ClassificationConfig) and config.load_features is not None:
        files = FromFiles(config)
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
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="dino_xcit_")) if fabric.is_global_zero else ""
            cache = Path(fabric.broadcast(made))
        precision = resolve_precision(config)
        yield (
            config,
            [
                Subject(name, config, fabric, images, Frozen(network, transform, fabric.device, precision, task.take), cache)
                for name, network in named
            ],
            {label: name for name, label in classes.items()},
        )
        fabric.barrier()


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_xcit"


def baselines(config: EvalConfig, backbone: nn.Module, pixels: nn.Module) -> list[tuple[str, nn.Module]]:
    """What a pretrained network must beat."""
    rows: list[tuple[str, nn.Module]] = [("raw pixels", pixels)]
    if isinstance(backbone, XCiT):
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
        raise ValueError(f"--resize_size {resize_size} is smaller than --image_size {image_size}")
    resolved: dict[str, Any] = {"in_chans": in_chans, "image_size": image_size, "resize_size": resize_size}
    for name in ("mean", "std"):
        resolved[name] = getattr(config, name) or tuple(metadata.get(name, getattr(defaults, name)))
        if len(resolved[name]) != in_chans:
            raise ValueError(f"--{name} {resolved[name]} does not have one value per channel (--in_chans {in_chans})")
    if config.data_path is None and config.dataset is None:
        run = read_run(config.weights or "")
        if run is None:
            raise ValueError(
                "expected --data_path or --dataset: the weights are not in a run folder that would name its own"
            )
        resolved |= {"data_path": run.data_path, "dataset": run.dataset or (None if run.data_path else "shapes")}
        if resolved["dataset"] == "shapes":
            images_seed = run.seed
            resolved["num_images"] = config.num_images or run.num_images
    return dataclasses.replace(config, **resolved), images_seed


def open_splits(config: EvalConfig) -> tuple[dict[str, ImageSet], dict[str, int]]:
    """Training and validation images under common labels, and these labels by the classes' names."""
    where = f"--data_path {config.data_path}" if config.dataset is None else f"--dataset {config.dataset}"
    train, validation = open_images(config, "train"), open_images(config, "validation")
    if validation is None:
        raise ValueError(f"{where} has no validation images; expected val/ beside train/")
    assert train is not None
    for name, opened in (("training", train), ("validation", validation)):
        in_one_folder = config.dataset is None and "" in (opened.classes or {})
        if in_one_folder or (opened.labels is None and (name == "training" or config.dataset is not None)):
            raise ValueError(f"the {name} images of {where} have no labels; expected a folder for each class")
    classes = train.classes or {}
    if config.dataset is None and validation.classes != train.classes:
        # Labels count the classes of a split, so both are read again with those of either.
        names = sorted({*classes, *(validation.classes or {})})
        classes = {name: label for label, name in enumerate(names)}
        train, validation = open_images(config, "train", classes), open_images(config, "validation", classes)
        assert train is not None
        assert validation is not None
    images = {"train": train, "validation": validation}
    if min(validation.labels.min(), train.labels.min()) < 0:  # type: ignore[union-attr]
        raise ValueError(f"{where} has negative labels, which stand for labels that are kept secret")
    unseen = np.setdiff1d(validation.labels, train.labels)  # type: ignore[arg-type]
    if len(unseen):
        say(f"{len(unseen)} classes of the validation images have no training images: they count as wrong")
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
