"""A video -> the same video with its attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

from dino_xcit.errors import UserError
from dino_xcit.figures.canvas import Canvas, clipped_range, selected_map
from dino_xcit.figures.framing import without_padding
from dino_xcit.figures.model import AttentionResult, attention_result
from dino_xcit.figures.pictures import overlay
from dino_xcit.figures.sheets import options_json
from dino_xcit.figures.video import write_video
from dino_xcit.files import replacing
from dino_xcit.runtime import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dino_xcit.figures.inputs import VideoInput
    from dino_xcit.figures.setup import Setup


class VideoSummary(TypedDict):
    """Entry of attention.json for a video."""

    name: str
    file: str
    frames: int
    patches: list[int]
    """columns and rows"""
    written: str
    """name of the new video"""


def draw_video(setup: Setup, video: VideoInput) -> VideoSummary:
    """Write each frame, its map over it and all heads in their colours, side by side.

    The whole video shares one colour scale, which is known after all frames have been through the
    backbone; so the video is decoded twice.

    Raises:
        UserError: the video cannot be read, its frames differ in size, or they do not fit into
        memory. OSError: a file cannot be read or written.
    """
    maps = _maps_of_frames(setup, video)
    kind = setup.config.video_format
    path = setup.folder / f"{video.name}_attention{'' if kind == 'frames' else '.' + kind}"
    label = f"{video.name}: {path.name}"
    with progress(len(maps), label, "frames", shown=True) as progress_bar:
        write_video(path, _pictures(setup, video, maps, progress_bar.update), video.fps)
    with replacing(setup.folder / f"{video.name}_attention.npz") as beside:
        np.savez_compressed(
            beside,
            attention=np.stack(maps),
            fps=float(video.fps),
            options=options_json(setup.config),
        )
    rows, columns = maps[0].shape[1:]
    return {
        "name": video.name,
        "file": video.where,
        "frames": len(maps),
        "patches": [columns, rows],
        "written": path.name,
    }


def _maps_of_frames(setup: Setup, video: VideoInput) -> list[np.ndarray]:
    """Class attention (h, rows, columns) of each frame."""
    model, framing = setup.models[0], setup.framing
    maps: list[np.ndarray] = []
    label = f"{video.name}: attention"
    with progress(video.num_frames, label, "frames", shown=True) as progress_bar:
        for pixels in video.frames(model.channels):
            maps.append(attention_result(video.name, pixels, model, framing).attention)
            progress_bar.update(1)
            if maps[-1].shape != maps[0].shape:
                raise UserError(
                    f"frame {len(maps) - 1} is not as large as those before; "
                    "expected frames of one size"
                )
    if not maps:
        raise UserError("a video without frames")
    return maps


def _pictures(
    setup: Setup, video: VideoInput, maps: Sequence[np.ndarray], done: Callable[[int], object]
) -> Iterator[np.ndarray]:
    """Frames of the new video, uint8 (H, 3 W, 3)."""
    config, model = setup.config, setup.models[0]
    limits = clipped_range([selected_map(attention, config) for attention in maps], config.clip)
    of_heads = [clipped_range(of_head, config.clip) for of_head in zip(*maps, strict=True)]
    for pixels, attention in zip(video.frames(model.channels), maps, strict=True):
        image = without_padding(*setup.framing.apply(pixels))
        patch = model.backbone.patch_size
        result = AttentionResult(name=video.name, image=image, patch=patch, attention=attention)
        canvas = Canvas(result, config)
        heat = canvas.heat(selected_map(attention, config), limits)
        heads = canvas.heads(attention, of_heads)
        frame = np.concatenate([canvas.image, overlay(canvas.image, heat), heads], axis=1)
        yield np.rint(255 * frame).astype(np.uint8)
        done(1)
