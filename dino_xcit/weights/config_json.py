"""Size, mean and standard deviation of the images in JSON beside weights, in timm's layout.

    {"architecture": NAME, "pretrained_cfg": {"input_size": [C, H, W], "mean": [...], "std": [...]}}

timm and Hugging Face call the file config.json. Beside an official .pth, which holds nothing but
tensors, it has the name of the weights: NAME.pth, NAME.json.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.errors import UserError
from dino_xcit.model.architectures import resolve_architecture
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

CONFIG_JSON = "config.json"
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""names that timm and Hugging Face give weights"""

FLAGS = {"image_size": "global_crops_size", "mean": "mean", "std": "std"}
"""options of framing, and their names in the metadata of weights"""
_DEFAULTS = RunConfig()
IMAGENET = {key: getattr(_DEFAULTS, key) for key in FLAGS.values()}
"""of official DINO: 224 pixels, ImageNet's mean and standard deviation"""


def timm_folder(path: Path) -> Path | None:
    """Return the folder that these weights are, or are in, if timm can open it."""
    folder = path if path.is_dir() else path.parent
    weights = TIMM_FILES if path.is_dir() else {path.name} & set(TIMM_FILES)
    has_weights = any((folder / name).is_file() for name in weights)
    has_config = has_weights and "architecture" in _read(folder / CONFIG_JSON)
    return folder if has_config else None


def framing_beside(path: Path, arch: str) -> dict[str, Any]:
    """Return what JSON beside a file holds of size, mean and standard deviation of the images.

    Args:
        path: the weights.
        arch: their architecture; the JSON of another one is not theirs.
    """
    for beside in (path.with_suffix(".json"), path.parent / CONFIG_JSON):
        content = _read(beside)
        if "architecture" not in content or not _is_of(content["architecture"], arch):
            continue
        about = content.get("pretrained_cfg", content)
        framing = {name: about[name] for name in ("mean", "std") if name in about}
        if "input_size" in about:
            framing["global_crops_size"] = about["input_size"][-1]
        return framing
    return {}


def as_json(arch: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file that `framing_beside` reads."""
    size = metadata.get("global_crops_size")
    about = {name: list(metadata[name]) for name in ("mean", "std") if name in metadata}
    if size is not None:
        about["input_size"] = [metadata.get("in_chans", 3), size, size]
    return {"architecture": arch, "pretrained_cfg": about}


def with_assumed(
    metadata: Mapping[str, Any], what: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Return the metadata with ImageNet's framing where they lack it, and print what was assumed.

    Args:
        metadata: of the weights.
        what: the weights, as messages name them.
        given: flags of `FLAGS` that the user has set, so nothing is assumed for them.

    Raises:
        UserError: mean and standard deviation are of another number of channels than ImageNet's.
    """
    assumed = {
        flag: IMAGENET[key]
        for flag, key in FLAGS.items()
        if key not in metadata and flag not in given
    }
    channels = metadata.get("in_chans", 3)
    lacking = [f"--{flag}" for flag in assumed if flag != "image_size"]
    if lacking and channels != len(IMAGENET["mean"]):
        raise UserError(
            f"{what}: mean and standard deviation of its {channels} channels are not "
            f"known; set {' and '.join(lacking)}"
        )
    if assumed:
        values = {
            flag: " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
            for flag, value in assumed.items()
        }
        options = ", ".join(f"--{flag} {value}" for flag, value in values.items())
        say(f"{what} does not hold the framing of its images; assumed: {options}")
    return {**IMAGENET, **metadata}


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if there is none, or it is something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_of(name: object, arch: str) -> bool:
    """Whether a name of JSON is the architecture's."""
    try:
        return resolve_architecture(str(name))[0] == resolve_architecture(arch)[0]
    except UserError:
        return str(name) == arch.removeprefix("timm:")
