"""A run small enough to be made many times."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import TINY

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.pretrain import RunConfig

torch.set_num_threads(1)  # tiny tensors, and tests run side by side


@pytest.fixture
def tiny(tmp_path: Path) -> RunConfig:
    return dataclasses.replace(TINY, output_dir=str(tmp_path / "run"))


@pytest.fixture
def run_cli():
    """Run `dino-xcit` in a process of its own -> the finished process."""

    def run(
        *arguments: Any, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dino_xcit.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
