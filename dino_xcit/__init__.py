"""DINO pretraining of XCiT backbones, their evaluation and their attention maps.

Each command is also a function of its name: `dino_xcit.pretrain`, `dino_xcit.knn_eval`,
`dino_xcit.linear_eval`, `dino_xcit.seg_eval`, `dino_xcit.attention`, `dino_xcit.export`. It takes
the command's config, or its options as keywords. Importing the package does not import torch: each
public name is loaded when it is first used.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__version__ = "0.1.0"

_MODULES = {
    "XCiT": "model.xcit",
    "DINOHead": "model.dino",
    "DINOLoss": "model.dino",
    "PretrainConfig": "config.pretrain",
    "KnnConfig": "config.evaluation",
    "LinearConfig": "config.evaluation",
    "SegConfig": "config.evaluation",
    "AttentionConfig": "config.attention",
    "ExportConfig": "config.export",
    "UserError": "errors",
    "load_backbone": "weights.load",
    "class_attention": "figures.maps",
    "knn_classify": "evaluate.knn",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_") and name in _functions():
        return _function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_functions()])


def _functions() -> list[str]:
    """Names of the commands' functions, of which `cli.COMMANDS` is the only list."""
    from dino_xcit.cli import COMMANDS

    return [command.replace("-", "_") for command in COMMANDS]


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    """Return the function of a command, which also takes the config's fields as keywords."""
    from dino_xcit.cli import COMMANDS, load_function, with_options

    command = COMMANDS[name.replace("_", "-")]
    return with_options(load_function(command), command.config)
