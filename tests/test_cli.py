"""Help, errors, exit codes and side effects of the command line, and its functions for Python."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import dino_xcit
from dino_xcit import cli
from dino_xcit.cli import COMMANDS, main
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.errors import NotFiniteError, RunFailedError, UserError

MODULE = [sys.executable, "-m", "dino_xcit.cli"]
NEEDED = {name: [] if name == "pretrain" else ["--weights", "W"] for name in COMMANDS}


@pytest.fixture
def function(monkeypatch):
    """Replace the function of every command."""

    def replace(new):
        monkeypatch.setattr(cli, "load_function", lambda command: new)

    return replace


def raises(error):
    def function(config):
        raise error

    return function


# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
@pytest.mark.slow
def test_help_imports_nothing_slow(arguments):
    code = (
        "import sys; from dino_xcit.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'timm', 'numpy'} & set(sys.modules), 'a slow import'"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "usage: dino-xcit" in answer.stdout
    assert "--debug shows the traceback of every error" in answer.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(COMMANDS[name].config)
    for field in fields:
        assert f"--{field.name} " in text
    assert text.count("(type:") >= len(fields)  # each has its help and its type


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 128 + signal.SIGPIPE),
        (["pretrain", "--help"], 0),  # argparse ignores it
    ],
)
def test_a_reader_of_stdout_that_is_gone_ends_the_command_quietly(arguments, code):
    process = subprocess.Popen(
        [*MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == code


# -- errors and exit codes ---------------------------------------------------------------------


def numpys_error() -> ValueError:
    with pytest.raises(ValueError, match="broadcast") as caught:
        np.zeros(2) + np.zeros(3)
    return caught.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("--lr is -1; expected 0 or more"), 2),
        (FileNotFoundError(2, "No such file or directory", "gone.png"), 2),
        (RunFailedError("the loss is not finite; try a lower --lr"), 1),
        (NotFiniteError("the loss is not finite; try a lower --lr"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_expected_error_is_one_line(error, code, function, capsys):
    function(raises(error))
    assert main(["export", "--weights", "W"]) == code
    assert capsys.readouterr().err == f"dino-xcit export: {error}\n"


@pytest.mark.parametrize(
    "error",
    [
        numpys_error(),
        RuntimeError("size mismatch"),
        KeyError("name"),
        OSError("no file"),
        BrokenPipeError(32, "Broken pipe"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_other_error_is_a_fault_with_its_traceback(error, function, capsys):
    function(raises(error))
    assert main(["export", "--weights", "W"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == f"dino-xcit export: {cli.FAULT}"


@pytest.mark.parametrize("name", COMMANDS)
def test_debug_shows_the_traceback_of_every_error(name, function, capsys):
    function(raises(UserError("--lr is -1")))
    assert main([name, *NEEDED[name], "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == f"dino-xcit {name}: --lr is -1"
    assert main([name, "--no_such_option", "1", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_only_the_first_process_prints_a_users_error(function, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    function(raises(UserError("--lr is -1")))
    assert main(["export", "--weights", "W"]) == 2
    assert capsys.readouterr().err == ""
    function(raises(RunFailedError("this process failed")))
    assert main(["export", "--weights", "W"]) == 1
    assert "this process failed" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_tells_which_commands_continue(name, function, capsys):
    function(raises(KeyboardInterrupt()))
    assert main([name, *NEEDED[name]]) == 130
    message = capsys.readouterr().err
    assert f"dino-xcit {name}: stopped" in message
    assert ("the same command continues from there" in message) == COMMANDS[name].resumes


def test_the_exit_code_is_what_the_function_returns(function):
    @dataclasses.dataclass
    class Outcome:
        exit_code: int = 143

    function(lambda config: Outcome())
    assert main(["pretrain"]) == 143
    function(lambda config: {"results": []})
    assert main(["pretrain"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretain"], ["unknown command 'pretain'", "did you mean pretrain", "knn-eval"]),
        (["knn"], ["did you mean knn-eval"]),
    ],
)
def test_an_unknown_command_names_the_closest(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--learning_rat", "1"], ["--learning_rat"]),
        (["pretrain", "--warmup_epoch", "1"], ["--warmup_epoch", "did you mean --warmup_epochs"]),
        (["pretrain", "--lr", "fast"], ["--lr is fast", "a number or auto"]),
        (["pretrain", "--on_bad_image", "skip"], ["--on_bad_image", "replace", "raise", "skip"]),
        (["pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["pretrain", "--arch", "xcit_s12_p9"], ["xcit_s12_p9", "xcit_s12_p8"]),
        (
            ["pretrain", "--global_crops_scale", "0.5"],
            ["2 numbers or auto"],
        ),
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
            ["pretrain", "--num_images", "63", "--devices", "1", "--recipe", "official"],
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
            ["pretrain", "--global_crops_size", "100", "--dry_run", "--recipe", "official"],
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


@pytest.mark.slow
def test_ctrl_c_while_modules_load_ends_at_once(tmp_path):
    """An import may swallow KeyboardInterrupt; here torch's is made to swallow it."""
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


