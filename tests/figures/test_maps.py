"""Attention maps of a backbone, against timm's own modules and naive loops."""

import math

import numpy as np
import pytest
import timm
import torch
from timm.models import xcit as timm_xcit

from dino_xcit.errors import UserError
from dino_xcit.figures import maps as maps_module
from dino_xcit.figures.maps import (
    attention_maps,
    bytes_per_pixel,
    check_layer,
    class_attention,
    entropy,
    jaccard,
    mass_mask,
    pca_colours,
    similarity,
    with_class_attention,
)
from dino_xcit.model.xcit import XCiT

NANO, TINY, PICO = "xcit_n12_p16", "xcit_t12_p8", "xcit_pico2_p8"  # tokens_norm off, on, on
CASES = [(NANO, (32, 80)), (TINY, (24, 40)), (PICO, (40, 24))]


def filled(theirs):
    """Random weights, LayerScale, biases and statistics: none is neutral, so each one matters."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, old in theirs.state_dict().items():
        noise = torch.randn(old.shape, generator=generator)
        if old.ndim > 1:
            state[name] = noise * old[0].numel() ** -0.5
        elif name.endswith("running_var"):
            state[name] = 0.5 + noise.abs()
        else:
            state[name] = (
                0.3 * noise + name.endswith("weight")
                if old.is_floating_point()
                else torch.tensor(3)
            )
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


def pair(arch):
    """timm's network and ours with its weights."""
    with torch.device("meta"):  # skips initial values
        if arch == PICO:
            theirs = timm_xcit.Xcit(
                patch_size=8, num_classes=0, embed_dim=64, depth=2, num_heads=4, tokens_norm=True
            )
        else:
            names = {NANO: "xcit_nano_12_p16_224", TINY: "xcit_tiny_12_p8_224"}
            theirs = timm.create_model(names[arch], pretrained=False, num_classes=0)
        ours = XCiT(arch)
    filled(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return theirs, ours.eval()


def pico(**options):
    torch.manual_seed(0)
    return XCiT("xcit_pico2_p8", **options).eval()


def timm_tokens(theirs, images, blocks):
    """Tokens that timm's first so many XCA blocks leave (B, N, C), and the grid."""
    tokens, (H, W) = theirs.patch_embed(images)
    tokens = tokens + theirs.pos_embed(len(images), H, W).reshape(len(images), -1, H * W).transpose(
        1, 2
    )
    for block in theirs.blocks[:blocks]:
        tokens = block(tokens, H, W)
    return tokens, H, W


def naive_class_attention(theirs, images, layer):
    """softmax(q k^T / sqrt(d)) of the class token's query, in loops: (B, h, 1 + N); H and W."""
    tokens, H, W = timm_tokens(theirs, images, len(theirs.blocks))
    x = torch.cat([theirs.cls_token.expand(len(images), -1, -1), tokens], dim=1)
    for block in theirs.cls_attn_blocks[:layer]:
        x = block(x)
    block = theirs.cls_attn_blocks[layer]
    heads, normed = block.attn.num_heads, block.norm1(x)
    d = normed.shape[-1] // heads
    rows = []
    for one in normed:
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            q = block.attn.q.weight[part] @ one[0] + block.attn.q.bias[part]
            logits = [
                q @ (block.attn.k.weight[part] @ token + block.attn.k.bias[part]) / math.sqrt(d)
                for token in one
            ]
            rows.append(torch.stack(logits).exp() / torch.stack(logits).exp().sum())
    return torch.stack(rows).unflatten(0, (len(images), heads)), H, W


def naive_queries_and_keys(theirs, images, layer):
    """Queries and keys of timm's XCA layer, channels of unit length: [image][head] (N, d); H, W."""
    tokens, H, W = timm_tokens(theirs, images, layer)
    block = theirs.blocks[layer]
    normed, heads = block.norm1(tokens), block.attn.num_heads
    C = normed.shape[-1]
    d = C // heads
    found = []
    for kind in range(2):
        of_kind = []
        for one in normed:
            starts = [kind * C + head * d for head in range(heads)]
            values = [
                one @ block.attn.qkv.weight[s : s + d].T + block.attn.qkv.bias[s : s + d]
                for s in starts
            ]
            of_kind.append([value / value.square().sum(0).sqrt() for value in values])
        found.append(of_kind)
    return *found, H, W


# -- class attention -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("arch", "size"), CASES)
@pytest.mark.slow
def test_class_attention_is_the_formula_on_timms_weights(arch, size, layer):
    theirs, ours = pair(arch)
    images = torch.randn(2, 3, *size)
    expected, H, W = naive_class_attention(theirs, images, layer)
    assert expected.std(-1).min() > 1e-3  # uniform weights would prove nothing
    maps = class_attention(ours, images, layer)
    assert maps.shape == (2, ours.heads, size[0] // ours.patch_size, size[1] // ours.patch_size)
    assert maps.shape[2:] == (H, W)
    torch.testing.assert_close(maps.flatten(2), expected[:, :, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps.sum((2, 3)), 1 - expected[:, :, 0])
    torch.testing.assert_close(
        maps[1, 2, 1, 2], expected[1, 2, 1 + W + 2], rtol=1e-4, atol=1e-6
    )  # row-major


def test_last_class_attention_layer_is_the_default_and_negative_layers_count_from_it():
    backbone, images = pico(), torch.randn(1, 3, 16, 24)
    first, last = class_attention(backbone, images, 0), class_attention(backbone, images, 1)
    assert not torch.equal(first, last)
    assert torch.equal(class_attention(backbone, images), last)
    assert torch.equal(class_attention(backbone, images, -1), last)
    assert torch.equal(class_attention(backbone, images, -2), first)
    assert torch.equal(attention_maps(backbone, images).attention, last)


@torch.no_grad()
@pytest.mark.parametrize(("arch", "size"), CASES)
@pytest.mark.slow
def test_patch_features_are_timms_and_asking_for_them_changes_no_map(arch, size):
    theirs, ours = pair(arch)
    images = torch.randn(2, 3, *size)
    maps = attention_maps(ours, images, features=True)
    H, W = maps.attention.shape[2:]
    expected = theirs.forward_features(images)[:, 1:].transpose(1, 2).reshape(2, -1, H, W)
    assert maps.features.shape == expected.shape
    torch.testing.assert_close(maps.features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        maps.attention, attention_maps(ours, images).attention, rtol=1e-5, atol=1e-7
    )


def test_maps_that_are_not_requested_are_none():
    maps = attention_maps(pico(), torch.randn(1, 3, 16, 24))
    assert maps.queries is maps.keys is maps.covariance is maps.features is None
    maps = attention_maps(pico(), torch.randn(1, 3, 16, 24), xca_layer=0)
    assert None not in (maps.queries, maps.keys, maps.covariance)
    assert maps.features is None


def test_an_image_is_seen_alone():
    """What is in the batch besides changes nothing."""
    backbone, images = pico(), torch.randn(3, 3, 16, 24)
    together = attention_maps(backbone, images, xca_layer=1, features=True)
    for i in range(3):
        alone = attention_maps(backbone, images[i : i + 1], xca_layer=1, features=True)
        for of_batch, of_one in zip(together, alone, strict=True):
            torch.testing.assert_close(of_batch[i : i + 1], of_one, rtol=1e-4, atol=1e-5)


def test_nothing_is_recorded_for_gradients():
    for maps in attention_maps(
        pico(), torch.randn(1, 3, 16, 24, requires_grad=True), xca_layer=0, features=True
    ):
        assert not maps.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_on_the_backbone(fails):
    backbone = pico()
    if fails:
        with pytest.raises(UserError, match="patch size 8 must divide"):
            attention_maps(backbone, torch.randn(1, 3, 17, 24), xca_layer=1)
    else:
        attention_maps(backbone, torch.randn(1, 3, 16, 24), xca_layer=1)
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in backbone.modules()
    )


def test_maps_are_float32_whatever_the_pass_is_in():
    backbone, images = pico(), torch.randn(1, 3, 16, 24)
    exact = attention_maps(backbone, images, xca_layer=0, features=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_maps(backbone, images, xca_layer=0, features=True)
    for name in ("attention", "queries", "keys", "features"):
        one, other = getattr(exact, name), getattr(half, name)
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


# -- queries and keys of XCA -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("arch", "size"), CASES)
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.slow
def test_magnitudes_and_covariance_are_those_of_timms_blocks(arch, size, layer):
    theirs, ours = pair(arch)
    images = torch.randn(2, 3, *size)
    queries, keys, H, W = naive_queries_and_keys(theirs, images, layer % len(theirs.blocks))
    maps = attention_maps(ours, images, xca_layer=layer)
    d = ours.embed_dim // ours.heads
    assert maps.queries.shape == maps.keys.shape == (2, ours.heads, H, W)
    assert maps.covariance.shape == (2, ours.heads, d, d)
    for b in range(2):
        for head in range(ours.heads):
            q, k = queries[b][head], keys[b][head]
            for magnitudes, vectors in ((maps.queries, q), (maps.keys, k)):
                lengths = torch.stack([vector.square().sum().sqrt() for vector in vectors]).view(
                    H, W
                )
                torch.testing.assert_close(magnitudes[b, head], lengths, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(maps.covariance[b, head], q.T @ k, rtol=1e-3, atol=1e-4)
    assert maps.queries.std() > 1e-3
    assert not torch.allclose(maps.queries, maps.keys, atol=1e-3)
    assert maps.covariance.abs().max() <= 1 + 1e-5
    assert maps.covariance.abs().max() > 0.3


@torch.no_grad()
def test_covariance_is_what_the_layer_takes_the_softmax_of():
    """With the layer's temperature, its rows as weights over the values are the layer's output."""
    backbone, images = pico(), torch.randn(1, 3, 16, 24)
    xca = backbone.blocks[1].attn
    xca.temperature.uniform_(0.5, 2)
    given = []
    with_hook = xca.register_forward_hook(
        lambda _, inputs, output: given.append((inputs[0], output))
    )
    covariance = attention_maps(backbone, images, xca_layer=1).covariance
    with_hook.remove()
    tokens, expected = given[0]
    v = xca.qkv(tokens)[..., 2 * 64 :].unflatten(-1, (4, 16))
    weights = (covariance * xca.temperature).softmax(-1)
    mixed = torch.einsum("bhij,bnhj->bnhi", weights, v).flatten(2)
    torch.testing.assert_close(xca.proj(mixed), expected, rtol=1e-4, atol=1e-5)


def test_squared_magnitudes_of_a_head_sum_to_its_channels():
    """Each of its d channels has unit length over the patches."""
    maps = attention_maps(pico(), torch.randn(2, 3, 16, 24), xca_layer=0)
    torch.testing.assert_close(maps.queries.square().sum((2, 3)), torch.full((2, 4), 16.0))
    torch.testing.assert_close(maps.keys.square().sum((2, 3)), torch.full((2, 4), 16.0))


# -- refusals --------------------------------------------------------------------------------------


def test_layers_that_are_not_there_are_refused_by_their_flag():
    backbone, images = pico(), torch.randn(1, 3, 16, 24)
    for layer in (2, -3):
        with pytest.raises(
            UserError, match=rf"--layer is {layer}; expected 0 to 1, or -1 for the last"
        ):
            class_attention(backbone, images, layer)
    for layer in (len(backbone.blocks), -len(backbone.blocks) - 1):
        with pytest.raises(
            UserError,
            match=rf"--xca_layer is {layer}; expected 0 to {len(backbone.blocks) - 1}, or -1",
        ):
            attention_maps(backbone, images, xca_layer=layer)
    for layer in range(-3, 3):
        check_layer("layer", layer, 3)
    with pytest.raises(UserError, match="--layer is 3; expected 0 to 2"):
        check_layer("layer", 3, 3)


def test_a_network_without_class_attention_is_refused_by_its_name():
    with pytest.raises(
        UserError, match="Linear has no class-attention layers; expected the weights of an XCiT"
    ):
        with_class_attention(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="Linear has no class-attention"):
        class_attention(torch.nn.Linear(2, 2), torch.zeros(1, 3, 16, 16))
    with_class_attention(pico())


def test_ablation_without_xca_has_class_attention_but_no_queries():
    backbone, images = pico(xca=False), torch.randn(1, 3, 16, 24)
    assert class_attention(backbone, images).shape == (1, 4, 2, 3)
    with pytest.raises(UserError, match=r"ablation without XCA \(--xca false\)"):
        attention_maps(backbone, images, xca_layer=0)


def test_image_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UserError, match="patch size 8 must divide"):
        class_attention(pico(), torch.zeros(1, 3, 16, 23))


# -- masks of mass ---------------------------------------------------------------------------------


def official_mask(flat, threshold):
    """The lines of official visualize_attention.py, one map (N,), in float64."""
    val, idx = torch.sort(flat.double())
    val /= torch.sum(val)
    cumval = torch.cumsum(val, dim=0)
    th_attn = cumval > (1 - threshold)
    idx2 = torch.argsort(idx)
    return th_attn[idx2]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_mass_mask_is_officials_and_the_smallest_set_that_holds_the_mass(threshold, seed):
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(rng.random((2, 3, 4, 5)).astype(np.float32) ** 3)
    masks = mass_mask(maps, threshold)
    assert masks.shape == maps.shape
    assert masks.dtype == torch.bool
    for one_map, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert torch.equal(mask.flatten(), official_mask(one_map.flatten(), threshold))
        values = sorted((float(v) for v in one_map.flatten()), reverse=True)
        kept, count = 0.0, 0
        while kept < threshold * math.fsum(values):
            kept, count = kept + values[count], count + 1
        assert int(mask.sum()) == count
        assert float(one_map[mask].min()) >= max((float(v) for v in one_map[~mask]), default=0)


def test_mass_mask_by_hand():
    one = torch.tensor([[5.0, 1.0], [3.0, 1.0]])
    assert mass_mask(one, 0.5).tolist() == [[True, False], [False, False]]
    assert mass_mask(one, 0.51).tolist() == [[True, False], [True, False]]
    assert mass_mask(one, 0.79).tolist() == [[True, False], [True, False]]
    assert mass_mask(one, 0.99).tolist() == [[True, True], [True, True]]
    assert (
        mass_mask(7 * one, 0.51).tolist() == mass_mask(one, 0.51).tolist()
    )  # a map need not sum to one


def test_of_tied_patches_mass_mask_keeps_as_many_as_are_needed_the_last_first():
    ties = torch.ones(2, 4)
    masks = mass_mask(ties, 0.5)
    assert int(masks.sum()) == 4
    assert masks.tolist() == [4 * [False], 4 * [True]]
    assert torch.equal(mass_mask(ties, 0.5), masks)


def test_mass_mask_of_a_large_flat_map_is_not_moved_by_rounding():
    flat = torch.full((1, 500, 600), 1e-7)
    assert int(mass_mask(flat, 0.6).sum()) == pytest.approx(180_000, abs=1)


# -- entropy ---------------------------------------------------------------------------------------


def test_entropy_of_uniform_and_one_hot_maps_and_by_hand():
    maps = torch.stack([torch.full((3, 4), 0.02), torch.zeros(3, 4), torch.zeros(3, 4)])
    maps[1, 2, 3] = 0.4
    maps[2, 0, 0], maps[2, 1, 1] = 1.0, 3.0
    expected = [math.log(12), 0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    assert entropy(maps).tolist() == pytest.approx(expected, abs=1e-12)
    assert entropy(maps[None]).shape == (1, 3)


# -- features --------------------------------------------------------------------------------------


def test_similarity_is_scikit_learns_cosine():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 4, 5)).astype(np.float32))
    vectors = features.flatten(1).T.numpy()
    found = similarity(features, 2, 3)
    assert found.shape == (4, 5)
    expected = pairwise.cosine_similarity(vectors, vectors[[2 * 5 + 3]])[:, 0].reshape(4, 5)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[2, 3].item() == pytest.approx(1)
    torch.testing.assert_close(similarity(100 * features, 2, 3), found)


def features_of(seed, *shape):
    """Directions of clearly different strength, so that the components are defined."""
    rng = np.random.default_rng(seed)
    strengths = np.array([5, 3, 2, 0.5, 0.3, 0.2, 0.1, 0.1])
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(8, 8)))[0]
    return torch.from_numpy(
        (turn @ (strengths[:, None] * rng.normal(size=(8, math.prod(shape)))) + 4).astype(
            np.float32
        )
    ).view(8, *shape)


