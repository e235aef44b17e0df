"""Features of frozen backbones: how images are framed, what is stored, what goes on where, which data are meant."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY
from PIL import Image
from timm.models import VisionTransformer
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dino_xcit.config.evaluation import ClassificationConfig
from dino_xcit.data import shapes
from dino_xcit.data.framing import EvalDataset, Transform, centre_crop, default_resize
from dino_xcit.data.images import open_images
from dino_xcit.evaluate import features
from dino_xcit.evaluate.feature_store import DONE, NOT_DONE, UNREADABLE, FeatureStore, extract
from dino_xcit.evaluate.features import (
    OFFICIAL_FILES,
    FeatureExtractor,
    FileFeatures,
    Pixels,
    dump_features,
    part_slice,
)
from dino_xcit.evaluate.inputs import baselines, resolve, subjects
from dino_xcit.evaluate.knn import knn_classify
from dino_xcit.evaluate.report import hits
from dino_xcit.run_folder import METRICS, TEACHER, write_config
from dino_xcit.runtime import launch
from dino_xcit.weights.formats import backbone_metadata
from dino_xcit.weights.load import build, load_backbone, save_backbone

CPU = torch.device("cpu")
SIDE = 16
TRANSFORM = Transform(SIDE, SIDE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
FOLDER = [
    f"{split}/{name}/{i}.png"
    for split, count in (("train", 3), ("val", 2))
    for name in "ab"
    for i in range(count)
]
TRAIN_IMAGES, IMAGES = 6, 10  # in FOLDER
CPU_ONLY = ClassificationConfig(
    weights="none",
    accelerator="cpu",
    devices="1",
    precision="32-true",
    feature_dtype="float32",
    num_workers=0,
    batch_size_per_gpu=4,
)


# -- framing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "resize_size"), [(224, 256), (384, 438), (96, 109), (95, 95), (32, 32)]
)
def test_default_resize_is_eight_sevenths_of_crops_that_are_not_small(image_size, resize_size):
    assert default_resize(image_size) == resize_size


@pytest.mark.parametrize(
    ("height", "width", "size", "resize_size"),
    [
        (40, 60, 32, 32),
        (60, 40, 28, 32),
        (33, 33, 32, 36),
        (97, 64, 32, 36),
        (20, 90, 32, 36),  # enlarged
        (300, 400, 224, 256),
        (400, 300, 224, 256),
        (334, 500, 224, 256),  # the resized image has 383 columns, (383 - 224) / 2 = 79.5
        (500, 373, 224, 256),
        (98, 49, 224, 256),  # 256 / 49 * 98 is a hair less than 512
    ],
)
def test_framing_is_torchvisions_resize_and_centre_crop_of_pil_images(
    height, width, size, resize_size
):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    reference = Compose(
        [Resize(resize_size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)]
    )
    framed = centre_crop(torch.from_numpy(image).permute(2, 0, 1), size, resize_size)
    assert framed.dtype == torch.uint8
    assert framed.shape == (3, size, size)
    difference = framed.permute(1, 2, 0).numpy().astype(int) - np.asarray(
        reference(Image.fromarray(image))
    )
    assert np.abs(difference).max() <= 1


# -- backbones as functions ------------------------------------------------------------------------------------------


def backbone_of(seed=0, config=TINY):
    torch.manual_seed(seed)
    return build(backbone_metadata(config))


def random_images(count, side=SIDE, channels=3, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    )


def normalised_by_hand(images):
    planes = [
        (images[:, c].double() / 255 - TRANSFORM.mean[c]) / TRANSFORM.std[c] for c in range(3)
    ]
    return torch.stack(planes, dim=1).float()


def test_frozen_gives_the_parts_of_a_backbone_in_eval_mode():
    features = FeatureExtractor(backbone_of().train(), TRANSFORM, CPU)(random_images(5))
    backbone = backbone_of().eval()
    x = normalised_by_hand(random_images(5))
    assert not features.requires_grad
    assert features.dtype == torch.float32
    with torch.no_grad():
        tokens = torch.cat(
            [backbone.cls_token.expand(5, -1, -1), backbone.patch_tokens(x)[0]], dim=1
        )
        first_layer = backbone.norm(
            backbone.cls_attn_blocks[0](tokens, class_token_only=True)[0][:, 0]
        )
        expected = [backbone(x), first_layer, backbone.forward_features(x)[:, 1:].mean(1)]
    assert features.shape == (5, 3, 64)
    for part, of_part in enumerate(expected):
        torch.testing.assert_close(features[:, part], of_part, rtol=1e-4, atol=1e-5)


def test_frozen_other_networks_have_one_part():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    features = FeatureExtractor(network, TRANSFORM, CPU)(random_images(4))
    assert features.shape == (4, 1, 12)
    torch.testing.assert_close(features[:, 0], network(normalised_by_hand(random_images(4))))


def test_frozen_half_precision_is_near_and_comes_out_in_float32():
    backbone = backbone_of()
    exact, half = (
        FeatureExtractor(backbone, TRANSFORM, CPU, p)(random_images(4))
        for p in ("32-true", "bf16-mixed")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert F.cosine_similarity(half, exact, dim=-1).min() > 0.999
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4))
    assert (
        FeatureExtractor(network, TRANSFORM, CPU, "bf16-mixed")(random_images(4)).dtype
        == torch.float32
    )


def test_frozen_shape_of_features():
    assert FeatureExtractor(backbone_of(), TRANSFORM, CPU).shape() == (3, 64)
    assert FeatureExtractor(Pixels(), TRANSFORM, CPU).shape() == (1, 3 * SIDE**2)


@pytest.mark.parametrize(
    "network",
    [
        backbone_of,
        lambda: VisionTransformer(
            img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=0
        ),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()),
    ],
    ids=["xcit", "of one size", "of other channels"],
)
def test_frozen_shape_refuses_images_that_the_network_does_not_take(network):
    with pytest.raises(ValueError, match="--image_size 18"):
        FeatureExtractor(network(), TRANSFORM._replace(image_size=18), CPU).shape()


def test_pixels_are_averaged_down_to_32_and_never_up():
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(Pixels()(images[..., :16, :16]), images[..., :16, :16].flatten(1))
    by_hand = images.view(2, 3, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(Pixels()(images), by_hand.flatten(1))


def test_baselines_are_pixels_and_the_same_network_untrained():
    backbone = backbone_of(
        seed=1, config=dataclasses.replace(TINY, l2_norm=False, in_chans=1, mean=(0.5,), std=(0.5,))
    )
    (pixels, _), (name, untrained) = baselines(CPU_ONLY, backbone, Pixels())
    assert (pixels, name) == ("raw pixels", "xcit_pico2_p4, untrained")
    assert not untrained.blocks[0].attn.l2_norm
    assert untrained.in_chans == 1
    again = baselines(CPU_ONLY, backbone, Pixels())[1][1]
    other = baselines(dataclasses.replace(CPU_ONLY, seed=1), backbone, Pixels())[1][1]
    weight = [network.blocks[0].attn.qkv.weight for network in (untrained, again, other, backbone)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3])
    assert [name for name, _ in baselines(CPU_ONLY, nn.Flatten(), Pixels())] == ["raw pixels"]


@pytest.mark.parametrize(
    ("layers", "avgpool", "parts", "chosen"),
    [
        (1, False, 3, [0]),
        (2, False, 3, [0, 1]),
        (1, True, 3, [0, 2]),
        (2, True, 3, [0, 1, 2]),
        (1, False, 1, [0]),
        (1, False, 2, [0]),
        (1, True, 2, [0, 1]),
    ],
)
def test_parts_of_a_choice(layers, avgpool, parts, chosen):
    assert list(range(parts))[part_slice(layers, avgpool, parts)] == chosen


@pytest.mark.parametrize(
    ("layers", "avgpool", "parts", "problem"),
    [
        (3, False, 3, "--n_last_blocks 3: .* in 2 layers"),
        (3, True, 3, "--n_last_blocks 3: .* in 2 layers"),
        (2, False, 1, "--n_last_blocks 2: .* in 1 layers"),
        (1, True, 1, "--avgpool_patchtokens true: .* no patch tokens"),
    ],
)
def test_parts_that_a_network_does_not_have_are_errors(layers, avgpool, parts, problem):
    with pytest.raises(ValueError, match=problem):
        part_slice(layers, avgpool, parts)


# -- the store -------------------------------------------------------------------------------------------------------


def filled_store(folder, shape=(4, 2, 3), dtype="float32"):
    store = FeatureStore.on_disk(folder, shape, dtype)
    store.features[:] = np.arange(np.prod(shape)).reshape(shape)
    store.mark(np.array([0, 2, 3]), np.array([True, False, True]))


def contents(store):
    return store.features.tolist(), store.state.tolist()


def test_a_store_on_disk_is_found_as_it_was_left(tmp_path):
    new = FeatureStore.on_disk(tmp_path / "deep" / "folder", (4, 2, 3), "float16")
    assert (new.features.shape, new.features.dtype) == ((4, 2, 3), np.float16)
    assert new.state.tolist() == 4 * [NOT_DONE]
    filled_store(tmp_path / "store")
    again = FeatureStore.on_disk(tmp_path / "store", (4, 2, 3), "float32")
    assert again.features.flatten().tolist() == list(range(24))
    assert again.state.tolist() == [DONE, NOT_DONE, UNREADABLE, DONE]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


BREAKING = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not numbers"),
    "missing": lambda path: path.unlink(),
    "other dimensions": lambda path: np.save(path, np.ones((4, 1), np.float32)),
    "other numbers": lambda path: np.save(path, np.ones(np.load(path).shape)),
    "objects": lambda path: np.save(path, np.array([{}] * 4), allow_pickle=True),
    "zip": lambda path: np.savez(path.open("wb"), np.ones(4)),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", ["features.npy", "state.npy"])
@pytest.mark.parametrize("how", BREAKING)
def test_a_store_with_a_broken_file_starts_anew(tmp_path, name, how):
    filled_store(tmp_path)
    BREAKING[how](tmp_path / name)
    store = FeatureStore.on_disk(tmp_path, (4, 2, 3), "float32")
    assert contents(store) == (np.zeros((4, 2, 3)).tolist(), 4 * [NOT_DONE])
    assert {path.name for path in tmp_path.iterdir()} == {"features.npy", "state.npy"}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 2, 3), "float32"), ((4, 3, 2), "float32"), ((4, 2, 3), "float16")]
)
def test_a_store_of_other_features_starts_anew(tmp_path, shape, dtype):
    filled_store(tmp_path)
    store = FeatureStore.on_disk(tmp_path, shape, dtype)
    assert contents(store) == (np.zeros(shape).tolist(), shape[0] * [NOT_DONE])
    assert store.features.dtype == dtype


def test_no_old_state_is_left_beside_features_when_a_new_start_is_interrupted(
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


# -- extraction ------------------------------------------------------------------------------------------------------


class Numbered(torch.utils.data.Dataset):
    """Image i is a grey square of i; every seventh cannot be read."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.full((1, 2, 2), index, dtype=torch.uint8), index % 7 != 0


