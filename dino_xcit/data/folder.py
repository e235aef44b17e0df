"""Folders of image files.

The class of an image is the first folder below its split, as in torchvision's ImageFolder and
official DINO; folders inside it do not matter. The order of the images is that of timm's image
folder: by path, without regard to case, numbers by value.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino_xcit.data.decode import EXTENSIONS, ImageReader, time_limit
from dino_xcit.data.names import FileNames
from dino_xcit.data.pixels import require_readable
from dino_xcit.data.splits import NoImagesError, NoTrainingImagesError, find_split, is_split
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from dino_xcit.data.images import Config

DECODING = 2
"""Part of a set's identity, so that features of pixels that were decoded otherwise are not used
again. 2: alpha on white, grey of 16 bits and floats by the rules in `decode.py`."""


# -- files -------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """What lies in a folder, at any depth."""

    files: Sequence[str]
    """paths of the images, in their order"""
    ignored: Counter[str]
    """number of other files by ending"""
    unopened: list[str]
    """folders that cannot be opened, and why"""


def list_images(folder: Path, output: Path | None = None) -> Listing:
    """List the image files of a folder.

    Left out are hidden files and folders, those of macOS archives, run folders and `output`.
    """
    files, ignored, unopened = [], Counter[str](), []

    def note(error: OSError) -> None:
        unopened.append(f"{error.filename} ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=note, followlinks=True):
        folders[:] = [name for name in folders if _is_walked(Path(parent, name), output)]
        for name in names:
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  # millions of names
            if name.startswith("."):  # such as macOS's ._a.png, metadata of a.png
                continue
            if ending in EXTENSIONS:
                files.append(os.path.join(parent, name))  # noqa: PTH118
            else:
                ignored[ending or name] += 1
    # Names may differ in case or leading zeros only: their order must not be the file system's.
    return Listing(sorted(sorted(files), key=natural_key), ignored, unopened)


def image_files(folder: Path) -> list[Path]:
    """Return the image files at any depth, sorted, without hidden files and folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _is_walked(folder: Path, output: Path | None) -> bool:
    """Whether images of this folder are taken."""
    if folder.name.startswith(".") or folder.name == "__MACOSX":
        return False
    if output is not None and folder.name == output.name and folder.resolve() == output:
        return False
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        return False  # a link to a folder that it lies in
    return not ((folder / CONFIG).is_file() and (folder / METRICS).is_file())


