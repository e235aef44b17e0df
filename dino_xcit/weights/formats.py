"""Checkpoint files of ours and of others -> tensors under our names, which are timm's, and their network; and back.

Read without being told which: safetensors; files of torch.save, whether of this toolkit's Lightning module, of official DINO
(backbone alone, or student and teacher with their heads), of official XCiT (supervised), or of anyone who kept timm's names.
Tensors and plain values alone are read (`weights_only`), never code.

The official names differ in two places: `pos_embeder`, and class attention's query, key and value in one `qkv`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ABLATIONS, ARCHITECTURES, resolve_architecture
from dino_xcit.model.timm_backbone import is_timm
from dino_xcit.run_folder import from_plain

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.pretrain import PretrainConfig

Tensors = dict[str, Tensor]
KEPT_OPTIONS = ("in_chans", "mean", "std", "global_crops_size", *ABLATIONS)
NETWORKS = ("teacher", "student")  # of a DINO checkpoint, ours or official
WRAPPERS = re.compile(
    r"(module\.|_orig_mod\.|backbone\.)+"
)  # DistributedDataParallel, torch.compile, DINO's multi-crop
NESTED = (
    "model_ema",
    "state_dict_ema",
    "model",
    "state_dict",
)  # where others keep weights; the average first, as timm
STEM = re.compile(
    r"patch_embed\.proj\.\d+\.0\.weight"
)  # a convolution for each halving of the image
LISTED = 4  # names that a message tells


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds of one network."""

    backbone: Tensors
    """under our names"""
    head: Tensors = field(default_factory=dict)
    """DINO's projection head under the names of `DINOHead`, where the file has it"""
    center: Tensor | None = None
    """DINO's center (1, K), where the file has it"""
    metadata: dict[str, Any]
    """architecture, channels, ablations; of our own files also how images were normalised. Plain values"""


def backbone_metadata(config: PretrainConfig) -> dict[str, Any]:
    """What a reader of the weights needs to know: plain values."""
    return {
        "arch": config.arch if is_timm(config.arch) else resolve_architecture(config.arch)[0],
        **{name: getattr(config, name) for name in KEPT_OPTIONS},
    }


# -- files -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path, networks: Sequence[str] = ("teacher",)) -> Checkpoint:
    """networks: which to take where the file holds a teacher and a student: the first of these that is there.

    Raises ValueError that says what the file is instead, if it does not hold an XCiT.
    """
    content, metadata = read_file(path)
    tensors = _choose(content, networks)
    if "config" in content and "pytorch-lightning_version" in content:
        metadata = backbone_metadata(from_plain(content["config"]))
    if is_timm(metadata.get("arch", "")):
        backbone, head = split_head(tensors)
        about = {}
    else:
        backbone, head = to_our_names(tensors)
        about = describe(backbone)
    center = content.get("dino_loss", {}).get(
        "center", content.get("state_dict", {}).get("loss.center")
    )
    return Checkpoint(
        backbone=backbone,
        head=head if "last_layer.weight_v" in head else {},
        center=center,
        metadata={**about, **metadata},
    )


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a file, and what a safetensors file of ours says beside. Raises ValueError that says what is wrong."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError("is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("is a pointer of git-lfs, not the file itself: `git lfs pull` fetches it")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("is a web page, not weights: download it again")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    try:
        # Official DINO keeps its command line beside the tensors, which is of this class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|Unsupported class|global:?) ([\w.]+)", str(error))
        if code:
            raise UserError(
                f"holds code ({code[1]}), which is never run; save its tensors alone"
            ) from None
        raise UserError("is cut off, or no file of torch.save or safetensors") from None
    except Exception:  # each way of being broken has its own
        raise UserError("is cut off, or no file of torch.save or safetensors") from None
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}; expected tensors by their names")
    return dict(content), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("dino_xcit", "{}")
            names: list[str] = file.keys()
            return {name: file.get_tensor(name) for name in names}, json.loads(described)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"is not a readable safetensors file: {error}") from None


