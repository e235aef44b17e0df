"""The panels of curves.png follow from the columns of metrics.csv."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from dino_xcit.train.plots import draw_crops, draw_curves


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved during the test."""
    saved = []
    save = Figure.savefig

    def savefig(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def curves(folder, figures, text):
    """Title of each panel of the curves of this metrics.csv -> its points."""
    (folder / "metrics.csv").write_text(text)
    draw_curves(folder)
    assert (folder / "curves.png").stat().st_size
    return {
        axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in figures[-1].get_axes()
    }


def test_each_numeric_column_with_a_value_has_a_panel(tmp_path, figures):
    text = "step,epoch,loss,knn_top1,rankme,note\n1,0,2.5,,,first\n2,0,2.25,40.0,,\n"
    assert curves(tmp_path, figures, text) == {
        "loss, nats": [[1, 2.5], [2, 2.25]],
        "k-NN top-1, %": [[2, 40]],
    }


@pytest.mark.slow
def test_the_scalar_of_a_new_loss_term_has_a_panel_under_its_own_name(tmp_path, figures):
    names = [f"term_{i}" for i in range(6)]
    text = f"step,epoch,{','.join(names)}\n" + "3,0" + ",1.5" * 6 + "\n"
    assert curves(tmp_path, figures, text) == {name: [[3, 1.5]] for name in names}


def test_a_metrics_file_without_rows_draws_nothing(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n")
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_of_any_number_of_channels_and_any_name_are_drawn(tmp_path, figures, channels):

    picture = np.full((4, 4, channels), 0.5)
    draw_crops(tmp_path, [("a$_b\udcff.png", [picture, picture])], ["image", "global 1"])
    assert [axes.get_title() for axes in figures[-1].get_axes()] == ["image", "global 1"]
