"""What a run shows before its first step: the sheet of crops, the plan and its memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matplotlib.figure import Figure

from dino_xcit.data.images import ShapeSet
from dino_xcit.errors import ImageError, UserError
from dino_xcit.run_folder import LOCK
from dino_xcit.runtime import HALF
from dino_xcit.train.dry_run import draw_crop_sheet, memory_estimate
from dino_xcit.train.module import DINOModule
from dino_xcit.train.network import Network
from dino_xcit.train.pretrain import pretrain
from dino_xcit.train.schedules import Schedules


@pytest.mark.parametrize("arch", ["xcit_pico2_p4", "timm:resnet10t"])
@pytest.mark.slow
def test_dry_run_stops_after_crops_and_plan(tiny, capsys, arch):
    config = dataclasses.replace(
        tiny, dry_run=True, arch=arch, global_crops_size=32, local_crops_size=16
    )
    outcome = pretrain(config)
    assert {p.name for p in outcome.folder.iterdir()} - {LOCK} == {"config.yaml", "crops.png"}
    plan = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert plan["images"] == "48"
    assert plan["steps"].startswith("12 (2 epochs of 6, 8 images each")
    assert arch.removeprefix("timm:") in plan["parameters"]
    assert "GiB per process" in plan["memory"]
    assert plan["precision"] == "32-true on cpu"
    assert plan["crops"].endswith("run/crops.png")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("arch", ["xcit_pico2_p4", "timm:resnet10t"])
@pytest.mark.slow
def test_the_memory_estimate_is_what_a_forward_pass_keeps_besides_weights_gradients_and_moments(
    tiny, precision, arch
):
    config = dataclasses.replace(
        tiny, arch=arch, batch_size_per_gpu=4, global_crops_size=32, local_crops_size=16
    )
    student = Network(config)
    kept: dict[int, torch.UntypedStorage] = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    groups = [torch.rand(4, 2, 3, 32, 32), torch.rand(4, config.local_crops_number, 3, 16, 16)]
    hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", HALF.get(precision), enabled=precision in HALF):
        student.embed(groups)
    for parameter in student.parameters():
        kept.pop(parameter.data_ptr(), None)
    weights = sum(p.numel() for p in student.parameters()) * 4
    counted = 5 * weights + sum(storage.nbytes() for storage in kept.values())
    assert memory_estimate(config, precision) == pytest.approx(counted, rel=1e-3)


def test_a_step_that_cannot_fit_this_machine_is_refused(tiny):
    with pytest.raises(
        UserError,
        match=r"--batch_size_per_gpu 100000 .* needs more than \d+ GiB and this machine has",
    ):
        pretrain(
            dataclasses.replace(tiny, num_images=100_000, batch_size_per_gpu=100_000, epochs=1)
        )


@pytest.mark.parametrize("error", [OSError("gone"), ImageError("not an image")])
def test_an_unreadable_image_is_black_on_the_sheet_of_crops(
    tiny, tmp_path, monkeypatch, drawn_pictures, error
):
    class Broken(ShapeSet):
        def read(self, index):
            if index % 2:
                raise error
            return super().read(index)

    sheets = []

    def savefig(figure, path, **_):
        sheets.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    module = DINOModule(tiny, Schedules(config=tiny, steps_per_epoch=6, total_batch=8))
    draw_crop_sheet(tmp_path, module, Broken(tiny.seed, "train", 12, 3))
    shown = sheets[0].get_axes()
    titles = [axes.get_title() for axes in shown[:5]]
    assert titles == ["image", "global 1", "global 2", "local 1", "local 2"]
    black = [not axes.images[0].get_array().any() for axes in shown]
    assert 0 < sum(black[::5]) < 6
    assert not any(black[i] for i in range(len(black)) if i % 5)
