"""A run small enough to be made many times."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_xcit.config.pretrain import PretrainConfig

torch.set_num_threads(1)  # tiny tensors, and tests run side by side

TINY = PretrainConfig(
    arch="xcit_pico2_p4",
    dataset="shapes",
    num_images=48,
    global_crops_size=16,
    local_crops_size=8,
    local_crops_number=2,
    drop_path_rate=0.1,
    out_dim=24,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    epochs=2,
    batch_size_per_gpu=8,
    warmup_epochs=1,
    freeze_last_layer=1,
    accelerator="cpu",
    devices="1",
    precision="32-true",
    num_workers=0,
    log_every_n_steps=1,
    eval_every_n_epochs=0,
    eval_num_images=40,
)


@pytest.fixture
def tiny(tmp_path: Path) -> PretrainConfig:
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


def as_flags(config: PretrainConfig) -> list[str]:
    """The command line that gives this config."""
    flags: list[str] = []
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if value != default and value not in ({}, ()):
            flags.append(f"--{field.name}")
            flags += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    return flags


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
