"""Apply a saved head to images without labels: `linear-eval --predict`, `seg-eval --predict`.

All images in --data_path are taken, at any depth. Classes are written as a CSV file, segmentations
as a PNG file for each image, of its size.
Axes: B crops, N patches, K classes, S side of a crop, h and w of the resized image.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dino_xcit.data.decode import one_line
from dino_xcit.data.folder import FolderSet, list_images, one_path
from dino_xcit.data.framing import resize
from dino_xcit.errors import ImageError, UserError
from dino_xcit.evaluate.features import FrozenFeatures
from dino_xcit.evaluate.inputs import CLASSIFICATION, Task, open_inputs
from dino_xcit.evaluate.probe import load_head
from dino_xcit.evaluate.report import output_folder
from dino_xcit.evaluate.saved_head import require_channels, with_sizes
from dino_xcit.evaluate.seg_head import load_seg_head
from dino_xcit.files import replacing
from dino_xcit.run_folder import PREDICTED_CLASSES, PREDICTED_MASKS
from dino_xcit.runtime import launch, progress, say, summed

if TYPE_CHECKING:
    from torch import Tensor

    from dino_xcit.config.evaluation import EvalConfig, LinearConfig, SegConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.evaluate.features import FeatureExtractor
    from dino_xcit.evaluate.report import Report
    from dino_xcit.evaluate.seg_head import LinearSegHead

SPLIT = "validation"  # under which the images are opened, as the frame knows two splits


def open_all(config: EvalConfig) -> tuple[dict[str, ImageSet], dict[str, int]]:
    """Open all images in --data_path; an image's label is its index.

    Raises:
        UserError: There are none.
    """
    root = Path(one_path(config) or "")
    output = Path(config.output_dir).resolve() if config.output_dir else None
    if output == root.resolve():  # masks that an earlier call predicted are no images
        output = output / PREDICTED_MASKS
    listing = list_images(root, output)
    if not listing.files:
        found = "has no images" if root.is_dir() else "is no folder"
        raise UserError(f"--data_path {root} {found}; expected a folder of images")
    images = FolderSet(root, listing, config.in_chans or 3)
    images.labels = np.arange(len(images))
    return {SPLIT: images}, {}


# -- classes -----------------------------------------------------------------------------------


def predict_classes(config: LinearConfig) -> Report:
    """Write the class of each image to predictions.csv; return where, and how many.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    assert config.predict is not None
    head, about = load_head(Path(config.predict), "predict")
    names: dict[int, str] = about["classes"]
    folder, fabric = output_folder(config), launch(config)
    flag = f"--predict {config.predict}"
    config = with_sizes(config, about, flag)
    with open_inputs(config, fabric, _unlabelled(CLASSIFICATION)) as inputs:
        features = inputs.features[0]
        assert isinstance(features, FrozenFeatures)
        require_channels(head.weight.shape[1], head.choice.dim(features), flag)
        tokens, indices = features.split(SPLIT)
        probability, label = head.classify(tokens, fabric.device)
        images = [features.images[SPLIT].name(i) for i in indices.tolist()]
        unreadable = features.unreadable
    rows = [
        (image, names.get(number, number), number, f"{share:.4f}")
        for image, number, share in zip(images, label.tolist(), probability.tolist(), strict=True)
    ]
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / PREDICTED_CLASSES) as path, path.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "class", "label", "probability"), *rows])
        print(f"{folder}: {PREDICTED_CLASSES}, {len(rows)} images")
    return _report(folder / PREDICTED_CLASSES, len(rows), unreadable)


def _unlabelled(task: Task) -> Task:
    """The task on images without labels."""
    return task._replace(open=open_all)


def _report(path: Path, images: int, unreadable: int) -> Report:
    return {"predictions": str(path), "images": images, "unreadable": unreadable}


# -- masks -------------------------------------------------------------------------------------


def predict_masks(config: SegConfig, task: Task) -> Report:
    """Write a mask of each image's size to seg_masks/; return where, and how many.

    The resized image is covered by crops, whose logits are added where they overlap.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    assert config.predict is not None
    head, about = load_seg_head(Path(config.predict))
    values = np.array([int(value) for value in about["classes"]])
    folder, fabric = output_folder(config) / PREDICTED_MASKS, launch(config)
    flag = f"--predict {config.predict}"
    config = with_sizes(config, about, flag)
    with open_inputs(config, fabric, _unlabelled(task)) as inputs:
        features = inputs.features[0]
        assert isinstance(features, FrozenFeatures)
        require_channels(head.weight.shape[1], features.shape[1], flag)
        head = head.to(fabric.device)
        images, problems = features.images[SPLIT], []
        own = range(fabric.global_rank, len(images), fabric.world_size)
        with progress(len(own), "masks", "images", fabric.is_global_zero) as bar:
            for index in own:
                name = images.name(index)
                try:
                    image = images.read(index)
                except (ImageError, OSError) as error:
                    problems.append(f"{name}: {one_line(error)}")
                else:
                    mask = values[segment(image, features.extractor, head)]
                    _write_mask(mask, folder / Path(name).relative_to(one_path(config) or ""))
                bar.update()
    if problems:
        say(
            f"{len(problems)} of {len(own)} images cannot be read and are left out; the first is "
            f"{problems[0]}"
        )
    unreadable = int(summed(fabric, torch.tensor(len(problems))))
    if fabric.is_global_zero:
        print(f"{folder}: masks of {len(images) - unreadable} images")
    return _report(folder, len(images) - unreadable, unreadable)


def _write_mask(mask: np.ndarray, image: Path) -> None:
    path = image.with_name(f"{image.name}.png")  # images may differ in the ending only
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if mask.max() <= 255 else np.uint16
    with replacing(path) as beside:
        Image.fromarray(mask.astype(dtype)).save(beside)


def segment(image: Tensor, extractor: FeatureExtractor, head: LinearSegHead) -> np.ndarray:
    """Image, uint8 (C, H, W) -> the number of the class of each pixel, (H, W)."""
    side, short_side = extractor.transform.image_size, extractor.transform.resize_size
    _, H, W = image.shape
    h, w = (max(side, length * short_side // min(H, W)) for length in (H, W))
    resized = resize(image[None], h, w)[0]
    corners = [(top, left) for top in _starts(h, side) for left in _starts(w, side)]
    total: Any = 0
    for top, left in corners:
        crop = resized[None, :, top : top + side, left : left + side]
        logits = head(extractor(crop), side)  # (1, K, S, S)
        total = total + F.pad(logits, (left, w - left - side, top, h - top - side))
    # The number of crops on a pixel is the same for all classes, so sums rank as means do.
    predicted = total.argmax(1, keepdim=True).float()
    number: np.ndarray = F.interpolate(predicted, (H, W), mode="nearest-exact")[0, 0].cpu().numpy()
    return number.astype(np.int64)


def _starts(length: int, side: int) -> list[int]:
    """First pixels of the fewest crops that cover a length, evenly spread."""
    count = math.ceil(length / side)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
