"""Broken and hostile files by the thousand: is each answered by a value or by one line, in time, with nothing else touched?

    python eval/fuzz.py --minutes 10 --output eval/results/fuzz.json

Image bytes, masks, YAML and checkpoints, made by hypothesis from files that are whole: bytes changed, cut out, put in or
repeated; code in pickles; names that stand for each other. The first that fails ends it, shrunk and shown; the report is of
those that did not. `tests/test_fuzz.py` runs the same for a few seconds.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import platform
import shlex
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

import dino_xcit
from dino_xcit.cli import COMMANDS, parse
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data.decode import decode
from dino_xcit.evaluate.feature_files import OFFICIAL_FILES, FileFeatures
from dino_xcit.figures.object_masks import read_mask
from dino_xcit.figures.video import is_video
from dino_xcit.files import plain
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import read_config
from dino_xcit.train.checkpoints import is_whole
from dino_xcit.weights.formats import to_official_names
from dino_xcit.weights.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 10  # for one input
GIB = 2**30
MEMORY = 12 * GIB  # of addresses, in a process of its own
EXAMPLES = 500  # a round, between two looks at the clock
# What hostile code would write. Of this process alone: another's must not be taken for ours.
MARK = f"{tempfile.gettempdir()}/fuzzed-by-dino-xcit-{os.getpid()}"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
}
OTHERS = {"socket.connect", "urllib.Request", "ftplib.connect"}

tried: collections.Counter[str] = collections.Counter()
answered: collections.Counter[str] = collections.Counter()


# -- what is allowed -------------------------------------------------------------------------------------------------


class Guard:
    """Python tells its auditing hooks of each file that is opened, each process and each connection."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        paths = [
            os.path.abspath(os.fsdecode(path))
            for path in arguments[:2]
            if isinstance(path, (str, bytes))
        ]
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if event in STARTS | OTHERS or (writes and not self._may(paths[0])):
            self.seen.append(f"{event} {paths}")
        if event in CHANGES and not all(map(self._may, paths)):
            self.seen.append(f"{event} {paths}")

    def _may(self, path: str) -> bool:
        """Written in the folder, or by Python for itself."""
        return (
            path.startswith(f"{self.allowed}{os.sep}")
            or path == os.devnull
            or path.endswith(".pyc")
            or ".pyc." in path
        )

    def __call__(self, name: str, action: Callable[[Path], Any], allowed: Path) -> None:
        """An action gives a value or raises ValueError, in time, and touches nothing outside the folder."""
        tried[name] += 1
        self.seen.clear()
        said = ""
        start = time.monotonic()
        self.allowed = str(allowed.resolve())
        try:
            action(allowed)
            answered[f"{name}: taken"] += 1
        except ValueError as error:
            answered[f"{name}: refused"] += 1
            said = str(error)
        finally:
            self.allowed = None
        seconds = time.monotonic() - start
        assert not self.seen, self.seen
        assert "\n" not in said, f"not one line: {said}"
        assert seconds < SECONDS, f"{seconds:.1f} s"


guard = Guard()
temporary = tempfile.TemporaryDirectory(prefix="dino_xcit_fuzz_")
folder = Path(temporary.name)


