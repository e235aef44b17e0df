"""Frozen backbone + images -> features, computed once and cached.

Images are framed as in official DINO's evaluations: short side resized, centre crop.
Axes: n images, B images of a batch, P parts of a feature (class tokens of the last layers and the
mean of the patch tokens; 1 for most networks), C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import dino_xcit
from dino_xcit.data.framing import EvalDataset, Transform
from dino_xcit.data.images import ImageSet, fingerprint
from dino_xcit.errors import NotFiniteError, UserError
from dino_xcit.evaluate.feature_store import DONE, FeatureStore, extract_shared
from dino_xcit.files import replacing
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.backbone import Backbone
from dino_xcit.runtime import HALF, say, summed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig

PIXELS = 32  # side of the images whose raw pixels are a baseline


# -- backbone ----------------------------------------------------------------------------------


Take = Callable[[Backbone, Tensor], Tensor]
"""(backbone, normalised images) -> features. Its name is part of the cache's key."""


def class_features(network: Backbone, x: Tensor) -> Tensor:
    """Features for classifiers, (B, P, C)."""
    return network.layer_features(x)


class FeatureExtractor:
    """Maps framed uint8 images (B, C, S, S) on any device to float32 features (B, P, C) on its own.

    Args:
        backbone: Is moved to the device and set to eval mode.
        transform: The images' size, mean and standard deviation.
        device: Where the backbone runs.
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        take: Computes features with the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        transform: Transform,
        device: torch.device,
        precision: str = "32-true",
        take: Take = class_features,
    ) -> None:
        self.backbone = backbone.to(device).eval()
        self.transform, self.device, self.precision, self.take = transform, device, precision, take
        self.mean = torch.tensor(transform.mean, device=device)[:, None, None]
        self.std = torch.tensor(transform.std, device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, S, S) -> float32 features (B, P, C)."""
        x = self.normalised(images)
        half = HALF.get(self.precision)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            return self.take(self.backbone, x).float()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images -> the backbone's input, on the extractor's device."""
        return (images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std

    def shape(self) -> tuple[int, int]:
        """Return P and C.

        Raises:
            UserError: The network does not take images of this size.
        """
        size, channels = self.transform.image_size, len(self.transform.mean)
        image = torch.zeros(1, channels, size, size, dtype=torch.uint8)
        try:
            _, parts, dim = self(image).shape
        except (ValueError, AssertionError, RuntimeError) as error:  # networks differ in the type
            raise UserError(f"--image_size {size}: {' '.join(str(error).split())}") from error
        return parts, dim


class Pixels(Backbone):
    """Baseline: the image itself, averaged down to at most 32 x 32 pixels."""

    arch = "raw pixels"

    def __init__(self) -> None:
        super().__init__()
        self.metadata = {}

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Return the pixels, (B, C * side * side)."""
        del paths  # no layers to drop
        side = min(PIXELS, images.shape[-1])
        return F.adaptive_avg_pool2d(images, side).flatten(1)


# -- parts of a feature ------------------------------------------------------------------------


def choose_parts(n_last_blocks: int, avgpool: bool, parts: int) -> list[int]:
    """Indices of the parts of a feature to use, of `parts` that the network has.

    Args:
        n_last_blocks: Number of class tokens, from the last layer backwards: parts 0, 1, ...
        avgpool: Whether to append the mean of the patch tokens, which is the last part.
        parts: Number of parts P.

    Raises:
        UserError: The network does not have these parts.
    """
    layers = max(1, parts - 1)
    if n_last_blocks > layers:
        raise UserError(
            f"--n_last_blocks {n_last_blocks}: this network has class tokens in {layers} layers"
        )
    if avgpool and parts == 1:
        raise UserError("--avgpool_patchtokens true: these features have no patch tokens")
    return [*range(n_last_blocks), *([parts - 1] if avgpool else [])]


def chosen_parts(config: ClassificationConfig, features: Features) -> list[int]:
    """Indices of the parts that the options choose; default: the last layer's class token.

    Raises:
        UserError: The network does not have the parts that an option names.
    """
    avgpool = bool(config.avgpool_patchtokens)
    return choose_parts(config.n_last_blocks or 1, avgpool, features.shape[0])


def select_parts(features: Tensor, parts: Sequence[int]) -> Tensor:
    """Features (B, P, C) -> the concatenated parts (B, D)."""
    if list(parts) == list(range(len(parts))):
        return features[:, : len(parts)].flatten(1)  # a view: memory-mapped features are not read
    return features[:, list(parts)].flatten(1)


# -- features of both splits -------------------------------------------------------------------


class Split(NamedTuple):
    """Features and labels of the readable images of one split."""

    features: Tensor
    """(n, P, C), may be memory-mapped"""
    labels: Tensor
    """int64 (n,)"""


