"""Export for timm and Hugging Face: a folder that `timm.create_model` opens."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING, Any

import timm
from timm.models import save_for_hf

from dino_xcit.data.framing import default_resize
from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ABLATIONS, timm_name
from dino_xcit.model.backbone import TIMM, Backbone
from dino_xcit.model.timm_backbone import TimmBackbone
from dino_xcit.run_folder import ATTENTION, CONFIG
from dino_xcit.weights.comparison import compare
from dino_xcit.weights.load import run_folder_of
from dino_xcit.weights.model_card import SCORES, model_card

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from dino_xcit.config.export import ExportConfig


def write_timm(backbone: Backbone, folder: Path, _config: ExportConfig) -> Path:
    """Write config.json and model.safetensors for `timm.create_model("local-dir:FOLDER")`."""
    path = folder / f"{_file_name(backbone)}_timm"
    with _replacing_folder(path) as temporary:
        _write_files(backbone, temporary)
    return path


def write_hf(backbone: Backbone, folder: Path, config: ExportConfig) -> Path:
    """Write the files for timm with a model card and its figure, for `upload_folder`."""
    path = folder / f"{_file_name(backbone)}_hf"
    with _replacing_folder(path) as temporary:
        _write_files(backbone, temporary)
        run = run_folder_of(config.weights or "")
        for name in (CONFIG, ATTENTION, *SCORES):
            if run is not None and (run / name).exists():
                shutil.copy(run / name, temporary / name)
        (temporary / "README.md").write_text(model_card(backbone, temporary))
    return path


def as_timm(backbone: Backbone) -> nn.Module:
    """Return timm's own network with these weights, in eval mode.

    Raises:
        UserError: timm has no such network.
    """
    if isinstance(backbone, TimmBackbone):
        return backbone.network.eval()
    name = timm_name(backbone.arch)
    ablated = [option for option in ABLATIONS if not backbone.metadata.get(option, True)]
    if name is None or ablated:
        lacking = f"XCiT without {ablated[0]}" if ablated else backbone.arch
        raise UserError(f"timm has no {lacking}; --format onnx and torch_export take any XCiT")
    size = backbone.metadata.get("global_crops_size", 224)
    network: nn.Module = timm.create_model(
        name, num_classes=0, in_chans=backbone.in_chans, img_size=size
    )
    network.load_state_dict(backbone.state_dict(), strict=True)
    return network.eval()


def _write_files(backbone: Backbone, folder: Path) -> None:
    network, about = as_timm(backbone), backbone.metadata
    size, channels = about.get("global_crops_size", 224), backbone.in_chans
    pretrained_cfg: dict[str, Any] = {
        "tag": "dino",
        "input_size": [channels, size, size],
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": size / default_resize(size),
        "license": None,
        **{name: list(about[name]) for name in ("mean", "std") if name in about},
    }
    save_for_hf(
        network,
        str(folder),
        model_config={"pretrained_cfg": pretrained_cfg},
        model_args=_arguments(backbone),
        safe_serialization=True,
    )

    def read_back(images: Tensor) -> Tensor:
        features: Tensor = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        return features

    compare(backbone, read_back, "timm")


def _arguments(backbone: Backbone) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that rebuild the network."""
    arguments: dict[str, Any] = {"in_chans": backbone.in_chans}
    if isinstance(backbone, TimmBackbone):
        sides = getattr(getattr(backbone.network, "patch_embed", None), "img_size", None)
        if sides is not None:  # learned positions have the size of the images
            arguments["img_size"] = list(sides)
        if getattr(backbone.network, "dynamic_img_size", False):
            arguments["dynamic_img_size"] = True
    return arguments


def _file_name(backbone: Backbone) -> str:
    return backbone.arch.removeprefix(TIMM).replace(":", "_").replace("/", "_")


@contextlib.contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Write a folder; yields a temporary one, which replaces `path` when the block succeeds."""
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
