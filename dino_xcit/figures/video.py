"""Videos as frames, and frames as videos: PyAV decodes and encodes.

A folder of images can stand for a video on either side.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image

from dino_xcit.data.decode import reading_images
from dino_xcit.errors import UserError
from dino_xcit.figures.framing import any_size
from dino_xcit.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXTENSIONS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")
FASTEST_GIF = 50  # frames per second; browsers slow down faster ones
QUALITY = "18"  # x264's constant rate factor: differences are hard to see
DEFAULT_RATE = 25  # frames per second of a file that does not hold its rate


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name; a GIF only if it has several frames."""
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in EXTENSIONS
    try:
        with any_size(), reading_images(), Image.open(path, formats=("GIF",)) as file:
            return int(getattr(file, "n_frames", 1)) > 1
    except (UserError, OSError):  # no GIF: reading it as an image gives the reason
        return False


class VideoFile:
    """A video file, which can be read more than once.

    Raises:
        UserError: there is no video in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
            seconds = (stream.duration or 0) * (stream.time_base or 0)
        self.fps = rate
        """frames per second"""
        self.num_frames = stream.frames or int(seconds * rate)
        """as the file's header holds it; 0 if unknown"""

    def frames(self, channels: int) -> Iterator[np.ndarray]:
        """Frames, uint8 (H, W, channels), upright.

        Raises:
            UserError: the file is damaged.
        """
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
    """Write frames as a video.

    Args:
        path: ends in .mp4 or .gif; any other path becomes a folder of PNG files.
        frames: uint8 (H, W, 3) each, one at least.
        fps: frames per second.

    Raises:
        UserError: the encoder refuses the frames.
    """
    if path.suffix not in (".mp4", ".gif"):
        _write_folder(path, frames)
        return
    with replacing(path) as beside:
        (_write_gif if path.suffix == ".gif" else _write_mp4)(beside, frames, fps)


def _write_folder(folder: Path, frames: Iterator[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):  # of a longer video
        old.unlink()
    for number, frame in enumerate(frames):
        with replacing(folder / f"{number:06}.png") as beside:
            Image.fromarray(frame).save(beside)


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: Fraction) -> None:
    every = max(1, math.ceil(fps / FASTEST_GIF))
    images = [Image.fromarray(frame) for frame in itertools.islice(frames, 0, None, every)]
    # Rounded to hundredths of a second, the unit of GIF, so that the whole lasts as long as the
    # video.
    ends = [round(100 * (number + 1) * every / fps) for number in range(len(images))]
    durations = [10 * (end - start) for start, end in itertools.pairwise([0, *ends])]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: Fraction) -> None:
    first = next(frames)
    H, W = (side + side % 2 for side in first.shape[:2])  # 2 x 2 pixels share their colour
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": QUALITY})
            stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
            for frame in itertools.chain([first], frames):
                padding = ((0, H - frame.shape[0]), (0, W - frame.shape[1]), (0, 0))
                even = np.pad(frame, padding, mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # of the file, not of the frames
            raise
        raise UserError(
            f"cannot be written as MP4, {W} x {H} pixels: {error.strerror}; "
            "lower --image_size or take --video_format frames"
        ) from error
