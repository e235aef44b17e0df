"""What a saved head needs of the images and weights that it is applied to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dino_xcit.config.evaluation import EvalConfig
from dino_xcit.errors import UserError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Config = TypeVar("Config", bound=EvalConfig)


def with_sizes(config: Config, about: Mapping[str, Any], flag: str) -> Config:
    """The config with the sizes that the head was trained at.

    Args:
        config: Options as typed.
        about: The metadata of the head's file.
        flag: That named the head, for the error.

    Raises:
        UserError: Another size is named.
    """
    for name in ("image_size", "resize_size"):
        named, trained = getattr(config, name), about[name]
        if named and trained and named != trained:
            raise UserError(f"{flag} was trained at --{name} {trained}, not {named}")
    return dataclasses.replace(
        config,
        image_size=config.image_size or about["image_size"],
        resize_size=config.resize_size or about["resize_size"],
    )


def require_channels(expected: int, channels: int, flag: str) -> None:
    """Raise UserError if the head of this flag takes features of other channels."""
    if channels != expected:
        raise UserError(f"{flag} takes features of {expected} channels, these have {channels}")


def as_numbered(
    head_names: Mapping[int, str], names: Mapping[int, str], labels: Tensor, flag: str
) -> Tensor:
    """Labels of images, numbered as a head's classes of the same names.

    Args:
        head_names: Names of the head's classes, by number.
        names: Names of the images' classes, by label; those that occur may be some of the head's.
        labels: Of the images, (m,).
        flag: That named the head, for the error.

    Raises:
        UserError: The head lacks classes of the images, or only one of both has names.
    """
    numbers = {name: number for number, name in head_names.items()}
    present = {label: names.get(label) for label in labels.unique().tolist()} if names else {}
    if not set(present.values()) <= set(numbers) or bool(names) != bool(numbers):
        raise UserError(
            f"{flag} has the classes {_first_names(head_names)}; "
            f"the images have {_first_names(names)}"
        )
    if not names:
        return labels
    if len(present) < len(numbers):
        say(f"the images are of {len(present)} of the {len(numbers)} classes of {flag}")
    number_of = torch.zeros(max(present) + 1, dtype=torch.int64)
    for label, name in present.items():
        assert name is not None
        number_of[label] = numbers[name]
    return number_of[labels]


def _first_names(names: Mapping[int, str]) -> str:
    """`cat, cow, dog, ... (10)`."""
    shown = [names[label] for label in sorted(names)[:3]]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"
