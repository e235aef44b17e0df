"""Atomic writes, safe YAML, and file names that can be printed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

import yaml

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LONGEST_REASON = 300  # characters of another library's message


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically.

    Yields a temporary path in the same folder. When the block succeeds, the file is synced to the
    disk and renamed to `path`; when it fails, it is removed.
    """
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; its folder is made if it is missing.

    JSON has no numbers that are not finite: they become null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _OptionsLoader(yaml.SafeLoader):
    """YAML 1.1's safe loader with the numbers of YAML 1.2: `5e-4` needs no point."""


_OptionsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file; tags that would make objects are refused.

    Raises:
        UserError: the file is not such YAML.
        OSError: the file cannot be read.
    """
    text = path.read_bytes()
    try:
        return yaml.load(text.decode(), Loader=_OptionsLoader)
    except RecursionError:
        raise UserError(f"{path} is no file of options: it is nested too deep") from None
    # PyYAML lets errors of any type through for values that do not fit their tags.
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"{path} is not readable as YAML: {reason}") from None


def plain(value: Any) -> Any:
    """Return the value with all tuples as lists, as YAML files and checkpoints hold it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def printable(name: str) -> str:
    """Return a file's name with question marks for the bytes that are not UTF-8."""
    return name.encode(errors="replace").decode()


def on_one_line(name: str) -> str:
    """Return a file's name with escapes for line ends, tabs and all else that is not printable."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name
    )
    return printable(escaped)
