"""One PNG file for each head, named as official `visualize_attention.py` names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from dino_xcit.figures.canvas import selected_heads, shared_limits
from dino_xcit.figures.maps import mass_mask
from dino_xcit.figures.pictures import cut_out, heat, rgb, upsample
from dino_xcit.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.figures.model import AttentionResult


class PictureFolder(NamedTuple):
    """Pictures that are files of their own."""

    name: str
    """of the folder"""
    pictures: dict[str, np.ndarray]
    """by file name: RGB in [0, 1], (H, W, 3)"""

    def write(self, folder: Path) -> None:
        """Write the pictures as PNG files into `folder/name`."""
        into = folder / self.name
        into.mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures.items():
            with replacing(into / name) as beside:
                Image.fromarray(np.rint(255 * picture).astype(np.uint8)).save(beside)


def head_files(results: Sequence[AttentionResult], config: AttentionConfig) -> PictureFolder:
    """One image: itself, and the map and the mask of each head, of the image's own size."""
    (result,) = results
    image = rgb(result.image).astype(np.float32) / 255
    height, width = image.shape[:2]
    heads = selected_heads(result.attention, config)
    maps = [result.attention[head] for head in heads]
    pictures = {"img.png": image}
    for head, one_map, limits in zip(heads, maps, shared_limits([maps], config)[0], strict=True):
        values = upsample(one_map, height, width, result.patch, config.interpolation)
        mask = mass_mask(torch.from_numpy(one_map), config.threshold).numpy()
        blocks = mask.repeat(result.patch, 0).repeat(result.patch, 1)[:height, :width]
        pictures[f"attn-head{head}.png"] = heat(values, *limits, config.colormap)
        pictures[f"mask_th{config.threshold:g}_head{head}.png"] = cut_out(image, blocks)
    return PictureFolder(f"files_{result.name}", pictures)
