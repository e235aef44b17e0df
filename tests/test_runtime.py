"""Devices, precision and folders of a command, and what they leave in the caller's process."""

import logging
import os
import warnings

import pytest
import torch

from dino_xcit import runtime
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.errors import UserError


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO])
def test_lightnings_logging_level_is_as_before(level, caplog):
    logger = logging.getLogger("lightning.fabric")
    before = logger.level
    try:
        logger.setLevel(level)
        runtime.device_of(AttentionConfig(weights=("W",), accelerator="cpu"))
        runtime.launch(KnnConfig(weights="W", accelerator="cpu", devices="1"))
        assert logger.level == level
        with pytest.raises(UserError):
            runtime.device_of(AttentionConfig(weights=("W",), accelerator="abacus"))
        assert logger.level == level
    finally:
        logger.setLevel(before)
    assert not caplog.records


def test_processes_that_cannot_connect_are_one_line_with_what_to_set(monkeypatch):
    def fail(**_):
        raise RuntimeError("Gloo connectFullMesh failed with\n[pair.cc:144] Connection refused")

    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.dist, "new_group", fail)
    with pytest.raises(UserError, match=r"Connection refused.*GLOO_SOCKET_IFNAME") as raised:
        runtime.gloo_group()
    assert "\n" not in str(raised.value)


def test_a_refusal_names_the_flags_that_the_command_has():
    with pytest.raises(UserError, match=r"Lightning refuses --accelerator abacus --precision 32"):
        runtime.device_of(AttentionConfig(weights=("W",), accelerator="abacus"))
    with pytest.raises(UserError, match=r"--accelerator cpu --devices -3 --precision auto: "):
        runtime.launch(KnnConfig(weights="W", accelerator="cpu", devices="-3"))


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_automatic_precision_follows_the_cpu(has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(runtime, "bfloat16_is_faster", lambda: has_bfloat16)
    auto = KnnConfig(weights="W", accelerator="cpu", precision="auto")
    assert runtime.resolve_precision(auto) == expected
    assert runtime.resolve_precision(KnnConfig(weights="W", precision="16-mixed")) == "16-mixed"


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_is_timed_against_float32(faster, monkeypatch):
    times = iter([[0.2, 0.3], [0.1, 0.9] if faster else [0.4, 0.9]])
    monkeypatch.setattr(runtime.timeit, "repeat", lambda *_, **__: next(times))
    runtime.bfloat16_is_faster.cache_clear()
    try:
        assert runtime.bfloat16_is_faster() is faster
    finally:
        runtime.bfloat16_is_faster.cache_clear()


def test_a_compiler_that_fails_gives_its_first_line(monkeypatch):
    def fail(_):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    assert runtime.why_nothing_compiles(torch.device("cpu")) == "no C++ compiler"


def test_a_folder_is_checked_without_a_trace(tmp_path):
    (tmp_path / "there").mkdir()
    runtime.require_folder(tmp_path / "there", "output_dir")
    runtime.require_folder(tmp_path / "a/b/c", "output_dir")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_what_cannot_be_a_folder_is_refused_by_its_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = f"--cache_dir {tmp_path / 'file'} is a file; expected a folder to write to"
    with pytest.raises(UserError, match=message):
        runtime.require_folder(tmp_path / "file", "cache_dir")

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(runtime.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"--cache_dir .* cannot be written to \(No space left"):
        runtime.require_folder(tmp_path / "other", "cache_dir")
    assert not (tmp_path / "other").exists()


def test_a_warning_while_compiling_is_no_failure(monkeypatch):
    def warn(function):
        warnings.warn("TensorFloat32 tensor cores available but not enabled", stacklevel=1)
        return function

    monkeypatch.setattr(torch, "compile", warn)  # warnings are errors in these tests
    assert runtime.why_nothing_compiles(torch.device("cpu")) is None
