"""Linear protocols against plain loops and scikit-learn, selection on held-out images, resuming."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn

from dino_xcit.config.evaluation import LinearConfig
from dino_xcit.data.crops import sample_boxes
from dino_xcit.data.images import ShapeSet
from dino_xcit.errors import UserError
from dino_xcit.evaluate import probe, probe_heads, probe_logistic
from dino_xcit.evaluate.feature_files import FileFeatures
from dino_xcit.evaluate.inputs import open_inputs
from dino_xcit.evaluate.linear import linear_eval
from dino_xcit.evaluate.probe import (
    FeatureChoice,
    Head,
    ProbeTask,
    Scratch,
    hold_out,
    load_head,
    stratified,
)
from dino_xcit.evaluate.probe_dino import AugmentedCrops, Steps
from dino_xcit.evaluate.probe_heads import train_heads
from dino_xcit.evaluate.probe_logistic import FitData, LinearModel, fit, logistic_protocol
from dino_xcit.evaluate.probe_sgd import SavedSGD
from dino_xcit.runtime import launch

CLASSES, DIM = 4, 6


def features(count, seed, classes=CLASSES, noise=1.0):
    """Features around the centre of their class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    centres = np.random.default_rng(99).normal(size=(classes, DIM))
    return torch.from_numpy(
        centres[labels] + noise * rng.normal(size=(count, DIM))
    ).float(), torch.from_numpy(labels)


@pytest.fixture
def files(tmp_path):
    """A folder as `--load_features` takes it: 240 training and 100 validation images."""
    folder = tmp_path / "features"
    folder.mkdir()
    for names, count, seed in (
        (("trainfeat", "trainlabels"), 240, 0),
        (("testfeat", "testlabels"), 100, 1),
    ):
        for name, tensor in zip(names, features(count, seed), strict=True):
            torch.save(tensor, folder / f"{name}.pth")
    return folder


def config_of(files: Path, **options) -> LinearConfig:
    return LinearConfig(load_features=str(files), accelerator="cpu", devices="1", **options)


def task_of(config: LinearConfig, rows=None, seed=0) -> ProbeTask:
    file_features = FileFeatures(config)
    scratch = Scratch(Path(str(config.load_features)) / ".linear")
    rows = np.arange(len(file_features.labels("train"))) if rows is None else rows
    return ProbeTask(config, file_features, launch(config), rows, seed, CLASSES, scratch)


def fit_all(task: ProbeTask, c: float, start: LinearModel | None = None) -> LinearModel:
    """Fit all of the task's rows."""
    data = FitData(task, task.rows, FeatureChoice(1, False))
    return fit(data, c, data.principal_axes(), start)


# -- which images ---------------------------------------------------------------------------------


def test_a_share_of_each_class_is_taken_at_least_one_and_by_the_seed():
    labels = torch.tensor([0] * 200 + [1] * 50 + [2] * 3)
    rows = stratified(labels, 0.1, (0, 0))
    assert torch.bincount(labels[rows]).tolist() == [20, 5, 1]
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, stratified(labels, 0.1, (0, 0)))
    assert not np.array_equal(rows, stratified(labels, 0.1, (1, 0)))


def test_held_out_images_are_not_trained_on_and_a_class_of_one_image_is(files):
    labels = torch.load(files / "trainlabels.pth")
    labels[labels == 3] = 2
    labels[17] = 3
    torch.save(labels, files / "trainlabels.pth")
    task = task_of(config_of(files, held_out=0.2), rows=np.arange(10, 240))
    train, held = hold_out(task)
    assert sorted([*train, *held]) == list(range(10, 240))
    assert 17 in train
    of_classes = torch.bincount(labels[10:], minlength=4)[:3]
    assert torch.bincount(labels[held]).tolist() == [round(0.2 * n) for n in of_classes.tolist()]


@pytest.mark.slow
def test_one_image_of_each_class_leaves_nothing_to_hold_out(files):
    with pytest.raises(ValueError, match=r"--train_fraction .* single --lr"):
        linear_eval(config_of(files, train_fraction=(0.01,), epochs=1))
    report = linear_eval(config_of(files, train_fraction=(0.01,), lr=(0.1,), epochs=1))
    assert "held_out_top1" not in report["results"][0]["chosen"]


