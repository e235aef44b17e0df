"""Images with object masks: drawn shapes, or image files with mask files of the same names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_xcit.data import shapes
from dino_xcit.data.decode import EXTENSIONS, FORMATS, reading_images
from dino_xcit.errors import UserError
from dino_xcit.figures.framing import Framing, any_size
from dino_xcit.weights.load import read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.inputs import ImageInput
    from dino_xcit.figures.model import AttentionModel

VOID = 255  # in masks of PASCAL VOC: neither object nor background
WHITE = 255


class Scene(NamedTuple):
    """An image with its object."""

    pixels: Tensor
    """uint8 (C, H', W'), framed; with --fit pad larger than the masks"""
    truth: Tensor
    """bool (H, W): the object"""
    counted: Tensor
    """bool (H, W): false where the mask is void"""


class SceneInput(NamedTuple):
    """A scene that can be read."""

    name: str
    """in messages"""
    read: Callable[[], Scene]


def scenes_of_shapes(
    config: AttentionConfig, model: AttentionModel, framing: Framing
) -> list[SceneInput]:
    """Validation images of the embedded set, as the run of the weights drew them."""
    run = read_run(config.weights[0])
    seed = config.seed if run is None else run.seed

    def read(index: int) -> Scene:
        shape = shapes.draw_shape(seed, "validation", index, model.channels)
        image, mask = torch.from_numpy(shape.image).permute(2, 0, 1), torch.from_numpy(shape.mask)
        return _framed_scene(framing, image, mask, torch.ones_like(mask))

    count = config.num_images or shapes.VALIDATION_COUNT
    return [SceneInput(f"shape {i}", functools.partial(read, i)) for i in range(count)]


def scenes_of_files(
    config: AttentionConfig, model: AttentionModel, framing: Framing, images: Iterable[ImageInput]
) -> list[SceneInput]:
    """Each image with the file of its name in the folder of masks.

    Raises:
        UserError: `--masks` is not a folder.
    """
    folder = Path(config.masks or "")
    if not folder.is_dir():
        raise UserError(f"--masks {folder} is not a folder; expected a folder of masks, or shapes")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            files.setdefault(path.stem, []).append(path)

    def read(image: ImageInput) -> Scene:
        truth, counted = read_mask(_mask_file(Path(image.where), files, folder))
        return _framed_scene(framing, image.read(model.channels), truth, counted)

    return [SceneInput(image.where, functools.partial(read, image)) for image in images]


def _mask_file(image: Path, files: dict[str, list[Path]], folder: Path) -> Path:
    """The mask file of an image; of several of its name, the one in a folder of the same name."""
    found = files.get(image.stem, [])
    if len(found) > 1:  # frames of several videos
        found = [path for path in found if path.parent.name == image.parent.name] or found
    if len(found) == 1:
        return found[0]
    count = f"{len(found)} masks" if found else "no mask"
    raise UserError(f"{count} named {image.stem} in --masks {folder}")


def read_mask(path: Path) -> tuple[Tensor, Tensor]:
    """Read a mask file.

    Values other than 0 are object. 255 is void, as in PASCAL VOC, in a mask that numbers its
    objects; in one of black and white, or of shades between them (a soft edge, JPEG), values above
    half are object.

    Returns:
        The object, and the pixels that count, bool (H, W).

    Raises:
        UserError: the file is not an image, or transparent.
    """
    try:
        with any_size(), reading_images(), Image.open(path, formats=FORMATS) as file:
            image = file.copy()  # decodes it
    except UserError as error:
        raise UserError(f"mask {path}: {error}") from None
    if not _is_opaque(image):
        raise UserError(f"mask {path}: transparent; expected grey or a palette")
    values = _values(image)
    if image.mode != "P" and _is_soft(values):
        return torch.from_numpy(values > WHITE // 2), torch.ones(values.shape, dtype=torch.bool)
    void = (values == VOID) & ((values != 0) & (values != VOID)).any()
    return torch.from_numpy((values != 0) & ~void), torch.from_numpy(~void)


def _is_opaque(image: Image.Image) -> bool:
    has_alpha = image.mode in ("LA", "PA", "RGBA")
    return not has_alpha or image.getchannel("A").getextrema() == (WHITE, WHITE)


def _values(image: Image.Image) -> np.ndarray:
    """Pixels of a mask as integers (H, W)."""
    single = image.mode in ("P", "L", "1", "I", "I;16")
    return np.array(image if single else image.convert("L")).astype(np.int64)


def _is_soft(values: np.ndarray) -> bool:
    """Whether these are shades up to white: numbers of objects do not get so high."""
    return bool(values.max(initial=0) <= WHITE and ((values > WHITE // 2) & (values < WHITE)).any())


def _framed_scene(framing: Framing, image: Tensor, truth: Tensor, counted: Tensor) -> Scene:
    if image.shape[-2:] != truth.shape:
        raise UserError(f"image of {_size(image)} pixels, mask of {_size(truth)}")
    pixels, (H, W) = framing.apply(image)
    masks, _ = framing.apply(torch.stack([truth, counted]).byte(), mode="nearest-exact")
    truth, counted = masks[:, :H, :W].bool()
    if not (truth & counted).any():
        raise UserError("no object in the mask")
    return Scene(pixels, truth, counted)


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]}"
