"""Where the samples of a tar file lie, by its headers alone; indices are kept in the cache.

A sample is, in WebDataset's convention, a run of members whose names agree up to the first dot of
the last part: `n01/17.jpg`, `n01/17.cls`, `n01/17.json`. Its class is the content of `.cls`, or
`label` or `cls` in `.json`. Images without such files are samples of their own, so an archived
folder of images is read too; its folders are classes in `shards.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import numpy as np

from dino_xcit.data.decode import EXTENSIONS, one_line
from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.runtime import progress, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VERSION = 1  # of the files in the cache
FOLDER = "tar_index"  # in the cache
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # first bytes of such files
BLOCK = 512  # bytes; a tar ends with blocks of zeros
LABELS = frozenset({".cls", ".json"})
WHOLE_TAR = "expected a whole tar of images: fetch it again, or leave it out"
NO_LABEL = int(np.iinfo(np.int64).min)
LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json file that is read
MIB = 1 << 20
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the image's first byte
        ("size", "<i8"),  # of the image, in bytes
        ("label", "<i8"),  # a number in .cls or .json, else NO_LABEL
        ("text", "<i4"),  # index of a text in .cls or .json, else -1
        ("folder", "<i4"),  # index of the image's folder
        ("name", "<i8"),  # place of the image's name among the names
    ]
)


class TarIndex(NamedTuple):
    """The images of a tar file, in their order."""

    path: str
    size: int
    """of the file in bytes"""
    mtime_ns: int
    """time of the file's last modification"""
    records: np.ndarray
    """RECORD (n,)"""
    names: bytes
    """of the images in the tar, each with a zero byte at its end"""
    texts: list[str]
    """classes that .cls or .json name"""
    folders: list[str]
    """of the images"""
    ignored: Counter[str]
    """number of other files by ending"""


# -- opening -----------------------------------------------------------------------------------


def open_indices(paths: list[str], cache: Path) -> list[TarIndex]:
    """Return the indices of tar files, from the cache or made and put there.

    Args:
        paths: Of the files.
        cache: Folder in which indices are kept, below `FOLDER`.

    Raises:
        UserError: A file is no whole, uncompressed tar, or two of its samples have one key.
    """
    _require_tars(paths)
    folder = cache / FOLDER
    found = {path: _kept(path, folder) for path in paths}
    missing = [path for path, index in found.items() if index is None]
    if missing:
        with _locked(folder):
            found.update(_made(missing, folder))
    return [index for index in found.values() if index is not None]


def _require_tars(paths: list[str]) -> None:
    packed = [path for path in paths if path.lower().endswith(COMPRESSED)]
    if packed:
        raise _compressed(packed[0])
    gone = [path for path in paths if not Path(path).is_file()]
    if gone:
        others = f", {len(gone)} of {len(paths)} tars" if len(paths) > 1 else ""
        raise UserError(f"--data_path {gone[0]} does not exist{others}; expected a tar file")


def _compressed(path: str) -> UserError:
    return UserError(
        f"--data_path {path} is compressed; expected an uncompressed .tar, whose images can be "
        "read in any order: unpack it with gunzip, or the like"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make indices: those that wait find them made."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # no such folder can be, no locks
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(folder / ".lock"))
        yield


def _made(paths: list[str], folder: Path) -> dict[str, TarIndex]:
    indices: dict[str, TarIndex] = {}
    problem = ""
    total = sum(Path(path).stat().st_size for path in paths) // MIB
    with progress(total, "index of tars", "MiB", shown=True) as bar:
        for path in paths:
            before = sum(index.size for index in indices.values())

            def advance(offset: int, before: int = before) -> None:
                bar.update((before + offset) // MIB - bar.n)

            index = _kept(path, folder)  # another process may have made it meanwhile
            if index is None:
                index = walk(path, advance)
                try:
                    _keep(index, folder)
                except OSError as error:
                    problem = one_line(error)
            indices[path] = index
    if problem:
        say(f"the index of the tars is not kept in {folder}: {problem}")
    return indices


# -- the cache ---------------------------------------------------------------------------------


def _file(path: str, folder: Path) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]}.index"  # noqa: PTH100  # links stay links


