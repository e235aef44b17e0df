"""Weights and image files -> views: what a backbone sees of each image, framed so that its patches fit.

One image after another, each at its own size: the long side as asked, the aspect kept, and what the patch size does not
divide cropped or padded.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_xcit.attention import Sight, bytes_per_pixel, check_layer, look, require_class_attention
from dino_xcit.config import AttentionConfig, PretrainConfig
from dino_xcit.crops import resize
from dino_xcit.data import EXTENSIONS, FORMATS, ImageSet, decode, open_images, reading_images
from dino_xcit.features import SMALL
from dino_xcit.machine import HALF, memory_there, resolve_precision
from dino_xcit.video import Clip, any_size, is_video
from dino_xcit.weights import LAST, TEACHER, load_backbone, read_run, run_folder_of
from dino_xcit.xcit import CLASS_ATTENTION_LAYERS, XCiT

OFFICIAL_SIZE = 480  # of official visualize_attention.py
SHOWN = 4  # images of the run's own data
LONGEST_NAME = 200  # bytes of a file's name that go into those of its figures
COPIES = 3  # of an image's pixels while it is read


@dataclass(frozen=True, kw_only=True)
class View:
    """What one backbone saw of one image. Axes as in `attention.py`, without the batch."""

    name: str
    """file name of the image without its ending, once in a command"""
    image: np.ndarray
    """uint8 (H, W, channels): the pixels that the patches lie on; the last patches may reach beyond"""
    patch: int
    """side of a patch in pixels"""
    attention: np.ndarray
    queries: np.ndarray | None = None
    keys: np.ndarray | None = None
    covariance: np.ndarray | None = None
    features: np.ndarray | None = None


# -- backbones -------------------------------------------------------------------------------------------------------


class Eye:
    """A backbone that looks at one image: uint8 pixels -> maps."""

    def __init__(self, title: str, weights: str, config: AttentionConfig, device: torch.device) -> None:
        """Raises ValueError if the weights do not load or have no such layer or head."""
        self.title, self.weights, self.config, self.device = title, weights, config, device
        backbone = load_backbone(weights, config.arch, config.checkpoint_key)
        try:
            require_class_attention(backbone)
        except ValueError as error:
            raise ValueError(f"--weights {weights}: {error}") from None
        self.use(backbone)
        check_layer("layer", config.layer, CLASS_ATTENTION_LAYERS)
        check_layer("xca_layer", config.xca_layer, len(backbone.blocks))
        if config.head is not None and config.head >= backbone.heads:
            raise ValueError(f"--head is {config.head}; {backbone.arch} has the heads 0 to {backbone.heads - 1}")

    def use(self, backbone: XCiT) -> None:
        self.backbone = backbone.to(self.device).eval()
        about = {**dataclasses.asdict(PretrainConfig()), **backbone.metadata}
        if len(about["mean"]) != backbone.in_chans:
            raise ValueError(f"--weights {self.weights} do not say how their {backbone.in_chans} channels are normalised")
        self.offset, self.scale = (torch.tensor(about[key], device=self.device)[:, None, None] for key in ("mean", "std"))
        crop, asked = about["global_crops_size"], self.config.image_size
        self.long_side = asked if asked is not None else crop if crop < SMALL else OFFICIAL_SIZE

    def with_backbone(self, backbone: XCiT, title: str) -> Eye:
        """The same with other weights."""
        other = copy.copy(self)
        other.title = title
        other.use(backbone)
        return other

    @torch.inference_mode()
    def __call__(self, images: Tensor, features: bool = False, xca: bool = False) -> Sight:
        """uint8 (B, C, H, W) of sides that the patch divides."""
        x = (images.to(self.device).float() / 255 - self.offset) / self.scale
        half = HALF.get(resolve_precision(self.config))
        with torch.autocast(self.device.type, half, enabled=half is not None):
            xca_layer = self.config.xca_layer if xca else None
            return look(self.backbone, x, layer=self.config.layer, xca_layer=xca_layer, features=features)


def open_eyes(config: AttentionConfig, device: torch.device) -> list[Eye]:
    """One for each of `--weights`, titled by `--names`, else by their folders or files."""
    titles = [(run_folder_of(weights) or Path(weights.replace(":", "_"))).name for weights in config.weights]
    titles = list(config.names) or (titles if len(set(titles)) == len(titles) else list(config.weights))
    if len(set(titles)) < len(titles):
        titles = [f"{title}, {number}" for number, title in enumerate(titles)]
    return [Eye(title, weights, config, device) for title, weights in zip(titles, config.weights, strict=True)]


def open_checkpoints(config: AttentionConfig, device: torch.device) -> list[Eye]:
    """One for each checkpoint that the run has kept, in the order of the epochs, the finished teacher last."""
    folder = run_folder_of(config.weights[0])
    kept = sorted(folder.glob("checkpoints/epoch[0-9][0-9][0-9][0-9]*.ckpt")) if folder else []
    if not folder or not kept:
        raise ValueError(
            f"--figures training: --weights {config.weights[0]} is not a run folder that kept checkpoints; "
            "pretrain --saveckp_freq N keeps one every N epochs"
        )
    last = next((folder / name for name in (TEACHER, LAST) if (folder / name).exists()), kept[-1])
    titles = [f"epoch {int(path.stem.removeprefix('epoch'))}" for path in kept]
    eyes = [Eye(title, str(path), config, device) for title, path in zip(titles, kept, strict=True)]
    final = Eye("last", str(last), config, device)
    states = (eye.backbone.state_dict().values() for eye in (eyes[-1], final))
    return eyes if all(torch.equal(*pair) for pair in zip(*states, strict=True)) else [*eyes, final]


# -- images ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An image by its name in file names and in messages."""

    name: str
    where: str
    read: Callable[[int], Tensor]
    """channels -> uint8 (C, H, W)"""


