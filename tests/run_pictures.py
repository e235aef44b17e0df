"""Runs whose pictures are empty files: to draw them takes most of a small run's time."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from dino_xcit.run_folder import ATTENTION, CROPS, CURVES
from dino_xcit.train import callback, dry_run
from dino_xcit.train.attention_history import AttentionHistory

if TYPE_CHECKING:
    from collections.abc import Iterator

EMPTY = (
    (dry_run, "draw_crops", lambda folder, *_: (folder / CROPS).touch()),
    (callback, "draw_curves", lambda folder: (folder / CURVES).touch()),
    (AttentionHistory, "_draw", lambda history, *_: (history.folder / ATTENTION).touch()),
)
DRAWN = [getattr(owner, name) for owner, name, _ in EMPTY]


@contextlib.contextmanager
def empty_pictures() -> Iterator[None]:
    """Runs in this context leave empty pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, touch in EMPTY:
            patch.setattr(owner, name, touch)
        yield


def draw_pictures(patch: pytest.MonkeyPatch) -> None:
    """Runs draw their pictures again."""
    for (owner, name, _), draw in zip(EMPTY, DRAWN, strict=True):
        patch.setattr(owner, name, draw)
