"""Where images come from, which are bad, and in which order they are visited.

Every sample is asked for by (epoch, index of the image), so that a loader's worker needs no state to draw its numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dino_xcit import shapes
from dino_xcit.config import PretrainConfig
from dino_xcit.crops import MultiCrop, Views
from dino_xcit.machine import say

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision 0.29 announces their removal; PIL then reads everything, more slowly
    decode_image = None

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "test", "eval")}
REPLACEMENTS_TRIED = 20
JPEG = b"\xff\xd8"
IMAGES_LOOKED_AT = 16  # for a set's fingerprint
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Those of the extensions: PIL goes by the content, and would start Ghostscript for a file that holds PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SECONDS_TO_READ = 60  # an image, after which it counts as unreadable: a file system that hangs must not hang the run
T = TypeVar("T")
WORKER_DEATHS = 5  # without a batch between them, after which the run ends


class ImageOptions(Protocol):
    """The options that say which images a command works on."""

    @property
    def data_path(self) -> str | None: ...
    @property
    def dataset(self) -> str | None: ...
    @property
    def num_images(self) -> int | None: ...
    @property
    def in_chans(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


class ImageSet(Protocol):
    """Images by number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each image, or None if the set has no classes."""

    @property
    def classes(self) -> dict[str, int] | None:
        """Label of each class by its name, or None if the set has no names for them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """uint8 (C, H, W); raises OSError or ValueError if the image cannot be read."""

    def name(self, index: int) -> str:
        """What tells a person which image this is."""

    def identity(self) -> list[Any]:
        """Plain values that differ from those of other sets: every file with its size and time, where there are files."""


class ShapeSet:
    """The embedded set (`shapes.py`)."""

    def __init__(self, seed: int, split: str, count: int, channels: int) -> None:
        self.seed, self.split, self.count, self.channels = seed, split, count, channels
        self.labels = np.arange(count) % len(shapes.CLASSES)
        self.classes = {name: label for label, name in enumerate(shapes.CLASSES)}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        image = shapes.draw_shape(self.seed, self.split, index, self.channels).image
        return torch.from_numpy(image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"shape {index} ({shapes.CLASSES[index % len(shapes.CLASSES)]})"

    def identity(self) -> list[Any]:
        return ["shapes", self.seed, self.split, self.count, self.channels]


class TimmSet:
    """Any set that timm's dataset factory makes: a folder, torch/..., hfds/... ."""

    def __init__(self, dataset: Any, channels: int, labelled: bool = False) -> None:
        """labelled: one class is a class too; else all images in one folder have no labels."""
        self.dataset, self.channels = dataset, channels
        self.reader = getattr(dataset, "reader", None)
        labels = _labels(dataset)
        self.labels = labels if labels is not None and (labelled or len(np.unique(labels)) > 1) else None
        self.classes = getattr(dataset, "class_to_idx", getattr(self.reader, "class_to_idx", None))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Tensor:
        with in_time(SECONDS_TO_READ):
            if self.reader is None:  # torchvision's sets hand out PIL images
                return _from_pil(self.dataset[index][0], self.channels)
            with self.reader[index][0] as file:
                return decode(file.read(), self.channels)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True)) if self.reader else f"image {index}"

    def identity(self) -> list[Any]:
        files = [path for path, _ in getattr(self.reader, "samples", [])]
        stats = [os.stat(path) for path in files if os.path.exists(path)]
        return [type(self.dataset).__name__, len(self), self.channels, files, [(s.st_size, s.st_mtime_ns) for s in stats]]


class Subset:
    """Some images of a set, picked by the seed."""

    def __init__(self, images: ImageSet, count: int, seed: int) -> None:
        self.images = images
        self.indices = np.sort(np.random.default_rng((seed, len(images))).permutation(len(images))[:count])
        self.labels = None if images.labels is None else images.labels[self.indices]
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        return self.images.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.indices[index]))

    def identity(self) -> list[Any]:
        return [self.images.identity(), self.indices.tolist()]


