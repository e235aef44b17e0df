"""Scores against object masks: files, blobs, and the whole score against loops over images, heads and pixels."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.data.shapes import draw_shape
from dino_xcit.figures import localization
from dino_xcit.figures.drawing import write
from dino_xcit.figures.inputs import Framing, find
from dino_xcit.figures.localization import (
    Scene,
    blobs,
    listed,
    read_mask,
    scenes_of_files,
    scenes_of_shapes,
    score,
)
from dino_xcit.figures.maps import look
from dino_xcit.figures.model import AttentionModel
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import write_config
from dino_xcit.weights.load import build, save_backbone

RUN = PretrainConfig(
    arch="xcit_pico2_p4", global_crops_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pico.safetensors"
    torch.manual_seed(7)
    save_backbone(XCiT(RUN.arch), RUN, path)
    return str(path)


def eye_and_frame(weights, **options):
    config = AttentionConfig(weights=(weights,), **options)
    model = AttentionModel("pico", weights, config, torch.device("cpu"))
    return config, model, Framing([model], config.fit)


# -- files of masks ----------------------------------------------------------------------------------------------------


def saved(path, values, mode):
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return path


def test_masks_of_pascal_voc_have_objects_ground_and_void(tmp_path):
    """A palette file whose numbers are classes; 255 is the border that does not count."""
    values = np.array([[0, 0, 1], [20, 255, 0], [255, 15, 0]], np.uint8)
    image = Image.frombytes("P", (3, 3), values.tobytes())
    image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(tmp_path / "mask.png")
    truth, counted = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, False, True], [True, False, False], [False, True, False]]
    assert counted.tolist() == [[True, True, True], [True, False, True], [False, True, True]]
    assert truth.dtype == counted.dtype == torch.bool


@pytest.mark.parametrize("name", ["mask.png", "mask.bmp", "mask.tif"])
def test_255_is_object_where_there_is_nothing_but_0_and_255(name, tmp_path):
    truth, counted = read_mask(saved(tmp_path / name, [[0, 255, 0], [255, 255, 0]], "L"))
    assert truth.tolist() == [[False, True, False], [True, True, False]]
    assert counted.all()


@pytest.mark.parametrize("value", [1, 7, 128, 254])
def test_any_number_but_0_is_object(value, tmp_path):
    truth, counted = read_mask(saved(tmp_path / "mask.png", [[0, value], [value, 0]], "L"))
    assert truth.tolist() == [[False, True], [True, False]]
    assert counted.all()


def test_masks_of_one_bit_of_colours_and_of_16_bits(tmp_path):
    expected = [[False, True, True], [False, False, True]]
    bits = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    for mode, name in (
        ("1", "mask.png"),
        ("1", "mask.tif"),
        ("RGB", "mask.png"),
        ("RGBA", "mask.png"),
    ):
        truth, counted = read_mask(saved(tmp_path / name, bits, mode))
        assert truth.tolist() == expected, mode
        assert counted.all()
    Image.fromarray(np.array([[0, 300, 1], [0, 0, 65535]], np.uint16)).save(tmp_path / "mask.png")
    truth, counted = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == expected
    assert counted.all()


@pytest.mark.parametrize("name", ["mask.png", "mask.jpg"])
def test_masks_with_soft_edges_are_cut_at_half(name, tmp_path):
    y, x = np.mgrid[:48, :48] - 23.5
    soft = 255 * (16 - np.hypot(x, y)).clip(-1, 1) / 2 + 127.5
    truth, counted = read_mask(saved(tmp_path / name, soft.round(), "L"))
    assert counted.all()
    assert (truth.numpy() != (np.hypot(x, y) < 16)).mean() < 0.01


def test_transparent_masks_are_refused(tmp_path):
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="transparent"):
        read_mask(tmp_path / "mask.png")


def test_numbers_of_a_palette_may_be_high(tmp_path):
    image = Image.frombytes("P", (2, 2), bytes([0, 200, 255, 100]))
    image.putpalette([i % 256 for i in range(768)])
    image.save(tmp_path / "mask.png")
    truth, counted = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, True], [False, True]]
    assert counted.tolist() == [[True, True], [False, True]]


def test_of_a_mask_with_soft_edges_what_is_brighter_than_half_is_object(tmp_path):
    truth, counted = read_mask(saved(tmp_path / "mask.png", [[0, 100, 127], [128, 200, 255]], "L"))
    assert truth.tolist() == [[False, False, False], [True, True, True]]
    assert counted.all()


def test_numbers_of_16_bits_are_no_shades(tmp_path):
    Image.fromarray(np.array([[0, 5, 200], [255, 300, 0]], np.uint16)).save(tmp_path / "mask.png")
    truth, counted = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, True, True], [False, True, False]]
    assert counted.tolist() == [[True, True, True], [False, True, True]]


def test_a_transparent_mask_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2, 4), (255, 255, 255, 0), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png: transparent; expected grey or a palette$"):
        read_mask(tmp_path / "mask.png")


def test_an_empty_mask_counts_everywhere_and_holds_nothing(tmp_path):
    truth, counted = read_mask(saved(tmp_path / "mask.png", np.zeros((2, 2)), "L"))
    assert not truth.any()
    assert counted.all()


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_a_mask_that_is_no_image_is_refused(data, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^mask {path}: not an image$"):
        read_mask(path)


# -- scenes ------------------------------------------------------------------------------------------------------------


def folder_of(tmp_path, scenes):
    """{name: (image (H, W, 3), mask (H, W) or None)} -> its two folders."""
    for name, (image, mask) in scenes.items():
        for folder in ("images", "masks"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        if mask is not None:
            Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path / "images", tmp_path / "masks"


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box(height, width, top, left, bottom, right, value=255):
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = value
    return mask


def scenes_in(tmp_path, scenes, weights, **options):
    images, of_masks = folder_of(tmp_path, scenes)
    config, model, frame = eye_and_frame(
        weights, images=(str(images),), masks=str(of_masks), **options
    )
    return config, model, scenes_of_files(config, model, frame, find(config, frame)[0])


def test_scenes_are_images_with_the_masks_of_their_names(tmp_path, weights):
    made = {
        "b": (noise(20, 30, 1), box(20, 30, 0, 0, 9, 9)),
        "a": (noise(24, 28, 2), box(24, 28, 8, 8, 20, 20, 3)),
    }
    made["a"][1][0, 0] = 255  # void
    _, _, scenes = scenes_in(tmp_path, made, weights, image_size=0)
    assert [name for name, _ in scenes] == [
        str(tmp_path / "images" / f"{name}.png") for name in "ab"
    ]
    first, second = (read() for _, read in scenes)
    np.testing.assert_array_equal(first.pixels.permute(1, 2, 0).numpy(), made["a"][0])
    np.testing.assert_array_equal(first.truth.numpy(), made["a"][1] == 3)
    np.testing.assert_array_equal(first.counted.numpy(), made["a"][1] != 255)
    np.testing.assert_array_equal(
        second.pixels.permute(1, 2, 0).numpy(), made["b"][0][:, 1:29]
    )  # cropped to patches
    np.testing.assert_array_equal(second.truth.numpy(), made["b"][1][:, 1:29] == 255)
    assert second.counted.all()


def test_with_padding_the_mask_stays_as_large_as_the_image(tmp_path, weights):
    _, _, scenes = scenes_in(
        tmp_path,
        {"a": (noise(21, 30), box(21, 30, 3, 4, 21, 30))},
        weights,
        image_size=0,
        fit="pad",
    )
    scene = scenes[0][1]()
    assert scene.pixels.shape == (3, 24, 32)
    assert scene.truth.shape == scene.counted.shape == (21, 30)
    np.testing.assert_array_equal(scene.truth.numpy(), box(21, 30, 3, 4, 21, 30) > 0)


def test_masks_are_resized_with_their_images(tmp_path, weights):
    """Eight by eight blocks stay blocks."""
    mask = box(64, 96, 16, 32, 48, 80)
    image = np.repeat(mask[..., None], 3, axis=2)
    _, _, scenes = scenes_in(tmp_path, {"a": (image, mask)}, weights, image_size=24)
    scene = scenes[0][1]()
    assert scene.truth.shape == (16, 24)
    np.testing.assert_array_equal(scene.truth.numpy(), box(16, 24, 4, 8, 12, 20) > 0)
    agree = (scene.pixels[0] > 127) == scene.truth
    assert agree.all()


def test_a_pixel_of_a_small_mask_is_one_of_the_large_mask(tmp_path, weights):
    """The one in the middle: a mask is not blurred, and what does not count does not spread."""
    mask = np.random.default_rng(0).choice([0, 1, 255], (64, 96)).astype(np.uint8)
    _, _, scenes = scenes_in(tmp_path, {"a": (noise(64, 96), mask)}, weights, image_size=24)
    scene = scenes[0][1]()
    np.testing.assert_array_equal(scene.truth.numpy(), mask[2::4, 2::4] == 1)
    np.testing.assert_array_equal(scene.counted.numpy(), mask[2::4, 2::4] != 255)


def test_masks_are_found_at_any_depth(tmp_path, weights):
    made = {
        "deep/er/a": (noise(16, 16), box(16, 16, 0, 0, 4, 4)),
        "b": (noise(16, 16), box(16, 16, 0, 0, 8, 8)),
    }
    _, _, scenes = scenes_in(tmp_path, made, weights, image_size=0)
    assert [int(read().truth.sum()) for _, read in scenes] == [64, 16]


def test_what_cannot_be_scored_is_told_and_the_others_are_scored(tmp_path, weights):
    made = {
        "alone": (noise(16, 16), None),
        "bare": (noise(16, 16), np.zeros((16, 16), np.uint8)),
        "good": (noise(16, 16), box(16, 16, 4, 4, 12, 12)),
        "other": (noise(16, 20), box(16, 16, 4, 4, 12, 12)),
        "text": (noise(16, 16), None),
    }
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "text.png").write_bytes(b"hello")
    config, model, scenes = scenes_in(tmp_path, made, weights, image_size=0)
    content, sheet, problems = score(config, model, scenes)
    assert content["images"] == 1
    assert len(sheet.rows) == 1
    told = dict(problem.rsplit("/images/", 1)[1].split(": ", 1) for problem in problems)
    assert told == {
        "alone.png": f"no mask named alone in --masks {tmp_path / 'masks'}",
        "bare.png": "no object in the mask",
        "other.png": "image of 20 x 16 pixels, mask of 16 x 16",
        "text.png": f"mask {tmp_path / 'masks' / 'text.png'}: not an image",
    }


def test_an_object_that_is_cropped_away_is_no_object(tmp_path, weights):
    border = np.zeros((18, 16), np.uint8)
    border[0] = 1  # the crop takes a row above and one below
    _, _, scenes = scenes_in(tmp_path, {"a": (noise(18, 16), border)}, weights, image_size=0)
    with pytest.raises(ValueError, match="no object in the mask"):
        scenes[0][1]()


def test_when_nothing_can_be_scored_the_first_reason_is_told(tmp_path, weights):
    config, model, scenes = scenes_in(
        tmp_path, {"a": (noise(16, 16), None), "b": (noise(8, 8), None)}, weights
    )
    (tmp_path / "masks").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"^--masks .*: .*a\.png: no mask named a in --masks"):
        score(config, model, scenes)


def test_a_folder_of_masks_that_is_none_is_refused(tmp_path, weights):
    config, model, frame = eye_and_frame(weights, masks=str(tmp_path / "missing"))
    with pytest.raises(
        ValueError,
        match=r"--masks .*missing is not a folder; expected a folder of masks, or shapes",
    ):
        scenes_of_files(config, model, frame, [])


def test_drawn_scenes_are_the_embedded_sets_validation_images(weights):
    config, model, frame = eye_and_frame(weights, num_images=3, seed=5, image_size=0)
    scenes = scenes_of_shapes(config, model, frame)
    assert [name for name, _ in scenes] == ["shape 0", "shape 1", "shape 2"]
    for index, (_, read) in enumerate(scenes):
        scene, shape = read(), draw_shape(5, "validation", index)
        np.testing.assert_array_equal(scene.pixels.permute(1, 2, 0).numpy(), shape.image)
        np.testing.assert_array_equal(scene.truth.numpy(), shape.mask)
        assert scene.counted.all()
    assert len(scenes_of_shapes(dataclasses.replace(config, num_images=None), model, frame)) == 2000


def test_drawn_scenes_are_those_that_the_run_was_trained_beside(tmp_path, weights):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(weights, run / "teacher.safetensors")
    write_config(dataclasses.replace(RUN, dataset="shapes", seed=11), run)
    config, model, frame = eye_and_frame(str(run), num_images=2, image_size=0)
    scene = scenes_of_shapes(config, model, frame)[1][1]()
    np.testing.assert_array_equal(scene.truth.numpy(), draw_shape(11, "validation", 1).mask)


# -- blobs -------------------------------------------------------------------------------------------------------------


def test_blobs_are_centred_gaussians_from_small_to_large():
    found = blobs(3, 5, 8)
    assert found.shape == (3, 5, 8)
    for number, sigma in enumerate((0.15, 0.325, 0.5)):
        for row, column in np.ndindex(5, 8):
            y, x = (row + 0.5) / 5 - 0.5, (column + 0.5) / 8 - 0.5
            assert found[number, row, column].item() == pytest.approx(
                math.exp(-(y * y + x * x) / (2 * sigma**2))
            )
    torch.testing.assert_close(found, found.flip((1, 2)))


# -- score -------------------------------------------------------------------------------------------------------------


def naive_mask(one_map, threshold):
    """The largest patches, until they hold the mass, of equal ones the last: loops."""
    order = sorted(range(one_map.size), key=lambda i: (-float(one_map.flat[i]), -i))
    mask, kept = np.zeros(one_map.size, bool), 0.0
    for place in order:
        if kept >= threshold * float(one_map.sum(dtype=float)):
            break
        mask[place] = True
        kept += float(one_map.flat[place])
    return mask.reshape(one_map.shape)


def naive_indices(maps, scene, threshold, patch=4):
    """Maps (h, rows, columns) -> the Jaccard index of each head."""
    found = []
    for one_map in maps:
        mask = naive_mask(one_map, threshold)
        both = either = 0
        for y, x in np.ndindex(*scene.truth.shape):
            if scene.counted[y, x]:
                kept, there = bool(mask[y // patch, x // patch]), bool(scene.truth[y, x])
                both, either = both + (kept and there), either + (kept or there)
        found.append(both / either)
    return found


def random_scenes(count, sizes=((16, 24),), seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        truth = np.zeros((height, width), bool)
        top, left = rng.integers(0, height - 6), rng.integers(0, width - 6)
        truth[top : top + 6, left : left + 6] = True
        pixels = torch.from_numpy(noise(-(-height // 4) * 4, -(-width // 4) * 4, number)).permute(
            2, 0, 1
        )
        counted = rng.random((height, width)) < 0.8
        made.append(Scene(pixels, torch.from_numpy(truth), torch.from_numpy(counted)))
    return made


def as_scenes(made):
    return [(f"scene {number}", lambda scene=scene: scene) for number, scene in enumerate(made)]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    "sizes",
    [((16, 24),), ((14, 23), (14, 23), (16, 16), (14, 23))],
    ids=["one size", "several sizes, padded"],
)
def test_the_score_is_that_of_loops_over_images_heads_and_pixels(sizes, layer, weights):
    config, model, _ = eye_and_frame(weights, threshold=0.45, layer=layer, seed=3)
    made = random_scenes(9, sizes)
    content, _, problems = score(config, model, as_scenes(made))
    assert problems == []
    torch.manual_seed(3)
    networks = {"pico": model.backbone, "untrained": build(model.backbone.metadata).eval()}
    mean, std = (torch.tensor(values)[:, None, None] for values in (RUN.mean, RUN.std))
    indices = {name: [] for name in (*networks, "centred blobs")}
    for scene in made:
        for name, network in networks.items():
            maps = (
                look(network, ((scene.pixels / 255 - mean) / std)[None], layer=layer)
                .attention[0]
                .numpy()
            )
            indices[name].append(naive_indices(maps, scene, 0.45))
        grid = scene.pixels.shape[1] // 4, scene.pixels.shape[2] // 4
        indices["centred blobs"].append(naive_indices(blobs(4, *grid).numpy(), scene, 0.45))
    told = {"pico": content["results"], **content["baselines"]}
    assert set(told) == set(indices)
    for name, of_images in indices.items():
        table = np.array(of_images)
        assert told[name]["heads"] == pytest.approx(100 * table.mean(0), abs=2e-3)
        assert told[name]["best_head"] == pytest.approx(100 * table.max(1).mean(), abs=2e-3)
        assert told[name]["head"] == table.mean(0).argmax()
        assert told[name]["one_head"] == pytest.approx(100 * table.mean(0).max(), abs=2e-3)
        assert told[name]["one_head"] <= told[name]["best_head"]
        low, high = told[name]["best_head_ci95"]
        assert low < told[name]["best_head"] < high
    assert told["pico"] != told["untrained"]
    assert content["images"] == 9
    assert (content["threshold"], content["layer"], content["image_size"]) == (0.45, layer, 32)
    assert content["weights"] == weights


@pytest.mark.parametrize("pixels", [1, 2 * 16 * 24, 10**9])
def test_how_many_images_go_through_at_once_changes_nothing(pixels, weights, monkeypatch):
    config, model, _ = eye_and_frame(weights)
    made = random_scenes(5)
    expected, _, _ = score(config, model, as_scenes(made))
    monkeypatch.setattr(localization, "BATCH_PIXELS", pixels)
    seen = []
    call = AttentionModel.__call__
    monkeypatch.setattr(
        AttentionModel,
        "__call__",
        lambda self, images, *rest: seen.append(len(images)) or call(self, images, *rest),
    )
    found, _, _ = score(config, model, as_scenes(made))
    drop = {"seconds"}
    assert {k: v for k, v in found.items() if k not in drop} == {
        k: v for k, v in expected.items() if k not in drop
    }
    assert seen[::2] == {1: 5 * [1], 768: [2, 2, 1], 10**9: [5]}[pixels]


def test_every_map_that_finds_the_object_scores_100(weights):
    """All of a blob's mass, where the object is the whole image."""
    config, model, _ = eye_and_frame(weights, threshold=0.999999)
    everywhere = torch.ones(16, 24, dtype=torch.bool)
    scene = Scene(torch.from_numpy(noise(16, 24)).permute(2, 0, 1), everywhere, everywhere)
    content, _, _ = score(config, model, as_scenes([scene]))
    assert content["baselines"]["centred blobs"]["best_head"] == 100
    assert content["results"]["best_head"] == 100


