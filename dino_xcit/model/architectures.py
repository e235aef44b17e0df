"""The XCiT architectures by name (arXiv:2106.09681, table 1). Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from dino_xcit.errors import UserError

CLASS_ATTENTION_LAYERS = 2
BRANCHES = 3
"""residual branches of an XCA layer: XCA, LPI, MLP"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the paper's table 1, with the settings of the official code for it."""

    official: str
    """name in the official code, without the patch size"""
    dim: int
    """channels C"""
    depth: int
    """number of XCA layers"""
    heads: int
    """heads of XCA and of class attention"""
    eta: float
    """initial value of LayerScale"""
    tokens_norm: bool
    """whether a class-attention layer normalises the patch tokens too after attending"""


ARCHITECTURES = {
    "xcit_n12": Architecture(
        official="xcit_nano_12", dim=128, depth=12, heads=4, eta=1.0, tokens_norm=False
    ),
    "xcit_t12": Architecture(
        official="xcit_tiny_12", dim=192, depth=12, heads=4, eta=1.0, tokens_norm=True
    ),
    "xcit_t24": Architecture(
        official="xcit_tiny_24", dim=192, depth=24, heads=4, eta=1e-5, tokens_norm=True
    ),
    "xcit_s12": Architecture(
        official="xcit_small_12", dim=384, depth=12, heads=8, eta=1.0, tokens_norm=True
    ),
    "xcit_s24": Architecture(
        official="xcit_small_24", dim=384, depth=24, heads=8, eta=1e-5, tokens_norm=True
    ),
    "xcit_m24": Architecture(
        official="xcit_medium_24", dim=512, depth=24, heads=8, eta=1e-5, tokens_norm=True
    ),
    "xcit_l24": Architecture(
        official="xcit_large_24", dim=768, depth=24, heads=16, eta=1e-5, tokens_norm=True
    ),
    # Not in the paper: small enough to train on two CPU cores in minutes and in hours.
    "xcit_pico2": Architecture(
        official="xcit_pico_2", dim=64, depth=2, heads=4, eta=1.0, tokens_norm=True
    ),
    "xcit_n3": Architecture(
        official="xcit_nano_3", dim=128, depth=3, heads=4, eta=1.0, tokens_norm=True
    ),
}
OURS = ("xcit_pico2", "xcit_n3")
"""architectures that are not in the paper"""
PATCH_SIZES = (16, 8, 4)
ABLATIONS = ("xca", "lpi", "l2_norm", "learned_temperature")
"""switches of `XCiT`, which are options too (table 4)"""


def architecture_names() -> list[str]:
    """Every short name, such as `xcit_s12_p8`."""
    return [f"{short}_p{patch}" for short in ARCHITECTURES for patch in PATCH_SIZES]


def resolve_architecture(name: str) -> tuple[str, Architecture, int]:
    """Look an architecture up by any of its names.

    Args:
        name: short (`xcit_s12_p8`), official (`xcit_small_12_p8`) or timm's
            (`xcit_small_12_p8_224.fb_in1k`), with or without `timm:` before it.

    Returns:
        The short name with the patch size, the architecture and the patch size in pixels.

    Raises:
        UserError: there is none; the message lists the closest and all valid names.
    """
    match = re.fullmatch(r"(?:timm:)?(xcit_\w+?)_p(\d+)(?:_\d+)?(?:_dist)?(?:\.\w+)?", name)
    if match:
        stem, patch = match[1], int(match[2])
        for short, architecture in ARCHITECTURES.items():
            if stem in (short, architecture.official) and patch in PATCH_SIZES:
                return f"{short}_p{patch}", architecture, patch
    valid = architecture_names()
    official = [f"{a.official}_p{patch}" for a in ARCHITECTURES.values() for patch in PATCH_SIZES]
    closest = difflib.get_close_matches(name, valid + official, n=1, cutoff=0.0)[0]
    raise UserError(
        f"unknown architecture {name!r}; did you mean --arch {closest}? Valid: {', '.join(valid)} "
        "(official and timm names are accepted too; timm:NAME is any other network of timm)"
    )


def timm_name(arch: str) -> str | None:
    """Name of the same network in timm, or None if timm has none (patch size 4, `OURS`)."""
    short, architecture, patch = resolve_architecture(arch)
    if patch == 4 or short.removesuffix(f"_p{patch}") in OURS:
        return None
    return f"{architecture.official}_p{patch}_224"
