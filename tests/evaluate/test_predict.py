"""Saved heads on images without labels: classes as a CSV file, masks as PNG files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from evaluation_helpers import CPU_ONLY, random_folder, save_run
from PIL import Image

from dino_xcit.cli import main
from dino_xcit.config.evaluation import LinearConfig
from dino_xcit.data.framing import Transform
from dino_xcit.evaluate.features import FeatureExtractor
from dino_xcit.evaluate.linear import linear_eval
from dino_xcit.evaluate.predict import segment
from dino_xcit.evaluate.seg_head import LinearSegHead
from dino_xcit.evaluate.segmentation import PatchPixels, patch_features

COMMON = ["--accelerator", "cpu", "--devices", "1", "--num_workers", "0", "--no_cache"]


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


def test_classes_of_the_evaluated_images_are_predicted_again_without_labels(run, tmp_path, capsys):
    images = random_folder(tmp_path / "images")
    typed = ["linear-eval", "--weights", str(run), *COMMON]
    trained = ["--data_path", str(images), "--protocol", "logistic", "--c", "1"]
    assert main([*typed, *trained]) == 0
    head = str(run / "linear_logistic_head.safetensors")
    (images / "val/a/bad.png").write_text("no image")
    predict = ["--data_path", str(images / "val"), "--predict", head]
    assert main([*typed, *predict, "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "bad.png: not an image" in said.err
    assert said.out.strip().endswith("predictions.csv, 4 images")
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [
        str(images / "val" / name) for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    ]
    assert all(row["class"] == "ab"[int(row["label"])] for row in rows)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    right = [f"/{row['class']}/" in row["image"] for row in rows]
    report = json.loads((run / "linear_logistic.json").read_text())
    assert report["results"][0]["top1"] == pytest.approx(100 * np.mean(right))


@pytest.mark.slow
def test_masks_have_the_size_of_their_images_and_the_values_of_the_training_masks(run, tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 0), ("train", 1), ("val", 2)):
        mask = np.zeros((20, 30), np.uint8)
        mask[:, 8 + 6 * number :] = 200
        image = (rng.integers(0, 60, (20, 30, 3)) + (mask > 0)[..., None] * 150).astype(np.uint8)
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / "data" / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / kind / split / f"{number}.png")
    typed = ["seg-eval", "--weights", str(run), *COMMON]
    assert main([*typed, "--data_path", str(tmp_path / "data"), "--epochs", "60"]) == 0
    head, images = str(run / "seg_head.safetensors"), tmp_path / "data/images"
    assert main([*typed, "--data_path", str(images), "--predict", head]) == 0
    for name in ("train/0", "val/2"):
        with Image.open(run / "seg_masks" / f"{name}.png.png") as file:
            predicted = np.array(file)
        truth = np.array(Image.open(tmp_path / "data/masks" / f"{name}.png"))
        assert predicted.shape == truth.shape
        assert set(np.unique(predicted)) == {0, 200}
        assert (predicted == truth).mean() > 0.8
    for _ in range(2):  # the masks of the first call are no images of the second
        again = ["--data_path", str(images), "--predict", head, "--output_dir", str(images)]
        assert main([*typed, *again]) == 0
    assert len(list((images / "seg_masks").rglob("*.png"))) == 3


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40), (50, 20)])
def test_crops_cover_the_whole_image(height, width):
    """With pixels as tokens and 1-pixel patches, each pixel's class depends on it alone."""
    transform = Transform(16, 16, (0.5,), (0.5,))
    extractor = FeatureExtractor(
        PatchPixels(1), transform, torch.device("cpu"), take=patch_features
    )
    head = LinearSegHead(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    image[:, : height // 2] = 255
    predicted = segment(image, extractor, head)
    assert predicted.shape == (height, width)
    assert (predicted[: height // 2 - 2] == 1).all()
    assert (predicted[height // 2 + 2 :] == 0).all()


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("linear-eval", [], "--data_path is None; expected a folder of images, for --predict"),
        ("seg-eval", [], "--data_path is None; expected a folder of images, for --predict"),
        ("linear-eval", ["--data_path", "D", "--baselines"], "--baselines is True"),
        ("linear-eval", ["--data_path", "D", "--evaluate", "x"], "--evaluate is 'x'"),
        ("linear-eval", ["--data_path", "D"], "is not a head that linear-eval wrote"),
        ("seg-eval", ["--data_path", "D"], "is not a head that seg-eval wrote"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(tmp_path, capsys, command, more, message):
    (tmp_path / "head").write_text("no")
    typed = [command, "--weights", "W", "--predict", str(tmp_path / "head"), *more]
    assert main(typed) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_folder_that_is_not_there_is_named(tmp_path, run, capsys):
    images = str(random_folder(tmp_path / "images"))
    typed = ["linear-eval", "--weights", str(run), *COMMON, "--protocol", "logistic", "--c", "1"]
    assert main([*typed, "--data_path", images]) == 0
    head = str(run / "linear_logistic_head.safetensors")
    assert main([*typed, "--data_path", f"{images}/nowhere", "--predict", head]) == 2
    assert "nowhere is no folder; expected a folder of images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_linear_head_does_not_segment(run, tmp_path, capsys):
    options = {**vars(CPU_ONLY), "weights": str(run), "no_cache": True, "protocol": "logistic"}
    images = str(random_folder(tmp_path / "images"))
    linear_eval(LinearConfig(**{**options, "data_path": images, "c": (1.0,)}))
    head = str(run / "linear_logistic_head.safetensors")
    typed = ["seg-eval", "--weights", str(run), "--data_path", images, "--predict", head, *COMMON]
    assert main(typed) == 2
    assert "is a head of linear-eval; expected one of seg-eval" in capsys.readouterr().err
