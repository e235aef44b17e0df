"""Rules of options: each raises a UserError that names the flag."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Auto: TypeAlias = Literal["auto"]
AUTO: Final = "auto"
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


class Checks:
    """Rules for the values of one config; `__post_init__` of its class calls them."""

    def __init__(self, config: DataclassInstance) -> None:
        self.config = config

    def __call__(self, condition: bool, flag: str, expected: str) -> None:
        """Raise UserError unless the condition holds."""
        if not condition:
            raise UserError(f"--{flag} is {getattr(self.config, flag)!r}; expected {expected}")

    def at_least(self, least: float, *flags: str) -> None:
        """Each value is `least` or more."""
        for flag in flags:
            expected = f"{least:g} or more" if least <= 0 else f"at least {least:g}"
            self(all(value >= least for value in self._values(flag)), flag, expected)

    def positive(self, *flags: str) -> None:
        """Each value is over 0 and finite."""
        for flag in flags:
            several = isinstance(getattr(self.config, flag), tuple)
            expected = "positive numbers" if several else "a positive number"
            self(all(0 < value < math.inf for value in self._values(flag)), flag, expected)

    def within(self, low: float, high: float, expected: str, *flags: str) -> None:
        """Each value is from `low` to `high`."""
        for flag in flags:
            self(all(low <= value <= high for value in self._values(flag)), flag, expected)

    def range(self, flag: str, highest: float, expected: str) -> None:
        """The value is two numbers over 0, up to `highest`, the smaller one first."""
        for low, high in [values] if (values := self._values(flag)) else []:
            self(0 < low <= high <= highest, flag, expected)

    def precision(self) -> None:
        """`--precision` is one that the commands support."""
        (precision,) = self._values("precision")
        self(precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")

    def columns(self) -> None:
        """Names of columns are given for Hugging Face's sets only."""
        named = (getattr(self.config, "dataset", None) or "").startswith("hfds/")
        for flag in ("input_key", "target_key"):
            self(named or not self._values(flag), flag, "nothing without --dataset hfds/NAME")

    def _values(self, flag: str) -> tuple[Any, ...]:
        """Return the flag's value or values; none if it is None or is still to be resolved."""
        value = getattr(self.config, flag)
        if value is None or (value == AUTO and flag != "precision"):
            return ()
        return value if isinstance(value, tuple) else (value,)


def lists_to_tuples(config: DataclassInstance) -> None:
    """Make every list a tuple, and a single value of an option that takes several a tuple of it.

    Both come from YAML files and from Python callers.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))
        elif (
            str(field.type).startswith("tuple[") and value != AUTO and not isinstance(value, tuple)
        ):
            object.__setattr__(config, field.name, () if value is None else (value,))
        # What may be one word or several, `str | tuple[str, ...]`, is a word where it is one.
        value = getattr(config, field.name)
        if str(field.type).startswith("str | tuple[") and isinstance(value, tuple):
            if not value:
                raise UserError(f"--{field.name} has no value; leave it out, or give it one")
            object.__setattr__(config, field.name, value[0] if len(value) == 1 else value)
