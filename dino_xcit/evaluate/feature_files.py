"""Features as files: the four that official `eval_knn.py --dump_features` writes and reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import Split, digest_of, select_parts
from dino_xcit.evaluate.torch_file import DamagedFileError, read_torch_file
from dino_xcit.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.evaluation import ClassificationConfig
    from dino_xcit.evaluate.features import Features

CHECKED_ROWS = 65536  # features checked at a time
OFFICIAL_FILES = {
    "train": ("trainfeat.pth", "trainlabels.pth"),
    "validation": ("testfeat.pth", "testlabels.pth"),
}


class FileFeatures:
    """Features and labels of both splits from the four files in `--load_features`.

    A `Features`, as `FrozenFeatures` is; nothing is extracted. Labels in the files may be any whole
    numbers; here they are 0 to K - 1, and `classes` maps them to the files' labels.

    Raises:
        UserError: A file is missing, is damaged, or does not fit the others.
    """

    extracted, seconds, unreadable = 0, 0.0, 0

    def __init__(self, config: ClassificationConfig) -> None:
        assert config.load_features is not None
        self.folder = Path(config.load_features)
        self.name = str(self.folder)
        splits = {name: self._load(*files) for name, files in OFFICIAL_FILES.items()}
        train_width, test_width = (split.features.shape[2] for split in splits.values())
        if train_width != test_width:
            raise UserError(
                f"--load_features {self.folder}: trainfeat.pth has {train_width} columns and "
                f"testfeat.pth {test_width}"
            )
        classes = torch.unique(torch.cat([split.labels for split in splits.values()]))
        self.classes = {i: str(label) for i, label in enumerate(classes.tolist())}
        self.splits = {
            name: split._replace(labels=torch.searchsorted(classes, split.labels))
            for name, split in splits.items()
        }

    @property
    def shape(self) -> tuple[int, int]:
        """P and C."""
        _, parts, channels = self.splits["train"].features.shape
        return parts, channels

    @property
    def key(self) -> str:
        """Differs between features that differ."""
        stats = [(self.folder / name).stat() for files in OFFICIAL_FILES.values() for name in files]
        return digest_of([str(self.folder.resolve()), [(s.st_size, s.st_mtime_ns) for s in stats]])

    def labels(self, split: str) -> Tensor:
        """int64 (n,)."""
        return self.splits[split].labels

    def split(self, name: str) -> Split:
        """Features and labels of `train` or `validation`."""
        return self.splits[name]

    def _load(self, features_file: str, labels_file: str) -> Split:
        features, labels = self._tensor(features_file, 2), self._tensor(labels_file, 1)
        where = f"--load_features {self.folder}:"
        if len(features) != len(labels):
            raise UserError(
                f"{where} {features_file} has {len(features)} rows and {labels_file} {len(labels)}"
            )
        if not len(labels):
            raise UserError(f"{where} {features_file} is empty")
        if not all(bool(rows.isfinite().all()) for rows in torch.split(features, CHECKED_ROWS)):
            raise UserError(f"{where} {features_file} holds values that are not finite")
        if (labels.long() != labels).any() or labels.min() < 0:
            raise UserError(f"{where} {labels_file} does not hold whole numbers from 0")
        return Split(features[:, None], labels.long())

    def _tensor(self, name: str, dimensions: int) -> Tensor:
        try:
            tensor = read_torch_file(self.folder / name, mmap=True)
        except FileNotFoundError:
            expected = ", ".join(file for files in OFFICIAL_FILES.values() for file in files)
            raise UserError(
                f"--load_features {self.folder} has no {name}; expected {expected}"
            ) from None
        except DamagedFileError as error:
            raise UserError(
                f"--load_features: {self.folder / name} is not a tensor file: {error}"
            ) from None
        if not isinstance(tensor, Tensor) or tensor.ndim != dimensions:
            raise UserError(
                f"--load_features: {self.folder / name} does not hold a tensor of {dimensions} "
                "dimensions"
            )
        return tensor


def dump_features(features: Features, parts: Sequence[int], folder: Path) -> None:
    """Write the four files of both splits: these parts, L2-normalised together, and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in OFFICIAL_FILES.items():
        split = features.split(name)
        normalised = F.normalize(select_parts(split.features, parts).float(), dim=1)
        for file, tensor in zip(files, (normalised, split.labels), strict=True):
            with replacing(folder / file) as path:
                torch.save(tensor.clone(), path)
