"""`dino-xcit attention`: images, folders and videos -> figures, films, an interactive page, a score.

What cannot be shown is told in one line; the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dino_xcit.errors import UserError
from dino_xcit.evaluate.report import table
from dino_xcit.figures.drawing import Sheet, head_colours, inches, overlay, rgb, write
from dino_xcit.figures.inputs import (
    Framing,
    ImageInput,
    VideoInput,
    find,
    look_at,
    own_images,
    shown,
)
from dino_xcit.figures.localization import listed, scenes_of_files, scenes_of_shapes, score
from dino_xcit.figures.maps import entropy
from dino_xcit.figures.model import AttentionModel, AttentionResult, open_checkpoints, open_models
from dino_xcit.figures.page import Exhibit, write_page
from dino_xcit.figures.sheets import OF_AN_IMAGE, OF_IMAGES, Canvas, columns_sheet, ends, options_of
from dino_xcit.figures.video import write_video
from dino_xcit.files import printable, replacing, write_json
from dino_xcit.runtime import device_of, keep_freed_memory, progress, require_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dino_xcit.config.attention import AttentionConfig

SUMMARY = "attention.json"
PAGE = "attention.html"
OF_SEVERAL = ("models",)
ALONE = ("heads", "overlay")
WITH_FEATURES = {"similarity", "pca"}
WITH_XCA = {"magnitude", "covariance"}


@dataclass(frozen=True, kw_only=True)
class AttentionOutcome:
    """What `dino-xcit attention` left out."""

    problems: list[str]
    """a line for each image or video that could not be shown"""

    @property
    def exit_code(self) -> int:
        """Of the command: 2 if something could not be shown."""
        return 2 if self.problems else 0


def attention(config: AttentionConfig) -> AttentionOutcome:
    """Draw attention maps; what `dino-xcit attention` does.

    Raises:
        UserError: nothing can be shown as asked.
    """
    inches(config.width)
    folder = Path(config.output_dir)
    require_folder(folder, "output_dir")
    device = device_of(config)
    keep_freed_memory()
    models = open_models(config, device)
    kinds = config.figures or (OF_SEVERAL if len(models) > 1 else () if config.masks else ALONE)
    checkpoints = open_checkpoints(config, device) if "training" in kinds else []
    frame = Framing([*models, *checkpoints], config.fit)
    sources, films, problems = find(config, frame)
    if not config.images and (kinds or config.html or config.masks != "shapes"):
        sources = own_images(config, len(models[0].offset))
    folder.mkdir(parents=True, exist_ok=True)
    if films and (config.figures or config.html or config.masks or len(models) > 1):
        problems += [
            f"{film.where}: a video, which --figures, --html, --masks, several --weights do not take"
            for film in films
        ]
        films = []
    if config.masks:
        problems += _score(config, models[0], frame, sources, folder)
    if kinds or config.html:
        images, unseen = _draw_figures(config, kinds, sources, models, checkpoints, frame, folder)
        problems += unseen
        for film in films:
            try:
                images.append(_draw_film(config, film, models[0], frame, folder))
            except (ValueError, OSError) as error:
                problems.append(f"{film.where}: {error}")
        _tell(config, images, problems, frame, folder)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(printable(f"dino-xcit attention: {problem}"), file=sys.stderr)
    return AttentionOutcome(problems=problems)


def _score(
    config: AttentionConfig,
    model: AttentionModel,
    frame: Framing,
    sources: Sequence[ImageInput],
    folder: Path,
) -> list[str]:
    of_shapes = config.masks == "shapes"
    scenes = (
        scenes_of_shapes(config, model, frame)
        if of_shapes
        else scenes_of_files(config, model, frame, sources)
    )
    try:
        content, sheet, problems = score(config, model, scenes)
    except ValueError as error:
        return [str(error)]
    write_json(
        folder / "masks.json",
        {**content, "problems": problems, "options": json.loads(options_of(config))},
    )
    _write(sheet, config, folder)
    print(listed(content, model.title))
    print(f"{content['images']} images: {folder}/masks.json, masks.{config.format[0]}")
    return problems


# -- figures ---------------------------------------------------------------------------------------------------------


def _draw_figures(
    config: AttentionConfig,
    kinds: Sequence[str],
    sources: Sequence[ImageInput],
    models: Sequence[AttentionModel],
    checkpoints: Sequence[AttentionModel],
    frame: Framing,
    folder: Path,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write every figure -> what is told of each image, and a line for each that could not be seen."""
    features, xca = config.html or bool(WITH_FEATURES & set(kinds)), bool(WITH_XCA & set(kinds))
    told: list[dict[str, Any]] = []
    problems: list[str] = []
    exhibits: list[Exhibit] = []
    pages = [
        sources[i : i + config.images_per_figure]
        for i in range(0, len(sources), config.images_per_figure)
    ]
    with progress(len(sources), "attention", "images", shown=True) as bar:
        for number, page in enumerate(pages, 1):
            seen_by_all: list[list[AttentionResult]] = []
            for source in page:
                try:
                    read = functools.lru_cache(source.read)
                    pixels = [read(len(model.offset)) for model in (*models, *checkpoints)]
                    first = [
                        look_at(source.name, image, model, frame, features, xca)
                        for image, model in zip(pixels, models, strict=False)
                    ]
                    others = zip(pixels[len(models) :], checkpoints, strict=True)
                    seen_by_all.append(
                        [
                            *first,
                            *(look_at(source.name, image, model, frame) for image, model in others),
                        ]
                    )
                except (ValueError, OSError) as error:
                    problems.append(f"{source.where}: {error}")
                else:
                    told.append(_about(seen_by_all[-1][0], source.where))
                    if config.html:
                        exhibits.append(_exhibit(seen_by_all[-1][0]))
                bar.update(1)
            page_name = f"_{number}" if len(pages) > 1 else ""
            for draw_sheet in (
                _sheets(config, kinds, seen_by_all, models, checkpoints) if seen_by_all else ()
            ):
                try:
                    sheet = draw_sheet()
                    of_several = sheet.name in (*OF_IMAGES, "models", "training")
                    _write(
                        dataclasses.replace(sheet, name=sheet.name + page_name)
                        if of_several
                        else sheet,
                        config,
                        folder,
                    )
                except (ValueError, OSError, MemoryError) as error:
                    problems.append(f"a figure of {printable(page[0].where)}: {error}")
    if exhibits:
        colours = [
            tuple(colour) for colour in head_colours(max(len(one.attention) for one in exhibits))
        ]
        write_page(
            folder / PAGE,
            exhibits,
            title=f"Class attention of {models[0].title}",
            subtitle=_framing(config, frame),
            threshold=config.threshold,
            clip=config.clip,
            colormap=config.colormap,
            colours=colours,
        )
    return told, problems


