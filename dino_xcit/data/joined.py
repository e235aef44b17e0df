"""Several sets of images as one, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dino_xcit.data.folder import natural_key

if TYPE_CHECKING:
    from torch import Tensor

    from dino_xcit.data.images import ImageSet


class JoinedSet:
    """The images of several sets; classes of one name are one class."""

    def __init__(self, sets: list[ImageSet], classes: dict[str, int] | None = None) -> None:
        """Number the classes.

        Args:
            sets: The sets, whose classes are numbered by `classes` if these are given.
            classes: Labels by name of the class. None: in the order of the names of all sets. Sets
                of numbered classes keep the numbers; they have no labels beside sets of named ones.
        """
        self.sets = sets
        self.starts = np.cumsum([0, *map(len, sets)])
        self.classes, self.labels = classes, None
        named = [images.classes for images in sets if images.classes is not None]
        labels = [images.labels for images in sets if images.labels is not None]
        if len(named) == len(sets):
            every = {name for names in named for name in names}
            self.classes = classes or {
                name: label for label, name in enumerate(sorted(sorted(every), key=natural_key))
            }
            labels = [_renumbered(images, self.classes) for images in sets]
        if len(labels) == len(sets) and len(named) in (0, len(sets)):
            joined = np.concatenate(labels)
            self.labels = joined if classes or len(np.unique(joined)) > 1 else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of the image's set, and the image's index in it."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        number, own = self.place(index)
        return self.sets[number].read(own)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        number, own = self.place(index)
        return self.sets[number].name(own)

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        return ["joined", *(images.identity() for images in self.sets)]


def _renumbered(images: ImageSet, classes: dict[str, int]) -> np.ndarray:
    """The labels of a set with named classes, of which one alone has no labels."""
    own = images.classes or {}
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    new = np.zeros(max(own.values()) + 1, np.int64)
    for name, label in own.items():
        new[label] = classes[name]
    return np.asarray(new[labels])