def written(name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- inputs ----------------------------------------------------------------------------------------------------------


def places(size: int) -> st.SearchStrategy[int]:
    """Heads and tails of files say how the rest is to be read."""
    head, tail = st.integers(0, min(size, 400)), st.integers(max(0, size - 400), size)
    return st.one_of(head, tail, st.integers(0, size))


@st.composite
def mutated(draw: Any, originals: dict[str, bytes]) -> bytes:
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


def pictures() -> dict[str, bytes]:
    ramp = np.linspace(0, 255, 24 * 31 * 3).reshape(24, 31, 3).astype(np.uint8)
    found = {}
    kinds = [
        "JPEG RGB",
        "JPEG L",
        "JPEG CMYK",
        "PNG RGB",
        "PNG RGBA",
        "PNG LA",
        "PNG P",
        "PNG 1",
        "PNG I;16",
        "GIF P",
    ]
    for kind in [
        *kinds,
        "WEBP RGB",
        "BMP RGB",
        "TIFF RGB",
        "TIFF L",
        "TIFF CMYK",
        "PPM RGB",
        "PPM L",
    ]:
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
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({MARK}) (w) file closefile\nshowpage\n%%EOF\n"
    return {
        **found,
        "GIF moving": buffer.getvalue(),
        "JPEG turned": turned.getvalue(),
        "EPS": postscript.encode(),
    }


class Code:
    """Unpickled without care, it runs."""

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
    """Options of the commands with anything as their values; files of laughs; any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.binary(max_size=200)
            | st.text(max_size=200).map(lambda text: text.encode(errors="replace"))
        )
    command = draw(st.sampled_from(sorted(COMMANDS)))
    config = COMMANDS[command].config()
    lines = [f"# {command}\n"]
    for name in draw(st.lists(st.sampled_from(sorted(vars(config))), max_size=4, unique=True)):
        as_it_is = yaml.safe_dump({name: plain(getattr(config, name))})
        hostile = f"{name}: {draw(st.sampled_from(TAGS))}\n"
        lines.append(
            draw(
                st.sampled_from([as_it_is, as_it_is, yaml.safe_dump({name: draw(VALUES)}), hostile])
            )
        )
    if draw(st.integers(0, 9)) == 0:
        lines.append("x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n")
        for i in range(1, draw(st.integers(2, 30))):
            lines.append(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n")
        lines.append(f"mean: *x{i}\n")
    return "".join(lines).encode(errors="replace")


# -- what is tried on them -------------------------------------------------------------------------------------------


def decoded(data: bytes, channels: int) -> None:
    image = decode(data, channels)
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert image.shape[0] == channels


def try_image(data: bytes) -> None:
    for channels in (1, 3, 4):
        guard("images", lambda _, c=channels: decoded(data, c), folder)


def try_mask(data: bytes) -> None:
    path = written("mask.png", data)
    guard("masks", lambda _: read_mask(path), folder)
    moving = written("moving.gif", data)
    guard("videos", lambda _: is_video(moving), folder)


def try_options(data: bytes) -> None:
    path = written("config.yaml", data)
    named = data.partition(b"\n")[0].lstrip(b"# ").decode(errors="replace")
    command = named if named in COMMANDS else "pretrain"

    def parsed(_: Path) -> None:
        parse(command, COMMANDS[command].config, ["--config", str(path)])

    guard("options", parsed, folder)
    guard("configs of run folders", lambda _: read_config(folder), folder)


def try_checkpoint(data: bytes) -> None:
    path = written("weights.pth", data)
    guard("checkpoints", lambda _: load_backbone(path), folder)
    guard("checksums", lambda _: is_whole(path), folder)


def try_features(data: bytes) -> None:
    files = dict(
        zip(
            sum(OFFICIAL_FILES.values(), ()),
            2 * (WHOLE_FEATURES["features"], WHOLE_FEATURES["labels"]),
            strict=True,
        )
    )
    for name, content in {**files, sorted(files)[zlib.crc32(data) % len(files)]: data}.items():
        written(name, content)
    guard(
        "features and labels", lambda _: FileFeatures(KnnConfig(load_features=str(folder))), folder
    )


WHOLE_FEATURES = feature_files()
TARGETS: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "images": (try_image, mutated(pictures()) | st.binary(max_size=300)),
    "masks": (try_mask, mutated(pictures())),
    "options": (try_options, options()),
    "checkpoints": (try_checkpoint, mutated(checkpoints()) | st.binary(max_size=300)),
    "features": (try_features, mutated(WHOLE_FEATURES)),
}


def run(target: str, examples: int, seed: int | None = None) -> None:
    """Raises what goes wrong, with the smallest input for which it does. seed: None for the same inputs each time."""
    action, inputs = TARGETS[target]
    test = given(inputs)(action)
    test = settings(
        max_examples=examples,
        deadline=None,
        derandomize=seed is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(test)
    (test if seed is None else hypothesis.seed(seed)(test))()
    assert not Path(MARK).exists(), "code of a file was run"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    start, rounds = time.monotonic(), 0
    while time.monotonic() - start < 60 * arguments.minutes:
        for target in TARGETS:
            run(target, EXAMPLES, arguments.seed + rounds)
        rounds += 1
        left = max(0, arguments.minutes - (time.monotonic() - start) / 60)
        print(
            f"round {rounds}: {sum(tried.values())} inputs tried, {left:.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "inputs_tried": sum(tried.values()),
        "tried": dict(tried),
        "answered": dict(sorted(answered.items())),
        "versions": {
            "dino_xcit": dino_xcit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "hypothesis": hypothesis.__version__,
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
