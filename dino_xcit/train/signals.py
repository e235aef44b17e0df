"""The signals that stop a run, and how several processes agree to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

from dino_xcit.runtime import say

if TYPE_CHECKING:
    from collections.abc import Iterator

STOPPED_BY = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


# -- signals ---------------------------------------------------------------------------------------------------------


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for a stop after the step instead of breaking into it, once there are steps."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Ctrl-C stops at once until `listen` is called."""
        before = {number: signal.getsignal(number) for number in STOPPED_BY}
        signal.signal(signal.SIGINT, self._at_once)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        for number in STOPPED_BY:
            signal.signal(number, self._on_signal)

    def _at_once(self, number: int, frame: Any) -> None:
        self.asked = (
            signal.SIGINT
        )  # the exception may be swallowed by what it breaks into: then the first step is the last
        raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.asked is not None:  # asked twice: at once
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = signal.Signals(number)
            again = (
                "; Ctrl-C again stops at once, without saving" if number == signal.SIGINT else ""
            )
            print(
                f"\n{STOPPED_BY[self.asked]}: stopping at the next chance{again}",
                file=sys.stderr,
                flush=True,
            )


class StopConsensus:
    """Processes tell each other what they want, and all learn it at the same step, the next one.

    By a group of its own on CPU, so that no step waits for the device.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, *wanted: bool) -> list[bool]:
        if self.group is None:
            return list(wanted)
        before = self.settle() or [False] * len(wanted)
        votes = torch.tensor(wanted, dtype=torch.int32)
        self.pending = dist.all_reduce(votes, group=self.group, async_op=True), votes
        return before

    def settle(self) -> list[bool] | None:
        """What was last asked, once all have answered."""
        if self.pending is None:
            return None
        (work, votes), self.pending = self.pending, None
        work.wait()
        return (votes > 0).tolist()


def requeue() -> bool:
    """Ask SLURM, if this is its job, to start it again, as Lightning's own handler does -> whether it will."""
    if not SLURMEnvironment.detect():
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        asked = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
    except OSError as error:
        say(f"scontrol requeue {job}: {error}")
        return False
    say(f"scontrol requeue {job}: {asked.stderr.strip() or 'done'}")
    return asked.returncode == 0
