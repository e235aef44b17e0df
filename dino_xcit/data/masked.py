"""Images with a mask each, for segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_xcit.data import shapes
from dino_xcit.data.decode import EXTENSIONS, FORMATS, decode, reading_images
from dino_xcit.data.framing import Transform, centre_crop
from dino_xcit.data.images import SPLITS, ImageSet, ShapeSet, Subset
from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from dino_xcit.config.evaluation import SegConfig

IMAGE_FOLDERS, MASK_FOLDERS = (
    ("images", "JPEGImages"),
    ("masks", "annotations", "labels", "SegmentationClass"),
)
VOC_LISTS = "ImageSets/Segmentation"
VOID = 255  # in framed masks


# -- images with masks -----------------------------------------------------------------------------------------------


class MaskedSet(ImageSet, Protocol):
    """Images with a mask each. The label of an image is its number, by which its mask is found."""

    def mask(self, index: int) -> np.ndarray:
        """uint8 (H, W), the class of each pixel; raises OSError or ValueError if it cannot be read."""


class MaskedShapes(ShapeSet):
    """The embedded images: the plain ground, and the ten textures."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.labels = np.arange(self.count)

    def mask(self, index: int) -> np.ndarray:
        shape = shapes.draw_shape(self.seed, self.split, index, self.channels)
        return shape.mask * np.uint8(shape.label + 1)


class MaskedFiles:
    """Image files and the mask file of each."""

    classes = None

    def __init__(self, images: list[Path], masks: list[Path], channels: int) -> None:
        self.images, self.masks, self.channels = images, masks, channels
        self.labels = np.arange(len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return decode(self.images[index].read_bytes(), self.channels)

    def name(self, index: int) -> str:
        return str(self.images[index])

    def identity(self) -> list[Any]:
        stats = [path.stat() for path in (*self.images, *self.masks)]
        return [
            list(map(str, self.images)),
            self.channels,
            [(s.st_size, s.st_mtime_ns) for s in stats],
        ]

    def mask(self, index: int) -> np.ndarray:
        with reading_images(), Image.open(self.masks[index], formats=FORMATS) as file:
            if file.mode not in ("P", "L", "1"):
                raise UserError(
                    f"mask {self.masks[index]} is in colour or of 16 bits; expected the number of a class a pixel"
                )
            return np.array(file).astype(np.uint8)


def open_masked(config: SegConfig) -> tuple[dict[str, MaskedSet], dict[str, int]]:
    """Both splits with their masks, and the classes by name where they have names.

    Raises ValueError, naming the flag, if there is nothing to open.
    """
    channels = config.in_chans or 3
    if config.dataset == "shapes":
        counts = {"train": config.num_images or shapes.COUNT, "validation": shapes.VALIDATION_COUNT}
        classes = {"ground": 0, **{name: label for label, name in enumerate(shapes.CLASSES, 1)}}
        drawn: dict[str, MaskedSet] = {
            s: MaskedShapes(config.seed, s, count, channels) for s, count in counts.items()
        }
        return drawn, classes
    if config.dataset is not None or config.data_path is None:
        raise UserError(
            f"--dataset {config.dataset} has no masks; expected shapes, or --data_path with images and masks"
        )
    root = Path(config.data_path)
    found: dict[str, Any] = {split: MaskedFiles(*_pairs(root, split), channels) for split in SPLITS}
    if config.num_images:
        if config.num_images > len(found["train"]):
            raise UserError(
                f"--num_images {config.num_images} is more than the {len(found['train'])} images found"
            )
        chosen = Subset(found["train"], config.num_images, config.seed).indices
        train = found["train"]
        found["train"] = MaskedFiles(
            [train.images[i] for i in chosen], [train.masks[i] for i in chosen], channels
        )
    return found, {}


def _pairs(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """The images of a split that have a mask, and their masks. Raises ValueError if there are none."""
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    expected = f"expected images/ and masks/ with train/ and val/ in each, or {VOC_LISTS}/train.txt and val.txt beside"
    if images is None or masks is None:
        raise UserError(
            f"--data_path {root} has no {'images' if images is None else 'masks'}/; {expected}"
        )
    named = None
    for name in SPLITS[split]:
        if (images / name).is_dir() and (masks / name).is_dir():
            images, masks = images / name, masks / name
            break
        if (listed := root / VOC_LISTS / f"{name}.txt").is_file():
            named = set(listed.read_text().split())
            break
    else:
        raise UserError(f"--data_path {root} has no {split} images; {expected}")
    of_masks = {
        path.relative_to(masks).with_suffix(""): path
        for path in sorted(masks.rglob("*"))
        if is_image(path)
    }
    of_images = {
        path.relative_to(images).with_suffix(""): path
        for path in sorted(images.rglob("*"))
        if is_image(path)
    }
    both = [key for key in of_images if key in of_masks and (named is None or str(key) in named)]
    if not both:
        raise UserError(f"no image in {images} has a mask of its name in {masks}")
    return [of_images[key] for key in both], [of_masks[key] for key in both]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


class MaskDataset(Dataset[tuple[Tensor, bool]]):
    """Masks by number, framed as their images: uint8 (S, S), and whether the mask could be read."""

    def __init__(self, images: MaskedSet, transform: Transform, ignored: tuple[int, ...]) -> None:
        self.images, self.transform = images, transform
        self.ignored = list(ignored)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        size = self.transform.image_size
        try:
            mask = torch.from_numpy(self.images.mask(index))
            if (shape := tuple(self.images.read(index).shape[1:])) != tuple(mask.shape):
                raise UserError(
                    f"{self.images.name(index)}: image of {shape} pixels, mask of {tuple(mask.shape)}"
                )
            mask = centre_crop(mask[None], size, self.transform.resize_size, _nearest)[0]
        except (OSError, ValueError):
            return torch.zeros(size, size, dtype=torch.uint8), False
        mask[torch.isin(mask, torch.tensor(self.ignored, dtype=torch.uint8))] = VOID
        return mask, True


def _nearest(masks: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(masks, (height, width), mode="nearest-exact")
