"""What `--data_path` names: folders of images, tars, lists, arrays, or several of these."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dino_xcit.data.arrays import ArraySet
from dino_xcit.data.folder import (
    FolderSet,
    Listing,
    list_images,
    natural_key,
    one_path,
    open_folder,
    paths_of,
)
from dino_xcit.data.joined import JoinedSet
from dino_xcit.data.lists import read_list, require_files
from dino_xcit.data.shards import Samples, ShardSet, divided
from dino_xcit.data.splits import (
    SPLITS,
    NoImagesError,
    NoTrainingImagesError,
    find_split,
    preference,
)
from dino_xcit.data.tar_index import COMPRESSED, open_indices
from dino_xcit.errors import UserError
from dino_xcit.runtime import default_cache

if TYPE_CHECKING:
    from dino_xcit.data.images import Config, ImageSet

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def open_path(config: Config, split: str, classes: dict[str, int] | None) -> ImageSet | None:
    """Open a split of `--data_path`; see `open_images`.

    Raises:
        UserError: There are no such files, they hold no images, or validation images but no others.
    """
    paths = [path for named in paths_of(config) for path in expanded(named)]
    tars = _named_tars(paths)
    if tars is not None:
        return _open_tars(config, tars, split, classes)
    if len(paths) == 1:
        return _open_one(config, paths[0], split, classes)
    splits = _divided(paths, named=True)
    if splits is not None:
        paths = splits.train if split == "train" else splits.validation
        split = "train"  # each is open as a whole
    opened = [_open_one(config, path, split, classes) for path in dict.fromkeys(paths)]
    sets = [images for images in opened if images is not None]
    if len(sets) < 2:
        return sets[0] if sets else None
    return JoinedSet(sets, classes)


def _open_one(
    config: Config, path: str, split: str, classes: dict[str, int] | None
) -> ImageSet | None:
    """Open a split of one path."""
    config = dataclasses.replace(config, data_path=path)
    tars = _named_tars([path]) or _tars_in(config)
    if tars is not None:
        return _open_tars(config, tars, split, classes)
    if path.lower().endswith((".npy", ".npz")) and Path(path).is_file():
        return None if split == "validation" else ArraySet(Path(path), config.in_chans or 3)
    if not (path.lower().endswith(".txt") and Path(path).is_file()):
        return open_folder(config, split, classes)
    files, names = read_list(Path(path))
    tars = _named_tars(files)
    if tars is not None:
        return _open_tars(config, tars, split, classes)
    if split == "validation":
        return None
    require_files(path, files)
    listing = Listing(files, Counter(), [])
    return FolderSet(Path(path), listing, config.in_chans or 3, classes, names=names)


def expanded(path: str) -> list[str]:
    """Return the paths that braces stand for, as in a shell: `{000..099}` and `{train,val}`."""
    braces = BRACES.search(path)
    if braces is None or Path(path).exists():
        return [path]
    span = RANGE.fullmatch(braces[1])
    if span is None and "," not in braces[1]:
        return [path]
    items = braces[1].split(",")
    if span is not None:
        first, last = int(span[1]), int(span[2])
        items = [f"{n:0{len(span[1])}}" for n in range(min(first, last), max(first, last) + 1)]
    rests = expanded(path[braces.end() :])
    heads = [f"{path[: braces.start()]}{item}" for item in items]
    return [f"{head}{rest}" for head, rest in itertools.product(heads, rests)]


# -- tars --------------------------------------------------------------------------------------


class _Tars(NamedTuple):
    """Tar files of each split."""

    train: list[str]
    validation: list[str]
    notes: tuple[str, ...] = ()


def is_tar(path: str) -> bool:
    """Whether a file is named as a tar, which may be compressed."""
    return path.lower().endswith((".tar", *COMPRESSED)) and not Path(path).is_dir()


def _named_tars(paths: list[str]) -> _Tars | None:
    """Divide tars that the user names; None if there are others than tars among the paths."""
    if not all(is_tar(path) for path in paths):
        return None
    return _divided(paths, named=True) or _Tars(_in_order(paths), [])


def _in_order(paths: list[str]) -> list[str]:
    return sorted(sorted(set(paths)), key=natural_key)


def _divided(paths: list[str], named: bool) -> _Tars | None:
    """Divide tars by names such as imagenet1k-train-0000.tar and imagenet1k-validation-00.tar.

    Args:
        paths: Of the tars.
        named: Whether the user names each: their folders' names count too, and those of no
            split are training images.

    Returns:
        The tars of each split, of which one may have none; None if no name is a split's.
    """
    ranked: dict[str, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for path in paths:
        words = re.split(r"[-_. ]+", Path(path).name)
        words += [Path(path).parent.name] if named else []
        places = ((split, preference(word, split)) for word in words for split in SPLITS)
        split, place = next(((s, p) for s, p in places if p is not None), ("", 0))
        if split:
            ranked[split].append((place, path))
    chosen = {
        split: _in_order([path for place, path in found if place == best])
        for split, found in ranked.items()
        for best in [min((place for place, _ in found), default=0)]
    }
    if named and all(chosen.values()):
        known = {path for found in ranked.values() for _, path in found}
        chosen["train"] = _in_order([*chosen["train"], *(p for p in paths if p not in known)])
    if named and not all(chosen.values()):
        return None
    if not any(chosen.values()):
        return None
    left_out = len(set(paths)) - sum(map(len, chosen.values()))
    notes = (f"training images are those in {len(chosen['train']):,} files named as such; "
             f"{left_out:,} other files are not used",) if left_out else ()  # fmt: skip
    return _Tars(chosen["train"], chosen["validation"], notes)


def _tars_in(config: Config) -> _Tars | None:
    """Find the tars in a folder, or in train/ and val/ of it; None if it holds images or no tars.

    Raises:
        UserError: It is the folder of the run too, whose pictures would become images.
        NoTrainingImagesError: It holds validation tars and no others.
    """
    root = Path(one_path(config) or "")
    if not root.is_dir():
        return None
    folders = {split: find_split(root, split) for split in SPLITS}
    in_splits = {split: _tars_of(folder) for split, folder in folders.items() if folder}
    flat = [] if in_splits.get("train") else _tars_of(root)
    if not flat and not any(in_splits.values()):
        return None
    output = Path(config.output_dir).resolve() if config.output_dir is not None else None
    if list_images(root, output).files:
        return None
    if output == root.resolve():
        raise UserError(
            f"--output_dir {config.output_dir} is the folder of the tars, whose pictures would be "
            "taken for the images; name another"
        )
    if in_splits.get("train"):
        return _Tars(in_splits["train"], in_splits.get("validation", []))
    tars = _divided(flat, named=False) or _Tars(flat, in_splits.get("validation", []))
    if not tars.train:
        held = tars.validation or in_splits["validation"]
        raise NoTrainingImagesError(
            f"--data_path {root} holds validation tars ({Path(held[0]).name}, ...) and no training "
            "tars, and validation images must not be trained on; put the others into train/, or "
            "name the tars to train on with --data_path"
        )
    return tars


def _tars_of(folder: Path) -> list[str]:
    """The tars that lie in a folder; compressed ones if there are no others."""
    names = [str(path) for path in folder.iterdir() if path.name[0] != "." and is_tar(path.name)]
    plain = [name for name in names if not name.lower().endswith(COMPRESSED)]
    return _in_order(plain or names)


def _open_tars(
    config: Config, tars: _Tars, split: str, classes: dict[str, int] | None
) -> ShardSet | None:
    paths = tars.validation if split == "validation" and tars.validation else tars.train
    cache_dir: str | None = getattr(config, "cache_dir", None)
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    indices = open_indices(paths, cache)
    samples = Samples.of(indices)
    if not tars.validation:
        parts = divided(samples)
        if split == "validation" and not parts:
            return None
        samples = parts.get(split, samples)
    images = ShardSet(indices, samples, config.in_chans or 3, classes, tars.notes)
    if len(images):
        return images
    if split == "validation":
        return None
    ignored = ", ".join(f"{n} {ending}" for ending, n in images.listing.ignored.most_common(5))
    raise NoImagesError(
        f"no images in --data_path {images.folder} (found {ignored or 'no files'}); expected tars "
        "of images, such as 17.jpg and 17.cls"
    )
