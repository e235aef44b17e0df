"""Videos -> frames, frames -> videos. PyAV decodes and encodes; a folder of images can stand for a video on either side."""

from __future__ import annotations

import contextlib
import itertools
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image

from dino_xcit.errors import UserError
from dino_xcit.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXTENSIONS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
FASTEST_GIF = 50  # frames per second; browsers slow down faster ones
QUALITY = "18"  # x264's constant rate factor: differences are hard to see


def is_video(path: Path) -> bool:
    """By its name; a GIF only if it moves."""
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in EXTENSIONS
    try:
        with any_size(), Image.open(path, formats=("GIF",)) as file:
            return getattr(file, "n_frames", 1) > 1
    except Exception:  # PIL lets through whatever the reader of a format raises
        return False


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """PIL refuses large images by its own measure; ours is the memory."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


class Clip:
    """A video file that can be read more than once."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if there is no video in the file."""
        self.path = path
        with self._open() as container:
            stream = container.streams.video[0]
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.expected = stream.frames or int(
                (stream.duration or 0) * (stream.time_base or 0) * self.fps
            )

    def frames(self, channels: int) -> Iterator[np.ndarray]:
        """uint8 (H, W, channels), upright."""
        with self._open() as container:
            for frame in container.decode(video=0):
                array = frame.to_ndarray(format="gray" if channels == 1 else "rgb24")
                yield np.rot90(array.reshape(*array.shape[:2], -1), int(frame.rotation) // 90 % 4)

    @contextlib.contextmanager
    def _open(self) -> Iterator[av.container.InputContainer]:
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise UserError("holds no video")
                yield container
        except av.FFmpegError as error:
            raise UserError(f"cannot be read as a video: {error.strerror}") from None


def write_video(path: Path, frames: Iterator[np.ndarray], fps: Fraction) -> None:
    """uint8 (H, W, 3) each -> an MP4 or GIF file, by the path's ending; a path without these is a folder of PNG files."""
    if path.suffix not in (".mp4", ".gif"):
        path.mkdir(parents=True, exist_ok=True)
        for old in path.glob("[0-9]*.png"):  # of a longer film
            old.unlink()
        for number, frame in enumerate(frames):
            with replacing(path / f"{number:06}.png") as beside:
                Image.fromarray(frame).save(beside)
        return
    with replacing(path) as beside:
        (_write_gif if path.suffix == ".gif" else _write_mp4)(beside, frames, fps)


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: Fraction) -> None:
    every = max(1, math.ceil(fps / FASTEST_GIF))
    images = [Image.fromarray(frame) for frame in itertools.islice(frames, 0, None, every)]
    ends = [
        round(100 * (number + 1) * every / fps) for number in range(len(images))
    ]  # hundredths of a second, GIF's unit
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: Fraction) -> None:
    first = next(frames)
    H, W = (side + side % 2 for side in first.shape[:2])  # two colours share 2 x 2 pixels
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": QUALITY})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for frame in itertools.chain([first], frames):
            even = np.pad(
                frame, ((0, H - frame.shape[0]), (0, W - frame.shape[1]), (0, 0)), mode="edge"
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
