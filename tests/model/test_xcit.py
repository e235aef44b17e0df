"""XCiT against timm's, an independent implementation of the same function."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import xcit as timm_xcit
from torch import nn
from torch.ao.quantization import quantize_dynamic

import dino_xcit
from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ARCHITECTURES, OURS, timm_name
from dino_xcit.model.xcit import XCiT

PARITY = [
    ("xcit_n12_p16", (64, 48)),
    ("xcit_t12_p8", (32, 48)),
    ("xcit_t24_p16", (32, 48)),
]  # tokens_norm off, on, on
PUBLISHED = [
    f"{short}_p{patch}" for short in ARCHITECTURES if short not in OURS for patch in (16, 8)
]
PICO = {"embed_dim": 64, "depth": 2, "num_heads": 4, "tokens_norm": True}


def load_random(*networks):
    """Load the same random weights and statistics into the networks.

    None of them is 0 or 1, where a mistake would not show.
    """
    torch.manual_seed(0)
    state = {}
    for name, old in networks[0].state_dict().items():
        if old.ndim > 1:
            state[name] = torch.randn(old.shape) * old[0].numel() ** -0.5
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(old.shape)
        elif old.is_floating_point():
            state[name] = 0.1 * torch.randn(old.shape) + name.endswith("weight")
        else:
            state[name] = torch.tensor(7)
    for network in networks:
        network.load_state_dict(
            {name: value.clone() for name, value in state.items()}, strict=True, assign=True
        )
    return networks


def pair(arch, in_chans=3):
    """Our network and timm's, with the same weights."""
    with torch.device("meta"):  # initial values would take longer than the tests
        networks = (
            XCiT(arch, in_chans=in_chans),
            timm.create_model(timm_name(arch), num_classes=0, in_chans=in_chans),
        )
    return load_random(*networks)


def pico(**options):
    torch.manual_seed(0)
    return XCiT("xcit_pico2_p16", **options)