def test_colours_are_scikit_learns_principal_components_up_to_sign(monkeypatch):
    decomposition = pytest.importorskip("sklearn.decomposition")
    monkeypatch.setattr(maps_module, "CLIPPED", 0.0)
    several = [features_of(0, 6, 5), features_of(1, 3, 8)]
    colours = pca_colours(several)
    assert [tuple(c.shape) for c in colours] == [(6, 5, 3), (3, 8, 3)]
    rows = np.concatenate([f.flatten(1).T.numpy() for f in several]).astype(np.float64)
    parts = decomposition.PCA(3, svd_solver="full").fit_transform(rows)
    found = np.concatenate([c.flatten(0, 1).numpy() for c in colours])
    for channel in range(3):
        expected = (parts[:, channel] - parts[:, channel].min()) / np.ptp(parts[:, channel])
        error = min(
            np.abs(found[:, channel] - expected).max(),
            np.abs(found[:, channel] - 1 + expected).max(),
        )
        assert error < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_sign_of_a_component_is_that_of_its_largest_entry(monkeypatch, seed):
    monkeypatch.setattr(maps_module, "CLIPPED", 0.0)
    features = features_of(seed, 6, 5)
    rows = features.flatten(1).T.double().numpy()
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    (colours,) = pca_colours([features])
    for channel in range(3):
        axis = vectors[:, -1 - channel]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        parts = (rows - rows.mean(0)) @ axis
        expected = (parts - parts.min()) / np.ptp(parts)
        np.testing.assert_allclose(colours[..., channel].flatten(), expected, atol=1e-5)


