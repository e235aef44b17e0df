"""The README's table of promises names tests that are there, and `eval/promises.py` can break each promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
from promises import PROMISES

HERE = Path(__file__).parent


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.test)
def test_promises_name_a_test_and_code_that_can_be_broken(promise):
    file, name = promise.test.split("::")
    assert f"def {name}(" in (HERE / file).read_text()
    assert (HERE.parent / f"dino_xcit/{promise.room}.py").read_text().count(promise.old) == 1


def test_the_readme_lists_them():
    listed = re.findall(
        r"^\| (.*) \| `tests/(.*)` \|$", (HERE.parent / "README.md").read_text(), re.MULTILINE
    )
    assert listed == [(promise.promise.replace("<", "&lt;"), promise.test) for promise in PROMISES]