def test_the_seed_draws_the_untrained_network(weights):
    made = random_scenes(4)
    found = []
    for seed in (0, 0, 1):
        config, model, _ = eye_and_frame(weights, seed=seed)
        found.append(score(config, model, as_scenes(made))[0])
    heads = [one["baselines"]["untrained"]["heads"] for one in found]
    assert heads[0] == heads[1] != heads[2]
    assert found[0]["results"]["heads"] == found[2]["results"]["heads"]


def test_the_sheet_shows_the_first_images_with_what_their_best_heads_keep(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(localization, "BATCH_PIXELS", 1)  # a batch each
    config, model, _ = eye_and_frame(weights, images_per_figure=2, threshold=0.5)
    made = random_scenes(3, ((14, 23),))
    _, sheet, _ = score(config, model, as_scenes(made))
    assert sheet.name == "masks"
    assert [[cell.title for cell in row] for row in sheet.rows] == [
        ["image", "object", "pico", "untrained", "centred blobs"],
        5 * [""],
    ]
    mean, std = (torch.tensor(values)[:, None, None] for values in (RUN.mean, RUN.std))
    for scene, row in zip(made, sheet.rows, strict=False):
        image = scene.pixels[:, :14, :23].permute(1, 2, 0).numpy() / 255
        maps = look(model.backbone, ((scene.pixels / 255 - mean) / std)[None]).attention[0].numpy()
        best = maps[int(np.argmax(naive_indices(maps, scene, 0.5)))]
        kept = naive_mask(best, 0.5).repeat(4, 0).repeat(4, 1)[:14, :23]
        for cell, mask in zip(
            row, (np.ones((14, 23), bool), scene.truth.numpy(), kept), strict=False
        ):
            times = math.ceil(256 / 23)
            grey = 0.25 * (image @ [0.299, 0.587, 0.114])[..., None]
            expected = np.where(mask[..., None], image, grey).repeat(times, 0).repeat(times, 1)
            assert np.abs(cell.picture - 255 * expected).max() <= 1
    write(sheet, tmp_path, ["png"], width=2, titles=True, dpi=50)


def test_the_table_names_the_measure_and_both_choices_of_heads(weights):
    config, model, _ = eye_and_frame(weights)
    content, _, _ = score(config, model, as_scenes(random_scenes(3)))
    header, _, *rows = listed(content, "pico").splitlines()
    assert "Jaccard index with the object, %" in header
    assert "best head of each image [95 %]" in header
    assert [row.split("  ")[0] for row in rows] == ["pico", "untrained", "centred blobs"]
    assert f"{content['results']['best_head']:.1f} [" in rows[0]
    assert f"{content['baselines']['centred blobs']['one_head']:.1f} [" in rows[2]


def test_an_eye_that_looks_at_the_object_beats_the_blobs(weights, monkeypatch):
    """End to end on drawn shapes: maps that are the objects' own shares of the patches."""
    config, model, frame = eye_and_frame(weights, num_images=8, threshold=0.9, image_size=32)
    scenes = scenes_of_shapes(config, model, frame)
    truths = [read().truth.float() for _, read in scenes]
    maps = (
        torch.nn.functional.avg_pool2d(torch.stack(truths)[:, None], 4).expand(-1, 4, -1, -1) + 1e-6
    )
    call = AttentionModel.__call__

    def looked(self, images, *rest):
        sight = call(self, images, *rest)
        return sight._replace(attention=maps) if self.title == "pico" else sight

    monkeypatch.setattr(AttentionModel, "__call__", looked)
    content, _, _ = score(config, model, scenes)
    assert content["results"]["best_head"] > 75
    assert content["results"]["best_head"] > content["baselines"]["centred blobs"]["best_head"] + 10


def test_images_of_one_name_have_the_masks_of_their_own_folders(tmp_path, weights):
    made = {
        f"{film}/0001": (noise(16, 16), box(16, 16, 0, 0, side, side))
        for film, side in (("a", 4), ("b", 12))
    }
    _, _, scenes = scenes_in(tmp_path, made, weights, image_size=0)
    assert [int(read().truth.sum()) for _, read in scenes] == [16, 144]


def test_other_files_beside_the_masks_are_no_masks(tmp_path, weights):
    scenes_in(tmp_path, {"a": (noise(16, 16), box(16, 16, 0, 0, 4, 4))}, weights, image_size=0)
    (tmp_path / "masks" / "a.txt").write_text("notes")
    config, model, frame = eye_and_frame(
        weights, images=(str(tmp_path / "images"),), masks=str(tmp_path / "masks")
    )
    assert scenes_of_files(config, model, frame, find(config, frame)[0])[0][1]().truth.any()


def test_large_masks_are_not_for_pil_to_refuse(tmp_path, monkeypatch):
    Image.fromarray(box(10, 10, 2, 2, 4, 4)).save(tmp_path / "mask.png")
    for limit in (60, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_mask(tmp_path / "mask.png")[0].sum() == 4


def test_weights_that_are_called_as_a_baseline_are_scored(weights):
    config, model, _ = eye_and_frame(weights)
    expected = score(config, model, as_scenes(random_scenes(4)))[0]["results"]
    model.title = "untrained"
    content = score(config, model, as_scenes(random_scenes(4)))[0]
    assert content["results"] == expected
    assert len(listed(content, "untrained").splitlines()) == 5
