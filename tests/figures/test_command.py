"""`dino-xcit attention` as its user types it."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from figure_helpers import files_in_figures, smooth_picture
from PIL import Image
from run_pictures import empty_pictures

from dino_xcit.cli import main
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.figures import command
from dino_xcit.figures.maps import class_attention
from dino_xcit.figures.video import VideoFile, write_video
from dino_xcit.train.pretrain import pretrain
from dino_xcit.weights.load import load_backbone


def attention(*arguments: object) -> int:
    return main(["attention", "--weights", "w.safetensors", "--dpi", "40", *map(str, arguments)])


def summary() -> dict:
    return json.loads(Path("figures/attention.json").read_text())


def test_images_become_figures_with_their_arrays_beside_them(here, capsys):
    assert attention("--image_size", 0, "photos/wide.png", "photos/tall.png") == 0
    files = {
        f"{name}.{kind}"
        for name in ("heads_wide", "heads_tall", "overlay")
        for kind in ("png", "npz")
    }
    assert files_in_figures() == files | {"attention.json"}
    numbers = np.load("figures/heads_tall.npz")
    assert numbers["image_0"].shape == (64, 40, 1)  # cropped from 66 x 42
    pixels = torch.from_numpy(numbers["image_0"]).permute(2, 0, 1)[None] / 255
    expected = class_attention(load_backbone("w.safetensors"), (pixels - 0.5) / 0.25)[0].numpy()
    np.testing.assert_allclose(numbers["attention_0"], expected, atol=1e-6)
    content = summary()
    assert [one["name"] for one in content["images"]] == ["wide", "tall"]
    assert content["images"][0]["patches"] == [16, 10]
    share = expected / expected.sum((1, 2), keepdims=True)
    assert content["images"][1]["entropy"] == pytest.approx(
        (-share * np.log(share)).sum((1, 2)), abs=1e-4
    )
    assert content["options"]["image_size"] == 0
    assert "long side as it is, crop to multiples of 4 pixels" in capsys.readouterr().out


def test_words_without_a_flag_are_images_wherever_they_stand(here):
    words = [
        "photos/wide.png",
        "--figures",
        "grid",
        "overlay",
        "photos/tall.png",
        "--titles",
        "photos/square.png",
    ]
    assert (
        main(["attention", *words, "--weights", "w.safetensors", "--clip", "0", "--dpi", "40"]) == 0
    )
    assert [one["name"] for one in summary()["images"]] == ["wide", "tall", "square"]
    assert summary()["options"]["titles"] is True
    assert files_in_figures() == {
        "grid.png",
        "grid.npz",
        "overlay.png",
        "overlay.npz",
        "attention.json",
    }


def test_a_folder_stands_for_its_images_in_the_order_of_their_names(here):
    assert attention("--figures", "grid", "--images_per_figure", 2, "photos") == 0
    assert [one["name"] for one in summary()["images"]] == ["square", "tall", "wide"]
    assert files_in_figures() == {
        "grid_1.png",
        "grid_1.npz",
        "grid_2.png",
        "grid_2.npz",
        "attention.json",
    }


@pytest.mark.slow
def test_every_figure_in_every_format(here):
    kinds = ["heads", "grid", "overlay", "magnitude", "covariance", "similarity", "pca"]
    assert (
        attention(
            "--figures",
            *kinds,
            "--format",
            "png",
            "pdf",
            "svg",
            "photos/wide.png",
            "photos/square.png",
        )
        == 0
    )
    names = {kind for kind in kinds if kind not in ("heads", "magnitude", "covariance")}
    names |= {
        f"{kind}_{name}"
        for kind in ("heads", "magnitude", "covariance")
        for name in ("wide", "square")
    }
    assert files_in_figures() == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf", "svg", "npz")
    } | {"attention.json"}
    numbers = np.load("figures/covariance_wide.npz")
    assert numbers["covariance_0"].shape == (4, 16, 16)


@pytest.mark.slow
def test_without_images_the_runs_own_are_shown(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with empty_pictures():
        folder = pretrain(tiny).folder
    assert (
        main(["attention", "--weights", str(folder), "--figures", "grid", "--num_images", "2"]) == 0
    )
    assert [one["file"] for one in summary()["images"]] == ["shape 0 (rows)", "shape 1 (columns)"]
    assert np.load("figures/grid.npz")["image_0"].shape == (
        16,
        16,
        3,
    )  # as large as the run's crops


def test_without_images_and_without_a_run_the_message_names_images(here, capsys):
    assert attention() == 2
    assert "expected images" in capsys.readouterr().err
    assert not Path("figures").exists()


@pytest.mark.slow
def test_checkpoints_over_training(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with empty_pictures():
        folder = pretrain(dataclasses.replace(tiny, saveckp_freq=1)).folder
    assert main(["attention", "--weights", str(folder), "--figures", "training"]) == 0
    numbers = np.load("figures/training.npz")
    kept = [name for name in numbers.files if name.startswith("attention_0")]
    assert kept == [
        "attention_0_of_epoch 1",
        "attention_0_of_epoch 2",
    ]  # the finished teacher is that of epoch 2
    pixels = torch.from_numpy(numbers["image_0_of_epoch 1"]).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(getattr(tiny, name))[:, None, None] for name in ("mean", "std"))
    for epoch in (1, 2):
        backbone = load_backbone(folder / f"checkpoints/epoch000{epoch}.ckpt")
        expected = class_attention(backbone, (pixels - mean) / std)[0].numpy()
        np.testing.assert_allclose(numbers[f"attention_0_of_epoch {epoch}"], expected, atol=1e-6)


def test_without_kept_checkpoints_the_message_names_the_flag_that_keeps_them(here, capsys):
    assert attention("--figures", "training", "photos/wide.png") == 2
    assert "--saveckp_freq" in capsys.readouterr().err


def test_models_side_by_side_get_their_own_channels(here):
    more = ["--weights", "colour.safetensors", "--names", "grey", "--names", "a colour one"]
    assert attention(*more, "--image_size", 50, "photos/wide.png") == 0
    numbers = np.load("figures/models.npz")
    assert numbers["image_0_of_grey"].shape == (
        24,
        48,
        1,
    )  # 31 x 50, cropped to what both patch sizes divide
    assert numbers["image_0_of_a colour one"].shape == (24, 48, 3)
    assert numbers["attention_0_of_grey"].shape == (4, 6, 12)
    assert numbers["attention_0_of_a colour one"].shape == (4, 3, 6)


def test_what_cannot_be_shown_is_listed_and_the_others_are_drawn(here, capsys):
    Path("zero.jpg").touch()
    Path("notes.txt").write_text("hello")
    Path("text.jpg").write_text("hello")
    Path("empty").mkdir()
    (Path("cut.png")).write_bytes(Path("photos/wide.png").read_bytes()[:60])
    Path("video.mp4").write_bytes(b"not a video")
    Image.fromarray(smooth_picture(2, 60)).save("thin.png")
    bad = [
        "zero.jpg",
        "notes.txt",
        "text.jpg",
        "empty",
        "cut.png",
        "video.mp4",
        "thin.png",
        "gone.png",
    ]
    assert attention("--figures", "overlay", *bad, "photos/wide.png") == 2
    lines = capsys.readouterr().err.splitlines()
    lines_of = {
        line.split(": ")[1]: line for line in lines if line.startswith("dino-xcit attention: ")
    }
    assert sorted(lines_of) == sorted(bad)
    assert "0 bytes" in lines_of["zero.jpg"]
    assert "not an image" in lines_of["notes.txt"]
    assert "not an image" in lines_of["text.jpg"]
    assert "without images" in lines_of["empty"]
    assert "does not exist" in lines_of["gone.png"]
    assert "smaller than a patch of 4 x 4" in lines_of["thin.png"]
    assert "--fit pad" in lines_of["thin.png"]
    assert [one["name"] for one in summary()["images"]] == ["wide"]
    assert len(summary()["problems"]) == len(bad)
    assert attention("--fit", "pad", "--figures", "overlay", "thin.png") == 0


def test_for_a_panorama_beyond_memory_the_message_names_a_size_that_fits(here, capsys, monkeypatch):
    monkeypatch.setattr("dino_xcit.figures.framing.memory_there", lambda device: 2**20)
    assert attention("--image_size", 4000, "--figures", "overlay", "photos/wide.png") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4000 x 2500 pixels need about" in line
    fits = line.split("--image_size ")[1].split()[0]
    assert attention("--image_size", fits, "--figures", "overlay", "photos/wide.png") == 0
    assert (
        attention("--image_size", round(1.1 * int(fits)), "--figures", "overlay", "photos/wide.png")
        == 2
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--head", "4"], "--head is 4; xcit_pico2_p4 has the heads 0 to 3"),
        (["--layer", "2"], "--layer is 2; expected 0 to 1"),
        (["--xca_layer", "-3"], "--xca_layer is -3; expected 0 to 1"),
        (["--threshold", "1"], "--threshold is 1.0; expected a share between 0 and 1"),
        (["--width", "nips"], "--width is 'nips'; expected inches from 1 to 20, or one of neurips"),
        (["--figures", "similarity", "--point", "0.5"], "--point is (0.5,); expected two shares"),
        (
            ["--point", "0.5", "0.5"],
            "--point is (0.5, 0.5); expected none without --figures similarity",
        ),
        (["--fps", "3"], "--fps is 3.0; expected no rate without --frames"),
        (
            ["--names", "a", "--names", "a", "--weights", "colour.safetensors"],
            "expected different names",
        ),
        (
            ["--figures", "models"],
            "--figures is ('models',); expected no models with one --weights",
        ),
        (["--figures", "hedas"], "--figures"),
        (["--weights", "colour.safetensors", "--html"], "one with --html or --masks"),
        (["--names", "a", "--names", "b"], "expected a name for each of 1 --weights"),
        (["--precision", "half"], "--precision is 'half'"),
        (["--accelerator", "tpu"], "Lightning refuses --accelerator tpu"),
        (["--masks", "nowhere"], "--masks nowhere is not a folder"),
        (["--output_dir", "w.safetensors"], "--output_dir w.safetensors is a file"),
    ],
)
@pytest.mark.slow
def test_options_that_cannot_be_used_are_refused_in_one_line(here, capsys, arguments, expected):
    assert attention(*arguments, "photos/wide.png") == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert len(error.splitlines()) == 1


def test_a_network_without_class_attention_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr("dino_xcit.figures.model.load_backbone", lambda *_: torch.nn.Linear(1, 1))
    assert attention("photos/wide.png") == 2
    assert (
        "--weights w.safetensors: Linear has no class-attention layers" in capsys.readouterr().err
    )


def test_no_weights(capsys):
    assert main(["attention", "a.png"]) == 2
    assert "expected --weights" in capsys.readouterr().err


def save_video(path: str, frames: int = 6) -> list[np.ndarray]:
    pictures = [np.roll(smooth_picture(32, 48), 2 * i, axis=1) for i in range(frames)]
    write_video(Path(path), iter(pictures), Fraction(8))
    return pictures


@pytest.mark.parametrize("kind", ["mp4", "gif", "frames"])
@pytest.mark.slow
def test_videos_become_videos_on_one_scale(here, kind):
    save_video("clip.mp4")
    assert attention("--image_size", 48, "--video_format", kind, "clip.mp4") == 0
    numbers = np.load("figures/clip_attention.npz")
    assert numbers["attention"].shape == (6, 4, 8, 12)
    if kind == "frames":
        frames = [
            np.asarray(Image.open(path))
            for path in sorted(Path("figures/clip_attention").glob("*.png"))
        ]
    else:
        video = VideoFile(Path(f"figures/clip_attention.{kind}"))
        assert float(video.fps) == pytest.approx(8, rel=0.05)
        frames = list(video.frames(3))
    assert len(frames) == 6
    height, width = frames[0].shape[:2]
    assert width == pytest.approx(4.5 * height, abs=2)  # image, overlay, heads
    if (
        kind == "frames"
    ):  # lossless: the hottest patch of the video is the only one at the top of the colours
        mean = numbers["attention"].mean(1)
        ordered = np.sort(mean.ravel())
        beyond = int(0.01 * (len(ordered) - 1))
        low, high = ordered[beyond], ordered[-1 - beyond]
        colours = matplotlib.colormaps["inferno"](((mean - low) / (high - low)).clip(0, 1))[..., :3]
        cell = height // 8
        for frame, expected in zip(frames, colours, strict=True):
            grey = frame[:, : width // 3] @ [0.299, 0.587, 0.114]
            over = frame[:, width // 3 : 2 * (width // 3)]
            centre = over[cell // 2 :: cell, cell // 2 :: cell] / 255
            below = grey[cell // 2 :: cell, cell // 2 :: cell, None] / 255
            np.testing.assert_allclose(centre, 0.4 * below + 0.6 * expected, atol=0.01)


def test_with_frames_a_folder_of_images_is_a_video(here):
    Path("frames").mkdir()
    for i, frame in enumerate(save_video("clip.mp4")):
        Image.fromarray(frame).save(f"frames/{i:03}.png")
    assert attention("--frames", "--fps", "5", "--image_size", "0", "frames") == 0
    assert np.load("figures/frames_attention.npz")["fps"] == 5
    assert [one["frames"] for one in summary()["images"]] == [6]


def test_a_frame_of_another_size_ends_that_video_only(here, capsys):
    Path("frames").mkdir()
    for i, size in enumerate([(32, 48), (32, 48), (48, 32)]):
        Image.fromarray(smooth_picture(*size)).save(f"frames/{i}.png")
    assert attention("--frames", "frames", "photos/wide.png") == 2
    assert "frames: frame 2 is not as large as those before" in capsys.readouterr().err
    assert "overlay.png" in files_in_figures()


def test_the_page_holds_the_images_of_the_figures(here):
    assert attention("--html", "--figures", "overlay", "photos") == 0
    page = Path("figures/attention.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [one["name"] for one in data["exhibits"]] == ["square", "tall", "wide"]
    assert [one["grid"] for one in data["exhibits"]] == [[8, 8], [8, 5], [5, 8]]
    assert all("features" in one for one in data["exhibits"])
    assert "Class attention of w.safetensors" in page


def test_masks_of_shapes_are_scored_beside_both_baselines(here, capsys):
    assert attention("--masks", "shapes", "--num_images", 20) == 0
    content = json.loads(Path("figures/masks.json").read_text())
    assert content["images"] == 20
    assert set(content["baselines"]) == {"untrained", "centred blobs"}
    for row in (content["results"], *content["baselines"].values()):
        assert 0 < row["one_head"] <= row["best_head"] < 100
        assert row["best_head_ci95"][0] <= row["best_head"] <= row["best_head_ci95"][1]
        assert row["one_head"] == pytest.approx(max(row["heads"]), abs=1e-3)
    assert files_in_figures() == {"masks.json", "masks.png"}
    out = capsys.readouterr().out
    assert f"{content['results']['best_head']:.1f}" in out
    assert "centred blobs" in out


def test_masks_of_files_and_images_that_have_none(here, capsys):
    Path("masks").mkdir()
    for name, size in (("wide", (40, 64)), ("tall", (66, 42))):
        mask = np.zeros(size, np.uint8)
        mask[10:30, 10:30] = 1
        Image.fromarray(mask).save(f"masks/{name}.png")
    assert attention("--masks", "masks", "photos") == 2
    line = "1 of 3 images have no mask; the first: photos/square.png, expected a file named square"
    assert line in capsys.readouterr().err
    assert json.loads(Path("figures/masks.json").read_text())["images"] == 2


@pytest.mark.slow
def test_the_command_in_its_own_process(here, run_cli):
    done = run_cli(
        "attention",
        "--weights",
        here / "w.safetensors",
        "--output_dir",
        here / "f",
        here / "photos/wide.png",
    )
    assert done.returncode == 0, done.stderr
    assert (here / "f/heads_wide.png").stat().st_size > 10_000
    assert "Traceback" not in done.stderr


def test_the_function_behind_the_command_returns_the_problems(here):
    config = AttentionConfig(
        images=("gone.png", "photos/wide.png"),
        weights=("w.safetensors",),
        figures=("overlay",),
        dpi=40,
    )
    outcome = command.attention(config)
    assert outcome.problems == ["gone.png: does not exist"]
    assert outcome.exit_code == 2
