"""Broken and hostile files for `fuzz.py`, made by hypothesis from whole ones."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from dino_xcit.cli import COMMANDS
from dino_xcit.files import plain
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.formats import to_official_names

# The file that hostile code would write; of this process alone, so that runs side by side differ.
MARK = f"{tempfile.gettempdir()}/fuzzed-by-dino-xcit-{os.getpid()}"


def places(size: int) -> st.SearchStrategy[int]:
    """Positions in a file, often near its ends, which describe the rest."""
    head, tail = st.integers(0, min(size, 400)), st.integers(max(0, size - 400), size)
    return st.one_of(head, tail, st.integers(0, size))


@st.composite
def mutated(draw: Any, originals: dict[str, bytes]) -> bytes:
    """Whole files with up to six changes."""
    data = bytearray(originals[draw(st.sampled_from(sorted(originals)))])
    for _ in range(draw(st.integers(0, 6))):
        at = draw(places(len(data)))
        how = draw(
            st.sampled_from(["set", "set", "set", "insert", "delete", "cut", "repeat", "number"])
        )
        if how == "set":
            new = draw(st.binary(min_size=1, max_size=4))
            data[at : at + len(new)] = new
        elif how == "number":
            order, number = (
                draw(st.sampled_from("<>")),
                draw(st.sampled_from([0, 1, 0x7F, 0xFFFF, 10**5, 2**31 - 1, 2**32 - 1])),
            )
            data[at : at + 4] = struct.pack(f"{order}I", number)
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 256))]
        else:
            del data[at:]
    return bytes(data)


PICTURES = (
    *("JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGB", "PNG RGBA", "PNG LA", "PNG P", "PNG 1"),
    *("PNG I;16", "GIF P", "WEBP RGB", "BMP RGB", "TIFF RGB", "TIFF L", "TIFF CMYK"),
    *("PPM RGB", "PPM L"),
)


def pictures() -> dict[str, bytes]:
    ramp = np.linspace(0, 255, 24 * 31 * 3).reshape(24, 31, 3).astype(np.uint8)
    found = {}
    for kind in PICTURES:
        file_format, mode = kind.split()
        buffer = io.BytesIO()
        image = Image.fromarray(ramp)
        image = (
            Image.fromarray(ramp[..., 0].astype(np.uint16) * 256)
            if mode == "I;16"
            else image.convert(mode)
        )
        image.save(buffer, file_format)
        found[kind] = buffer.getvalue()
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(ramp, i, 1)) for i in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    frames[0].save(turned, "JPEG", exif=exif)
    postscript = (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
        f"({MARK}) (w) file closefile\nshowpage\n%%EOF\n"
    )
    return {
        **found,
        "GIF moving": buffer.getvalue(),
        "JPEG turned": turned.getvalue(),
        "EPS": postscript.encode(),
    }


class Code:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, argument: str) -> None:
        self.of = function, (argument,)

    def __reduce__(self) -> Any:
        return self.of


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def checkpoints() -> dict[str, bytes]:
    torch.manual_seed(0)
    small = XCiT("xcit_pico2_p4", in_chans=1)
    backbone = {name: tensor.detach() for name, tensor in small.state_dict().items()}
    official = {
        f"module.backbone.{name}": tensor for name, tensor in to_official_names(backbone).items()
    }
    whole = saved(backbone)
    hostile = pickle.dumps(Code(os.system, f"touch {MARK}"), 2)
    rezipped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(rezipped, "w") as new:
        for item in old.infolist():
            new.writestr(item, hostile if item.filename.endswith("data.pkl") else old.read(item))
    return {
        "safetensors": safetensors_bytes(
            backbone, {"dino_xcit": json.dumps({"arch": "xcit_pico2_p4", "in_chans": 1})}
        ),
        "torch.save": whole,
        "torch.save of old": saved(backbone, _use_new_zipfile_serialization=False),
        "official": saved(
            {
                "student": official,
                "teacher": official,
                "epoch": 1,
                "args": argparse.Namespace(arch="x"),
            }
        ),
        "pickle with code": hostile,
        "pickle that opens": pickle.dumps({"model": Code(open, MARK)}),
        "pickle that evaluates": pickle.dumps([Code(eval, f"open({MARK!r}, 'w')")], 4),
        "code in a zip": rezipped.getvalue(),
        "code beside tensors": saved({"model": backbone, "args": Code(os.system, f"touch {MARK}")}),
    }


def feature_files() -> dict[str, bytes]:
    return {
        "features": saved(torch.randn(6, 4)),
        "labels": saved(torch.arange(6)),
        "labels of old": saved(torch.arange(6), _use_new_zipfile_serialization=False),
        "code": pickle.dumps(Code(os.system, f"touch {MARK}"), 2),
    }


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["1e-3", "/etc", "../..", "~"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
TAGS = (
    f'!!python/object/apply:os.system ["touch {MARK}"]',
    f"!!python/object/new:open [{MARK}, w]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!binary aGVsbG8=",
    "&a [*a]",
    "*nobody",
    "{[1]: 2}",
    "[" * 2000,
    "2001-01-01",
    "<<: 1",
    "!!bool foo",
    "!!int ''",
    "!!int x",
    "!!float ''",
    "!!timestamp x",
    "!!set {1, 2}",
    "!!omap [a]",
)


@st.composite
def options(draw: Any) -> bytes:
    """YAML of a command's options with any values, or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.binary(max_size=200)
            | st.text(max_size=200).map(lambda text: text.encode(errors="replace"))
        )
    command = draw(st.sampled_from(sorted(COMMANDS)))
    defaults = {
        field.name: getattr(COMMANDS[command].config, field.name, None)
        for field in dataclasses.fields(COMMANDS[command].config)
    }
    lines = [f"# {command}\n"]
    for name in draw(st.lists(st.sampled_from(sorted(defaults)), max_size=4, unique=True)):
        as_it_is = yaml.safe_dump({name: plain(defaults[name])})
        hostile = f"{name}: {draw(st.sampled_from(TAGS))}\n"
        lines.append(
            draw(
                st.sampled_from([as_it_is, as_it_is, yaml.safe_dump({name: draw(VALUES)}), hostile])
            )
        )
    return "".join(lines).encode(errors="replace")
