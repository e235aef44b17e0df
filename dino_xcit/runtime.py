"""Processes, devices, precision, memory and terminal output of a command."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import tempfile
import timeit
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from dino_xcit.errors import UserError
from dino_xcit.private_names import failing_compilation_raises

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from dino_xcit.config.attention import AttentionConfig
    from dino_xcit.config.evaluation import EvalConfig
    from dino_xcit.config.pretrain import PretrainConfig

    MachineConfig: TypeAlias = EvalConfig | AttentionConfig | PretrainConfig

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)  # of processes for the first one; by default it is 30 minutes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The matmul dtype of each half precision."""


# -- processes and devices ---------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this is the first process on all machines.

    Known before the processes are connected: torchrun, SLURM and Lightning leave it in the
    environment.
    """
    return getattr(rank_zero_only, "rank", 0) == 0


def parse_devices(devices: str) -> int | str:
    """Return `--devices` as Lightning takes it: a count as int, else what was typed."""
    return int(devices) if devices.lstrip("-").isdigit() else devices


def launch(config: EvalConfig) -> Fabric:
    """Start the processes of an evaluation.

    Raises:
        UserError: Lightning refuses the options.
    """
    fabric = _fabric(config, parse_devices(config.devices))
    with quiet_logger("lightning.fabric"):
        fabric.launch()
    return fabric


def device_of(config: MachineConfig) -> torch.device:
    """Return the one device of a command that starts no processes.

    Raises:
        UserError: Lightning refuses the options.
    """
    return _fabric(config, 1).device


def refusal(config: MachineConfig, error: Exception) -> str:
    """Return the message for options that Lightning refuses."""
    names = [name for name in ("accelerator", "devices", "precision") if hasattr(config, name)]
    flags = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    return f"Lightning refuses {flags}: {' '.join(str(error).split())}"


def _fabric(config: MachineConfig, devices: int | str) -> Fabric:
    try:
        with quiet_logger("lightning.fabric"):
            return Fabric(accelerator=config.accelerator, devices=devices)
    except (TypeError, ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise UserError(refusal(config, error)) from error


@contextlib.contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Let this logger print warnings only: Lightning announces devices, processes and tips."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def summed(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on the tensor's device."""
    total = fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.to(tensor.device)


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Connect all processes by a further group on the CPU, where waiting does not stop the device.

    Args:
        timeout: For which one process waits for another; default: torch's.

    Returns:
        None with one process.

    Raises:
        UserError: They cannot connect.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:  # torch has no type of error for it
        raise UserError(
            f"the processes cannot connect on the CPU ({' '.join(str(error).split())}); where a "
            "machine's name resolves to its loopback address, set GLOO_SOCKET_IFNAME to the name "
            "of its network interface, such as eth0 (ip link lists them)"
        ) from error
    assert not isinstance(group, int)  # which stands for "not a member"
    return group


class FromFirstProcess:
    """Hands a value of the first process to all others, which wait for however long it works.

    To be made in all processes before that work begins, and called once.
    """

    def __init__(self) -> None:
        self.group = gloo_group(LONGEST_WAIT)

    def __call__(self, value: T) -> T:
        """Return the first process's value."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        dist.destroy_process_group(self.group)
        return values[0]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; a GPU copies while its earlier work still runs."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def float64_device(fabric: Fabric) -> torch.device:
    """Return the device, or the CPU where the device has no float64."""
    return torch.device("cpu") if fabric.device.type == "mps" else fabric.device


# -- precision and compilation -----------------------------------------------------------------


def resolve_precision(config: MachineConfig) -> str:
    """Return `--precision` with `auto` resolved.

    `auto` is bf16-mixed on GPUs with bfloat16 and on CPUs that multiply it faster than float32,
    else 32-true.
    """
    if config.precision != "auto":
        return config.precision
    if config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = config.accelerator in ("auto", "cpu") and bfloat16_is_faster()
    return "bf16-mixed" if has_bfloat16 else "32-true"


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32, measured.

    Its flags do not tell. Seen with AVX512-BF16: half as fast as float32 (Intel without AMX), up to
    twice as fast (AMD Zen 4), five times as fast (Intel with AMX).
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        torch.mm(a, b)  # the first product of a dtype and size prepares its kernel
        seconds[dtype] = min(timeit.repeat(functools.partial(torch.mm, a, b), number=1, repeat=5))
    return seconds[torch.bfloat16] < seconds[torch.float32]


def why_nothing_compiles(device: torch.device) -> str | None:
    """Try torch.compile on one operation; return its error, or None.

    It fails without a C++ compiler (CPU) or Triton (GPU).
    """
    try:
        # A warning, as of TensorFloat32, is no failure, even where warnings are errors.
        with failing_compilation_raises(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # every backend has its own types
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


# -- memory ------------------------------------------------------------------------------------


def memory_there(device: torch.device) -> int:
    """Return the memory limit in bytes: free GPU memory, or RAM within the cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text().strip() if file.exists() else "max"
    return min(machine, int(limit)) if limit.isdigit() else machine


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones, until the process ends.

    By default it returns every large block to the system, and each 4 KiB of a new block costs a
    page fault: almost half the time with large images (`eval/speed/attention.py`), a tenth of the
    steps of small networks. Memory stays at its peak, also in the loader's processes, which inherit
    it. Does nothing without glibc. For a command's own process only, not for a caller's.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# -- terminal and output folder ----------------------------------------------------------------


@rank_zero_only
def say(message: str) -> None:
    """Print a line to stderr, from the first process only, above any progress bar."""
    if sys.stderr.isatty():
        tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


class _Lines:
    """A file for tqdm that makes a line of each state of a bar, instead of drawing over it."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing waits to be written."""


def progress(total: int, description: str, unit: str, shown: bool, initial: int = 0) -> tqdm:
    """Return a progress bar with rate and remaining time; it is erased when it ends.

    Where stderr is a file, every refresh is a line, so there it refreshes every 30 s only.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not shown,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.1 if terminal else 30,
        delay=0 if terminal else 30,
        leave=False,
    )


def require_folder(path: Path, flag: str) -> None:
    """Check, before long work begins, that files can be written to this folder.

    The folder need not exist; what is made for the check is removed again. Only the first process
    of a machine checks: the others could find folders that it is about to remove.

    Raises:
        UserError: nothing can be written there; the message names the flag.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        problem = "is a file" if path.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(f"--{flag} {path} {problem}; expected a folder to write to") from None
    finally:
        with contextlib.suppress(OSError):  # another process has begun to use it
            for folder in missing:
                folder.rmdir()


def default_cache() -> Path:
    """Return the cache folder without `--cache_dir`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_xcit"
