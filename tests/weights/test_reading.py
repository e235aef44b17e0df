"""Files of torch.save: data beside the tensors is read, code is not."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import stat
from collections import defaultdict

import numpy as np
import pytest
import torch

from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.weights.reading import read_file, write_safetensors

DATA = {
    "numpy scalar": np.float64(0.3),
    "numpy integer": np.int64(3),
    "numpy array": np.arange(3),
    "numpy strings": np.array(["a", "b"]),
    "numpy's random state": np.random.RandomState(0).get_state(),
    "path": pathlib.PurePosixPath("a/b"),
    "path of Windows": pathlib.PureWindowsPath("c:/a"),
    "defaultdict": defaultdict(list, a=[1]),
    "options": argparse.Namespace(lr=np.float32(0.5), folder=pathlib.Path("runs")),
    "date": datetime.datetime(2026, 1, 2),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_data_beside_the_tensors_is_read(kind, old_format, tmp_path):
    path = tmp_path / "w.pth"
    content = {"weights": torch.ones(2), "data": DATA[kind]}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    found, metadata = read_file(path)
    assert metadata == {}
    assert torch.equal(found["weights"], torch.ones(2))
    if kind == "options":
        assert found["data"].lr == 0.5
        assert str(found["data"].folder) == "runs"
    else:
        assert str(found["data"]) == str(DATA[kind]) or found["data"] == DATA[kind]


@pytest.mark.parametrize(
    ("code", "name"),
    [(torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (np.load, "numpy.load")],
)
def test_code_is_named_whole(code, name, tmp_path):
    torch.save({"weights": torch.ones(2), "code": code}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"holds code \({name}\), which is never run"):
        read_file(tmp_path / "w.pth")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_written_weights_have_the_permissions_that_the_umask_gives(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_safetensors({"weights": torch.ones(2)}, tmp_path / "w.safetensors", {})
        with replacing(tmp_path / "renamed.safetensors") as beside:
            write_safetensors({"weights": torch.ones(2)}, beside, {})
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()]
    assert modes == [0o666 & ~umask] * 2
