"""The store of features and the pass that fills it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import CPU, TRANSFORM, backbone_of, random_images, truncate

from dino_xcit.evaluate.feature_store import DONE, NOT_DONE, UNREADABLE, FeatureStore, extract
from dino_xcit.evaluate.features import FeatureExtractor


def filled_store(folder, shape=(4, 2, 3), dtype="float32"):
    store = FeatureStore.on_disk(folder, shape, dtype)
    store.features[:] = np.arange(np.prod(shape)).reshape(shape)
    store.mark(np.array([0, 2, 3]), np.array([True, False, True]))


def contents(store):
    return store.features.tolist(), store.state.tolist()


def test_a_store_on_disk_is_opened_again_unchanged(tmp_path):
    new = FeatureStore.on_disk(tmp_path / "deep" / "folder", (4, 2, 3), "float16")
    assert (new.features.shape, new.features.dtype) == ((4, 2, 3), np.float16)
    assert new.state.tolist() == 4 * [NOT_DONE]
    filled_store(tmp_path / "store")
    again = FeatureStore.on_disk(tmp_path / "store", (4, 2, 3), "float32")
    assert again.features.flatten().tolist() == list(range(24))
    assert again.state.tolist() == [DONE, NOT_DONE, UNREADABLE, DONE]


BREAKING = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an array"),
    "missing": lambda path: path.unlink(),
    "other dimensions": lambda path: np.save(path, np.ones((4, 1), np.float32)),
    "other dtype": lambda path: np.save(path, np.ones(np.load(path).shape)),
    "objects": lambda path: np.save(path, np.array([{}] * 4), allow_pickle=True),
    "zip": lambda path: np.savez(path.open("wb"), np.ones(4)),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", ["features.npy", "state.npy"])
@pytest.mark.parametrize("how", BREAKING)
def test_a_store_with_a_broken_file_is_replaced(tmp_path, name, how):
    filled_store(tmp_path)
    BREAKING[how](tmp_path / name)
    store = FeatureStore.on_disk(tmp_path, (4, 2, 3), "float32")
    assert contents(store) == (np.zeros((4, 2, 3)).tolist(), 4 * [NOT_DONE])
    assert {path.name for path in tmp_path.iterdir()} == {"features.npy", "state.npy"}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 2, 3), "float32"), ((4, 3, 2), "float32"), ((4, 2, 3), "float16")]
)
def test_a_store_of_other_features_is_replaced(tmp_path, shape, dtype):
    filled_store(tmp_path)
    store = FeatureStore.on_disk(tmp_path, shape, dtype)
    assert contents(store) == (np.zeros(shape).tolist(), shape[0] * [NOT_DONE])
    assert store.features.dtype == dtype


def test_no_old_state_is_left_beside_features_when_the_replacement_is_interrupted(
    tmp_path, monkeypatch
):
    filled_store(tmp_path)
    truncate(tmp_path / "features.npy")
    unlink = Path.unlink

    def interrupted(path, missing_ok=False):
        if path.name == "features.npy":
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore.on_disk(tmp_path, (4, 2, 3), "float32")
    assert not (tmp_path / "state.npy").exists()


def test_rows_are_marked_only_after_their_features_are_on_disk(tmp_path, monkeypatch):
    store = FeatureStore.on_disk(tmp_path, (4, 2, 3), "float32")
    flushed = []
    monkeypatch.setattr(
        np.memmap,
        "flush",
        lambda array: flushed.append((Path(array.filename).name, store.state.tolist())),
    )
    store.mark(np.array([1, 3]), np.array([True, False]))
    marked = [NOT_DONE, DONE, NOT_DONE, UNREADABLE]
    assert flushed == [("features.npy", 4 * [NOT_DONE]), ("state.npy", marked)]


def test_a_store_in_memory_has_nothing_done():
    store = FeatureStore.in_memory((3, 2), "float16")
    assert contents(store) == (np.zeros((3, 2)).tolist(), 3 * [NOT_DONE])
    assert store.features.dtype == np.float16


class Numbered(torch.utils.data.Dataset):
    """Image i is a grey square of i; every seventh cannot be read."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.full((1, 2, 2), index, dtype=torch.uint8), index % 7 != 0