def fingerprint(images: ImageSet) -> str:
    """Changes when the images do: their names, sizes, times and labels, and the pixels of a few."""
    digest = hashlib.sha256(json.dumps(images.identity()).encode())
    if images.labels is not None:
        digest.update(images.labels.astype(np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(images) - 1, IMAGES_LOOKED_AT).astype(int)):
        with contextlib.suppress(OSError, ValueError):
            digest.update(images.read(int(index)).contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_images(config: ImageOptions, split: str, classes: dict[str, int] | None = None) -> ImageSet | None:
    """The images of a split, `train` or `validation`; None if the set has no validation images.

    classes: labels by folder name, so that the two splits of a folder agree; images of other classes are left out.
    Raises ValueError, naming the flag, if there is nothing to open.
    """
    name = config.dataset or ("" if config.data_path else "shapes")
    if name == "shapes":
        counts = {"train": config.num_images or shapes.COUNT, "validation": shapes.VALIDATION_COUNT}
        return ShapeSet(config.seed, split, counts[split], config.in_chans or 3)
    images = _open_folder(config, split, classes) if not name else _open_named(name, config, split)
    if images is not None and split == "train" and config.num_images:
        if config.num_images > len(images):
            raise ValueError(f"--num_images {config.num_images} is more than the {len(images)} images found")
        images = Subset(images, config.num_images, config.seed)
    return images


def _open_folder(config: ImageOptions, split: str, classes: dict[str, int] | None) -> ImageSet | None:
    from timm.data import ImageDataset
    from timm.data.readers import set_img_extensions

    data_path = config.data_path
    root = Path(data_path or "")
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"--data_path {data_path} {kind}; expected a folder of images")
    found = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if split == "validation" and found is None:
        return None
    folder = found or root
    set_img_extensions(EXTENSIONS)
    try:
        return TimmSet(ImageDataset(str(folder), class_map=classes), config.in_chans or 3, labelled=classes is not None)
    except RuntimeError:  # timm's "Found 0 images"
        if split == "validation":
            return None
        files = sum(len(names) for _, _, names in os.walk(folder))
        raise ValueError(
            f"no images in --data_path {folder} ({files} other files); expected files ending in {' '.join(EXTENSIONS)}"
        ) from None


def _open_named(name: str, config: ImageOptions, split: str) -> ImageSet | None:
    from timm.data import create_dataset

    if not name.startswith(("torch/", "hfds/")):
        raise ValueError(
            f"--dataset {name} is unknown; expected shapes, torch/NAME (torchvision) or hfds/NAME (Hugging Face)"
        )
    try:
        return TimmSet(create_dataset(name, root=config.data_path, split=split), config.in_chans or 3)
    except ImportError as error:
        raise ValueError(f"--dataset {name} needs a package that is not installed: {error}") from error
    except (AssertionError, RuntimeError, OSError, ValueError) as error:
        if split == "validation":  # a set whose training images opened has no such split
            return None
        raise ValueError(
            f"--dataset {name} could not be opened at --data_path {config.data_path}: {_one_line(error)}"
        ) from error


def _labels(dataset: Any) -> np.ndarray | None:
    reader: Any = getattr(dataset, "reader", None)
    labels: Any = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if hasattr(reader, "samples"):
        labels = [target for _, target in reader.samples]
    elif hasattr(reader, "label_key"):
        labels = reader.dataset[reader.label_key]
    return None if labels is None else np.asarray(labels)


def decode(data: bytes, channels: int) -> Tensor:
    """The bytes of an image file -> uint8 (C, H, W), upright, in the channels asked for.

    torchvision decodes JPEG, PIL the rest: some damaged PNGs crash torchvision's decoder, and it is no faster. Raises
    ValueError if neither can, or if there are more than 179 million pixels, which is PIL's limit.
    """
    if decode_image is not None and channels in (1, 3) and data.startswith(JPEG):
        _open(data).close()  # reads the size alone: torchvision would take the memory for any
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        with contextlib.suppress(RuntimeError):
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, apply_exif_orientation=True)
    with reading_images(), _open(data) as file:
        return _from_pil(ImageOps.exif_transpose(file), channels)


