"""Files of this toolkit -> backbone; backbone -> file.

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
from dino_xcit.run_folder import from_plain
from dino_xcit.xcit import ABLATIONS, XCiT, resolve_architecture

TEACHER = "teacher.safetensors"
LAST = "checkpoints/last.ckpt"
KEPT_OPTIONS = ("in_chans", "mean", "std", "global_crops_size", *ABLATIONS)


def backbone_metadata(config: PretrainConfig) -> dict[str, Any]:
    """What a reader of the weights needs to know: plain values."""
    return {"arch": resolve_architecture(config.arch)[0], **{name: getattr(config, name) for name in KEPT_OPTIONS}}


def save_backbone(backbone: XCiT, config: PretrainConfig, path: Path) -> None:
    """Write the weights as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "dino_xcit": json.dumps(backbone_metadata(config))})


def load_backbone(weights: str | Path, arch: str | None = None) -> XCiT:
    """A run folder, its .ckpt or a .safetensors file -> the teacher's backbone in eval mode, on CPU.

    arch is needed where the file does not say it. The backbone's `metadata` has what the file says about it.
    Raises ValueError if there is nothing to load, the file is none of these, or tensors are missing or left over.
    """
    path = Path(weights)
    if path.is_dir():
        found = next((path / name for name in (TEACHER, LAST) if (path / name).exists()), None)
        if found is None:
            raise ValueError(f"--weights {weights} is a folder without {TEACHER} or {LAST}; expected a run folder")
        path = found
    if not path.exists():
        raise ValueError(f"--weights {weights} does not exist; expected a run folder, a .ckpt or a .safetensors file")
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if arch is None and "arch" not in metadata:
        raise ValueError(f"--weights {weights} does not say its architecture; name it with --arch")
    metadata = {**metadata, "arch": arch or metadata["arch"]}
    switches = {name: metadata[name] for name in ("in_chans", *ABLATIONS) if name in metadata}
    backbone = XCiT(metadata["arch"], **switches)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"--weights {weights} does not fit {metadata['arch']}: {' '.join(str(error).split())}") from None
    backbone.metadata = metadata
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
