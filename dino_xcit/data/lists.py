"""Text files that list images: a path on each line, and after a tab its class, if it has one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

FILES_CHECKED = 10_000  # evenly spaced: asking for each of a million takes long on NFS


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """Read a list of files.

    Args:
        path: Of the list; paths in it that are not absolute are from its folder.

    Returns:
        The files, and the class of each; without classes these are empty.

    Raises:
        UserError: The list is empty, no text, or names classes for some files only.
    """
    try:
        lines = path.read_text(errors="strict").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--data_path {path} is no text; expected a path on each line") from None
    rows = [line.partition("\t") for line in lines if line.strip()]
    if not rows:
        raise UserError(f"--data_path {path} lists no files; expected a path on each line")
    names = [name.strip() for _, _, name in rows]
    bare = names.count("")
    if 0 < bare < len(names):
        raise UserError(
            f"--data_path {path} has {bare} of {len(names)} lines without a class (first: "
            f"{rows[names.index('')][0]}); expected a tab and a class on each line, or on none"
        )
    # os.path, since a list may hold millions of paths
    return [os.path.join(path.parent, file.strip()) for file, _, _ in rows], names  # noqa: PTH118


def require_files(path: str, files: list[str]) -> None:
    """Check that files of a list exist, all or so many of them.

    Raises:
        UserError: Some do not.
    """
    spaced = np.unique(np.linspace(0, len(files) - 1, FILES_CHECKED).astype(int)).tolist()
    missing = [files[index] for index in spaced if not os.path.isfile(files[index])]  # noqa: PTH113
    if missing:
        sample = f" of a sample of {len(spaced):,}" if len(spaced) < len(files) else ""
        raise UserError(
            f"--data_path {path} lists {len(missing)} files{sample} that do not exist (first: "
            f"{missing[0]}); expected paths from the list's folder, or absolute ones"
        )