def _sheets(
    config: AttentionConfig,
    kinds: Sequence[str],
    views: Sequence[Sequence[AttentionResult]],
    models: Sequence[AttentionModel],
    checkpoints: Sequence[AttentionModel],
) -> Iterator[Callable[[], Sheet]]:
    """What draws the sheets of one page of images; views: of each image by each eye, then by each checkpoint."""
    first = [of_image[0] for of_image in views]
    for kind in kinds:
        if kind == "models":
            titles = [model.title for model in models]
            yield functools.partial(
                columns_sheet, kind, titles, [of_image[: len(models)] for of_image in views], config
            )
        elif kind == "training":
            titles = [model.title for model in checkpoints]
            yield functools.partial(
                columns_sheet, kind, titles, [of_image[len(models) :] for of_image in views], config
            )
        elif kind in OF_IMAGES:
            yield functools.partial(OF_IMAGES[kind], first, config)
        else:
            yield from (functools.partial(OF_AN_IMAGE[kind], [one], config) for one in first)


def _write(sheet: Sheet, config: AttentionConfig, folder: Path) -> None:
    write(
        sheet,
        folder,
        config.format,
        width=inches(config.width),
        titles=config.titles,
        dpi=config.dpi,
    )


def _exhibit(view: AttentionResult) -> Exhibit:
    return Exhibit(
        name=view.name,
        image=rgb(view.image),
        patch=view.patch,
        attention=view.attention,
        features=view.features,
    )


# -- videos ----------------------------------------------------------------------------------------------------------


