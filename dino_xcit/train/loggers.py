"""TensorBoard and Weights & Biases beside metrics.csv; a run survives what they cannot write."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from dino_xcit.errors import UserError
from dino_xcit.files import plain
from dino_xcit.run_folder import WANDB_ID
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from dino_xcit.config.pretrain import PretrainConfig, RunConfig


class LenientLogger(Logger):
    """Passes everything to a logger until that cannot write; then reports it, once, and stops.

    Args:
        option: the logger's name in `--logger`.
        inner: Lightning's logger.
    """

    def __init__(self, option: str, inner: Logger) -> None:
        super().__init__()
        self.option, self.inner, self.failed = option, inner, False

    @property
    def name(self) -> str | None:
        """See Lightning's logger."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """See Lightning's logger; of W&B, the id of its run."""
        return self.inner.version

    @property
    def experiment(self) -> Any:
        """See Lightning's logger.

        Raises:
            UserError: W&B refuses to start.
        """
        try:
            return self.inner.experiment  # type: ignore[attr-defined]
        except Exception as error:  # W&B's package, and so its type of error, may be missing
            if not type(error).__module__.startswith("wandb"):
                raise
            raise UserError(
                f"--logger wandb cannot start ({' '.join(str(error).split())}); log in with `wandb "
                "login`, or set the environment variable WANDB_MODE=offline"
            ) from error

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._attempt(lambda: self.inner.log_metrics(metrics, step))

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        self._attempt(lambda: self.inner.log_hyperparams(params))

    @override
    def save(self) -> None:
        self._attempt(self.inner.save)

    @override
    def finalize(self, status: str) -> None:
        self._attempt(lambda: self.inner.finalize(status))

    def _attempt(self, write: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            cause = error.__cause__ or error  # Lightning turns every error of TensorBoard around
            if not isinstance(cause, OSError):
                raise
            self.failed = True
            say(
                f"--logger {self.option} cannot write ({cause.strerror or cause}) and is left out "
                "from here on; the run and its metrics.csv continue"
            )


def make_loggers(config: PretrainConfig) -> list[Logger]:
    """Return the loggers besides metrics.csv. A continued run is the same run of W&B.

    Raises:
        UserError: the logger's package is not installed.
    """
    folder = Path(config.output_dir)
    loggers: list[Logger] = []
    try:
        if "tensorboard" in config.logger:
            from lightning.pytorch.loggers import TensorBoardLogger

            inner: Logger = TensorBoardLogger(folder, name="", version="tensorboard")
            loggers.append(LenientLogger("tensorboard", inner))
        if "wandb" in config.logger:
            from lightning.pytorch.loggers import WandbLogger

            known = folder / WANDB_ID
            run = known.read_text().strip() if known.exists() else secrets.token_hex(4)
            inner = WandbLogger(save_dir=folder, project="dino_xcit", name=folder.name, id=run)
            loggers.append(LenientLogger("wandb", inner))
    except ModuleNotFoundError as error:
        raise UserError(
            f"--logger {' '.join(config.logger)} needs a package that is not installed: {error}"
        ) from error
    return loggers


@rank_zero_only
def describe_run(loggers: list[Logger], config: RunConfig) -> None:
    """Give the loggers the run's options, and keep the id of its run in W&B.

    Raises:
        OSError: the id cannot be written.
    """
    for logger in loggers:
        logger.log_hyperparams(plain(dataclasses.asdict(config)))
        if isinstance(logger, LenientLogger) and logger.option == "wandb":
            (Path(config.output_dir) / WANDB_ID).write_text(f"{logger.version}\n")
