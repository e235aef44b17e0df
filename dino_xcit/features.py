"""Frozen backbone + images -> features. The evaluation transform is official DINO's: resize the short side, centre crop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.crops import resize
from dino_xcit.data import ImageSet

SMALL = 96  # below this side nothing is cut off: small images are framed already


class EvalDataset(Dataset[tuple[Tensor, bool]]):
    """Images of a set by number, resized and cropped: uint8 (C, size, size), and whether the image could be read."""

    def __init__(self, images: ImageSet, indices: np.ndarray, size: int, channels: int) -> None:
        self.images, self.indices, self.size, self.channels = images, indices, size, channels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, bool]:
        try:
            return centre_crop(self.images.read(int(self.indices[position])), self.size), True
        except (OSError, ValueError):
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), False


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
) -> tuple[Tensor, Tensor]:
    """Features of the backbone in eval mode, whose mode is put back afterwards, and which images they are of.

    Float32 (n, D) and bool (len(indices),) on CPU: n of the images could be read, those that are True.
    """
    training = backbone.training
    backbone.eval()
    offset = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    dataset = EvalDataset(images, indices, size, channels=len(mean))
    features, readable = [], []
    for batch, read in DataLoader(dataset, batch_size=batch_size, num_workers=num_workers):
        readable.append(read)
        if read.any():
            normalised = (batch[read].to(device).float() / 255 - offset) / scale
            features.append(backbone(normalised).float().cpu())
    backbone.train(training)
    if not features:
        raise ValueError(
            f"none of the {len(indices)} images to evaluate on can be read, {images.name(int(indices[0]))} for one"
        )
    return torch.cat(features), torch.cat(readable)
