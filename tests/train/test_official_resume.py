"""`dino-xcit pretrain --continue_from`: a run of official DINO continues as ours."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import last_state, logged_rows, saved_part

from dino_xcit.cli import main
from dino_xcit.errors import UserError
from dino_xcit.run_folder import LAST
from dino_xcit.train.module import DINOModule
from dino_xcit.train.optimizer import parameter_groups
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.schedules import Schedules
from dino_xcit.weights.formats import to_official_names

pytestmark = pytest.mark.slow
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(params=[True, False], ids=["fixed gain", "learned gain"])
def whole(tiny, tmp_path, request):
    """A run of two epochs whose first is kept."""
    config = dataclasses.replace(
        tiny,
        epochs=2,
        saveckp_freq=1,
        norm_last_layer=request.param,
        drop_path_rate=0.1,
        output_dir=str(tmp_path / "whole"),
        trainer={"enable_progress_bar": False},
    )
    pretrain(config)
    return config


def official(config, path: Path, epoch: int = 1, **changes) -> Path:
    """The run after its first epoch, as main_dino.py would have saved it.

    Query, key and value of the class token are one tensor; the optimizer's state is numbered in the
    order of the official model, which is not ours.
    """
    last = Path(config.output_dir) / "checkpoints/epoch0001.ckpt"
    ours = torch.load(last, weights_only=True)
    module = DINOModule(config, Schedules(config=config, steps_per_epoch=6, total_batch=8))
    names = {id(p): name for name, p in module.student.named_parameters()}
    in_order = [names[id(p)] for group in parameter_groups(module.student) for p in group["params"]]
    moments = {in_order[index]: one for index, one in ours["optimizer_states"][0]["state"].items()}

    def renamed(tensors):
        backbone = {
            n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")
        }
        head = {n: t for n, t in tensors.items() if n.startswith("head.")}
        return {
            **{f"backbone.{n}": t for n, t in sorted(to_official_names(backbone).items())},
            **head,
        }

    content = {
        "epoch": epoch,
        "dino_loss": {"center": saved_part(last, "loss.")["center"]},
        "args": argparse.Namespace(),
    }
    content["student"] = {
        f"module.{n}": t for n, t in renamed(saved_part(last, "student.")).items()
    }
    content["teacher"] = renamed(saved_part(last, "teacher."))
    by_kind = {
        kind: renamed({n: one[kind] for n, one in moments.items()})
        for kind in ("exp_avg", "exp_avg_sq")
    }
    step = next(iter(moments.values()))["step"].item()
    parameters = {
        n.removeprefix("module."): t
        for n, t in content["student"].items()
        if not n.endswith(BUFFERS) and not (config.norm_last_layer and n.endswith("weight_g"))
    }
    spared = [n for n, t in parameters.items() if n.endswith(".bias") or t.ndim == 1]
    numbered = [*(n for n in parameters if n not in spared), *spared]
    content["optimizer"] = {
        "state": {
            i: {"step": int(step), **{kind: of_kind[n] for kind, of_kind in by_kind.items()}}
            for i, n in enumerate(numbered)
            if n in by_kind["exp_avg"]
        },
        "param_groups": [
            {"params": list(range(len(numbered) - len(spared)))},
            {"params": list(range(len(numbered) - len(spared), len(numbered)))},
        ],
    }
    torch.save({**content, **changes}, path)
    return path


def going_on(config, tmp_path, **changes):
    return dataclasses.replace(
        config,
        continue_from=str(official(config, tmp_path / "checkpoint.pth", **changes)),
        output_dir=str(tmp_path / "ours"),
    )


def test_an_official_run_goes_on_as_if_it_had_always_been_ours(whole, tmp_path, capsys):
    arguments = argparse.Namespace(
        lr=0.5, momentum_teacher=whole.momentum_teacher, arch="other", data_path="/theirs"
    )
    config = going_on(whole, tmp_path, args=arguments)
    pretrain(config)
    told = capsys.readouterr().err
    assert (
        "continues after epoch 1 of 2, step 6; taken: backbone, the student's head, the teacher's "
        "head, center, optimizer; anew" in told
    )
    assert f"--lr was 0.5, now {whole.lr}" in told
    assert "momentum_teacher" not in told
    assert "--data_path" not in told
    assert logged_rows(config) == [row for row in logged_rows(whole) if int(row["step"]) > 6]
    ours, expected = last_state(config), last_state(whole)  # each is read once
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    optimizers = [
        torch.load(Path(c.output_dir) / LAST, weights_only=True)["optimizer_states"]
        for c in (whole, config)
    ]
    # What has no moments yet begins with zeros either way.
    assert optimizers[0][0]["param_groups"] == optimizers[1][0]["param_groups"]
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=0, atol=0)
    pretrain(config)
    assert "continues after" not in capsys.readouterr().err, "it is a run of ours now"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"optimizer": None},
            "anew: optimizer (the file's moments cannot be used: 0 parameters for",
        ),
        (
            {"optimizer": {"state": {0: {"momentum_buffer": None}}, "param_groups": "as they are"}},
            "not AdamW's",
        ),
        ({"dino_loss": {}}, "anew: center, order and crops"),
        (
            {"optimizer": {"state": {}, "param_groups": "as they are"}},
            "cannot be used: there are none",
        ),
        (
            {"optimizer": {"state": {10**6: {"step": 1}}, "param_groups": "as they are"}},
            "cannot be used: list index",
        ),
        ({"args": argparse.Namespace(batch_size_per_gpu=64)}, "--batch_size_per_gpu was 64, now"),
    ],
)
@pytest.mark.parametrize("whole", [True], indirect=True)
def test_what_a_file_lacks_begins_anew_and_is_told(whole, tmp_path, capsys, changes, told):
    if changes.get("optimizer"):
        groups = torch.load(official(whole, tmp_path / "full.pth"), weights_only=False)[
            "optimizer"
        ]["param_groups"]
        changes = {"optimizer": {**changes["optimizer"], "param_groups": groups}}
    config = going_on(whole, tmp_path, **changes)
    assert pretrain(config).step == 12
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"epoch": 2}, "was trained for 2 epochs and --epochs is 2; nothing is left to do"),
        ({}, {"epoch": 0}, "was trained for 0 epochs"),
        ({}, {"epoch": "two"}, "has 'two' for its epoch"),
        ({"out_dim": 16}, {}, "student's head is of another shape; set --out_dim"),
        ({"arch": "xcit_pico2_p8"}, {}, "does not fit --arch xcit_pico2_p8"),
        ({"init_weights": "here.pth"}, {}, "expected nothing beside --continue_from"),
    ],
)
@pytest.mark.parametrize("whole", [True], indirect=True)
def test_what_cannot_be_continued_is_refused(whole, tmp_path, options, changes, message):
    config = going_on(whole, tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        pretrain(dataclasses.replace(config, **options))
    assert not (tmp_path / "ours/checkpoints").exists()


def test_files_that_are_no_run_are_refused(tiny, tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "weights.pth")
    code = main(
        [
            "pretrain",
            "--continue_from",
            str(tmp_path / "weights.pth"),
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    assert code == 2
    assert (
        "has no student and no teacher and no epoch; expected a full checkpoint of official"
        in capsys.readouterr().err
    )
    code = main(
        [
            "pretrain",
            "--continue_from",
            str(tmp_path / "gone.pth"),
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    assert code == 2
    assert "No such file" in capsys.readouterr().err
