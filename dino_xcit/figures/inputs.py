"""Weights and image files -> views: what a backbone sees of each image, framed so that its patches fit.

One image after another, each at its own size: the long side as asked, the aspect kept, and what the patch size does not
divide cropped or padded.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_xcit.data.decode import EXTENSIONS, FORMATS, decode, reading_images
from dino_xcit.data.framing import resize
from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.errors import UserError
from dino_xcit.figures.maps import bytes_per_pixel
from dino_xcit.figures.model import AttentionModel, AttentionResult
from dino_xcit.figures.video import Clip, any_size, is_video
from dino_xcit.runtime import memory_there
from dino_xcit.weights.load import read_run, run_folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from dino_xcit.config.attention import AttentionConfig

SHOWN = 4  # images of the run's own data
LONGEST_NAME = 200  # bytes of a file's name that go into those of its figures
COPIES = 3  # of an image's pixels while it is read


# -- images ----------------------------------------------------------------------------------------------------------


class ImageInput(NamedTuple):
    """An image by its name in file names and in messages."""

    name: str
    where: str
    read: Callable[[int], Tensor]
    """channels -> uint8 (C, H, W)"""


class VideoInput(NamedTuple):
    """A video by its name in file names and in messages."""

    name: str
    where: str
    fps: Fraction
    expected: int
    """frames, where it is known before"""
    frames: Callable[[int], Iterator[Tensor]]
    """channels -> uint8 (C, H, W) each"""


def find(
    config: AttentionConfig, frame: Framing
) -> tuple[list[ImageInput], list[VideoInput], list[str]]:
    """What `images` names: images, videos, and a line for what is neither."""
    sources: list[ImageInput] = []
    films: list[VideoInput] = []
    problems: list[str] = []
    taken: set[str] = set()

    def unique(path: Path) -> str:
        stem = path.stem.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        name = next(
            name for name in itertools.chain([stem], numbered) if name.casefold() not in taken
        )
        taken.add(name.casefold())  # there are file systems that do not tell A from a
        return name

    for given in config.images:
        path = Path(given)
        try:
            if path.is_dir() and run_folder_of(str(path)) == path:
                raise UserError(
                    "a run folder, not images; several weights have a flag each: --weights A --weights B"
                )
            files = images_in(path, Path(config.output_dir)) if path.is_dir() else [path]
            if path.is_dir() and config.frames:
                fps = Fraction(config.fps).limit_denominator(1000)
                films.append(
                    VideoInput(
                        unique(path),
                        given,
                        fps,
                        len(files),
                        functools.partial(_frames, files, frame),
                    )
                )
            elif is_video(path):
                clip = Clip(path)
                films.append(
                    VideoInput(
                        unique(path),
                        given,
                        clip.fps,
                        clip.expected,
                        functools.partial(_of_clip, clip),
                    )
                )
            else:
                sources += [
                    ImageInput(unique(file), str(file), functools.partial(frame.read, file))
                    for file in files
                ]
        except (ValueError, OSError) as error:
            problems.append(f"{given}: {error}")
    return sources, films, problems


def images_in(folder: Path, but: Path | None = None) -> list[Path]:
    """Image files at any depth, in the order of their names, but for one folder. Raises ValueError if there are none."""
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()
    )
    if but is not None and but.resolve() != folder.resolve():
        files = [path for path in files if not path.resolve().is_relative_to(but.resolve())]
    if not files:
        raise UserError(f"a folder without images; expected files ending in {' '.join(EXTENSIONS)}")
    return files


def own_images(config: AttentionConfig, channels: int) -> list[ImageInput]:
    """The first validation images (else training images) of the run's own data."""
    images = run_images(config, channels)
    first = range(min(config.num_images or SHOWN, len(images)))
    return [
        ImageInput(f"image{i}", images.name(i), functools.partial(_of_set, images, i))
        for i in first
    ]


def run_images(config: AttentionConfig, channels: int) -> ImageSet:
    """Raises ValueError if the weights are not of a run."""
    run = read_run(config.weights[0])
    if run is None:
        raise UserError(
            "expected images: the weights are not in a run folder that would name its own"
        )
    options = dataclasses.replace(run, in_chans=channels, num_images=None)
    images = open_images(options, "validation") or open_images(options, "train")
    assert images is not None
    return images


