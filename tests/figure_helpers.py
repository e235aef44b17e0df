"""What several test files of figures share: small weights, run folders and images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.figures.framing import Framing
from dino_xcit.figures.inputs import find
from dino_xcit.figures.model import AttentionModel
from dino_xcit.figures.object_masks import SceneInput, scenes_of_files
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import write_config
from dino_xcit.weights.load import save_backbone

RUN = RunConfig(arch="xcit_pico2_p4", global_crops_size=32)


def save_weights(path: Path, seed: int = 0, **options: Any) -> str:
    """A weights file of random weights; options of `RunConfig`."""
    torch.manual_seed(seed)
    config = dataclasses.replace(RUN, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(XCiT(config.arch, in_chans=config.in_chans, xca=config.xca), config, path)
    return str(path)


def save_run_folder(folder: Path, **options: Any) -> str:
    """A run folder of drawn shapes with the weights alone."""
    config = dataclasses.replace(RUN, dataset="shapes", output_dir=str(folder), **options)
    of_weights = {key: options[key] for key in options if key in ("in_chans", "mean", "std")}
    save_weights(folder / "teacher.safetensors", **of_weights)
    write_config(config, folder)
    return str(folder)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """uint8 (C, H, W)"""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (channels, height, width), dtype=np.uint8))


def save_image(path: Path, image: torch.Tensor, **options: Any) -> Path:
    """uint8 (C, H, W) as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, **options)
    return path


def model_and_framing(
    weights: str, **options: Any
) -> tuple[AttentionConfig, AttentionModel, Framing]:
    """The config of these options, its model and its framing."""
    config = AttentionConfig(weights=(weights,), **options)
    model = AttentionModel("pico", weights, config, torch.device("cpu"))
    return config, model, Framing.of([model], config.fit)


def noise_array(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box(
    height: int, width: int, top: int, left: int, bottom: int, right: int, value: int = 255
) -> np.ndarray:
    """A mask (H, W) with a rectangle as its object."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def mask_scenes(
    folder: Path,
    scenes: dict[str, tuple[np.ndarray, np.ndarray | None]],
    weights: str,
    **options: Any,
) -> tuple[AttentionConfig, AttentionModel, list[SceneInput]]:
    """Save images (H, W, 3) and their masks (H, W) by name, and open them."""
    images, masks = folder / "images", folder / "masks"
    for name, (image, mask) in scenes.items():
        for of_kind, array in ((images, image), (masks, mask)):
            path = of_kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if array is not None:
                Image.fromarray(array).save(path)
    options |= {"images": (str(images),), "masks": str(masks)}
    config, model, framing = model_and_framing(weights, **options)
    found = scenes_of_files(config, model, framing, find(config, framing).images)
    return config, model, found.inputs


def smooth_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that resizing and codecs keep it about the same."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def files_in_figures() -> set[str]:
    """Files of the default output folder."""
    return {
        str(path.relative_to("figures")) for path in Path("figures").rglob("*") if path.is_file()
    }
