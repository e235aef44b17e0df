"""Feature maps at four scales."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from dino_xcit.errors import UserError
from dino_xcit.model.dense import Pyramid, default_layers
from dino_xcit.model.xcit import XCiT


@pytest.mark.parametrize("arch", ["xcit_n12_p16", "xcit_n12_p8", "xcit_pico2_p4"])
def test_scales_have_strides_4_to_32_of_the_padded_image(arch):
    pyramid = Pyramid(XCiT(arch))
    scales = pyramid(torch.randn(2, 3, 100, 130))  # padded to 128 x 160
    assert list(scales) == ["0", "1", "2", "3"]
    expected = [
        (2, pyramid.out_channels, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32)
    ]
    assert [tuple(scale.shape) for scale in scales.values()] == expected


def test_default_layers_are_the_authors():
    """As in the official detection/backbone/xcit.py and its configs."""
    assert default_layers(12) == (3, 5, 7, 11)
    assert default_layers(24) == (7, 11, 15, 23)


def test_scales_are_tokens_of_timms_layers():
    torch.manual_seed(0)
    ours = XCiT("xcit_n12_p16").eval()
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x, (H, W) = theirs.patch_embed(images)
        x = x + theirs.pos_embed(1, H, W).reshape(1, -1, x.shape[1]).permute(0, 2, 1)
        after = []
        for block in theirs.blocks:
            x = block(x, H, W)
            after.append(x.transpose(1, 2).reshape(1, -1, H, W))
        scales = Pyramid(ours, (2, 4, 6, 9)).eval()(images)
    # Stride 16 is the patch grid.
    torch.testing.assert_close(scales["2"], after[6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scales["3"], F.max_pool2d(after[9], 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(0, 1, 2, 12), (-1, 1, 2, 3)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match="of 12; expected 0 to 11"):
        Pyramid(XCiT("xcit_n12_p16"), layers)


def test_a_detector_of_torchvision_learns_through_it():
    torch.manual_seed(0)
    pyramid = Pyramid(XCiT("xcit_pico2_p8"))
    backbone = torch.nn.Sequential(pyramid, FeaturePyramidNetwork([pyramid.out_channels] * 4, 16))
    backbone.out_channels = 16
    detector = FasterRCNN(
        backbone,
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 2),
        min_size=64,
        max_size=96,
    )
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    sum(detector([torch.rand(3, 64, 80)], [target]).values()).backward()
    for layer in (
        pyramid.backbone.blocks[0].mlp.fc1,
        pyramid.backbone.patch_embed.proj[0][0],
        pyramid.scales[0],
    ):
        assert layer.weight.grad.abs().max() > 0
    assert len(detector.eval()([torch.rand(3, 70, 64)])) == 1
