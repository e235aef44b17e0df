"""timm's networks as backbones, against the same networks without our wrapper."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from dino_xcit.errors import UserError
from dino_xcit.model.build import build_backbone
from dino_xcit.model.timm_backbone import TimmBackbone

NETWORKS = ["test_vit", "test_resnet", "test_convnext"]  # timm's own, for its tests: 0.2 M weights
SIZE, OTHER_SIZE = 64, 32


class Scale(nn.Module):
    """In the place of a DropPath: multiplies the residual branch by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def plain(name, drop_path_rate=0.0):
    sizes = {"img_size": SIZE, "dynamic_img_size": True} if "vit" in name else {}
    return timm.create_model(name, num_classes=0, drop_path_rate=drop_path_rate, **sizes)


def with_branches_scaled(network, factors):
    """The network with constants instead of stochastic depth."""
    places = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, DropPath)
    ]
    for (parent, name), factor in zip(places, factors, strict=True):
        setattr(parent, name, Scale(factor))
    return network.eval()


def randomise(network):
    """Random weights everywhere: with their initial zeros some residual branches change nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim > 1:
                scale = tensor[0].numel() ** -0.5
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return network


def backbone_and_network(name, sampled_paths=False, drop_path_rate=0.0):
    """Our backbone and timm's network with the same weights, for evaluation."""
    torch.manual_seed(0)
    backbone = randomise(
        build_backbone(f"timm:{name}", image_size=SIZE, sampled_paths=sampled_paths)
    )
    network = plain(name, drop_path_rate)
    network.load_state_dict(backbone.state_dict(), strict=True)
    return backbone.eval(), network.eval()


def images(size=SIZE, number=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, size, size, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_the_network_at_both_crop_sizes(name):
    backbone, network = backbone_and_network(name)
    for size in (SIZE, OTHER_SIZE):
        x = images(size)
        features = backbone(x)
        assert features.shape == (3, backbone.embed_dim)
        torch.testing.assert_close(features, network(x), rtol=0, atol=0)
        torch.testing.assert_close(backbone.layer_features(x), features[:, None], rtol=0, atol=0)


@pytest.mark.parametrize("sampled_paths", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_has_timms_names_and_loads_both_ways(name, sampled_paths):
    backbone = build_backbone(f"timm:{name}", image_size=SIZE, sampled_paths=sampled_paths)
    network = plain(name)
    assert list(backbone.state_dict()) == list(network.state_dict())
    for source, target in ((randomise(network), backbone), (randomise(backbone), network)):
        for tensor in target.state_dict().values():
            tensor.zero_()
        target.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_state_dict_keeps_timms_names_inside_another_module():
    backbone = build_backbone("timm:test_resnet")
    outer = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(2, 2)})
    names = [f"backbone.{name}" for name in plain("test_resnet").state_dict()]
    assert list(outer.state_dict()) == [*names, "head.weight", "head.bias"]
    again = nn.ModuleDict({"backbone": build_backbone("timm:test_resnet"), "head": nn.Linear(2, 2)})
    again.load_state_dict(outer.state_dict(), strict=True)
    torch.testing.assert_close(again.state_dict(), outer.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="unknown"):
        again.load_state_dict({**outer.state_dict(), "backbone.unknown": torch.ones(1)})


@pytest.mark.parametrize("name", NETWORKS)
def test_repr_is_the_networks(name):
    assert repr(build_backbone(f"timm:{name}", image_size=SIZE)) == repr(plain(name))


