"""DINO pretraining of XCiT backbones, their evaluation and their attention maps.

Each command is also a function of its name: `dino_xcit.pretrain`, `dino_xcit.knn_eval`, ... It
takes the command's config, or its options as keywords. Importing the package imports no torch:
each public name is loaded when it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

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
    if name in _commands():
        return _function(name.replace("_", "-"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_commands()])


def _commands() -> list[str]:
    from dino_xcit.cli import COMMANDS

    return [command.replace("-", "_") for command in COMMANDS]


def _function(name: str) -> Any:
    """The function of a command, which also takes the fields of its config as keywords."""
    from dino_xcit.cli import COMMANDS, load_function

    command = COMMANDS[name]
    fields = {field.name for field in dataclasses.fields(command.config)}
    function = load_function(command)

    @functools.wraps(function)
    def call(config: Any = None, /, **options: Any) -> Any:
        named = {key: value for key, value in options.items() if key in fields}
        others = {key: value for key, value in options.items() if key not in fields}
        if config is None:
            config = command.config(**named)
        elif named:
            raise TypeError(
                f"{name}: either a config or its options as keywords ({', '.join(named)})"
            )
        return function(config, **others)

    return call