def write_safetensors(tensors: Tensors, path: Path, about: dict[str, Any]) -> None:
    """Tensors and, as JSON under `dino_xcit`, what is known beside them. Raises OSError if they cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt", "dino_xcit": json.dumps(about)})
    except SafetensorError as error:  # by which it tells of a full disk, too
        raise OSError(f"{path} cannot be written: {error}") from error


def _choose(content: dict[str, Any], networks: Sequence[str]) -> Tensors:
    """The tensors of one network, under whatever names."""
    found = next(
        (content[name] for name in NESTED if isinstance(content.get(name), Mapping)), content
    )
    there = {name: content[name] for name in NETWORKS if isinstance(content.get(name), Mapping)}
    for name in NETWORKS:  # in a Lightning module's state dict they are prefixes
        of_module = {
            key.removeprefix(f"{name}."): found[key] for key in found if key.startswith(f"{name}.")
        }
        there.update({name: of_module} if of_module else {})
    chosen = next((there[name] for name in networks if name in there), None)
    if there and chosen is None:
        raise UserError(
            f"has no {networks[0]}, only the {' and '.join(there)}; name it with --checkpoint_key"
        )
    return _tensors(found if chosen is None else chosen)


def _tensors(content: Mapping[str, Any]) -> Tensors:
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise UserError(
            f"holds no network: {listed(others) or 'nothing'} beside {len(content) - len(others)} tensors"
        )
    return dict(content)


# -- names -----------------------------------------------------------------------------------------------------------


def to_our_names(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Tensors of anyone's XCiT -> backbone and head, DINO's or a classifier, under our names."""
    backbone: Tensors = {}
    head: Tensors = {}
    for name, tensor in tensors.items():
        name = WRAPPERS.sub("", name, count=1) if WRAPPERS.match(name) else name
        if name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        elif re.fullmatch(r"cls_attn_blocks\.\d+\.attn\.qkv\.(weight|bias)", name):
            for part, of_three in zip("qkv", tensor.chunk(3), strict=True):
                backbone[name.replace("qkv", part)] = of_three.clone()
        else:
            backbone[name.replace("pos_embeder.", "pos_embed.")] = tensor
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        if f"last_layer.{new}" in head:
            head[f"last_layer.{old}"] = head.pop(f"last_layer.{new}")
    return backbone, head


def split_head(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Tensors of a network on another backbone, or of that backbone alone -> backbone and DINO's head."""
    parts: dict[str, Tensors] = {"backbone.": {}, "head.": {}}
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors, {}
    for prefix, part in parts.items():
        part |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return parts["backbone."], parts["head."]


def to_official_names(backbone: Tensors) -> Tensors:
    """The inverse, for official DINO's and XCiT's code."""
    official: Tensors = {}
    for name, tensor in backbone.items():
        part = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)", name)
        if part is None:
            official[name.replace("pos_embed.", "pos_embeder.")] = tensor
        elif part[2] == "q":
            official[f"{part[1]}.qkv.{part[3]}"] = torch.cat(
                [backbone[f"{part[1]}.{p}.{part[3]}"] for p in "qkv"]
            )
    return official


def describe(backbone: Tensors) -> dict[str, Any]:
    """Architecture, channels and ablations, by names and shapes; without `arch` if no architecture of ours has the shapes.

    Raises ValueError if these are not the tensors of an XCiT.
    """
    stem = [name for name in backbone if STEM.fullmatch(name)]
    layers = {int(name.split(".")[1]) for name in backbone if re.match(r"blocks\.\d+\.", name)}
    if (
        "cls_token" not in backbone
        or not stem
        or not layers
        or "cls_attn_blocks.0.attn.q.weight" not in backbone
    ):
        raise UserError(
            f"is not of an XCiT: its {len(backbone)} tensors are {listed(list(backbone))}"
        )
    dim, depth, patch = backbone["cls_token"].shape[-1], max(layers) + 1, 2 ** len(stem)
    temperature = backbone.get("blocks.0.attn.temperature")
    about = {
        "in_chans": backbone[stem[0]].shape[1],
        "xca": "blocks.0.attn.qkv.weight" in backbone,
        "lpi": "blocks.0.local_mp.conv1.weight" in backbone,
    }
    about["learned_temperature"] = temperature is not None or not about["xca"]
    # Whether class attention normalises all tokens shows in no shape: it follows from the name.
    named = [
        short
        for short, a in ARCHITECTURES.items()
        if (a.dim, a.depth) == (dim, depth) and (temperature is None or a.heads == len(temperature))
    ]
    return {"arch": f"{named[0]}_p{patch}", **about} if len(named) == 1 else about


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(names) - LISTED
    return ", ".join(map(str, names[:LISTED])) + (f" and {more} more" if more > 0 else "")
