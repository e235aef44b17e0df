"""The XCiT architectures by name (XCiT, table 1). Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from dino_xcit.errors import UserError

CLASS_ATTENTION_LAYERS = 2
BRANCHES = 3  # residual branches of an XCA layer: XCA, LPI, MLP


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the paper's table 1, with the settings that its code uses for it."""

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
    """class attention normalises all tokens after attending, not the class token alone"""


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
    # Not in the paper: small enough to learn something on two CPU cores in minutes.
    "xcit_pico2": Architecture(
        official="xcit_pico_2", dim=64, depth=2, heads=4, eta=1.0, tokens_norm=True
    ),
}
PATCH_SIZES = (16, 8, 4)
ABLATIONS = ("xca", "lpi", "l2_norm", "learned_temperature")


def architecture_names() -> list[str]:
    """Every short name, such as `xcit_s12_p8`."""
    return [f"{short}_p{patch}" for short in ARCHITECTURES for patch in PATCH_SIZES]


def resolve_architecture(name: str) -> tuple[str, Architecture, int]:
    """A short (`xcit_s12_p8`), official (`xcit_small_12_p8`) or timm name (`xcit_small_12_p8_224.fb_in1k`)
    -> (short name with patch size, architecture, patch size in pixels).

    Raises ValueError with the closest and all valid names if there is none of that name.
    """
    match = re.fullmatch(r"(xcit_\w+?)_p(\d+)(?:_\d+)?(?:_dist)?(?:\.\w+)?", name)
    if match:
        stem, patch = match[1], int(match[2])
        for short, architecture in ARCHITECTURES.items():
            if stem in (short, architecture.official) and patch in PATCH_SIZES:
                return f"{short}_p{patch}", architecture, patch
    official = [f"{a.official}_p{patch}" for a in ARCHITECTURES.values() for patch in PATCH_SIZES]
    closest = difflib.get_close_matches(name, architecture_names() + official, n=1, cutoff=0.0)[0]
    raise UserError(
        f"unknown architecture {name!r}; did you mean --arch {closest}? Valid: {', '.join(architecture_names())} "
        "(official and timm names are accepted too)"
    )


def timm_name(arch: str) -> str | None:
    """The name under which timm builds the same network, or None if timm has none (patch 4, pico)."""
    short, architecture, patch = resolve_architecture(arch)
    return (
        f"{architecture.official}_p{patch}_224"
        if patch != 4 and not short.startswith("xcit_pico")
        else None
    )
