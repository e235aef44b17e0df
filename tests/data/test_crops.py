"""Boxes against torchvision's, sampled params against the options, pixels against PIL."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import PICO_PATHS
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.crops import MultiCrop, own_generator, sample_boxes
from dino_xcit.data.framing import resize
from dino_xcit.data.photometric import PhotometricParam

RATIOS = (3 / 4, 4 / 3)
CONFIG = RunConfig(global_crops_size=24, local_crops_size=12, local_crops_number=3)
IMAGES = 2000


def image(height=50, width=70, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def many_boxes(height, width, config=CONFIG, images=IMAGES):
    """(images, V, 4): top, left, height, width."""
    crop, rng = MultiCrop(config, PICO_PATHS), np.random.default_rng(0)
    return np.stack(
        [sample_boxes(rng, height, width, crop.scale_low, crop.scale_high) for _ in range(images)]
    )


def many_params(config=CONFIG, images=IMAGES):
    """(images, V, len(PhotometricParam))."""
    crop, rng = MultiCrop(config, PICO_PATHS), np.random.default_rng(0)
    return np.stack([crop.sample_photometric(rng) for _ in range(images)])


def assert_share(sampled, probability):
    """Within 4 standard deviations of a binomial share; exact for 0 and 1."""
    sigma = np.sqrt(probability * (1 - probability) / sampled.size)
    assert abs(sampled.mean() - probability) <= 4 * sigma


def assert_same_mean(sample, other):
    """Within 4 standard deviations of the difference of two means."""
    sigma = np.sqrt(np.var(sample) / len(sample) + np.var(other) / len(other))
    assert abs(np.mean(sample) - np.mean(other)) <= 4 * sigma


def assert_same_views(one, other, same=True):
    for name in ("global_crops", "global_params", "local_crops", "local_params"):
        assert torch.equal(getattr(one, name), getattr(other, name)) == same, name


# -- boxes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(200, 300), (64, 64), (300, 260), (32, 40)])
def test_boxes_are_inside_and_of_allowed_area_and_aspect(height, width):
    boxes = many_boxes(height, width, images=300)
    top, left, h, w = np.moveaxis(boxes, -1, 0)
    assert (np.minimum(np.minimum(top, left), np.minimum(h, w) - 1) >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    fallback = np.array(
        RandomResizedCrop.get_params(torch.empty(1, height, width), [2.0, 2.0], list(RATIOS))
    )
    sampled = (boxes != fallback).any(-1)
    assert sampled.mean() > 0.95
    for kind, (low, high) in (
        (slice(0, 2), CONFIG.global_crops_scale),
        (slice(2, None), CONFIG.local_crops_scale),
    ):
        a, b = (
            h[:, kind][sampled[:, kind]],
            w[:, kind][sampled[:, kind]],
        )  # sides were rounded: up to half a pixel off
        assert ((a + 0.5) * (b + 0.5) >= low * height * width).all()
        assert ((a - 0.5) * (b - 0.5) <= high * height * width).all()
        assert ((b + 0.5) / (a - 0.5) >= RATIOS[0]).all()
        assert ((b - 0.5) / (a + 0.5) <= RATIOS[1]).all()


@pytest.mark.parametrize(
    ("kind", "scale"),
    [(0, CONFIG.global_crops_scale), (1, CONFIG.global_crops_scale), (4, (0.05, 0.4))],
)
def test_boxes_are_distributed_as_torchvisions(kind, scale):
    height, width = 240, 320
    ours = many_boxes(height, width)[:, kind]
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, list(scale), list(RATIOS)) for _ in range(IMAGES)]
    )
    traits = [
        [b[:, 0], b[:, 1], b[:, 2] * b[:, 3], np.log(b[:, 3] / b[:, 2])] for b in (ours, theirs)
    ]
    for sample, other in zip(*traits, strict=True):
        assert_same_mean(sample, other)
        assert_same_mean((sample - other.mean()) ** 2, (other - other.mean()) ** 2)


def test_boxes_are_anywhere_in_the_image_down_to_the_last_pixel():
    config = replace(CONFIG, global_crops_scale=(0.3, 0.5), local_crops_scale=(0.3, 0.5))
    boxes = many_boxes(20, 20, config)
    places, margins = boxes[..., :2], 20 - boxes[..., 2:]
    assert ((places == 0).mean((0, 1)) > 0.05).all()
    assert ((places == margins).mean((0, 1)) > 0.05).all()
    offsets = (places - margins / 2).reshape(len(boxes), -1)  # (images, V * 2), symmetric around 0
    assert (np.abs(offsets.mean(0)) <= 4 * offsets.std(0) / np.sqrt(len(boxes))).all()
    assert (
        np.abs(np.corrcoef(offsets.T) - np.eye(offsets.shape[1])).max() < 0.12
    )  # each place is sampled on its own


def test_each_kind_of_crop_fills_its_own_range_of_scales():
    config = replace(CONFIG, global_crops_scale=(0.25, 0.5), local_crops_scale=(0.1, 0.2))
    boxes = many_boxes(400, 400, config, images=400)
    share = boxes[..., 2] * boxes[..., 3] / 400**2
    for kind, (low, high) in ((slice(0, 2), (0.25, 0.5)), (slice(2, None), (0.1, 0.2))):
        margin = 0.03 * (high - low)
        assert low - margin <= share[:, kind].min() <= low + margin
        assert high - margin <= share[:, kind].max() <= high + margin


@pytest.mark.parametrize(("height", "width"), [(20, 100), (100, 20), (10, 31), (3, 500), (1, 9)])
def test_images_too_narrow_fall_back_to_torchvisions_centre_box(height, width):
    config = replace(CONFIG, global_crops_scale=(0.9, 1.0), local_crops_scale=(0.8, 0.9))
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), [0.9, 1.0], list(RATIOS))
    boxes = many_boxes(height, width, config, images=3)
    assert (boxes == np.array(expected)).all()


def test_image_of_one_pixel_gives_views():
    views = MultiCrop(CONFIG, PICO_PATHS)(image(1, 1), (0, 0, 0))
    torch.testing.assert_close(views.local_crops, image(1, 1).expand(3, 3, 12, 12), rtol=0, atol=0)


# -- pixels ----------------------------------------------------------------------------------------


def assert_within_one_level(views, expected):
    assert views.dtype == torch.uint8
    assert (views.int() - expected.int()).abs().max() <= 1


def pil_resize(picture, size):
    """uint8 (C, H, W) -> uint8 (C, size, size)."""
    channels = [
        Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        for channel in picture
    ]
    return torch.from_numpy(np.stack([np.array(channel) for channel in channels]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 50, 90])
def test_resize_is_pils(size, channels):
    picture = image(50, 70, channels)
    assert_within_one_level(resize(picture[None], size, size)[0], pil_resize(picture, size))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_views_are_the_boxes_cut_out_and_resized(channels):
    picture, key = image(channels=channels), (3, 1, 4)
    crop = MultiCrop(CONFIG, PICO_PATHS)
    views = crop(picture, key)
    boxes = sample_boxes(np.random.default_rng(key), 50, 70, crop.scale_low, crop.scale_high)
    assert views.global_crops.shape == (2, channels, 24, 24)
    assert views.local_crops.shape == (3, channels, 12, 12)
    for view, (top, left, h, w) in zip(
        [*views.global_crops, *views.local_crops], boxes, strict=True
    ):
        assert_within_one_level(
            view, pil_resize(picture[:, top : top + h, left : left + w], view.shape[-1])
        )


def test_sizes_and_number_of_crops_follow_the_options():
    config = replace(CONFIG, global_crops_size=40, local_crops_size=8, local_crops_number=5)
    views = MultiCrop(config, PICO_PATHS)(image(), (0, 0, 0))
    assert views.global_crops.shape == (2, 3, 40, 40)
    assert views.local_crops.shape == (5, 3, 8, 8)
    assert views.global_params.shape == (2, len(PhotometricParam))
    assert views.local_params.shape == (5, len(PhotometricParam))
    assert views.local_params.dtype == torch.float32


def test_no_local_crops():
    views = MultiCrop(replace(CONFIG, local_crops_number=0), PICO_PATHS)(image(), (0, 0, 0))
    assert views.global_crops.shape == (2, 3, 24, 24)
    assert views.local_crops.shape == (0, 3, 12, 12)
    assert views.local_params.shape == (0, len(PhotometricParam))


# -- keys ------------------------------------------------------------------------------------------


def test_views_are_a_function_of_the_key():
    crop = MultiCrop(CONFIG, PICO_PATHS)
    first = crop(image(), (0, 1, 2))
    crop(image(), (5, 5, 5))
    assert_same_views(crop(image(), (0, 1, 2)), first)
    assert_same_views(MultiCrop(CONFIG, PICO_PATHS)(image(), (0, 1, 2)), first)


@pytest.mark.parametrize("key", [(9, 1, 2), (0, 9, 2), (0, 1, 9)])
def test_another_seed_epoch_or_image_gives_other_views(key):
    crop = MultiCrop(CONFIG, PICO_PATHS)
    assert_same_views(crop(image(), key), crop(image(), (0, 1, 2)), same=False)


def test_views_of_one_image_differ():
    views = MultiCrop(CONFIG, PICO_PATHS)(image(), (0, 0, 0))
    for crops in (views.global_crops, views.local_crops):
        assert len({crop.numpy().tobytes() for crop in crops}) == len(crops)


# -- sampled params --------------------------------------------------------------------------------


def test_photometric_probabilities_are_those_configured():
    params = many_params()
    assert_share(params[..., PhotometricParam.FLIP], 0.5)
    assert_share(params[..., PhotometricParam.GRAYSCALE], 0.2)
    assert_share(params[..., PhotometricParam.HUE] != 0, 0.8)
    for views, blur, solarize in ((0, 1.0, 0.0), (1, 0.1, 0.2), (slice(2, None), 0.5, 0.0)):
        assert_share(params[:, views, PhotometricParam.SIGMA] > 0, blur)
        assert_share(params[:, views, PhotometricParam.SOLARIZE], solarize)


def test_other_probabilities_are_followed():
    config = replace(CONFIG, flip_prob=1.0, color_jitter_prob=0.0, grayscale_prob=0.7)
    config = replace(config, blur_prob=(0.0, 1.0, 0.3), solarize_prob=(1.0, 0.0, 0.4))
    params = many_params(config)
    assert (params[..., PhotometricParam.FLIP] == 1).all()
    assert (params[..., PhotometricParam.BRIGHTNESS : PhotometricParam.HUE] == 1).all()
    assert (params[..., PhotometricParam.HUE] == 0).all()
    assert_share(params[..., PhotometricParam.GRAYSCALE], 0.7)
    for views, blur, solarize in ((0, 0.0, 1.0), (1, 1.0, 0.0), (slice(2, None), 0.3, 0.4)):
        assert_share(params[:, views, PhotometricParam.SIGMA] > 0, blur)
        assert_share(params[:, views, PhotometricParam.SOLARIZE], solarize)


def test_jitter_of_a_view_is_all_or_nothing_and_uniform_in_its_range():
    params = many_params()
    jitter = params[..., PhotometricParam.BRIGHTNESS : PhotometricParam.HUE + 1] - [1, 1, 1, 0]
    jittered = (jitter != 0).all(-1)
    assert (jittered | (jitter == 0).all(-1)).all()
    for values, strength in zip(jitter[jittered].T, (0.4, 0.4, 0.2, 0.1), strict=True):
        assert np.abs(values).max() == pytest.approx(strength, rel=0.01)
        assert abs(values.mean()) <= 4 * strength / np.sqrt(3 * len(values))
        assert values.std() == pytest.approx(strength / np.sqrt(3), rel=0.05)
    assert np.abs(np.corrcoef(jitter[jittered].T) - np.eye(4)).max() < 0.06


def test_jitter_ranks_are_permutations_each_equally_likely():
    ranks = many_params()[
        ..., PhotometricParam.BRIGHTNESS_RANK : PhotometricParam.HUE_RANK + 1
    ].reshape(-1, 4)
    assert (np.sort(ranks, axis=1) == np.arange(4)).all()
    orders, counts = np.unique(ranks, axis=0, return_counts=True)
    assert len(orders) == 24
    expected = len(ranks) / 24
    assert np.abs(counts - expected).max() <= 5 * np.sqrt(expected)


def test_blur_is_uniform_in_its_range():
    sigma = many_params(replace(CONFIG, blur_sigma=(0.3, 1.5)))[:, 0, PhotometricParam.SIGMA]
    assert sigma.min() == pytest.approx(0.3, abs=0.01)
    assert sigma.max() == pytest.approx(1.5, abs=0.01)
    assert sigma.mean() == pytest.approx(0.9, abs=4 * 1.2 / np.sqrt(12 * len(sigma)))


def test_views_are_sampled_independently():
    params = many_params()
    for column in (PhotometricParam.FLIP, PhotometricParam.GRAYSCALE, PhotometricParam.BRIGHTNESS):
        assert np.abs(np.corrcoef(params[..., column].T) - np.eye(5)).max() < 0.1


def test_stochastic_depth_is_sampled_with_its_rate_and_keeps_the_mean():
    crop = MultiCrop(dataclasses.replace(CONFIG, drop_path_rate=0.25), PICO_PATHS)
    paths = np.stack([crop.sample_paths(np.random.default_rng(i)) for i in range(400)])
    assert paths.shape[1:] == (crop.views, crop.path_shape[0], 3)
    assert set(np.unique(paths)) == {0, np.float32(1 / 0.75)}
    assert paths.mean() == pytest.approx(1, abs=0.02)
    assert (crop.sample_paths(np.random.default_rng(0)) == paths[0]).all()
    assert (
        MultiCrop(dataclasses.replace(CONFIG, drop_path_rate=1.0), PICO_PATHS).sample_paths(
            np.random.default_rng(0)
        )
        == 0
    ).all()


def test_stochastic_depth_does_not_change_the_crops():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    one, other = (
        MultiCrop(dataclasses.replace(CONFIG, drop_path_rate=rate), PICO_PATHS)(image, (0, 1, 2))
        for rate in (0.0, 0.5)
    )
    assert torch.equal(one.global_crops, other.global_crops)
    assert torch.equal(one.local_params, other.local_params)
    assert not torch.equal(one.local_paths, other.local_paths)


# -- generators of new augmentations -------------------------------------------------------------


def test_an_augmentation_with_its_own_generator_changes_no_other(monkeypatch):
    published = MultiCrop(CONFIG, PICO_PATHS)(image(), (0, 1, 2))
    sample, name = MultiCrop.sample_photometric, "posterize"

    def with_another(self, rng):
        own_generator((0, 1, 2), name).random(100)
        return sample(self, rng)

    monkeypatch.setattr(MultiCrop, "sample_photometric", with_another)
    assert_same_views(MultiCrop(CONFIG, PICO_PATHS)(image(), (0, 1, 2)), published)


def test_own_generators_are_functions_of_key_and_name():
    first = own_generator((0, 1, 2), "posterize").random(3)
    assert first.tolist() == own_generator((0, 1, 2), "posterize").random(3).tolist()
    # The same in every process and version: runs must not change.
    assert first == pytest.approx([0.233322, 0.764356, 0.478786], abs=1e-6)
    for key, name in (((0, 1, 2), "equalize"), ((0, 1, 3), "posterize"), ((1, 1, 2), "posterize")):
        assert own_generator(key, name).random(3).tolist() != first.tolist()


def test_own_generators_are_independent_of_the_shared_one_and_of_each_other():
    keys = [(0, epoch, index) for epoch in range(20) for index in range(100)]
    streams = [
        [np.random.default_rng(key).random(2) for key in keys],
        [own_generator(key, "posterize").random(2) for key in keys],
        [own_generator(key, "equalize").random(2) for key in keys],
    ]
    correlation = np.corrcoef(np.concatenate(streams, axis=1).T)
    assert np.abs(correlation - np.eye(6)).max() < 4 / np.sqrt(len(keys))
