"""`dino-xcit attention`: images and videos -> figures, videos, an interactive page, a score.

An image or video that cannot be shown becomes one line; the others are still done.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dino_xcit.errors import UserError
from dino_xcit.evaluate.report import table
from dino_xcit.figures.image_figures import ImageSummary, draw_images
from dino_xcit.figures.inputs import ImageInput, VideoInput, find, own_images
from dino_xcit.figures.localization import notes, score, scores_table
from dino_xcit.figures.object_masks import scenes_of_files, scenes_of_shapes
from dino_xcit.figures.setup import Setup, open_setup
from dino_xcit.figures.sheets import options_json
from dino_xcit.figures.video_figures import VideoSummary, draw_video
from dino_xcit.files import printable, write_json
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.attention import AttentionConfig

SUMMARY = "attention.json"
SCORES = "masks.json"


@dataclass(frozen=True, kw_only=True)
class AttentionOutcome:
    """Result of `dino-xcit attention`."""

    problems: list[str]
    """a line for each image, video or figure that could not be shown"""

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 2 if something could not be shown."""
        return 2 if self.problems else 0


def attention(config: AttentionConfig) -> AttentionOutcome:
    """Draw attention maps of images and videos, and score them against object masks.

    Raises:
        UserError: an option cannot be used, so that nothing can be shown.
    """
    setup = open_setup(config)
    _say_what_is_assumed(setup)
    images, videos, problems = find(config, setup.framing)
    if not config.images and (setup.kinds or config.html or config.masks != "shapes"):
        images = own_images(config, setup.models[0].channels)
    setup.folder.mkdir(parents=True, exist_ok=True)
    if config.figures or config.html or config.masks or len(setup.models) > 1:
        problems += [
            f"{video.where}: a video; --figures, --html, --masks and several --weights take images"
            for video in videos
        ]
        videos = []
    if config.masks:
        problems += _score_masks(setup, images)
    if setup.kinds or config.html:
        problems += _draw(setup, images, videos, problems)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(printable(f"dino-xcit attention: {problem}"), file=sys.stderr)
    return AttentionOutcome(problems=problems)


def _say_what_is_assumed(setup: Setup) -> None:
    for model in setup.models:
        if model.assumed:
            flags = " and ".join(f"--{flag}" for flag in model.assumed)
            say(f"{model.weights} holds no {' and '.join(model.assumed)}: ImageNet's ({flags})")


def _draw(
    setup: Setup,
    images: Sequence[ImageInput],
    videos: Sequence[VideoInput],
    before: Sequence[str],
) -> list[str]:
    """Write all figures and attention.json, print a table; return a line for each failure.

    Args:
        setup: models and options.
        images: to draw.
        videos: to draw.
        before: earlier problems, which attention.json lists too.
    """
    summaries, problems = draw_images(setup, images)
    video_summaries: list[VideoSummary] = []
    for video in videos:
        try:
            video_summaries.append(draw_video(setup, video))
        except (UserError, OSError) as error:
            problems.append(f"{video.where}: {error}")
    content = {
        "weights": list(setup.config.weights),
        "framing": str(setup.framing),
        "images": [*summaries, *video_summaries],
        "problems": [*before, *problems],
        "options": json.loads(options_json(setup.config)),
    }
    write_json(setup.folder / SUMMARY, content)
    _print_summaries(setup, summaries, video_summaries)
    return problems


def _print_summaries(
    setup: Setup, images: Sequence[ImageSummary], videos: Sequence[VideoSummary]
) -> None:
    rows = [
        [
            printable(one["name"]),
            "{} x {}".format(*one["pixels"]),
            "{} x {}".format(*one["patches"]),
            " ".join(f"{value:.2f}" for value in one["entropy"]),
            f"{math.log(math.prod(one['patches'])):.2f}",
        ]
        for one in images
    ]
    if rows:
        print(table(["image", "pixels", "patches", "entropy of heads, nats", "maximum"], rows))
    for one in videos:
        print(printable(f"{one['file']}: {one['frames']} frames, {setup.folder}/{one['written']}"))
    if images or videos:
        print(printable(f"{setup.framing}; {setup.folder}/"))


def _score_masks(setup: Setup, images: Sequence[ImageInput]) -> list[str]:
    """Write masks.json and its figure, print the scores; return a line for each failure."""
    config, model = setup.config, setup.models[0]
    if config.masks == "shapes":
        scenes = scenes_of_shapes(config, model, setup.framing)
    else:
        scenes = scenes_of_files(config, model, setup.framing, images)
    try:
        content, sheet, problems = score(config, model, scenes.inputs)
    except UserError as error:
        return [*scenes.problems, str(error)]
    problems = [*scenes.problems, *problems]
    options = json.loads(options_json(config))
    write_json(setup.folder / SCORES, {**content, "problems": problems, "options": options})
    setup.write(sheet)
    print(scores_table(content, model.title))
    for line in notes(content):
        print(line)
    count, picture = content["images"], f"{sheet.name}.{config.format[0]}"
    print(f"{count} images: {setup.folder}/{SCORES}, {picture}")
    return problems