def _keep(index: TarIndex, folder: Path) -> None:
    """Write an index: a line of JSON, the records, the names.

    Raises:
        OSError: It cannot be written.
    """
    about = {"version": VERSION, "path": os.path.abspath(index.path), "bytes": len(index.names)}  # noqa: PTH100
    values = {**index._asdict(), **about, "records": len(index.records)}
    del values["names"]
    with replacing(_file(index.path, folder)) as path, path.open("wb") as file:
        file.write(json.dumps(values).encode() + b"\n")
        file.write(index.records.tobytes())
        file.write(index.names)


def _kept(path: str, folder: Path) -> TarIndex | None:
    """Return the index in the cache; None if it is not there, damaged or of another file."""
    stat = Path(path).stat()
    now = (VERSION, os.path.abspath(path), stat.st_size, stat.st_mtime_ns)  # noqa: PTH100
    try:
        data = _file(path, folder).read_bytes()
        start = data.index(b"\n") + 1
        about: dict[str, Any] = json.loads(data[:start])
        if tuple(about[key] for key in ("version", "path", "size", "mtime_ns")) != now:
            return None
        records = np.frombuffer(data, RECORD, about["records"], start)
        names = data[start + records.nbytes :]
        if len(names) != about["bytes"]:
            return None
        ignored = Counter(about["ignored"])
        return TarIndex(path, *now[2:], records, names, about["texts"], about["folders"], ignored)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- walking -----------------------------------------------------------------------------------


class _Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    size: int


