"""The batched operations, one by one and in every order, against torchvision and PIL."""

import functools
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_xcit.data import photometric as photometric_module
from dino_xcit.data.photometric import PhotometricParam, photometric

JITTER = (
    PhotometricParam.BRIGHTNESS,
    PhotometricParam.CONTRAST,
    PhotometricParam.SATURATION,
    PhotometricParam.HUE,
)
RANKS = (
    PhotometricParam.BRIGHTNESS_RANK,
    PhotometricParam.CONTRAST_RANK,
    PhotometricParam.SATURATION_RANK,
    PhotometricParam.HUE_RANK,
)
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
ORDERS = list(permutations(range(4)))
MAX_SIGMA = 2.0


@pytest.fixture(params=["rows", "whole batch"])
def on_each_device_path(request, monkeypatch):
    """As on CPU, where the active rows alone are changed, and as on accelerators."""
    if request.param == "whole batch":
        monkeypatch.setattr(photometric_module, "_on_rows", whole_batch)


def whole_batch(x, active, operation):
    return torch.where(active[:, None, None, None], operation(x, slice(None)), x)


def views(n=1, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, 20, 24), generator=generator, dtype=torch.uint8)


def neutral(n=1, **values):
    """Params that leave a view unchanged, except for the named ones."""
    params = torch.zeros(n, len(PhotometricParam))
    params[:, PhotometricParam.BRIGHTNESS : PhotometricParam.HUE] = 1
    params[:, PhotometricParam.BRIGHTNESS_RANK : PhotometricParam.HUE_RANK + 1] = torch.arange(4.0)
    for name, value in values.items():
        params[:, PhotometricParam[name]] = value
    return params


def random_params(n):
    """Each operation in about half of the views, orders at random."""
    rng = np.random.default_rng(0)
    params = neutral(n)
    for column, low, high in (
        (1, 0.6, 1.4),
        (2, 0.6, 1.4),
        (3, 0.8, 1.2),
        (4, -0.1, 0.1),
        (PhotometricParam.SIGMA, 0.1, 2.0),
    ):
        active = torch.from_numpy(rng.random(n) < 0.5)
        params[active, column] = torch.from_numpy(rng.uniform(low, high, n)).float()[active]
    for column in (PhotometricParam.FLIP, PhotometricParam.GRAYSCALE, PhotometricParam.SOLARIZE):
        params[:, column] = torch.from_numpy(rng.random(n) < 0.5)
    params[:, RANKS[0] : RANKS[-1] + 1] = torch.tensor(
        [ORDERS[i] for i in rng.integers(0, 24, n)]
    ).float()
    return params


def augment(images, params):
    """Values in [0, 1], not normalised."""
    channels = images.shape[1]
    return photometric(images, params, (0.0,) * channels, (1.0,) * channels, MAX_SIGMA)


def as_float(images):
    return images.float() / 255


def assert_same(result, expected, tolerance=1e-5):
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


# -- against torchvision ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"FLIP": 1}, tv.horizontal_flip),
        *[({"BRIGHTNESS": f}, lambda x, f=f: tv.adjust_brightness(x, f)) for f in (0.0, 0.6, 1.4)],
        *[({"CONTRAST": f}, lambda x, f=f: tv.adjust_contrast(x, f)) for f in (0.0, 0.6, 1.4)],
        *[
            ({"SATURATION": f}, lambda x, f=f: tv.adjust_saturation(x, f))
            for f in (0.0, 0.8, 1.2, 2.0)
        ],
        *[({"HUE": h}, lambda x, h=h: tv.adjust_hue(x, h)) for h in (-0.5, -0.1, 0.03, 0.1, 0.5)],
        ({"GRAYSCALE": 1}, lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
        *[
            ({"SIGMA": s}, lambda x, s=s: tv.gaussian_blur(x, [13, 13], [s, s]))
            for s in (0.1, 0.7, 2.0)
        ],
        ({"SOLARIZE": 1}, lambda x: tv.solarize(x, 128 / 255)),
        (
            {"SIGMA": 1, "SOLARIZE": 1},
            lambda x: tv.solarize(tv.gaussian_blur(x, [13, 13], [1.0, 1.0]), 128 / 255),
        ),
    ],
)
@pytest.mark.usefixtures("on_each_device_path")
def test_operation_is_torchvisions(values, expected):
    images = views(3)
    result = augment(images, neutral(3, **values))
    assert_same(result, expected(as_float(images)))
    assert not torch.allclose(result, as_float(images), atol=1e-3) or values == {"SIGMA": 0.1}


