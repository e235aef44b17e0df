"""Images in tar files, read by offset in any order (`tar_index.py` says what a sample is).

The order is that of the tars, sorted as the files of a folder are, and of the images in each. The
class of an image is what `.cls` or `.json` hold, else its first folder in the tar, below the folder
that all images lie in and below the split's.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino_xcit.data.byte_ranges import LocalFiles
from dino_xcit.data.decode import ImageReader, time_limit
from dino_xcit.data.folder import DECODING, Listing, natural_key
from dino_xcit.data.pixels import require_readable
from dino_xcit.data.splits import SPLITS, preference
from dino_xcit.data.tar_index import NO_LABEL, RECORD, TarIndex

if TYPE_CHECKING:
    from torch import Tensor


class ShardSet:
    """Some or all images of tar files."""

    def __init__(
        self,
        indices: list[TarIndex],
        samples: Samples,
        channels: int,
        classes: dict[str, int] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Number the classes.

        Args:
            indices: Of the tars.
            samples: Their images that belong to the set.
            channels: Channels of the images that are read.
            classes: Labels by name of the class; images of other classes are left out. None: in
                the order of the names, and a set of one class has no labels.
            notes: What the user must know about the choice of the tars.
        """
        require_readable(channels)
        self.channels, self.notes = channels, notes
        self.shards = [(index.path, index.size, index.mtime_ns) for index in indices]
        self.folder = common_folder([index.path for index in indices])
        self.listing = Listing([], sum((i.ignored for i in indices), Counter[str]()), [])
        labelled = label(samples, classes)
        if labelled.note:
            self.notes += (labelled.note,)
        self.classes, self.labels = labelled.classes, labelled.labels
        taken = samples.take(labelled.taken)
        self.shard, self.names = taken.shard, taken.names
        self.offset, self.size, self.name_start = (
            taken.records[field].copy() for field in ("offset", "size", "name")
        )
        self.files = LocalFiles([path for path, *_ in self.shards])
        self.reader = ImageReader(self._data, len(self), channels)

    def __len__(self) -> int:
        return len(self.shard)

    def _data(self, index: int) -> bytes:
        place = self.shard[index], self.offset[index], self.size[index]
        return self.files.read(*map(int, place))

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        with time_limit():
            return self.reader.read(index)

    def name(self, index: int) -> str:
        """Return the path of the tar and, behind it, that of the image in the tar."""
        return f"{self.shards[self.shard[index]][0]}/{self.name_in_tar(index)}"

    def name_below_folder(self, index: int) -> str:
        """Return the name of an image, with the path of its tar below the folder of all tars."""
        return f"{self._shards_below_folder[self.shard[index]]}/{self.name_in_tar(index)}"

    @functools.cached_property
    def _shards_below_folder(self) -> list[str]:
        paths = [path for path, *_ in self.shards]
        folder = os.path.dirname(paths[0]) if len(paths) == 1 else self.folder  # noqa: PTH120
        return [os.path.relpath(path, folder or ".") for path in paths]

    def name_in_tar(self, index: int) -> str:
        """Return the path of the image in its tar."""
        start = int(self.name_start[index])
        return self.names[start : self.names.index(b"\0", start)].decode(errors="surrogateescape")

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        digest = hashlib.sha256()
        for array in (self.shard, self.offset, self.size):
            digest.update(array.tobytes())
        return ["shards", DECODING, len(self), self.channels, self.shards, digest.hexdigest()]


def common_folder(paths: list[str]) -> str:
    """Return the path itself if it is one, else the folder that all lie in."""
    if len(paths) == 1:
        return paths[0]
    folders = [os.path.dirname(path) for path in paths]  # noqa: PTH120  # thousands of shards
    if len({os.path.isabs(folder) for folder in folders}) > 1:  # noqa: PTH117
        folders = [os.path.abspath(folder) for folder in folders]  # noqa: PTH100
    return os.path.commonpath(folders) or "."


