"""DINO pretraining of XCiT backbones, their evaluation and their attention maps.

Importing the package imports no torch: each public name is loaded when it is first used. The function behind a command is in
the room of its name: `from dino_xcit.pretrain import pretrain`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "XCiT": "model.xcit",
    "DINOHead": "model.dino",
    "DINOLoss": "model.dino",
    "PretrainConfig": "config.pretrain",
    "KnnConfig": "config.evaluation",
    "LinearConfig": "config.evaluation",
    "SegConfig": "config.evaluation",
    "AttentionConfig": "config.attention",
    "ExportConfig": "config.export",
    "load_backbone": "weights.load",
    "class_attention": "figures.maps",
    "knn_classify": "evaluate.knn",
}
__all__ = [*_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
