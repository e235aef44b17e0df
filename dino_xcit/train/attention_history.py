"""Class attention of the teacher during pretraining, on the same few images at each evaluation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.data.framing import EvalDataset, Transform, default_resize
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.figures.drawing import Sheet, inches, write
from dino_xcit.figures.maps import class_attention
from dino_xcit.figures.model import AttentionResult
from dino_xcit.figures.sheets import columns_sheet
from dino_xcit.files import replacing
from dino_xcit.run_folder import ATTENTION, ATTENTION_MAPS, TEACHER

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.model.backbone import Backbone

SHOWN_IMAGES = 4
SHOWN_STEPS = 8  # evenly spaced, first and last included; attention.npz has all steps
TRIED_IMAGES = 50  # read until `SHOWN_IMAGES` readable ones are found


class AttentionHistory:
    """attention.png and attention.npz of a run folder, extended at each evaluation.

    Only for backbones with class attention.

    Args:
        config: options of the run.
        images: the first readable ones are shown.
        folder: the run folder.
        step: step from which the run continues; maps of later steps are dropped.
    """

    def __init__(self, config: RunConfig, images: ImageSet, folder: Path, step: int) -> None:
        size = config.global_crops_size
        self.transform = Transform(size, default_resize(size), config.mean, config.std)
        self.folder = folder
        self.pixels = _readable(EvalDataset(images, self.transform))
        self.maps = {at: maps for at, maps in self._read_maps().items() if at <= step}
        """by step: class attention of the last layer, (images, heads, rows, columns)"""

    def add(self, step: int, backbone: Backbone, device: torch.device) -> None:
        """Compute the maps of this step and rewrite both files; nothing if no image is readable.

        Args:
            step: optimizer steps done.
            backbone: the teacher's; it is left in the mode (train or eval) that it had.
            device: where to compute.

        Raises:
            OSError: a file cannot be written.
        """
        if self.pixels is None:
            return
        training = backbone.training
        extractor = FeatureExtractor(backbone, self.transform, device)
        try:
            maps = class_attention(backbone, extractor.normalised(self.pixels))
        finally:
            backbone.train(training)
        self.maps[step] = maps.cpu().numpy()
        images = _channels_last(self.pixels)
        self._write_maps(images)
        self._draw(images, backbone.patch_size)

    def _read_maps(self) -> dict[int, np.ndarray]:
        """Maps that the folder already has of the same images; none if the file is damaged."""
        if self.pixels is None:
            return {}
        try:
            with (self.folder / ATTENTION_MAPS).open("rb") as file, np.load(file) as arrays:
                if not np.array_equal(arrays["images"], _channels_last(self.pixels)):
                    return {}
                return dict(zip(arrays["steps"].tolist(), arrays["attention"], strict=True))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return {}

    def _write_maps(self, images: np.ndarray) -> None:
        with replacing(self.folder / ATTENTION_MAPS) as path:
            np.savez_compressed(
                path,
                steps=list(self.maps),
                attention=np.stack(list(self.maps.values())),
                images=images,
            )

    def _draw(self, images: np.ndarray, patch_size: int) -> None:
        """Draw a row for each image (H, W, C) with a column for each of `SHOWN_STEPS` steps."""
        recorded = list(self.maps)
        shown = np.unique(np.linspace(0, len(recorded) - 1, SHOWN_STEPS).round().astype(int))
        steps = [recorded[i] for i in shown]
        results = [
            [
                AttentionResult(
                    name="", image=image, patch=patch_size, attention=self.maps[step][i]
                )
                for step in steps
            ]
            for i, image in enumerate(images)
        ]
        name = ATTENTION.removesuffix(".png")
        config = AttentionConfig(weights=(TEACHER,))
        sheet = columns_sheet(name, [f"step {step}" for step in steps], results, config)
        write(
            Sheet(name=name, rows=sheet.rows),  # without the data: attention.npz has all steps
            self.folder,
            ("png",),
            width=inches("slide"),
            titles=True,
            dpi=150,
        )


def _readable(dataset: EvalDataset) -> torch.Tensor | None:
    """Return the first readable images, uint8 (images, C, S, S), or None if there are none."""
    framed = (dataset[i] for i in range(min(TRIED_IMAGES, len(dataset))))
    readable = (pixels for pixels, is_readable in framed if is_readable)
    pixels = list(itertools.islice(readable, SHOWN_IMAGES))
    return torch.stack(pixels) if pixels else None


def _channels_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()
