"""Find a backbone in the checkpoint of any trainer.

Trainers keep a backbone under prefixes of their own (`model.`, `student_backbone.`,
`backbone.teacher.`, ...) and in dicts under any key. Here a checkpoint is one dict of tensors by
dotted names, and a prefix is whatever stands before the names of a backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dino_xcit.weights.reading import Tensors

# What DistributedDataParallel, torch.compile and FSDP put into names.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
COUNTER = "num_batches_tracked"  # of batch norms, which nothing reads and old files lack
# A name that every XCiT has, ours or official, and the first parts of all its names.
XCIT_NAME = "cls_attn_blocks.0.norm1.weight"
XCIT_PARTS = frozenset(
    ("patch_embed", "pos_embed", "pos_embeder", "cls_token", "blocks", "cls_attn_blocks", "norm")
)
# Part of a name that belongs to a head or a counter, which a backbone does not need.
HEAD = re.compile(r"head|project|predict|classif|prototype|^fc$|^n_averaged$")
ROLE = re.compile(
    r"(?P<teacher>teacher|momentum|(?<![^._])(?:ema|target|k)(?![^._]))|(?P<student>student|online)"
)


def flattened(content: Mapping[str, Any], prefix: str = "") -> Tensors:
    """Return all tensors of nested dicts by their dotted names, without the parts of wrappers."""
    tensors: Tensors = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[WRAPPERS.sub("", name)] = value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            tensors[WRAPPERS.sub("", name)] = torch.from_numpy(value)
        elif isinstance(value, Mapping):
            tensors.update(flattened(value, f"{name}."))
    return tensors


def prefixes(tensors: Tensors, names: Collection[str] = ()) -> list[str]:
    """Return the prefixes under which backbones are; incomplete ones if there are no others.

    Args:
        tensors: as `flattened` returns them.
        names: the names of the backbone's tensors; default: of an XCiT.
    """
    anchor = next(iter(names), XCIT_NAME)
    found = [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]
    needed = [name for name in names if not name.endswith(COUNTER)]
    return [p for p in found if all(p + name in tensors for name in needed)] or found


def chosen(tensors: Tensors, found: Sequence[str], networks: Sequence[str]) -> str:
    """Return the prefix of the first of these networks, `teacher` or `student`, that there is.

    A prefix contains the name of its network, or one of its usual names (momentum, ema; online). A
    backbone without such a name is the student of a teacher that has one.

    Raises:
        UserError: none is of these networks, or several different ones are.
    """
    roles = {prefix: _role(prefix) for prefix in found}
    known = [role for role in ("teacher", "student") if role in roles.values()]
    if known == ["teacher"] and None in roles.values():
        known.append("student")
        roles = {prefix: role or "student" for prefix, role in roles.items()}
    role = next((network for network in networks if network in known), None)
    if known and role is None:
        raise UserError(
            f"has no {networks[0]}, only the {' and '.join(known)}; name it with --checkpoint_key"
        )
    first, *others = (prefix for prefix in found if roles[prefix] == role)
    for other in others:
        if not _equal(part(tensors, first), part(tensors, other)):
            raise UserError(
                f"holds different networks under the names {first or '(no prefix)'} and "
                f"{other or '(no prefix)'}; save one of them alone"
            )
    return first


def part(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def without_heads(backbone: Tensors, names: Collection[str] = ()) -> Tensors:
    """Return the tensors under a backbone's prefix without heads; see `prefixes` for the names."""
    parts = {name.split(".")[0] for name in names} or XCIT_PARTS
    return {
        name: tensor
        for name, tensor in backbone.items()
        if name.split(".")[0] in parts or not HEAD.search(name.split(".")[0])
    }


def heads(tensors: Tensors, found: Sequence[str], names: Collection[str] = ()) -> list[str]:
    """Return the names of the heads in a checkpoint, up to the part that shows them to be heads."""
    parts = {name.split(".")[0] for name in names} or XCIT_PARTS
    named: dict[str, None] = {}
    for name in tensors:
        if any(name.removeprefix(p).split(".")[0] in parts for p in found if name.startswith(p)):
            continue
        split = name.split(".")
        head = next((i for i, part_ in enumerate(split) if HEAD.search(part_)), None)
        if head is not None:
            named[".".join(split[: head + 1])] = None
    return list(named)


def _role(prefix: str) -> str | None:
    """Return `teacher`, `student` or None: the last name of a network in the prefix counts."""
    roles = [match.lastgroup for match in ROLE.finditer(prefix.lower())]
    return roles[-1] if roles else None


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
