"""Indices of tar files: what a sample is, what is refused, and what the cache keeps."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from helpers import make_tar

from dino_xcit.data import tar_index
from dino_xcit.data.tar_index import NO_LABEL, open_indices, walk
from dino_xcit.errors import UserError


def names(index) -> list[str]:
    return index.names.decode(errors="surrogateescape").split("\0")[:-1]


def classes(index) -> list[int | str | None]:
    """Class of each sample in .cls or .json."""
    return [
        index.texts[row["text"]]
        if row["text"] >= 0
        else None
        if row["label"] == NO_LABEL
        else int(row["label"])
        for row in index.records
    ]


# -- samples -----------------------------------------------------------------------------------


def test_offsets_and_sizes_are_those_of_the_images(tmp_path):
    files = {"./a/1.jpg": b"one", "./a/1.cls": "3", "./b/2.PNG": b"two!", "./b/2.txt": "a caption"}
    path = make_tar(tmp_path / "a.tar", files)
    index, data = walk(str(path)), path.read_bytes()
    assert names(index) == ["a/1.jpg", "b/2.PNG"]
    assert [data[r["offset"] :][: r["size"]] for r in index.records] == [b"one", b"two!"]
    assert [index.folders[row["folder"]] for row in index.records] == ["a", "b"]
    assert index.ignored == {".txt": 1}


@pytest.mark.parametrize(
    ("ending", "content", "expected"),
    [
        ("cls", "17\n", 17),
        ("cls", "cat", "cat"),
        ("cls", "", None),
        ("cls", "9" * 30, "9" * 30),
        ("json", '{"label": 4, "cls": 5}', 4),
        ("json", '{"cls": "dog"}', "dog"),
        ("json", '{"label": true}', None),
        ("json", '{"label": [1, 2]}', None),
        ("json", "[1]", None),
        ("json", "{broken", None),
        ("txt", "5", None),
    ],
)
def test_classes_of_samples(tmp_path, ending, content, expected):
    path = make_tar(tmp_path / "a.tar", {f"1.{ending}": content, "1.jpg": b"image"})
    assert classes(walk(str(path))) == [expected]


def test_a_samples_other_images_are_no_samples_and_images_with_dots_are(tmp_path):
    files = ["1.jpg", "1.mask.png", "1.cls", "a.b.c.png", "a.b.d.png", "e.jpg", "e.png"]
    index = walk(str(make_tar(tmp_path / "a.tar", dict.fromkeys(files, "0"))))
    assert names(index) == ["1.jpg", "a.b.c.png", "a.b.d.png", "e.jpg", "e.png"]
    assert index.ignored == {".png": 1}


def test_hidden_files_folders_and_links_are_left_out(tmp_path):
    files = ["._1.png", "__MACOSX/2.png", ".x/3.png", "4.png"]
    path = make_tar(tmp_path / "a.tar", dict.fromkeys(files, "image"))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("folder.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert names(walk(str(path))) == ["4.png"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_format_of_tars_are_read(tmp_path, format):
    (tmp_path / "x.png").write_bytes(b"image")
    long = f"{'d' * 90}/{'e' * (60 if format == tarfile.USTAR_FORMAT else 150)}.png"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.add(tmp_path / "x.png", long)
        tar.add(tmp_path / "x.png", "ü.png" if format == tarfile.PAX_FORMAT else "u.png")
    assert names(walk(str(tmp_path / "a.tar")))[0] == long


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        ["1.cls", "1.jpg", "1.cls", "1.jpg"],
        ["1.cls", "1.jpg", "2.jpg", "1.jpg", "1.cls"],
        ["1.jpg", "2.jpg", "1.cls", "2.cls"],
        ["1.cls", "2.cls", "1.jpg", "2.jpg"],
        ["1.jpg", "1.png", "1.cls"],
        ["a/1.jpg", "b/1.jpg", "a/1.jpg"],
    ],
)
def test_two_samples_of_a_key_are_refused(tmp_path, files):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in files:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(
        UserError, match=rf"--data_path {path} holds two samples of the key (a/)?1;"
    ):
        walk(str(path))


def test_the_same_key_in_two_folders_is_two_samples(tmp_path):
    files = {"a/1.jpg": "", "a/1.cls": "0", "b/1.jpg": "", "b/1.cls": "1"}
    assert classes(walk(str(make_tar(tmp_path / "a.tar", files)))) == [0, 1]


@pytest.mark.parametrize("left", [700, 1024, 1500, 2048, 2060, 2560])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, left):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 900, "2.jpg": b"y" * 200})
    path.write_bytes(path.read_bytes()[:left])  # 1.jpg ends at 1412, 2.jpg's header at 2048
    with pytest.raises(UserError, match=r"a.tar is truncated or damaged after [12].jpg .* whole t"):
        walk(str(path))


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x", "2.jpg": b"y"})
    data = bytearray(path.read_bytes())
    data[1024 + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged after 1.jpg"):
        walk(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bytes(10240), "is an empty tar"),
        (b"no tar at all" * 100, "is no tar"),
        (b"\x1f\x8b\x08" + bytes(2000), "is compressed; expected an uncompressed .tar"),
    ],
)
def test_files_that_are_no_tars_are_refused(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"--data_path .*a.tar {message}"):
        walk(str(tmp_path / "a.tar"))


def test_compressed_and_missing_tars_are_refused_before_any_is_walked(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.tar", "b.tar", "c.tar.gz")]
    make_tar(tmp_path / "a.tar", {"1.jpg": b"x"})
    with pytest.raises(UserError, match=r"c.tar.gz is compressed"):
        open_indices(paths, tmp_path / "cache")
    with pytest.raises(UserError, match=r"b.tar does not exist, 1 of 2 tars; expected"):
        open_indices(paths[:2], tmp_path / "cache")


# -- the cache ---------------------------------------------------------------------------------


@pytest.fixture
def walked(monkeypatch) -> list[str]:
    """The tars that are walked, by their names."""
    calls: list[str] = []

    def noted(path, *rest):
        calls.append(Path(path).name)
        return walk(path, *rest)

    monkeypatch.setattr(tar_index, "walk", noted)
    return calls


def two_tars(tmp_path) -> list[str]:
    files = {"c/1.jpg": b"x", "c/1.json": '{"label": "é"}', "d/2.jpg": b"y", "d/2.cls": "3"}
    return [str(make_tar(tmp_path / name, {**files, "n.txt": "z"})) for name in ("a.tar", "b.tar")]


def test_an_index_is_made_once_and_kept_whole(tmp_path, walked):
    paths = two_tars(tmp_path)
    made = open_indices(paths, tmp_path / "cache")
    assert walked == ["a.tar", "b.tar"]
    kept = open_indices(paths, tmp_path / "cache")
    assert walked == ["a.tar", "b.tar"]
    for one, other in zip(made, kept, strict=True):
        assert one._replace(records=0) == other._replace(records=0)
        assert one.records.tolist() == other.records.tolist()


def test_only_the_index_of_a_tar_that_changed_is_made_again(tmp_path, walked):
    paths = two_tars(tmp_path)
    open_indices(paths, tmp_path / "cache")
    stat = Path(paths[1]).stat()
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    open_indices(paths, tmp_path / "cache")
    assert walked == ["a.tar", "b.tar", "b.tar"]
    make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 20000})
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert names(open_indices(paths, tmp_path / "cache")[0]) == ["1.jpg"]


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: b"{}\n" + d])
def test_a_damaged_index_is_made_again(tmp_path, walked, damage):
    paths = two_tars(tmp_path)[:1]
    open_indices(paths, tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.index")
    file.write_bytes(damage(file.read_bytes()))
    assert len(open_indices(paths, tmp_path / "cache")[0].records) == 2
    assert walked == ["a.tar", "a.tar"]


def test_where_no_index_can_be_kept_the_tars_are_still_read(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert len(open_indices(two_tars(tmp_path), tmp_path / "cache")) == 2
    assert "the index of the tars is not kept in" in capsys.readouterr().err
