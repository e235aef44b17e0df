"""Linear protocols against plain loops and against scikit-learn; what they choose on, and what survives an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn

from dino_xcit.config.evaluation import LinearConfig
from dino_xcit.data.crops import sample_boxes
from dino_xcit.data.images import ShapeSet
from dino_xcit.evaluate import probe, probe_heads, probe_logistic
from dino_xcit.evaluate.features import FileFeatures, FrozenFeatures
from dino_xcit.evaluate.inputs import subjects
from dino_xcit.evaluate.linear import linear_eval
from dino_xcit.evaluate.probe import FeatureChoice, Head, ProbeTask, hold_out, load_head, stratified
from dino_xcit.evaluate.probe_dino import AugmentedCrops
from dino_xcit.evaluate.probe_heads import train_heads
from dino_xcit.evaluate.probe_logistic import fit
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


def work_of(config: LinearConfig, rows=None, seed=0) -> ProbeTask:
    subject = FileFeatures(config)
    folder = Path(str(config.load_features)) / ".linear"
    folder.mkdir(exist_ok=True)
    rows = np.arange(len(subject.labels("train"))) if rows is None else rows
    return ProbeTask(config, subject, launch(config), rows, seed, CLASSES, folder, set())


def axes_of(work: ProbeTask) -> probe_logistic.Axes:
    return probe_logistic.principal_axes(work, work.rows, FeatureChoice(1, False))


# -- which images ----------------------------------------------------------------------------------------------------


def test_a_share_of_each_class_is_taken_at_least_one_and_by_the_seed():
    labels = torch.tensor([0] * 200 + [1] * 50 + [2] * 3)
    rows = stratified(labels, 0.1, (0, 0))
    assert torch.bincount(labels[rows]).tolist() == [20, 5, 1]
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, stratified(labels, 0.1, (0, 0)))
    assert not np.array_equal(rows, stratified(labels, 0.1, (1, 0)))


def test_images_to_choose_on_are_not_trained_on_and_a_lone_image_of_a_class_is_trained_on(files):
    labels = torch.load(files / "trainlabels.pth")
    labels[labels == 3] = 2
    labels[17] = 3
    torch.save(labels, files / "trainlabels.pth")
    work = work_of(config_of(files, held_out=0.2), rows=np.arange(10, 240))
    train, held = hold_out(work)
    assert sorted([*train, *held]) == list(range(10, 240))
    assert 17 in train
    of_classes = torch.bincount(labels[10:], minlength=4)[:3]
    assert torch.bincount(labels[held]).tolist() == [round(0.2 * n) for n in of_classes.tolist()]


def test_one_image_of_each_class_leaves_nothing_to_choose_on(files):
    with pytest.raises(ValueError, match=r"--train_fraction .* single --lr"):
        linear_eval(config_of(files, train_fraction=(0.01,), epochs=1))
    report = linear_eval(config_of(files, train_fraction=(0.01,), lr=(0.1,), epochs=1))
    assert "held_out_top1" not in report["results"][0]["chosen"]


# -- heads -----------------------------------------------------------------------------------------------------------


def test_heads_trained_together_are_heads_trained_alone(files):
    config = config_of(files, epochs=3, batch_size=64)
    rates, rows = (0.5, 0.01, 3.0), np.arange(5, 205)
    weight, bias = train_heads(work_of(config), rows, FeatureChoice(1, False), rates, "")
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
    monkeypatch.setattr(probe_heads, "cosine", lambda done: steps.append(done) or 1.0)
    for batch_size, expected in ((240, 7), (60, 8), (10, 20)):
        steps.clear()
        train_heads(
            work_of(config_of(files, batch_size=batch_size)),
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
    weight, bias = train_heads(work_of(config), np.arange(240), FeatureChoice(1, False), (0.3,), "")
    head, _ = load_head(files / "linear_head.safetensors")
    assert torch.equal(head.weight, weight[0])
    assert torch.equal(head.bias, bias[0])
    x, y = torch.load(files / "testfeat.pth"), torch.load(files / "testlabels.pth")
    right = (F.linear(x, head.weight, head.bias).argmax(1) == y).float().mean().item()
    assert report["results"][0]["top1"] == pytest.approx(100 * right, abs=1e-3)
    assert right > 0.6


def test_validation_labels_choose_nothing(files):
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


def test_the_largest_rate_or_an_outermost_c_being_best_is_told(files, capsys):
    linear_eval(config_of(files, lr=(1e-6, 0.25), epochs=10))
    assert "largest tried, 0.25; try larger ones with --lr" in capsys.readouterr().err
    linear_eval(config_of(files, protocol="logistic", c=(1e-9, 1e-8)))
    assert "try others with --c" in capsys.readouterr().err


# -- logistic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1e-4, 0.1, 1.0, 300.0])
def test_logistic_regression_is_scikit_learns(files, c):
    LogisticRegression = pytest.importorskip("sklearn.linear_model").LogisticRegression
    x, y = torch.load(files / "trainfeat.pth"), torch.load(files / "trainlabels.pth")
    x[:, 0] = 100 + 7 * x[:, 0]  # badly conditioned
    x[:, 5] = 0  # and singular
    torch.save(x, files / "trainfeat.pth")
    work = work_of(config_of(files, protocol="logistic"))
    weight, bias = fit(work, np.arange(240), FeatureChoice(1, False), c, axes_of(work), None)
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


def test_features_that_do_not_fit_give_the_same_fit_and_so_does_another_start(files, monkeypatch):
    work, choice = work_of(config_of(files, protocol="logistic")), FeatureChoice(1, False)
    whole = fit(work, np.arange(240), choice, 1.0, axes_of(work), None)
    monkeypatch.setattr(probe_logistic, "HELD_BYTES", 0)
    monkeypatch.setattr(probe, "ROWS", 50)
    for path in work.folder.iterdir():
        path.unlink()
    warm = fit(work, np.arange(240), choice, 1.0, axes_of(work), (whole[0] + 1, whole[1] - 1))
    for one, other in zip(whole, warm, strict=True):
        torch.testing.assert_close(one - one.mean(0), other - other.mean(0), rtol=1e-2, atol=1e-3)


# -- dino ------------------------------------------------------------------------------------------------------------


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
    with subjects(config, launch(config)) as (_, evaluated, _):
        subject: FrozenFeatures = evaluated[0]
        crops = AugmentedCrops(subject.images["train"], 16, 1, 0)
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
                    x = subject.frozen.backbone(x)
                optimizer.zero_grad()
                F.cross_entropy(
                    layer(x), torch.tensor([label for _, label, _ in samples])
                ).backward()
                optimizer.step()
            scheduler.step()
    head, _ = load_head(Path(backbone.output_dir) / "linear_dino_head.safetensors")
    torch.testing.assert_close(head.weight, layer.weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.bias, layer.bias.detach(), rtol=1e-3, atol=1e-5)


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


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["heads", "dino"])
def test_an_interrupted_training_goes_on_bit_for_bit(backbone, protocol, monkeypatch, tmp_path):
    config = dino_config(
        backbone, protocol=protocol, lr=(0.5,), n_last_blocks=1, avgpool_patchtokens=False
    )
    config = dataclasses.replace(config, no_cache=False, cache_dir=str(tmp_path / "cache"))
    linear_eval(config)
    name = "linear_head.safetensors" if protocol == "heads" else "linear_dino_head.safetensors"
    expected, _ = load_head(Path(backbone.output_dir) / name)
    monkeypatch.setattr(probe.Saver, "due", lambda self: True)
    cosine, calls = probe_heads.cosine, []

    def interrupt(done):
        calls.append(done)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return cosine(done)

    monkeypatch.setattr(probe_heads, "cosine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        linear_eval(config)
    assert list((Path(backbone.output_dir) / ".linear").glob("*.pt"))
    linear_eval(config)
    assert len(calls) == 5 + 6 - 4  # of 6 steps, 4 were done and the fifth was lost
    head, _ = load_head(Path(backbone.output_dir) / name)
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)
    assert not (Path(backbone.output_dir) / ".linear").exists()


def test_fits_that_are_done_are_not_done_again_and_a_damaged_one_is(files, monkeypatch):
    work = work_of(config_of(files, protocol="logistic"))
    one = fit(work, np.arange(240), FeatureChoice(1, False), 1.0, axes_of(work), None)
    monkeypatch.setattr(probe_logistic, "_minimise", lambda *_: pytest.fail("fitted again"))
    assert torch.equal(
        fit(work, np.arange(240), FeatureChoice(1, False), 1.0, axes_of(work), None)[0], one[0]
    )
    monkeypatch.undo()
    next(work.folder.iterdir()).write_bytes(b"damaged")
    assert torch.equal(
        fit(work, np.arange(240), FeatureChoice(1, False), 1.0, axes_of(work), None)[0], one[0]
    )


def test_what_was_learned_is_not_taken_for_other_options_rows_or_seeds(files):
    work = work_of(config_of(files))
    others = [
        work_of(config_of(files, batch_size=7)),
        work_of(config_of(files), rows=np.arange(239)),
        work_of(config_of(files), seed=1),
    ]
    paths = {w.path("heads", 240) for w in (work, *others)} | {work.path("heads", 241)}
    assert len(paths) == 5
    torch.save(torch.load(files / "trainfeat.pth") + 1, files / "trainfeat.pth")
    assert work_of(config_of(files)).path("heads", 240) not in paths


# -- the report ------------------------------------------------------------------------------------------------------


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


def test_a_head_is_evaluated_again_to_the_same_numbers(files):
    trained = linear_eval(config_of(files, protocol="logistic", c=(0.1, 1.0)))
    head = files / "linear_logistic_head.safetensors"
    report = linear_eval(config_of(files, evaluate=str(head), output_dir=str(files / "again")))
    assert report["results"] == trained["results"]
    assert report["protocol"] == "logistic"
    assert (files / "again/linear_evaluate.json").exists()
    assert not list((files / "again").glob("*.safetensors"))


def test_what_is_no_head_or_of_other_features_is_an_error(files):
    linear_eval(config_of(files, lr=(0.1,), epochs=1))
    head = str(files / "linear_head.safetensors")
    for name in ("trainfeat", "testfeat"):
        torch.save(torch.load(files / f"{name}.pth")[:, :5], files / f"{name}.pth")
    with pytest.raises(ValueError, match=r"--evaluate .* takes 6 numbers, these features have 5"):
        linear_eval(config_of(files, evaluate=head))
    (files / "text.safetensors").write_text("no")
    for name in ("text.safetensors", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"--evaluate .*{name}"):
            linear_eval(config_of(files, evaluate=str(files / name)))


def test_ranks_beyond_the_classes_are_empty():
    head = Head(torch.eye(3), torch.zeros(3), FeatureChoice(1, False), {})
    ranked = head.rank(torch.tensor([[[0.1, 0.3, 0.2]]]), torch.device("cpu"))
    assert ranked.tolist() == [[1, 2, 0, -1, -1]]


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


def test_what_other_commands_learned_stays(files):
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
