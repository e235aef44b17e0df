"""Frozen backbone + images -> features. The evaluation transform is official DINO's: resize the short side, centre crop.

Features go batch by batch into a store, in memory or on disk, which knows the rows that are done. So a pass that was
interrupted goes on, several processes share one, and no set of images is too large for the memory.
Axes: n images, P parts (what `XCiT.layer_features` gives; 1 for other networks), C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import dino_xcit
from dino_xcit.data.framing import EvalDataset, Transform
from dino_xcit.data.images import ImageSet, fingerprint
from dino_xcit.data.loader import default_workers
from dino_xcit.errors import NotFiniteError, UserError
from dino_xcit.evaluate.feature_store import DONE, NOT_DONE, WORTH_WORKERS, FeatureStore, extract
from dino_xcit.files import replacing
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.backbone import Backbone
from dino_xcit.runtime import HALF, say, summed

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig

ROWS = 65536  # features looked at in one go
PIXELS = 32  # side of the images whose raw pixels are a baseline
OFFICIAL_FILES = {
    "train": ("trainfeat.pth", "trainlabels.pth"),
    "validation": ("testfeat.pth", "testlabels.pth"),
}


# -- backbone --------------------------------------------------------------------------------------------------------


Take = Callable[[Any, Tensor], Tensor]


def class_features(network: Backbone, x: Tensor) -> Tensor:
    """What classifiers see: `XCiT.layer_features`, or the one feature of another network (B, 1, C)."""
    return network.layer_features(x)


class FeatureExtractor:
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
            raise UserError(f"--image_size {size}: {' '.join(str(error).split())}") from error
        return parts, dim


class Pixels(Backbone):
    """Baseline: the image itself, averaged down to at most 32 x 32."""

    arch = "raw pixels"
    metadata: ClassVar[dict[str, Any]] = {}

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Give the pixels, (B, C * side * side)."""
        side = min(PIXELS, images.shape[-1])
        return F.adaptive_avg_pool2d(images, side).flatten(1)


def part_slice(n_last_blocks: int, avgpool: bool, parts: int) -> slice:
    """Which of the P parts of a feature make up the choice. Raises ValueError if the network has no such parts."""
    layers = max(1, parts - 1)
    if n_last_blocks > layers:
        raise UserError(
            f"--n_last_blocks {n_last_blocks}: this network has class tokens in {layers} layers"
        )
    if avgpool and parts == 1:
        raise UserError("--avgpool_patchtokens true: these features have no patch tokens")
    if avgpool and n_last_blocks < layers:
        return slice(0, parts, layers)
    return slice(0, n_last_blocks + avgpool)


# -- one evaluation --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Features and labels of the readable images of one split."""

    features: Tensor
    """(n, P, C), may be memory-mapped"""
    labels: Tensor
    """int64 (n,)"""


@dataclasses.dataclass
class FrozenFeatures:
    """A frozen backbone on the images of an evaluation: features of either split, made when first asked for."""

    name: str
    config: EvalConfig
    fabric: Fabric
    images: dict[str, ImageSet]
    frozen: FeatureExtractor
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
                FeatureStore.on_disk(folder, shape, dtype)
            except OSError as error:
                size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
                raise UserError(
                    f"--cache_dir {self.cache} cannot take {size:.2g} GiB of features: {error}"
                ) from None
            with replacing(folder / "about.json") as path:
                path.write_text(json.dumps(described, indent=1))
        fabric.barrier()
        store = FeatureStore.on_disk(folder, shape, dtype)
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
            raise NotFiniteError(f"--weights {self.name}: {error}; a run that diverged?") from None
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
            raise UserError(
                f"none of the {len(images)} images can be read, {images.name(0)} for one"
            )
        if len(lost):
            say(
                f"{len(lost)} of {len(images)} images cannot be read and are left out, {images.name(int(lost[0]))} for one"
            )
        features, labels = torch.from_numpy(store.features), self.labels(split)
        if not readable.all():
            features, labels = (
                features[torch.from_numpy(readable)],
                labels[torch.from_numpy(readable)],
            )
        return Split(features, labels)

    def _described(self, split: str) -> dict[str, Any]:
        """What features depend on: another value of any of these means other features."""
        dtype = self.config.feature_dtype
        if dtype == "auto":
            dtype = "float16" if self.frozen.precision in HALF else "float32"
        backbone = self.frozen.backbone
        about = getattr(backbone, "metadata", {})
        switches = [
            about.get(name) for name in ABLATIONS
        ]  # which neither tensors nor modules always show
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


class FileFeatures:
    """In a subject's place: features that official `eval_knn.py --dump_features` wrote."""

    made, seconds, unreadable = 0, 0.0, 0

    def __init__(self, config: ClassificationConfig) -> None:
        self.folder = Path(config.load_features or "")
        self.name = str(self.folder)
        self.splits = {name: self._load(*files) for name, files in OFFICIAL_FILES.items()}
        widths = [split.features.shape[2] for split in self.splits.values()]
        if widths[0] != widths[1]:
            raise UserError(
                f"trainfeat.pth has {widths[0]} columns and testfeat.pth {widths[1]} in {self.folder}"
            )
        # Labels may be any numbers; here they count the classes.
        classes = torch.unique(torch.cat([split.labels for split in self.splits.values()]))
        self.classes = {i: str(label) for i, label in enumerate(classes.tolist())}
        self.splits = {
            name: split._replace(labels=torch.searchsorted(classes, split.labels))
            for name, split in self.splits.items()
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
                tensor = torch.load(
                    self.folder / name, map_location="cpu", weights_only=True, mmap=True
                )
            except FileNotFoundError:
                expected = ", ".join(file for files in OFFICIAL_FILES.values() for file in files)
                raise UserError(
                    f"--load_features {self.folder} has no {name}; expected {expected}"
                ) from None
            except Exception as error:
                raise UserError(
                    f"--load_features: {self.folder / name} is not a tensor file: {type(error).__name__}"
                ) from None
            if not isinstance(tensor, Tensor) or tensor.ndim != dimensions:
                raise UserError(
                    f"--load_features: {self.folder / name} does not hold a tensor of {dimensions} dimensions"
                )
            tensors.append(tensor)
        if len(tensors[0]) != len(tensors[1]):
            raise UserError(
                f"{features_file} has {len(tensors[0])} rows and {labels_file} {len(tensors[1])} in {self.folder}"
            )
        features, labels = tensors
        if not len(labels):
            raise UserError(f"--load_features: {self.folder / features_file} is empty")
        if not all(bool(torch.isfinite(rows).all()) for rows in features.split(ROWS)):
            raise UserError(
                f"--load_features: {self.folder / features_file} holds numbers that are not finite"
            )
        if (labels.long() != labels).any() or labels.min() < 0:
            raise UserError(
                f"--load_features: {self.folder / labels_file} does not hold whole numbers from 0"
            )
        return Split(features[:, None], labels.long())


def dump_features(subject: FrozenFeatures, parts: slice, folder: Path) -> None:
    """Write the four files of official `eval_knn.py --dump_features`: normalised features and labels of both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in OFFICIAL_FILES.items():
        features, labels = subject.split(name)
        features = F.normalize(features[:, parts].flatten(1).float(), dim=1)
        for file, tensor in zip(files, (features, labels), strict=True):
            with replacing(folder / file) as path:
                torch.save(tensor.clone(), path)