@pytest.mark.usefixtures("on_each_device_path")
def test_jitter_in_each_of_its_24_orders_is_torchvisions():
    images, params = views(24), neutral(24)
    factors = (1.35, 0.65, 1.2, 0.1)
    params[:, PhotometricParam.BRIGHTNESS : PhotometricParam.HUE + 1] = torch.tensor(factors)
    expected = []
    for i, order in enumerate(ORDERS):  # order[rank] is the operation of that rank
        x = as_float(images[i])
        for rank, operation in enumerate(order):
            params[i, RANKS[operation]] = rank
            x = ADJUST[operation](x, factors[operation])
        expected.append(x)
    assert_same(augment(images, params), torch.stack(expected))
    spread = torch.stack([augment(images[:1], params[i : i + 1]) for i in range(24)]).std(0).max()
    assert spread > 0.02  # the order matters


def test_operations_run_in_official_order():
    images = views()
    values = {"FLIP": 1, "BRIGHTNESS": 1.3, "GRAYSCALE": 1, "SIGMA": 1.5, "SOLARIZE": 1}
    x = tv.adjust_brightness(tv.horizontal_flip(as_float(images)), 1.3)
    x = tv.gaussian_blur(tv.rgb_to_grayscale(x, num_output_channels=3), [13, 13], [1.5, 1.5])
    assert_same(augment(images, neutral(**values)), tv.solarize(x, 128 / 255))


def test_normalisation_is_torchvisions():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = views(2)
    assert_same(
        photometric(images, neutral(2), mean, std, MAX_SIGMA),
        tv.normalize(as_float(images), list(mean), list(std)),
    )


def test_solarize_inverts_from_level_128_on():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    result = (255 * augment(levels, neutral(SOLARIZE=1))).round().flatten().int()
    assert result.tolist() == [v if v < 128 else 255 - v for v in range(256)]


def test_blur_reaches_three_deviations_of_the_largest():
    images = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    images[..., 20, 20] = 255
    for max_sigma, reach in ((1.0, 3), (2.0, 6), (2.5, 8)):
        blurred = photometric(images, neutral(SIGMA=max_sigma), (0.0,), (1.0,), max_sigma)
        rows = blurred[0, 0].sum(1).nonzero()[:, 0]
        assert (rows.min().item(), rows.max().item()) == (20 - reach, 20 + reach)


def test_blur_works_on_views_smaller_than_its_kernel():
    images = torch.full((1, 3, 4, 5), 99, dtype=torch.uint8)
    assert_same(augment(images, neutral(SIGMA=2.0)), as_float(images))


def test_hue_of_gray_pixels_stays_gray():
    images = views(1, channels=1).expand(-1, 3, -1, -1)
    assert_same(augment(images, neutral(HUE=0.3)), as_float(images))


# -- grey images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"SATURATION": 0.3}, {"HUE": 0.4}, {"GRAYSCALE": 1}])
@pytest.mark.usefixtures("on_each_device_path")
def test_colour_operations_do_not_change_images_without_colour(values):
    for channels in (1, 5):
        images = views(2, channels)
        assert_same(augment(images, neutral(2, **values)), as_float(images), tolerance=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"FLIP": 1}, tv.horizontal_flip),
        ({"BRIGHTNESS": 1.4}, lambda x: tv.adjust_brightness(x, 1.4)),
        ({"CONTRAST": 0.6}, lambda x: tv.adjust_contrast(x, 0.6)),
        ({"SIGMA": 1.1}, lambda x: tv.gaussian_blur(x, [13, 13], [1.1, 1.1])),
        ({"SOLARIZE": 1}, lambda x: tv.solarize(x, 128 / 255)),
    ],
)
@pytest.mark.usefixtures("on_each_device_path")
def test_other_operations_act_on_grey_images(values, expected):
    images = views(2, channels=1)
    assert_same(augment(images, neutral(2, **values)), expected(as_float(images)))


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("on_each_device_path")
def test_batch_is_its_views_one_by_one(channels):
    images, params = views(16, channels), random_params(16)
    one_by_one = torch.cat([augment(images[i : i + 1], params[i : i + 1]) for i in range(16)])
    assert_same(augment(images, params), one_by_one, tolerance=1e-6)


