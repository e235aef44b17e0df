"""Images with object masks: drawn shapes, or image files with mask files of the same names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dino_xcit.data import shapes
from dino_xcit.data.folder import image_files
from dino_xcit.errors import UserError
from dino_xcit.figures.mask_files import ObjectMask, number_their_objects, read_mask
from dino_xcit.weights.load import read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.framing import Framing
    from dino_xcit.figures.inputs import ImageInput
    from dino_xcit.figures.model import AttentionModel


class Scene(NamedTuple):
    """An image with its object."""

    pixels: Tensor
    """uint8 (C, H', W'), framed; with --fit pad larger than the masks"""
    truth: Tensor
    """bool (H, W): the object"""
    counted: Tensor
    """bool (H, W): false where the mask is void"""
    reading: str
    """how the mask's values were read; empty for drawn shapes"""


class SceneInput(NamedTuple):
    """A scene that can be read."""

    name: str
    """in messages"""
    read: Callable[[], Scene]


class Scenes(NamedTuple):
    """The scenes to score."""

    inputs: list[SceneInput]
    problems: list[str]
    """a line about images without a mask"""


def scenes_of_shapes(config: AttentionConfig, model: AttentionModel, framing: Framing) -> Scenes:
    """Validation images of the embedded set, as the run of the weights drew them."""
    run = read_run(config.weights[0])
    seed = config.seed if run is None else run.seed

    def read(index: int) -> Scene:
        shape = shapes.draw_shape(seed, "validation", index, model.channels)
        image, truth = torch.from_numpy(shape.image).permute(2, 0, 1), torch.from_numpy(shape.mask)
        return _framed_scene(framing, image, ObjectMask(truth, torch.ones_like(truth), ""), "mask")

    count = config.num_images or shapes.VALIDATION_COUNT
    inputs = [SceneInput(f"shape {i}", functools.partial(read, i)) for i in range(count)]
    return Scenes(inputs, [])


def scenes_of_files(
    config: AttentionConfig, model: AttentionModel, framing: Framing, images: Sequence[ImageInput]
) -> Scenes:
    """Each image with the file of its name in the folder of masks.

    Raises:
        UserError: `--masks` is not a folder, or holds a mask of none of the images.
    """
    folder = Path(config.masks or "")
    if not folder.is_dir():
        raise UserError(f"--masks {folder} is not a folder; expected a folder of masks, or shapes")
    files: dict[str, list[Path]] = {}
    for path in image_files(folder):
        files.setdefault(path.stem, []).append(path)
    masks = {image: _files_of(Path(image.where), files) for image in images}
    found = [paths[0] for paths in masks.values() if paths]
    problems = _images_without_a_mask([image for image in images if not masks[image]], images)
    if problems and not found:
        raise UserError(f"--masks {folder}: {problems[0]}")
    numbered = number_their_objects(found)

    def read(image: ImageInput, paths: Sequence[Path]) -> Scene:
        if len(paths) > 1:
            raise UserError(f"{len(paths)} masks named {paths[0].stem} in --masks {folder}")
        mask = read_mask(paths[0], numbered)
        return _framed_scene(framing, image.read(model.channels), mask, f"mask {paths[0]}")

    inputs = [
        SceneInput(image.where, functools.partial(read, image, paths))
        for image, paths in masks.items()
        if paths
    ]
    return Scenes(inputs, problems)


def _files_of(image: Path, files: dict[str, list[Path]]) -> list[Path]:
    """The mask files of an image; of several of its name, the one in a folder of the same name."""
    of_name = files.get(image.stem, [])
    if len(of_name) > 1:  # frames of several videos
        return [path for path in of_name if path.parent.name == image.parent.name] or of_name
    return of_name


def _images_without_a_mask(
    missing: Sequence[ImageInput], images: Sequence[ImageInput]
) -> list[str]:
    if not missing:
        return []
    first = Path(missing[0].where)
    return [
        f"{len(missing)} of {len(images)} images have no mask; the first: {first}, "
        f"expected a file named {first.stem}"
    ]


def _framed_scene(framing: Framing, image: Tensor, mask: ObjectMask, name: str) -> Scene:
    if image.shape[-2:] != mask.truth.shape:
        raise UserError(f"image of {_size(image)} pixels, {name} of {_size(mask.truth)}")
    pixels, (H, W) = framing.apply(image)
    masks, _ = framing.apply(torch.stack([mask.truth, mask.counted]).byte(), mode="nearest-exact")
    truth, counted = masks[:, :H, :W].bool()
    if not (truth & counted).any():
        raise UserError(f"no object in the {name}")
    return Scene(pixels, truth, counted, mask.reading)


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-1]} x {tensor.shape[-2]}"
