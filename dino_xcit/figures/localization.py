"""Score of attention maps against object masks (DINO, section 4.2.2 and figure 4).

Each head's map, cut to the patches that hold `--threshold` of its mass, is compared with the object
by the Jaccard index. DINO reports the best head of each image, which takes the masks to choose;
beside it stands the one head that is best over all images. An untrained network and as many centred
blobs as there are heads are scored in the same way.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.evaluate.report import Report, Result, scores, table, with_interval
from dino_xcit.figures.drawing import Cell, Sheet, as_cell
from dino_xcit.figures.framing import without_padding
from dino_xcit.figures.maps import jaccard, mass_mask
from dino_xcit.figures.model import finite_maps
from dino_xcit.figures.pictures import canvas_image, cut_out
from dino_xcit.model.xcit import with_class_attention
from dino_xcit.runtime import progress
from dino_xcit.weights.build import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.model import AttentionModel
    from dino_xcit.figures.object_masks import Scene, SceneInput

# Standard deviations of the smallest and the largest blob, in shares of the image's sides.
BLOB_SIZES = (0.15, 0.5)
BATCH_PIXELS = 2**18  # that the backbone processes at once
# Sources of maps: the scored weights, whose title the user chooses, and the baselines.
WEIGHTS, UNTRAINED, BLOBS = "", "untrained", "centred blobs"


class Localization(NamedTuple):
    """Scores of the maps of one backbone."""

    content: Report
    """for masks.json"""
    sheet: Sheet
    """the first images with their masks"""
    problems: list[str]
    """a line for each image that could not be scored"""


class _ScoredBatch(NamedTuple):
    scenes: list[Scene]
    masks: dict[str, Tensor]
    """of each source: bool (B, h, H, W)"""
    indices: dict[str, Tensor]
    """of each source: Jaccard index (B, h)"""


def score(
    config: AttentionConfig, model: AttentionModel, scenes: Sequence[SceneInput]
) -> Localization:
    """Score the maps of a backbone and of the baselines on all scenes.

    Raises:
        UserError: no scene could be scored.
    """
    start = time.perf_counter()
    readings: Counter[str] = Counter()
    filled = 0
    untrained = untrained_model(model, config.seed)
    problems: list[str] = []
    indices: dict[str, list[Tensor]] = {WEIGHTS: [], UNTRAINED: [], BLOBS: []}
    rows: list[list[Cell]] = []
    with progress(len(scenes), "masks", "images", shown=True) as progress_bar:
        for batch in _batches(scenes, problems, progress_bar.update):
            scored = _score_batch(batch, model, untrained, config.threshold)
            readings.update(scene.reading for scene in batch)
            filled += sum(not (scene.counted & ~scene.truth).any() for scene in batch)
            for source, of_batch in scored.indices.items():
                indices[source].append(of_batch)
            for number in range(min(len(batch), config.images_per_figure - len(rows))):
                row = _sheet_row(scored, number, model.title)
                rows.append([dataclasses.replace(c, title="") for c in row] if rows else row)
    if not rows:
        reason = f"none of {len(scenes)} images can be scored; the first: {problems[0]}"
        raise UserError(f"--masks {config.masks}: {reason if problems else 'no images to score'}")
    scored_images = len(scenes) - len(problems)
    if filled == scored_images:
        raise UserError(
            f"--masks {config.masks}: no mask has a background, so that any map scores its own "
            "area; expected 0 or black where there is no object"
        )
    results = {source: _result(torch.cat(one), config.seed) for source, one in indices.items()}
    content = {
        "weights": model.weights,
        "results": results.pop(WEIGHTS),
        "baselines": results,
        "images": scored_images,
        "images_without_background": filled,
        "masks": dict(readings),
        "layer": config.layer,
        "threshold": config.threshold,
        "image_size": model.long_side,
        "seconds": round(time.perf_counter() - start, 2),
    }
    return Localization(content, Sheet(name="masks", rows=rows), problems)


def untrained_model(model: AttentionModel, seed: int) -> AttentionModel:
    """A model of the same architecture with random weights. Leaves the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = build(model.backbone.metadata)
    return model.with_backbone(with_class_attention(backbone), UNTRAINED)


