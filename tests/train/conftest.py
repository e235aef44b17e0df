"""Runs without their pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from run_pictures import draw_pictures, empty_pictures

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def without_pictures() -> Iterator[None]:
    """Of the session, so that the runs of a module's fixtures are without them too."""
    with empty_pictures():
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of this test draws its pictures."""
    draw_pictures(monkeypatch)
