"""What can go wrong: by the user's input, by an image, by the run. Everything else is our own fault.

The command line prints these as one line; any other exception keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that the user can put right.

    The message says what was found, what was expected and which flag to change. Exit code 2.
    """


class ImageError(UserError):
    """An image file that cannot be read, and why."""


class RunFailedError(RuntimeError):
    """A run that cannot go on, although its input was right; the message says what to try.

    Exit code 1.
    """


class NotFiniteError(RunFailedError, FloatingPointError):
    """A loss, gradient, weight or feature that is not a finite number."""