class Counting:
    """An image's number as its feature.

    `seen` lists the images of each call. Raises KeyboardInterrupt after a number of batches.
    """

    def __init__(self, batches=None):
        self.seen, self.left = [], batches

    def __call__(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.seen.append(images[:, 0, 0, 0].tolist())
        return images[:, 0, 0, :1, None].float()


def run_extract(function, store, rows=np.arange(10), batch_size=4, num_workers=0, **options):  # noqa: B008
    return extract(
        function, Numbered(), rows, store, batch_size=batch_size, num_workers=num_workers, **options
    )


def test_row_i_of_the_store_is_image_rows_i():
    store, rows = FeatureStore.in_memory((6, 1, 1)), np.array([21, 3, 49, 8, 0, 5])
    assert run_extract(Counting(), store, rows) == 6
    assert store.features.flatten().tolist() == rows.tolist()
    assert store.state.tolist() == [UNREADABLE, DONE, UNREADABLE, DONE, UNREADABLE, DONE]


def test_workers_give_the_same_features():
    store = FeatureStore.in_memory((10, 1, 1))
    assert run_extract(Counting(), store, num_workers=2) == 10
    assert store.features.flatten().tolist() == list(range(10))


def test_finished_rows_are_not_extracted_again():
    store = FeatureStore.in_memory((10, 1, 1))
    store.state[[0, 1, 2, 3, 9]] = [DONE, DONE, UNREADABLE, DONE, DONE]
    frozen = Counting()
    store.state[2] = DONE
    assert run_extract(frozen, store) == 5
    assert frozen.seen == [[4, 5, 6, 7], [8]]
    assert store.features.flatten().tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8, 0]


def test_images_that_could_not_be_read_are_tried_again():
    store = FeatureStore.in_memory((10, 1, 1))
    run_extract(Counting(), store)
    assert (store.state == UNREADABLE).sum() == 2
    readable = [(image, True) for image, _ in (Numbered()[i] for i in range(10))]
    options = {"batch_size": 4, "num_workers": 0}
    assert extract(Counting(), readable, np.arange(10), store, **options) == 2
    assert (store.state == DONE).all()
    assert extract(Counting(), readable, np.arange(10), store, **options) == 0


def test_an_interrupted_extraction_continues_after_the_last_batch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_extract(Counting(batches=2), FeatureStore.on_disk(tmp_path, (10, 1, 1), "float32"))
    frozen, store = Counting(), FeatureStore.on_disk(tmp_path, (10, 1, 1), "float32")
    assert store.state.tolist() == [UNREADABLE] + 6 * [DONE] + [UNREADABLE] + 2 * [NOT_DONE]
    store.state[[0, 7]] = DONE
    assert run_extract(frozen, store) == 2
    assert frozen.seen == [[8, 9]]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_an_extraction(processes):
    backbone = FeatureExtractor(backbone_of(), TRANSFORM, CPU)
    images = [(image, True) for image in random_images(11)]
    options = {"rows": np.arange(11), "batch_size": 3, "num_workers": 0}
    alone = FeatureStore.in_memory((11, 3, 64))
    extract(backbone, images, store=alone, **options)
    stores = [FeatureStore.in_memory((11, 3, 64)) for _ in range(processes)]
    made = [
        extract(backbone, images, store=s, share=(rank, processes), **options)
        for rank, s in enumerate(stores)
    ]
    assert sum(made) == 11
    assert (sum(store.state for store in stores) == DONE).all()
    assert np.array_equal(sum(store.features for store in stores), alone.features)


def test_a_process_that_starts_late_extracts_its_share():
    store = FeatureStore.in_memory((16, 1, 1))
    made = [run_extract(Counting(), store, np.arange(16), share=(rank, 2)) for rank in range(2)]
    assert made == [8, 8]
    assert NOT_DONE not in store.state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error(value):
    store = FeatureStore.in_memory((10, 1, 1))

    def frozen(images):
        return torch.where(images[:, 0, 0, :1, None] == 5, value, 1.0)

    with pytest.raises(FloatingPointError, match="not finite"):
        run_extract(frozen, store)
    assert store.state.tolist() == [UNREADABLE] + 3 * [DONE] + 6 * [NOT_DONE]


def test_features_beyond_the_range_of_float16_are_an_error():
    store = FeatureStore.in_memory((10, 1, 1), "float16")
    with pytest.raises(FloatingPointError):
        run_extract(lambda images: torch.full((len(images), 1, 1), 1e5), store)
    assert store.state.tolist() == 10 * [NOT_DONE]


def test_an_extraction_uses_no_global_random_numbers():
    before = torch.get_rng_state()
    run_extract(Counting(), FeatureStore.in_memory((10, 1, 1)))
    assert torch.equal(torch.get_rng_state(), before)
