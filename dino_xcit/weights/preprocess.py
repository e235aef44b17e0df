"""Images of any kind -> the normalised batch that a backbone takes, framed as in evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_xcit.data.decode import decode
from dino_xcit.data.framing import Transform, centre_crop, default_resize
from dino_xcit.data.pixels import from_pil
from dino_xcit.errors import ImageError, UserError
from dino_xcit.weights.config_json import with_assumed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.model.backbone import Backbone

AnyImage: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"


@dataclass(frozen=True)
class Preprocess:
    """Images -> normalised batch; see `preprocess`."""

    transform: Transform
    device: torch.device

    def __call__(self, images: AnyImage | Sequence[AnyImage]) -> Tensor:
        """Frame and normalise images.

        Args:
            images: one image, a sequence of them, or a batch of 4 dimensions. An image is a path,
                a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W). Arrays and tensors
                are uint8, or floats from 0 to 1, which are rounded to 256 levels.

        Returns:
            float32 (B, C, image_size, image_size), on the backbone's device.

        Raises:
            ImageError: a file cannot be read.
            UserError: an array or tensor is not an image of the backbone's channels.
        """
        size, resize_size, mean, std = self.transform
        pixels = torch.stack(
            [centre_crop(_pixels(image, len(mean)), size, resize_size) for image in _listed(images)]
        )
        x = pixels.to(self.device).float() / 255
        shift, scale = (torch.tensor(v, device=self.device)[:, None, None] for v in (mean, std))
        return (x - shift) / scale


def preprocess(
    backbone: Backbone,
    image_size: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocess:
    """Return the function that turns images into the batch that the backbone takes.

    `backbone(preprocess(backbone)(["a.jpg", "b.png"]))` are the features of two files. As in
    evaluations, the short side is resized to 8 / 7 of the image size (below 96 pixels: to the image
    size), the centre is cropped, and each channel x in [0, 1] becomes (x - mean) / std.

    Args:
        backbone: as `load_backbone` returns it.
        image_size: side of the crop in pixels. Default: of the pretraining.
        mean: of each channel, in [0, 1]. Default: of the pretraining.
        std: of each channel, in [0, 1]. Default: of the pretraining.

    Raises:
        UserError: mean and standard deviation are not known, or not those of the channels.
    """
    options = {"image_size": image_size, "mean": mean, "std": std}
    given = [flag for flag, value in options.items() if value is not None]
    about = {**backbone.metadata, "in_chans": backbone.in_chans}
    known = with_assumed(about, f"the {backbone.arch} backbone", given)
    size = image_size or known["global_crops_size"]
    backbone.check_image_size(size, "image_size")
    values = [tuple(given or known[n]) for n, given in (("mean", mean), ("std", std))]
    if any(len(value) != backbone.in_chans for value in values):
        raise UserError(f"mean and std are {values}; expected one value for each channel")
    device = next(backbone.parameters()).device
    return Preprocess(Transform(size, default_resize(size), *values), device)


def _listed(images: AnyImage | Sequence[AnyImage]) -> list[AnyImage]:
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    return list(images)


def _pixels(image: AnyImage, channels: int) -> Tensor:
    """Return an image as uint8 (C, H, W)."""
    if isinstance(image, (str, Path)):
        try:
            return decode(Path(image).read_bytes(), channels)
        except ImageError as error:
            raise ImageError(f"{image}: {error}") from None
    if isinstance(image, Image.Image):
        return from_pil(ImageOps.exif_transpose(image), channels)
    if isinstance(image, np.ndarray):
        layers = image[:, :, None] if image.ndim == 2 else image
        return _of_tensor(torch.from_numpy(layers).movedim(-1, 0), channels)
    return _of_tensor(image, channels)


def _of_tensor(image: Tensor, channels: int) -> Tensor:
    """Return a tensor (C, H, W) as uint8; one grey channel serves for each."""
    if image.ndim != 3 or image.shape[0] not in (1, channels) or 0 in image.shape:
        raise UserError(
            f"an image is a tensor (C, H, W) of the shape {tuple(image.shape)}; expected "
            f"{channels} channels"
        )
    if image.is_floating_point():
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"an image has values from {low:g} to {high:g}; expected uint8, or 0 to 1"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise UserError(f"an image is {image.dtype}; expected uint8, or floats from 0 to 1")
    return image.expand(channels, -1, -1)
