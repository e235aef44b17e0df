"""Where images come from, which are bad, and in which order they are visited."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers import PICO_PATHS, RAMP, TINY, folder_config, make_folder
from PIL import Image

from dino_xcit.data.decode import decode
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset, CropLoader, StepBatchSampler
from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import PretrainConfig


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# -- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
        ("L", "PPM"),
    ],
)
def test_every_format_decodes_as_pil_reads_it(mode, file_format):
    data = encoded(Image.fromarray(RAMP).convert(mode), file_format)
    for channels, pil_mode in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(pil_mode)).reshape(
            40, 60, channels
        )
        decoded = decode(data, channels).permute(1, 2, 0).numpy()
        assert decoded.dtype == np.uint8
        assert (
            np.abs(decoded.astype(int) - expected).max() <= 2
        )  # grey from a colour JPEG is its own luma channel


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(file_format):
    data = encoded(Image.fromarray(RAMP[..., 0].astype(np.uint16) * 257), file_format)
    for channels in (1, 3):
        decoded = decode(data, channels)
        assert decoded.shape[0] == channels
        assert torch.equal(decoded[0], torch.from_numpy(RAMP[..., 0].copy()))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_images_are_turned_upright_by_their_exif(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    upright = decode(encoded(Image.fromarray(RAMP), file_format, exif=exif), 3)
    assert tuple(upright.shape) == (3, 60, 40)


def test_transparent_images_keep_four_channels_when_asked():
    decoded = decode(encoded(Image.fromarray(RAMP).convert("RGBA"), "PNG"), 4)
    assert tuple(decoded.shape) == (4, 40, 60)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_errors(file_format):
    data = encoded(Image.fromarray(RAMP), file_format)
    for broken in (data[: len(data) // 2], b"", b"not an image"):
        with pytest.raises((OSError, ValueError)):
            decode(broken, 3)


# -- sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a.jpg", "b.png", "c.webp"], None),
        (["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"], 2),
        (
            [
                "train/cat/a.jpg",
                "train/cat/b.jpg",
                "train/dog/c.jpg",
                "val/cat/d.jpg",
                "val/dog/e.jpg",
            ],
            2,
        ),
        (["2021/jan/a.jpg", "2021/feb/b.jpg", "2021/feb/c.TIF"], 2),
    ],
)
def test_folders_flat_labelled_split_and_nested(tmp_path, names, classes):
    config = folder_config(make_folder(tmp_path, names))
    train = open_images(config, "train")
    assert len(train) == 3
    assert train.read(0).shape == (3, 40, 60)
    assert (train.labels is None) if classes is None else (len(set(train.labels)) == classes)
    validation = open_images(config, "validation")
    assert (len(validation) == 2) if "val/cat/d.jpg" in names else validation is None


def test_a_class_has_the_same_label_in_both_splits(tmp_path):
    names = ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/4.png", "val/c/5.png"]
    config = folder_config(make_folder(tmp_path, names))
    train = open_images(config, "train")
    validation = open_images(config, "validation", train.classes)
    assert validation.labels.tolist() == [train.classes["b"], train.classes["c"]] == [1, 2]


def test_a_subset_is_picked_by_the_seed(tmp_path):
    root = make_folder(tmp_path, [f"{i % 2}/{i}.png" for i in range(20)])
    pick = lambda seed: names_of(dataclasses.replace(folder_config(root), seed=seed, num_images=5))  # noqa: E731
    assert len(pick(0)) == 5
    assert pick(0) == pick(0)
    assert pick(0) != pick(1)


def names_of(config: PretrainConfig) -> list[str]:
    images = open_images(config, "train")
    return [images.name(i) for i in range(len(images))]


def test_shapes_are_the_default_and_labelled():
    config = dataclasses.replace(TINY, dataset=None, data_path=None)
    images = open_images(config, "train")
    assert len(images) == TINY.num_images
    assert images.read(3).dtype == torch.uint8
    assert len(open_images(config, "validation")) > 0


def test_empty_and_wrong_folders_say_what_was_found(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images in --data_path .*1 other files"):
        open_images(folder_config(tmp_path), "train")
    with pytest.raises(ValueError, match="is a file"):
        open_images(folder_config(tmp_path / "notes.txt"), "train")
    with pytest.raises(ValueError, match="does not exist"):
        open_images(folder_config(tmp_path / "nowhere"), "train")


def test_only_known_kinds_of_named_sets_are_opened(tmp_path):
    make_folder(tmp_path, ["a.png"])
    with pytest.raises(
        ValueError, match="--dataset photos is unknown; expected shapes, torch/NAME"
    ):
        open_images(dataclasses.replace(TINY, dataset="photos", data_path=str(tmp_path)), "train")


def test_more_images_than_there_are_is_an_error(tmp_path):
    root = make_folder(tmp_path, ["a.png"])
    with pytest.raises(ValueError, match="--num_images 2 is more than the 1 images"):
        open_images(dataclasses.replace(folder_config(root), num_images=2), "train")


# -- bad images ------------------------------------------------------------------------------------------------------


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


def test_a_bad_image_ends_the_run_if_asked(tmp_path):
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


# -- order -----------------------------------------------------------------------------------------------------------


def visited(order: StepBatchSampler) -> list[list[tuple[int, int]]]:
    return list(order)


def test_every_epoch_visits_each_image_at_most_once_in_another_order():
    config = dataclasses.replace(TINY, epochs=3)
    passes = visited(StepBatchSampler(config, 50))
    assert len(passes) == 3 * (50 // 8) == len(StepBatchSampler(config, 50))
    epochs = [[i for chunk in passes for e, i in chunk if e == epoch] for epoch in range(3)]
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_what_one_would_have_seen(processes):
    alone = visited(StepBatchSampler(TINY, 50))
    config = dataclasses.replace(TINY, batch_size_per_gpu=TINY.batch_size_per_gpu // processes)
    together = [visited(StepBatchSampler(config, 50, rank, processes)) for rank in range(processes)]
    assert [
        [p for share in shares for p in share] for shares in zip(*together, strict=True)
    ] == alone


def test_accumulated_passes_make_up_the_steps_of_the_larger_batch():
    alone = visited(StepBatchSampler(TINY, 50))
    config = dataclasses.replace(TINY, batch_size_per_gpu=4, accumulate_grad_batches=2)
    parts = visited(StepBatchSampler(config, 50))
    assert [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)] == alone


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 11])
def test_an_order_goes_on_where_it_stopped(done):
    sampler = StepBatchSampler(TINY, 50)
    whole = visited(sampler)
    sampler.first_step = done
    assert visited(sampler) == whole[done:]
    assert len(sampler) == len(whole) - done


def test_fewer_images_than_a_step_takes_is_an_error_that_names_the_flag():
    with pytest.raises(
        ValueError,
        match=r"7 images are fewer than one step takes \(8: .*lower --batch_size_per_gpu",
    ):
        StepBatchSampler(TINY, 7)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(workers):
    images = open_images(TINY, "train")
    reference = [
        CropDataset(images, TINY, PICO_PATHS)[position][0]
        for chunk in StepBatchSampler(TINY, len(images))
        for position in chunk
    ]
    loader = CropLoader(
        CropDataset(images, TINY, PICO_PATHS),
        StepBatchSampler(TINY, len(images)),
        num_workers=workers,
        pin_memory=False,
    )
    seen = [batch.views for batch in loader]
    for name in (
        "global_crops",
        "global_params",
        "global_paths",
        "local_crops",
        "local_params",
        "local_paths",
    ):
        assert torch.equal(
            torch.cat([views[name] for views in seen]),
            torch.stack([vars(v)[name] for v in reference]),
        )
