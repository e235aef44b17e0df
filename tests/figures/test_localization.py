"""Scores of attention maps, against loops over images, heads and pixels."""

import math

import numpy as np
import pytest
import torch
from figure_helpers import RUN, box, mask_scenes, model_and_framing, noise_array, save_weights

from dino_xcit.errors import UserError
from dino_xcit.figures import localization
from dino_xcit.figures.drawing import write
from dino_xcit.figures.localization import blobs, notes, score, scores_table
from dino_xcit.figures.maps import attention_maps
from dino_xcit.figures.model import AttentionModel
from dino_xcit.figures.object_masks import Scene, SceneInput, scenes_of_shapes
from dino_xcit.weights.build import build


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "pico.safetensors", seed=7)


# -- blobs -----------------------------------------------------------------------------------------


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


# -- score -----------------------------------------------------------------------------------------


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
        pixels = torch.from_numpy(
            noise_array(-(-height // 4) * 4, -(-width // 4) * 4, number)
        ).permute(2, 0, 1)
        counted = rng.random((height, width)) < 0.8
        made.append(Scene(pixels, torch.from_numpy(truth), torch.from_numpy(counted), ""))
    return made


def as_scenes(made):
    return [
        SceneInput(f"scene {number}", lambda scene=scene: scene)
        for number, scene in enumerate(made)
    ]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    "sizes",
    [((16, 24),), ((14, 23), (14, 23), (16, 16), (14, 23))],
    ids=["one size", "several sizes, padded"],
)
@pytest.mark.slow
def test_the_score_is_that_of_loops_over_images_heads_and_pixels(sizes, layer, weights):
    config, model, _ = model_and_framing(weights, threshold=0.45, layer=layer, seed=3)
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
                attention_maps(network, ((scene.pixels / 255 - mean) / std)[None], layer=layer)
                .attention[0]
                .numpy()
            )
            indices[name].append(naive_indices(maps, scene, 0.45))
        grid = scene.pixels.shape[1] // 4, scene.pixels.shape[2] // 4
        indices["centred blobs"].append(naive_indices(blobs(4, *grid).numpy(), scene, 0.45))
    reported = {"pico": content["results"], **content["baselines"]}
    assert set(reported) == set(indices)
    for name, of_images in indices.items():
        table = np.array(of_images)
        assert reported[name]["heads"] == pytest.approx(100 * table.mean(0), abs=2e-3)
        assert reported[name]["best_head"] == pytest.approx(100 * table.max(1).mean(), abs=2e-3)
        assert reported[name]["head"] == table.mean(0).argmax()
        assert reported[name]["one_head"] == pytest.approx(100 * table.mean(0).max(), abs=2e-3)
        assert reported[name]["one_head"] <= reported[name]["best_head"]
        low, high = reported[name]["best_head_ci95"]
        assert low < reported[name]["best_head"] < high
    assert reported["pico"] != reported["untrained"]
    assert content["images"] == 9
    assert (content["threshold"], content["layer"], content["image_size"]) == (0.45, layer, 32)
    assert content["weights"] == weights


@pytest.mark.parametrize("pixels", [1, 2 * 16 * 24, 10**9])
def test_the_batch_size_changes_nothing(pixels, weights, monkeypatch):
    config, model, _ = model_and_framing(weights)
    made = random_scenes(5)
    expected, _, _ = score(config, model, as_scenes(made))
    monkeypatch.setattr(localization, "BATCH_PIXELS", pixels)
    seen = []
    call = AttentionModel.__call__
    monkeypatch.setattr(
        AttentionModel,
        "__call__",
        lambda self, images, **options: seen.append(len(images)) or call(self, images, **options),
    )
    found, _, _ = score(config, model, as_scenes(made))
    drop = {"seconds"}
    assert {k: v for k, v in found.items() if k not in drop} == {
        k: v for k, v in expected.items() if k not in drop
    }
    assert seen[::2] == {1: 5 * [1], 768: [2, 2, 1], 10**9: [5]}[pixels]


def scene_of(object_mask, seed=0):
    truth = torch.from_numpy(object_mask > 0)
    pixels = torch.from_numpy(noise_array(*truth.shape, seed)).permute(2, 0, 1)
    return Scene(pixels, truth, torch.ones_like(truth), "")


def test_a_mask_that_equals_the_object_scores_100(weights, monkeypatch):
    config, model, _ = model_and_framing(weights, threshold=0.999)
    scene = scene_of(box(16, 24, 4, 8, 12, 20))
    maps = AttentionModel.__call__(model, scene.pixels[None])
    of_object = scene.truth[::4, ::4].float().expand_as(maps.attention)
    monkeypatch.setattr(
        AttentionModel, "__call__", lambda *_, **__: maps._replace(attention=of_object)
    )
    content, _, _ = score(config, model, as_scenes([scene]))
    assert content["results"]["best_head"] == 100


def test_masks_without_background_are_refused_or_counted(weights):
    """Any map scores its own area there."""
    config, model, _ = model_and_framing(weights)
    whole, part = scene_of(np.ones((16, 24))), scene_of(box(16, 24, 4, 8, 12, 20), 1)
    with pytest.raises(UserError, match=r"no mask has a background.*expected 0 or black"):
        score(config, model, as_scenes([whole, whole]))
    content, _, _ = score(config, model, as_scenes([whole, part]))
    assert content["images_without_background"] == 1
    (line,) = notes(content)
    assert line.startswith("1 of 2 masks have no background")


