"""Worker processes of data loaders: how many, which signals they get, what follows a death."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from dino_xcit.data.decode import one_line
from dino_xcit.errors import LoaderError
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.process import BaseProcess

    from torch.utils.data import DataLoader

WORKER_DEATHS = 5  # without an item between them, after which the run ends
SECONDS_TO_DIE = 1.0  # a worker's connections close a moment before it counts as dead
SHARED_MEMORY = (
    "too little shared memory for the batches of the loader workers; give the container more "
    "(docker run --shm-size=8g, or --ipc=host), or load in the main process with --num_workers 0"
)

_running: WeakSet[BaseProcess] = WeakSet()
"""The workers of all restartable loaders, of which some may have ended."""


def restartable(loader_from: Callable[[int], DataLoader[Any]]) -> Iterator[Any]:
    """Iterate a restartable loader; when a worker dies, restart at the next item.

    SIGCHLD has its default action meanwhile: torch's handler would raise a worker's death in the
    middle of whatever the main process is doing. The caller's handler is back at the end.

    Args:
        loader_from: Returns a loader of the items from this number on.

    Raises:
        LoaderError: Workers died more than `WORKER_DEATHS` times without an item between, or there
            is too little shared memory.
    """
    done = deaths = 0
    callers_handler = signal.getsignal(signal.SIGCHLD)
    try:
        while True:
            items: Iterator[Any] = iter(())  # ends the workers that are left of a dead loader
            loader, others = loader_from(done), multiprocessing.active_children()
            workers: list[BaseProcess] = []
            try:
                items = iter(loader)
                workers = [one for one in multiprocessing.active_children() if one not in others]
                _running.update(workers)
                if loader.num_workers:
                    _handle_sigchld(signal.SIG_DFL)  # torch installs its own with the first workers
                for item in items:
                    done, deaths = done + 1, 0
                    yield item
                return
            except (RuntimeError, OSError, EOFError) as error:
                death = _death(workers, loader.num_workers, error)
                if _lacks_shared_memory(workers, error):
                    raise LoaderError(SHARED_MEMORY) from error
                if death is None:
                    raise
                deaths += 1
                if deaths > WORKER_DEATHS:
                    raise LoaderError(
                        f"{deaths} loader workers died one after the other (the last: {death}); "
                        "if the machine is out of memory, lower --num_workers, else look for an "
                        "image that crashes the decoder with --num_workers 0"
                    ) from error
                say(f"{death}; starting others in its place")
            finally:
                end_workers(workers)
    finally:
        _handle_sigchld(callers_handler)


def end_workers(workers: Iterable[BaseProcess] = _running) -> None:
    """Kill these workers, by default all: they ignore a SIGTERM, and the process waits for them.

    A traceback may hold a loader, and with it the workers, until the process ends.
    """
    for worker in list(workers):
        worker.kill()


atexit.register(end_workers)  # runs before multiprocessing waits for its children


def _lacks_shared_memory(workers: list[BaseProcess], error: Exception) -> bool:
    """Whether a batch did not fit: torch's error is a text, or the worker died of a bus error."""
    text = str(error).lower()
    out_of_it = "shared memory" in text and "no space left" in text
    return out_of_it or any(worker.exitcode == -signal.SIGBUS for worker in workers)


def _handle_sigchld(handler: Any) -> None:
    """Set the handler, where that is allowed; None stands for one that Python did not install."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)


def _death(workers: list[BaseProcess], num_workers: int, error: Exception) -> str | None:
    """Say how a worker died, or return None if all of them live, so the error is not its death.

    torch has no type of error for it; a worker that died has an exit code.
    """
    sentinels = [worker.sentinel for worker in workers]
    ended = connection.wait(sentinels, SECONDS_TO_DIE) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # its exit code comes a moment after its end
            code = worker.exitcode or 0
            how = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
            return f"loader worker {worker.pid} died ({how})"
    if len(workers) < num_workers:
        return f"a loader worker died as it started ({one_line(error)})"
    return None


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore Ctrl-C and SIGUSR1, and the first SIGTERM; the main process stops the workers.

    A terminal or a scheduler sends these signals to the whole process group. The second SIGTERM is
    the main process's own, which ends its children with it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def default_workers(processes: int = 1) -> int:
    """Return this process's share of the cores, less one for itself, at most 16.

    Args:
        processes: On this machine. They share the cores, but tasks of SLURM have cores of their own
            with --cpus-per-task.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    has_own = "SLURM_CPUS_PER_TASK" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    if not has_own:
        cores //= processes
    return max(1, min(16, cores - 1))
