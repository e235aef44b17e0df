"""The models, the framing and the folder of one call of `dino-xcit attention`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dino_xcit.figures.drawing import Sheet, inches, write
from dino_xcit.figures.framing import Framing
from dino_xcit.figures.head_files import PictureFolder
from dino_xcit.figures.model import AttentionModel, open_checkpoints, open_models
from dino_xcit.figures.sheets import (
    DEFAULT_FIGURES,
    DEFAULT_FIGURES_OF_SEVERAL_WEIGHTS,
    FIGURES,
    FigureRow,
)
from dino_xcit.runtime import device_of, require_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.attention import AttentionConfig, FigureKind


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all parts of the command work with."""

    config: AttentionConfig
    kinds: Sequence[FigureKind]
    """figures to draw"""
    models: list[AttentionModel]
    """one for each of `--weights`"""
    checkpoints: list[AttentionModel]
    """of the run, if a figure needs them"""
    framing: Framing
    """for all of the models, checkpoints too"""
    folder: Path
    """of the figures"""

    @property
    def rows(self) -> dict[FigureKind, FigureRow]:
        """Rows of the figures to draw."""
        return {kind: FIGURES[kind] for kind in self.kinds}

    def write(self, figure: Sheet | PictureFolder) -> None:
        """Write a sheet as `--format`, `--width`, `--titles` and `--dpi` ask, or PNG files.

        Raises:
            UserError: `--width` is too narrow for its columns.
        """
        if isinstance(figure, PictureFolder):
            figure.write(self.folder)
            return
        config = self.config
        width = inches(config.width)
        write(figure, self.folder, config.format, width=width, titles=config.titles, dpi=config.dpi)


def open_setup(config: AttentionConfig) -> Setup:
    """Check the options that name files, folders and layers, and load the weights.

    Raises:
        UserError: one of them cannot be used.
    """
    inches(config.width)
    folder = Path(config.output_dir)
    require_folder(folder, "output_dir")
    device = device_of(config)
    models = open_models(config, device)
    kinds = config.figures or _default_figures(config)
    of_run = any(FIGURES[kind].models == "checkpoints" for kind in kinds)
    checkpoints = open_checkpoints(config, device) if of_run else []
    return Setup(
        config=config,
        kinds=kinds,
        models=models,
        checkpoints=checkpoints,
        framing=Framing.of([*models, *checkpoints], config.fit),
        folder=folder,
    )


def _default_figures(config: AttentionConfig) -> tuple[FigureKind, ...]:
    if len(config.weights) > 1:
        return DEFAULT_FIGURES_OF_SEVERAL_WEIGHTS
    return () if config.masks else DEFAULT_FIGURES
