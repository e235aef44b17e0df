"""Files of tensors: safetensors and torch.save.

Only tensors and plain data are read, never code: `torch.load` builds the classes of `DATA` and
refuses all others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import pickle
import re
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, Tensor]

# Pure paths, because a path of Windows cannot be made elsewhere. Python 3.13 has them in a module
# of another name.
PATHS = [
    (pure, f"{module}.{kind}{system}Path")
    for system, pure in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath))
    for kind in ("", "Pure")
    for module in ("pathlib", "pathlib._local")
]
# Functions by which numpy's arrays and scalars are pickled; numpy 1 has them in another module.
NUMPY = [
    (function, f"numpy.{core}.multiarray.{name}")
    for core in ("core", "_core")
    for name, function in (
        ("scalar", np.float64(0).__reduce__()[0]),
        ("_reconstruct", np.zeros(0).__reduce__()[0]),
    )
]
DATA: list[Any] = [
    *(argparse.Namespace, types.SimpleNamespace),
    # torch fills no other containers than dict and list.
    (lambda *_: {}, "collections.defaultdict"),
    (lambda *_: [], "collections.deque"),
    *(dict, list, tuple, set, int, float, str),  # what a defaultdict makes
    *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
    *(np.ndarray, np.dtype),
    *(type(np.dtype(code)) for code in np.typecodes["All"]),
    *PATHS,
    *NUMPY,
]
"""classes that hold data: official DINO keeps its command line beside the tensors, for example"""


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of tensors.

    Returns:
        Its content, and the metadata of our own safetensors files.

    Raises:
        UserError: it is something else; the message is what.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError("is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("is a pointer of git-lfs, not the file itself: `git lfs pull` fetches it")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("is a web page, not weights: download it again")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _read_torch(path), {}


def _read_torch(path: Path) -> dict[str, Any]:
    broken = "is cut off, or no file of torch.save or safetensors"
    try:
        with torch.serialization.safe_globals(DATA):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|Unsupported class|function) ([\w.]*\w)", str(error))
        if code is None:
            raise UserError(broken) from None
        raise UserError(
            f"holds code ({code[1]}), which is never run; save its tensors alone"
        ) from None
    except Exception:  # damaged files raise errors of many types
        raise UserError(broken) from None
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}; expected tensors by their names")
    return dict(content)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("dino_xcit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"is not a readable safetensors file: {error}") from None
    return tensors, metadata if isinstance(metadata, dict) else {}


def write_safetensors(tensors: Tensors, path: Path, about: dict[str, Any]) -> None:
    """Write tensors, with `about` as JSON in the metadata under `dino_xcit`.

    Raises:
        OSError: they cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors' own is 0600
    try:
        save_file(tensors, path, metadata={"format": "pt", "dino_xcit": json.dumps(about)})
    except SafetensorError as error:  # also of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)
