"""`dino-xcit embed`: features of any images as a file."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from evaluation_helpers import random_folder, save_run

import dino_xcit
from dino_xcit.cli import main

COMMON = ["--accelerator", "cpu", "--devices", "1", "--num_workers", "0", "--precision", "32-true"]


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    return random_folder(tmp_path / "images")


def call(run, images, tmp_path, *words: str) -> int:
    data = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--no_cache"]
    return main(["embed", "--weights", str(run), *data, *COMMON, *words])


def expected(run, names: list[str]) -> torch.Tensor:
    """Features of the images one by one, (n, P, C)."""
    backbone = dino_xcit.load_backbone(str(run)).eval()
    with torch.no_grad():
        return backbone.layer_features(dino_xcit.preprocess(backbone)(names))


def names_of(tmp_path) -> list[str]:
    with (tmp_path / "out/embeddings.csv").open() as file:
        return [row["image"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("tokens", "parts"), [("class", [0]), ("patch_mean", [-1]), ("both", [0, -1])]
)
def test_rows_are_the_features_of_the_images_that_are_named(run, images, tmp_path, tokens, parts):
    (images / "val/a/bad.png").write_text("no image")
    assert call(run, images, tmp_path, "--tokens", tokens) == 0
    names = names_of(tmp_path)
    assert len(names) == len(list(images.rglob("*.png"))) - 1
    rows = np.load(tmp_path / "out/embeddings.npy")
    features = expected(run, names)[:, parts].flatten(1)
    np.testing.assert_allclose(rows, features.numpy(), rtol=1e-4, atol=1e-5)


def test_normalised_rows_have_length_one_and_the_same_direction(run, images, tmp_path):
    assert call(run, images, tmp_path) == 0
    rows = np.load(tmp_path / "out/embeddings.npy")
    assert call(run, images, tmp_path, "--normalize", "true", "--format", "npz") == 0
    file = np.load(tmp_path / "out/embeddings.npz")
    assert file["names"].tolist() == names_of(tmp_path)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(file["embeddings"], rows / lengths, rtol=1e-5)


def test_patches_have_a_row_each(run, images, tmp_path):
    assert call(run, images, tmp_path, "--tokens", "patches") == 0
    rows = np.load(tmp_path / "out/embeddings.npy")
    backbone = dino_xcit.load_backbone(str(run)).eval()
    with torch.no_grad():
        tokens = backbone.patch_tokens(dino_xcit.preprocess(backbone)(names_of(tmp_path)))
    np.testing.assert_allclose(rows, tokens.numpy(), rtol=1e-4, atol=1e-5)


def test_python_gets_the_array(run, images, tmp_path):
    rows = dino_xcit.embed(
        weights=str(run),
        data_path=str(images),
        output_dir=str(tmp_path / "out"),
        accelerator="cpu",
        num_workers=0,
        no_cache=True,
    )
    assert rows.shape == (len(names_of(tmp_path)), 64)
    assert rows.dtype == np.float32


def test_parquet_has_the_names_and_the_same_rows(run, images, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert call(run, images, tmp_path) == 0
    rows = np.load(tmp_path / "out/embeddings.npy")
    assert call(run, images, tmp_path, "--format", "parquet") == 0
    table = parquet.read_table(tmp_path / "out/embeddings.parquet").to_pydict()
    assert table["image"] == names_of(tmp_path)
    np.testing.assert_array_equal(np.array(table["embedding"], np.float32), rows)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--baselines"], "--baselines is True; expected false"),
        (
            ["--format", "parquet", "--tokens", "patches"],
            "expected npy or npz with --tokens",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(run, images, tmp_path, capsys, words, reason):
    assert call(run, images, tmp_path, *words) == 2
    assert reason in capsys.readouterr().err


def test_a_folder_without_images_is_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert call(run, tmp_path / "empty", tmp_path) == 2
    assert "empty has no images" in capsys.readouterr().err