# -- heads ----------------------------------------------------------------------------------------


def test_heads_trained_together_are_heads_trained_alone(files):
    config = config_of(files, epochs=3, batch_size=64)
    rates, rows = (0.5, 0.01, 3.0), np.arange(5, 205)
    weight, bias = train_heads(task_of(config), rows, FeatureChoice(1, False), rates, "")
    x, y = torch.load(files / "trainfeat.pth"), torch.load(files / "trainlabels.pth")
    for head, rate in enumerate(rates):
        layer = nn.Linear(DIM, CLASSES)
        layer.weight.data = 0.01 * torch.randn(
            CLASSES, DIM, generator=torch.Generator().manual_seed(0)
        )
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 64 / 256, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, 12
        )  # 3 epochs of 4 steps, the last of 8 images
        for epoch in range(3):
            order = np.random.default_rng((0, 2, epoch)).permutation(rows)
            for batch in np.split(order, [64, 128, 192]):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[batch]), y[batch]).backward()
                optimizer.step()
                scheduler.step()
        torch.testing.assert_close(weight[head], layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[head], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_default_length_follows_the_number_of_images(files, monkeypatch):
    monkeypatch.setattr(probe_heads, "HEADS_LEAST_STEPS", 7)
    monkeypatch.setattr(probe_heads, "HEADS_MOST_EPOCHS", 2)
    monkeypatch.setattr(probe_heads, "HEADS_STEPS", 20)
    steps = []
    monkeypatch.setattr(probe_heads, "cosine_decay", lambda done: steps.append(done) or 1.0)
    for batch_size, expected in ((240, 7), (60, 8), (10, 20)):
        steps.clear()
        train_heads(
            task_of(config_of(files, batch_size=batch_size)),
            np.arange(240),
            FeatureChoice(1, False),
            (0.1,),
            "",
        )
        assert len(steps) == expected


def test_the_chosen_head_is_the_best_on_held_out_images_trained_again_on_all(files):
    config = config_of(files, lr=(1e-6, 0.3, 1e-5), epochs=20)
    report = linear_eval(config)
    chosen = report["results"][0]["chosen"]
    assert (chosen["lr"], chosen["tried"], chosen["protocol"]) == (0.3, 3, "heads")
    weight, bias = train_heads(task_of(config), np.arange(240), FeatureChoice(1, False), (0.3,), "")
    head, _ = load_head(files / "linear_head.safetensors")
    assert torch.equal(head.weight, weight[0])
    assert torch.equal(head.bias, bias[0])
    x, y = torch.load(files / "testfeat.pth"), torch.load(files / "testlabels.pth")
    right = (F.linear(x, head.weight, head.bias).argmax(1) == y).float().mean().item()
    assert report["results"][0]["top1"] == pytest.approx(100 * right, abs=1e-3)
    assert right > 0.6


@pytest.mark.slow
def test_validation_labels_select_nothing(files):
    options = {"lr": (0.003, 0.3), "epochs": 10}
    for protocol, more in (("heads", options), ("logistic", {"c": (0.01, 1.0)})):
        one = linear_eval(config_of(files, protocol=protocol, **more))["results"][0]
        name = (
            "linear_head.safetensors" if protocol == "heads" else "linear_logistic_head.safetensors"
        )
        head, _ = load_head(files / name)
        labels = torch.load(files / "testlabels.pth")
        torch.save((labels + 1) % CLASSES, files / "testlabels.pth")
        other = linear_eval(config_of(files, protocol=protocol, **more))["results"][0]
        assert one["chosen"] == other["chosen"]
        assert one["top1"] > other["top1"]
        assert torch.equal(load_head(files / name)[0].weight, head.weight)
        torch.save(labels, files / "testlabels.pth")


def test_a_head_that_diverged_is_not_chosen(files):
    assert (
        linear_eval(config_of(files, lr=(0.1, 3e38), epochs=5))["results"][0]["chosen"]["lr"] == 0.1
    )


@pytest.mark.slow
def test_the_largest_rate_or_an_outermost_c_being_best_is_printed(files, capsys):
    linear_eval(config_of(files, lr=(1e-6, 0.25), epochs=10))
    assert "largest tried, 0.25; try larger ones with --lr" in capsys.readouterr().err
    linear_eval(config_of(files, protocol="logistic", c=(1e-9, 1e-8)))
    assert "try others with --c" in capsys.readouterr().err


# -- logistic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1e-4, 0.1, 1.0, 300.0])
@pytest.mark.slow
def test_logistic_regression_is_scikit_learns(files, c):
    LogisticRegression = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = torch.load(files / "trainfeat.pth"), torch.load(files / "trainlabels.pth")
    x[:, 0] = 100 + 7 * x[:, 0]  # badly conditioned
    x[:, 5] = 0  # and singular
    torch.save(x, files / "trainfeat.pth")
    task = task_of(config_of(files, protocol="logistic"))
    weight, bias = fit_all(task, c)
    reference = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(
        x.double().numpy(), y.numpy()
    )
    logits = x.double() @ weight.T + bias
    expected = torch.from_numpy(reference.decision_function(x.double().numpy()))
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=0, atol=2e-3)
    assert (
        logits.argmax(1) == torch.from_numpy(reference.predict(x.numpy()))
    ).float().mean() > 0.995
    torch.testing.assert_close(weight, torch.from_numpy(reference.coef_), rtol=0.02, atol=2e-3)