def _draw_film(
    config: AttentionConfig, film: VideoInput, model: AttentionModel, frame: Framing, folder: Path
) -> dict[str, Any]:
    """Each frame, the map over it, and all heads in their colours, side by side, on one scale for the whole film.

    The frames are read twice: the scale is known once all of them have been looked at.
    """
    channels = len(model.offset)
    maps: list[np.ndarray] = []
    with progress(film.expected, f"{film.name}: attention", "frames", shown=True) as bar:
        for pixels in film.frames(channels):
            maps.append(look_at(film.name, pixels, model, frame).attention)
            bar.update(1)
            if maps[-1].shape != maps[0].shape:
                raise UserError(f"frame {len(maps) - 1} is not as large as those before")
    if not maps:
        raise UserError("a video without frames")
    path = (
        folder
        / f"{film.name}_attention{'' if config.video_format == 'frames' else '.' + config.video_format}"
    )
    with progress(len(maps), f"{film.name}: {path.name}", "frames", shown=True) as bar:
        write_video(path, _pictures(config, film, maps, model, frame, bar.update), film.fps)
    with replacing(folder / f"{film.name}_attention.npz") as beside:
        np.savez_compressed(
            beside, attention=np.stack(maps), fps=float(film.fps), options=options_of(config)
        )
    rows, columns = maps[0].shape[1:]
    return {
        "name": film.name,
        "file": film.where,
        "frames": len(maps),
        "patches": [columns, rows],
        "written": path.name,
    }


def _pictures(
    config: AttentionConfig,
    film: VideoInput,
    maps: Sequence[np.ndarray],
    model: AttentionModel,
    frame: Framing,
    done: Any,
) -> Iterator[np.ndarray]:
    """uint8 (H, 3 W, 3)"""
    one_map = [
        attention.mean(0) if config.head is None else attention[config.head] for attention in maps
    ]
    limits = ends(one_map, config.clip)
    of_heads = [ends(over_time, config.clip) for over_time in zip(*maps, strict=True)]
    for pixels, attention, one in zip(film.frames(len(model.offset)), maps, one_map, strict=True):
        image = shown(*frame.framed(pixels))
        canvas = Canvas(
            AttentionResult(
                name=film.name, image=image, patch=model.backbone.patch_size, attention=attention
            ),
            config,
        )
        over = overlay(canvas.image, canvas.heat(one, limits))
        heads = canvas.heads(attention, of_heads)
        yield np.rint(255 * np.concatenate([canvas.image, over, heads], axis=1)).astype(np.uint8)
        done(1)


# -- what is told ----------------------------------------------------------------------------------------------------


def _about(view: AttentionResult, where: str) -> dict[str, Any]:
    rows, columns = view.attention.shape[1:]
    nats, shares = entropy(torch.from_numpy(view.attention)), view.attention.sum((1, 2))
    return {
        "name": view.name,
        "file": where,
        "pixels": [view.image.shape[1], view.image.shape[0]],
        "patches": [columns, rows],
        "entropy": [round(value, 4) for value in nats.tolist()],
        "share_of_patches": [round(float(share), 4) for share in shares],
    }


def _framing(config: AttentionConfig, frame: Framing) -> str:
    return f"long side {frame.long_side or 'as it is'}, {config.fit} to multiples of {frame.patch} pixels"


def _tell(
    config: AttentionConfig,
    images: list[dict[str, Any]],
    problems: list[str],
    frame: Framing,
    folder: Path,
) -> None:
    """attention.json, and a table of the images on the terminal."""
    framing = _framing(config, frame)
    content = {
        "weights": list(config.weights),
        "framing": framing,
        "images": images,
        "problems": problems,
    }
    write_json(folder / SUMMARY, {**content, "options": json.loads(options_of(config))})
    stills = [one for one in images if "entropy" in one]
    rows = [
        [
            printable(one["name"]),
            "{} x {}".format(*one["pixels"]),
            "{} x {}".format(*one["patches"]),
            " ".join(f"{value:.2f}" for value in one["entropy"]),
            f"{math.log(math.prod(one['patches'])):.2f}",
        ]
        for one in stills
    ]
    if rows:
        print(table(["image", "pixels", "patches", "entropy of heads, nats", "at most"], rows))
    for film in (one for one in images if "frames" in one):
        print(printable(f"{film['file']}: {film['frames']} frames, {folder}/{film['written']}"))
    if images:
        print(printable(f"{framing}; {folder}/"))
