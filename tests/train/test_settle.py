"""A run's options are settled once: resolved, printed, written, and kept when it continues."""

import dataclasses

import pytest
import torch
from helpers import TINY, folder_config, make_folder
from safetensors.torch import load_file

from dino_xcit.cli import main
from dino_xcit.config.pretrain import AUTO, PretrainConfig, auto_options
from dino_xcit.errors import UserError
from dino_xcit.run_folder import TEACHER, read_config
from dino_xcit.train import settle
from dino_xcit.train.dry_run import duration
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.recipe import Setting


def asked(config, *autos, **changes):
    """The options of a config, some of them auto."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return PretrainConfig(**{**values, **dict.fromkeys(autos, AUTO), **changes})


@pytest.mark.slow
def test_what_is_resolved_is_printed_written_and_kept(tiny, tmp_path, capsys):
    config = asked(tiny, "out_dim", "lr", "warmup_epochs", epochs=1)
    pretrain(config)
    first = read_config(tmp_path / "run")
    assert auto_options(first) == []
    err = capsys.readouterr().err
    assert f"--lr             {first.lr:g}" in err
    assert "--warmup_epochs  0.1" in err
    assert pretrain(config).step == 6  # the same command, of a finished run
    assert "Resolved" not in capsys.readouterr().err
    assert read_config(tmp_path / "run") == first


@pytest.mark.slow
def test_a_begun_run_keeps_what_another_version_would_resolve(tiny, tmp_path, monkeypatch):
    config = asked(tiny, "lr", epochs=1)
    pretrain(config)
    before = read_config(tmp_path / "run")
    monkeypatch.setitem(settle.resolve.__globals__["RULES"], "lr", lambda *_: (0.125, "another"))
    assert pretrain(config).step == 6
    assert read_config(tmp_path / "run") == before


@pytest.mark.slow
def test_the_hours_become_epochs_by_the_measured_rate(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(settle, "images_per_second", lambda *_: 48.0)
    pretrain(asked(tiny, "epochs", "warmup_epochs", max_hours=3 / 3600))
    assert read_config(tmp_path / "run").epochs == 3
    assert main(["pretrain", "--config", str(tmp_path / "run/config.yaml")]) == 0  # is finished


@pytest.mark.slow
def test_a_measured_rate_trains_nothing(tiny, tmp_path):
    """The run after it is the run without it."""
    pretrain(dataclasses.replace(tiny, epochs=1))
    alone = load_file(tmp_path / "run" / TEACHER)
    dry = dataclasses.replace(tiny, epochs=1, output_dir=str(tmp_path / "other"))
    pretrain(dataclasses.replace(dry, dry_run=True))
    pretrain(dry)
    torch.testing.assert_close(load_file(tmp_path / "other" / TEACHER), alone, rtol=0, atol=0)


def test_a_time_for_several_processes_is_refused(tiny):
    with pytest.raises(UserError, match=r"2 processes.*set --epochs"):
        pretrain(asked(tiny, "epochs", "warmup_epochs", devices="2"))


def test_images_that_cannot_be_read_have_no_size(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"no image")
    config = folder_config(folder, output_dir=str(tmp_path / "run"))
    reason = r"none of 10 images can be read \(.*9.png: .*\); is --data_path"
    with pytest.raises(UserError, match=reason):
        pretrain(asked(config, "lr"))


@pytest.mark.slow
def test_the_crops_follow_the_images(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{number}.png" for number in range(9)])  # 40 x 60
    config = folder_config(folder, output_dir=str(tmp_path / "run"))
    pretrain(asked(config, "global_crops_size", "local_crops_size"))
    written = read_config(tmp_path / "run")
    assert (written.global_crops_size, written.local_crops_size) == (28, 12)


def test_official_settings_are_one_line_of_the_table():
    lines = settle.table(
        [Setting("lr", 0.25, "why"), Setting("out_dim", 65536, "many"), Setting("arch", "A", "x")]
    ).splitlines()
    assert lines[1:] == [
        "  --lr    0.25  why",
        "  --arch  A     x",
        "  as official DINO: out_dim 65536",
    ]


TIMES = {
    40: "40 s",
    700: "12 min",
    12_000: "3 h 20 min",
    446_400: "5 days 4 h",
    90_000: "1 day 1 h",
}


@pytest.mark.parametrize(("seconds", "text"), TIMES.items())
def test_times_are_in_their_units(seconds, text):
    assert duration(seconds) == text


def test_tiny_is_all_given():
    assert auto_options(TINY) == []
