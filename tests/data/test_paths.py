"""Lists of files, arrays, and several paths in --data_path."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, folder_config, make_folder, make_tar, png

from dino_xcit.config.command_line import parse_options
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data.census import report_start
from dino_xcit.data.images import fingerprint, open_images
from dino_xcit.errors import UserError
from dino_xcit.run_folder import CONFIG, read_config, write_config
from dino_xcit.train.resume import images_record


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def opened(*paths, split="train", classes=None, **options):
    config = folder_config("", **options)
    return open_images(
        dataclasses.replace(config, data_path=tuple(map(str, paths))), split, classes
    )


def names(images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


# -- the option --------------------------------------------------------------------------------


def test_one_path_is_a_word_as_before_and_several_are_a_list(tmp_path):
    parse = lambda *words: parse_options("p", PretrainConfig, list(words)).data_path  # noqa: E731
    assert parse("--data_path", "a") == "a"
    assert parse("--data_path", "a", "b c", "--seed", "1") == ("a", "b c")
    assert parse("--data_path", "x-{0..9}.tar") == "x-{0..9}.tar"
    assert parse("--data_path", "{train,val}-{0..9}.tar") == "{train,val}-{0..9}.tar"
    (tmp_path / "c.yaml").write_text("data_path: [a, b]")
    assert parse("--config", str(tmp_path / "c.yaml")) == ("a", "b")
    assert KnnConfig(weights="w", data_path=["a"]).data_path == "a"
    with pytest.raises(UserError, match="--data_path has no value"):
        PretrainConfig(data_path=())


def test_config_yaml_of_one_path_is_as_before_and_of_several_is_read_again(tmp_path):
    for path, line in (("a", "data_path: a\n"), (("a", "b"), "data_path:\n- a\n- b\n")):
        write_config(dataclasses.replace(TINY, dataset=None, data_path=path), tmp_path)
        assert line in (tmp_path / CONFIG).read_text()
        assert read_config(tmp_path).data_path == path


# -- several -----------------------------------------------------------------------------------


def test_several_folders_are_one_set_whose_classes_are_joined_by_name(tmp_path, capsys):
    a = make_folder(tmp_path / "a", ["dog/1.png", "cat/2.png"])
    b = make_folder(tmp_path / "b", ["train/emu/1.png", "train/dog/2.png", "val/emu/3.png"])
    c = make_folder(tmp_path / "c", ["emu/1.png"])
    images = opened(a, b, c)
    assert images.classes == {"cat": 0, "dog": 1, "emu": 2}
    of = [["cat", "dog", "emu"][label] for label in images.labels]
    assert of == [Path(name).parent.name for name in names(images)]
    assert of == ["cat", "dog", "dog", "emu", "emu"]
    assert [torch.equal(images.read(i), opened(b).read(i - 2)) for i in (2, 3)] == [True, True]
    assert names(opened(a, b, split="validation")) == [str(b / "val/emu/3.png")]
    assert opened(a, b, classes={"dog": 5}).labels.tolist() == [5, 5]
    report_start(images)
    assert f"2 images in 2 classes of {b / 'train'}" in (err := capsys.readouterr().err)
    assert "5 images in all" in err


def test_paths_that_are_named_as_splits_are_divided(tmp_path):
    make_folder(tmp_path, ["x_train/a/1.png", "x_val/a/2.png", "more/a/3.png"])
    paths = [tmp_path / name for name in ("x_val", "more", "x_train")]
    assert sorted(Path(name).name for name in names(opened(*paths))) == ["1.png", "3.png"]
    assert [Path(name).name for name in names(opened(*paths, split="validation"))] == ["2.png"]


def test_the_record_of_several_folders_is_that_of_all_of_them(tmp_path):
    paths = [make_folder(tmp_path / name, ["c/1.png", "d/2.png"]) for name in "ab"]
    before, prints = images_record(opened(*paths)), fingerprint(opened(*paths))
    assert images_record(opened(*paths[::-1])) == before  # of alike folders
    (paths[1] / "d/2.png").rename(paths[1] / "d/3.png")
    assert images_record(opened(*paths))["names"] != before["names"]
    assert fingerprint(opened(*paths)) != prints


def test_tars_and_a_folder_are_one_set(tmp_path):
    tar = make_tar(tmp_path / "a.tar", {"cat/1.png": png(1), "dog/2.png": png(2)})
    images = opened(tar, make_folder(tmp_path / "b", ["dog/1.png"]))
    assert (images.labels.tolist(), images.classes) == ([0, 1, 1], {"cat": 0, "dog": 1})


def test_a_named_set_takes_one_path():
    config = dataclasses.replace(TINY, dataset="torch/fake_data", data_path=("a", "b"))
    with pytest.raises(UserError, match="--data_path is a b; expected one path"):
        open_images(config, "train")


# -- lists -------------------------------------------------------------------------------------


def test_a_list_names_files_in_its_order_with_and_without_classes(tmp_path):
    root = make_folder(tmp_path / "images", ["x/b.png", "x/a.png"])
    (tmp_path / "bare.txt").write_text(f"images/x/b.png\n\n{root}/x/a.png\n")
    bare = opened(tmp_path / "bare.txt")
    assert names(bare) == [str(root / "x/b.png"), str(root / "x/a.png")]
    assert bare.labels is None
    (tmp_path / "l.txt").write_text("images/x/b.png\tdog 2\nimages/x/a.png\tcat\n")
    images = opened(tmp_path / "l.txt")
    assert (images.labels.tolist(), images.classes) == ([1, 0], {"cat": 0, "dog 2": 1})
    assert torch.equal(images.read(0), bare.read(0))
    assert opened(tmp_path / "l.txt", split="validation") is None


def test_lists_of_both_splits_and_a_list_of_tars(tmp_path):
    make_folder(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "train.txt").write_text("a.png\tx\nb.png\ty\n")
    (tmp_path / "val.txt").write_text("c.png\tx\n")
    lists = tmp_path / "val.txt", tmp_path / "train.txt"
    assert names(opened(*lists)) == [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert names(opened(*lists, split="validation")) == [str(tmp_path / "c.png")]
    make_tar(tmp_path / "1.tar", {"1.png": png(1)})
    (tmp_path / "tars.txt").write_text("1.tar\n")
    assert names(opened(tmp_path / "tars.txt")) == [str(tmp_path / "1.tar/1.png")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\nb.png\nc.png", r"lists 2 files that do not exist \(first: .*b.png\)"),
        (b"\n\n", "lists no files"),
        (b"a.png\tx\na.png", r"has 1 of 2 lines without a class \(first: a.png\)"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, content, message):
    make_folder(tmp_path, ["a.png"])
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"--data_path .*l.txt {message}"):
        opened(tmp_path / "l.txt")


# -- arrays ------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_arrays_of_both_orders_of_axes_are_read(tmp_path, kind, channels_last):
    array = PIXELS.transpose(0, 2, 3, 1) if channels_last else PIXELS
    path, labels = tmp_path / f"a.{'npy' if kind == 'npy' else 'npz'}", np.arange(5)[:, None] % 3
    if kind == "npy":
        np.save(path, array)
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(path, y=labels, x=array)
    images = opened(path)
    assert [images.read(i).tolist() for i in range(5)] == PIXELS.tolist()
    assert images.labels is None if kind == "npy" else images.labels.tolist() == [0, 1, 2, 0, 1]
    assert isinstance(images.array, np.memmap) == (kind != "compressed")
    pickled = pickle.dumps(images)
    assert len(pickled) < 2_000
    assert torch.equal(pickle.loads(pickled).read(4), images.read(4))
    assert images.name(4) == f"{path}[4]"
    before = images_record(images)
    with path.open("ab") as file:
        file.write(b"more")
    assert images_record(images)["sizes"] != before["sizes"]


@pytest.mark.parametrize(("shape", "channels"), [((5, 6, 8), 3), ((5, 6, 8, 1), 3), ((5, 6, 8), 1)])
def test_grey_arrays_are_read_with_any_channels(tmp_path, shape, channels):
    np.savez(tmp_path / "a.npz", images=PIXELS[:, 0].reshape(shape), labels=[1] * 5)
    statistics = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    images = opened(tmp_path / "a.npz", in_chans=channels, **statistics)
    assert images.read(2).tolist() == [PIXELS[2, 0].tolist()] * channels
    assert images.labels is None  # of one class


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PIXELS.astype(np.float32)}, "holds float32 of 5 x 3 x 6 x 8; expected uint8 images"),
        ({"x": PIXELS[0, 0]}, "holds uint8 of 6 x 8; expected"),
        ({"x": PIXELS[:, :2]}, "holds uint8 of 5 x 2 x 6 x 8; expected"),
        ({"x": PIXELS[:0]}, "holds uint8 of 0 x 3"),
        ({"z": PIXELS}, "holds the arrays z; expected images or x or arr_0"),
        ({"x": PIXELS, "y": [1, 2]}, "holds 2 labels of int64 for 5 images"),
        ({"x": np.array([None])}, "Object arrays"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"--data_path .*a.npz:? {message}"):
        opened(tmp_path / "a.npz")
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"--data_path .*b.npy: "):
        opened(tmp_path / "b.npy")
