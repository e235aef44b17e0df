"""Object masks -> a score for attention maps (DINO, section 4.2.2 and figure 4, on PASCAL VOC 2012).

Each head's map, cut to the patches that hold `--threshold` of its mass, against the object: Jaccard index. DINO tells the
best head of each image, which takes the masks to choose; beside it stands the one head that is best over all images. An
untrained network and centred blobs, as many as there are heads, are given the same choices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_xcit.data import shapes
from dino_xcit.data.decode import EXTENSIONS, FORMATS, reading_images
from dino_xcit.errors import UserError
from dino_xcit.evaluate.report import cell, scores, table
from dino_xcit.figures.drawing import Cell, Sheet, cut_out, scaled
from dino_xcit.figures.drawing import cell as figure_cell
from dino_xcit.figures.inputs import Framing, ImageInput, shown
from dino_xcit.figures.maps import jaccard, mass_mask
from dino_xcit.figures.video import any_size
from dino_xcit.runtime import progress
from dino_xcit.weights.load import build, read_run

if TYPE_CHECKING:
    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.model import AttentionModel

VOID = 255  # in PASCAL VOC's masks: neither object nor background
BLOB_SIZES = (
    0.15,
    0.5,
)  # standard deviations of the centred blobs, from and to, in shares of the image's sides
BATCH_PIXELS = 2**18  # that go through the backbone at once
SCORED, UNTRAINED, BLOBS = (
    "",
    "untrained",
    "centred blobs",
)  # sources of maps; the first goes by its title


class Scene(NamedTuple):
    """An image with its object."""

    pixels: Tensor
    """uint8 (C, H, W), framed; with --fit pad larger than the masks"""
    truth: Tensor
    """bool (H, W): the object"""
    counted: Tensor
    """bool (H, W): false where the mask does not say"""


Scenes = list[tuple[str, Callable[[], Scene]]]  # names, and what reads them


def scenes_of_shapes(config: AttentionConfig, model: AttentionModel, frame: Framing) -> Scenes:
    """The embedded set's validation images, as the run drew them."""
    run = read_run(config.weights[0])
    seed = config.seed if run is None else run.seed

    def scene(index: int) -> Scene:
        shape = shapes.draw_shape(seed, "validation", index, len(model.offset))
        mask = torch.from_numpy(shape.mask)
        return _scene(
            frame, torch.from_numpy(shape.image).permute(2, 0, 1), mask, torch.ones_like(mask)
        )

    return [
        (f"shape {i}", functools.partial(scene, i))
        for i in range(config.num_images or shapes.VALIDATION_COUNT)
    ]


def scenes_of_files(
    config: AttentionConfig, model: AttentionModel, frame: Framing, sources: Iterable[ImageInput]
) -> Scenes:
    """Each image with the file of its name in the folder of masks."""
    folder = Path(config.masks or "")
    if not folder.is_dir():
        raise UserError(f"--masks {folder} is not a folder; expected a folder of masks, or shapes")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            files.setdefault(path.stem, []).append(path)

    def scene(source: ImageInput) -> Scene:
        where = Path(source.where)
        found = files.get(where.stem, [])
        if len(found) > 1:  # frames of several films: that in a folder of the same name
            found = [path for path in found if path.parent.name == where.parent.name] or found
        if len(found) != 1:
            raise UserError(
                f"{len(found) or 'no'} mask{'s' * (len(found) > 1)} named {where.stem} in --masks {folder}"
            )
        truth, counted = read_mask(found[0])
        return _scene(frame, source.read(len(model.offset)), truth, counted)

    return [(source.where, functools.partial(scene, source)) for source in sources]


