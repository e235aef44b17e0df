"""Untrusted files are accepted or refused in one line, in time, and touch nothing.

`python eval/fuzz.py --minutes 10` tries more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_xcit.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
import fuzz

EXAMPLES = {"images": 400, "masks": 200, "options": 50, "checkpoints": 200, "features": 200}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_files_from_strangers_are_taken_or_refused(target):
    before = sum(fuzz.tried.values())
    fuzz.run(target, EXAMPLES[target])
    assert sum(fuzz.tried.values()) - before >= EXAMPLES[target]


@pytest.mark.parametrize(
    "action",
    [
        lambda _: subprocess.run(["true"], check=True),
        lambda _: os.system("true"),
        lambda folder: (folder.parent / "outside.txt").write_text(""),
        lambda folder: (folder / "../outside").resolve().mkdir(exist_ok=True),
        lambda folder: (folder.parent / "link").symlink_to(folder / "link"),
        lambda _: (_ for _ in ()).throw(UserError("two\nlines")),
        lambda _: int("no number"),
        lambda _: {}["key"],
    ],
    ids=[
        "process",
        "shell",
        "write",
        "mkdir",
        "link",
        "lines",
        "numpy's or Python's ValueError",
        "other error",
    ],
)
def test_the_guard_sees_what_is_not_allowed(action, tmp_path):
    (tmp_path / "inside").mkdir()
    with pytest.raises((AssertionError, KeyError, ValueError)) as caught:
        fuzz.guard("anything", action, tmp_path / "inside")
    assert not isinstance(caught.value, UserError)


def test_the_guard_accepts_what_is_allowed(tmp_path):
    fuzz.guard("anything", lambda folder: (folder / "inside").write_text(""), tmp_path)
    refusal = UserError("--data_path is no folder")
    fuzz.guard("anything", lambda _: (_ for _ in ()).throw(refusal), tmp_path)
