"""Errors of the user's input, of an image file and of a run. Every other exception is a bug.

The command line prints these as one line; any other exception keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that the user can put right.

    The message gives what was found, what was expected and which flag to change. Exit code 2.
    """


class ImageError(UserError):
    """An image file that cannot be read; the message gives the reason."""


class LoaderError(UserError):
    """Input that one process of several cannot load; each process that meets it prints it."""


class RunFailedError(RuntimeError):
    """A run that cannot continue although its input was valid; the message gives what to try.

    Exit code 1.
    """


class NotFiniteError(RunFailedError, FloatingPointError):
    """A loss, gradient, weight or feature that is not a finite number."""
