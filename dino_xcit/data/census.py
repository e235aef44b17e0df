"""What a folder of images, or tars, hold, in a few lines: taken, left out, and why."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from dino_xcit.data.decode import one_line
from dino_xcit.data.folder import FolderSet
from dino_xcit.data.images import ShapeSet, Subset
from dino_xcit.data.joined import JoinedSet
from dino_xcit.data.shards import ShardSet
from dino_xcit.errors import ImageError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from dino_xcit.data.images import ImageSet

LOOKED_AT, SECONDS = 32, 2  # images of a sample, and how long to look at most
NAMED = 6  # endings and folders in a line
IMAGE_KINDS = (
    ".jfif .jpe .jif .avif .heic .heif .jp2 .j2k .jxl .tga .svg .psd .exr .hdr .dng .cr2 .cr3 .nef "
    ".arw .raw .ico .pcx .pbm .pnm .dcm .nii .npy .eps .pdf"
)
VIDEO_KINDS = ".mp4 .mov .m4v .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ts .ogv"


@rank_zero_only
def report_start(images: ImageSet) -> None:
    """Print, in the first process, what a run is about to train on."""
    folders = _folders_of(images)
    for folder in folders:
        say(_taken(folder, len(images) if len(folders) == 1 else len(folder)))
        _report_left_out(folder)
    if len(folders) > 1:
        say(f"{len(images):,} images in all")
    if not isinstance(images, ShapeSet):
        line = look_at(images)
        if line is not None:
            say(line)


@rank_zero_only
def report_left_out(*sets: ImageSet) -> None:
    """Print, in the first process, what the user may miss among the images, once a folder."""
    folders = [folder for images in sets for folder in _folders_of(images)]
    for folder in {str(folder.folder): folder for folder in folders}.values():
        _report_left_out(folder)


def _folders_of(images: ImageSet) -> list[FolderSet | ShardSet]:
    while isinstance(images, Subset):
        images = images.images
    if isinstance(images, JoinedSet):
        return [folder for one in images.sets for folder in _folders_of(one)]
    return [images] if isinstance(images, (FolderSet, ShardSet)) else []


def _taken(folder: FolderSet | ShardSet, count: int) -> str:
    """`1,200 images in 10 classes of data/train; other files: 12 .heic, 40 .txt`."""
    share = "" if count == len(folder) else f" of {len(folder):,}"
    classes = [name for name in folder.classes or {} if name]
    number = f" in {len(classes):,} class{'es' * (len(classes) > 1)}" if classes else ""
    line = f"{count:,}{share} images{number} of {folder.folder}"
    if isinstance(folder, ShardSet) and len(folder.shards) > 1:
        line += f" ({len(folder.shards):,} tars)"
    others = folder.listing.ignored
    if not others:
        return line
    ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{number:,} {ending}" for ending, number in ranked[:NAMED]]
    rest = sum(number for _, number in ranked[NAMED:])
    return f"{line}; other files: {', '.join(named + [f'{rest:,} more'] * (rest > 0))}"


def _report_left_out(folder: FolderSet | ShardSet) -> None:
    for note in folder.notes:
        say(note)
    for kinds, name in ((IMAGE_KINDS, "images"), (VIDEO_KINDS, "videos")):
        found = {e: n for e, n in folder.listing.ignored.items() if e in kinds.split()}
        if found:
            counts = ", ".join(f"{number:,} {ending}" for ending, number in sorted(found.items()))
            say(
                f"left out of {folder.folder}: {counts}, {name} of kinds that are not read; "
                "convert them to use them"
            )
    unopened = folder.listing.unopened
    if unopened:
        more = [f"{len(unopened) - NAMED} more"] * (len(unopened) > NAMED)
        named = ", ".join(unopened[:NAMED] + more)
        say(f"folders that cannot be opened, left out: {named}")


def look_at(images: ImageSet) -> str | None:
    """Read a sample of the images, for `SECONDS` at most.

    Returns:
        How many are unreadable and how many of one colour, with the first of each; None if there
        are none.
    """
    end = time.monotonic() + SECONDS
    looked_at, unreadable, plain = 0, [], []
    for index in np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int)).tolist():
        if time.monotonic() > end:
            break
        looked_at += 1
        try:
            image = images.read(index)
        except (ImageError, OSError) as error:
            unreadable.append(f"{images.name(index)}: {one_line(error)}")
            continue
        if bool((image == image[:, :1, :1]).all()):
            plain.append(images.name(index))
    found = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((unreadable, "cannot be read"), (plain, "of one colour"))
        if names
    ]
    return f"of a sample of {looked_at} images, {' and '.join(found)}" if found else None
