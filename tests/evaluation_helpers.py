"""What tests of evaluations share: small backbones, run folders, folders of images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from helpers import TINY
from PIL import Image

from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.data.framing import Transform
from dino_xcit.evaluate.inputs import open_inputs
from dino_xcit.run_folder import METRICS, TEACHER, write_config
from dino_xcit.weights.build import build
from dino_xcit.weights.formats import backbone_metadata
from dino_xcit.weights.load import save_backbone

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.evaluate.features import FrozenFeatures, Split
    from dino_xcit.model.backbone import Backbone

CPU = torch.device("cpu")
SIDE = 16
TRANSFORM = Transform(SIDE, SIDE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
FOLDER = [
    f"{split}/{name}/{i}.png"
    for split, count in (("train", 3), ("val", 2))
    for name in "ab"
    for i in range(count)
]
TRAIN_IMAGES, IMAGES = 6, 10  # in FOLDER
CPU_ONLY = ClassificationConfig(
    weights="none",
    accelerator="cpu",
    devices="1",
    precision="32-true",
    feature_dtype="float32",
    num_workers=0,
    batch_size_per_gpu=4,
)


def backbone_of(seed: int = 0, config: RunConfig = TINY) -> Backbone:
    torch.manual_seed(seed)
    return build(backbone_metadata(config))


def random_images(count: int, side: int = SIDE, channels: int = 3, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8))


def save_run(folder: Path, config: RunConfig = TINY, seed: int = 0) -> Path:
    """The files of a run folder that evaluations read, with an untrained network."""
    folder.mkdir(parents=True)
    save_backbone(backbone_of(seed, config), config, folder / TEACHER)
    write_config(dataclasses.replace(config, output_dir=str(folder)), folder)
    (folder / METRICS).touch()
    return folder


def random_folder(root: Path, names: list[str] = FOLDER, side: int = 20) -> Path:
    """A folder with a random image under each name."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random_images(1, side, seed=seed)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / name)
    return root


class Opened(NamedTuple):
    """What `open_inputs` gives, and some splits of the weights' features."""

    config: EvalConfig
    frozen: FrozenFeatures
    class_names: dict[int, str]
    splits: list[Split]


def opened(config: EvalConfig, fabric: Fabric, *splits: str) -> Opened:
    with open_inputs(config, fabric) as inputs:
        frozen = inputs.features[0]
        return Opened(
            inputs.config, frozen, inputs.class_names, [frozen.split(name) for name in splits]
        )


def extracted(config: EvalConfig, fabric: Fabric) -> int:
    """How many images go through the backbone for both splits."""
    return opened(config, fabric, "train", "validation").frozen.extracted


# -- changes of files -----------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
