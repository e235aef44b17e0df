"""Segmentation by a linear layer: masks are framed as images, the head learns, scores are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import save_run
from helpers import TINY
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from torchvision.transforms import v2

from dino_xcit.cli import main
from dino_xcit.config.evaluation import SegConfig
from dino_xcit.data import shapes
from dino_xcit.data.framing import Transform
from dino_xcit.data.masked import VOID, MaskDataset, MaskedFiles, MaskedShapes, open_masked
from dino_xcit.evaluate.seg_head import (
    LinearSegHead,
    MaskedFeatures,
    mask_values,
    standardisation,
    train,
)
from dino_xcit.evaluate.seg_score import PixelCounts, count_batch, count_pixels, measures, result
from dino_xcit.evaluate.segmentation import PatchPixels, patch_features
from dino_xcit.model.xcit import XCiT

FABRIC = Fabric(accelerator="cpu", devices=1)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "run"
    return save_run(folder, dataclasses.replace(TINY, num_images=60), seed=1)


def options(run: Path, folder: Path) -> list[str]:
    flags = {"--weights": run, "--cache_dir": folder / "cache", "--output_dir": folder / "out"}
    words = [str(word) for pair in flags.items() for word in pair]
    return ["seg-eval", *words, "--accelerator", "cpu", "--precision", "32-true", "--epochs", "2"]


@pytest.mark.slow
def test_the_command_prints_writes_and_caches(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", 100)
    typed = [*options(run, tmp_path), "--image_size", "32", "--baselines"]
    assert main(typed) == 0
    report = json.loads((tmp_path / "out/seg.json").read_text())
    printed = capsys.readouterr().out
    (row,) = report["results"]
    low, high = row["miou_ci95"]
    assert low < row["miou"] < high
    assert f"{row['miou']:.1f} [{low:.1f}, {high:.1f}]" in printed
    assert list(row["iou"]) == ["ground", *shapes.CLASSES]
    assert row["miou"] == pytest.approx(np.mean(list(row["iou"].values())), abs=0.01)
    assert list(report["baselines"]) == ["raw pixels", "xcit_pico2_p4, untrained"]
    assert report["data"] == {"train": 60, "validation": 100, "classes": 11, "unreadable": 0}
    assert report["feature_extraction"]["images"] == 3 * 160
    head = load_file(tmp_path / "out/seg_head.safetensors")
    assert head["weight"].shape == (11, 64)
    with Image.open(tmp_path / "out/seg_classes.png") as picture:
        assert picture.size[0] > 1000

    assert main(typed) == 0
    again = json.loads((tmp_path / "out/seg.json").read_text())
    assert again["feature_extraction"]["images"] == 0
    assert again["results"] == report["results"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run, tmp_path, run_cli):
    root = ade(tmp_path / "ade", copies=7)
    found = []
    for devices in ("1", "2"):
        typed = [*options(run, tmp_path / devices), "--data_path", str(root), "--batch_size", "5"]
        typed += ["--devices", devices, "--batch_size_per_gpu", "3"]
        assert main(typed) == 0 if devices == "1" else run_cli(*typed).returncode == 0
        found.append(json.loads((tmp_path / devices / "out/seg.json").read_text()))
    assert found[0]["data"] == found[1]["data"]
    assert found[0]["results"][0]["iou"] == pytest.approx(found[1]["results"][0]["iou"], abs=0.5)


# -- images with masks ----------------------------------------------------------------------------


def test_masks_of_shapes_contain_texture_and_ground():
    images = MaskedShapes(3, "train", 20, 3)
    for number in (0, 7, 13):
        shape = shapes.draw_shape(3, "train", number)
        expected = np.where(shape.mask, shape.label + 1, 0)
        np.testing.assert_array_equal(images.mask(number), expected)


def save(path: Path, array: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def photo(height: int = 40, width: int = 48) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ade(root: Path, masks: str = "annotations", copies: int = 1) -> Path:
    """Two training images and one validation image, left half 0 and right half 1; or copies."""
    for split, names in {"training": ("a", "sub/b"), "validation": ("c",)}.items():
        for name in (f"{name}{n or ''}" for name in names for n in range(copies)):
            save(root / "images" / split / f"{name}.png", photo())
            mask = np.zeros((40, 48), np.uint8)
            mask[:, 24:] = 1
            save(root / masks / split / f"{name}.png", mask)
    return root


def test_folders_as_ade20k_and_lists_as_voc(tmp_path):
    images, _ = open_masked(SegConfig(weights="-", data_path=str(ade(tmp_path / "ade"))))
    assert [len(images[split]) for split in ("train", "validation")] == [2, 1]
    assert images["train"].name(1).endswith("sub/b.png")

    voc = tmp_path / "voc"
    for name in "abc":
        save(voc / "JPEGImages" / f"{name}.jpg", photo())
        save(
            voc / "SegmentationClass" / f"{name}.png", np.full((40, 48), 9, np.uint8), palette=True
        )
    save(voc / "JPEGImages/without_a_mask.jpg", photo())
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\nc\nwithout_a_mask\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("b\n")
    images, _ = open_masked(SegConfig(weights="-", data_path=str(voc)))
    assert [Path(images["train"].name(i)).stem for i in range(2)] == ["a", "c"]
    assert len(images["train"]) == 2
    assert (images["validation"].mask(0) == 9).all()  # the palette's number, not its colour


def test_masks_are_framed_as_their_images(tmp_path):
    mask = RNG.integers(0, 5, (50, 71), dtype=np.uint8)
    save(tmp_path / "i.png", photo(50, 71))
    save(tmp_path / "m.png", mask)
    images = MaskedFiles([tmp_path / "i.png"], [tmp_path / "m.png"], 3)
    framed, readable = MaskDataset(images, Transform(24, 32, (), ()), (3,))[0]
    assert readable
    reference = v2.Compose([v2.Resize(32, v2.InterpolationMode.NEAREST_EXACT), v2.CenterCrop(24)])
    expected = reference(torch.from_numpy(mask)[None])[0]
    torch.testing.assert_close(
        framed, torch.where(expected == 3, VOID, expected.int()).to(torch.int16)
    )


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((40, 47), np.uint8), "the mask has 40x47 pixels, the image 40x48"),
        (RNG.integers(0, 9, (40, 48, 3), dtype=np.uint8), "a.png: is in colour (mode RGB)"),
        (np.full((40, 48), 65535, np.uint16), "the mask has the value 65535"),
        (None, "annotations/training/a.png: not an image"),
    ],
    ids=["size", "colour", "value", "damaged"],
)
@pytest.mark.slow
def test_images_without_a_usable_mask_are_left_out(run, tmp_path, capsys, mask, reason):
    root = ade(tmp_path)
    bad = root / "annotations/training/a.png"
    bad.write_bytes(b"not an image") if mask is None else save(bad, mask)
    assert main([*options(run, tmp_path), "--data_path", str(root)]) == 0
    said = capsys.readouterr().err
    assert "1 of 2 train images have no mask that can be used" in said
    assert f"images/training/a.png: {'mask ' if 'a.png:' in reason else ''}" in said
    assert reason in said
    report = json.loads((tmp_path / "out/seg.json").read_text())
    assert report["data"]["unreadable"] == 1
    assert report["data"]["classes"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --weights"),
        (
            ["--weights", "RUN", "--dataset", "torch/cifar10"],
            "--dataset torch/cifar10 has no masks",
        ),
        (["--weights", "RUN", "--data_path", "ROOT/images"], "has no masks/"),
        (["--weights", "RUN", "--data_path", "ROOT/annotations/training"], "has no images/"),
        (["--weights", "RUN", "--data_path", "ROOT/half"], "has no masks/"),
        (["--weights", "RUN", "--data_path", "ROOT/flat"], "has no train images"),
        (
            ["--weights", "RUN", "--data_path", "ROOT", "--num_images", "3"],
            "--num_images 3 is more than the 2",
        ),
        (["--weights", "RUN", "--lr", "0"], "--lr is 0.0"),
        (["--weights", "RUN", "--ignore_label", "65536"], "--ignore_label is (65536,)"),
        (["--weights", "RUN", "--image_size", "30"], "--image_size 30"),
        (["--weights", "RUN", "--load_features", "x"], "unknown option --load_features"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, said):
    root = ade(tmp_path / "ade")
    save(root / "half/images/train/a.png", photo())
    save(root / "flat/images/a.png", photo())
    save(root / "flat/masks/a.png", photo()[..., 0])
    arguments = [word.replace("RUN", str(run)).replace("ROOT", str(root)) for word in arguments]
    assert (
        main(
            ["seg-eval", *arguments, "--accelerator", "cpu", "--output_dir", str(tmp_path / "out")]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


# -- masks whose score would mean nothing -----------------------------------------------------


def binary(root: Path, foreground: int) -> Path:
    """Masks of 0 and another value; the foreground is bright."""
    for split in ("train", "val"):
        for number in range(4):
            mask = np.zeros((40, 48), np.uint8)
            mask[:, 10 + 5 * number :] = foreground
            image = RNG.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            image[mask > 0] += 150
            save(root / "images" / split / f"{number}.png", image)
            save(root / "masks" / split / f"{number}.png", mask)
    return root


def test_masks_of_0_and_255_are_refused_with_the_flag_that_scores_them(run, tmp_path, capsys):
    typed = [*options(run, tmp_path), "--data_path", str(binary(tmp_path / "binary", 255))]
    assert main(typed) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the training masks have a single class, 0" in error
    assert "masks of 0 and 255, type --ignore_label without a value" in error
    assert main([*typed, "--ignore_label"]) == 0
    assert "2 classes, the values of the training masks: 0, 255" in capsys.readouterr().err
    report = json.loads((tmp_path / "out/seg.json").read_text())
    assert report["data"]["classes"] == 2
    assert list(report["results"][0]["iou"]) == ["class 0", "class 255"]
    assert load_file(tmp_path / "out/seg_head.safetensors")["bias"].shape == (2,)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_values_of_the_masks(run, tmp_path):
    scores = []
    for value in (1, 200):
        folder = tmp_path / str(value)
        RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        typed = [*options(run, folder), "--data_path", str(binary(folder / "data", value))]
        assert main([*typed, "--epochs", "20"]) == 0
        scores.append(json.loads((folder / "out/seg.json").read_text())["results"][0])
    assert list(scores[0].pop("iou").values()) == list(scores[1].pop("iou").values())
    assert scores[0] == scores[1]
    assert scores[0]["miou"] > 60


@pytest.mark.slow
def test_masks_with_the_values_of_a_compressed_picture_are_reported(run, tmp_path, capsys):
    root = ade(tmp_path / "smeared")
    for path in (root / "annotations").rglob("*.png"):
        save(path, RNG.integers(0, 200, (40, 48), dtype=np.uint8))
    assert main([*options(run, tmp_path), "--data_path", str(root)]) == 0
    assert "is each the number of a class?" in capsys.readouterr().err
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(path, "JPEG")
    assert main([*options(run, tmp_path), "--data_path", str(root)]) == 2
    assert "a JPEG, whose compression changes the numbers" in capsys.readouterr().err


# -- features and layer ---------------------------------------------------------------------------


def test_our_patch_tokens_and_the_pixels_of_a_patch():
    network = XCiT("xcit_pico2_p4").eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(patch_features(network, x), network.forward_features(x)[:, 1:])
    pixels = PatchPixels(4).patch_tokens(x)
    torch.testing.assert_close(pixels[1, 6].unflatten(0, (3, 4, 4)), x[1, :, 4:8, 8:12])


def masked_with(features: torch.Tensor, masks: torch.Tensor) -> MaskedFeatures:
    indices = torch.arange(len(masks))
    return MaskedFeatures(features, masks.to(torch.int16), indices, indices)


def test_standardisation_is_that_of_all_tokens():
    features = torch.randn(50, 9, 6) * 3 + 1
    mean, std = standardisation(masked_with(features, torch.zeros(50, 3, 3)))
    torch.testing.assert_close(mean, features.flatten(0, 1).mean(0))
    torch.testing.assert_close(std, features.flatten(0, 1).std(0, correction=0))


@pytest.mark.slow
def test_the_layer_reaches_the_minimum_of_the_convex_objective():
    """On one patch an image this is multinomial regression: many steps end where L-BFGS ends."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 1, 3, generator=generator) * torch.tensor([1.0, 20.0, 0.1]) + 5
    labels = (
        (features[:, 0] - 5) / torch.tensor([1.0, 20.0, 0.1])
        + torch.randn(120, 3, generator=generator)
    ).argmax(1)
    masked = masked_with(features, labels[:, None, None].expand(-1, 2, 2))
    config = SegConfig(weights="-", epochs=1500, batch_size=120, lr=0.05)
    head = train(config, masked, 3, FABRIC, "test")

    mean, std = standardisation(masked)
    x = (features[:, 0] - mean) / std
    weight, bias = torch.zeros(3, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels)
        loss.backward()
        return loss

    optimizer.step(objective)
    found = F.linear(features[:, 0], *head).log_softmax(-1)
    torch.testing.assert_close(
        found, F.linear(x, weight, bias).log_softmax(-1).detach(), atol=0.01, rtol=0
    )