def _open(data: bytes) -> Image.Image:
    """Raises ValueError if these are not the bytes of an image, or of too large a one."""
    with reading_images():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def reading_images() -> Iterator[None]:
    """Raises ValueError in one line for whatever PIL lets through of the readers of its formats."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are half of what is refused
            yield
    except ValueError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as error:
        raise ValueError(_one_line(error)) from error


@contextlib.contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if this takes longer. Elsewhere than in the main thread, where no signal comes: no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"not read within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _from_pil(image: Image.Image, channels: int) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if channels not in PIL_MODES:
        raise ValueError(f"images of {channels} channels cannot be read from files; --in_chans takes 1, 3 or 4 here")
    array = np.array(image.convert(PIL_MODES[channels]))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


class BadImage(NamedTuple):
    """An image that could not be read and what was wrong with it."""

    name: str
    reason: str


class Batch(NamedTuple):
    """What a step trains on: `Views` with a batch axis in front, and the unreadable images met on the way."""

    views: dict[str, Tensor]
    bad_images: list[BadImage]


class CropDataset(Dataset[Any]):
    """(epoch, index) -> the views of that image in that epoch."""

    def __init__(self, images: ImageSet, config: PretrainConfig) -> None:
        self.images, self.config = images, config
        self.crop = MultiCrop(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Views, list[BadImage]]:
        epoch, index = position
        key = (self.config.seed, epoch, index)
        bad: list[BadImage] = []
        for candidate in (index, *np.random.default_rng((*key, 1)).integers(len(self.images), size=REPLACEMENTS_TRIED)):
            try:
                return self.crop(self.images.read(int(candidate)), key), bad
            except (OSError, ValueError) as error:
                bad.append(BadImage(name=self.images.name(int(candidate)), reason=_one_line(error)))
                if self.config.on_bad_image == "raise":
                    break
        problem = f"cannot read {bad[0].name}: {bad[0].reason}"
        if self.config.on_bad_image == "raise":
            raise ValueError(f"{problem}; --on_bad_image replace would go on without it")
        raise ValueError(f"{problem}, nor {len(bad) - 1} others picked in its place; is --data_path right?")


class Order(Sampler[list[tuple[int, int]]]):
    """Which images each forward pass of this process sees, over the whole run: lists of (epoch, index).

    Each epoch is a permutation drawn from (seed, epoch), cut into optimizer steps, each step into passes, each pass into
    the shares of the processes. What does not fill a step is left out, as official DINO drops its last batch.
    """

    def __init__(self, config: PretrainConfig, images: int, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.images, self.rank, self.world_size = config, images, rank, world_size
        self.passes_done = 0
        self.pass_batch = config.batch_size_per_gpu * world_size
        self.total_batch = self.pass_batch * config.accumulate_grad_batches
        self.steps_per_epoch = images // self.total_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"{images} images are fewer than one step takes ({self.total_batch}: --batch_size_per_gpu "
                f"{config.batch_size_per_gpu} x {world_size} processes x --accumulate_grad_batches "
                f"{config.accumulate_grad_batches}); lower --batch_size_per_gpu"
            )
        self.passes_per_epoch = self.steps_per_epoch * config.accumulate_grad_batches

    def __len__(self) -> int:
        return self.config.epochs * self.passes_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.config.batch_size_per_gpu
        for epoch in range(self.passes_done // self.passes_per_epoch, self.config.epochs):
            permutation = np.random.default_rng((self.config.seed, epoch)).permutation(self.images)
            first = max(0, self.passes_done - epoch * self.passes_per_epoch)
            for number in range(first, self.passes_per_epoch):
                start = number * self.pass_batch + self.rank * share
                yield [(epoch, int(index)) for index in permutation[start : start + share]]


def surviving(loaded_from: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """The items of a loader that can start at any of them. A worker that dies takes nothing with it: others start where the
    items stopped. Raises ValueError if they die too."""
    done = deaths = 0
    while True:
        try:
            items = loaded_from(done)
            if threading.current_thread() is threading.main_thread():
                # torch would tell of the death by an exception in the middle of whatever runs; so it is told by the loader.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for item in items:
                done, deaths = done + 1, 0
                yield item
            return
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: it died while handing over a batch
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            deaths += 1
            reason = _one_line(error).rstrip(".") if isinstance(error, RuntimeError) else "a loader worker died"
            if deaths > WORKER_DEATHS:
                raise ValueError(
                    f"{deaths} loader workers died one after the other ({reason}); if the machine is out of memory, "
                    "lower --num_workers, else look for an image that a decoder cannot bear with --num_workers 0"
                ) from error
            say(f"{reason}; others start in its place")


class CropLoader(DataLoader[Batch]):
    """Loads the run's batches in order. Lightning saves and restores how many were handed out."""

    def __init__(self, dataset: CropDataset, order: Order, num_workers: int, pin_memory: bool) -> None:
        self.order = order
        self.handed_out = 0
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.handed_out = self.order.passes_done
        try:
            for batch in surviving(self._from):
                self.handed_out += 1
                yield batch
        except ValueError as error:  # from a worker it comes with the traceback in its text
            raise ValueError(str(error).rsplit("ValueError: ", 1)[-1].strip()) from error

    def _from(self, number: int) -> Iterator[Batch]:
        self.order.passes_done = self.handed_out
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.passes_done = self.handed_out = state["passes"]


def collate(samples: list[tuple[Views, list[BadImage]]]) -> Batch:
    return Batch(
        views=default_collate([vars(views) for views, _ in samples]), bad_images=[bad for _, bads in samples for bad in bads]
    )


def leave_signals_to_the_parent(worker: int) -> None:
    """Of Ctrl-C, SIGTERM and SIGUSR1, which a terminal or a scheduler sends to all, the run makes its own end.

    A second SIGTERM is Python's, which ends its children by it when it ends.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def default_workers() -> int:
    """Cores that this process may use, less one for itself, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores - 1))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