def natural_key(name: str) -> list[int | str]:
    """Key by which `img9` sorts before `img10`, as in timm."""
    parts: list[int | str] = list(re.split(r"(\d+)", name.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts


# -- the set -----------------------------------------------------------------------------------


class FolderSet:
    """The image files of a folder."""

    def __init__(
        self,
        folder: Path,
        listing: Listing,
        channels: int,
        classes: dict[str, int] | None = None,
        notes: tuple[str, ...] = (),
        names: list[str] | None = None,
    ) -> None:
        """Number the classes.

        Args:
            folder: Folder whose subfolders are the classes.
            listing: Its images.
            channels: Channels of the images that are read.
            classes: Labels by name of the class; images of other classes are left out. None: in
                the order of the names, and a set of one class has no labels.
            notes: What the user must know about the choice of the folder.
            names: Class of each image. None: the folders.
        """
        require_readable(channels)
        self.folder, self.channels, self.notes = folder, channels, notes
        self.listing = listing._replace(files=())  # `files` has them
        if names is None:
            names = [self._class_of(file) for file in listing.files]
        self.classes = classes
        if not classes:
            self.classes = {
                name: label
                for label, name in enumerate(sorted(sorted(set(names)), key=natural_key))
            }
        known = self.classes or {}
        taken = [i for i, name in enumerate(names) if name in known]
        self.files = FileNames(listing.files[i] for i in taken)
        self.reader = ImageReader(self._data, len(self.files), channels)
        labels = np.array([known[names[i]] for i in taken], dtype=np.int64)
        self.labels = None if classes is None and len(known) <= 1 else labels

    def _class_of(self, file: str) -> str:
        first, separator, _ = file[len(str(self.folder)) :].lstrip(os.sep).partition(os.sep)
        return first if separator else ""

    def __len__(self) -> int:
        return len(self.files)

    def _data(self, index: int) -> bytes:
        return Path(self.files[index]).read_bytes()

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        with time_limit():
            return self.reader.read(index)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return self.files[index]

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        stats = [Path(path).stat() for path in self.files if Path(path).exists()]
        sizes = [(s.st_size, s.st_mtime_ns) for s in stats]
        return ["folder", DECODING, len(self), self.channels, list(self.files), sizes]


# -- opening -----------------------------------------------------------------------------------


def paths_of(config: Config) -> tuple[str, ...]:
    """Return the paths in `--data_path`."""
    path = config.data_path
    return path if isinstance(path, tuple) else (path or "",)


def one_path(config: Config) -> str | None:
    """Return `--data_path` where it must be one path.

    Raises:
        UserError: There are several.
    """
    if isinstance(config.data_path, tuple):
        raise UserError(f"--data_path is {' '.join(config.data_path)}; expected one path here")
    return config.data_path


def open_folder(config: Config, split: str, classes: dict[str, int] | None) -> FolderSet | None:
    """Open a split of `--data_path`; see `open_images`.

    Raises:
        UserError: There is no such folder, it has no images, or validation images but no others.
    """
    root = Path(one_path(config) or "")
    if not root.is_dir():
        kind = "is a file" if root.exists() else "does not exist"
        raise UserError(
            f"--data_path {root} {kind}; expected a folder of images, or a .tar, .txt, .npy or "
            ".npz file"
        )
    folder, notes = _folder_of_split(root, split)
    if folder is None:
        return None
    output = Path(config.output_dir).resolve() if config.output_dir is not None else None
    if output == folder.resolve():
        raise UserError(
            f"--output_dir {config.output_dir} is the folder of the images, whose files would "
            "become images; name another"
        )
    listing = list_images(folder, output)
    images = FolderSet(folder, listing, config.in_chans or 3, classes, notes)
    if len(images):
        return images
    if split == "validation":
        return None
    raise NoImagesError(
        f"no images in --data_path {folder} ({_none_found(listing)}); expected files ending in "
        f"{' '.join(EXTENSIONS)}"
    )


def _none_found(listing: Listing) -> str:
    counts = [f"{count} {ending}" for ending, count in listing.ignored.most_common(5)]
    other = f"{listing.ignored.total()} other files{': ' * bool(counts)}{', '.join(counts)}"
    return "; ".join([other, *listing.unopened])


def _folder_of_split(root: Path, split: str) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder of a split, and what the user must know about the choice."""
    train, validation = (find_split(root, name) for name in ("train", "validation"))
    if split == "validation":
        return validation, ()
    if train is None:
        if validation is not None:
            raise NoTrainingImagesError(_without_training_images(root, validation))
        return root, ()
    others = [folder.name for folder in _subfolders(root) if not is_split(folder.name)]
    others = [name for name in others if next(_images_in(root / name), None)]
    if not others:
        return train, ()
    named = _named(others)
    flat = next(_images_in(train, depth=0), None) is not None
    divided = any(next(_images_in(folder), None) for folder in _subfolders(train))
    if validation is None and flat and not divided and len(others) > 1:
        return root, (
            f"{train.name}/ is taken as a class beside {named}; for {train.name}/ alone, give "
            f"--data_path {train}",
        )
    return train, (f"training images are those in {train.name}/; {named} beside it not used",)


def _without_training_images(root: Path, validation: Path) -> str:
    """Return the message that a folder has validation images and no training folder."""
    others = [folder.name for folder in _subfolders(root) if not is_split(folder.name)]
    found = f"(found {_named(others)})" if others else "beside it"
    return (
        f"--data_path {root} has {validation.name}/ but no train/ {found}, and validation images "
        f"must not be trained on; put the training images into train/, {validation.name}/ too if "
        "it is a class, or name one folder of images with --data_path, such as "
        f"{root / (others[0] if others else validation.name)}"
    )


def _named(folders: list[str]) -> str:
    more = [f"{len(folders) - 4} more"] if len(folders) > 4 else []
    return ", ".join([*(f"{name}/" for name in folders[:4]), *more])


def _subfolders(root: Path) -> list[Path]:
    return sorted(
        folder for folder in root.iterdir() if folder.is_dir() and _is_walked(folder, None)
    )


def _images_in(folder: Path, depth: int = 1) -> Iterator[str]:
    """Iterate the image files of a folder and of its subfolders to this depth."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.suffix.lower() in EXTENSIONS:
            yield entry.name
        elif depth and entry.is_dir():
            yield from _images_in(entry, depth - 1)
