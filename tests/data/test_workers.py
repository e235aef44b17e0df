"""Loader workers: none changes a batch; what goes wrong in one ends as it should."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.resource_sharer as resource_sharer
import os
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import PICO_PATHS, TINY
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import loader as loader_module
from dino_xcit.data import workers as workers_module
from dino_xcit.data.crops import MultiCrop
from dino_xcit.data.images import ShapeSet
from dino_xcit.data.loader import (
    CropDataset,
    CropLoader,
    StepBatchSampler,
    batch_bytes,
    report_scarce_shared_memory,
)
from dino_xcit.data.workers import default_workers, restartable
from dino_xcit.errors import ImageError, UserError
from dino_xcit.train.trainer import CropData

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Deadly(ShapeSet):
    """Reading image 37 kills the process that reads it: at the first time, or always."""

    def __init__(self, marker: Path | None, *args) -> None:
        super().__init__(*args)
        self.marker = marker

    def read(self, index):
        if index == 37:
            if self.marker is None:
                os.kill(os.getpid(), signal.SIGKILL)
            elif not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


class Unreadable(ShapeSet):
    """No image can be read."""

    def read(self, index):
        raise ImageError("not an image")


def shape_set(images: type[ShapeSet] = ShapeSet, *args) -> ShapeSet:
    return images(*args, 0, "train", 64, 3)


def loader(images: ShapeSet, workers: int, pin_memory: bool = False, **options) -> CropLoader:
    config = dataclasses.replace(TINY, **options)
    dataset = CropDataset(images, config, PICO_PATHS)
    sampler = StepBatchSampler(config, len(images))
    return CropLoader(dataset, sampler, num_workers=workers, pin_memory=pin_memory)


def crop_data(processes: int, **options) -> CropData:
    """The data of the first of several processes."""
    data = CropData(dataclasses.replace(TINY, **options), shape_set(), PICO_PATHS)
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=processes,
        num_devices=processes,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def assert_same_batches(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.bad_images == other.bad_images
        torch.testing.assert_close(one.views, other.views, rtol=0, atol=0)


@pytest.fixture
def callers_handler():
    """A handler of SIGCHLD that the caller has installed."""

    def handler(*_):
        pass

    before = signal.signal(signal.SIGCHLD, handler)
    yield handler
    signal.signal(signal.SIGCHLD, before)


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_samples_in_the_samplers_order(workers):
    batches = list(loader(shape_set(), workers))
    sampled = loader(shape_set(), workers)
    assert_same_batches(batches, [sampled.dataset.batch(p) for p in sampled.sampler])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_a_loader_starts_at_the_samplers_first_step(workers):
    options = {"batch_size_per_gpu": 4, "accumulate_grad_batches": 2}
    whole = list(loader(shape_set(), 0, **options))
    resumed = loader(shape_set(), workers, **options)
    resumed.sampler.first_step = 3
    assert len(resumed) == len(whole) - 6
    assert_same_batches(list(resumed), whole[6:])
    assert_same_batches(list(resumed), whole[6:])  # iterating changes nothing


# -- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(64, 8, 7), (64, 1, 16), (64, 2, 16), (8, 1, 7), (8, 8, 1), (1, 1, 1), (2, 4, 1)],
)
def test_the_processes_of_a_machine_share_its_cores(cores, processes, expected, monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_workers(processes) == expected


def test_a_task_of_slurm_with_cores_of_its_own_shares_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert default_workers(4) == 7
    monkeypatch.setenv("SLURM_NTASKS", "1")  # one task, which starts the processes
    assert default_workers(4) == 1


def test_a_process_of_a_run_takes_its_share(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert crop_data(2, num_workers=None).train_dataloader().num_workers == 7


# -- shared memory -------------------------------------------------------------------------------


def test_the_size_of_a_batch_is_that_of_its_crops():
    batch = next(iter(loader(shape_set(), 0)))
    crops = [views for name, views in batch.views.items() if name.endswith("_crops")]
    assert batch_bytes(TINY) == sum(views.nbytes for views in crops)


@pytest.mark.parametrize(("free", "fits"), [(0.9, False), (1.0, True)])
def test_shared_memory_that_may_not_suffice_is_one_line(free, fits, monkeypatch, capsys):
    needed = 2 * 3 * 2 * batch_bytes(TINY)  # two batches each of three workers of two processes
    blocks = SimpleNamespace(f_bavail=int(free * needed), f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: blocks)
    report_scarce_shared_memory(TINY, num_workers=3, processes=2)
    lines = capsys.readouterr().err.splitlines()
    if fits:
        assert lines == []
    else:
        (line,) = lines
        assert "2 processes x 3 workers x 2 batches" in line
        assert "docker run --shm-size=1g" in line
        assert "lower --num_workers" in line
    report_scarce_shared_memory(TINY, num_workers=0, processes=2)
    monkeypatch.undo()
    monkeypatch.setattr(loader_module, "SHARED_MEMORY_FOLDER", "/no such folder")
    report_scarce_shared_memory(TINY, num_workers=3, processes=2)
    assert capsys.readouterr().err == ""


def test_a_run_compares_its_batches_with_the_shared_memory(monkeypatch, capsys):
    blocks = SimpleNamespace(f_bavail=0, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: blocks)
    crop_data(2, num_workers=1).train_dataloader()
    assert "(2 processes x 1 worker x 2 batches), /dev/shm has 0.00" in capsys.readouterr().err


# -- workers that die ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_no_batch_is_lost(tmp_path, capsys):
    calm = loader(shape_set(), 0, accumulate_grad_batches=2)
    shaken = loader(shape_set(Deadly, tmp_path / "died"), 2, accumulate_grad_batches=2)
    for each in (calm, shaken):
        each.sampler.first_step = 1
    batches = list(shaken)
    assert (tmp_path / "died").exists()
    assert "died (Killed); starting others in its place" in capsys.readouterr().err
    assert_same_batches(batches, list(calm))


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run_in_one_line(callers_handler, monkeypatch):
    monkeypatch.setattr(workers_module, "WORKER_DEATHS", 1)
    with pytest.raises(
        UserError, match=r"^2 loader workers died one after the other .*--num_workers 0$"
    ):
        list(loader(shape_set(Deadly, None), 1))
    assert signal.getsignal(signal.SIGCHLD) is callers_handler


class Dropping(DataLoader):
    """A loader of numbers whose worker ends after three of them, or as it starts."""

    def __init__(self, first: int, error: Exception | None, init: Callable | None = None):
        self.error = error
        super().__init__(
            range(first, 4), batch_size=None, num_workers=1, worker_init_fn=init, prefetch_factor=1
        )

    def __iter__(self):
        others = multiprocessing.active_children()
        inner = super().__iter__()
        (worker,) = set(multiprocessing.active_children()) - set(others)
        return self.dropping(inner, worker) if self.error else inner

    def dropping(self, inner, worker):
        for item in inner:
            if item == 3:
                worker.kill()
                raise self.error
            yield item


def exit_at_once(worker):
    os._exit(3)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()]
)
def test_a_worker_may_die_while_it_delivers_a_batch(error, capsys):
    starts = []

    def loader_from(number):
        starts.append(number)
        return Dropping(number, error if len(starts) < 3 else None)

    assert list(restartable(loader_from)) == [0, 1, 2, 3]
    assert starts == [0, 3, 3]
    assert capsys.readouterr().err.count("died (Killed); starting others in its place") == 2


@pytest.fixture
def an_accelerator(monkeypatch):
    """One for which batches are pinned, which does nothing."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_may_die_while_the_thread_that_pins_takes_its_batch(
    an_accelerator, monkeypatch, capsys
):
    """The thread gets the error of the connection and ends; torch reports the thread's end."""
    others = set(multiprocessing.active_children())
    detach, taken = resource_sharer.DupFd.detach, []

    def cut_off(descriptor):
        taken.append(descriptor)
        if len(taken) == 20:
            worker = next(iter(set(multiprocessing.active_children()) - others))
            worker.kill()
            raise ConnectionResetError(104, "Connection reset by peer")
        return detach(descriptor)

    monkeypatch.setattr(resource_sharer.DupFd, "detach", cut_off)
    batches = list(loader(shape_set(), 2, pin_memory=True))
    assert len(taken) > 20
    assert "died (Killed); starting others in its place" in capsys.readouterr().err
    assert_same_batches(batches, list(loader(shape_set(), 0)))


