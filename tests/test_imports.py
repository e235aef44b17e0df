"""The public names of the package, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dino_xcit
from dino_xcit.cli import COMMANDS


def test_every_public_name_loads():
    for name in dir(dino_xcit):
        assert getattr(dino_xcit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dino_xcit.nothing  # noqa: B018


def test_no_public_name_is_a_submodules_name():
    """Importing that submodule would replace the public name."""
    folder = Path(dino_xcit.__file__).parent
    submodules = {path.stem for path in folder.iterdir()}
    assert not submodules & {*dir(dino_xcit)} - {"__version__"}


def test_every_command_is_a_public_function():
    functions = [command.replace("-", "_") for command in COMMANDS]
    assert set(functions) <= set(dir(dino_xcit))
    assert [getattr(dino_xcit, name).__name__ for name in functions] == functions


@pytest.mark.slow
def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, dino_xcit\n"
        "dir(dino_xcit); dino_xcit.KnnConfig(weights='W'); dino_xcit.UserError\n"
        "assert not {'torch', 'numpy', 'lightning', 'timm'} & set(sys.modules)\n"
        "dino_xcit.XCiT\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
