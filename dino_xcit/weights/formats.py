"""Networks in checkpoints of this toolkit and of others: tensors under our names, and back.

Our names are timm's. A network is recognised by its content: of this toolkit's Lightning module, of
official DINO (the backbone alone, or student and teacher with their heads), of official XCiT
(supervised), and of anyone else who kept timm's names, under any prefix.

Official names differ from timm's in two places: `pos_embeder` for `pos_embed`, and one `qkv` for
class attention's query, key and value (`q`, `k`, `v`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ABLATIONS, ARCHITECTURES, resolve_architecture
from dino_xcit.model.timm_backbone import is_timm
from dino_xcit.run_folder import from_plain
from dino_xcit.weights.networks import chosen, flattened, heads, part, prefixes, without_heads

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dino_xcit.config.pretrain import RunConfig
    from dino_xcit.weights.reading import Tensors

KEPT_OPTIONS = ("in_chans", "mean", "std", "global_crops_size", *ABLATIONS)
# Prefixes of DistributedDataParallel, of torch.compile, and of DINO's multi-crop wrapper.
WRAPPERS = re.compile(r"(module\.|_orig_mod\.|backbone\.)+")
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
    left_behind: list[str] = field(default_factory=list)
    """names of heads that are not DINO's"""


def backbone_metadata(config: RunConfig) -> dict[str, Any]:
    """Return what `build` needs and how images are normalised, as plain values."""
    return {
        "arch": config.arch if is_timm(config.arch) else resolve_architecture(config.arch)[0],
        **{name: getattr(config, name) for name in KEPT_OPTIONS},
    }


# -- networks -------------------------------------------------------------------------------------


def select_network(
    content: Mapping[str, Any],
    metadata: Mapping[str, Any],
    networks: Sequence[str],
    names: Collection[str] = (),
) -> Checkpoint:
    """Return one network of what `read_file` read.

    Args:
        content: of the file.
        metadata: of the file, as `file_metadata` returns it.
        networks: names of networks in order of preference, for files with teacher and student.
        names: of the tensors of the timm network that is looked for; default: an XCiT is.

    Raises:
        UserError: the file holds no such network; the message is what it is instead.
    """
    tensors = flattened(content)
    if not tensors:
        raise UserError(f"holds no network: {listed(list(content)) or 'nothing'} beside 0 tensors")
    found = prefixes(tensors, names)
    if names and not found:  # perhaps an XCiT, whose architecture a message can give
        names, found = (), prefixes(tensors)
    prefix = chosen(tensors, found, networks) if found else ""
    backbone = without_heads(part(tensors, prefix), names)
    head = _head(tensors, prefix)
    described: dict[str, Any] = {}
    if not names:
        backbone, _ = to_our_names(backbone)
        described = describe(backbone)
    return Checkpoint(
        backbone=backbone,
        head=head,
        center=_center(content),
        metadata={**described, **metadata},
        left_behind=[] if head else heads(tensors, found, names),
    )


def file_metadata(content: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a file's network: of our safetensors, or of a run's checkpoint.

    Raises:
        UserError: it is the checkpoint of a run of another version.
    """
    if not ("config" in content and "pytorch-lightning_version" in content):
        return dict(metadata)
    try:
        return backbone_metadata(from_plain(content["config"]))
    except UserError as error:
        raise UserError(f"is a checkpoint of another version: {error}") from None


def _head(tensors: Tensors, prefix: str) -> Tensors:
    """Return DINO's head, which is under the backbone's prefix or beside the backbone."""
    owner = prefix.rstrip(".").rpartition(".")[0]
    for name in (f"{prefix}head.", f"{owner}.head.".lstrip(".")):
        _, head = to_our_names({f"head.{n}": tensor for n, tensor in part(tensors, name).items()})
        if "last_layer.weight_v" in head:
            return head
    return {}


def _center(content: Mapping[str, Any]) -> Tensor | None:
    """Return DINO's center from an official checkpoint, or from ours."""
    for key, name in (("dino_loss", "center"), ("state_dict", "loss.center")):
        part = content.get(key)
        if isinstance(part, Mapping) and isinstance(part.get(name), Tensor):
            center: Tensor = part[name]
            return center
    return None


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