# -- stochastic depth ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_each_path_scales_one_branch_of_one_sample(name):
    backbone, _ = backbone_and_network(name, sampled_paths=True, drop_path_rate=0.1)
    x = images()
    layers, branches = backbone.path_shape
    assert branches == 1
    generator = torch.Generator().manual_seed(0)
    paths = 2.0 * torch.randint(0, 2, (len(x), layers, 1), generator=generator)
    features = backbone(x, paths)
    for i in range(len(x)):
        _, network = backbone_and_network(name, sampled_paths=True, drop_path_rate=0.1)
        expected = with_branches_scaled(network, paths[i, :, 0].tolist())(x[i : i + 1])
        torch.testing.assert_close(features[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(features, backbone(x), rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_factor_0_removes_the_branches_and_factor_1_leaves_them(name):
    backbone, network = backbone_and_network(name, sampled_paths=True, drop_path_rate=0.1)
    x = images()
    ones = torch.ones(len(x), *backbone.path_shape)
    whole = network(x)
    torch.testing.assert_close(backbone(x, ones), whole, rtol=0, atol=0)
    removed = with_branches_scaled(network, [0.0] * backbone.path_shape[0])(x)
    torch.testing.assert_close(backbone(x, 0 * ones), removed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(removed, whole, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_without_paths_forgets_those_of_the_pass_before(name):
    backbone, _ = backbone_and_network(name, sampled_paths=True)
    x = images()
    features, tokens = backbone(x), backbone.patch_tokens(x)
    zeros = torch.zeros(len(x), *backbone.path_shape)
    for compute, expected in ((backbone, features), (backbone.patch_tokens, tokens)):
        backbone(x, zeros)
        torch.testing.assert_close(compute(x), expected, rtol=0, atol=0)


def test_without_sampled_paths_the_backbone_has_none():
    assert build_backbone("timm:test_vit", image_size=SIZE).path_shape == (0, 0)


def test_a_network_without_stochastic_depth_is_built_without_it():
    with torch.device("meta"):
        assert build_backbone("timm:densenet121", sampled_paths=True).path_shape == (0, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_weight(name):
    backbone, _ = backbone_and_network(name, sampled_paths=True)
    backbone.train()
    paths = torch.ones(3, *backbone.path_shape)
    outputs = [backbone(images(size), paths) for size in (SIZE, OTHER_SIZE)]
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    sum((output * direction).sum() for output in outputs).backward()
    for weight, parameter in backbone.named_parameters():
        assert parameter.grad is not None, weight
        assert parameter.grad.isfinite().all(), weight
        assert parameter.grad.any(), weight


# -- patch tokens ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("name", "patch_size"), [("test_vit", 16), ("test_resnet", 32)])
def test_patch_tokens_are_the_grid_of_the_last_features(name, patch_size):
    backbone, network = backbone_and_network(name)
    x = images()
    tokens = backbone.patch_tokens(x)
    assert backbone.patch_size == patch_size
    assert tokens.shape == (3, (SIZE // patch_size) ** 2, backbone.embed_dim)
    expected = network.forward_features(x)
    if expected.ndim == 4:
        pooled = tokens.mean(1)
        torch.testing.assert_close(pooled, expected.mean((2, 3)))
        torch.testing.assert_close(tokens[:, 1], expected[:, :, 0, 1])  # row-major
    else:
        torch.testing.assert_close(tokens, expected[:, 1:], rtol=0, atol=0)  # less the class token


@torch.no_grad()
def test_patch_tokens_of_a_network_with_channels_last():
    network = SwinTransformer(
        img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, num_classes=0
    ).eval()
    backbone = TimmBackbone(network, "timm:swin", in_chans=3)
    grid = network.forward_features(images(32))
    assert grid.shape == (3, 4, 4, 16)
    assert backbone.patch_size == 8
    torch.testing.assert_close(backbone.patch_tokens(images(32))[:, 5], grid[:, 1, 1])


@torch.no_grad()
def test_a_head_that_widens_the_features_sets_embed_dim():
    backbone = build_backbone("timm:mobilenetv3_small_050").eval()
    assert backbone(images()).shape == (3, backbone.embed_dim) == (3, 1024)
    assert backbone.patch_tokens(images()).shape == (3, 4, 288)


@torch.no_grad()
def test_other_channels_than_three():
    backbone = build_backbone("timm:test_resnet", in_chans=1).eval()
    assert backbone.in_chans == 1
    assert backbone(torch.zeros(2, 1, SIZE, SIZE)).shape == (2, backbone.embed_dim)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "multiple"), [("convnext_atto", 16, 32), ("test_vit", 40, 16)]
)
def test_an_image_size_that_the_network_cannot_take_names_the_flag(name, size, multiple):
    backbone = build_backbone(f"timm:{name}", image_size=SIZE)
    with pytest.raises(UserError, match=f"^--local_crops_size {size}: timm:{name} .* {multiple},"):
        backbone.check_image_size(size, "local_crops_size")
    assert backbone.training


@pytest.mark.parametrize("name", NETWORKS)
def test_checking_an_image_size_changes_nothing(name):
    backbone = build_backbone(f"timm:{name}", image_size=SIZE).train()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    generator = torch.random.get_rng_state()
    backbone.check_image_size(OTHER_SIZE, "local_crops_size")
    assert backbone.training
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_network_that_returns_a_map_is_refused():
    network = timm.create_model("test_resnet", num_classes=0, global_pool="")
    with pytest.raises(UserError, match=r"--arch timm:map returns .* \(1, 96, 1, 1\).*\(1, 96\)"):
        TimmBackbone(network, "timm:map", in_chans=3).check_image_size(32, "image_size")
    with pytest.raises(UserError, match="timm:linear does not return one feature vector per image"):
        TimmBackbone(nn.Linear(2, 2), "timm:linear", in_chans=3)


@pytest.mark.parametrize("arch", ["timm:resnet9000", "timm:"])
def test_an_unknown_name_is_named(arch):
    with pytest.raises(UserError, match=f"--arch {arch}: Unknown model"):
        build_backbone(arch)


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"ablations": {"lpi": False}}, "lpi false"), ({"grad_checkpointing": True}, "grad_checkp")],
)
def test_an_option_of_xcit_alone_is_refused(options, flag):
    with pytest.raises(UserError, match=f"--{flag}.* needs an XCiT; --arch is timm:test_vit"):
        build_backbone("timm:test_vit", **options)