class Features(Protocol):
    """Features of the splits `train` and `validation`, of a backbone or from files."""

    name: str
    """for tables and progress bars"""

    @property
    def extracted(self) -> int:
        """Number of images that went through the backbone."""

    @property
    def seconds(self) -> float:
        """Duration of the extraction."""

    @property
    def unreadable(self) -> int:
        """Number of images that could not be read."""

    @property
    def shape(self) -> tuple[int, int]:
        """P and C."""

    @property
    def key(self) -> str:
        """Differs between training features that differ."""

    def labels(self, split: str) -> Tensor:
        """int64 (n,)."""

    def split(self, name: str) -> Split:
        """Features and labels of a split."""


@dataclasses.dataclass
class FrozenFeatures:
    """Features of a frozen backbone, extracted when a split is first used, and cached."""

    name: str
    config: EvalConfig
    fabric: Fabric
    images: dict[str, ImageSet]
    """of each split"""
    extractor: FeatureExtractor
    cache: Path
    """folder of the feature stores"""
    extracted: int = 0
    """images that went through the backbone, in all processes"""
    seconds: float = 0.0
    """duration of the extraction"""
    unreadable: int = 0
    """images that could not be read"""
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    """extracted or loaded so far"""

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """P and C."""
        return self.extractor.shape()

    @functools.cached_property
    def key(self) -> str:
        """Differs between training features that differ."""
        return digest_of(self.description("train"))

    def labels(self, split: str) -> Tensor:
        """Labels of the readable images once the split is extracted, before that of all images."""
        if split in self.splits:
            return self.splits[split].labels
        labels = self.images[split].labels
        assert labels is not None
        return torch.from_numpy(labels.astype(np.int64))

    def split(self, name: str) -> Split:
        """Features and labels of a split, extracted or loaded from the cache.

        Raises:
            UserError: No image can be read, or the cache cannot hold the features.
            NotFiniteError: Features are not finite.
        """
        if name not in self.splits:
            store = self._open_store(name)
            self._extract(name, store)
            self.splits[name] = self._readable(name, store)
        return self.splits[name]

    def _open_store(self, split: str) -> FeatureStore:
        description = self.description(split)
        folder = self.cache / digest_of(description)
        shape, dtype = (len(self.images[split]), *self.shape), description["dtype"]
        try:
            store = FeatureStore.shared(self.fabric, folder, shape, dtype)
        except OSError as error:
            size = math.prod(shape) * np.dtype(dtype).itemsize / 2**30
            raise UserError(
                f"--cache_dir {self.cache} cannot take {size:.2g} GiB of features: {error}"
            ) from None
        if self.fabric.is_global_zero:
            with replacing(folder / "about.json") as path:
                path.write_text(json.dumps(description, indent=1))
        return store

    def _extract(self, split: str, store: FeatureStore) -> None:
        dataset = EvalDataset(self.images[split], self.extractor.transform)
        label = f"{self.name}, {split}"
        start = time.perf_counter()
        try:
            extracted = extract_shared(
                self.extractor, dataset, store, self.config, self.fabric, label
            )
        except NotFiniteError as error:
            raise NotFiniteError(f"--weights {self.name}: {error}; a run that diverged?") from None
        total = int(summed(self.fabric, torch.tensor(extracted)))
        if total:
            self.extracted += total
            self.seconds += time.perf_counter() - start
        else:
            say(f"features of {label}: from {self.cache / digest_of(self.description(split))}")

    def _readable(self, split: str, store: FeatureStore) -> Split:
        """Features and labels without the rows of unreadable images."""
        images = self.images[split]
        features, labels = torch.from_numpy(store.features), self.labels(split)
        readable = store.state == DONE
        if readable.all():
            return Split(features, labels)
        unreadable = np.flatnonzero(~readable)
        count, first = len(unreadable), int(unreadable[0])
        problem = EvalDataset(images, self.extractor.transform).problem(first)
        example = f"{images.name(first)}: {problem}" if problem else images.name(first)
        self.unreadable += count
        if count == len(images):
            raise UserError(f"none of the {count} images can be read; the first is {example}")
        say(
            f"{count} of {len(images)} images cannot be read and are left out; "
            f"the first is {example}"
        )
        mask = torch.from_numpy(readable)
        return Split(features[mask], labels[mask])

    def description(self, split: str) -> dict[str, Any]:
        """Everything that the features of a split depend on; the cache's key is its digest."""
        dtype = self.config.feature_dtype
        if dtype == "auto":
            dtype = "float16" if self.extractor.precision in HALF else "float32"
        return {
            "backbone": _digest_of_backbone(self.extractor.backbone),
            "features": self.extractor.take.__name__,
            "images": fingerprint(self.images[split]),
            "transform": list(self.extractor.transform),
            "precision": self.extractor.precision,
            "dtype": dtype,
            "device": self.extractor.device.type,
            "versions": [dino_xcit.__version__, torch.__version__, torchvision.__version__],
        }


def _digest_of_backbone(backbone: Backbone) -> str:
    # Neither tensors nor modules always show the ablations.
    ablations = [backbone.metadata.get(name) for name in ABLATIONS]
    digest = hashlib.sha256(f"{backbone} {ablations}".encode())
    for tensor in backbone.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of(description: object) -> str:
    """20 hexadecimal digits that differ between plain values that differ."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:20]