class Counting:
    """The number of an image as its feature. Keeps what it was asked for; breaks down after some batches."""

    def __init__(self, batches=None):
        self.seen, self.left = [], batches

    def __call__(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.seen.append(images[:, 0, 0, 0].tolist())
        return images[:, 0, 0, :1, None].float()


def run_extract(frozen, store, rows=np.arange(10), batch_size=4, num_workers=0, **options):  # noqa: B008
    return extract(
        frozen, Numbered(), rows, store, batch_size=batch_size, num_workers=num_workers, **options
    )


def test_rows_of_the_store_are_the_images_asked_for():
    store, rows = FeatureStore.in_memory((6, 1, 1)), np.array([21, 3, 49, 8, 0, 5])
    assert run_extract(Counting(), store, rows) == 6
    assert store.features.flatten().tolist() == rows.tolist()
    assert store.state.tolist() == [UNREADABLE, DONE, UNREADABLE, DONE, UNREADABLE, DONE]


def test_workers_of_the_extraction_change_nothing():
    store = FeatureStore.in_memory((10, 1, 1))
    assert run_extract(Counting(), store, num_workers=2) == 10
    assert store.features.flatten().tolist() == list(range(10))


def test_what_is_done_is_not_done_again():
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


def test_an_interrupted_extraction_goes_on_after_the_last_batch(tmp_path):
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


def test_processes_that_start_late_leave_nothing_undone():
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


# -- an evaluation's images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fabric():
    return launch(CPU_ONLY)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", 12)


def save_run(folder, config=TINY, seed=0):
    """A run folder as far as evaluations look at it."""
    folder.mkdir(parents=True)
    save_backbone(backbone_of(seed, config), config, folder / TEACHER)
    write_config(dataclasses.replace(config, output_dir=str(folder)), folder)
    (folder / METRICS).touch()
    return folder


def make_folder(root, names=FOLDER, side=20):
    """A random image for each name."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(1, side, seed=seed)[0].permute(1, 2, 0).numpy()).save(
            root / name
        )
    return root


@pytest.fixture
def config(tmp_path):
    """Evaluates a run on a folder of images."""
    return dataclasses.replace(
        CPU_ONLY,
        weights=str(save_run(tmp_path / "run")),
        data_path=str(make_folder(tmp_path / "images")),
        cache_dir=str(tmp_path / "cache"),
    )


def evaluate(config, fabric, *splits):
    """What `subjects` yields, and these splits of the first subject."""
    with subjects(config, fabric) as (resolved, evaluated, classes):
        return resolved, evaluated[0], classes, [evaluated[0].split(name) for name in splits]


def made(config, fabric):
    return evaluate(config, fabric, "train", "validation")[1].made


def test_features_of_a_split_are_the_backbones_of_its_framed_images(config, fabric, tmp_path):
    _, subject, classes, (train, validation) = evaluate(config, fabric, "train", "validation")
    transform = Transform(SIDE, SIDE, TINY.mean, TINY.std)
    frozen = FeatureExtractor(load_backbone(config.weights), transform, CPU)
    assert subject.frozen.transform == transform
    assert classes == {0: "a", 1: "b"}
    for split, folder, count in ((train, "train", 3), (validation, "val", 2)):
        paths = [f"{folder}/{name}/{i}.png" for name in "ab" for i in range(count)]
        images = [
            torch.from_numpy(np.array(Image.open(tmp_path / "images" / path))).permute(2, 0, 1)
            for path in paths
        ]
        framed = torch.stack([centre_crop(image, SIDE, SIDE) for image in images])
        torch.testing.assert_close(split.features, frozen(framed), rtol=1e-4, atol=1e-5)
        assert split.labels.tolist() == count * [0] + count * [1]
        assert split.labels.dtype == torch.int64


def test_the_runs_own_shapes_are_meant_when_no_data_are_named(fabric, tmp_path):
    run = save_run(tmp_path / "run", dataclasses.replace(TINY, seed=3))
    config = dataclasses.replace(CPU_ONLY, weights=str(run / TEACHER), no_cache=True)
    for asked, count in ((None, TINY.num_images), (20, 20)):
        resolved, subject, classes, _ = evaluate(
            dataclasses.replace(config, num_images=asked), fabric
        )
        assert (resolved.dataset, resolved.seed, resolved.image_size) == (
            "shapes",
            0,
            TINY.global_crops_size,
        )
        assert classes[2] == "slants"
        assert (len(subject.images["train"]), len(subject.images["validation"])) == (count, 12)
        expected = shapes.draw_shape(3, "train", 7).image
        assert np.array_equal(subject.images["train"].read(7).permute(1, 2, 0).numpy(), expected)


def test_the_runs_own_folder_is_meant_when_no_data_are_named(fabric, tmp_path):
    root = make_folder(tmp_path / "images")
    run = save_run(
        tmp_path / "run",
        dataclasses.replace(TINY, dataset=None, data_path=str(root), num_images=None),
    )
    resolved, subject, _, _ = evaluate(
        dataclasses.replace(CPU_ONLY, weights=str(run), no_cache=True), fabric
    )
    assert (resolved.data_path, resolved.dataset, resolved.seed) == (str(root), None, 0)
    assert Path(subject.images["validation"].name(3)) == root / "val/b/1.png"


def test_named_data_come_before_the_runs_own(config, fabric):
    assert made(config, fabric) == IMAGES
    drawn = dataclasses.replace(
        config, data_path=None, dataset="shapes", num_images=15, seed=5, no_cache=True
    )
    resolved, subject, _, _ = evaluate(drawn, fabric)
    assert resolved.seed == 5
    assert len(subject.images["train"]) == 15


def test_weights_outside_a_run_folder_need_data(tmp_path, fabric):
    save_backbone(backbone_of(), TINY, tmp_path / "weights.safetensors")
    config = dataclasses.replace(CPU_ONLY, weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match="expected --data_path or --dataset"):
        evaluate(config, fabric)


def test_what_the_weights_do_not_say_has_defaults_and_flags_come_first():
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes"), {})
    assert (resolved.in_chans, resolved.image_size, resolved.resize_size) == (3, 224, 256)
    assert (resolved.mean, resolved.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    said = {"in_chans": 1, "mean": [0.3], "std": [0.2], "global_crops_size": 112}
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes"), said)
    assert (resolved.in_chans, resolved.image_size, resolved.resize_size) == (1, 112, 128)
    assert (resolved.mean, resolved.std) == ((0.3,), (0.2,))
    flags = {
        "in_chans": 4,
        "mean": 4 * (0.1,),
        "std": 4 * (0.2,),
        "image_size": 32,
        "resize_size": 40,
    }
    resolved, _ = resolve(dataclasses.replace(CPU_ONLY, dataset="shapes", **flags), said)
    assert {name: getattr(resolved, name) for name in flags} == flags


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mean": (0.5,)}, r"--mean \(0.5,\) does not have one value per channel \(--in_chans 3\)"),
        ({"std": (0.5, 0.5)}, "--std .* does not have one value per channel"),
        ({"in_chans": 1}, "--mean .* does not have one value per channel"),
        ({"resize_size": 15}, "--resize_size 15 is smaller than --image_size 16"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_errors(config, fabric, options, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate(dataclasses.replace(config, **options), fabric)


def names_and_labels(subject, classes, split):
    """Folder of each image and the name of its label."""
    images = subject.images[split]
    return [
        (Path(images.name(i)).parent.name, classes[label])
        for i, label in enumerate(subject.labels(split).tolist())
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/4.png", "val/c/5.png"],
        ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/c/5.png"],
        ["train/a/1.png", "train/c/2.png", "val/a/3.png", "val/b/4.png", "val/c/5.png"],
        ["train/b/1.png", "train/c/2.png", "val/a/3.png", "val/a/4.png"],
    ],
)
def test_labels_mean_the_same_in_both_splits_whatever_classes_these_have(
    config, fabric, tmp_path, capsys, names
):
    root = make_folder(tmp_path / "other", names)
    _, subject, classes, _ = evaluate(dataclasses.replace(config, data_path=str(root)), fabric)
    for split, folder in (("train", "train"), ("validation", "val")):
        named = names_and_labels(subject, classes, split)
        assert [folder_of_image for folder_of_image, _ in named] == [
            n.split("/")[1] for n in names if n.startswith(folder)
        ]
        assert all(folder_of_image == name for folder_of_image, name in named)
    unseen = {n.split("/")[1] for n in names if n.startswith("val")} - {
        n.split("/")[1] for n in names if n.startswith("train")
    }
    said = capsys.readouterr().err
    assert (
        f"{len(unseen)} classes of the validation images have no training images" in said
    ) == bool(unseen)


def test_images_of_a_class_without_training_images_count_as_wrong(config, fabric, tmp_path):
    root = make_folder(
        tmp_path / "other",
        ["train/a/1.png", "train/c/2.png", "val/a/3.png", "val/b/4.png", "val/c/5.png"],
    )
    make_folder(
        root, ["val/a/3.png", "val/c/5.png"], side=20
    )  # of class a and c, the same pictures as in training
    _, _, _, (train, validation) = evaluate(
        dataclasses.replace(config, data_path=str(root)), fabric, "train", "validation"
    )
    ranked = knn_classify(train.features, train.labels, validation.features, nb_knn=(1,))[1]
    assert hits(ranked, validation.labels, 1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (
            ["train/1.png", "train/2.png", "val/a/3.png", "val/b/4.png"],
            "the training images of --data_path .* have no labels",
        ),
        (
            ["train/a/1.png", "train/b/2.png", "val/3.png", "val/4.png"],
            "the validation images of --data_path .* no labels",
        ),
        (
            ["train/a/1.png", "train/a/2.png", "val/a/3.png"],
            "the training images of --data_path .* have no labels",
        ),
        (
            ["train/a/1.png", "train/b/2.png"],
            "--data_path .* has no validation images; expected val/ beside train/",
        ),
        (["a/1.png", "b/2.png"], "--data_path .* has no validation images"),
    ],
)
def test_folders_without_labels_or_validation_images_are_errors(
    config, fabric, tmp_path, names, problem
):
    root = make_folder(tmp_path / "other", names)
    with pytest.raises(ValueError, match=problem):
        evaluate(dataclasses.replace(config, data_path=str(root)), fabric)


def test_unreadable_images_are_left_out_of_features_and_labels(config, fabric, tmp_path):
    (tmp_path / "images/train/a/1.png").write_bytes(b"broken")
    for from_cache in (False, True):
        _, subject, _, (train,) = evaluate(config, fabric, "train")
        assert subject.made == (1 if from_cache else TRAIN_IMAGES)  # tried again
        assert subject.unreadable == 1
        assert train.labels.tolist() == subject.labels("train").tolist() == [0, 0, 1, 1, 1]
        assert train.features.shape == (5, 3, 64)
        last = EvalDataset(subject.images["train"], subject.frozen.transform)[5][0]
        torch.testing.assert_close(
            train.features[4], subject.frozen(last[None])[0], rtol=1e-4, atol=1e-5
        )


def test_how_many_images_cannot_be_read_is_told(config, fabric, tmp_path, capsys):
    for name in ("a/1", "b/2"):
        (tmp_path / f"images/train/{name}.png").write_bytes(b"broken")
    evaluate(config, fabric, "train")
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(told) == 1
    assert told[0].startswith("2 of 6 images cannot be read")
    assert "train/a/1.png" in told[0]


def test_labels_that_are_kept_secret_are_an_error(config, fabric, monkeypatch):
    def opened(*arguments):
        images = open_images(*arguments)
        images.labels = images.labels - 1
        return images

    monkeypatch.setattr(features, "open_images", opened)
    with pytest.raises(ValueError, match=r"--data_path .* has negative labels"):
        evaluate(config, fabric)


def test_a_full_disk_is_an_error_that_names_the_flag(config, fabric, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ValueError, match=r"--cache_dir .*cache .*No space left on device"):
        evaluate(config, fabric, "train")


def test_images_of_which_none_can_be_read_are_an_error(config, fabric, tmp_path):
    for path in (tmp_path / "images/val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 4 images can be read, .*val/a/0\.png"):
        evaluate(config, fabric, "validation")


def test_an_unreadable_image_is_framed_as_black(config, fabric, tmp_path):
    (tmp_path / "images/train/a/1.png").write_bytes(b"broken")
    _, subject, _, _ = evaluate(config, fabric)
    image, readable = EvalDataset(subject.images["train"], TRANSFORM._replace(image_size=12))[1]
    assert not readable
    assert torch.equal(image, torch.zeros(3, 12, 12, dtype=torch.uint8))


def test_weights_of_a_diverged_run_are_an_error(config, fabric, tmp_path):
    backbone = backbone_of()
    with torch.no_grad():
        backbone.norm.bias[0] = float("nan")
    save_backbone(backbone, TINY, tmp_path / "run" / TEACHER)
    with pytest.raises(FloatingPointError, match=r"--weights .*run: .*not finite"):
        evaluate(config, fabric, "train")


# -- the cache -------------------------------------------------------------------------------------------------------


def test_features_are_made_once(config, fabric, capsys):
    _, subject, _, first = evaluate(config, fabric, "train", "validation")
    assert subject.made == IMAGES
    assert subject.seconds > 0
    assert subject.split("train") is first[0]
    capsys.readouterr()
    _, subject, _, second = evaluate(config, fabric, "train", "validation")
    assert (subject.made, subject.seconds) == (0, 0.0)
    assert all(
        torch.equal(one.features, other.features) for one, other in zip(first, second, strict=True)
    )
    assert all(
        torch.equal(one.labels, other.labels) for one, other in zip(first, second, strict=True)
    )
    assert f"{subject.name}, train: from {config.cache_dir}" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_where_it_stopped(config, fabric, monkeypatch):
    through, whole = [], FeatureExtractor.__call__

    def counted(frozen, images):
        through.append(len(images))
        if sum(through) > 1 + 4 + 2:  # the image that tells the shape, the first batch, the second
            raise KeyboardInterrupt
        return whole(frozen, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, fabric, "train", "validation")
    assert through == [1, 4, 2, 4]
    monkeypatch.setattr(FeatureExtractor, "__call__", whole)
    assert made(config, fabric) == IMAGES - TRAIN_IMAGES


@pytest.mark.parametrize("options", [{"batch_size_per_gpu": 3}, {"num_workers": 1}, {"seed": 4}])
def test_options_that_change_no_features_leave_the_cache_valid(config, fabric, options):
    made(config, fabric)
    assert made(dataclasses.replace(config, **options), fabric) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 20},
        {"resize_size": 18},
        {"mean": (0.5, 0.456, 0.406)},
        {"std": (0.5, 0.224, 0.225)},
        {"precision": "bf16-mixed"},
        {"feature_dtype": "float16"},
    ],
)
def test_options_that_change_features_make_new_ones(config, fabric, options):
    made(config, fabric)
    assert made(dataclasses.replace(config, **options), fabric) == IMAGES
    assert made(config, fabric) == 0


@pytest.mark.parametrize(
    ("precision", "dtype", "stored"),
    [
        ("32-true", "auto", torch.float32),
        ("32-true", "float16", torch.float16),
        ("bf16-mixed", "auto", torch.float16),
        ("bf16-mixed", "float32", torch.float32),
    ],
)
def test_features_are_stored_in_the_numbers_asked_for(config, fabric, precision, dtype, stored):
    split = evaluate(
        dataclasses.replace(config, precision=precision, feature_dtype=dtype), fabric, "train"
    )[3][0]
    assert split.features.dtype == stored


def test_other_weights_make_new_features(config, fabric, tmp_path):
    made(config, fabric)
    other = save_run(tmp_path / "other", seed=1)
    assert made(dataclasses.replace(config, weights=str(other)), fabric) == IMAGES
    assert made(dataclasses.replace(config, weights=str(tmp_path / "run" / TEACHER)), fabric) == 0


def test_another_ablation_with_the_same_tensors_makes_new_features(config, fabric, tmp_path):
    _, _, _, (with_norm,) = evaluate(config, fabric, "train")
    save_backbone(
        backbone_of(), dataclasses.replace(TINY, l2_norm=False), tmp_path / "run" / TEACHER
    )
    _, subject, _, (without,) = evaluate(config, fabric, "train")
    assert subject.made == TRAIN_IMAGES
    assert not torch.allclose(with_norm.features, without.features, atol=1e-3)


def rewrite(path):
    make_folder(path.parent, [path.name], side=22)


def touch(path):
    os.utime(path, ns=(1, 10**18))


def move(path):
    path.rename(path.parent.parent / "b" / "moved.png")


def repaint(path):
    """Other pixels in as many bytes, at the same time."""
    stat = path.stat()
    data = path.read_bytes()
    make_folder(path.parent, 40 * [path.name])
    path.write_bytes(path.read_bytes()[: len(data)].ljust(len(data), b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, touch, move, repaint, Path.unlink])
def test_a_changed_image_makes_new_features_of_its_split(config, fabric, tmp_path, change):
    made(config, fabric)
    change(tmp_path / "images/train/a/1.png")
    assert made(config, fabric) == TRAIN_IMAGES - (change is Path.unlink)


def lengthen(path):
    """More bytes, at the same time."""
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, lengthen])
def test_a_changed_image_among_many_makes_new_features(config, fabric, tmp_path, change):
    make_folder(tmp_path / "images", [f"val/a/{i}.png" for i in range(40)])
    evaluate(config, fabric, "validation")
    change(tmp_path / "images/val/a/1.png")  # whose pixels no fingerprint looks at
    assert evaluate(config, fabric, "validation")[1].made == 42


def test_no_cache_leaves_nothing(config, fabric, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    forgetful = dataclasses.replace(config, no_cache=True)
    for _ in range(2):
        with subjects(forgetful, fabric) as (_, (subject,), _):
            subject.split("train")
            assert subject.made == TRAIN_IMAGES
            assert list(temporary.rglob("features.npy"))
        assert not list(temporary.iterdir())
    for path in (tmp_path / "images/val").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 4 images"):
        evaluate(forgetful, fabric, "train", "validation")
    assert not list(temporary.iterdir())
    assert not (tmp_path / "home").exists()
    assert not Path(config.cache_dir).exists()


def test_the_cache_is_where_caches_are(config, fabric, tmp_path, monkeypatch):
    config = dataclasses.replace(config, cache_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    evaluate(config, fabric, "train")
    assert list((tmp_path / "caches/dino_xcit").glob("*/features.npy"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    evaluate(config, fabric, "train")
    assert list((tmp_path / "home/.cache/dino_xcit").glob("*/features.npy"))
    evaluate(dataclasses.replace(config, cache_dir="~/elsewhere"), fabric, "train")
    assert list((tmp_path / "home/elsewhere").glob("*/features.npy"))


def test_baselines_have_features_of_their_own(config, fabric):
    save_backbone(backbone_of(seed=1), TINY, Path(config.weights) / TEACHER)
    with subjects(dataclasses.replace(config, baselines=True), fabric) as (_, evaluated, _):
        assert [subject.name for subject in evaluated] == [
            config.weights,
            "raw pixels",
            "xcit_pico2_p4, untrained",
        ]
        features = [subject.split("train").features for subject in evaluated]
        assert [subject.made for subject in evaluated] == 3 * [TRAIN_IMAGES]
    assert [tuple(f.shape[1:]) for f in features] == [(3, 64), (1, 3 * SIDE**2), (3, 64)]
    assert not torch.equal(features[0], features[2])


def test_the_key_tells_training_features_apart(config, fabric, tmp_path):
    key = evaluate(config, fabric)[1].key
    touch(tmp_path / "images/val/a/1.png")
    assert evaluate(config, fabric)[1].key == key
    assert evaluate(dataclasses.replace(config, image_size=20), fabric)[1].key != key
    touch(tmp_path / "images/train/a/1.png")
    assert evaluate(config, fabric)[1].key != key


# -- features of files -----------------------------------------------------------------------------------------------


def save_features(folder, **changes):
    """The four files, of 5 training and 3 test images."""
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "trainfeat": torch.randn(5, 8, generator=rng),
        "trainlabels": torch.tensor([0, 1, 2, 0, 1]),
        "testfeat": torch.randn(3, 8, generator=rng),
        "testlabels": torch.tensor([2, 1, 0]),
        **changes,
    }
    folder.mkdir(exist_ok=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth")
    return dataclasses.replace(CPU_ONLY, load_features=str(folder)), tensors


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.float32])
def test_features_of_files_stand_in_a_subjects_place(tmp_path, fabric, labels):
    config, tensors = save_features(
        tmp_path / "dump", testlabels=torch.tensor([2, 1, 0], dtype=labels)
    )
    resolved, subject, classes, (train, validation) = evaluate(
        config, fabric, "train", "validation"
    )
    assert (resolved, classes) == (config, {0: "0", 1: "1", 2: "2"})
    assert (subject.made, subject.seconds, subject.unreadable, subject.shape) == (0, 0.0, 0, (1, 8))
    assert torch.equal(train.features[:, 0], tensors["trainfeat"])
    assert torch.equal(validation.features[:, 0], tensors["testfeat"])
    assert (train.labels.tolist(), validation.labels.tolist()) == ([0, 1, 2, 0, 1], [2, 1, 0])
    assert validation.labels.dtype == subject.labels("validation").dtype == torch.int64


def test_labels_of_files_may_be_any_whole_numbers(tmp_path):
    config, _ = save_features(
        tmp_path,
        trainlabels=torch.tensor([7, 10**12, 3, 7, 3]),
        testlabels=torch.tensor([5, 10**12, 3]),
    )
    files = FileFeatures(config)
    assert files.classes == {0: "3", 1: "5", 2: "7", 3: "1000000000000"}
    assert files.labels("train").tolist() == [2, 3, 0, 2, 0]
    assert files.labels("validation").tolist() == [1, 3, 0]


def test_one_number_that_is_not_finite_among_features_of_files_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 2)
    rows = torch.zeros(5, 8)
    rows[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        FileFeatures(save_features(tmp_path, trainfeat=rows)[0])


def test_dumped_features_load_again(config, fabric, tmp_path):
    with subjects(config, fabric) as (_, (subject,), _):
        for number, parts in enumerate((slice(0, 1), slice(0, 3, 2))):
            folder = tmp_path / f"dump {number}"
            dump_features(subject, parts, folder)
            assert {path.name for path in folder.iterdir()} == {
                f for files in OFFICIAL_FILES.values() for f in files
            }
            loaded = FileFeatures(ClassificationConfig(load_features=str(folder)))
            for name in ("train", "validation"):
                expected = F.normalize(subject.split(name).features[:, parts].flatten(1), dim=1)
                torch.testing.assert_close(loaded.split(name).features, expected[:, None])
                assert torch.equal(loaded.labels(name), subject.split(name).labels)
            assert torch.load(folder / "trainfeat.pth", weights_only=True).shape == (
                TRAIN_IMAGES,
                64 * (1 + number),
            )


def test_dumped_features_are_float32_whatever_was_stored(config, fabric, tmp_path):
    with subjects(dataclasses.replace(config, feature_dtype="float16"), fabric) as (
        _,
        (subject,),
        _,
    ):
        dump_features(subject, slice(0, 1), tmp_path / "dump")
    features = torch.load(tmp_path / "dump/testfeat.pth", weights_only=True)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("name", [file for files in OFFICIAL_FILES.values() for file in files])
def test_a_missing_file_of_features_is_named(tmp_path, name):
    config, _ = save_features(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        ValueError,
        match=rf"has no {name}; expected trainfeat\.pth, trainlabels\.pth, testfeat\.pth, test",
    ):
        FileFeatures(config)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"trainfeat": torch.zeros(5)}, r"trainfeat\.pth does not hold a tensor of 2 dimensions"),
        (
            {"testfeat": torch.zeros(3, 1, 8)},
            r"testfeat\.pth does not hold a tensor of 2 dimensions",
        ),
        (
            {"testlabels": torch.zeros(3, 1)},
            r"testlabels\.pth does not hold a tensor of 1 dimensions",
        ),
        ({"testlabels": torch.full((3,), 0.5)}, r"testlabels\.pth does not hold whole numbers"),
        (
            {"trainlabels": torch.arange(5) - 1},
            r"trainlabels\.pth does not hold whole numbers from 0",
        ),
        (
            {"testfeat": torch.full((3, 8), torch.inf)},
            r"testfeat\.pth holds numbers that are not finite",
        ),
        (
            {"trainfeat": torch.full((5, 8), torch.nan)},
            r"trainfeat\.pth holds numbers that are not finite",
        ),
        (
            {"testfeat": torch.zeros(0, 8), "testlabels": torch.zeros(0, dtype=torch.int64)},
            r"testfeat\.pth is empty",
        ),
        ({"trainfeat": {"features": torch.zeros(5, 8)}}, r"trainfeat\.pth does not hold a tensor"),
        ({"trainlabels": torch.zeros(4)}, r"trainfeat\.pth has 5 rows and trainlabels\.pth 4"),
        ({"testfeat": torch.zeros(2, 8)}, r"testfeat\.pth has 2 rows and testlabels\.pth 3"),
        ({"testfeat": torch.zeros(3, 6)}, "."),
    ],
)
def test_files_that_do_not_hold_features_are_errors(tmp_path, changes, problem):
    config, _ = save_features(tmp_path, **changes)
    with pytest.raises(ValueError, match=problem):
        FileFeatures(config)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
def test_files_of_features_that_hold_code_are_refused(tmp_path, save):
    config, _ = save_features(tmp_path)
    save(Code(tmp_path / "executed"), tmp_path / "trainfeat.pth")
    with pytest.raises(ValueError, match=r"trainfeat\.pth is not a tensor file"):
        FileFeatures(config)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_of_features_is_an_error(tmp_path):
    config, _ = save_features(tmp_path)
    truncate(tmp_path / "testfeat.pth")
    with pytest.raises(ValueError, match=r"testfeat\.pth is not a tensor file"):
        FileFeatures(config)


def test_the_key_of_files_changes_with_them(tmp_path):
    config, _ = save_features(tmp_path)
    key = FileFeatures(config).key
    assert FileFeatures(config).key == key
    touch(tmp_path / "trainfeat.pth")
    assert FileFeatures(config).key != key
