"""A backbone as a function from images to features, and the parts of a feature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import CPU, SIDE, TRANSFORM, backbone_of, random_images
from torch import nn

from dino_xcit.evaluate.features import FeatureExtractor, Pixels, choose_parts, select_parts
from dino_xcit.model.backbone import Backbone


class Wrapped(Backbone):
    """Any network that maps images to vectors."""

    def __init__(self, *layers):
        super().__init__()
        self.network = nn.Sequential(*layers)

    def forward(self, images, paths=None):
        return self.network(images)


def normalised_by_hand(images):
    planes = [
        (images[:, c].double() / 255 - TRANSFORM.mean[c]) / TRANSFORM.std[c] for c in range(3)
    ]
    return torch.stack(planes, dim=1).float()


def test_an_extractor_returns_the_parts_of_a_backbone_in_eval_mode():
    features = FeatureExtractor(backbone_of().train(), TRANSFORM, CPU)(random_images(5))
    backbone = backbone_of().eval()
    x = normalised_by_hand(random_images(5))
    assert not features.requires_grad
    assert features.dtype == torch.float32
    with torch.no_grad():
        class_token = backbone.cls_token.expand(5, -1, -1)
        tokens = torch.cat([class_token, backbone.xca_tokens(x)[0]], dim=1)
        first_layer = backbone.norm(
            backbone.cls_attn_blocks[0](tokens, class_token_only=True)[0][:, 0]
        )
        expected = [backbone(x), first_layer, backbone.forward_features(x)[:, 1:].mean(1)]
    assert features.shape == (5, 3, 64)
    for part, of_part in enumerate(expected):
        torch.testing.assert_close(features[:, part], of_part, rtol=1e-4, atol=1e-5)


def test_features_of_most_networks_have_one_part():
    network = Wrapped(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    features = FeatureExtractor(network, TRANSFORM, CPU)(random_images(4))
    assert features.shape == (4, 1, 12)
    torch.testing.assert_close(features[:, 0], network(normalised_by_hand(random_images(4))))


def test_half_precision_is_close_and_returned_as_float32():
    backbone = backbone_of()
    exact, half = (
        FeatureExtractor(backbone, TRANSFORM, CPU, p)(random_images(4))
        for p in ("32-true", "bf16-mixed")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert F.cosine_similarity(half, exact, dim=-1).min() > 0.999
    network = Wrapped(nn.Flatten(), nn.Linear(3 * SIDE**2, 4))
    extractor = FeatureExtractor(network, TRANSFORM, CPU, "bf16-mixed")
    assert extractor(random_images(4)).dtype == torch.float32


def test_the_shape_of_features():
    assert FeatureExtractor(backbone_of(), TRANSFORM, CPU).shape() == (3, 64)
    assert FeatureExtractor(Pixels(), TRANSFORM, CPU).shape() == (1, 3 * SIDE**2)


@pytest.mark.parametrize(
    "network",
    [
        backbone_of,
        lambda: Wrapped(nn.Flatten(), nn.Linear(3 * 32**2, 4)),
        lambda: Wrapped(nn.Conv2d(1, 4, 3), nn.Flatten()),
    ],
    ids=["patch size", "one image size", "channels"],
)
def test_a_network_that_does_not_take_the_images_is_an_error(network):
    with pytest.raises(ValueError, match="--image_size 18"):
        FeatureExtractor(network(), TRANSFORM._replace(image_size=18), CPU).shape()


def test_pixels_are_averaged_down_to_32_and_never_up():
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(Pixels()(images[..., :16, :16]), images[..., :16, :16].flatten(1))
    by_hand = images.view(2, 3, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(Pixels()(images), by_hand.flatten(1))


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
        (2, True, 4, [0, 1, 3]),
    ],
)
def test_parts_of_a_choice(layers, avgpool, parts, chosen):
    features = torch.randn(7, parts, 4)
    assert choose_parts(layers, avgpool, parts) == chosen
    selected = select_parts(features, chosen)
    assert torch.equal(selected, torch.cat([features[:, part] for part in chosen], dim=1))


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
        choose_parts(layers, avgpool, parts)


def test_leading_parts_are_a_view():
    """Memory-mapped features are read block by block."""
    features = torch.randn(7, 3, 4)
    assert select_parts(features, [0, 1]).data_ptr() == features.data_ptr()
