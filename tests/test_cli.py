"""What a user types and what the terminal answers."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from dino_xcit.cli import join_lists, main, parse
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.pretrain import PretrainConfig


def config(*arguments: str) -> PretrainConfig:
    return parse("pretrain", PretrainConfig, list(arguments))


def test_help_answers_within_a_second_and_without_torch():
    start = time.perf_counter()
    for arguments in (["--help"], ["pretrain", "--help"]):
        code = (
            "import sys; from dino_xcit.cli import main\n"
            f"try: main({arguments})\nexcept SystemExit: pass\n"
            "assert not {'torch', 'lightning', 'timm', 'numpy'} & set(sys.modules), 'a heavy import'"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert "usage: dino-xcit" in answer.stdout
    assert time.perf_counter() - start < 2


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PretrainConfig):
        assert f"--{field.name} " in text
    assert text.count("(type:") >= len(dataclasses.fields(PretrainConfig))
    assert "peak learning rate for a total batch of 256 images" in text


def test_importing_the_package_imports_no_torch():
    code = "import sys, dino_xcit as d; dir(d); assert 'torch' not in sys.modules; d.XCiT; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_other_trainer_options_are_reachable():
    assert config("--trainer.profiler", "simple").trainer == {"profiler": "simple"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretain"], ["'pretain'", "pretrain"]),
        (["pretrain", "--learning_rat", "1"], ["--learning_rat"]),
        (["pretrain", "--warmup_epoch", "1"], ["--warmup_epoch", "did you mean --warmup_epochs"]),
        (["pretrain", "--lr", "fast"], ["--lr", "float", "fast"]),
        (["pretrain", "--on_bad_image", "skip"], ["--on_bad_image", "replace", "raise", "skip"]),
        (["pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["pretrain", "--arch", "xcit_s12_p9"], ["xcit_s12_p9", "xcit_s12_p8"]),
        (["pretrain", "--global_crops_scale", "0.5"], ["--global_crops_scale", "2 elements"]),
        (
            ["pretrain", "--global_crops_scale", "0.5", "0.2"],
            ["--global_crops_scale", "0 < from <= to <= 1"],
        ),
        (["pretrain", "--in_chans", "1"], ["--mean", "--in_chans 1"]),
        (["pretrain", "--teacher_temp", "0"], ["--teacher_temp", "positive"]),
        (["pretrain", "--data_path", "nowhere"], ["--data_path nowhere", "does not exist"]),
        (
            ["pretrain", "--dataset", "torch/fashion_mist", "--data_path", "."],
            ["torch/fashion_mist", "--data_path .", "Unknown"],
        ),
        (
            ["pretrain", "--num_images", "63", "--devices", "1"],
            ["63 images", "--batch_size_per_gpu"],
        ),
        (
            ["pretrain", "--precision", "bf16-true"],
            ["--precision is 'bf16-true'", "32-true, bf16-mixed"],
        ),
        (["pretrain", "--strategy", "fsdp"], ["--strategy is 'fsdp'", "ddp"]),
        (["pretrain", "--trainer.max_epochs", "3"], ["--trainer.max_epochs"]),
        (["pretrain", "--accelerator", "abacus"], ["--accelerator abacus"]),
        (
            ["pretrain", "--global_crops_size", "100", "--dry_run", "true"],
            ["100", "patch size 16", "96 x 96", "112 x 112"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


def attention(*arguments: str) -> AttentionConfig:
    return parse("attention", AttentionConfig, list(arguments))


def test_images_are_the_words_that_belong_to_no_flag():
    config = attention(
        "a.png",
        "--weights",
        "W",
        "b c.png",
        "--layer",
        "-2",
        "d",
        "--html",
        "e.png",
        "--titles",
        "false",
        "f",
    )
    assert config.images == ("a.png", "b c.png", "d", "e.png", "f")
    assert (config.weights, config.layer, config.html, config.titles) == (("W",), -2, True, False)


def test_lists_before_images_end_where_the_words_are_no_items_of_theirs():
    config = attention(
        "--weights",
        "W",
        "--figures",
        "similarity",
        "pca",
        "a.png",
        "--point",
        "0.5",
        "1e-1",
        "b.png",
        "--format",
        "pdf",
        "c",
        "--dpi",
        "72",
        "d",
    )
    assert config.images == ("a.png", "b.png", "c", "d")
    assert (config.figures, config.point, config.format, config.dpi) == (
        ("similarity", "pca"),
        (0.5, 0.1),
        ("pdf",),
        72,
    )


def test_a_word_list_takes_one_word_a_flag():
    config = attention(
        "--weights",
        "A",
        "a.png",
        "--weights",
        "B",
        "--names",
        "the first",
        "--names=second",
        "b.png",
    )
    assert (config.weights, config.names) == (("A", "B"), ("the first", "second"))
    assert config.images == ("a.png", "b.png")


@pytest.mark.parametrize("words", [["--weights"], ["--weights", "--html"], ["--layer"]])
def test_a_flag_without_its_value_is_an_error(words, capsys):
    assert main(["attention", *words]) == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["epochs:\nseed: 1", "mean: null", "arch: ~"])
def test_an_option_without_a_value_is_told(text, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"dino-xcit pretrain: --{text.split(':')[0]} has no value; leave it out for its default, or give it one\n"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "x0: &x0 [1, 1]\n"
            + "".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40)),
            "more than 1000000",
        ),
        ("mean: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("mean: &a [*a]", "more than 1000000"),
        ("seed: !!int x", "is not readable as YAML: invalid literal"),
        ("seed: !!bool x", "is not readable as YAML: "),
        (
            "arch: !!python/object/apply:os.mkdir [hacked]",
            "could not determine a constructor for the tag",
        ),
        ("arch: \xff", "is not readable as YAML: 'utf-8' codec"),
    ],
)
def test_files_that_are_no_options_are_told_in_a_line(text, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    assert main(["pretrain", "--config", "config.yaml"]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (tmp_path / "hacked").exists()


def test_ctrl_c_while_modules_load_ends_at_once(tmp_path):
    """Raised in the middle of an import, it may be swallowed: here by torch's, made to swallow it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, signal, sys\n"
        "class Swallow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                for _ in range(1000): pass\n"
        "            except KeyboardInterrupt: pass\n"
        "sys.meta_path.insert(0, Swallow())\n"
    )
    command = [
        sys.executable,
        "-m",
        "dino_xcit.cli",
        "export",
        "--weights",
        str(tmp_path / "gone.pth"),
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGINT, run.stderr
    assert run.stderr == ""
