"""Thousands of broken and hostile files: each must be accepted or refused in one line, in time.

    python eval/fuzz.py --minutes 10 --output eval/results/fuzz.json

Image bytes, masks, YAML and checkpoints, made by hypothesis from whole files: bytes changed, cut
out, inserted or repeated; code in pickles. Nothing outside a temporary folder may be touched. The
first failure ends the run, minimised and printed; the report counts inputs that did not fail.
`tests/test_fuzz.py` runs the same for a few seconds.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import torch
from fuzz_inputs import MARK, checkpoints, feature_files, mutated, options, pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dino_xcit
from dino_xcit.cli import COMMANDS, parse
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data.decode import decode
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_files import OFFICIAL_FILES, FileFeatures
from dino_xcit.figures.mask_files import read_mask
from dino_xcit.figures.video import is_video
from dino_xcit.run_folder import read_config
from dino_xcit.train.checkpoints import is_whole
from dino_xcit.weights.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 10  # for one input
GIB = 2**30
MEMORY = 12 * GIB  # of addresses, in a process of its own
EXAMPLES = 500  # a round, between two looks at the clock
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


# -- the guard ---------------------------------------------------------------------------------


class Guard:
    """Watches what files, processes and connections an action opens, by Python's audit hooks."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        paths = [
            os.path.abspath(os.fsdecode(path))  # noqa: PTH100  # resolve() would follow links
            for path in arguments[:2]
            if isinstance(path, (str, bytes))
        ]
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if event in STARTS | OTHERS or (writes and not self._may(paths[0])):
            self.seen.append(f"{event} {paths}")
        if event in CHANGES and not all(map(self._may, paths)):
            self.seen.append(f"{event} {paths}")

    def _may(self, path: str) -> bool:
        """Whether it is in the allowed folder, or a file that Python writes for itself."""
        return (
            path.startswith(f"{self.allowed}{os.sep}")
            or path == os.devnull
            or path.endswith(".pyc")
            or ".pyc." in path
        )

    def __call__(self, name: str, action: Callable[[Path], Any], allowed: Path) -> None:
        """Check that an action returns or raises UserError or OSError, in one line and in time.

        It must not write outside the allowed folder, start a process or open a connection.
        """
        tried[name] += 1
        self.seen.clear()
        message = ""
        start = time.monotonic()
        self.allowed = str(allowed.resolve())
        try:
            action(allowed)
            answered[f"{name}: taken"] += 1
        except (UserError, OSError) as error:
            answered[f"{name}: refused"] += 1
            message = str(error)
        finally:
            self.allowed = None
        seconds = time.monotonic() - start
        assert not self.seen, self.seen
        assert "\n" not in message, f"not one line: {message}"
        assert seconds < SECONDS, f"{seconds:.1f} s"


guard = Guard()
temporary = tempfile.TemporaryDirectory(prefix="dino_xcit_fuzz_")
folder = Path(temporary.name)


def written(name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- targets -----------------------------------------------------------------------------------


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
            2 * (FEATURES["features"], FEATURES["labels"]),
            strict=True,
        )
    )
    for name, content in {**files, sorted(files)[zlib.crc32(data) % len(files)]: data}.items():
        written(name, content)
    guard(
        "features and labels", lambda _: FileFeatures(KnnConfig(load_features=str(folder))), folder
    )


FEATURES = feature_files()
FEATURES = feature_files()
TARGETS: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "images": (try_image, mutated(pictures()) | st.binary(max_size=300)),
    "masks": (try_mask, mutated(pictures())),
    "options": (try_options, options()),
    "checkpoints": (try_checkpoint, mutated(checkpoints()) | st.binary(max_size=300)),
    "features": (try_features, mutated(FEATURES)),
}


def run(target: str, examples: int, seed: int | None = None) -> None:
    """Try inputs on a target; raises the first failure, for the smallest input that shows it.

    seed: of the inputs; None: the same inputs each time.
    """
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