def test_how_the_masks_were_read_is_said(tmp_path, weights):
    made = {
        "a": (noise_array(16, 16), box(16, 16, 4, 4, 12, 12)),
        "b": (noise_array(16, 16, 1), box(16, 16, 4, 4, 12, 12, value=200)),
    }
    config, model, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    content, _, _ = score(config, model, scenes)
    assert notes(content) == [
        "masks: 1 black and white (white is the object), "
        "1 in shades of grey (over 127 is the object)"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(value, weights):
    config, model, _ = model_and_framing(weights)
    with torch.no_grad():
        model.backbone.cls_attn_blocks[-1].attn.q.weight.fill_(value)
    with pytest.raises(UserError, match=r"values of its attention are not finite.*--precision"):
        score(config, model, as_scenes(random_scenes(1)))


def test_the_seed_sets_the_untrained_network(weights):
    made = random_scenes(4)
    found = []
    for seed in (0, 0, 1):
        config, model, _ = model_and_framing(weights, seed=seed)
        found.append(score(config, model, as_scenes(made))[0])
    heads = [one["baselines"]["untrained"]["heads"] for one in found]
    assert heads[0] == heads[1] != heads[2]
    assert found[0]["results"]["heads"] == found[2]["results"]["heads"]


def test_the_sheet_shows_the_first_images_with_the_masks_of_their_best_heads(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(localization, "BATCH_PIXELS", 1)  # a batch each
    config, model, _ = model_and_framing(weights, images_per_figure=2, threshold=0.5)
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
        maps = (
            attention_maps(model.backbone, ((scene.pixels / 255 - mean) / std)[None])
            .attention[0]
            .numpy()
        )
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
    config, model, _ = model_and_framing(weights)
    content, _, _ = score(config, model, as_scenes(random_scenes(3)))
    header, _, *rows = scores_table(content, "pico").splitlines()
    assert "Jaccard index with the object, %" in header
    assert "best head of each image [95 %]" in header
    assert [row.split("  ")[0] for row in rows] == ["pico", "untrained", "centred blobs"]
    assert f"{content['results']['best_head']:.1f} [" in rows[0]
    assert f"{content['baselines']['centred blobs']['one_head']:.1f} [" in rows[2]


def test_maps_of_the_objects_beat_the_blobs(weights, monkeypatch):
    """End to end on drawn shapes: maps that are the objects' own shares of the patches."""
    config, model, framing = model_and_framing(weights, num_images=8, threshold=0.9, image_size=32)
    scenes = scenes_of_shapes(config, model, framing).inputs
    truths = [scene.read().truth.float() for scene in scenes]
    maps = (
        torch.nn.functional.avg_pool2d(torch.stack(truths)[:, None], 4).expand(-1, 4, -1, -1) + 1e-6
    )
    call = AttentionModel.__call__

    def object_maps(self, images, **options):
        maps_of_model = call(self, images, **options)
        return maps_of_model._replace(attention=maps) if self.title == "pico" else maps_of_model

    monkeypatch.setattr(AttentionModel, "__call__", object_maps)
    content, _, _ = score(config, model, scenes)
    assert content["results"]["best_head"] > 75
    assert content["results"]["best_head"] > content["baselines"]["centred blobs"]["best_head"] + 10


def test_weights_named_like_a_baseline_are_scored(weights):
    config, model, _ = model_and_framing(weights)
    expected = score(config, model, as_scenes(random_scenes(4)))[0]["results"]
    model.title = "untrained"
    content = score(config, model, as_scenes(random_scenes(4)))[0]
    assert content["results"] == expected
    assert len(scores_table(content, "untrained").splitlines()) == 5


def test_what_cannot_be_scored_is_told_and_the_others_are_scored(tmp_path, weights):
    made = {
        "bare": (noise_array(16, 16), np.zeros((16, 16), np.uint8)),
        "good": (noise_array(16, 16), box(16, 16, 4, 4, 12, 12)),
        "other": (noise_array(16, 20), box(16, 16, 4, 4, 12, 12)),
        "text": (noise_array(16, 16), None),
    }
    (tmp_path / "masks").mkdir()  # another program's file
    (tmp_path / "masks" / "text.png").write_bytes(b"hello")
    config, model, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    content, sheet, problems = score(config, model, scenes)
    assert content["images"] == 1
    assert len(sheet.rows) == 1
    reported = dict(problem.rsplit("/images/", 1)[1].split(": ", 1) for problem in problems)
    assert reported == {
        "bare.png": f"no object in the mask {tmp_path / 'masks' / 'bare.png'}",
        "other.png": f"image of 20 x 16 pixels, mask {tmp_path / 'masks' / 'other.png'} of 16 x 16",
        "text.png": f"mask {tmp_path / 'masks' / 'text.png'}: not an image",
    }


def test_when_nothing_can_be_scored_the_first_reason_is_raised(tmp_path, weights):
    small = box(8, 8, 2, 2, 6, 6)
    made = {"a": (noise_array(16, 16), small), "b": (noise_array(24, 24), small)}
    config, model, scenes = mask_scenes(tmp_path, made, weights)
    expected = (
        r"^--masks .*: none of 2 images can be scored; the first: .*a\.png: image of 16 x 16 "
    )
    with pytest.raises(UserError, match=expected + r"pixels, mask .*a\.png of 8 x 8$"):
        score(config, model, scenes)


def test_the_score_leaves_the_random_state_of_the_caller(weights):
    config, model, _ = model_and_framing(weights)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    score(config, model, as_scenes(random_scenes(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fault_of_ours_is_not_taken_for_an_image_that_cannot_be_scored(weights):
    def fail():
        raise ValueError("a bug")

    config, model, _ = model_and_framing(weights)
    with pytest.raises(ValueError, match="a bug"):
        score(config, model, [SceneInput("scene", fail)])
