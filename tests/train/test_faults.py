"""Faults in data: files that vanish, hang, lie about their size or run code."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from helpers import PICO_PATHS, folder_config, make_folder

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data import decode as decode_module
from dino_xcit.data.decode import decode
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.figures.command import attention
from dino_xcit.run_folder import read_bad_images, read_metrics
from dino_xcit.train.pretrain import pretrain

# -- files that vanish or hang ---------------------------------------------------------------------------------------


def test_a_file_that_nothing_ever_writes_to_counts_as_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_module, "SECONDS_TO_READ", 0.2)
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    (folder / "03.png").unlink()
    os.mkfifo(folder / "03.png")
    config = folder_config(
        folder, output_dir=str(tmp_path / "run"), num_workers=1, epochs=1, batch_size_per_gpu=8
    )
    start = time.monotonic()
    assert pretrain(config).step == 2
    assert time.monotonic() - start < 30
    (line,) = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert line == f"{folder / '03.png'}\tnot read within 0.2 s"


def test_files_that_vanish_or_become_unreadable_in_mid_run_are_replaced_and_listed(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    config = folder_config(folder, output_dir=str(tmp_path / "run"), epochs=2, batch_size_per_gpu=8)
    images = open_images(config, "train")
    (folder / "03.png").unlink()
    (folder / "04.png").unlink()
    (folder / "04.png").mkdir()
    (folder / "05.png").write_bytes(b"")
    dataset = CropDataset(images, config, PICO_PATHS)
    bad = {Path(one.name).name: one.reason for i in range(16) for one in dataset[0, i][1]}
    assert set(bad) == {"03.png", "04.png", "05.png"}
    assert "No such file" in bad["03.png"]
    assert "Is a directory" in bad["04.png"]


# -- images that lie about their size --------------------------------------------------------------------------------

SIDE = 100_000


def png_bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:  # 65,500 is the most that libjpeg takes
    frame = struct.pack(">BHHB", 8, 65_500, 65_500, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    return (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">H", 2 + len(frame))
        + frame
        + b"\xff\xda\x00\x0c\x03"
        + bytes(9)
        + b"\xff\xd9"
    )


def gif_bomb() -> bytes:  # 16 bits a side
    screen = struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    return (
        b"GIF89a"
        + screen
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def tiff_bomb() -> bytes:
    tags = [
        (256, SIDE),
        (257, SIDE),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, SIDE),
        (279, 8),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp_bomb() -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, *[0] * 6)
    )


def ppm_bomb() -> bytes:
    return f"P6 {SIDE} {SIDE} 255\n".encode() + bytes(100)


def webp_bomb() -> bytes:  # 14 bits a side; the header of an extended file takes 24
    canvas = (SIDE - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    f.__name__: f for f in (png_bomb, jpeg_bomb, gif_bomb, tiff_bomb, bmp_bomb, ppm_bomb, webp_bomb)
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bomb", BOMBS)
def test_an_image_bomb_is_refused(bomb, channels):
    with pytest.raises(ValueError, match=r"\w"):
        decode(BOMBS[bomb](), channels)


def test_image_bombs_take_neither_memory_nor_time():
    """In a process of its own that may take 1 GiB above what the libraries take; a bomb would need 4 to 40."""
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_faults import BOMBS, decode
from PIL import Image
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30,) * 2)
start = time.monotonic()
for bomb in BOMBS.values():
    try:
        decode(bomb(), 3)
    except ValueError as error:
        print(error)
assert time.monotonic() - start < 5
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(BOMBS)
    assert "MemoryError" not in run.stdout


def test_a_run_goes_on_over_an_image_bomb(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    (folder / "07.png").write_bytes(png_bomb())
    (folder / "08.gif").write_bytes(gif_bomb())
    config = folder_config(folder, output_dir=str(tmp_path / "run"), epochs=1, batch_size_per_gpu=8)
    pretrain(config)
    assert {Path(name).name for name in read_bad_images(tmp_path / "run")} <= {"07.png", "08.gif"}
    assert "07.png" in (tmp_path / "run/bad_images.txt").read_text()
    assert "exceeds limit" in (tmp_path / "run/bad_images.txt").read_text()


# -- images that run code, names that break files --------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touched) (w) file closefile\nshowpage\n%%EOF\n"


def test_postscript_named_png_starts_no_interpreter(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(
        subprocess, "check_call", lambda *_, **__: pytest.fail("a process was started")
    )
    with pytest.raises(ValueError, match="not an image"):
        decode(POSTSCRIPT, 3)


NAMES = [
    "new\nline.png",
    "tab\there.png",
    "<script>alert(1)<\\script>.png",
    "quo\"te's, and comma.png",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f98a.png",
    os.fsdecode(b"latin-\xe9.png"),
]


def test_bad_images_of_any_name_are_listed_one_a_line_and_once(tmp_path):
    folder = make_folder(tmp_path / "images", [f"{i:02}.png" for i in range(16)])
    for name in NAMES:
        (folder / name).write_bytes(b"no image")
    config = folder_config(
        folder, output_dir=str(tmp_path / "run"), epochs=3, batch_size_per_gpu=11
    )
    pretrain(dataclasses.replace(config, epochs=2))
    listed = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(listed) == len(NAMES)
    assert all(line.endswith("\tnot an image") and line.count("\t") == 1 for line in listed)
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_names_of_any_kind_go_through_a_run_its_evaluation_and_its_figures(tmp_path):
    classes = [
        "new\nline",
        "<script>alert(1)<",
        "quo\"te's, and comma",
        "\u0645\u0631\u062d\u0628\u0627 \U0001f98a",
    ]
    names = [
        f"{split}/{kind}/{i} {kind}.png"
        for split in ("train", "val")
        for kind in classes
        for i in range(6)
    ]
    folder = make_folder(tmp_path / "images", names)
    config = folder_config(folder, output_dir=str(tmp_path / "run"), epochs=1, batch_size_per_gpu=8)
    pretrain(config)
    # As a stranger may send it: what its config.yaml says of folders is not where anything is written.
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(
        text.replace(f"output_dir: {tmp_path}/run", f"output_dir: {tmp_path}/elsewhere")
    )
    before = {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents}
    knn_eval(
        KnnConfig(weights=str(tmp_path / "run"), nb_knn=(3,), cache_dir=str(tmp_path / "run/cache"))
    )
    problems = attention(
        AttentionConfig(
            weights=(str(tmp_path / "run"),),
            images=(str(folder / "val"),),
            output_dir=str(tmp_path / "run/figures"),
            image_size=32,
            figures=("overlay",),
            html=True,
        )
    )
    assert problems == []
    assert {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents} == before
    written = sorted((tmp_path / "run").rglob("*.json"))
    assert {path.name for path in written} >= {"knn.json", "attention.json"}
    for path in written:
        json.loads(path.read_text())
    page = (tmp_path / "run/figures/attention.html").read_text()
    assert "<script>alert" not in page
    assert len(read_metrics(tmp_path / "run")) == 3
