"""A call from Python leaves the caller's process as it was."""

from __future__ import annotations

import dataclasses
import logging
import random
import signal
import threading
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as partitioner
from helpers import TINY
from PIL import Image
from run_pictures import empty_pictures
from timm.data.readers import get_img_extensions

import dino_xcit

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {"accelerator": "cpu", "devices": "1", "precision": "32-true", "num_workers": 0}
LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "torch", "timm")


def flushes_denormals() -> bool:
    return (torch.tensor(torch.finfo(torch.float32).tiny) / 2).item() == 0


def state() -> dict[str, Any]:
    return {
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "logging levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "denormals": flushes_denormals(),
        "timm's extensions": get_img_extensions(),
        "suppress_errors": dynamo.suppress_errors,
        "activation budget": partitioner.activation_memory_budget,
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "python's random state": random.getstate(),
        "numpy's random state": np.random.get_state()[1].tolist(),
        "torch's random state": torch.get_rng_state().tolist(),
        "PIL's limit": Image.MAX_IMAGE_PIXELS,
        "matplotlib": dict(mpl.rcParams),
    }


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    with empty_pictures():
        dino_xcit.pretrain(dataclasses.replace(TINY, epochs=1, output_dir=str(folder)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("denormals", [False, True])
def test_pretraining(tmp_path, denormals):
    config = dataclasses.replace(TINY, num_workers=1, epochs=1, output_dir=str(tmp_path / "run"))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    torch.set_flush_denormal(denormals)
    try:
        before = state()
        dino_xcit.pretrain(config)
        assert state() == before
        with pytest.raises(dino_xcit.UserError):
            dino_xcit.pretrain(dataclasses.replace(config, lr=1.0))
        assert state() == before
    finally:
        torch.set_flush_denormal(False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.mark.slow
def test_evaluations_figures_and_export(run, tmp_path):
    before = state()
    images = {"weights": str(run), "no_cache": True, "num_images": 40, **MACHINE}
    dino_xcit.knn_eval(nb_knn=(3,), baselines=True, **images)
    dino_xcit.linear_eval(epochs=1, **images)
    dino_xcit.linear_eval(protocol="dino", epochs=1, **{**images, "num_workers": 1})
    dino_xcit.seg_eval(epochs=1, **images)
    dino_xcit.attention(
        weights=(str(run),), masks="shapes", num_images=4, output_dir=str(tmp_path / "figures")
    )
    dino_xcit.export(weights=str(run), format=("official",), output_dir=str(tmp_path / "export"))
    assert state() == before


@pytest.mark.slow
def test_a_folder_of_images(tmp_path):
    for number in range(8):
        path = tmp_path / f"images/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(path)
    before = state()
    dino_xcit.pretrain(
        dataclasses.replace(
            TINY,
            dataset=None,
            num_images=None,
            data_path=str(tmp_path / "images"),
            epochs=1,
            output_dir=str(tmp_path / "run"),
        )
    )
    assert state() == before


@pytest.mark.slow
def test_outside_the_main_thread(tmp_path):
    config = dataclasses.replace(TINY, epochs=1, output_dir=str(tmp_path / "run"))
    before = state()
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(dino_xcit.pretrain(config)))
    thread.start()
    thread.join()
    assert outcomes[0].step == outcomes[0].steps
    assert state() == before
