"""Weights -> a backbone whose attention is looked at, and what it gives for one image."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data.framing import SMALL
from dino_xcit.errors import UserError
from dino_xcit.figures.maps import AttentionMaps, check_layer, look
from dino_xcit.model.architectures import CLASS_ATTENTION_LAYERS
from dino_xcit.model.xcit import XCiT, with_class_attention
from dino_xcit.run_folder import LAST, TEACHER
from dino_xcit.runtime import HALF, resolve_precision
from dino_xcit.weights.load import load_backbone, run_folder_of

if TYPE_CHECKING:
    import numpy as np

    from dino_xcit.config.attention import AttentionConfig

OFFICIAL_SIZE = 480  # of official visualize_attention.py


@dataclass(frozen=True, kw_only=True)
class AttentionResult:
    """What one backbone saw of one image. Axes as in `attention.py`, without the batch."""

    name: str
    """file name of the image without its ending, once in a command"""
    image: np.ndarray
    """uint8 (H, W, channels): the pixels that the patches lie on; the last patches may reach beyond"""
    patch: int
    """side of a patch in pixels"""
    attention: np.ndarray
    queries: np.ndarray | None = None
    keys: np.ndarray | None = None
    covariance: np.ndarray | None = None
    features: np.ndarray | None = None


# -- backbones -------------------------------------------------------------------------------------------------------


class AttentionModel:
    """A backbone that looks at one image: uint8 pixels -> maps."""

    def __init__(
        self, title: str, weights: str, config: AttentionConfig, device: torch.device
    ) -> None:
        """Raises ValueError if the weights do not load or have no such layer or head."""
        self.title, self.weights, self.config, self.device = title, weights, config, device
        loaded = load_backbone(weights, config.arch, config.checkpoint_key)
        try:
            backbone = with_class_attention(loaded)
        except UserError as error:
            raise UserError(f"--weights {weights}: {error}") from None
        self.use(backbone)
        check_layer("layer", config.layer, CLASS_ATTENTION_LAYERS)
        check_layer("xca_layer", config.xca_layer, len(backbone.blocks))
        if config.head is not None and config.head >= backbone.heads:
            raise UserError(
                f"--head is {config.head}; {backbone.arch} has the heads 0 to {backbone.heads - 1}"
            )

    def use(self, backbone: XCiT) -> None:
        self.backbone = backbone.to(self.device).eval()
        about = {**dataclasses.asdict(PretrainConfig()), **backbone.metadata}
        if len(about["mean"]) != backbone.in_chans:
            raise UserError(
                f"--weights {self.weights} do not say how their {backbone.in_chans} channels are normalised"
            )
        self.offset, self.scale = (
            torch.tensor(about[key], device=self.device)[:, None, None] for key in ("mean", "std")
        )
        crop, asked = about["global_crops_size"], self.config.image_size
        self.long_side = asked if asked is not None else crop if crop < SMALL else OFFICIAL_SIZE

    def with_backbone(self, backbone: XCiT, title: str) -> AttentionModel:
        """The same with other weights."""
        other = copy.copy(self)
        other.title = title
        other.use(backbone)
        return other

    @torch.inference_mode()
    def __call__(self, images: Tensor, features: bool = False, xca: bool = False) -> AttentionMaps:
        """uint8 (B, C, H, W) of sides that the patch divides."""
        x = (images.to(self.device).float() / 255 - self.offset) / self.scale
        half = HALF.get(resolve_precision(self.config))
        with torch.autocast(self.device.type, half, enabled=half is not None):
            xca_layer = self.config.xca_layer if xca else None
            return look(
                self.backbone, x, layer=self.config.layer, xca_layer=xca_layer, features=features
            )


def open_models(config: AttentionConfig, device: torch.device) -> list[AttentionModel]:
    """One for each of `--weights`, titled by `--names`, else by their folders or files."""
    titles = [
        (run_folder_of(weights) or Path(weights.replace(":", "_"))).name
        for weights in config.weights
    ]
    titles = list(config.names) or (
        titles if len(set(titles)) == len(titles) else list(config.weights)
    )
    if len(set(titles)) < len(titles):
        titles = [f"{title}, {number}" for number, title in enumerate(titles)]
    return [
        AttentionModel(title, weights, config, device)
        for title, weights in zip(titles, config.weights, strict=True)
    ]


def open_checkpoints(config: AttentionConfig, device: torch.device) -> list[AttentionModel]:
    """One for each checkpoint that the run has kept, in the order of the epochs, the finished teacher last."""
    folder = run_folder_of(config.weights[0])
    kept = sorted(folder.glob("checkpoints/epoch[0-9][0-9][0-9][0-9]*.ckpt")) if folder else []
    if not folder or not kept:
        raise UserError(
            f"--figures training: --weights {config.weights[0]} is not a run folder that kept checkpoints; "
            "pretrain --saveckp_freq N keeps one every N epochs"
        )
    last = next((folder / name for name in (TEACHER, LAST) if (folder / name).exists()), kept[-1])
    titles = [f"epoch {int(path.stem.removeprefix('epoch'))}" for path in kept]
    models = [
        AttentionModel(title, str(path), config, device)
        for title, path in zip(titles, kept, strict=True)
    ]
    final = AttentionModel("last", str(last), config, device)
    states = (model.backbone.state_dict().values() for model in (models[-1], final))
    return (
        models
        if all(torch.equal(*pair) for pair in zip(*states, strict=True))
        else [*models, final]
    )