def walk(path: str, advance: Callable[[int], object] = lambda _: None) -> TarIndex:
    """Make the index of a tar file; of its content only labels are read.

    Args:
        path: Of the file.
        advance: Is called with the bytes that are walked.

    Raises:
        UserError: The file is no whole, uncompressed tar, or two of its samples have one key.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        stat = os.fstat(file.fileno())
        if file.read(8).startswith(MAGIC):
            raise _compressed(path)
        builder = _Builder(path, file.fileno())
        group: list[_Member] = []
        for member in _members(path, advance):
            if group and key_of(member.name) != key_of(group[0].name):
                builder.add(group)
                group = []
            group.append(member)
        builder.add(group)
    advance(stat.st_size)
    return builder.index(stat.st_size, stat.st_mtime_ns)


def key_of(name: str) -> str:
    """Return what the names of a sample's members have in common: all up to the first dot.

    Dots in folders do not count.
    """
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _members(path: str, advance: Callable[[int], object]) -> Iterator[_Member]:
    """Iterate the files of a tar, without hidden ones.

    Not with `TarFile.next`, which keeps all members in memory and takes a damaged header for the
    end.
    """
    whole, offset, name = Path(path).stat().st_size, 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            assert tar.fileobj is not None
            while not _is_end(tar.fileobj, offset):
                info = tarfile.TarInfo.fromtarfile(tar)
                offset, name = tar.offset, info.name.removeprefix("./")
                if info.offset_data + info.size > whole:
                    raise tarfile.ReadError(f"ends within {name}")
                advance(offset)
                if info.isreg() and not info.issparse() and not _is_hidden(name):
                    yield _Member(name, info.offset_data, info.size)
    except tarfile.TarError as error:
        found = f"is truncated or damaged after {name}" if name else "is no tar"
        raise UserError(
            f"--data_path {path} {found if whole else 'is empty'} ({one_line(error)}); {WHOLE_TAR}"
        ) from None
    if not name:
        raise UserError(f"--data_path {path} is an empty tar; {WHOLE_TAR}")


def _is_end(file: Any, offset: int) -> bool:
    """Go to a header of a tar; return whether the mark of its end is there instead.

    Raises:
        ReadError: The file ends before.
    """
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise tarfile.ReadError("no end mark")
    file.seek(offset)
    return bool(block == bytes(BLOCK))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class _Builder:
    """Collects the samples of a tar."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.rows: list[tuple[int, ...]] = []
        self.names = bytearray()
        self.texts: dict[str, int] = {}
        self.folders: dict[str, int] = {}
        self.ignored = Counter[str]()
        self.keys: set[str] = set()  # of samples with a label; names of images without one
        self.bare: set[str] = set()  # keys of images without a label

    def index(self, size: int, mtime_ns: int) -> TarIndex:
        """Return the index of the samples, of a file of this size and time."""
        return TarIndex(
            self.path,
            size,
            mtime_ns,
            np.array(self.rows, RECORD),
            bytes(self.names),
            list(self.texts),
            list(self.folders),
            self.ignored,
        )

    def add(self, group: list[_Member]) -> None:
        """Add the samples of members that follow each other and have one key.

        `17.jpg` is the sample's image, whatever other images it has, such as `17.mask.png`. Without
        it, `17.a.jpg` and `17.b.jpg` are images of their own, whose names have dots; without a
        label, `17.jpg` and `17.png` are too.
        """
        if not group:
            return
        key = key_of(group[0].name)
        files = {member.name[len(key) :].lower(): member for member in group}
        images = [ending for ending in files if ending in EXTENSIONS]
        images = images or [ending for ending in files if ending.endswith(EXTENSIONS)]
        labelled = not LABELS.isdisjoint(files)
        is_one = not (labelled and len([e for e in images if e in EXTENSIONS]) > 1)
        if len(files) < len(group) or not is_one or not self._is_new(key, images, files, labelled):
            raise UserError(
                f"--data_path {self.path} holds two samples of the key {key}; expected one image "
                "of a key, with its other files beside it in the tar (tar --sort=name)"
            )
        for ending in images:
            self._add_image(files[ending], files)
        for ending in files.keys() - set(images) - (LABELS if images else set()):
            last = os.path.splitext(ending)[1] or ending  # noqa: PTH122  # millions of names
            self.ignored[last or key.rpartition("/")[2]] += 1

    def _is_new(
        self, key: str, images: list[str], files: dict[str, _Member], labelled: bool
    ) -> bool:
        """Note the sample; return whether none before has its key, or the name of an image."""
        names = {files[ending].name for ending in images}
        is_new = key not in self.keys and names.isdisjoint(self.keys)
        if labelled:
            is_new = is_new and key not in self.bare
            self.keys.add(key)
        elif images:
            self.bare.add(key)
            self.keys |= names
        return is_new

    def _add_image(self, image: _Member, files: dict[str, _Member]) -> None:
        label, text = self._label(files)
        folder = image.name.rpartition("/")[0]
        self.rows.append(
            (
                image.offset,
                image.size,
                label,
                -1 if text is None else self.texts.setdefault(text, len(self.texts)),
                self.folders.setdefault(folder, len(self.folders)),
                len(self.names),
            )
        )
        self.names += image.name.encode(errors="surrogateescape") + b"\0"

    def _label(self, files: dict[str, _Member]) -> tuple[int, str | None]:
        """Return the number or the text of a sample's class, if it has one."""
        value: object = None
        if ".cls" in files:
            value = self._content(files[".cls"]).decode(errors="replace").strip() or None
        elif ".json" in files:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(self._content(files[".json"]))
                if isinstance(content, dict):
                    value = content.get("label", content.get("cls"))
        number = str(value)
        if number.removeprefix("-").isdecimal() and len(number) < len(str(NO_LABEL)):
            return int(number), None
        return NO_LABEL, value if isinstance(value, str) else None

    def _content(self, member: _Member) -> bytes:
        return os.pread(self.descriptor, min(member.size, LONGEST_LABEL), member.offset)
