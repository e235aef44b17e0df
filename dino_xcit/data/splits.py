"""The splits of a data set, and the names by which their folders are found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"),
}
"""Names of each split's folder or list, the preferred ones first."""
SUFFIX = re.compile(r"[-_ ]?(sets?|images?|imgs?|data|\d{4})$")  # train_images, trainset, val2017


def preference(name: str, split: str) -> int | None:
    """Return the place of a folder's name among the names of the split, or None if it is none.

    Neither case nor a suffix such as `_images`, `set` or `2017` matters.
    """
    plain = name.casefold()
    for candidate in (plain, SUFFIX.sub("", plain)):
        if candidate in SPLITS[split]:
            return SPLITS[split].index(candidate)
    return None


def is_split(name: str) -> bool:
    """Whether a folder of this name holds a split."""
    return any(preference(name, split) is not None for split in SPLITS)


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder of the split in `root`, or None if there is none.

    Raises:
        UserError: Two folders have the same name but for case and suffix.
    """
    ranked = sorted(
        (place, folder.name not in SPLITS[split], folder)
        for folder in root.iterdir()
        if (place := preference(folder.name, split)) is not None and folder.is_dir()
    )
    if len(ranked) > 1 and ranked[0][:2] == ranked[1][:2]:
        raise UserError(
            f"--data_path {root} has both {ranked[0][2].name}/ and {ranked[1][2].name}/; expected "
            f"one folder of {split} images: rename one, or name a folder inside with --data_path"
        )
    return ranked[0][2] if ranked else None


class NoImagesError(UserError):
    """A folder has no images at all."""


class NoTrainingImagesError(UserError):
    """A folder has validation images and no training images."""
