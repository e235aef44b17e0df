"""Names of the XCiT architectures."""

import pytest
import timm

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ARCHITECTURES, OURS, resolve_architecture, timm_name

PUBLISHED = [
    f"{short}_p{patch}" for short in ARCHITECTURES if short not in OURS for patch in (16, 8)
]


@pytest.mark.parametrize(
    ("name", "row", "patch"),
    [
        ("xcit_s12_p8", "xcit_s12", 8),
        ("xcit_small_12_p8", "xcit_s12", 8),
        ("xcit_small_12_p8_224", "xcit_s12", 8),
        ("xcit_small_12_p8_384", "xcit_s12", 8),
        ("xcit_small_12_p8_224_dist", "xcit_s12", 8),
        ("xcit_small_12_p8_384_dist", "xcit_s12", 8),
        ("xcit_small_12_p8_224.fb_in1k", "xcit_s12", 8),
        ("xcit_small_12_p8_384.fb_dist_in1k", "xcit_s12", 8),
        ("xcit_nano_12_p16_224", "xcit_n12", 16),
        ("xcit_tiny_24_p16_384.fb_dist_in1k", "xcit_t24", 16),
        ("xcit_medium_24_p8", "xcit_m24", 8),
        ("xcit_large_24_p4", "xcit_l24", 4),
        ("xcit_pico_2_p8", "xcit_pico2", 8),
        ("xcit_nano_3_p4", "xcit_n3", 4),
    ],
)
def test_every_spelling_of_a_name_gives_the_same_architecture(name, row, patch):
    short = f"{row}_p{patch}"
    assert resolve_architecture(name) == (short, ARCHITECTURES[row], patch)
    assert timm_name(name) == timm_name(short)


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("xcit_s13_p8", "xcit_s12_p8"),
        ("xcit_smal_12_p16", "xcit_small_12_p16"),
        ("xcit_t12_p32", "xcit_t12_p"),
        ("resnet50", "xcit_"),
    ],
)
def test_unknown_name_lists_the_closest_and_the_valid(name, closest):
    with pytest.raises(UserError, match=rf"'{name}'; did you mean --arch {closest}") as error:
        resolve_architecture(name)
    for short in ARCHITECTURES:
        assert f"{short}_p16" in str(error.value)


def test_timm_name_is_a_name_that_timm_knows_or_none():
    assert {timm_name(arch) for arch in PUBLISHED} <= set(timm.list_models("xcit*"))
    assert timm_name("xcit_s12_p4") is None
    assert timm_name("xcit_pico2_p16") is None
    assert timm_name("xcit_n3_p16") is None
