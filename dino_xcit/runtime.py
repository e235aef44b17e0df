"""What a command runs on: its processes, its precision, its line to the terminal."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from dino_xcit.config.evaluation import EvalConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class MachineOptions(Protocol):
    """The options that say what a command runs on."""

    @property
    def accelerator(self) -> str: ...
    @property
    def precision(self) -> str: ...


def is_first_process() -> bool:
    """Of all machines. Known before they have met: from what torchrun, SLURM or Lightning left in the environment."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def say(message: str) -> None:
    """A line on the terminal that leaves the progress bar whole."""
    tqdm.write(message, file=sys.stderr)


def progress(total: int, description: str, unit: str, shown: bool, initial: int = 0) -> Any:
    """A bar with rate and time left, which clears itself away. In a file every refresh is a line, so there it is rare."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    options: dict[str, Any] = {
        "mininterval": seconds,
        "delay": 0 if sys.stderr.isatty() else seconds,
        "leave": False,
    }
    return tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=not shown, **options
    )


def resolve_precision(config: MachineOptions) -> Any:
    """`auto` becomes bf16-mixed on GPUs that have it and on CPUs with AVX512-BF16: there it is up to twice as fast."""
    if config.precision != "auto":
        return config.precision
    if config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    # AVX-512 without its bfloat16 instructions emulates them, slower than float32.
    on_cpu = config.accelerator in ("auto", "cpu")
    multiplies = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16-mixed" if on_cpu and multiplies() else "32-true"


def why_nothing_compiles(device: torch.device) -> str | None:
    """What torch.compile says of something small, if it fails: no C++ compiler, no Triton."""
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # any, since every backend has its own
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def parse_devices(devices: str) -> Any:
    """`--devices` as Lightning takes it: a number, or what was typed."""
    return int(devices) if devices.lstrip("-").isdigit() else devices


def launch(config: EvalConfig) -> Fabric:
    """Start the processes of an evaluation. Raises ValueError if Lightning refuses the options."""
    fabric = _fabric(config, parse_devices(config.devices))
    fabric.launch()
    return fabric


def device_of(config: MachineOptions) -> torch.device:
    """The one device of a command that starts no processes. Raises ValueError if Lightning refuses the options."""
    return _fabric(config, 1).device


def _fabric(config: MachineOptions, devices: Any) -> Fabric:
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # no announcements
    try:
        return Fabric(accelerator=config.accelerator, devices=devices)
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise UserError(refusal(config, error)) from error


def memory_there(device: torch.device) -> int:
    """Bytes that this process may take: of the machine (or what its container is given), or what is free on the GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.exists() else "max"
    return min(there, int(given)) if given.isdigit() else there


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, for the next ones.

    It gives every large block back to the system, and taking it again costs a page fault for each 4 KiB: of large images
    almost half the time (`eval/speed/attention.py`), of small networks' steps a tenth. Memory stays at its peak until the
    process ends, also in the loader's processes that it starts. Elsewhere: nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def float64_device(fabric: Fabric) -> torch.device:
    """The device, or the CPU where the device has no float64."""
    return torch.device("cpu") if fabric.device.type == "mps" else fabric.device


def require_folder(path: Path, flag: str) -> None:
    """Raise ValueError, naming the flag, if nothing can be written to this folder: before the work. Leaves no trace.

    The first process looks for all: others would find the folder that it takes away again.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        found = "is a file" if path.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(f"--{flag} {path} {found}; expected a folder to write to") from None
    finally:
        with contextlib.suppress(OSError):  # in use by now
            for folder in missing:
                folder.rmdir()


def summed(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Sum over all processes, where the tensor is."""
    total: Any = fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum")
    return total.to(tensor.device)


def refusal(config: MachineOptions, error: Exception) -> str:
    """What to say when Lightning cannot run on what was asked for."""
    return (
        f"Lightning refuses --accelerator {config.accelerator} --devices {getattr(config, 'devices', 1)} --precision "
        f"{config.precision}: {' '.join(str(error).split())}"
    )
