"""The images and videos that `dino-xcit attention` is given, or the run's own images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dino_xcit.data.decode import EXTENSIONS
from dino_xcit.data.folder import image_files
from dino_xcit.data.images import ImageSet, open_images
from dino_xcit.errors import UserError
from dino_xcit.figures.video import VideoFile, is_video
from dino_xcit.weights.load import read_run, run_folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.framing import Framing

SHOWN = 4  # images of the run's own data
LONGEST_NAME = 200  # bytes of a file's name that names of its figures contain


class ImageInput(NamedTuple):
    """An image that can be read."""

    name: str
    """in names of files: unique within a command"""
    where: str
    """in messages: path, or what it is called in its set"""
    read: Callable[[int], Tensor]
    """channels -> uint8 (C, H, W)"""


class VideoInput(NamedTuple):
    """A video that can be read, more than once."""

    name: str
    """in names of files: unique within a command"""
    where: str
    """in messages"""
    fps: Fraction
    """frames per second"""
    num_frames: int
    """as far as known before it is decoded; else 0"""
    frames: Callable[[int], Iterator[Tensor]]
    """channels -> uint8 (C, H, W) each"""


class Inputs(NamedTuple):
    """What `--images` names."""

    images: list[ImageInput]
    videos: list[VideoInput]
    problems: list[str]
    """a line for each argument that is neither"""


def find(config: AttentionConfig, framing: Framing) -> Inputs:
    """Open what `images` names: files, folders and videos, in the order given."""
    inputs = Inputs([], [], [])
    names = UniqueNames()
    for argument in config.images:
        path = Path(argument)
        try:
            if video := _open_video(argument, config, framing, names):
                inputs.videos.append(video)
            else:
                files = _files(path, config) if path.is_dir() else [path]
                inputs.images.extend(_image(file, framing, names) for file in files)
        except (UserError, OSError) as error:
            inputs.problems.append(f"{argument}: {error}")
    return inputs


class UniqueNames:
    """Names of inputs: the stem of the file, with a number where it is taken."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, path: Path) -> str:
        """A name that no other input has, also where file systems ignore case."""
        stem = path.stem.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        candidates = itertools.chain([stem], numbered)
        name = next(name for name in candidates if name.casefold() not in self.taken)
        self.taken.add(name.casefold())
        return name


def _open_video(
    argument: str, config: AttentionConfig, framing: Framing, names: UniqueNames
) -> VideoInput | None:
    """A video file, or with `--frames` a folder of images; None for anything else."""
    path = Path(argument)
    if path.is_dir():
        if not config.frames:
            return None
        files = _files(path, config)
        fps = Fraction(config.fps).limit_denominator(1000)
        frames = functools.partial(_frames_of_folder, files, framing)
        return VideoInput(names.of(path), argument, fps, len(files), frames)
    if not is_video(path):
        return None
    video = VideoFile(path)
    frames = functools.partial(_frames_of_file, video)
    return VideoInput(names.of(path), argument, video.fps, video.num_frames, frames)


def _image(path: Path, framing: Framing, names: UniqueNames) -> ImageInput:
    return ImageInput(names.of(path), str(path), functools.partial(framing.read, path))


def _files(folder: Path, config: AttentionConfig) -> list[Path]:
    if run_folder_of(str(folder)) == folder:
        raise UserError(
            "a run folder, not images; several weights have a flag each: --weights A --weights B"
        )
    return images_in(folder, without=Path(config.output_dir))


def images_in(folder: Path, without: Path | None = None) -> list[Path]:
    """Image files at any depth, in the order of their names.

    Args:
        folder: the folder.
        without: a folder whose files are left out, unless it is `folder` itself.

    Raises:
        UserError: there are none.
    """
    files = image_files(folder)
    if without is not None and without.resolve() != folder.resolve():
        files = [path for path in files if not path.resolve().is_relative_to(without.resolve())]
    if not files:
        raise UserError(f"a folder without images; expected files ending in {' '.join(EXTENSIONS)}")
    return files


def _frames_of_folder(files: Sequence[Path], framing: Framing, channels: int) -> Iterator[Tensor]:
    for file in files:
        try:
            image = framing.read(file, channels)
        except UserError as error:
            raise UserError(f"{file.name}: {error}") from None
        yield image


def _frames_of_file(video: VideoFile, channels: int) -> Iterator[Tensor]:
    return (torch.from_numpy(frame.copy()).permute(2, 0, 1) for frame in video.frames(channels))


# -- the run's own images --------------------------------------------------------------------------


def own_images(config: AttentionConfig, channels: int) -> list[ImageInput]:
    """The first validation images (else training images) of the run's own data.

    Raises:
        UserError: the weights are not in a run folder, or its data cannot be opened.
    """
    run = read_run(config.weights[0])
    if run is None:
        raise UserError(
            "expected images: the weights are not in a run folder, whose own images could be shown"
        )
    options = dataclasses.replace(run, in_chans=channels, num_images=None)
    images = open_images(options, "validation") or open_images(options, "train")
    assert images is not None
    first = range(min(config.num_images or SHOWN, len(images)))
    return [
        ImageInput(f"image{i}", images.name(i), functools.partial(_read_from_set, images, i))
        for i in first
    ]


def _read_from_set(images: ImageSet, index: int, channels: int) -> Tensor:
    image = images.read(index)
    return image if len(image) == channels else image[:1].expand(channels, -1, -1)