@pytest.mark.slow
def test_a_worker_may_die_as_it_starts(capsys):
    starts = []

    def loader_from(number):
        starts.append(number)
        return Dropping(number, None, exit_at_once if len(starts) == 1 else None)

    assert list(restartable(loader_from)) == [0, 1, 2, 3]
    assert "died" in capsys.readouterr().err


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (RuntimeError("stack expects each tensor to be equal size"), 0),
        (RuntimeError("stack expects each tensor to be equal size"), 1),
        (ConnectionResetError(), 0),
    ],
)
@pytest.mark.slow
def test_errors_of_living_workers_are_not_taken_for_a_death(error, workers, capsys):
    with pytest.raises(type(error)):
        list(restartable(lambda number: DataLoader(Failing(error), num_workers=workers)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("end", ["exhausted", "abandoned", "failed"])
def test_the_callers_handler_of_sigchld_is_back(end, callers_handler):
    images = shape_set(Unreadable) if end == "failed" else shape_set()
    batches = iter(loader(images, 1, epochs=1))
    if end == "exhausted":
        list(batches)
    elif end == "abandoned":
        next(batches)
        batches.close()
    else:
        with pytest.raises(UserError):
            next(batches)
    assert signal.getsignal(signal.SIGCHLD) is callers_handler


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_does_not_touch_the_callers_random_numbers(workers):
    state = torch.get_rng_state()
    next(iter(loader(shape_set(), workers)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_dying_child_raises_nothing_in_the_middle_of_a_step():
    """Torch's own handler of SIGCHLD would."""
    others = set(multiprocessing.active_children())
    batches = iter(loader(shape_set(), 1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert len(list(batches)) == len(loader(shape_set(), 1)) - 1


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("on_bad_image", "message"),
    [
        ("raise", r"^cannot read shape \d+ \(\w+\): not an image; --on_bad_image replace .*image$"),
        ("replace", r"^cannot read shape .* nor 20 others .*; is --data_path right\?$"),
    ],
)
def test_images_that_cannot_be_replaced_are_one_clean_line(workers, on_bad_image, message):
    with pytest.raises(UserError, match=message) as raised:
        next(iter(loader(shape_set(Unreadable), workers, on_bad_image=on_bad_image)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("failing", ["some", "all"])
def test_an_error_of_our_own_cropping_is_not_a_bad_image(workers, failing, monkeypatch):
    crop = MultiCrop.__call__

    def broken(self, image, key):
        if failing == "all" or key[-1] % 5 == 0:
            raise ValueError("broken augmentation")
        return crop(self, image, key)

    monkeypatch.setattr(MultiCrop, "__call__", broken)
    with pytest.raises(ValueError, match="broken augmentation") as raised:
        list(loader(shape_set(), workers))
    assert not isinstance(raised.value, UserError)
    entries = [str(entry.path) for entry in raised.traceback]
    # A worker's traceback stands in the message, as torch puts it there.
    assert "test_workers.py" in (str(raised.value) if workers else entries[-1])
