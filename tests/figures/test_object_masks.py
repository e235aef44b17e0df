"""Masks read from files and from drawn shapes, with their images."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from figure_helpers import RUN, box, mask_scenes, model_and_framing, noise_array, save_weights
from PIL import Image

from dino_xcit.data.shapes import draw_shape
from dino_xcit.errors import UserError
from dino_xcit.figures.inputs import find
from dino_xcit.figures.mask_files import read_mask
from dino_xcit.figures.object_masks import scenes_of_files, scenes_of_shapes
from dino_xcit.run_folder import write_config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "pico.safetensors")


# -- files of masks --------------------------------------------------------------------------------


def saved(path, values, mode):
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return path


def test_masks_of_pascal_voc_have_objects_ground_and_void(tmp_path):
    """A palette file whose numbers are classes; 255 is the border that does not count."""
    values = np.array([[0, 0, 1], [20, 255, 0], [255, 15, 0]], np.uint8)
    image = Image.frombytes("P", (3, 3), values.tobytes())
    image.putpalette([(37 * i) % 256 for i in range(768)])
    image.save(tmp_path / "mask.png")
    truth, counted, _ = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, False, True], [True, False, False], [False, True, False]]
    assert counted.tolist() == [[True, True, True], [True, False, True], [False, True, True]]
    assert truth.dtype == counted.dtype == torch.bool


@pytest.mark.parametrize("name", ["mask.png", "mask.bmp", "mask.tif"])
def test_255_is_object_where_there_is_nothing_but_0_and_255(name, tmp_path):
    truth, counted, _ = read_mask(saved(tmp_path / name, [[0, 255, 0], [255, 255, 0]], "L"))
    assert truth.tolist() == [[False, True, False], [True, True, False]]
    assert counted.all()


@pytest.mark.parametrize("value", [1, 7, 128, 254])
def test_any_number_but_0_is_object(value, tmp_path):
    truth, counted, _ = read_mask(saved(tmp_path / "mask.png", [[0, value], [value, 0]], "L"))
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
        truth, counted, _ = read_mask(saved(tmp_path / name, bits, mode))
        assert truth.tolist() == expected, mode
        assert counted.all()
    Image.fromarray(np.array([[0, 300, 1], [0, 0, 65535]], np.uint16)).save(tmp_path / "mask.png")
    truth, counted, _ = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == expected
    assert counted.all()


@pytest.mark.parametrize("name", ["mask.png", "mask.jpg"])
def test_masks_with_soft_edges_are_cut_at_half(name, tmp_path):
    y, x = np.mgrid[:48, :48] - 23.5
    soft = 255 * (16 - np.hypot(x, y)).clip(-1, 1) / 2 + 127.5
    truth, counted, _ = read_mask(saved(tmp_path / name, soft.round(), "L"))
    assert counted.all()
    assert (truth.numpy() != (np.hypot(x, y) < 16)).mean() < 0.01


def test_indices_of_a_palette_may_be_high(tmp_path):
    image = Image.frombytes("P", (2, 2), bytes([0, 200, 255, 100]))
    image.putpalette([i % 256 for i in range(768)])
    image.save(tmp_path / "mask.png")
    truth, counted, _ = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, True], [False, True]]
    assert counted.tolist() == [[True, True], [False, True]]


def test_values_above_half_are_object_in_a_mask_with_soft_edges(tmp_path):
    truth, counted, _ = read_mask(
        saved(tmp_path / "mask.png", [[0, 100, 127], [128, 200, 255]], "L")
    )
    assert truth.tolist() == [[False, False, False], [True, True, True]]
    assert counted.all()


def test_values_of_16_bits_are_not_shades(tmp_path):
    Image.fromarray(np.array([[0, 5, 200], [255, 300, 0]], np.uint16)).save(tmp_path / "mask.png")
    truth, counted, _ = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[False, True, True], [False, True, False]]
    assert counted.tolist() == [[True, True, True], [False, True, True]]


def test_a_transparent_mask_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2, 4), (255, 255, 255, 0), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask.png: transparent; expected grey or a palette$"):
        read_mask(tmp_path / "mask.png")


def test_an_empty_mask_counts_everywhere_and_holds_nothing(tmp_path):
    truth, counted, _ = read_mask(saved(tmp_path / "mask.png", np.zeros((2, 2)), "L"))
    assert not truth.any()
    assert counted.all()


def test_255_beside_0_alone_is_void_where_other_masks_number_their_objects(tmp_path, weights):
    made = {
        "border": (noise_array(16, 16), box(16, 16, 4, 4, 12, 12, value=255)),
        "numbered": (noise_array(16, 16, 1), box(16, 16, 4, 4, 12, 12, value=3)),
    }
    _, _, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    with pytest.raises(UserError, match=r"^no object in the mask .*border\.png$"):
        scenes[0].read()
    assert scenes[1].read().truth.sum() == 64


def test_in_a_mask_of_colours_black_is_background_and_vocs_colour_is_void(tmp_path):
    """Their luma would be shades of grey, of which the border is the brightest."""
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0, 1], colours[1, 1], colours[1, 2] = (0, 0, 128), (224, 224, 192), (0, 0, 255)
    Image.fromarray(colours).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.truth.tolist() == [[False, True, False], [False, False, True]]
    assert mask.counted.tolist() == [[True, True, True], [True, False, True]]
    assert mask.reading == "in colours (black is the background)"


def test_a_photograph_is_not_a_mask(tmp_path):
    Image.fromarray(noise_array(32, 32)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: 10\d\d colours, as of a photograph"):
        read_mask(tmp_path / "mask.png")


def test_a_palette_of_black_and_white_is_read_by_its_colours(tmp_path):
    image = Image.frombytes("P", (2, 2), bytes([0, 1, 1, 0]))
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "mask.png")
    truth, counted, _ = read_mask(tmp_path / "mask.png")
    assert truth.tolist() == [[True, False], [False, True]]
    assert counted.all()


def test_float_masks_hold_whole_numbers(tmp_path):
    Image.fromarray(np.array([[0, 2], [1, 0]], np.float32)).save(tmp_path / "mask.tif")
    assert read_mask(tmp_path / "mask.tif").truth.tolist() == [[False, True], [True, False]]
    Image.fromarray(np.array([[0, 0.5], [1, 0]], np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(UserError, match="not whole numbers; expected a number for each object"):
        read_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_a_mask_that_is_not_an_image_is_refused(data, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"^mask {path}: not an image$"):
        read_mask(path)


def test_pils_limit_on_pixels_does_not_apply_to_masks_and_is_restored(tmp_path, monkeypatch):
    Image.fromarray(box(10, 10, 2, 2, 4, 4)).save(tmp_path / "mask.png")
    for limit in (60, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_mask(tmp_path / "mask.png")[0].sum() == 4
        assert limit == Image.MAX_IMAGE_PIXELS


# -- scenes ----------------------------------------------------------------------------------------


def test_scenes_are_images_with_the_masks_of_their_names(tmp_path, weights):
    made = {
        "b": (noise_array(20, 30, 1), box(20, 30, 0, 0, 9, 9, value=7)),
        "a": (noise_array(24, 28, 2), box(24, 28, 8, 8, 20, 20, 3)),
    }
    made["a"][1][0, 0] = 255  # void
    _, _, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    assert [scene.name for scene in scenes] == [
        str(tmp_path / "images" / f"{name}.png") for name in "ab"
    ]
    first, second = (scene.read() for scene in scenes)
    np.testing.assert_array_equal(first.pixels.permute(1, 2, 0).numpy(), made["a"][0])
    np.testing.assert_array_equal(first.truth.numpy(), made["a"][1] == 3)
    np.testing.assert_array_equal(first.counted.numpy(), made["a"][1] != 255)
    np.testing.assert_array_equal(
        second.pixels.permute(1, 2, 0).numpy(), made["b"][0][:, 1:29]
    )  # cropped to patches
    np.testing.assert_array_equal(second.truth.numpy(), made["b"][1][:, 1:29] == 7)
    assert second.counted.all()


def test_with_padding_the_mask_stays_as_large_as_the_image(tmp_path, weights):
    _, _, scenes = mask_scenes(
        tmp_path,
        {"a": (noise_array(21, 30), box(21, 30, 3, 4, 21, 30))},
        weights,
        image_size=0,
        fit="pad",
    )
    scene = scenes[0].read()
    assert scene.pixels.shape == (3, 24, 32)
    assert scene.truth.shape == scene.counted.shape == (21, 30)
    np.testing.assert_array_equal(scene.truth.numpy(), box(21, 30, 3, 4, 21, 30) > 0)


def test_masks_are_resized_with_their_images(tmp_path, weights):
    """Eight by eight blocks stay blocks."""
    mask = box(64, 96, 16, 32, 48, 80)
    image = np.repeat(mask[..., None], 3, axis=2)
    _, _, scenes = mask_scenes(tmp_path, {"a": (image, mask)}, weights, image_size=24)
    scene = scenes[0].read()
    assert scene.truth.shape == (16, 24)
    np.testing.assert_array_equal(scene.truth.numpy(), box(16, 24, 4, 8, 12, 20) > 0)
    agree = (scene.pixels[0] > 127) == scene.truth
    assert agree.all()


def test_a_pixel_of_a_small_mask_is_one_of_the_large_mask(tmp_path, weights):
    """The one in the middle: a mask is not blurred, and what does not count does not spread."""
    mask = np.random.default_rng(0).choice([0, 1, 255], (64, 96)).astype(np.uint8)
    _, _, scenes = mask_scenes(tmp_path, {"a": (noise_array(64, 96), mask)}, weights, image_size=24)
    scene = scenes[0].read()
    np.testing.assert_array_equal(scene.truth.numpy(), mask[2::4, 2::4] == 1)
    np.testing.assert_array_equal(scene.counted.numpy(), mask[2::4, 2::4] != 255)


def test_masks_are_found_at_any_depth(tmp_path, weights):
    made = {
        "deep/er/a": (noise_array(16, 16), box(16, 16, 0, 0, 4, 4)),
        "b": (noise_array(16, 16), box(16, 16, 0, 0, 8, 8)),
    }
    _, _, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    assert [int(scene.read().truth.sum()) for scene in scenes] == [64, 16]


def test_an_object_that_is_cropped_away_is_refused(tmp_path, weights):
    border = np.zeros((18, 16), np.uint8)
    border[0] = 1  # the crop takes a row above and one below
    _, _, scenes = mask_scenes(
        tmp_path, {"a": (noise_array(18, 16), border)}, weights, image_size=0
    )
    with pytest.raises(UserError, match="no object in the mask"):
        scenes[0].read()


def test_a_missing_folder_of_masks_is_refused(tmp_path, weights):
    config, model, framing = model_and_framing(weights, masks=str(tmp_path / "missing"))
    with pytest.raises(
        UserError,
        match=r"--masks .*missing is not a folder; expected a folder of masks, or shapes",
    ):
        scenes_of_files(config, model, framing, [])


def test_drawn_scenes_are_the_embedded_sets_validation_images(weights):
    config, model, framing = model_and_framing(weights, num_images=3, seed=5, image_size=0)
    scenes = scenes_of_shapes(config, model, framing).inputs
    assert [scene.name for scene in scenes] == ["shape 0", "shape 1", "shape 2"]
    for index, scene_input in enumerate(scenes):
        scene, shape = scene_input.read(), draw_shape(5, "validation", index)
        np.testing.assert_array_equal(scene.pixels.permute(1, 2, 0).numpy(), shape.image)
        np.testing.assert_array_equal(scene.truth.numpy(), shape.mask)
        assert scene.counted.all()
    assert (
        len(scenes_of_shapes(dataclasses.replace(config, num_images=None), model, framing).inputs)
        == 2000
    )


def test_drawn_scenes_have_the_seed_of_the_run(tmp_path, weights):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(weights, run / "teacher.safetensors")
    write_config(dataclasses.replace(RUN, dataset="shapes", seed=11), run)
    config, model, framing = model_and_framing(str(run), num_images=2, image_size=0)
    scene = scenes_of_shapes(config, model, framing).inputs[1].read()
    np.testing.assert_array_equal(scene.truth.numpy(), draw_shape(11, "validation", 1).mask)


def test_images_of_one_name_have_the_masks_of_their_own_folders(tmp_path, weights):
    made = {
        f"{video}/0001": (noise_array(16, 16), box(16, 16, 0, 0, side, side))
        for video, side in (("a", 4), ("b", 12))
    }
    _, _, scenes = mask_scenes(tmp_path, made, weights, image_size=0)
    assert [int(scene.read().truth.sum()) for scene in scenes] == [16, 144]


def test_other_files_among_the_masks_are_ignored(tmp_path, weights):
    mask_scenes(
        tmp_path, {"a": (noise_array(16, 16), box(16, 16, 0, 0, 4, 4))}, weights, image_size=0
    )
    (tmp_path / "masks" / "a.txt").write_text("notes")
    config, model, framing = model_and_framing(
        weights, images=(str(tmp_path / "images"),), masks=str(tmp_path / "masks")
    )
    scenes = scenes_of_files(config, model, framing, find(config, framing).images)
    assert scenes.inputs[0].read().truth.any()