# -- the caller's process ----------------------------------------------------------------------


@pytest.mark.parametrize("own_process", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_only_a_process_of_the_command_keeps_freed_memory(name, own_process, function, monkeypatch):
    called = []
    monkeypatch.setattr("dino_xcit.runtime.keep_freed_memory", lambda: called.append(name))
    function(lambda config: None)
    assert main([name, *NEEDED[name]], own_process=own_process) == 0
    assert bool(called) == (own_process and COMMANDS[name].large_tensors)


def test_the_handler_of_ctrl_c_is_as_before(function):
    before = signal.getsignal(signal.SIGINT)
    function(lambda config: None)
    main(["pretrain"])
    assert signal.getsignal(signal.SIGINT) is before


# -- functions for Python ----------------------------------------------------------------------


def knn_eval(config: KnnConfig) -> KnnConfig:
    return config


def pretrain(config: PretrainConfig, callbacks: tuple[object, ...] = ()) -> object:
    """What it does."""
    return config, callbacks


def test_options_as_keywords_are_those_of_the_config():
    call = cli.with_options(knn_eval, KnnConfig)
    expected = KnnConfig(weights="W", nb_knn=(5, 10), temperature=0.1)
    assert call(weights="W", nb_knn=[5, 10], temperature=0.1) == expected
    assert call(expected) is expected


def test_other_keywords_are_passed_to_the_function():
    call = cli.with_options(pretrain, PretrainConfig)
    assert call(epochs=20, callbacks=["mine"]) == (PretrainConfig(epochs=20), ["mine"])
    assert call(PretrainConfig(), callbacks=["mine"]) == (PretrainConfig(), ["mine"])
    assert call.__doc__ == "What it does."


def test_an_unknown_keyword_is_a_type_error_that_names_the_closest():
    call = cli.with_options(knn_eval, KnnConfig)
    with pytest.raises(TypeError, match=r"knn_eval\(\) has no option 'wieghts'; .* mean weights\?"):
        call(wieghts="W")
    with pytest.raises(TypeError, match=r"has no option 'callbacks'$"):
        call(KnnConfig(weights="W"), callbacks=[])


def test_a_config_and_options_together_are_a_type_error():
    with pytest.raises(TypeError, match=r"a config or its options, not both: temperature given"):
        cli.with_options(knn_eval, KnnConfig)(KnnConfig(weights="W"), temperature=1.0)


def test_the_public_functions_are_those_of_the_commands(function, monkeypatch):
    dino_xcit._function.cache_clear()
    function(knn_eval)
    try:
        assert dino_xcit.knn_eval(weights="W") == KnnConfig(weights="W")
        with pytest.raises(UserError, match="--temperature is 0; expected a positive number"):
            dino_xcit.knn_eval(weights="W", temperature=0)
    finally:
        dino_xcit._function.cache_clear()