class Film(NamedTuple):
    """A video by its name in file names and in messages."""

    name: str
    where: str
    fps: Fraction
    expected: int
    """frames, where it is known before"""
    frames: Callable[[int], Iterator[Tensor]]
    """channels -> uint8 (C, H, W) each"""


def find(config: AttentionConfig, frame: Frame) -> tuple[list[Source], list[Film], list[str]]:
    """What `images` names: images, videos, and a line for what is neither."""
    sources: list[Source] = []
    films: list[Film] = []
    problems: list[str] = []
    taken: set[str] = set()

    def unique(path: Path) -> str:
        stem = path.stem.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([stem], numbered) if name.casefold() not in taken)
        taken.add(name.casefold())  # there are file systems that do not tell A from a
        return name

    for given in config.images:
        path = Path(given)
        try:
            if path.is_dir() and run_folder_of(str(path)) == path:
                raise ValueError("a run folder, not images; several weights have a flag each: --weights A --weights B")
            files = images_in(path, Path(config.output_dir)) if path.is_dir() else [path]
            if path.is_dir() and config.frames:
                fps = Fraction(config.fps).limit_denominator(1000)
                films.append(Film(unique(path), given, fps, len(files), functools.partial(_frames, files, frame)))
            elif is_video(path):
                clip = Clip(path)
                films.append(Film(unique(path), given, clip.fps, clip.expected, functools.partial(_of_clip, clip)))
            else:
                sources += [Source(unique(file), str(file), functools.partial(frame.read, file)) for file in files]
        except (ValueError, OSError) as error:
            problems.append(f"{given}: {error}")
    return sources, films, problems


def images_in(folder: Path, but: Path | None = None) -> list[Path]:
    """Image files at any depth, in the order of their names, but for one folder. Raises ValueError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if but is not None and but.resolve() != folder.resolve():
        files = [path for path in files if not path.resolve().is_relative_to(but.resolve())]
    if not files:
        raise ValueError(f"a folder without images; expected files ending in {' '.join(EXTENSIONS)}")
    return files


def own_images(config: AttentionConfig, channels: int) -> list[Source]:
    """The first validation images (else training images) of the run's own data."""
    images = run_images(config, channels)
    first = range(min(config.num_images or SHOWN, len(images)))
    return [Source(f"image{i}", images.name(i), functools.partial(_of_set, images, i)) for i in first]


def run_images(config: AttentionConfig, channels: int) -> ImageSet:
    """Raises ValueError if the weights are not of a run."""
    run = read_run(config.weights[0])
    if run is None:
        raise ValueError("expected images: the weights are not in a run folder that would name its own")
    options = dataclasses.replace(run, in_chans=channels, num_images=None)
    images = open_images(options, "validation") or open_images(options, "train")
    assert images is not None
    return images


def _frames(files: Sequence[Path], frame: Frame, channels: int) -> Iterator[Tensor]:
    for file in files:
        try:
            yield frame.read(file, channels)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None


def _of_set(images: ImageSet, index: int, channels: int) -> Tensor:
    image = images.read(index)
    return image if len(image) == channels else image[:1].expand(channels, -1, -1)


def _of_clip(clip: Clip, channels: int) -> Iterator[Tensor]:
    return (torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in clip.frames(channels))