def test_features_that_exceed_the_memory_and_another_start_give_the_same_fit(files, monkeypatch):
    task = task_of(config_of(files, protocol="logistic"))
    whole = fit_all(task, 1.0)
    monkeypatch.setattr(probe_logistic, "IN_MEMORY", 0)
    monkeypatch.setattr(probe_logistic, "BLOCK", 50)
    task.scratch.remove()
    warm = fit_all(task, 1.0, start=LinearModel(whole.weight + 1, whole.bias - 1))
    for one, other in zip(whole, warm, strict=True):
        torch.testing.assert_close(one - one.mean(0), other - other.mean(0), rtol=1e-2, atol=1e-3)


def test_a_device_without_float64_is_left_alone(files):
    """There is no such device here: whatever is moved to it is an error."""
    task = task_of(config_of(files, protocol="logistic", c=(0.1, 1.0)))
    expected = logistic_protocol(task)
    task.scratch.remove()
    on_mps = SimpleNamespace(device=torch.device("mps"), is_global_zero=True)
    head = logistic_protocol(task._replace(fabric=on_mps))
    torch.testing.assert_close(head.weight, expected.weight)
    assert head.chosen == expected.chosen


def _wait_for_the_first(rank: int, folder: str) -> None:
    """Processes whose group waits for a second, while the first fits for three."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=1),
    )
    probe_logistic._choose_c = lambda *_: time.sleep(3) or {"C": 1.0}
    probe_logistic.fit = lambda *_: LinearModel(torch.ones(2, 3), torch.zeros(2))
    probe_logistic.FitData.principal_axes = lambda _: None
    fabric = SimpleNamespace(is_global_zero=rank == 0, broadcast=_broadcast)
    config = LinearConfig(load_features=folder, protocol="logistic")
    head = logistic_protocol(ProbeTask(config, None, fabric, np.arange(4), 0, 2, None))
    torch.save((head.weight, head.chosen["C"]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _broadcast(value):
    """As Fabric does it."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@pytest.mark.slow
