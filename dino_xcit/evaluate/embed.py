"""Features of any images as a file: `dino-xcit embed`.

Axes: n images, N patches, D numbers of a row.
"""

from __future__ import annotations

import csv
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F

from dino_xcit.data.images import Subset, open_images
from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import FrozenFeatures, select_parts
from dino_xcit.evaluate.inputs import CLASSIFICATION, open_inputs
from dino_xcit.evaluate.predict import SPLIT, open_all
from dino_xcit.evaluate.report import output_folder
from dino_xcit.evaluate.segmentation import patch_features
from dino_xcit.files import replacing
from dino_xcit.run_folder import EMBEDDINGS
from dino_xcit.runtime import launch, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from dino_xcit.config.evaluation import EmbedConfig
    from dino_xcit.data.images import ImageSet

ROWS = 4096
"""images whose features are in memory at a time"""


def embed(config: EmbedConfig) -> np.ndarray:
    """Write the features of all images, and the image of each row.

    An interrupted call continues: features are cached batch by batch.

    Returns:
        The features, float32 (n, D), or (n, N, D) with `--tokens patches`; memory-mapped with
        `--format npy`.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    if config.format == "parquet":
        _pyarrow()
    folder, fabric = output_folder(config), launch(config)
    path = folder / f"{EMBEDDINGS}.{config.format}"
    take = patch_features if config.tokens == "patches" else CLASSIFICATION.take
    with open_inputs(config, fabric, CLASSIFICATION._replace(open=_open, take=take)) as inputs:
        features = inputs.features[0]
        assert isinstance(features, FrozenFeatures)
        tokens, indices = features.split(SPLIT)
        tokens = _chosen(config, tokens)
        names = [features.images[SPLIT].name(index) for index in indices.tolist()]
        if fabric.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            WRITERS[config.format](path, names, tokens, config.normalize)
            if features.seconds:
                say(f"{features.extracted / features.seconds:.0f} images/s")
            shape = " x ".join(map(str, tokens.shape[1:]))
            print(f"{path}: {len(names)} images, {shape} numbers each")
    return _read(path)


def _open(config: EmbedConfig) -> tuple[Mapping[str, ImageSet], dict[str, int]]:
    """Open the images; an image's label is its index."""
    if config.dataset is None:
        return open_all(config)
    images = open_images(config, "train")
    assert images is not None
    every = Subset(images, np.arange(len(images)))
    every.labels = np.arange(len(images))
    return {SPLIT: every}, {}


def _chosen(config: EmbedConfig, tokens: Tensor) -> Tensor:
    """Features (n, P, C) -> those that --tokens names, (n, D) or (n, N, D)."""
    if config.tokens == "patches":
        return tokens
    parts = tokens.shape[1]
    if parts == 1 and config.tokens != "class":
        raise UserError(
            f"--tokens {config.tokens}: this network has one feature vector per image; expected "
            "--tokens class"
        )
    class_token, patch_mean = [0], [parts - 1]
    choice = {"class": class_token, "patch_mean": patch_mean, "both": class_token + patch_mean}
    return select_parts(tokens, choice[config.tokens])


def _blocks(tokens: Tensor, normalize: bool) -> Iterator[np.ndarray]:
    """The rows in float32, a few at a time."""
    for start in range(0, len(tokens), ROWS):
        block = tokens[start : start + ROWS].float()
        yield (F.normalize(block, dim=-1) if normalize else block).numpy()


# -- files ---------------------------------------------------------------------------------------


def _write_npy(path: Path, names: list[str], tokens: Tensor, normalize: bool) -> None:
    with replacing(path.with_suffix(".csv")) as beside, beside.open("w", newline="") as file:
        csv.writer(file).writerows([("row", "image"), *enumerate(names)])
    with replacing(path) as beside:
        array = np.lib.format.open_memmap(beside, "w+", np.float32, tuple(tokens.shape))
        start = 0
        for block in _blocks(tokens, normalize):
            array[start : start + len(block)] = block
            start += len(block)
        array.flush()


def _write_npz(path: Path, names: list[str], tokens: Tensor, normalize: bool) -> None:
    embeddings = np.concatenate(list(_blocks(tokens, normalize)))
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, embeddings=embeddings, names=np.array(names))


def _write_parquet(path: Path, names: list[str], tokens: Tensor, normalize: bool) -> None:
    arrow, parquet = _pyarrow()
    vector = arrow.list_(arrow.float32(), tokens.shape[1])
    schema = arrow.schema([("image", arrow.string()), ("embedding", vector)])
    start = 0
    with replacing(path) as beside, parquet.ParquetWriter(beside, schema) as writer:
        for block in _blocks(tokens, normalize):
            column = arrow.FixedSizeListArray.from_arrays(
                arrow.array(block.ravel()), block.shape[1]
            )
            images = arrow.array(names[start : start + len(block)])
            writer.write_table(arrow.table([images, column], schema=schema))
            start += len(block)


WRITERS = {"npy": _write_npy, "npz": _write_npz, "parquet": _write_parquet}


def _read(path: Path) -> np.ndarray:
    """The rows of a file that `embed` has written."""
    if path.suffix == ".npy":
        rows: np.ndarray = np.load(path, mmap_mode="r")
    elif path.suffix == ".npz":
        rows = np.load(path)["embeddings"]
    else:
        column = _pyarrow()[1].read_table(path)["embedding"].combine_chunks()
        rows = column.flatten().to_numpy().reshape(len(column), -1)
    return rows


def _pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"--format parquet: {error}; expected pip install 'dino_xcit[parquet]', or --format npy"
        ) from None