class Frame:
    """How images are framed for some backbones, and which fit into memory: asked before an image is decoded."""

    def __init__(self, eyes: Sequence[Eye], fit: str) -> None:
        self.there = memory_there(eyes[0].device)
        self.on_cpu = memory_there(torch.device("cpu"))
        self.per_pixel = max(bytes_per_pixel(eye.backbone) for eye in eyes)
        self.patch = math.lcm(*(eye.backbone.patch_size for eye in eyes))
        self.long_side = max(eye.long_side for eye in eyes)
        self.fit = fit

    def read(self, path: Path, channels: int) -> Tensor:
        """uint8 (C, H, W). Raises ValueError if the file is not an image, or too large to decode."""
        if not path.exists():
            raise ValueError("does not exist")
        data = path.read_bytes()
        if not data:
            raise ValueError("an empty file (0 bytes)")
        with any_size():
            with reading_images(), Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
            self.check(height, width)
            needed = COPIES * max(3, channels) * height * width
            if needed > self.on_cpu:
                raise ValueError(
                    f"{width} x {height} pixels: decoding alone needs about {_gib(needed)}, there are {_gib(self.on_cpu)}"
                )
            return decode(data, channels)

    def check(self, height: int, width: int) -> None:
        """Raises ValueError if an image of so many pixels cannot be looked at, with the size that can."""
        h, w = scaled(height, width, self.long_side)
        needed = self._needed(height, width, self.long_side)
        if needed > self.there:
            aspect = min(height, width) / max(height, width)
            estimate = min(int(math.sqrt(self.there / self.per_pixel / aspect)), max(h, w)) // self.patch
            sides = (side * self.patch for side in range(estimate, 0, -1))
            fits = next((side for side in sides if self._needed(height, width, side) <= self.there), None)
            advice = f"--image_size {fits} fits" if fits else "no size fits"
            raise ValueError(f"{w} x {h} pixels need about {_gib(needed)}, there are {_gib(self.there)}; {advice}")

    def _needed(self, height: int, width: int, long_side: int) -> float:
        """Bytes of a pass over an image of so many pixels."""
        h, w = scaled(height, width, long_side)
        if self.fit == "pad":
            h, w = (-(-side // self.patch) * self.patch for side in (h, w))
        return self.per_pixel * h * w

    def framed(self, image: Tensor, mode: str = "bicubic") -> tuple[Tensor, tuple[int, int]]:
        """uint8 (C, H, W) -> the pixels that go in, sides multiples of the patch, and how many of them are the image's."""
        height, width = image.shape[-2:]
        h, w = scaled(height, width, self.long_side)
        if (h, w) != (height, width):
            image = resize(image[None], h, w)[0] if mode == "bicubic" else F.interpolate(image[None], (h, w), mode=mode)[0]
        p = self.patch
        if self.fit == "pad":
            down, across = (torch.arange(-(-side // p) * p).clamp_max(side - 1) for side in (h, w))
            return image[:, down][:, :, across], (h, w)  # the edge goes on
        H, W = h // p * p, w // p * p
        if not H or not W:
            raise ValueError(
                f"{width} x {height} pixels, {w} x {h} at --image_size {self.long_side}: smaller than a patch of {p} x {p}; "
                "raise --image_size or take --fit pad"
            )
        top, left = (h - H) // 2, (w - W) // 2
        return image[:, top : top + H, left : left + W].contiguous(), (H, W)


def scaled(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Sides once the long one is as asked; 0 keeps them."""
    if not long_side:
        return height, width
    longest = max(height, width)
    return max(1, round(height * long_side / longest)), max(1, round(width * long_side / longest))


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def look_at(name: str, image: Tensor, eye: Eye, frame: Frame, features: bool = False, xca: bool = False) -> View:
    """uint8 (C, H, W) of any size -> its view. Raises ValueError if there is too little memory or no patch in it."""
    frame.check(*image.shape[-2:])
    pixels, size = frame.framed(image)
    try:
        sight = eye(pixels[None], features, xca)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # what fits is an estimate
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        found = f"{size[1]} x {size[0]} pixels: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{found}; lower --image_size") from error
    maps: dict[str, Any] = {key: None if maps is None else maps[0].cpu().numpy() for key, maps in sight._asdict().items()}
    return View(name=name, image=shown(pixels, size), patch=eye.backbone.patch_size, **maps)


def shown(pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """What went in, without padding: uint8 (H, W, C)."""
    return pixels[:, : size[0], : size[1]].permute(1, 2, 0).contiguous().numpy()