def test_the_processes_wait_for_longer_than_their_group_while_the_first_one_fits(tmp_path):
    mp.start_processes(_wait_for_the_first, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        weight, c = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(weight, torch.ones(2, 3))
        assert c == 1.0


# -- dino -----------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tiny):
    """A run folder with an untrained network of 16-pixel grey images."""
    from dino_xcit.model.xcit import XCiT
    from dino_xcit.run_folder import write_config
    from dino_xcit.weights.load import save_backbone

    config = dataclasses.replace(tiny, in_chans=1, mean=(0.5,), std=(0.25,))
    Path(config.output_dir).mkdir()
    write_config(config, Path(config.output_dir))
    torch.manual_seed(0)
    save_backbone(
        XCiT(config.arch, in_chans=1).eval(),
        config,
        Path(config.output_dir) / "teacher.safetensors",
    )
    return config


def dino_config(backbone, **options) -> LinearConfig:
    return LinearConfig(
        weights=backbone.output_dir,
        accelerator="cpu",
        precision="32-true",
        devices="1",
        num_workers=0,
        no_cache=True,
        **{
            "protocol": "dino",
            "epochs": 2,
            "batch_size": 20,
            "batch_size_per_gpu": 8,
            "lr": (2.0,),
            **options,
        },
    )


@pytest.mark.slow
def test_dino_protocol_is_the_published_loop(backbone):
    config = dino_config(backbone)
    report = linear_eval(config)
    assert report["results"][0]["chosen"] == {
        "protocol": "dino",
        "train_fraction": 1.0,
        "lr": 2.0,
        "n_last_blocks": 1,
        "avgpool_patchtokens": False,
    }
    with open_inputs(config, launch(config)) as inputs:
        (frozen,) = inputs.features
        crops = AugmentedCrops(frozen.images["train"], 16, 1, 0)
        layer = nn.Linear(64, 10)
        layer.weight.data = 0.01 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0 * 20 / 256, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        for epoch in range(2):
            order = np.random.default_rng((0, 2, epoch)).permutation(48)
            for batch in np.split(order, [20, 40]):
                samples = [crops[epoch, int(index)] for index in batch]
                x = (torch.stack([image for image, _, _ in samples]).float() / 255 - 0.5) / 0.25
                with torch.no_grad():
                    x = frozen.extractor.backbone(x)
                optimizer.zero_grad()
                F.cross_entropy(
                    layer(x), torch.tensor([label for _, label, _ in samples])
                ).backward()
                optimizer.step()
            scheduler.step()
    head, _ = load_head(Path(backbone.output_dir) / "linear_dino_head.safetensors")
    torch.testing.assert_close(head.weight, layer.weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.bias, layer.bias.detach(), rtol=1e-3, atol=1e-5)


def test_steps_divide_every_image_among_processes_and_passes(files):
    task = task_of(config_of(files, batch_size=100, batch_size_per_gpu=16))
    whole = list(Steps(task, epochs=2).start(0))
    assert [step.images for step in whole] == 2 * [100, 100, 40]
    assert [step.epoch for step in whole] == 3 * [0] + 3 * [1]
    assert all(len(one) <= 16 for step in whole for one in step.passes)
    for epoch in (0, 1):
        positions = [p for step in whole if step.epoch == epoch for one in step.passes for p in one]
        assert sorted(positions) == [(epoch, row) for row in range(240)]
    ranks = [SimpleNamespace(global_rank=rank, world_size=3) for rank in range(3)]
    shares = [list(Steps(task._replace(fabric=rank), epochs=2).start(0)) for rank in ranks]
    for step, *of_ranks in zip(whole, *shares, strict=True):
        joined = [p for share in of_ranks for one in share.passes for p in one]
        assert joined == [p for one in step.passes for p in one]
    steps = Steps(task, epochs=2)
    assert list(steps.start(4)) == whole[4:]
    assert [steps.images_before(step) for step in (0, 2, 3, 6)] == [0, 200, 240, 480]


def test_augmented_crops_are_torchvisions_bilinear_resized_crops():
    images = ShapeSet(0, "train", 40, 3)
    crops, flipped = AugmentedCrops(images, 20, 3, seed=5), 0
    for index in range(40):
        crop, label, readable = crops[2, index]
        assert readable
        assert label == images.labels[index]
        image = images.read(index)
        box = sample_boxes(
            np.random.default_rng((5, 3, 2, index)),
            *image.shape[1:],
            np.array([0.08]),
            np.array([1.0]),
        )[0]
        expected = TF.resized_crop(
            image, *box.tolist(), [20, 20], TF.InterpolationMode.BILINEAR, antialias=True
        )
        distances = [
            (crop.int() - e.int()).abs().max().item() for e in (expected, expected.flip(-1))
        ]
        assert min(distances) <= 1
        flipped += distances[1] < distances[0]
    assert 10 < flipped < 30
    assert not torch.equal(crops[2, 0][0], crops[3, 0][0])


@pytest.mark.slow
def test_unreadable_images_are_left_out_of_the_loss(backbone, monkeypatch):
    whole = linear_eval(dino_config(backbone))
    head, _ = load_head(Path(backbone.output_dir) / "linear_dino_head.safetensors")
    read = ShapeSet.read

    def broken(self, index):
        if self.split == "train" and index < 10:
            raise OSError("broken")
        return read(self, index)

    monkeypatch.setattr(ShapeSet, "read", broken)
    assert linear_eval(dino_config(backbone))["data"] == {**whole["data"], "unreadable": 10}
    assert not torch.equal(
        load_head(Path(backbone.output_dir) / "linear_dino_head.safetensors")[0].weight, head.weight
    )


# -- interruptions --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["heads", "dino"])
def test_an_interrupted_training_continues_bit_for_bit(backbone, protocol, monkeypatch, tmp_path):
    config = dino_config(
        backbone, protocol=protocol, lr=(0.5,), n_last_blocks=1, avgpool_patchtokens=False
    )
    config = dataclasses.replace(config, no_cache=False, cache_dir=str(tmp_path / "cache"))
    linear_eval(config)
    name = "linear_head.safetensors" if protocol == "heads" else "linear_dino_head.safetensors"
    expected, _ = load_head(Path(backbone.output_dir) / name)
    monkeypatch.setattr(probe.Saver, "due", lambda self: True)
    update, calls = SavedSGD.update, []

    def interrupt(sgd, lr):
        calls.append(lr)
        if len(calls) == 5:
            raise KeyboardInterrupt
        update(sgd, lr)

    monkeypatch.setattr(SavedSGD, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        linear_eval(config)
    assert list((Path(backbone.output_dir) / ".linear").glob("*.pt"))
    linear_eval(config)
    assert len(calls) == 5 + 6 - 4  # of 6 steps, 4 were done and the fifth was lost
    head, _ = load_head(Path(backbone.output_dir) / name)
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)
    assert not (Path(backbone.output_dir) / ".linear").exists()


@pytest.mark.parametrize("damage", [b"damaged", b"", b"PK\x03\x04", bytes(500)])
def test_a_fit_is_cached_and_a_damaged_file_is_fitted_again(files, monkeypatch, damage):
    task = task_of(config_of(files, protocol="logistic"))
    model = fit_all(task, 1.0)
    monkeypatch.setattr(probe_logistic, "minimise", lambda *_: pytest.fail("fitted again"))
    assert torch.equal(fit_all(task, 1.0).weight, model.weight)
    monkeypatch.undo()
    next(task.scratch.folder.iterdir()).write_bytes(damage)
    assert torch.equal(fit_all(task, 1.0).weight, model.weight)


def test_saved_state_is_not_used_for_other_options_rows_or_seeds(files):
    task = task_of(config_of(files))
    others = [
        task_of(config_of(files, batch_size=7)),
        task_of(config_of(files), rows=np.arange(239)),
        task_of(config_of(files), seed=1),
    ]
    paths = {t.file("heads", 240) for t in (task, *others)} | {task.file("heads", 241)}
    assert len(paths) == 5
    torch.save(torch.load(files / "trainfeat.pth") + 1, files / "trainfeat.pth")
    assert task_of(config_of(files)).file("heads", 240) not in paths


# -- the report -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_fractions_and_seeds_have_their_rows_and_heads(files):
    report = linear_eval(
        config_of(files, train_fraction=(1.0, 0.1), num_seeds=3, lr=(0.1, 0.3), epochs=10)
    )
    rows = report["results"]
    assert [row["train_fraction"] for row in rows] == [0.1, 1.0]
    for row in rows:
        assert len(row["top1_of_seeds"]) == 3
        assert row["top1"] == pytest.approx(np.mean(row["top1_of_seeds"]), abs=1e-3)
        assert row["top1_std"] == pytest.approx(np.std(row["top1_of_seeds"], ddof=1), abs=1e-2)
        assert row["top1_ci95"][0] <= row["top1"] <= row["top1_ci95"][1]
        assert row["top5"] is None  # four classes
    assert len(set(rows[0]["top1_of_seeds"])) > 1
    assert json.loads((files / "linear.json").read_text())["results"] == rows
    for name in ("linear_head.safetensors", "linear_head_0.1.safetensors", "linear_classes.png"):
        assert (files / name).exists()


@pytest.mark.slow
def test_a_head_is_evaluated_again_to_the_same_numbers(files):
    trained = linear_eval(config_of(files, protocol="logistic", c=(0.1, 1.0)))
    head = files / "linear_logistic_head.safetensors"
    report = linear_eval(config_of(files, evaluate=str(head), output_dir=str(files / "again")))
    assert report["results"] == trained["results"]
    assert report["protocol"] == "logistic"
    assert (files / "again/linear_evaluate.json").exists()
    assert not list((files / "again").glob("*.safetensors"))


@pytest.mark.slow
def test_a_head_is_evaluated_on_images_of_some_of_its_classes_by_name(files, capsys):
    linear_eval(config_of(files, protocol="logistic", c=(1.0,)))
    head = files / "linear_logistic_head.safetensors"
    saved, _ = load_head(head)
    for split in ("train", "test"):  # labels 1 and 3 are then numbered 0 and 1
        labels = torch.load(files / f"{split}labels.pth")
        rows = (labels == 1) | (labels == 3)
        x = torch.load(files / f"{split}feat.pth")[rows]
        torch.save(labels[rows], files / f"{split}labels.pth")
        torch.save(x, files / f"{split}feat.pth")
    report = linear_eval(config_of(files, evaluate=str(head)))
    assert "the images are of 2 of the 4 classes of --evaluate" in capsys.readouterr().err
    right = saved.rank(x[:, None], torch.device("cpu"))[:, 0] == labels[rows]
    top1 = report["results"][0]["top1"]
    assert top1 == pytest.approx(100 * right.float().mean().item(), abs=1e-3)
    assert top1 > 60
    assert report["data"]["classes"] == 2


def test_a_head_without_a_class_of_the_images_is_refused(files):
    linear_eval(config_of(files, protocol="logistic", c=(1.0,)))
    head = files / "linear_logistic_head.safetensors"
    torch.save(torch.load(files / "testlabels.pth") + 1, files / "testlabels.pth")
    with pytest.raises(UserError, match=r"--evaluate .* has the classes 0, 1, 2, ... \(4\)"):
        linear_eval(config_of(files, evaluate=str(head)))


def test_other_files_and_heads_of_other_features_are_errors(files):
    linear_eval(config_of(files, lr=(0.1,), epochs=1))
    head = str(files / "linear_head.safetensors")
    for name in ("trainfeat", "testfeat"):
        torch.save(torch.load(files / f"{name}.pth")[:, :5], files / f"{name}.pth")
    with pytest.raises(ValueError, match=r"--evaluate .* of 6 channels, these have 5"):
        linear_eval(config_of(files, evaluate=head))
    (files / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"--evaluate .*{name}"):
            linear_eval(config_of(files, evaluate=str(files / name)))


def test_ranks_beyond_the_classes_are_empty():
    head = Head(torch.eye(3), torch.zeros(3), FeatureChoice(1, False), {})
    ranked = head.rank(torch.tensor([[[0.1, 0.3, 0.2]]]), torch.device("cpu"))
    assert ranked.tolist() == [[1, 2, 0, -1, -1]]


@pytest.mark.slow
def test_a_head_of_other_classes_or_sizes_is_refused(backbone, tmp_path):
    linear_eval(dino_config(backbone, epochs=1))
    head = str(Path(backbone.output_dir) / "linear_dino_head.safetensors")
    again = dino_config(backbone, evaluate=head, output_dir=str(tmp_path))
    assert linear_eval(again)["results"][0]["top1"] > 0
    with pytest.raises(ValueError, match=r"trained at --image_size 16, not 24"):
        linear_eval(dataclasses.replace(again, image_size=24))
    dump = tmp_path / "dump"
    dump.mkdir()
    for name, tensor in (("feat", torch.randn(20, 64)), ("labels", torch.arange(20) % 2)):
        for split in ("train", "test"):
            torch.save(tensor, dump / f"{split}{name}.pth")
    with pytest.raises(ValueError, match="--evaluate"):
        linear_eval(config_of(dump, evaluate=head))


def test_files_of_other_commands_stay(files):
    (files / ".linear").mkdir()
    (files / ".linear/other.pt").write_bytes(b"of another command")
    linear_eval(config_of(files, lr=(0.1,), epochs=1))
    assert [path.name for path in (files / ".linear").iterdir()] == ["other.pt"]


def test_nearly_everything_can_be_held_out(files):
    assert (
        linear_eval(config_of(files, protocol="logistic", c=(0.1, 1.0), held_out=0.99))["results"][
            0
        ]["top1"]
        > 0
    )
