"""What the teacher's class token attends to while it is pretrained: the same few images at each evaluation."""

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
from dino_xcit.run_folder import TEACHER

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.data.images import ImageSet
    from dino_xcit.run_folder import TEACHER
from dino_xcit.model.xcit import XCiT

PICTURE, NUMBERS = "attention", "attention.npz"
SHOWN = 4  # images
COLUMNS = 8  # evaluations in the picture, from the first to the last; the numbers are of all
TRIED = 50  # images read to find some that can be


class AttentionHistory:
    """attention.png and attention.npz of a run folder. They grow at each evaluation."""

    def __init__(self, config: PretrainConfig, images: ImageSet, folder: Path, step: int) -> None:
        """A run that goes on from `step` keeps what was seen until then."""
        size = config.global_crops_size
        self.transform = Transform(size, default_resize(size), config.mean, config.std)
        dataset = EvalDataset(images, self.transform)
        readable = (
            pixels
            for pixels, read in map(dataset.__getitem__, range(min(TRIED, len(images))))
            if read
        )
        pixels = list(itertools.islice(readable, SHOWN))
        self.pixels = torch.stack(pixels) if pixels else None  # uint8 (images, C, S, S)
        self.folder = folder
        self.seen = {at: maps for at, maps in self._before().items() if at <= step}

    def _before(self) -> dict[int, np.ndarray]:
        """What was seen of the same images."""
        try:
            with (self.folder / NUMBERS).open("rb") as file, np.load(file) as numbers:
                same = self.pixels is not None and np.array_equal(
                    numbers["images"], _last_axis(self.pixels)
                )
                return (
                    dict(zip(numbers["steps"].tolist(), numbers["attention"], strict=True))
                    if same
                    else {}
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return {}

    def add(self, step: int, backbone: XCiT, device: torch.device) -> None:
        """Look at the images again. The backbone's mode is put back afterwards."""
        if self.pixels is None or backbone.class_attention is None:
            return
        training = backbone.training
        frozen = FeatureExtractor(backbone, self.transform, device)
        self.seen[step] = (
            class_attention(backbone, frozen.normalised(self.pixels)).cpu().numpy()
        )  # (images, h, rows, columns)
        backbone.train(training)
        images = _last_axis(self.pixels)
        with replacing(self.folder / NUMBERS) as path:
            np.savez_compressed(
                path,
                steps=list(self.seen),
                attention=np.stack(list(self.seen.values())),
                images=images,
            )
        config = AttentionConfig(weights=(TEACHER,))
        steps = [
            list(self.seen)[i]
            for i in np.unique(np.linspace(0, len(self.seen) - 1, COLUMNS).round().astype(int))
        ]
        views = [
            [
                AttentionResult(
                    name="", image=image, patch=backbone.patch_size, attention=self.seen[at][i]
                )
                for at in steps
            ]
            for i, image in enumerate(images)
        ]
        sheet = columns_sheet(PICTURE, [f"step {at}" for at in steps], views, config)
        write(
            Sheet(name=PICTURE, rows=sheet.rows),
            self.folder,
            ("png",),
            width=inches("slide"),
            titles=True,
            dpi=150,
        )


def _last_axis(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()
