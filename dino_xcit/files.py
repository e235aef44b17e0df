"""Files: written beside their place and renamed, safe YAML, names that can be printed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from typing import TYPE_CHECKING, Any

import yaml

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


MOST_VALUES = 1_000_000  # in a file of options
LONGEST_REASON = 300  # characters of what others say of a file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside the path to write to; it takes the path's place once the block ends well."""
    beside = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has this file, or the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, which may be a stranger's.

    Raises ValueError if it is no YAML or has objects in it, or if a few lines stand for more than any options are.
    """
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text.decode())
        many = _values(content, {}) > MOST_VALUES
    except RecursionError:
        raise UserError(f"{path} is no file of options: it is nested too deep") from None
    except Exception as error:  # YAML's own, and whatever it lets through of values that are not what their tags say
        raise UserError(
            f"{path} is not readable as YAML: {' '.join(str(error).split())[:LONGEST_REASON]}"
        ) from None
    if many:
        raise UserError(
            f"{path} is no file of options: its names stand for more than {MOST_VALUES} values"
        )
    return content


def _values(item: Any, known: dict[int, float]) -> float:
    """How many values an item holds with all that its anchors stand for; no end of them if it holds itself."""
    if not isinstance(item, (dict, list)):
        return 1
    if id(item) not in known:
        known[id(item)] = math.inf  # until it is counted
        parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        known[id(item)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(item)]


def printable(name: str) -> str:
    """Names of files need not be UTF-8; figures are."""
    return name.encode(errors="replace").decode()


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: what YAML and checkpoints hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def on_one_line(name: str) -> str:
    """Names of files may hold line ends, tabs and bytes that are no text; lists of them must not."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name
    )
    return printable(escaped)
