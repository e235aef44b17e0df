"""Finding images, folders and videos; the run's own images."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from figure_helpers import noise, save_image, save_run_folder, save_weights

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.errors import UserError
from dino_xcit.figures.framing import Framing
from dino_xcit.figures.inputs import find, images_in, own_images
from dino_xcit.figures.video import write_video

FRAMING = Framing(
    patch=4, long_side=32, fit="crop", bytes_per_pixel=100.0, memory=2**40, cpu_memory=2**40
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "pico.safetensors")


# -- finding ---------------------------------------------------------------------------------------


def found(*images, **options):
    return find(AttentionConfig(weights=("w",), images=tuple(map(str, images)), **options), FRAMING)


def test_images_of_a_folder_are_those_at_any_depth_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/c/d.tif", "c.webp", "notes.txt", "video.mp4", "a.b/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    names = [path.relative_to(tmp_path).as_posix() for path in images_in(tmp_path)]
    assert names == ["a/c/d.tif", "a/z.JPG", "a.b/x.png", "b.png", "c.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"a folder without images; expected files ending in .png .jpg"
    ):
        images_in(tmp_path / "empty")


def test_images_folders_and_videos_are_found_in_the_order_given(tmp_path):
    image = noise(8, 12)
    save_image(tmp_path / "folder" / "two.png", image)
    save_image(tmp_path / "folder" / "one.png", image)
    save_image(tmp_path / "still.gif", image)
    frames = [image.permute(1, 2, 0).numpy(), 255 - image.permute(1, 2, 0).numpy()]
    for name in ("video.mp4", "moving.gif"):
        write_video(tmp_path / name, iter(frames), Fraction(5))
    given = [tmp_path / name for name in ("video.mp4", "still.gif", "folder", "moving.gif")]
    images, videos, problems = found(*given)
    assert problems == []
    assert [image.name for image in images] == ["still", "one", "two"]
    assert [image.where for image in images] == [
        str(given[1]),
        str(tmp_path / "folder" / "one.png"),
        str(tmp_path / "folder" / "two.png"),
    ]
    assert torch.equal(images[1].read(3), image)
    assert images[1].read(1).shape == (1, 8, 12)
    assert [(video.name, video.where, video.fps, video.num_frames) for video in videos] == [
        ("video", str(given[0]), 5, 2),
        ("moving", str(given[3]), 5, videos[1].num_frames),
    ]
    for video in videos:
        for channels in (1, 3):
            assert [frame.shape for frame in video.frames(channels)] == 2 * [(channels, 8, 12)]
            assert all(frame.dtype == torch.uint8 for frame in video.frames(channels))
    first, second = videos[1].frames(3)
    assert (first.float() - image).abs().mean() < 40  # 256 colours
    assert (second.float() - 255 + image).abs().mean() < 40


def test_with_frames_a_folder_is_a_video(tmp_path):
    pictures = [noise(8, 12, seed=seed) for seed in range(3)]
    for number, picture in enumerate(pictures):
        save_image(tmp_path / "shots" / f"{number}.png", picture)
    save_image(tmp_path / "alone.png", pictures[0])
    images, videos, problems = found(
        tmp_path / "shots", tmp_path / "alone.png", frames=True, fps=29.97
    )
    assert problems == []
    assert [image.name for image in images] == ["alone"]
    (video,) = videos
    assert (video.name, video.num_frames) == ("shots", 3)
    assert float(video.fps) == pytest.approx(29.97)
    assert video.fps.denominator <= 1000
    for seen, picture in zip(video.frames(3), pictures, strict=True):
        assert torch.equal(seen, picture)
    (tmp_path / "shots" / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^1\.png: not an image$"):
        list(video.frames(3))


def test_files_of_one_name_get_names_of_their_own(tmp_path):
    for name in ("a/cat.png", "b/cat.png", "cat.jpg", "dog.png", "c/cat.tif"):
        save_image(tmp_path / name, noise(8, 8))
    images, _, _ = found(*(tmp_path / name for name in ("a", "b", "cat.jpg", "dog.png", "c")))
    assert [image.name for image in images] == ["cat", "cat_2", "cat_3", "dog", "cat_4"]
    write_video(tmp_path / "cat.mp4", iter([np.zeros((8, 8, 3), np.uint8)]), Fraction(5))
    images, videos, _ = found(
        tmp_path / "dog.png", tmp_path / "dog.png", tmp_path / "cat.mp4", tmp_path / "cat.jpg"
    )
    assert [one.name for one in (*images, *videos)] == ["dog", "dog_2", "cat_2", "cat"]


def test_names_differ_by_more_than_their_case_and_are_not_made_twice(tmp_path):
    for name in ("a/cat.png", "b/Cat.png", "c/cat_2.png"):
        save_image(tmp_path / name, noise(8, 8))
    images, _, _ = found(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert len({image.name.casefold() for image in images}) == 3
    assert [image.name for image in images] == ["cat", "Cat_2", "cat_2_2"]


def test_long_names_are_cut_so_that_names_of_figures_fit(tmp_path):
    for ending in ("png", "tif"):
        save_image(tmp_path / f"{'ä' * 125}.{ending}", noise(8, 8))
    images, _, _ = found(tmp_path)
    assert [len(image.name.encode()) for image in images] == [200, 202]
    assert images[1].name == f"{'ä' * 100}_2"


def test_figures_among_the_images_are_left_out(tmp_path):
    for name in ("cat.png", "figures/heads_cat.png", "figures2/dog.png"):
        save_image(tmp_path / name, noise(8, 8))
    images, _, _ = found(tmp_path, output_dir=str(tmp_path / "figures"))
    assert [image.name for image in images] == ["cat", "dog"]
    images, _, _ = found(tmp_path, output_dir=str(tmp_path))
    assert [image.name for image in images] == ["cat", "heads_cat", "dog"]


def test_a_run_folder_among_the_images_is_refused(tmp_path):
    images, _, problems = found(save_run_folder(tmp_path / "run"))
    assert images == []
    assert problems[0].endswith(
        "a run folder, not images; several weights have a flag each: --weights A --weights B"
    )


def test_what_cannot_be_opened_is_a_problem_and_the_rest_is_found(tmp_path):
    save_image(tmp_path / "good.png", noise(8, 8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"hello")
    (tmp_path / "text.txt").write_text("hello")
    given = [
        tmp_path / name
        for name in ("empty", "broken.mp4", "good.png", "missing.png", "text.txt", "missing.mp4")
    ]
    images, videos, problems = found(*given)
    assert videos == []
    assert [problem.split(": ")[0] for problem in problems] == [
        str(given[0]),
        str(given[1]),
        str(given[5]),
    ]
    assert all("\n" not in problem for problem in problems)
    assert "a folder without images" in problems[0]
    assert [image.name for image in images] == [
        "good",
        "missing",
        "text",
    ]  # reading these gives their problems
    assert images[0].read(3).shape == (3, 8, 8)
    with pytest.raises(UserError, match="does not exist"):
        images[1].read(3)
    with pytest.raises(UserError, match="not an image"):
        images[2].read(3)


def test_nothing_given_finds_nothing():
    assert find(AttentionConfig(weights=("w",)), FRAMING) == ([], [], [])


# -- the run's own images --------------------------------------------------------------------------


def test_own_images_are_the_first_validation_images_of_the_run(tmp_path):
    from dino_xcit.data.shapes import draw_shape

    weights = save_run_folder(tmp_path / "run", seed=3)
    images = own_images(AttentionConfig(weights=(weights,)), 3)
    assert [image.name for image in images] == ["image0", "image1", "image2", "image3"]
    assert "shape 2" in images[2].where
    expected = draw_shape(3, "validation", 2).image
    np.testing.assert_array_equal(images[2].read(3).permute(1, 2, 0).numpy(), expected)
    assert len(own_images(AttentionConfig(weights=(weights,), num_images=7), 3)) == 7
    grey = images[2].read(1)
    assert grey.shape == (1, 32, 32)


def test_weights_without_a_run_have_no_images_of_their_own(weights):
    with pytest.raises(UserError, match=r"expected images: the weights are not in a run folder"):
        own_images(AttentionConfig(weights=(weights,)), 3)
