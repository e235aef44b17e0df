"""Checkpoint files of this toolkit and of others: tensors under our names, and back.

Our names are timm's. These files are recognised by their content: safetensors; files of torch.save
from this toolkit's Lightning module, from official DINO (the backbone alone, or student and teacher
with their heads), from official XCiT (supervised), and from anyone else who kept timm's names.
Only tensors and plain values are read (`weights_only`), never code.

Official names differ from timm's in two places: `pos_embeder` for `pos_embed`, and one `qkv` for
class attention's query, key and value (`q`, `k`, `v`).
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
NETWORKS = ("teacher", "student")  # in a DINO checkpoint, ours or official
# Prefixes of DistributedDataParallel, of torch.compile, and of DINO's multi-crop wrapper.
WRAPPERS = re.compile(r"(module\.|_orig_mod\.|backbone\.)+")
# Keys under which others keep weights; averaged weights first, as timm.
NESTED = ("model_ema", "state_dict_ema", "model", "state_dict")
# XCiT's stem has a convolution for each halving of the image.
STEM = re.compile(r"patch_embed\.proj\.\d+\.0\.weight")
CLASS_QKV = re.compile(r"cls_attn_blocks\.\d+\.attn\.qkv\.(weight|bias)")
CLASS_Q_K_V = re.compile(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
LISTED = 4  # names in a message


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One network of a file."""

    backbone: Tensors
    """under our names"""
    head: Tensors = field(default_factory=dict)
    """DINO's projection head under the names of `DINOHead`; empty if the file has none"""
    center: Tensor | None = None
    """DINO's center, (1, K), if the file has it"""
    metadata: dict[str, Any]
    """plain values: architecture, channels, ablations; in our own files also the normalisation"""


def backbone_metadata(config: PretrainConfig) -> dict[str, Any]:
    """Return what `build` needs and how images are normalised, as plain values."""
    return {
        "arch": config.arch if is_timm(config.arch) else resolve_architecture(config.arch)[0],
        **{name: getattr(config, name) for name in KEPT_OPTIONS},
    }


# -- files -------------------------------------------------------------------------------------


def read_checkpoint(
    path: Path, networks: Sequence[str] = ("teacher",), arch: str | None = None
) -> Checkpoint:
    """Read one network of a file.

    Args:
        path: the file.
        networks: names of networks in order of preference, for files with teacher and student.
        arch: architecture; default: as the file's metadata or its tensors' shapes give it.

    Raises:
        UserError: the file holds no backbone; the message is what it is instead.
    """
    return select_network(*read_file(path), networks, arch)


def select_network(
    content: Mapping[str, Any],
    metadata: Mapping[str, Any],
    networks: Sequence[str],
    arch: str | None = None,
) -> Checkpoint:
    """Return one network of what `read_file` read; see `read_checkpoint`."""
    tensors = _choose(content, networks)
    if "config" in content and "pytorch-lightning_version" in content:
        try:
            metadata = backbone_metadata(from_plain(content["config"]))
        except UserError as error:
            raise UserError(f"is a checkpoint of another version: {error}") from None
    if is_timm(arch or metadata.get("arch", "")):
        backbone, head = split_head(tensors)
        described: dict[str, Any] = {}
    else:
        backbone, head = to_our_names(tensors)
        described = describe(backbone)
    given = {"arch": arch} if arch else {}
    return Checkpoint(
        backbone=backbone,
        head=head if "last_layer.weight_v" in head else {},
        center=_center(content),
        metadata={**described, **metadata, **given},
    )


def _center(content: Mapping[str, Any]) -> Tensor | None:
    """Return DINO's center from an official checkpoint, or from ours."""
    for key, name in (("dino_loss", "center"), ("state_dict", "loss.center")):
        part = content.get(key)
        if isinstance(part, Mapping) and isinstance(part.get(name), Tensor):
            center: Tensor = part[name]
            return center
    return None


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of tensors.

    Returns:
        Its content, and the metadata of our own safetensors files.

    Raises:
        UserError: it is something else; the message is what.
        OSError: it cannot be read.
    """
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
    return _read_torch(path), {}


def _read_torch(path: Path) -> dict[str, Any]:
    broken = "is cut off, or no file of torch.save or safetensors"
    try:
        # Official DINO keeps its command line beside the tensors, in this class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|Unsupported class|global:?) ([\w.]+)", str(error))
        if code is None:
            raise UserError(broken) from None
        raise UserError(
            f"holds code ({code[1]}), which is never run; save its tensors alone"
        ) from None
    except Exception:  # damaged files raise errors of many types
        raise UserError(broken) from None
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}; expected tensors by their names")
    return dict(content)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("dino_xcit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"is not a readable safetensors file: {error}") from None
    return tensors, metadata if isinstance(metadata, dict) else {}


def write_safetensors(tensors: Tensors, path: Path, about: dict[str, Any]) -> None:
    """Write tensors, with `about` as JSON in the metadata under `dino_xcit`.

    Raises:
        OSError: they cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", "dino_xcit": json.dumps(about)})
    except SafetensorError as error:  # also of a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def _choose(content: Mapping[str, Any], networks: Sequence[str]) -> Tensors:
    """Return the tensors of the first of these networks that the file has, under the file's names.

    A file without teacher and student has one network.
    """
    nested = (content[key] for key in NESTED if isinstance(content.get(key), Mapping))
    outer = next(nested, content)
    of_networks = {
        name: content[name] for name in NETWORKS if isinstance(content.get(name), Mapping)
    }
    for name in NETWORKS:  # in a Lightning module's state dict the networks are prefixes
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): outer[key] for key in outer if key.startswith(prefix)}
        if tensors:
            of_networks[name] = tensors
    if not of_networks:
        return _tensors(outer)
    chosen = next((of_networks[name] for name in networks if name in of_networks), None)
    if chosen is None:
        raise UserError(
            f"has no {networks[0]}, only the {' and '.join(of_networks)}; "
            "name it with --checkpoint_key"
        )
    return _tensors(chosen)


