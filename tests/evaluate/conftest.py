"""An untrained run and a folder of images to evaluate it on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from evaluation_helpers import CPU_ONLY, random_folder, save_run

from dino_xcit.runtime import launch

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import ClassificationConfig


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return launch(CPU_ONLY)


@pytest.fixture
def config(tmp_path: Path) -> ClassificationConfig:
    """Evaluates a run on a folder of images."""
    return dataclasses.replace(
        CPU_ONLY,
        weights=str(save_run(tmp_path / "run")),
        data_path=str(random_folder(tmp_path / "images")),
        cache_dir=str(tmp_path / "cache"),
    )
