"""The signals that stop a run, how several processes agree to stop, and SLURM's requeue."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from dino_xcit.runtime import gloo_group, say

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SECONDS_FOR_DOUBLES = 1.0  # launchers and schedulers send one signal twice, a moment apart
STOPPED_BY = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for a stop after the current step, once there are steps.

    The same one again, or Ctrl-C, gets the caller's handler, which ends the process at once.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignals]:
        """Until `listen` is called Ctrl-C stops at once. Afterwards the caller's handlers are back.

        Outside the main thread, where Python allows no handlers, nothing listens.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (*STOPPED_BY, signal.SIGCHLD)}
        self._before = before
        signal.signal(signal.SIGINT, self._stop_at_once)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPED_BY:
                signal.signal(number, self._ask)

    def _stop_at_once(self, number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG002
        # What it interrupts may swallow the exception: then the first step is the last.
        self.asked = signal.SIGINT
        raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked is not None:
            again = number in (self.asked, signal.SIGINT)  # SLURM sends SIGTERM after SIGUSR1
            if again and time.monotonic() - self._asked_at > SECONDS_FOR_DOUBLES:
                signal.signal(number, self._before[signal.Signals(number)])
                signal.raise_signal(number)
            return
        self._asked_at = time.monotonic()
        self.asked = signal.Signals(number)
        name = STOPPED_BY[self.asked]
        print(
            f"\n{name}: stopping after this step; {name} again stops at once, without saving",
            file=sys.stderr,
            flush=True,
        )


class StopConsensus:
    """All processes learn at the same step, the next one, what any of them wants.

    By a process group of its own on CPU, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self.group = gloo_group()
        self.pending: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, *wanted: bool) -> list[bool]:
        """Ask for these, and get what was asked for a step earlier (at once with one process)."""
        if self.group is None:
            return list(wanted)
        before = self.settle() or [False] * len(wanted)
        votes = torch.tensor(wanted, dtype=torch.int32)
        work = dist.all_reduce(votes, group=self.group, async_op=True)
        assert work is not None
        self.pending = work, votes
        return before

    def settle(self) -> list[bool] | None:
        """Wait for all processes and get what was last asked for; None if nothing was."""
        if self.pending is None:
            return None
        (work, votes), self.pending = self.pending, None
        work.wait()
        return [bool(vote) for vote in (votes > 0).tolist()]


def requeue() -> bool:
    """Ask SLURM, if this is its job, to start it again, as Lightning's own handler does.

    Returns:
        Whether it will.
    """
    if not SLURMEnvironment.detect():
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"scontrol requeue {job}: {error}")
        return False
    say(f"scontrol requeue {job}: {answer.stderr.strip() or 'done'}")
    return answer.returncode == 0