def read_mask(path: Path) -> tuple[Tensor, Tensor]:
    """A mask file -> where its object is and which pixels count, bool (H, W).

    What is not 0 is object. 255 is void, as in PASCAL VOC, in a mask that numbers its objects; in one that knows black and
    white, or shades between them (a soft edge, JPEG), what is brighter than half is object.
    """
    try:
        with any_size(), reading_images(), Image.open(path, formats=FORMATS) as file:
            if file.mode in ("LA", "PA", "RGBA") and file.getchannel("A").getextrema() != (
                VOID,
                VOID,
            ):
                raise UserError("transparent; expected grey or a palette")
            values = np.array(
                file if file.mode in ("P", "L", "1", "I", "I;16") else file.convert("L")
            ).astype(np.int64)
            numbered = file.mode == "P" or not _is_soft(values)
    except ValueError as error:
        raise UserError(f"mask {path}: {error}") from None
    if not numbered:
        return torch.from_numpy(values > VOID // 2), torch.ones(values.shape, dtype=torch.bool)
    void = (values == VOID) & ((values != 0) & (values != VOID)).any()
    return torch.from_numpy((values != 0) & ~void), torch.from_numpy(~void)


def _is_soft(values: np.ndarray) -> bool:
    """Whether these are shades up to white, not numbers of objects, which are not met so high."""
    return bool(values.max(initial=0) <= VOID and ((values > VOID // 2) & (values < VOID)).any())


def _scene(frame: Framing, image: Tensor, truth: Tensor, counted: Tensor) -> Scene:
    if image.shape[-2:] != truth.shape:
        raise UserError(f"image of {_size(image)} pixels, mask of {_size(truth)}")
    pixels, (H, W) = frame.framed(image)
    masks, _ = frame.framed(torch.stack([truth, counted]).byte(), mode="nearest-exact")
    truth, counted = masks[:, :H, :W].bool()
    if not (truth & counted).any():
        raise UserError("no object in the mask")
    return Scene(pixels, truth, counted)


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]}"


def blobs(count: int, rows: int, columns: int) -> Tensor:
    """Gaussians in the image's middle, from small to large (count, rows, columns)."""
    y, x = (
        (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5 for side in (rows, columns)
    )
    sigma = torch.linspace(*BLOB_SIZES, count, dtype=torch.float64)[:, None, None]
    return torch.exp(-(y[:, None].square() + x.square()) / (2 * sigma**2))


def score(
    config: AttentionConfig, model: AttentionModel, scenes: Scenes
) -> tuple[dict[str, Any], Sheet, list[str]]:
    """What masks.json holds, a sheet of the first images, and a line for each image that could not be scored.

    Raises ValueError if none could.
    """
    start = time.perf_counter()
    problems: list[str] = []
    torch.manual_seed(config.seed)
    untrained = model.with_backbone(build(model.backbone.metadata), UNTRAINED)
    heads = model.backbone.heads
    found: dict[str, list[Tensor]] = {SCORED: [], UNTRAINED: [], BLOBS: []}
    rows: list[list[Cell]] = []
    with progress(len(scenes), "masks", "images", shown=True) as bar:
        for batch in _batches(scenes, problems, bar.update):
            pixels = torch.stack([scene.pixels for scene in batch])
            truth = torch.stack([scene.truth for scene in batch])[:, None]
            counted = torch.stack([scene.counted for scene in batch])[:, None]
            maps = {
                SCORED: model(pixels).attention.cpu(),
                UNTRAINED: untrained(pixels).attention.cpu(),
            }
            maps[BLOBS] = blobs(heads, *maps[UNTRAINED].shape[2:]).expand_as(maps[UNTRAINED])
            masks = {
                name: _on_pixels(mass_mask(maps[name], config.threshold), truth, model)
                for name in maps
            }
            indices = {name: jaccard(masks[name], truth, counted) for name in masks}  # (B, h)
            for name, of_batch in indices.items():
                found[name].append(of_batch)
            for number in range(min(len(batch), config.images_per_figure - len(rows))):
                best = {name: masks[name][number, indices[name][number].argmax()] for name in masks}
                rows.append(_row(batch[number], best, {SCORED: model.title} if not rows else None))
    if not rows:
        raise UserError(
            f"--masks {config.masks}: " + (problems[0] if problems else "no images to score")
        )
    results = {
        name: _result(torch.cat(of_images), config.seed) for name, of_images in found.items()
    }
    content = {
        "weights": model.weights,
        "results": results.pop(SCORED),
        "baselines": results,
        "images": len(scenes) - len(problems),
        "layer": config.layer,
        "threshold": config.threshold,
        "image_size": model.long_side,
        "seconds": round(time.perf_counter() - start, 2),
    }
    return content, Sheet(name="masks", rows=rows), problems


def listed(content: dict[str, Any], title: str) -> str:
    """The scores as a table."""
    rows = [(title, content["results"]), *content["baselines"].items()]
    header = [
        "Jaccard index with the object, %",
        "best head of each image [95 %]",
        "one head for all [95 %]",
    ]
    return table(
        header, [[name, cell(row, "best_head"), cell(row, "one_head")] for name, row in rows]
    )


def _batches(
    scenes: Scenes, problems: list[str], done: Callable[[int], Any]
) -> Iterator[list[Scene]]:
    """Scenes of one size together, as many as have BATCH_PIXELS."""
    batch: list[Scene] = []
    for name, read in scenes:
        try:
            scene = read()
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
            done(1)
            continue
        size = scene.pixels.shape
        if batch and (
            batch[0].pixels.shape != size or (len(batch) + 1) * size[1] * size[2] > BATCH_PIXELS
        ):
            yield batch
            done(len(batch))
            batch = []
        batch.append(scene)
    if batch:
        yield batch
        done(len(batch))


def _on_pixels(masks: Tensor, truth: Tensor, model: AttentionModel) -> Tensor:
    """Masks of patches (B, h, rows, columns) -> of pixels (B, h, H, W)."""
    patch, (H, W) = model.backbone.patch_size, truth.shape[-2:]
    return masks.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[..., :H, :W]


def _row(scene: Scene, best: dict[str, Tensor], titles: dict[str, str] | None) -> list[Cell]:
    """The image, its object, and what the best head of each source of maps keeps. titles: where other than names."""
    H, W = scene.truth.shape
    image, times = scaled(shown(scene.pixels, (H, W)), 1, max(H, W))
    pictures = {"image": image}
    for name, mask in {"object": scene.truth, **best}.items():
        pictures[name] = cut_out(image, mask.numpy().repeat(times, 0).repeat(times, 1))
    return [
        figure_cell(picture, "" if titles is None else titles.get(name, name))
        for name, picture in pictures.items()
    ]


def _result(indices: Tensor, seed: int) -> dict[str, Any]:
    """Jaccard indices (images, heads) -> percents with their intervals."""
    head = int(indices.mean(0).argmax())
    of_images = {"best_head": indices.max(1).values.numpy(), "one_head": indices[:, head].numpy()}
    return {
        **scores(of_images, seed),
        "head": head,
        "heads": [round(100 * one, 3) for one in indices.mean(0).tolist()],
    }
