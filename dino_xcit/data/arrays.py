"""Images in an array of NumPy: .npy, or .npz with labels.

Images are uint8, (N, H, W), (N, H, W, C) or (N, C, H, W). A .npy file and an array that .npz holds
uncompressed are memory-mapped; a compressed one is read whole by each process.
"""

from __future__ import annotations

import functools
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dino_xcit.data.decode import one_line, reading_images
from dino_xcit.data.folder import DECODING
from dino_xcit.data.pixels import PIL_MODES, from_pil, require_readable
from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

IMAGES, LABELS = ("images", "x", "arr_0"), ("labels", "y")  # names of arrays, preferred ones first
LOCAL_HEADER = 30  # bytes of a zip file before the name of a member
EXPECTED = "uint8 images of N x H x W, N x H x W x C or N x C x H x W with 1, 3 or 4 channels"


class ArraySet:
    """The images of an array in a file."""

    classes = None

    def __init__(self, path: Path, channels: int) -> None:
        """Find images and labels.

        Raises:
            UserError: The file holds no such arrays.
        """
        require_readable(channels)
        self.path, self.channels = path, channels
        array = self.array
        self.count = len(array)
        self.channel_axis = _channel_axis(array.shape) if array.dtype == np.uint8 else None
        if self.channel_axis is None or not self.count:
            found = f"{array.dtype} of {' x '.join(map(str, array.shape))}"
            raise UserError(f"--data_path {path} holds {found}; expected {EXPECTED}")
        self.labels = _labels(path, self.count)

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The images; each process opens the file itself."""
        return _open(self.path, IMAGES, EXPECTED)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "array"}

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        """See `ImageSet`."""
        pixels = np.array(self.array[index])
        if self.channel_axis == 1:
            pixels = pixels.transpose(1, 2, 0)
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        if PIL_MODES[self.channels] == Image.fromarray(pixels).mode:
            return torch.from_numpy(
                np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))
            ).permute(2, 0, 1)
        with reading_images():
            return from_pil(Image.fromarray(np.ascontiguousarray(pixels)), self.channels)

    def name(self, index: int) -> str:
        """See `ImageSet`."""
        return f"{self.path}[{index}]"

    def identity(self) -> list[Any]:
        """See `ImageSet`."""
        stat = self.path.stat()
        size = [stat.st_size, stat.st_mtime_ns]
        return ["array", DECODING, len(self), self.channels, str(self.path), size]


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Axis of the channels, 0 without one; None if this is no shape of images."""
    if len(shape) == 3:
        return 0
    if len(shape) != 4:
        return None
    return next((axis for axis in (3, 1) if shape[axis] in PIL_MODES), None)


def _labels(path: Path, count: int) -> np.ndarray | None:
    """Return the labels in a .npz file; None if it has none, or one class."""
    if path.suffix.lower() != ".npz" or not _names(path) & set(LABELS):
        return None
    labels = _open(path, LABELS, "labels").reshape(-1)
    if len(labels) != count or labels.dtype.kind not in "iu":
        raise UserError(
            f"--data_path {path} holds {len(labels)} labels of {labels.dtype} for {count} images; "
            "expected a whole number for each image"
        )
    labels = labels.astype(np.int64)
    return labels if labels.min() < labels.max() else None


def _names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as file:
        return {name.removesuffix(".npy") for name in file.namelist()}


def _open(path: Path, names: tuple[str, ...], expected: str) -> np.ndarray:
    """Open the array, in a .npz file the first that has one of these names.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        if path.suffix.lower() == ".npy":
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return array
        held = _names(path)
        name = next((name for name in names if name in held), None)
        if name is None:
            raise UserError(
                f"--data_path {path} holds the arrays {', '.join(sorted(held))}; expected "
                f"{' or '.join(names)}"
            )
        mapped = _mapped(path, f"{name}.npy")
        if mapped is not None:
            return mapped
        with np.load(path, allow_pickle=False) as file:
            return np.asarray(file[name])
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--data_path {path}: {one_line(error)}; expected {expected}") from None


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """Map an array that a zip file holds as it is; None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER)
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        file.seek(info.header_offset + LOCAL_HEADER + sum(lengths))
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        if dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
