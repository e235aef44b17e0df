"""Files from strangers give a value or one line, in time, and touch nothing. Longer: `python eval/fuzz.py --minutes 10`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
import fuzz

EXAMPLES = {"images": 400, "masks": 200, "options": 100, "checkpoints": 200, "features": 200}


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
        lambda folder: os.symlink(folder / "link", folder.parent / "link"),
        lambda _: (_ for _ in ()).throw(ValueError("two\nlines")),
        lambda _: {}["key"],
    ],
    ids=["process", "shell", "write", "mkdir", "link", "lines", "other error"],
)
def test_the_guard_sees_what_is_not_allowed(action, tmp_path):
    (tmp_path / "inside").mkdir()
    with pytest.raises((AssertionError, KeyError)):
        fuzz.guard("anything", action, tmp_path / "inside")


def test_the_guard_lets_pass_what_is(tmp_path):
    fuzz.guard("anything", lambda folder: (folder / "inside").write_text(""), tmp_path)
    fuzz.guard("anything", lambda _: int("no number"), tmp_path)
