"""Which images each step sees, and what replaces those that cannot be read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import PICO_PATHS, TINY, folder_config, make_folder

from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset, StepBatchSampler
from dino_xcit.errors import UserError

# -- bad images ----------------------------------------------------------------------------------


def folder_with_a_bad_file(root: Path) -> Path:
    make_folder(root, [f"{i}.jpg" for i in range(5)])
    (root / "2.jpg").write_bytes((root / "1.jpg").read_bytes()[:300])
    return root


def test_a_bad_image_is_replaced_by_the_same_other_every_time_and_named(tmp_path):
    config = folder_config(folder_with_a_bad_file(tmp_path))
    dataset = CropDataset(open_images(config, "train"), config, PICO_PATHS)
    views, bad = dataset[0, 2]
    again, _ = dataset[0, 2]
    assert [Path(b.name).name for b in bad] == ["2.jpg"]
    assert bad[0].reason
    assert torch.equal(views.global_crops, again.global_crops)
    assert dataset[0, 1][1] == []


def test_a_bad_image_is_an_error_if_asked(tmp_path):
    config = folder_config(folder_with_a_bad_file(tmp_path), on_bad_image="raise")
    dataset = CropDataset(open_images(config, "train"), config, PICO_PATHS)
    with pytest.raises(UserError, match=r"cannot read .*2\.jpg.*--on_bad_image replace"):
        dataset.batch([(0, 1), (0, 2)])


def test_nothing_but_bad_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    config = folder_config(tmp_path)
    with pytest.raises(UserError, match="is --data_path right"):
        CropDataset(open_images(config, "train"), config, PICO_PATHS).batch([(0, 0)])


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


# -- order ---------------------------------------------------------------------------------------


def test_every_epoch_visits_each_image_at_most_once_in_another_order():
    config = dataclasses.replace(TINY, epochs=3)
    passes = list(StepBatchSampler(config, 50))
    assert len(passes) == 3 * (50 // 8) == len(StepBatchSampler(config, 50))
    epochs = [[i for chunk in passes for e, i in chunk if e == epoch] for epoch in range(3)]
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_what_one_would_have_seen(processes):
    alone = list(StepBatchSampler(TINY, 50))
    config = dataclasses.replace(TINY, batch_size_per_gpu=TINY.batch_size_per_gpu // processes)
    together = [list(StepBatchSampler(config, 50, rank, processes)) for rank in range(processes)]
    assert [
        [p for share in shares for p in share] for shares in zip(*together, strict=True)
    ] == alone


def test_accumulated_passes_make_up_the_steps_of_the_larger_batch():
    alone = list(StepBatchSampler(TINY, 50))
    config = dataclasses.replace(TINY, batch_size_per_gpu=4, accumulate_grad_batches=2)
    parts = list(StepBatchSampler(config, 50))
    assert [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)] == alone


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 11])
def test_a_sampler_starts_at_its_first_step(done):
    sampler = StepBatchSampler(TINY, 50)
    whole = list(sampler)
    sampler.first_step = done
    assert list(sampler) == whole[done:]
    assert len(sampler) == len(whole) - done


def test_fewer_images_than_a_step_takes_is_an_error_that_names_the_flag():
    with pytest.raises(
        ValueError,
        match=r"7 images are fewer than one step takes \(8: .*lower --batch_size_per_gpu",
    ):
        StepBatchSampler(TINY, 7)