def test_a_batch_taken_in_parts_is_the_batch(monkeypatch):
    images, params = views(16), random_params(16)
    whole = augment(images, params)
    monkeypatch.setattr(photometric_module, "FLOATS_IN_CACHE", 5 * images[0].numel())
    assert_same(augment(images, params), whole, tolerance=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_path_of_accelerators_is_the_path_of_cpus(channels, monkeypatch):
    images, params = views(32, channels), random_params(32)
    on_cpu = augment(images, params)
    monkeypatch.setattr(photometric_module, "_on_rows", whole_batch)
    assert_same(augment(images, params), on_cpu, tolerance=1e-6)


@pytest.mark.slow
def test_the_compiled_augmentation_is_the_augmentation_and_compiled_once_for_each_size(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(photometric_module, "_chooses_rows", lambda x: False)  # as on a GPU
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    compiled = photometric_module.compiled_whole_batch()
    large, small = views(8), views(6)[..., :12, :16].contiguous()
    for batch in (large, small, large.flip(0), small.flip(0)):
        params = random_params(len(batch))
        given = batch, params, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), MAX_SIGMA
        assert_same(photometric(*given, compiled), photometric(*given), tolerance=0)
    assert len(graphs) == 2


@pytest.mark.usefixtures("on_each_device_path")
def test_neutral_views_of_a_batch_are_untouched():
    images, params = views(9), random_params(9)
    params[::2] = neutral(5)
    assert_same(augment(images, params)[::2], as_float(images[::2]), tolerance=0)


@pytest.mark.usefixtures("on_each_device_path")
def test_uint8_views_are_not_written_to():
    images, params = views(4), random_params(4)
    before = images.clone(), params.clone()
    augment(images, params)
    torch.testing.assert_close((images, params), before, rtol=0, atol=0)


# -- against PIL, which official DINO uses ---------------------------------------------------------


def smooth_image():
    """Level at the borders, where PIL repeats the last pixel and torchvision mirrors."""
    y, x = np.pi * (np.mgrid[:64, :80] + 0.5) / np.reshape([64, 80], (2, 1, 1))
    waves = np.stack([np.cos(x), np.cos(2 * x) * np.cos(y), np.cos(2 * y)], axis=-1)
    return Image.fromarray((128 + 110 * waves).astype(np.uint8))


def pil_hue(image, turns):
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(round(turns * 255) % 256))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


PIL_STEPS = [
    ("FLIP", 1, lambda image, _: ImageOps.mirror(image), 0),
    ("BRIGHTNESS", 1.4, lambda image, f: ImageEnhance.Brightness(image).enhance(f), 1),
    ("CONTRAST", 0.6, lambda image, f: ImageEnhance.Contrast(image).enhance(f), 1),
    ("SATURATION", 1.2, lambda image, f: ImageEnhance.Color(image).enhance(f), 2),
    ("HUE", 0.1, pil_hue, 7),  # PIL's hue has 256 steps
    ("GRAYSCALE", 1, lambda image, _: image.convert("L").convert("RGB"), 1),
    (
        "SIGMA",
        2.0,
        lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
        3,
    ),  # three boxes
    ("SOLARIZE", 1, lambda image, _: ImageOps.solarize(image, 128), 0),
]


def assert_within_levels(result, image, levels, mean_levels):
    difference = (255 * result[0].permute(1, 2, 0) - torch.from_numpy(np.array(image))).abs()
    assert difference.max() <= levels + 1e-3
    assert difference.mean() <= mean_levels + 1e-3


@pytest.mark.parametrize(
    ("name", "value", "step", "levels"), PIL_STEPS, ids=[step[0].lower() for step in PIL_STEPS]
)
def test_operation_is_pils_within_a_few_grey_levels(name, value, step, levels):
    image = smooth_image()
    result = augment(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], neutral(**{name: value})
    )
    assert_within_levels(result, step(image, value), levels, levels / 2)


@pytest.mark.parametrize("without", ["GRAYSCALE", "HUE"])
def test_pipeline_is_pils_within_a_few_grey_levels(without):
    image = smooth_image()
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    steps = [step for step in PIL_STEPS if step[0] != without]
    for _, value, step, _ in steps:
        image = step(image, value)
    result = augment(images, neutral(**{name: value for name, value, _, _ in steps}))
    assert_within_levels(result, image, 6, 2)