def test_void_pixels_are_not_trained_on():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 4, 5, generator=generator)
    masks = torch.randint(0, 3, (30, 8, 8), generator=generator)
    config = SegConfig(weights="-", epochs=2, batch_size=10)
    void = torch.rand(30, 8, 8, generator=generator) < 0.5
    voided = train(config, masked_with(features, masks.masked_fill(void, VOID)), 3, FABRIC, "test")
    whole = train(config, masked_with(features, masks), 3, FABRIC, "test")
    assert not torch.allclose(voided.weight, whole.weight)
    all_void = train(config, masked_with(features, torch.full_like(masks, VOID)), 3, FABRIC, "test")
    assert not all_void.weight.any()


def test_logits_are_resized_bilinearly():
    head = LinearSegHead(torch.eye(2), torch.zeros(2))
    tokens = torch.randn(1, 9, 2)
    expected = F.interpolate(
        tokens.mT.reshape(1, 2, 3, 3), (6, 6), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(head(tokens, 6), expected)


# -- score ----------------------------------------------------------------------------------------


def test_counts_and_measures_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(2)
    truth = torch.randint(0, 4, (6, 7, 7), generator=generator)
    guess = torch.where(torch.rand(6, 7, 7, generator=generator) < 0.6, truth, (truth + 1) % 4)
    truth[0, :3] = VOID
    both, true, predicted = count_batch(guess, truth, 4)
    valid = truth != VOID
    for image in range(6):
        expected = jaccard_score(
            truth[image][valid[image]], guess[image][valid[image]], labels=range(4), average=None
        )
        found = both[image] / (true + predicted - both)[image]
        np.testing.assert_allclose(found, expected)
    found = measures(*(part.double().sum(0).numpy() for part in (both, true, predicted)))
    assert found["miou"] == pytest.approx(
        jaccard_score(truth[valid], guess[valid], average="macro")
    )
    assert found["pixel_accuracy"] == pytest.approx((truth == guess)[valid].double().mean().item())


def test_a_class_without_training_images_counts_as_wrong():
    truth = torch.tensor([[[0, 5], [1, 5]]])
    counts = PixelCounts(*count_batch(torch.tensor([[[0, 0], [1, 1]]]), truth, 6))
    row = result(counts, ["a", "b", "c", "d", "e", "f"], seed=0)
    assert row["iou"] == {"a": 50, "b": 50, "f": 0}
    assert row["miou"] == pytest.approx(100 / 3, abs=1e-3)
    assert row["pixel_accuracy"] == 50


def test_masks_without_any_class_are_an_error():
    with pytest.raises(
        ValueError,
        match="no pixel of the validation masks has a class; --ignore_label leaves nothing",
    ):
        mask_values(masked_with(torch.zeros(2, 4, 3), torch.full((2, 6, 6), VOID)), "validation")


def test_intervals_are_of_resampled_images_and_classes_that_do_not_occur_do_not_count():
    rng = np.random.default_rng(3)
    both = rng.integers(0, 50, (40, 3)).astype(float)
    true, predicted = both + rng.integers(0, 50, (40, 3)), both + rng.integers(0, 50, (40, 3))
    for part in (both, true, predicted):
        part[:, 2] = 0  # does not occur
    row = result(
        PixelCounts(*(torch.from_numpy(p).long() for p in (both, true, predicted))),
        ["a", "b", "c"],
        seed=0,
    )
    assert list(row["iou"]) == ["a", "b"]
    naive = []
    for _ in range(2000):
        rows = rng.integers(0, 40, 40)
        b, t, p = (part[rows, :2].sum(0) for part in (both, true, predicted))
        naive.append(100 * (b / (t + p - b)).mean())
    np.testing.assert_allclose(row["miou_ci95"], np.quantile(naive, [0.025, 0.975]), atol=0.6)


def test_counting_in_batches_is_counting_at_once():
    generator = torch.Generator().manual_seed(4)
    masked = masked_with(
        torch.randn(11, 4, 3, generator=generator),
        torch.randint(0, 3, (11, 6, 6), generator=generator),
    )
    head = LinearSegHead(torch.randn(3, 3, generator=generator), torch.zeros(3))
    of_batches, at_once = (count_pixels(head, masked, 3, FABRIC, size, "test") for size in (4, 11))
    for one, other in zip(of_batches, at_once, strict=True):
        torch.testing.assert_close(one, other)
    assert of_batches.true.sum() == 11 * 36
