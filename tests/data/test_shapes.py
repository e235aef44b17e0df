"""The embedded image set is a function of its arguments."""

import subprocess
import sys

import numpy as np
import pytest

from dino_xcit.data.shapes import CLASSES, SIZE, draw_shape


def same(one, other):
    return (
        np.array_equal(one.image, other.image)
        and one.label == other.label
        and np.array_equal(one.mask, other.mask)
    )


def test_same_arguments_give_the_same_image_whatever_came_before():
    first = draw_shape(0, "train", 5)
    draw_shape(3, "validation", 8)
    np.random.default_rng().random()
    assert same(draw_shape(0, "train", 5), first)


@pytest.mark.parametrize(
    "arguments", [(1, "train", 5), (0, "validation", 5), (0, "train", 5 + len(CLASSES))]
)
def test_another_seed_split_or_index_gives_another_image_and_outline(arguments):
    one, other = draw_shape(0, "train", 5), draw_shape(*arguments)
    assert one.label == other.label
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.mask, other.mask)


def test_images_are_uint8_and_masks_bool():
    shape = draw_shape(0, "train", 0)
    assert shape.image.shape == (SIZE, SIZE, 3)
    assert shape.image.dtype == np.uint8
    assert shape.mask.shape == (SIZE, SIZE)
    assert shape.mask.dtype == bool


def test_labels_go_round_the_classes():
    labels = [draw_shape(0, "train", index).label for index in range(3 * len(CLASSES))]
    assert labels == list(range(len(CLASSES))) * 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_object_is_in_the_image_and_leaves_space_for_the_background(split):
    masks = np.stack(
        [draw_shape(seed, split, index).mask for seed in (0, 1) for index in range(60)]
    )
    shares = masks.mean((1, 2))
    assert shares.min() > 0.05
    assert shares.max() < 0.95
    assert masks[:, :: SIZE - 1, :: SIZE - 1].mean() < 0.2  # corners
    assert masks[:, SIZE // 2, SIZE // 2].mean() > 0.8


def roughness(values, where):
    """Standard deviation of the values there from the plane that fits them best."""
    y, x = np.nonzero(where)
    plane = np.stack([y, x, np.ones_like(x)], axis=1).astype(float)
    return (values[where] - plane @ np.linalg.lstsq(plane, values[where], rcond=None)[0]).std()


def test_the_texture_is_inside_the_mask():
    shapes = [draw_shape(0, "train", index, channels=1) for index in range(60)]
    inside, outside = (
        np.mean([roughness(s.image[..., 0].astype(float), s.mask == there) for s in shapes])
        for there in (True, False)
    )
    assert inside > 1.5 * outside


def test_size_scales_the_object_with_the_image():
    for index in range(10):
        small, large = draw_shape(0, "train", index), draw_shape(0, "train", index, size=2 * SIZE)
        assert large.image.shape == (2 * SIZE, 2 * SIZE, 3)
        enlarged = small.mask.repeat(2, axis=0).repeat(2, axis=1)
        assert (enlarged & large.mask).sum() > 0.9 * (enlarged | large.mask).sum()


def test_channels_repeat_the_grey_image():
    grey = draw_shape(0, "train", 3, channels=1)
    assert grey.image.shape == (SIZE, SIZE, 1)
    for channels in (3, 5):
        assert np.array_equal(
            draw_shape(0, "train", 3, channels=channels).image, grey.image.repeat(channels, axis=2)
        )


def test_images_are_not_flat():
    assert min(draw_shape(0, "train", index).image.std() for index in range(30)) > 2


@pytest.mark.slow
def test_the_module_imports_no_torch():
    code = "import sys, dino_xcit.data.shapes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
