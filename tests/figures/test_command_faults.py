"""`attention` from Python: a figure that fails, a new kind of figure, the caller's process."""

from __future__ import annotations

import dataclasses
import random

import matplotlib
import numpy as np
import pytest
import torch
from figure_helpers import files_in_figures
from PIL import Image

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.figures import command
from dino_xcit.figures.drawing import Sheet, as_cell
from dino_xcit.figures.sheets import FIGURES, FigureRow


@pytest.fixture
def overlay_config(here):
    return AttentionConfig(
        images=("photos/wide.png",), weights=("w.safetensors",), figures=("overlay",), dpi=40
    )


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug")], ids=type)
def test_an_error_of_a_figures_own_code_keeps_its_traceback(overlay_config, monkeypatch, error):
    def fail(results, config):
        raise error

    monkeypatch.setitem(FIGURES, "overlay", FigureRow(draw=fail))
    with pytest.raises(type(error), match="a bug"):
        command.attention(overlay_config)


def test_an_error_of_the_backbones_code_keeps_its_traceback(overlay_config, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("dino_xcit.figures.model.attention_maps", fail)
    with pytest.raises(ValueError, match="a bug"):
        command.attention(overlay_config)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError(), "not enough memory; lower --dpi"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB; lower --dpi"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_figure_that_does_not_fit_is_a_problem_and_the_others_are_drawn(
    overlay_config, monkeypatch, error, problem
):
    def fail(results, config):
        raise error

    monkeypatch.setitem(FIGURES, "grid", FigureRow(draw=fail))
    config = dataclasses.replace(overlay_config, figures=("grid", "overlay"))
    (line,) = command.attention(config).problems
    assert line.startswith("grid figure of photos/wide.png: ")
    assert problem in line
    assert "overlay.png" in files_in_figures()


def test_a_width_too_narrow_for_one_figure_is_a_problem(overlay_config):
    config = dataclasses.replace(overlay_config, figures=("grid", "overlay"), width="1")
    row = FIGURES["grid"]
    columns = 9

    def wide(results, config):
        sheet = row.draw(results, config)
        return dataclasses.replace(sheet, rows=[[sheet.rows[0][0]] * columns])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, "grid", dataclasses.replace(row, draw=wide))
        (line,) = command.attention(config).problems
    assert "--width 1 is too narrow for 9 pictures side by side" in line
    assert "overlay.png" in files_in_figures()


def test_a_new_kind_of_figure_is_a_function_and_a_row(overlay_config, monkeypatch):
    calls = []

    def draw(results, config):
        calls.append(results)
        cells = [as_cell(result.image / 255) for result in results]
        return Sheet(name=f"toy_{results[0].name}", rows=[cells])

    monkeypatch.setitem(
        FIGURES, "toy", FigureRow(draw=draw, per_image=True, features=True, xca=True)
    )
    images = ("photos/wide.png", "photos/tall.png")
    command.attention(dataclasses.replace(overlay_config, images=images, figures=("toy",)))
    assert [[result.name for result in results] for results in calls] == [["wide"], ["tall"]]
    assert all(results[0].features is not None for results in calls)
    assert all(results[0].covariance is not None for results in calls)
    assert {"toy_wide.png", "toy_tall.png"} < files_in_figures()


def test_the_callers_process_stays_as_it_was(overlay_config):
    scored = {"masks": "shapes", "num_images": 2, "images": (), "figures": ()}
    config = dataclasses.replace(overlay_config, **scored)
    torch.manual_seed(11)
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
        dict(matplotlib.rcParams),
        Image.MAX_IMAGE_PIXELS,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    command.attention(overlay_config)
    command.attention(config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    after = (
        random.getstate(),
        dict(matplotlib.rcParams),
        Image.MAX_IMAGE_PIXELS,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    assert after == before[2:]
