"""Checkpoints of others: their names, their files, and the messages for files of another kind."""

from __future__ import annotations

import argparse
import os
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch
from timm.models.xcit import checkpoint_filter_fn

from dino_xcit.errors import UserError
from dino_xcit.model.architectures import ARCHITECTURES, timm_name
from dino_xcit.model.dino import DINOHead
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.formats import (
    describe,
    select_network,
    to_official_names,
    to_our_names,
)
from dino_xcit.weights.load import PUBLISHED, load_backbone
from dino_xcit.weights.reading import read_file

OF_TIMM = [
    f"{short}_p{patch}"
    for short in ARCHITECTURES
    for patch in (16, 8)
    if timm_name(f"{short}_p{patch}")
]


def formula_filled(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a network on any device, with values that differ by tensor, row and column."""
    tensors = {}
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        values = (
            torch.arange(tensor.numel(), dtype=torch.float32)
            .mul_(0.011)
            .add_(0.37 * number)
            .sin_()
            .mul_(0.05)
        )
        filled = values.reshape(tensor.shape) + (1 if "norm" in name or "var" in name else 0)
        tensors[name] = (
            filled if tensor.is_floating_point() else torch.zeros_like(tensor, device="cpu")
        )
    return tensors


def official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> the official ones, written out by hand."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("pos_embed."):
            renamed["pos_embeder." + name[len("pos_embed.") :]] = tensor
        elif (
            ".attn." in name and name.startswith("cls_attn_blocks") and name.split(".")[3] in "qkv"
        ):
            block, kind = name.split(".")[1], name.split(".")[4]
            rows = [
                tensors[f"cls_attn_blocks.{block}.attn.{part}.{kind}"] for part in ("q", "k", "v")
            ]
            renamed[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(rows)
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("arch", OF_TIMM)
@pytest.mark.slow
def test_official_names_become_timms_as_by_timms_own_conversion(arch):
    """All sizes, both patch sizes, both settings of tokens_norm."""
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(arch), num_classes=0)
    tensors = formula_filled(theirs)
    published = official(tensors)
    expected = checkpoint_filter_fn(dict(published), theirs)
    found, head = to_our_names(published)
    assert head == {}
    assert found.keys() == expected.keys() == tensors.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a, published[name]) for name, a in to_official_names(found).items())
    assert to_official_names(found).keys() == published.keys()
    about = describe(found)
    assert about == {
        "arch": arch,
        "in_chans": 3,
        "xca": True,
        "lpi": True,
        "learned_temperature": True,
    }


@pytest.fixture(scope="module")
def nano() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return formula_filled(XCiT("xcit_n12_p16"))


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return DINOHead(128, 24, hidden_dim=16, bottleneck_dim=8).state_dict()


def wrapped(backbone, head):
    """As official main_dino.py saves a network that DistributedDataParallel holds."""
    return {f"module.backbone.{k}": v for k, v in official(backbone).items()} | {
        f"module.head.{k}": v for k, v in head.items()
    }


def whole(nano, head, **changes):
    teacher = {name.removeprefix("module."): tensor for name, tensor in wrapped(nano, head).items()}
    student = {name: 2 * tensor for name, tensor in wrapped(nano, head).items()}
    args = argparse.Namespace(arch="xcit_nano_12_p16", out_dim=24, lr=0.1)
    loss = {"center": torch.ones(1, 24)}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": args,
        "dino_loss": loss,
        **changes,
    }


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


FILES = {
    "official backbone": lambda nano, head: official(nano),
    "wrapped": lambda nano, head: wrapped(nano, head),
    "full official checkpoint": whole,
    "supervised": lambda nano, head: {
        "model": {**official(nano), "head.weight": torch.zeros(9, 128), "head.bias": torch.zeros(9)}
    },
    "timm's names": lambda nano, head: nano,
    "lightning of anyone": lambda nano, head: {
        "state_dict": {f"teacher.backbone.{k}": v for k, v in nano.items()}
    },
    "compiled": lambda nano, head: {f"_orig_mod.{k}": v for k, v in nano.items()},
    "without counters": lambda nano, head: {
        k: v for k, v in official(nano).items() if "num_batches" not in k
    },
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.slow
def test_the_kind_of_a_file_is_recognised(kind, nano, head, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(FILES[kind](nano, head), path)
    backbone = load_backbone(path)
    assert backbone.arch == "xcit_n12_p16"
    assert same(backbone.state_dict(), nano)
    assert not backbone.training
    checkpoint = select_network(*read_file(path), ("teacher",))
    assert same(checkpoint.head, head if kind in ("wrapped", "full official checkpoint") else {})


def test_the_old_format_of_torch_save_is_read_too(nano, tmp_path):
    torch.save(official(nano), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same(load_backbone(tmp_path / "w.pth").state_dict(), nano)


def test_safetensors_of_others_need_no_metadata(nano, tmp_path):
    safetensors.torch.save_file(nano, tmp_path / "w.safetensors")
    assert same(load_backbone(tmp_path / "w.safetensors").state_dict(), nano)
    (tmp_path / "w.safetensors").rename(tmp_path / "no_ending")
    assert same(load_backbone(tmp_path / "no_ending").state_dict(), nano)


def test_checkpoint_key_names_the_network(nano, head, tmp_path):
    path = tmp_path / "full.pth"
    torch.save(whole(nano, head), path)
    student = load_backbone(path, checkpoint_key="student").state_dict()
    assert torch.equal(student["cls_token"], 2 * nano["cls_token"])
    torch.save({"student": wrapped(nano, head), "epoch": 1}, path)
    with pytest.raises(
        UserError,
        match=r"full\.pth has no teacher, only the student; name it with --checkpoint_key",
    ):
        load_backbone(path)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_and_ablations_show_in_the_tensors(channels, tmp_path):
    network = XCiT("xcit_pico2_p8", in_chans=channels, lpi=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(tmp_path / "w.pth").eval()
    x = torch.randn(1, channels, 16, 24)
    assert torch.equal(backbone(x), network.eval()(x))


def test_a_network_of_no_name_asks_for_arch(tmp_path):
    tensors = {
        k: v for k, v in XCiT("xcit_n12_p8").state_dict().items() if not k.startswith("blocks.11.")
    }
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no architecture known here; name one with --arch"):
        load_backbone(tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"does not fit xcit_n12_p8: missing: blocks\.11\.\S+, .* and \d+ more"
    ):
        load_backbone(tmp_path / "w.pth", arch="xcit_n12_p8")


def test_gaps_leftovers_and_shapes_are_listed(nano, tmp_path):
    changed = {**nano, "extra.weight": torch.zeros(2), "norm.bias": torch.zeros(3)}
    del changed["blocks.3.gamma1"]
    torch.save(changed, tmp_path / "w.pth")
    message = (
        "missing: blocks.3.gamma1; left over: extra.weight; "
        "of another shape: norm.bias (3,), expected (128,)"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_backbone(tmp_path / "w.pth")
    torch.save(nano, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"of another shape: cls_token \(1, 1, 128\), expected \(1, 1, 192\)"
    ):
        load_backbone(tmp_path / "w.pth", arch="xcit_t12_p16")


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def broken(kind, nano, path):
    content = {
        "empty": b"",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "web page": b"\n<!DOCTYPE html><html>404</html>",
        "text": b"hello, these are no weights",
    }
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "code":
        torch.save({"model": Evil()}, path)
    elif kind == "pickled code":
        path.write_bytes(pickle.dumps({"model": Evil()}))
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "a ViT":
        torch.save(timm.create_model("test_vit").state_dict(), path)
    elif kind == "CaiT":
        torch.save({k: v for k, v in nano.items() if not k.startswith("patch_embed")}, path)
    else:
        torch.save(nano, path, _use_new_zipfile_serialization=kind == "cut off")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("empty", "is empty"),
        ("git-lfs", "is a pointer of git-lfs"),
        ("web page", "is a web page"),
        ("text", "is cut off, or no file of torch.save or safetensors"),
        ("code", "holds code"),
        ("pickled code", "holds code|is cut off, or no file"),
        ("a list", "holds a list; expected tensors by their names"),
        ("no tensors", "holds no network: epoch beside 0 tensors"),
        ("a ViT", "is not of an XCiT"),
        ("CaiT", "is not of an XCiT"),
        ("cut off", "is cut off"),
        ("cut off, old format", "is cut off"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(kind, expected, nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    broken(kind, nano, path)
    with pytest.raises(UserError, match=expected) as raised:
        load_backbone(path)
    assert str(raised.value).startswith(f"--weights {path} ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.slow
def test_published_checkpoints_are_fetched_once_and_whole(name, nano, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    served = tmp_path / "served.pth"
    torch.save(official(nano), served)
    monkeypatch.setitem(PUBLISHED, name, served.as_uri())
    assert same(load_backbone(name, arch="xcit_n12_p16").state_dict(), nano)
    served.unlink()
    assert same(load_backbone(name).state_dict(), nano)  # from the cache


def test_a_download_that_stops_short_leaves_nothing(nano, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = next(iter(PUBLISHED))
    served = tmp_path / "served.pth"
    served.write_bytes(b"12345")
    monkeypatch.setitem(PUBLISHED, name, served.as_uri())
    from pathlib import Path

    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path: Path(path).write_bytes(b"123")
    )
    with pytest.raises(
        UserError, match=r"could not be fetched .3 bytes came of 5.; put file:.* at .*checkpoints"
    ):
        load_backbone(name)
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_without_a_network_a_published_name_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = next(iter(PUBLISHED))
    monkeypatch.setitem(PUBLISHED, name, (tmp_path / "gone" / "served.pth").as_uri())
    with pytest.raises(
        UserError, match=r"could not be fetched .*; put .* at .*hub/checkpoints/served\.pth"
    ) as raised:
        load_backbone(name)
    assert "\n" not in str(raised.value)
