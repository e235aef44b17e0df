"""`dino-xcit pretrain --init_weights`: where student and teacher start from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import saved_part
from timm.models import adapt_input_conv

from dino_xcit.errors import UserError
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import LAST, TEACHER
from dino_xcit.train.module import DINOModule
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.schedules import Schedules
from dino_xcit.weights.formats import to_official_names
from dino_xcit.weights.start import start_from


@pytest.fixture
def quiet(tiny):
    return dataclasses.replace(tiny, epochs=1, trainer={"enable_progress_bar": False})


@pytest.fixture
def module(quiet):
    """A run of other random numbers."""
    torch.manual_seed(123)
    return DINOModule(quiet, Schedules(config=quiet, steps_per_epoch=6, total_batch=8))


def start(weights, module):
    return start_from(str(weights), module.student, module.teacher, module.loss)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_our_own_checkpoint_gives_both_networks_heads_and_center(quiet, module):
    last = pretrain(quiet).folder / LAST
    told = start(last, module)
    for name in ("student", "teacher"):
        network = getattr(module, name)
        assert same(network.backbone.state_dict(), saved_part(last, f"{name}.backbone."))
        assert same(network.head.state_dict(), saved_part(last, f"{name}.head."))
    assert not same(module.student.backbone.state_dict(), module.teacher.backbone.state_dict())
    assert torch.equal(module.loss.center, saved_part(last, "loss.")["center"])
    assert module.loss.center.abs().max() > 0
    assert told.endswith(
        "backbone, the student's head, the teacher's head, center; anew: optimizer, schedules"
    )


def official_file(last, path, **changes):
    """As main_dino.py saves a run."""
    content = {
        "epoch": 1,
        "dino_loss": {"center": saved_part(last, "loss.")["center"]},
        "optimizer": {"state": {}},
    }
    for name, wrapper in (("student", "module."), ("teacher", "")):
        backbone = to_official_names(saved_part(last, f"{name}.backbone."))
        content[name] = {f"{wrapper}backbone.{k}": v for k, v in backbone.items()}
        content[name] |= {
            f"{wrapper}head.{k}": v for k, v in saved_part(last, f"{name}.head.").items()
        }
    torch.save({**content, **changes}, path)


@pytest.mark.slow
def test_a_full_official_checkpoint_gives_the_same(quiet, module, tmp_path):
    last = pretrain(quiet).folder / LAST
    official_file(last, tmp_path / "checkpoint.pth")
    told = start(tmp_path / "checkpoint.pth", module)
    for name in ("student", "teacher"):
        network = getattr(module, name)
        assert same(network.backbone.state_dict(), saved_part(last, f"{name}.backbone."))
        assert same(network.head.state_dict(), saved_part(last, f"{name}.head."))
    assert torch.equal(module.loss.center, saved_part(last, "loss.")["center"])
    assert "center; anew: optimizer, schedules" in told


@pytest.mark.slow
def test_a_file_of_one_network_serves_both_and_says_what_begins_anew(quiet, module, tmp_path):
    folder = pretrain(quiet).folder
    before = {name: tensor.clone() for name, tensor in module.student.head.state_dict().items()}
    told = start(folder / TEACHER, module)
    assert same(
        module.student.backbone.state_dict(), saved_part(folder / LAST, "teacher.backbone.")
    )
    assert same(
        module.teacher.backbone.state_dict(), saved_part(folder / LAST, "teacher.backbone.")
    )
    assert same(module.student.head.state_dict(), before)
    assert told.endswith(
        ": backbone; anew: the student's head, the teacher's head, center, optimizer, schedules"
    )
    official_file(folder / LAST, tmp_path / "one.pth", student=None)
    start(tmp_path / "one.pth", module)
    assert same(
        module.student.backbone.state_dict(), saved_part(folder / LAST, "teacher.backbone.")
    )


@pytest.mark.slow
def test_heads_of_other_shapes_begin_anew(quiet, module):
    last = pretrain(dataclasses.replace(quiet, out_dim=16)).folder / LAST
    assert "anew: the student's head, the teacher's head, center" in start(last, module)


@pytest.mark.slow
def test_a_run_starts_there_and_a_resumed_one_goes_on(quiet, tmp_path, capsys):
    first = pretrain(quiet).folder
    config = dataclasses.replace(
        quiet, init_weights=str(first), output_dir=str(tmp_path / "second"), lr=0.0, min_lr=0.0
    )
    folder = pretrain(config).folder
    assert "starting from" in capsys.readouterr().err
    before, after = (saved_part(path / LAST, "teacher.backbone.") for path in (first, folder))
    trained = {name for name in before if "running" not in name and "num_batches" not in name}
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in trained)
    pretrain(config)
    assert "starting from" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"arch": "xcit_pico2_p8"},
            "does not fit --arch xcit_pico2_p8; set --arch xcit_pico2_p4",
        ),
        (
            {"init_weights": "gone.pth"},
            "--init_weights gone.pth does not exist; expected a run folder",
        ),
    ],
)
@pytest.mark.slow
def test_what_does_not_fit_is_told_before_anything_is_written(quiet, tmp_path, changes, told):
    first = pretrain(quiet).folder
    config = dataclasses.replace(
        quiet, init_weights=str(first), output_dir=str(tmp_path / "second")
    )
    with pytest.raises(ValueError, match=told):
        pretrain(dataclasses.replace(config, **changes))
    assert not (tmp_path / "second" / "checkpoints").exists()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_convolution_of_three_channels_is_adapted_as_in_timm(quiet, tmp_path, channels):
    weights = XCiT("xcit_pico2_p4").state_dict()
    torch.save(weights, tmp_path / "rgb.pth")
    values = (0.5,) * channels
    options = {"in_chans": channels, "mean": values, "std": values}
    config = dataclasses.replace(quiet, **options)
    module = DINOModule(config, Schedules(config=config, steps_per_epoch=6, total_batch=8))
    line = start(tmp_path / "rgb.pth", module)
    assert "its first convolution " in line
    name = "patch_embed.proj.0.0.weight"
    rgb, adapted = weights[name], module.student.backbone.state_dict()[name]
    assert torch.equal(adapted, adapt_input_conv(channels, rgb))
    grey = torch.rand(1, 1, 3, 3)  # an image whose channels are alike gives the same features
    alike = (grey.expand(1, 3, 3, 3) * rgb).sum(), (grey.expand(1, channels, 3, 3) * adapted).sum()
    if channels == 1:
        torch.testing.assert_close(*alike)


def test_a_first_convolution_of_other_channels_names_the_flag(module, tmp_path):
    torch.save(XCiT("xcit_pico2_p4", in_chans=1).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"grey\.pth has 1 channels, .* set --in_chans 1"):
        start(tmp_path / "grey.pth", module)


def test_weights_that_are_not_finite_start_no_run(module, tmp_path):
    weights = XCiT("xcit_pico2_p4").state_dict()
    weights["norm.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"--init_weights .* not finite .* 1 of \d+ .*norm\.bias"):
        start(tmp_path / "nan.pth", module)
