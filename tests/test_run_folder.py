"""metrics.csv, config.yaml and the names of files in a run folder."""

import csv
import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import TINY

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, METRICS, Metrics, read_config, read_metrics, write_config
from dino_xcit.train.pretrain import pretrain


@pytest.fixture
def tiny_config(tmp_path):
    return dataclasses.replace(TINY, output_dir=str(tmp_path / "run"))


def table(folder):
    with (folder / METRICS).open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CONFIG, "model: resnet"),
        (CONFIG, "arch: xcit_s12_p16\nepochs: 3  # my own recipe"),
        (CONFIG, "- a: [b"),
        (METRICS, "a,b\n1,2\n"),
        (METRICS, "epoch,step,loss\n0,9,1.5\n"),
    ],
)
def test_files_that_no_run_wrote_are_not_overwritten(tiny_config, name, text):
    folder = Path(tiny_config.output_dir)
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"--output_dir .* holds a {name} that no run wrote"):
        pretrain(tiny_config)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: text}


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tiny_config):
    folder = Path(tiny_config.output_dir)
    folder.mkdir()
    write_config(tiny_config, folder)
    Metrics(folder, first_step=0).write({"step": 1, "loss": 0.5})
    assert pretrain(dataclasses.replace(tiny_config, dry_run=True)).step == 0


def test_columns_of_metrics_follow_from_the_rows(tmp_path):
    metrics = Metrics(tmp_path, first_step=0)
    assert read_metrics(tmp_path) == []
    metrics.write({"step": 1, "loss": 0.5})
    metrics.amend({"knn_top1": 50.0})
    metrics.write({"step": 2, "new_term": 0.25, "loss": 0.5})
    assert table(tmp_path) == [
        ["step", "loss", "knn_top1", "new_term"],
        ["1", "0.5", "50.0", ""],
        ["2", "0.5", "", "0.25"],
    ]


def test_a_row_without_a_new_column_is_appended(tmp_path):
    metrics = Metrics(tmp_path, first_step=0)
    metrics.write({"step": 1, "loss": 0.5})
    file = (tmp_path / METRICS).stat().st_ino
    metrics.write({"loss": 0.25, "step": 2})
    assert (tmp_path / METRICS).stat().st_ino == file  # not written anew
    metrics.write({"step": 3, "loss": 0.25, "rankme": 2.0})
    assert (tmp_path / METRICS).stat().st_ino != file
    assert [row["step"] for row in read_metrics(tmp_path)] == ["1", "2", "3"]


def test_a_continued_metrics_file_keeps_the_order_of_its_columns(tmp_path):
    (tmp_path / METRICS).write_text("step,knn_top1,loss\n1,,5.0\n2,9.0,4.0\n3,,3.0\n")
    metrics = Metrics(tmp_path, first_step=2)
    assert [row["step"] for row in metrics.rows] == ["1", "2"]
    metrics.write({"step": 3, "loss": 2.5, "kl": 0.5})
    assert table(tmp_path) == [
        ["step", "knn_top1", "loss", "kl"],
        ["1", "", "5.0", ""],
        ["2", "9.0", "4.0", ""],
        ["3", "", "2.5", "0.5"],
    ]


def test_a_row_cut_off_in_writing_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text("step,loss\n1,5.0\n2")
    assert read_metrics(tmp_path) == [{"step": "1", "loss": "5.0"}]


def test_config_yaml_is_read_back(tmp_path):
    config = RunConfig(epochs=77, mean=(0.5,) * 3, trainer={"profiler": "simple"})
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_options_of_one_start_are_not_in_config_yaml(tmp_path):
    write_config(RunConfig(resume=False, dry_run=True), tmp_path)
    options = yaml.safe_load((tmp_path / CONFIG).read_text())
    assert options.keys() == {f.name for f in dataclasses.fields(RunConfig)} - {
        "resume",
        "extend",
        "dry_run",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1", "holds a list; expected options by their names"),
        ("", "holds a NoneType; expected options by their names"),
        ("ears: 2", "unknown option ears"),
        ("epochs: 0", "--epochs is 0; expected at least 1"),
        ("epochs: many", "'>=' not supported"),
        ("blur_sigma: [1.0]", "not enough values"),
    ],
)
def test_a_config_yaml_of_something_else_is_refused_by_its_path(tmp_path, text, reason):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / CONFIG} is not a config of this version: ")
    assert reason in str(caught.value)
