"""Files of this toolkit, or timm's weights -> backbone; backbone -> file.

Files are safetensors with timm's parameter names; what the tensors do not say (architecture, channels, ablations, how images
were normalised) is in their metadata as JSON, under `dino_xcit`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.run_folder import CONFIG, METRICS, from_plain, read_config
from dino_xcit.xcit import ABLATIONS, XCiT, resolve_architecture

TEACHER = "teacher.safetensors"
LAST = "checkpoints/last.ckpt"
TIMM = "timm:"
KEPT_OPTIONS = ("in_chans", "mean", "std", "global_crops_size", *ABLATIONS)


def backbone_metadata(config: PretrainConfig) -> dict[str, Any]:
    """What a reader of the weights needs to know: plain values."""
    return {"arch": resolve_architecture(config.arch)[0], **{name: getattr(config, name) for name in KEPT_OPTIONS}}


def save_backbone(backbone: XCiT, config: PretrainConfig, path: Path) -> None:
    """Write the weights as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "dino_xcit": json.dumps(backbone_metadata(config))})


def load_backbone(weights: str | Path, arch: str | None = None) -> Any:
    """A run folder, its .ckpt, a .safetensors file or timm:NAME -> the (teacher's) backbone in eval mode, on CPU.

    An `XCiT`, or with timm:NAME whatever network timm has under that name: images (B, C, H, W) -> features (B, D).
    arch is needed where the file does not say it. The backbone's `metadata` has what the file says about it.
    Raises ValueError if there is nothing to load, the file is none of these, or tensors are missing or left over.
    """
    if str(weights).startswith(TIMM):
        return _from_timm(str(weights).removeprefix(TIMM))
    path = Path(weights)
    if path.is_dir():
        found = next((path / name for name in (TEACHER, LAST) if (path / name).exists()), None)
        if found is None:
            raise ValueError(f"--weights {weights} is a folder without {TEACHER} or {LAST}; expected a run folder")
        path = found
    if not path.exists():
        raise ValueError(
            f"--weights {weights} does not exist; expected a run folder, a .ckpt, a .safetensors file or timm:NAME"
        )
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if arch is None and "arch" not in metadata:
        raise ValueError(f"--weights {weights} does not say its architecture; name it with --arch")
    metadata = {**metadata, "arch": arch or metadata["arch"]}
    backbone = build(metadata)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"--weights {weights} does not fit {metadata['arch']}: {' '.join(str(error).split())}") from None
    return backbone.eval()


def build(metadata: dict[str, Any]) -> XCiT:
    """The network that the metadata describe, with new weights."""
    backbone = XCiT(metadata["arch"], **{name: metadata[name] for name in ("in_chans", *ABLATIONS) if name in metadata})
    backbone.metadata = metadata
    return backbone


def run_folder_of(weights: str) -> Path | None:
    """The run folder in which these weights are, or which they name; None if there is none."""
    if weights.startswith(TIMM):
        return None
    path = Path(weights)
    for folder in (path, *list(path.parents)[:2]):
        # A config.yaml alone may be another program's.
        if (folder / CONFIG).is_file() and any((folder / name).exists() for name in (METRICS, TEACHER, LAST)):
            return folder
    return None


def read_run(weights: str) -> PretrainConfig | None:
    """The options of the run that the weights are of, if they are in a run folder."""
    folder = run_folder_of(weights)
    return None if folder is None else read_config(folder)


def _from_timm(name: str) -> Any:
    import timm

    network: Any
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, Hugging Face and the network each have their own
        raise ValueError(f"--weights timm:{name} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    data = timm.data.resolve_data_config({}, model=network)
    channels, size, _ = data["input_size"]
    metadata = {"in_chans": channels, "global_crops_size": size, "mean": list(data["mean"]), "std": list(data["std"])}
    if not name.startswith("xcit_"):
        network.metadata = metadata
        return network.eval()
    backbone = build({**metadata, "arch": resolve_architecture(name)[0]})
    backbone.load_state_dict(network.state_dict(), strict=True)
    return backbone.eval()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("dino_xcit", "{}")
            names: list[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(described)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"--weights {path} is not a readable safetensors file: {error}") from None


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "teacher.backbone."
        tensors = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        config = from_plain(checkpoint["config"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"--weights {path} is not a checkpoint of `dino-xcit pretrain`: {type(error).__name__}") from None
    return tensors, backbone_metadata(config)
