"""DINO pretraining of XCiT backbones, their evaluation and their attention maps.

Each command is also a function of its name: `dino_xcit.pretrain`, `dino_xcit.knn_eval`,
`dino_xcit.linear_eval`, `dino_xcit.seg_eval`, `dino_xcit.embed`, `dino_xcit.attention`,
`dino_xcit.export`. It takes the command's config, or its options as keywords. Importing the package
does not import torch: each public name is loaded when it is first used.
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
    "UserError": "errors",
    "load_backbone": "weights.load",
    "preprocess": "weights.preprocess",
    "class_attention": "figures.maps",
    "knn_classify": "evaluate.knn",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_") and name in _of_commands():
        return _of_commands()[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_of_commands()])


def _of_commands() -> dict[str, Callable[[], Any]]:
    """What each row of `cli.COMMANDS` adds to the package: its function and its config, by name."""
    from dino_xcit.cli import COMMANDS

    functions = {name.replace("-", "_"): functools.partial(_function, name) for name in COMMANDS}
    configs = {
        row.config.__name__: functools.partial(_config, name) for name, row in COMMANDS.items()
    }
    return {**functions, **configs}


@functools.cache
def _function(command: str) -> Callable[..., Any]:
    """The command's function, which also takes the config's fields as keywords."""
    from dino_xcit.cli import COMMANDS, load_function, with_options

    row = COMMANDS[command]
    return with_options(load_function(row), row.config)


def _config(command: str) -> type:
    from dino_xcit.cli import COMMANDS

    return COMMANDS[command].config
