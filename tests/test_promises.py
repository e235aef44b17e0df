"""The README lists promises with existing tests, and `eval/promises.py` can break each promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "eval"))
from promises import PROMISES

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.test)
def test_a_promise_names_an_existing_test_and_one_place_in_the_code(promise):
    assert promise.problem() is None


def test_the_readme_lists_the_promises():
    listed = re.findall(r"^\| (.*) \| `tests/(.*)` \|$", README.read_text(), re.MULTILINE)
    assert listed == [(promise.promise.replace("<", "&lt;"), promise.test) for promise in PROMISES]
