"""What a run continues from, what it refuses, and how it is extended."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from helpers import folder_config, last_state, logged_rows, make_folder

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import open_images
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, LAST
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.resume import images_record

NAMES = [f"{kind}/{i:02}.png" for kind in ("cat", "dog") for i in range(12)]


@pytest.fixture
def stopped(tmp_path) -> RunConfig:
    """A run on 24 images that ended after 4 of 6 steps."""
    folder = make_folder(tmp_path / "images", NAMES)
    config = folder_config(folder, output_dir=str(tmp_path / "run"))
    pretrain(dataclasses.replace(config, trainer={"max_steps": 4}))
    return config


@pytest.mark.slow
def test_a_run_that_a_limit_ended_is_not_finished(stopped, tmp_path, capsys):
    other = dataclasses.replace(stopped, output_dir=str(tmp_path / "other"))
    outcome = pretrain(dataclasses.replace(other, trainer={"max_steps": 4}))
    assert outcome.exit_code == 1
    printed = capsys.readouterr()
    assert "not finished: a limit of --trainer or a callback ended it at step 4 of 6" in printed.err
    assert "continue with: dino-xcit pretrain --config" in printed.err
    assert "teacher.safetensors" not in printed.out
    assert pretrain(other).exit_code == 0


@pytest.mark.slow
def test_the_time_of_a_limit_is_that_of_one_start(stopped):
    limited = dataclasses.replace(stopped, trainer={"max_time": {"seconds": 3600}})
    pretrain(limited)
    content = torch.load(Path(stopped.output_dir) / LAST, weights_only=True)
    assert "Timer" not in content["callbacks"]


@pytest.mark.slow
def test_the_options_of_the_checkpoint_count_not_those_of_config_yaml(stopped):
    path = Path(stopped.output_dir) / CONFIG
    path.write_text(path.read_text().replace("lr: 0.0005", "lr: 0.1"))
    with pytest.raises(UserError, match=r"--lr was 0.0005, now 0.1; name another --output_dir"):
        pretrain(dataclasses.replace(stopped, lr=0.1))
    assert pretrain(stopped).step == 6


@pytest.mark.slow
def test_a_moved_folder_of_the_same_images_continues(stopped, tmp_path):
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    moved = dataclasses.replace(stopped, data_path=str(tmp_path / "elsewhere"))
    assert pretrain(moved).step == 6


@pytest.mark.slow
def test_a_folder_named_from_where_one_stands_is_the_same(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "images")
    assert pretrain(dataclasses.replace(stopped, data_path=".")).step == 6


def fewer(folder: Path) -> None:
    for path in (folder / "dog").iterdir():
        path.unlink()


def renamed(folder: Path) -> None:
    (folder / "dog/00.png").rename(folder / "dog/30.png")


def replaced(folder: Path) -> None:
    with (folder / "dog/00.png").open("ab") as file:
        file.write(b"longer")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (fewer, "24 images, now there are 12"),
        (renamed, "other images: now the 24 images have other file names"),
        (replaced, "other images: now the 24 images are other files of the same names"),
    ],
)
@pytest.mark.slow
def test_other_images_are_refused_with_what_differs_and_what_to_do(
    stopped, tmp_path, change, difference
):
    change(tmp_path / "images")
    with pytest.raises(UserError, match=difference) as raised:
        pretrain(stopped)
    assert all(flag in str(raised.value) for flag in ("--data_path", "--init_weights"))


def test_other_classes_of_the_same_images_are_another_record(tmp_path):
    config = folder_config(make_folder(tmp_path / "images", NAMES))
    images = open_images(config, "train")
    before = images_record(images)
    images.labels[0] = 1
    assert images_record(images)["labels"] != before["labels"]


@pytest.mark.parametrize("lacking", [("images", "steps_per_epoch"), ("images", "config")])
@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_continues_without_its_record(stopped, lacking):
    path = Path(stopped.output_dir) / LAST
    content = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in content.items() if key not in lacking}, path)
    assert pretrain(stopped).step == 6


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_refused_on_another_number_of_images(
    stopped, tmp_path
):
    path = Path(stopped.output_dir) / LAST
    content = torch.load(path, weights_only=True)
    del content["images"]
    torch.save(content, path)
    make_folder(tmp_path / "images", [f"cat/{i}.png" for i in range(100, 140)])
    with pytest.raises(UserError, match=r"on another number of images: its learning rate at step"):
        pretrain(stopped)


@pytest.mark.slow
def test_a_checkpoint_after_the_last_step_of_the_images_is_refused(stopped, tmp_path):
    path = Path(stopped.output_dir) / LAST
    content = torch.load(path, weights_only=True)
    del content["images"]
    torch.save(content, path)
    fewer(tmp_path / "images")
    with pytest.raises(UserError, match="at step 4, but 12 images are 2 steps"):
        pretrain(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_extended_by_a_flag_with_the_schedules_of_the_longer_run(
    stopped, capsys, finished
):
    if finished:
        pretrain(stopped)
    longer = dataclasses.replace(stopped, epochs=4)
    with pytest.raises(UserError, match="--epochs was 2, now 4; --extend continues it to"):
        pretrain(longer)
    assert pretrain(dataclasses.replace(longer, extend=True)).step == 12
    assert f"from step {6 if finished else 4} on, all schedules are" in capsys.readouterr().err
    whole = dataclasses.replace(longer, output_dir=f"{stopped.output_dir}_whole")
    pretrain(whole)
    rates = [[row["lr"] for row in logged_rows(config)] for config in (longer, whole)]
    assert rates[0][-6:] == rates[1][-6:]
    assert last_state(longer).keys() == last_state(whole).keys()
    assert pretrain(longer).step == 12  # the flag is of one start


def test_a_strategy_that_returns_no_outcome_is_refused():
    with pytest.raises(UserError, match="--strategy is 'ddp_spawn'"):
        RunConfig(strategy="ddp_spawn")
