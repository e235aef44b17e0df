"""Frozen backbone + images -> features. The evaluation transform is official DINO's: resize the short side, centre crop."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.crops import resize
from dino_xcit.data import ImageSet

SMALL = 96  # below this side nothing is cut off: small images are framed already


class EvalDataset(Dataset[Tensor]):
    """Images of a set by number, resized and cropped: uint8 (C, size, size)."""

    def __init__(self, images: ImageSet, indices: np.ndarray, size: int) -> None:
        self.images, self.indices, self.size = images, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        return centre_crop(self.images.read(int(self.indices[position])), self.size)


def centre_crop(image: Tensor, size: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, size, size): short side to 8 / 7 of the size (256 for 224), then the centre.

    Sizes below 96 are reached without cropping the short side.
    """
    short = size * 8 // 7 if size >= SMALL else size
    _, H, W = image.shape
    scale = short / min(H, W)
    image = resize(image[None], max(short, int(H * scale)), max(short, int(W * scale)))[0]
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: ImageSet,
    indices: np.ndarray,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    batch_size: int = 256,
    num_workers: int = 0,
) -> Tensor:
    """Features (len(indices), D), float32 on CPU, of the backbone in eval mode; its mode is put back afterwards."""
    training = backbone.training
    backbone.eval()
    offset = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    loader = DataLoader(EvalDataset(images, indices, size), batch_size=batch_size, num_workers=num_workers)
    features = [backbone((batch.to(device).float() / 255 - offset) / scale).float().cpu() for batch in loader]
    backbone.train(training)
    return torch.cat(features)


def evaluation_workers(count: int) -> int:
    """Loader processes for a pass over `count` images: none where starting them costs more than they save."""
    return 0 if count < 5000 else max(0, min(8, (os.cpu_count() or 1) - 1))
