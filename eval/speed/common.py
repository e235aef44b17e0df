"""What the benchmarks share: the description of command and machine, and the memory peak."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def circumstances() -> dict[str, Any]:
    """Return command, machine and versions; absolute paths are shortened to their last name."""
    words = [Path(word).name.upper() if word.startswith("/") else word for word in sys.argv]
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(["python", *words]),
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def peak(device: torch.device) -> int:
    """Return peak bytes so far: the resident size on a CPU, what torch allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
