"""What several test files share."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_xcit.config.pretrain import PretrainConfig, RunConfig
from dino_xcit.run_folder import LAST, METRICS

PICO_PATHS = (2, 3)  # layers and residual branches of xcit_pico2

TINY = RunConfig(
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

LONG = dataclasses.replace(TINY, num_images=96, epochs=2, checkpoint_every_n_steps=3)
"""24 steps, 12 an epoch."""


def as_flags(config: RunConfig) -> list[str]:
    """The command line that gives this config."""
    flags: list[str] = []
    asked = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), asked[field.name]
        if value != default and value not in ({}, ()):
            flags.append(f"--{field.name}")
            flags += [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
    return flags


# -- image files --------------------------------------------------------------------------------

RAMP = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)


def make_folder(root: Path, names: list[str]) -> Path:
    """Write an image of 40 x 60 pixels under each name; each is another."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(RAMP, 5 * i, axis=1)).save(root / name)
    return root


def make_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    """Write a tar of files of these contents, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(number: int = 0) -> bytes:
    """Return the file of an image of 40 x 60 pixels, another for each number."""
    file = io.BytesIO()
    Image.fromarray(np.roll(RAMP, 5 * number, axis=1)).save(file, "PNG")
    return file.getvalue()


def folder_config(root: Path, **options: object) -> RunConfig:
    """Return `TINY` on the images of a folder."""
    source = {"dataset": None, "data_path": str(root), "num_images": None}
    return dataclasses.replace(TINY, **{**source, **options})


def png_bomb() -> bytes:
    """Return a small PNG file that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


# -- runs ---------------------------------------------------------------------------------------


def start_pretrain(config: RunConfig, **environment: str) -> subprocess.Popen[str]:
    """Start a run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dino_xcit.cli", "pretrain", *as_flags(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def logged_rows(config: RunConfig) -> list[dict[str, str]]:
    """Rows of a run's metrics.csv, without the column that differs from run to run."""
    path = Path(config.output_dir) / METRICS
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {column: value for column, value in row.items() if column != "images_per_second"}
            for row in csv.DictReader(file)
        ]


def wait_for_step(config: RunConfig, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run of this process has logged so many steps."""
    deadline = time.monotonic() + 120
    while len(logged_rows(config)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_state(config: RunConfig) -> dict[str, torch.Tensor]:
    """Tensors of the networks in a run's last checkpoint."""
    return saved_part(Path(config.output_dir) / LAST, "")


def saved_part(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names begin with the prefix, without it."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