def assert_gradients_match(ours, theirs):
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        # The gradient of class attention's key bias is rounding noise: hence the second term.
        tolerance = 1e-4 * expected[name].abs().max() + 1e-6 * largest
        torch.testing.assert_close(
            parameter.grad,
            expected[name],
            rtol=0,
            atol=tolerance.item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def naive_class_attention(theirs, images):
    """Class attention from timm's modules, (B, layers, h, 1 + N): its own is in a fused kernel."""
    tokens, (H, W) = theirs.patch_embed(images)
    tokens = tokens + theirs.pos_embed(len(images), H, W).flatten(2).transpose(1, 2)
    for block in theirs.blocks:
        tokens = block(tokens, H, W)
    x = torch.cat([theirs.cls_token.expand(len(images), -1, -1), tokens], dim=1)
    layers = []
    for block in theirs.cls_attn_blocks:
        normed, heads = block.norm1(x), block.attn.num_heads
        q = block.attn.q(normed[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, 1, d)
        k = block.attn.k(normed).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, 1 + N, d)
        layers.append((q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5).softmax(-1)[:, :, 0])
        x = block(x)
    return torch.stack(layers, dim=1)


# -- parity ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("arch", "size"), PARITY)
def test_eval_outputs_are_timms(arch, size):
    ours, theirs = (network.eval() for network in pair(arch))
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", ["forward", "forward_features"])
@pytest.mark.parametrize(("arch", "size"), PARITY)
def test_train_outputs_gradients_and_running_statistics_are_timms(arch, size, method):
    ours, theirs = pair(arch)
    images = torch.randn(2, 3, *size)
    outputs, inputs = [], []
    for network in (ours, theirs):
        inputs.append(images.clone().requires_grad_())
        outputs.append(getattr(network, method)(inputs[-1]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    assert_gradients_match(ours, theirs)
    torch.testing.assert_close(
        inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-4 * inputs[1].grad.abs().max().item()
    )
    for (name, buffer), (same_name, expected) in zip(
        ours.named_buffers(), theirs.named_buffers(), strict=True
    ):
        assert name == same_name
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.slow
def test_state_dict_has_timms_names_and_shapes(arch):
    with torch.device("meta"):
        ours, theirs = XCiT(arch), timm.create_model(timm_name(arch), num_classes=0)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items()}
        for network in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_state_dict_loads_strictly_both_ways():
    ours, theirs = XCiT("xcit_n12_p16"), timm.create_model("xcit_nano_12_p16_224", num_classes=0)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            source.cls_token.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(target.cls_token, source.cls_token, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [1, 5])
@pytest.mark.slow
def test_other_channel_counts_are_timms(in_chans):
    ours, theirs = pair("xcit_n12_p16", in_chans)
    images = torch.randn(2, in_chans, 32, 80)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("patch", [16, 8, 4])
def test_pico_and_patch_4_are_timms_blocks_with_fewer_layers(patch):
    """timm's class builds pico; without one halving, its stem of patch size 8 is that of 4."""
    theirs = timm_xcit.Xcit(patch_size=max(patch, 8), num_classes=0, **PICO)
    if patch == 4:
        theirs.patch_embed.proj = nn.Sequential(
            timm_xcit.conv3x3(3, 32, 2), nn.GELU(), timm_xcit.conv3x3(32, 64, 2)
        )
    ours, theirs = load_random(XCiT(f"xcit_pico2_p{patch}"), theirs)
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert ours.forward_features(images).shape == (2, 1 + 32 * 48 // patch**2, 64)


def test_published_sizes_build_with_patch_4():
    with torch.device("meta"):
        backbone = XCiT("xcit_s12_p4")
        assert backbone(torch.zeros(2, 3, 16, 24)).shape == (2, 384)
        assert backbone.forward_features(torch.zeros(2, 3, 16, 24)).shape == (2, 1 + 4 * 6, 384)


# -- class attention ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("arch", "size"), PARITY)
@pytest.mark.slow
def test_class_attention_is_that_of_timms_weights(arch, size):
    ours, theirs = (network.eval() for network in pair(arch))
    images = torch.randn(2, 3, *size)
    attention = ours.class_attention(images)
    expected = naive_class_attention(theirs, images)
    assert expected.std(-1).min() > 1e-3  # uniform weights would prove nothing
    torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))

    patch, grid = ours.patch_size, (size[0] // ours.patch_size, size[1] // ours.patch_size)
    maps = dino_xcit.class_attention(ours, images)
    assert maps.shape == (2, ours.heads, *grid)
    torch.testing.assert_close(maps.sum((-2, -1)), 1 - expected[:, -1, :, 0])
    torch.testing.assert_close(
        maps[..., 1, 2], expected[:, -1, :, 1 + grid[1] + 2], rtol=1e-4, atol=1e-6
    )
    first = dino_xcit.class_attention(ours, images, layer=0)
    torch.testing.assert_close(first.flatten(-2), expected[:, 0, :, 1:], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=f"patch size {patch} must divide"):
        dino_xcit.class_attention(ours, images[..., 1:])


# -- ablations and options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "removed"),
    [
        (
            "xca",
            {"norm1.weight", "norm1.bias", "gamma1"}
            | {f"attn.{n}" for n in ("temperature", "qkv", "proj")},
        ),
        (
            "lpi",
            {"norm3.weight", "norm3.bias", "gamma3"}
            | {f"local_mp.{n}" for n in ("conv1", "bn", "conv2")},
        ),
        ("l2_norm", set()),
        ("learned_temperature", {"attn.temperature"}),
    ],
)
def test_ablation_removes_its_parameters_and_the_rest_learn(switch, removed):
    complete = dict(pico().named_parameters())
    ablated = pico(**{switch: False})
    gone = complete.keys() - dict(ablated.named_parameters()).keys()
    assert gone == {
        name
        for name in complete
        for i in range(4)
        for part in removed
        if f"{name}.".startswith(f"blocks.{i}.{part}.")
    }
    assert bool(gone) == bool(removed)
    ablated(torch.randn(2, 3, 32, 32)).square().mul(torch.randn(64)).sum().backward()
    for name, parameter in ablated.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("attn.k.bias") or name.startswith("blocks"):
            assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
@pytest.mark.parametrize(
    ("switch", "neutral"),
    [
        ("xca", ("gamma1", 0.0)),
        ("lpi", ("gamma3", 0.0)),
        ("learned_temperature", ("temperature", 1.0)),
    ],
)
def test_ablated_network_is_the_complete_one_with_that_part_neutral(switch, neutral):
    (complete,) = load_random(pico())
    ablated = pico(**{switch: False})
    images = torch.randn(2, 3, 32, 48)
    output = complete(images)
    for name, parameter in complete.named_parameters():
        if name.startswith("blocks") and name.endswith(neutral[0]):
            parameter.fill_(neutral[1])
    kept = ablated.state_dict().keys()
    ablated.load_state_dict(
        {name: value for name, value in complete.state_dict().items() if name in kept}, strict=True
    )
    torch.testing.assert_close(ablated(images), complete(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ablated(images), output, atol=1e-2)


def test_grad_checkpointing_changes_nothing_but_memory():
    images = torch.randn(3, 3, 32, 48)
    results = []
    for grad_checkpointing in (False, True):
        (backbone,) = load_random(pico(grad_checkpointing=grad_checkpointing))
        paths = (
            torch.randint(
                0, 2, (3, len(backbone.blocks), 3), generator=torch.Generator().manual_seed(0)
            )
            * 2.0
        )
        for step in range(2):  # the second shows that the first left batch norm tracking
            output = backbone(images, paths.roll(step, 0))
            output[:, :9].sum().backward()
        results.append([output, [p.grad for p in backbone.parameters()], list(backbone.buffers())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_training_works_after_inference_mode_on_the_same_grid():
    backbone, images = pico(), torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        backbone.eval()(images)
    backbone.train()(images).sum().backward()
    assert backbone.pos_embed.token_projection.weight.grad.isfinite().all()


def test_stochastic_depth_scales_one_branch_of_one_sample():
    images = torch.randn(3, 3, 32, 32)
    (backbone,) = load_random(pico())
    backbone.eval()
    whole = backbone(images)
    paths = torch.ones(3, len(backbone.blocks), 3)
    torch.testing.assert_close(backbone(images, paths), whole, rtol=0, atol=0)
    for branch, gamma in enumerate(("gamma1", "gamma3", "gamma2")):
        for factor in (0.0, 2.0):
            scaled = paths.clone()
            scaled[1, -1, branch] = factor
            features = backbone(images, scaled)
            weight = getattr(backbone.blocks[-1], gamma)
            with torch.no_grad():
                kept = weight.clone()
                weight.mul_(factor)
                expected = backbone(images)[1]
                weight.copy_(kept)
            torch.testing.assert_close(features[1], expected)
            torch.testing.assert_close(features[[0, 2]], whole[[0, 2]])
            assert not torch.allclose(expected, whole[1], atol=1e-3)


def test_class_token_output_is_the_first_of_the_features():
    (backbone,) = load_random(pico().eval())
    images = F.normalize(torch.randn(2, 3, 48, 32))
    torch.testing.assert_close(
        backbone(images), backbone.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5
    )


# -- image sizes and channels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((50, 70), "nearest: 48 x 64 or 64 x 80"),
        ((48, 70), "nearest: 48 x 64 or 48 x 80"),
        ((15, 32), "nearest: 16 x 32"),
    ],
)
def test_size_that_the_patch_does_not_divide_names_the_nearest(size, nearest):
    with pytest.raises(UserError, match=rf"{size[0]} x {size[1]} pixels.*{nearest}$"):
        pico()(torch.zeros(1, 3, *size))


def test_checking_an_image_size_names_the_flag():
    pico().check_image_size(32, "global_crops_size")
    with pytest.raises(UserError, match=r"^--local_crops_size 40: .*patch size 16.* 48 x 48$"):
        pico().check_image_size(40, "local_crops_size")


def test_wrong_channel_count_names_the_flag():
    with pytest.raises(UserError, match=r"images have 1 channels.*takes 3.*--in_chans 1"):
        pico()(torch.zeros(1, 1, 32, 32))


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
def test_dynamic_quantisation_and_tracing_give_nearly_the_same_features():
    torch.manual_seed(0)
    backbone = XCiT("xcit_pico2_p8").eval()
    images = torch.randn(4, 3, 32, 48)
    with torch.no_grad():
        expected = backbone(images)
        quantised = quantize_dynamic(backbone, {torch.nn.Linear}, dtype=torch.qint8)
        assert "DynamicQuantizedLinear" in repr(quantised)
        assert (quantised(images) - expected).abs().max() < 0.1 * expected.std()
        torch.testing.assert_close(torch.jit.trace(backbone, images)(images), expected)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_scripting_is_refused_with_what_to_use():
    with pytest.raises(UserError, match=r"torch\.jit\.script .*expected torch\.jit\.trace"):
        torch.jit.script(XCiT("xcit_pico2_p8"))
