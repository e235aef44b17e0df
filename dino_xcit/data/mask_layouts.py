"""Where the images and masks of a segmentation data set lie, and which mask is of which image."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from dino_xcit.data.folder import image_files
from dino_xcit.data.splits import SPLITS, find_split
from dino_xcit.errors import UserError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

IMAGE_FOLDERS = ("images", "JPEGImages", "img_dir", "leftImg8bit", "imgs", "img", "image")
MASK_FOLDERS = (
    *("masks", "annotations", "labels", "SegmentationClass", "ann_dir", "gtFine"),
    *("stuffthingmaps", "mask", "label", "annotation", "gt"),
)
VOC_LISTS = "ImageSets/Segmentation"
IMAGE_ENDING = "_leftImg8bit"  # Cityscapes
MASK_ENDINGS = (
    *("", "_gtFine_labelTrainIds", "_labelTrainIds", "_gtFine_labelIds"),
    *("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_L"),
)
"""What a mask's name may have at its end beside its image's; the first that fits is used."""
BESIDE_ENDINGS = ("_masks", "_mask", "_labels", "_label", "_annotations", "annot")
"""What the folder of masks may have at the end beside that of the images: `train_masks`."""
EXPECTED = (
    "expected images/ and masks/ with train/ and val/ in each, train/ and val/ with images/ and "
    f"masks/ in each, or {VOC_LISTS}/train.txt and val.txt beside"
)


class SplitFiles(NamedTuple):
    """Where the images and masks of a split lie."""

    images: Path
    masks: Path
    listed: set[str] | None
    """names of the split's images, without their extension; None if all belong to it"""


def find_pairs(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the images of a split that have a mask, and their masks; the others are counted.

    Raises:
        UserError: No image has a mask; the message states where they were expected.
    """
    images_folder, masks_folder, listed = _find_files(root, split)
    images = {
        name.removesuffix(IMAGE_ENDING): path
        for name, path in _files_by_name(images_folder).items()
        if listed is None or name in listed
    }
    ending, masks = _masks_by_image(images, masks_folder, images_folder == masks_folder)
    if images_folder == masks_folder:  # the masks were found among the images
        images = {name: path for name, path in images.items() if path not in masks.values()}
    paired = [name for name in images if name in masks]
    if not paired:
        raise UserError(
            f"no image in {images_folder} has a mask of its name in {masks_folder} "
            f"({len(images)} images)"
        )
    without = [path for name, path in images.items() if name not in masks]
    if without:
        say(
            f"{len(without)} of {len(images)} {split} images have no mask in {masks_folder} and "
            f"are left out; the first is {without[0]}"
        )
    if ending:
        say(f"masks of the {split} images: the files in {masks_folder} that end in {ending}")
    return [images[name] for name in paired], [masks[name] for name in paired]


def _masks_by_image(
    images: Iterable[str], folder: Path, beside: bool
) -> tuple[str, dict[str, Path]]:
    """Return the ending of the masks' names and the masks by their images' names.

    `beside`: The masks lie among the images, so that they must have an ending.
    """
    files = _files_by_name(folder)
    for ending in MASK_ENDINGS[beside:]:
        masks = {
            name.removesuffix(ending): path for name, path in files.items() if name.endswith(ending)
        }
        if any(name in masks for name in images):
            return ending, masks
    return "", {}


def _find_files(root: Path, split: str) -> SplitFiles:
    """Find the folders of the split, or its list as in VOC.

    Raises:
        UserError: There are none; the message states what was expected.
    """
    images = next(_split_folders(root, IMAGE_FOLDERS, split), None)
    masks = next(_split_folders(root, MASK_FOLDERS, split), None)
    if images is None:
        images = find_split(root, split)
    if images is not None and masks is None:
        masks = _masks_beside(images)
    if images is not None and masks is not None:
        return SplitFiles(images, masks, None)
    folders = [_first_folder(root, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS)]
    for kind, found, of_split in zip(("images", "masks"), folders, (images, masks), strict=True):
        if found is None and of_split is None:
            raise UserError(f"--data_path {root} has no {kind}/; {EXPECTED}")
    for names in (root / VOC_LISTS / f"{name}.txt" for name in SPLITS[split]):
        if names.is_file() and folders[0] is not None and folders[1] is not None:
            return SplitFiles(folders[0], folders[1], set(names.read_text().split()))
    raise UserError(f"--data_path {root} has no {split} images; {EXPECTED}")


def _split_folders(root: Path, names: tuple[str, ...], split: str) -> Iterator[Path]:
    """Folders `NAME/SPLIT` and `SPLIT/NAME` in the root, for each name."""
    if not root.is_dir():
        return
    of_split = find_split(root, split)
    for name in names:
        outer = root / name
        inner = find_split(outer, split) if outer.is_dir() else None
        if inner is not None:
            yield inner
        if of_split is not None and (of_split / name).is_dir():
            yield of_split / name


def _masks_beside(images: Path) -> Path | None:
    """Folder of masks beside that of the images, or the same folder if masks lie in it."""
    for ending in BESIDE_ENDINGS:
        beside = images.with_name(images.name + ending)
        if beside.is_dir():
            return beside
    names = _files_by_name(images)
    endings = itertools.product(names, MASK_ENDINGS[1:])
    return images if any(f"{name}{ending}" in names for name, ending in endings) else None


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Return the image files below the folder by their path in it, without the extension."""
    return {str(path.relative_to(folder).with_suffix("")): path for path in image_files(folder)}