def _frames(files: Sequence[Path], frame: Framing, channels: int) -> Iterator[Tensor]:
    for file in files:
        try:
            yield frame.read(file, channels)
        except ValueError as error:
            raise UserError(f"{file.name}: {error}") from None


def _of_set(images: ImageSet, index: int, channels: int) -> Tensor:
    image = images.read(index)
    return image if len(image) == channels else image[:1].expand(channels, -1, -1)


def _of_clip(clip: Clip, channels: int) -> Iterator[Tensor]:
    return (torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in clip.frames(channels))


class Framing:
    """How images are framed for some backbones, and which fit into memory: asked before an image is decoded."""

    def __init__(self, models: Sequence[AttentionModel], fit: str) -> None:
        self.there = memory_there(models[0].device)
        self.on_cpu = memory_there(torch.device("cpu"))
        self.per_pixel = max(bytes_per_pixel(model.backbone) for model in models)
        self.patch = math.lcm(*(model.backbone.patch_size for model in models))
        self.long_side = max(model.long_side for model in models)
        self.fit = fit

    def read(self, path: Path, channels: int) -> Tensor:
        """uint8 (C, H, W). Raises ValueError if the file is not an image, or too large to decode."""
        if not path.exists():
            raise UserError("does not exist")
        data = path.read_bytes()
        if not data:
            raise UserError("an empty file (0 bytes)")
        with any_size():
            with reading_images(), Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
            self.check(height, width)
            needed = COPIES * max(3, channels) * height * width
            if needed > self.on_cpu:
                raise UserError(
                    f"{width} x {height} pixels: decoding alone needs about {_gib(needed)}, there are {_gib(self.on_cpu)}"
                )
            return decode(data, channels)

    def check(self, height: int, width: int) -> None:
        """Raises ValueError if an image of so many pixels cannot be looked at, with the size that can."""
        h, w = scaled(height, width, self.long_side)
        needed = self._needed(height, width, self.long_side)
        if needed > self.there:
            aspect = min(height, width) / max(height, width)
            estimate = (
                min(int(math.sqrt(self.there / self.per_pixel / aspect)), max(h, w)) // self.patch
            )
            sides = (side * self.patch for side in range(estimate, 0, -1))
            fits = next(
                (side for side in sides if self._needed(height, width, side) <= self.there), None
            )
            advice = f"--image_size {fits} fits" if fits else "no size fits"
            raise UserError(
                f"{w} x {h} pixels need about {_gib(needed)}, there are {_gib(self.there)}; {advice}"
            )

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
            image = (
                resize(image[None], h, w)[0]
                if mode == "bicubic"
                else F.interpolate(image[None], (h, w), mode=mode)[0]
            )
        p = self.patch
        if self.fit == "pad":
            down, across = (torch.arange(-(-side // p) * p).clamp_max(side - 1) for side in (h, w))
            return image[:, down][:, :, across], (h, w)  # the edge goes on
        H, W = h // p * p, w // p * p
        if not H or not W:
            raise UserError(
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


def look_at(
    name: str,
    image: Tensor,
    model: AttentionModel,
    frame: Framing,
    features: bool = False,
    xca: bool = False,
) -> AttentionResult:
    """uint8 (C, H, W) of any size -> its view. Raises ValueError if there is too little memory or no patch in it."""
    frame.check(*image.shape[-2:])
    pixels, size = frame.framed(image)
    try:
        sight = model(pixels[None], features, xca)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # what fits is an estimate
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        found = f"{size[1]} x {size[0]} pixels: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{found}; lower --image_size") from error
    maps: dict[str, Any] = {
        key: None if maps is None else maps[0].cpu().numpy()
        for key, maps in sight._asdict().items()
    }
    return AttentionResult(
        name=name, image=shown(pixels, size), patch=model.backbone.patch_size, **maps
    )


def shown(pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """What went in, without padding: uint8 (H, W, C)."""
    return pixels[:, : size[0], : size[1]].permute(1, 2, 0).contiguous().numpy()
