"""Images -> the figures of `--figures` and the interactive page of `--html`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from dino_xcit.errors import UserError
from dino_xcit.figures.drawing import Sheet
from dino_xcit.figures.maps import entropy
from dino_xcit.figures.model import AttentionResult, attention_result
from dino_xcit.figures.page import Exhibit, write_page
from dino_xcit.figures.pictures import head_colours, rgb
from dino_xcit.runtime import progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from dino_xcit.figures.inputs import ImageInput
    from dino_xcit.figures.model import AttentionModel
    from dino_xcit.figures.setup import Setup
    from dino_xcit.figures.sheets import FigureRow

PAGE = "attention.html"


class ImageSummary(TypedDict):
    """Entry of attention.json for an image."""

    name: str
    file: str
    pixels: list[int]
    """width and height"""
    patches: list[int]
    """columns and rows"""
    entropy: list[float]
    """of each head, nats"""
    share_of_patches: list[float]
    """of each head: one minus the weight of the class token on itself"""


class ImageFigures(NamedTuple):
    """The images that were drawn, and the failures."""

    summaries: list[ImageSummary]
    problems: list[str]
    """a line for each image or figure that could not be shown"""


class _ImageResults(NamedTuple):
    """Results of one image."""

    where: str
    models: list[AttentionResult]
    checkpoints: list[AttentionResult]


def draw_images(setup: Setup, images: Sequence[ImageInput]) -> ImageFigures:
    """Write every figure of the images, `--images_per_figure` at a time, and the page."""
    summaries: list[ImageSummary] = []
    problems: list[str] = []
    exhibits: list[Exhibit] = []
    size = setup.config.images_per_figure
    groups = [images[start : start + size] for start in range(0, len(images), size)]
    with progress(len(images), "attention", "images", shown=True) as progress_bar:
        for number, group in enumerate(groups, 1):
            results: list[_ImageResults] = []
            for image in group:
                try:
                    result = _results_of(image, setup)
                except (UserError, OSError) as error:
                    problems.append(f"{image.where}: {error}")
                else:
                    results.append(result)
                progress_bar.update(1)
            summaries += [_summary(result) for result in results]
            if setup.config.html:
                exhibits += [_exhibit(result.models[0]) for result in results]
            if results:
                suffix = f"_{number}" if len(groups) > 1 else ""
                problems += _write_figures(setup, results, suffix)
    if exhibits:
        _write_page(setup, exhibits)
    return ImageFigures(summaries, problems)


def _results_of(image: ImageInput, setup: Setup) -> _ImageResults:
    """Read an image and compute the maps that the figures and the page need.

    Raises:
        UserError: the image cannot be framed, or does not fit into memory.
        OSError: it cannot be read.
    """
    read = functools.lru_cache(image.read)  # once for all models of the same channels
    pixels = [read(model.channels) for model in (*setup.models, *setup.checkpoints)]
    of_models = [
        _result_of(image.name, of_model, model, setup, checkpoints=False)
        for of_model, model in zip(pixels, setup.models, strict=False)
    ]
    of_checkpoints = [
        _result_of(image.name, of_model, model, setup, checkpoints=True)
        for of_model, model in zip(pixels[len(setup.models) :], setup.checkpoints, strict=True)
    ]
    return _ImageResults(image.where, of_models, of_checkpoints)


def _result_of(
    name: str, pixels: Tensor, model: AttentionModel, setup: Setup, *, checkpoints: bool
) -> AttentionResult:
    """Compute the maps of one model that the figures of its kind of models need."""
    rows = [row for row in setup.rows.values() if (row.models == "checkpoints") == checkpoints]
    features = any(row.features for row in rows) or (setup.config.html and not checkpoints)
    xca = any(row.xca for row in rows)
    return attention_result(name, pixels, model, setup.framing, features=features, xca=xca)


def _write_figures(setup: Setup, results: Sequence[_ImageResults], suffix: str) -> list[str]:
    """Write the figures of a group of images; return a line for each that could not be drawn.

    Args:
        setup: models and options.
        results: of the images.
        suffix: of the names of figures of several images.
    """
    problems = []
    for kind, row in setup.rows.items():
        for of_sheet in _by_sheet(row, results):
            try:
                figure = row.draw(of_sheet, setup.config)
                if isinstance(figure, Sheet) and not row.per_image:
                    figure = dataclasses.replace(figure, name=figure.name + suffix)
                setup.write(figure)
            except (UserError, OSError) as error:
                problems.append(f"{kind} figure of {results[0].where}: {error}")
            except MemoryError as error:
                reason = str(error) or "not enough memory"
                problems.append(f"{kind} figure of {results[0].where}: {reason}; lower --dpi")
    return problems


def _by_sheet(row: FigureRow, results: Sequence[_ImageResults]) -> Iterator[list[AttentionResult]]:
    """The results of each sheet of a kind, in the order of the images, then of the models."""
    if row.models == "first":
        of_images = [result.models[:1] for result in results]
    elif row.models == "all":
        of_images = [result.models for result in results]
    else:
        of_images = [result.checkpoints for result in results]
    if row.per_image:
        yield from of_images
    else:
        yield list(itertools.chain(*of_images))


def _summary(result: _ImageResults) -> ImageSummary:
    first = result.models[0]
    rows, columns = first.attention.shape[1:]
    nats = entropy(torch.from_numpy(first.attention)).tolist()
    shares = first.attention.sum((1, 2)).tolist()
    return {
        "name": first.name,
        "file": result.where,
        "pixels": [first.image.shape[1], first.image.shape[0]],
        "patches": [columns, rows],
        "entropy": [round(value, 4) for value in nats],
        "share_of_patches": [round(share, 4) for share in shares],
    }


def _exhibit(result: AttentionResult) -> Exhibit:
    return Exhibit(
        name=result.name,
        image=rgb(result.image),
        patch=result.patch,
        attention=result.attention,
        features=result.features,
    )


def _write_page(setup: Setup, exhibits: Sequence[Exhibit]) -> None:
    heads = max(len(exhibit.attention) for exhibit in exhibits)
    write_page(
        setup.folder / PAGE,
        exhibits,
        title=f"Class attention of {setup.models[0].title}",
        subtitle=str(setup.framing),
        threshold=setup.config.threshold,
        clip=setup.config.clip,
        colormap=setup.config.colormap,
        colours=[tuple(colour) for colour in head_colours(heads).tolist()],
    )