def test_the_same_patch_has_the_same_colour_in_each_image():
    first, second = features_of(0, 4, 6), features_of(1, 5, 5)
    second[:, 3, 2] = first[:, 1, 4]
    second[:, 0, 0] = first[:, 2, 0]
    one, other = pca_colours([first, second])
    torch.testing.assert_close(one[1, 4], other[3, 2])
    torch.testing.assert_close(one[2, 0], other[0, 0])
    alone = pca_colours([second])[0]
    assert not torch.allclose(alone, other, atol=0.02)  # the basis was shared


def test_a_share_of_patches_is_beyond_either_end_of_each_colour():
    (colours,) = pca_colours([features_of(0, 25, 40)])
    assert colours.dtype == torch.float32
    for channel in colours.flatten(0, 1).T:
        assert int((channel == 0).sum()) == int((channel == 1).sum()) == 1 + math.floor(0.01 * 999)


def test_patches_that_are_all_alike_have_a_colour():
    (colours,) = pca_colours([torch.ones(8, 2, 3)])
    assert colours.isfinite().all()
    assert (colours >= 0).all()
    assert (colours <= 1).all()


# -- Jaccard index ---------------------------------------------------------------------------------


def test_jaccard_is_a_count_of_pixels():
    rng = np.random.default_rng(0)
    masks, truth = (
        torch.from_numpy(rng.random((2, 3, 4, 5)) < 0.5),
        torch.from_numpy(rng.random((2, 1, 4, 5)) < 0.4),
    )
    counted = torch.from_numpy(rng.random((2, 1, 4, 5)) < 0.7)
    for given in (None, counted):
        found = jaccard(masks, truth, given)
        assert found.shape == (2, 3)
        assert found.dtype == torch.float64
        for i in range(2):
            for j in range(3):
                both = either = 0
                for y in range(4):
                    for x in range(5):
                        if given is None or given[i, 0, y, x]:
                            both += bool(masks[i, j, y, x] and truth[i, 0, y, x])
                            either += bool(masks[i, j, y, x] or truth[i, 0, y, x])
                assert found[i, j].item() == both / either


def test_jaccard_of_nothing_with_nothing_is_nan():
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert jaccard(nothing, nothing).isnan()
    assert jaccard(nothing, ~nothing).item() == 0
    assert jaccard(~nothing, ~nothing).item() == 1


# -- memory ----------------------------------------------------------------------------------------


def test_larger_backbones_and_smaller_patches_need_more_memory_for_a_pixel():
    with torch.device("meta"):
        needed = {
            arch: bytes_per_pixel(XCiT(arch))
            for arch in ("xcit_s12_p8", "xcit_s12_p4", "xcit_n12_p8")
        }
    assert needed["xcit_n12_p8"] < needed["xcit_s12_p8"] < needed["xcit_s12_p4"]
    assert min(needed.values()) > 12 * 3  # at least the image in float32, three times
    assert max(needed.values()) < 10_000
