"""Command line -> config."""

from __future__ import annotations

import shlex

import pytest

from dino_xcit.cli import main, parse
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.command_line import join_lists
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.files import read_yaml


def config(*arguments: str) -> PretrainConfig:
    return parse("pretrain", PretrainConfig, list(arguments))


@pytest.mark.parametrize("words", [["0.25", "1"], ["[0.25, 1]"], ["[0.25,", "1]"]])
def test_lists_are_typed_as_official_dino_takes_them_and_as_yaml(words):
    assert config("--global_crops_scale", *words, "--lr", "1").global_crops_scale == (0.25, 1.0)


def test_a_switch_needs_no_value():
    assert config("--dry_run", "--compile", "--seed", "3").dry_run is True
    assert config("--seed", "3", "--dry_run").dry_run is True
    assert config("--dry_run", "false", "--compile").compile is True
    assert config("--dry_run", "false").dry_run is False


def test_a_list_ends_at_the_next_flag():
    joined, _ = join_lists(
        ["--mean", "0.1", "0.2", "0.3", "--seed", "3", "--std=[1, 1, 1]"], PretrainConfig
    )
    assert joined == ["--mean=[0.1, 0.2, 0.3]", "--seed", "3", "--std=[1, 1, 1]"]


def test_a_flag_wins_over_the_config_file_and_print_config_shows_the_result(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.25\nseed: 7\nglobal_crops_scale: [0.3, 1.0]\n")
    merged = config("--config", str(file), "--seed", "8")
    assert (merged.lr, merged.seed, merged.global_crops_scale) == (0.25, 8, (0.3, 1.0))
    with pytest.raises(SystemExit):
        config("--config", str(file), "--seed", "8", "--print_config")
    printed = capsys.readouterr().out
    assert "lr: 0.25" in printed
    assert "seed: 8" in printed


def test_numbers_and_paths_of_a_file_are_read_as_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/big/runs")
    file = tmp_path / "c.yaml"
    file.write_text("lr: 5e-4\ndata_path: ~/images\noutput_dir: $RUNS/a\narch: timm:$x\n")
    read = config("--config", str(file))
    assert (read.lr, read.data_path, read.output_dir) == (0.0005, "/home/me/images", "/big/runs/a")
    assert read.arch == "timm:$x"
    assert read_yaml(file)["lr"] == 0.0005


@pytest.mark.parametrize("joined", [False, True])
def test_the_output_folder_of_a_run_s_own_config_is_where_that_file_lies(tmp_path, joined):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    file = tmp_path / "run/config.yaml"
    file.write_text("output_dir: runs/elsewhere\nseed: 3\n")
    words = [f"--config={file}"] if joined else ["--config", str(file)]
    folder = str(tmp_path / "run")
    assert config(*words) == PretrainConfig(output_dir=folder, seed=3, recipe="official")
    assert config(*words, "--output_dir", "other").output_dir == "other"
    copy = tmp_path / "config.yaml"
    copy.write_text(file.read_text())
    assert config("--config", str(copy)).output_dir == "runs/elsewhere"


def test_other_trainer_options_are_reachable():
    assert config("--trainer.profiler", "simple").trainer == {"profiler": "simple"}


def attention(line: str) -> AttentionConfig:
    return parse("attention", AttentionConfig, shlex.split(line))


def test_images_are_the_words_that_belong_to_no_flag():
    config = attention(
        "a.png --weights W 'b c.png' --layer -2 d --html e.png --titles false f -- --g"
    )
    assert config.images == ("a.png", "b c.png", "d", "e.png", "f", "--g")
    assert (config.weights, config.layer, config.html, config.titles) == (("W",), -2, True, False)


def test_a_list_before_images_ends_at_the_first_word_that_is_no_item_of_it():
    config = attention(
        "--weights W --figures similarity pca a.png --point 0.5 1e-1 b --format pdf c --dpi 72 d"
    )
    assert config.images == ("a.png", "b", "c", "d")
    assert config.figures == ("similarity", "pca")
    assert (config.point, config.format, config.dpi) == ((0.5, 0.1), ("pdf",), 72)


def test_a_word_list_takes_one_word_a_flag():
    config = attention("--weights A a.png --weights B --names 'the first' --names=second b.png")
    assert (config.weights, config.names) == (("A", "B"), ("the first", "second"))
    assert config.images == ("a.png", "b.png")


@pytest.mark.parametrize("words", [["--weights"], ["--weights", "--html"], ["--layer"]])
def test_a_flag_without_its_value_is_an_error(words, capsys):
    assert main(["attention", *words]) == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["epochs:\nseed: 1", "mean: null", "arch: ~"])
def test_an_option_without_a_value_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml")]) == 2
    message = capsys.readouterr().err
    name = text.split(":")[0]
    advice = f"--{name} has no value; leave it out for its default, or give it one"
    assert message == f"dino-xcit pretrain: {advice}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mean: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("mean: &a [*a]", "--mean: Expected a float"),
        ("seed: !!int x", "is not readable as YAML: invalid literal"),
        ("seed: !!bool x", "is not readable as YAML: "),
        (
            "arch: !!python/object/apply:os.mkdir [hacked]",
            "could not determine a constructor for the tag",
        ),
        ("arch: \xff", "is not readable as YAML: 'utf-8' codec"),
    ],
)
def test_files_without_options_are_refused_in_one_line(
    text, problem, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    assert main(["pretrain", "--config", "config.yaml"]) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert message.count("\n") == 1
    assert not (tmp_path / "hacked").exists()
