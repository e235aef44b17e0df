"""The recipes under configs/ are documents that load."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml

from dino_xcit.cli import COMMANDS, parse
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.model.architectures import resolve_architecture
from dino_xcit.run_folder import write_config
from dino_xcit.train.recipe import resolve
from dino_xcit.train.schedules import Schedules

FILES = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
PROTOCOLS = sorted((Path(__file__).parent.parent.parent / "eval/protocols").glob("*.yaml"))


def load(file: Path) -> PretrainConfig:
    return parse("pretrain", PretrainConfig, ["--config", str(file)])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_loads_and_says_where_it_comes_from(file):
    config = load(file)
    resolve_architecture(config.arch)
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("Source", "Expected", "Hardware", "Command"):
        assert any(line.startswith(f"# {word}:") for line in comments), word
    assert f"--config configs/{file.name}" in "".join(comments) or "make demo" in "".join(comments)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_holds_only_options_and_is_not_the_default_throughout(file):
    options = yaml.safe_load(file.read_text())
    assert set(options) <= {field.name for field in dataclasses.fields(PretrainConfig)}


@pytest.mark.parametrize(
    ("name", "total_batch", "peak", "end"),
    [
        ("s12_p16", 1024, 1e-3, 4e-5),
        ("m24_p16", 1024, 1e-3, 1e-5),
        ("m24_p8", 960, 9.375e-4, 1e-5),
        ("s12_p8", 960, 9.375e-4, 4e-5),
    ],
)
def test_the_published_recipes_train_with_the_published_batch_and_rates(
    name, total_batch, peak, end
):
    config = load(FILES[0].parent / f"{name}.yaml")
    batch = (
        config.batch_size_per_gpu
        * int(config.devices)
        * config.num_nodes
        * config.accumulate_grad_batches
    )
    assert batch == total_batch
    config, _ = resolve(config, facts=None)  # official's recipe needs none
    schedules = Schedules(config=config, steps_per_epoch=1_281_167 // batch, total_batch=batch)
    warmup = 10 * schedules.steps_per_epoch
    assert schedules.lr(0) == pytest.approx(1e-5)
    assert schedules.lr(warmup) == pytest.approx(peak)
    assert schedules.lr(schedules.steps - 1) == pytest.approx(end, rel=1e-3)
    assert (schedules.teacher_temp(0), schedules.teacher_temp(schedules.steps - 1)) == (0.04, 0.07)


@pytest.mark.parametrize("file", PROTOCOLS, ids=lambda file: file.stem)
def test_every_protocol_loads_and_says_where_it_comes_from(file):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("Source", "Expected", "Command"):
        assert any(line.startswith(f"# {word}:") for line in comments), word
    command = next(line for line in comments if "Command" in line).split(": ", 1)[1]
    assert f"--config eval/protocols/{file.name}" in command
    check(command.replace("eval/protocols", str(file.parent)))


def check(command: str) -> None:
    """The command line is one that `dino-xcit` understands."""
    _, name, *arguments = shlex.split(command)
    config_class = COMMANDS[name].config
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse(name, config_class, arguments)
    else:
        parse(name, config_class, arguments)


def readme_commands() -> list[str]:
    lines = (FILES[0].parent.parent / "README.md").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("dino-xcit ")]


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_are_understood(command, monkeypatch, tmp_path):
    """Each is parsed as typed, in a folder with the recipes and the run that it speaks of."""
    (tmp_path / "configs").symlink_to(FILES[0].parent)
    (tmp_path / "eval").symlink_to(PROTOCOLS[0].parent.parent)
    (tmp_path / "runs/s12_p16").mkdir(parents=True)
    write_config(load(FILES[0].parent / "s12_p16.yaml"), tmp_path / "runs/s12_p16")
    monkeypatch.chdir(tmp_path)
    check(command)