def _tensors(content: Mapping[str, Any]) -> Tensors:
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        count = len(content) - len(others)
        raise UserError(f"holds no network: {listed(others) or 'nothing'} beside {count} tensors")
    return dict(content)


# -- names -------------------------------------------------------------------------------------


def to_our_names(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Rename the tensors of anyone's XCiT.

    Returns:
        The backbone, and the head: DINO's or a classifier.
    """
    backbone: Tensors = {}
    head: Tensors = {}
    for full_name, tensor in tensors.items():
        name = WRAPPERS.sub("", full_name, count=1) if WRAPPERS.match(full_name) else full_name
        if name.startswith("head."):
            head[name.removeprefix("head.")] = tensor
        elif CLASS_QKV.fullmatch(name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                backbone[name.replace("qkv", part)] = third.clone()
        else:
            backbone[name.replace("pos_embeder.", "pos_embed.")] = tensor
    # The new weight norm of torch has other names than the old one.
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        parametrized = f"last_layer.parametrizations.weight.{new}"
        if parametrized in head:
            head[f"last_layer.{old}"] = head.pop(parametrized)
    return backbone, head


def to_official_names(backbone: Tensors) -> Tensors:
    """Rename a backbone's tensors for the code of official DINO and XCiT."""
    official: Tensors = {}
    for name, tensor in backbone.items():
        part = CLASS_Q_K_V.fullmatch(name)
        if part is None:
            official[name.replace("pos_embed.", "pos_embeder.")] = tensor
        elif part[2] == "q":
            parts = [backbone[f"{part[1]}.{letter}.{part[3]}"] for letter in "qkv"]
            official[f"{part[1]}.qkv.{part[3]}"] = torch.cat(parts)
    return official


def split_head(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Split the tensors of a timm network, or of one with DINO's head, into backbone and head."""
    if not any(name.startswith("backbone.") for name in tensors):
        return tensors, {}
    backbone, head = (
        {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
        for part in ("backbone.", "head.")
    )
    return backbone, head


def describe(backbone: Tensors) -> dict[str, Any]:
    """Derive architecture, channels and ablations from names and shapes.

    Returns:
        Metadata; without `arch` if not exactly one of our architectures has these shapes.

    Raises:
        UserError: these are not the tensors of an XCiT.
    """
    stem = [name for name in backbone if STEM.fullmatch(name)]
    layers = {int(name.split(".")[1]) for name in backbone if re.match(r"blocks\.\d+\.", name)}
    has_class_attention = {"cls_token", "cls_attn_blocks.0.attn.q.weight"} <= backbone.keys()
    if not (stem and layers and has_class_attention):
        raise UserError(
            f"is not of an XCiT: its {len(backbone)} tensors are {listed(list(backbone))} "
            "(of a timm network: name it with --arch timm:NAME)"
        )
    dim, depth, patch = backbone["cls_token"].shape[-1], max(layers) + 1, 2 ** len(stem)
    temperature = backbone.get("blocks.0.attn.temperature")
    has_xca = "blocks.0.attn.qkv.weight" in backbone
    about = {
        "in_chans": backbone[stem[0]].shape[1],
        "xca": has_xca,
        "lpi": "blocks.0.local_mp.conv1.weight" in backbone,
        "learned_temperature": temperature is not None or not has_xca,
    }
    # No shape shows whether class attention normalises all tokens; it follows from the name.
    named = [
        short
        for short, a in ARCHITECTURES.items()
        if (a.dim, a.depth) == (dim, depth) and (temperature is None or a.heads == len(temperature))
    ]
    return {"arch": f"{named[0]}_p{patch}", **about} if len(named) == 1 else about


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(map(str, names[:LISTED])) + (f" and {more} more" if more > 0 else "")