def blobs(count: int, rows: int, columns: int) -> Tensor:
    """Gaussians in the middle of the image, from small to large, (count, rows, columns)."""
    y, x = (
        (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5 for side in (rows, columns)
    )
    sigma = torch.linspace(*BLOB_SIZES, count, dtype=torch.float64)[:, None, None]
    return torch.exp(-(y[:, None].square() + x.square()) / (2 * sigma**2))


def scores_table(content: Report, title: str) -> str:
    """The scores of `Localization.content` as a table."""
    rows = [(title, content["results"]), *content["baselines"].items()]
    header = [
        "Jaccard index with the object, %",
        "best head of each image [95 %]",
        "one head for all [95 %]",
    ]
    return table(
        header,
        [
            [name, with_interval(row, "best_head"), with_interval(row, "one_head")]
            for name, row in rows
        ],
    )


def notes(content: Report) -> list[str]:
    """Lines on how the masks were read, and on those that the score means little for."""
    readings = [f"{count} {reading}" for reading, count in content["masks"].items() if reading]
    lines = [f"masks: {', '.join(readings)}"] if readings else []
    filled = content["images_without_background"]
    if filled:
        lines.append(
            f"{filled} of {content['images']} masks have no background: there any map scores its "
            "own area"
        )
    return lines


def _batches(
    scenes: Sequence[SceneInput], problems: list[str], done: Callable[[int], object]
) -> Iterator[list[Scene]]:
    """Batches of consecutive scenes of one size, of up to BATCH_PIXELS.

    Args:
        scenes: what to read.
        problems: gets a line for each scene that cannot be read.
        done: called with the number of scenes that are finished.
    """
    batch: list[Scene] = []
    for scene_input in scenes:
        try:
            scene = scene_input.read()
        except (UserError, OSError) as error:
            problems.append(f"{scene_input.name}: {error}")
            done(1)
            continue
        _, H, W = size = scene.pixels.shape
        if batch and (batch[0].pixels.shape != size or (len(batch) + 1) * H * W > BATCH_PIXELS):
            yield batch
            done(len(batch))
            batch = []
        batch.append(scene)
    if batch:
        yield batch
        done(len(batch))


def _score_batch(
    scenes: list[Scene], model: AttentionModel, untrained: AttentionModel, threshold: float
) -> _ScoredBatch:
    pixels = torch.stack([scene.pixels for scene in scenes])
    truth = torch.stack([scene.truth for scene in scenes])[:, None]  # (B, 1, H, W)
    counted = torch.stack([scene.counted for scene in scenes])[:, None]
    maps = {
        WEIGHTS: finite_maps(model(pixels), model).attention.cpu(),
        UNTRAINED: untrained(pixels).attention.cpu(),
    }  # (B, h, rows, columns)
    like = maps[UNTRAINED]
    maps[BLOBS] = blobs(model.backbone.heads, *like.shape[2:]).expand_as(like)
    patch = model.backbone.patch_size
    masks = {
        source: _on_pixels(mass_mask(of_source, threshold), patch, truth)
        for source, of_source in maps.items()
    }
    indices = {source: jaccard(mask, truth, counted) for source, mask in masks.items()}
    return _ScoredBatch(scenes, masks, indices)


def _on_pixels(masks: Tensor, patch: int, like: Tensor) -> Tensor:
    """Masks of patches (B, h, rows, columns) -> of pixels (B, h, H, W)."""
    H, W = like.shape[-2:]
    return masks.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[..., :H, :W]


def _sheet_row(scored: _ScoredBatch, number: int, title: str) -> list[Cell]:
    """One image of the batch, its object, and the mask of the best head of each source."""
    scene = scored.scenes[number]
    H, W = scene.truth.shape
    image, times = canvas_image(without_padding(scene.pixels, (H, W)), 1, max(H, W))
    masks = [("object", scene.truth)]
    for source, of_batch in scored.masks.items():
        best = scored.indices[source][number].argmax()
        masks.append((title if source == WEIGHTS else source, of_batch[number, best]))
    cells = [as_cell(image, "image")]
    for name, mask in masks:
        picture = cut_out(image, mask.numpy().repeat(times, 0).repeat(times, 1))
        cells.append(as_cell(picture, name))
    return cells


def _result(indices: Tensor, seed: int) -> Result:
    """Jaccard indices (images, heads) -> percentages with their intervals."""
    head = int(indices.mean(0).argmax())
    of_images = {"best_head": indices.max(1).values.numpy(), "one_head": indices[:, head].numpy()}
    return {
        **scores(of_images, seed),
        "head": head,
        "heads": [round(100 * one, 3) for one in indices.mean(0).tolist()],
    }