# -- samples -----------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Images of several tars."""

    records: np.ndarray
    """RECORD (n,), whose texts, folders and names are those below"""
    shard: np.ndarray
    """int32 (n,), the number of the tar"""
    names: bytes
    texts: list[str]
    folders: list[str]

    @classmethod
    def of(cls, indices: list[TarIndex]) -> Samples:
        """Return the images of tars in their order."""
        texts: dict[str, int] = {}
        folders: dict[str, int] = {}
        records = np.empty(sum(len(index.records) for index in indices), RECORD)
        start = names = 0
        for index in indices:
            part = records[start : start + len(index.records)]
            part[:] = index.records
            part["name"] += names
            for field, known, own in (
                ("text", texts, index.texts),
                ("folder", folders, index.folders),
            ):
                number = [known.setdefault(name, len(known)) for name in own]
                part[field] = np.array([*number, -1])[part[field]]  # -1 stays -1
            start, names = start + len(part), names + len(index.names)
        shard = np.repeat(
            np.arange(len(indices), dtype=np.int32), [len(i.records) for i in indices]
        )
        blob = b"".join(index.names for index in indices)
        return cls(records, shard, blob, list(texts), list(folders))

    def take(self, chosen: np.ndarray) -> Samples:
        """Return the images that a mask chooses."""
        return self._replace(records=self.records[chosen], shard=self.shard[chosen])

    def used_folders(self) -> list[int]:
        """Return the numbers of the folders that hold images."""
        used: list[int] = np.flatnonzero(np.bincount(self.records["folder"])).tolist()
        return used


def divided(samples: Samples) -> dict[str, Samples]:
    """Divide images by the folders of splits in the tars, such as train/ and val/.

    Returns:
        The images of each split, in folders without the split's; none if the tars do not hold
        folders of both splits.
    """
    samples = _below_common_folder(samples)
    first = [folder.partition("/")[0] for folder in samples.folders]
    used = {first[number] for number in samples.used_folders()}
    chosen: dict[str, set[str]] = {}
    for split in SPLITS:
        ranked = sorted((p, name) for name in used if (p := preference(name, split)) is not None)
        chosen[split] = {name for place, name in ranked if place == ranked[0][0]}
    if not all(chosen.values()):
        return {}
    below = samples._replace(folders=[folder.partition("/")[2] for folder in samples.folders])
    return {
        split: below.take(np.array([name in names for name in first])[samples.records["folder"]])
        for split, names in chosen.items()
    }


def _below_common_folder(samples: Samples) -> Samples:
    """Take off the first folder if all images lie in it and some in a folder of it."""
    used = [samples.folders[number] for number in samples.used_folders()]
    firsts = {folder.partition("/")[0] for folder in used}
    if len(firsts) != 1 or not any("/" in folder for folder in used):
        return samples
    return samples._replace(folders=[folder.partition("/")[2] for folder in samples.folders])


# -- classes -----------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """Classes of images."""

    taken: np.ndarray
    """bool (n,): images of known classes"""
    labels: np.ndarray | None
    """int64, of the images that are taken"""
    classes: dict[str, int] | None
    note: str = ""
    """why there are no labels, if that may surprise"""


def label(samples: Samples, classes: dict[str, int] | None) -> Labelled:
    """Number the classes of images; see `ShardSet` for `classes`."""
    every = np.ones(len(samples.records), dtype=bool)
    numbered, named = samples.records["label"] != NO_LABEL, samples.records["text"] >= 0
    if not (numbered | named).any():
        return _by_name(*_folder_classes(samples, classes), classes)
    if numbered.all():
        numbers = samples.records["label"].astype(np.int64)
        return Labelled(every, numbers if numbers.min() < numbers.max() else None, None)
    if named.all():
        return _by_name(samples.texts, samples.records["text"], classes)
    without = np.flatnonzero(~(numbered | named))
    note = "some labels in .cls and .json are numbers and some are names, so none are used"
    if len(without):
        count = f"{len(without):,} of {len(every):,} samples"
        note = f"{count} have no label in .cls or .json, so no labels are used"
    return Labelled(every, None, None, note)


def _folder_classes(
    samples: Samples, classes: dict[str, int] | None
) -> tuple[list[str], np.ndarray]:
    if not (classes and any(name.partition("/")[0] in classes for name in samples.folders)):
        samples = _below_common_folder(samples)
    return [name.partition("/")[0] for name in samples.folders], samples.records["folder"]


def _by_name(names: list[str], number: np.ndarray, classes: dict[str, int] | None) -> Labelled:
    """Label images by the names of their classes, of which some may occur several times."""
    known = classes
    if not classes:
        used = {names[i] for i in np.flatnonzero(np.bincount(number)).tolist()}
        known = {n: i for i, n in enumerate(sorted(sorted(used), key=natural_key))}
    assert known is not None
    label_of = np.array([known.get(name, NO_LABEL) for name in names], dtype=np.int64)
    labels = label_of[number]
    taken = labels != NO_LABEL
    return Labelled(taken, None if classes is None and len(known) <= 1 else labels[taken], known)
