"""Rules of options: each raises an error that names the flag."""

from __future__ import annotations

from typing import Any

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


class Checks:
    """Raises ValueError, naming the flag, for a value that was not expected."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, condition: bool, flag: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"--{flag} is {getattr(self.config, flag)!r}; expected {expected}")
