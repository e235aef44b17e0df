"""Videos written and read back; what is not a video is refused in one line."""

import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from dino_xcit.errors import UserError
from dino_xcit.figures.video import VideoFile, is_video, write_video

RATES = [Fraction(25), Fraction(30000, 1001), Fraction(7)]


def make_frames(frames=5, height=24, width=40):
    """Each frame: its own brightness on the left, a corner of red at the top right."""
    made = []
    for number in range(frames):
        frame = np.full((height, width, 3), 40 + 15 * number, np.uint8)
        frame[: height // 2, width // 2 :] = (200, 20, 20)
        made.append(frame)
    return made


def written(path, frames, fps=Fraction(25)):
    write_video(path, iter(frames), fps)
    return path


def read(path, channels=3):
    return list(VideoFile(path).frames(channels))


def assert_same_frames(found, expected, tolerance):
    """Away from the edges of its areas, where colours share pixels."""
    assert len(found) == len(expected)
    height, width = expected[0].shape[:2]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.uint8
        for rows in (slice(2, height // 2 - 4), slice(height // 2 + 4, height - 2)):
            for columns in (slice(2, width // 2 - 4), slice(width // 2 + 4, width - 2)):
                of_area = np.abs(one[rows, columns].astype(int) - other[rows, columns])
                assert of_area.size
                assert of_area.max() <= tolerance


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", RATES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (31, 45), (24, 41), (33, 40)])
def test_mp4_comes_back_with_its_frames_its_rate_and_its_colours(height, width, fps, tmp_path):
    frames = make_frames(5, height, width)
    path = written(tmp_path / "video.mp4", frames, fps)
    video = VideoFile(path)
    assert (video.fps, video.num_frames) == (fps, 5)
    found = read(path)
    assert {one.shape for one in found} == {
        (height + height % 2, width + width % 2, 3)
    }  # sides are even
    assert_same_frames([one[:height, :width] for one in found], frames, tolerance=20)
    assert [one.name for one in tmp_path.iterdir()] == ["video.mp4"]


def test_odd_sides_of_an_mp4_repeat_the_last_pixels(tmp_path):
    found = read(written(tmp_path / "video.mp4", make_frames(1, 31, 45)))[0].astype(int)
    assert np.abs(found[31] - found[30]).max() < 12
    assert np.abs(found[:, 45] - found[:, 44]).max() < 12


def test_mp4_plays_everywhere(tmp_path):
    """H.264 with colours at half the resolution is what browsers and slides play."""
    with av.open(str(written(tmp_path / "video.mp4", make_frames()))) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize(
    ("fps", "milliseconds"), [(Fraction(25), 40), (Fraction(10), 100), (Fraction(1, 2), 2000)]
)
def test_gif_comes_back_with_its_frames_and_its_rate_and_repeats(fps, milliseconds, tmp_path):
    frames = make_frames(4, 31, 45)
    path = written(tmp_path / "video.gif", frames, fps)
    assert is_video(path)
    found = read(path)
    assert {one.shape for one in found} == {(31, 45, 3)}
    assert_same_frames(found, frames, tolerance=8)
    assert VideoFile(path).fps == fps
    with Image.open(path) as file:
        assert file.n_frames == 4
        assert file.info["loop"] == 0
        for number in range(4):
            file.seek(number)
            assert file.info["duration"] == milliseconds


@pytest.mark.parametrize(
    "fps", [Fraction(24), Fraction(30000, 1001), Fraction(60), Fraction(240)], ids=str
)
def test_a_gif_lasts_as_long_as_the_video_and_no_frame_too_short_for_browsers(fps, tmp_path):
    """Browsers play frames of less than 20 ms five times as long; GIF counts in 10 ms."""
    frames = [np.full((8, 8, 3), number, np.uint8) for number in range(120)]
    with Image.open(written(tmp_path / "video.gif", frames, fps)) as file:
        durations = []
        for number in range(file.n_frames):
            file.seek(number)
            durations.append(file.info["duration"])
    assert min(durations) >= 20
    assert sum(durations) == pytest.approx(120_000 / fps, abs=10)
    assert len(durations) == (120 if fps <= 50 else {60: 60, 240: 24}[int(fps)])


def test_a_path_without_an_ending_is_a_folder_of_lossless_frames(tmp_path):
    frames = make_frames(12, 31, 45)
    folder = written(tmp_path / "deep" / "video", frames)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{number:06}.png" for number in range(12)]
    for file, frame in zip(files, frames, strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), frame)


def test_frames_of_a_longer_video_do_not_stay_in_the_folder(tmp_path):
    folder = written(tmp_path / "video", make_frames(5))
    (folder / "notes.txt").touch()
    written(folder, make_frames(2))
    assert sorted(file.name for file in folder.iterdir()) == [
        "000000.png",
        "000001.png",
        "notes.txt",
    ]


@pytest.mark.parametrize("name", ["video.mp4", "video.gif", "video"])
def test_one_frame_and_one_pixel_are_a_video(name, tmp_path):
    path = written(tmp_path / name, [np.full((1, 1, 3), 128, np.uint8)])
    if name == "video.mp4":
        (frame,) = read(path)
        assert frame.shape == (2, 2, 3)
        assert np.abs(frame.astype(int) - 128).max() < 4
    else:
        file = path / "000000.png" if path.is_dir() else path
        with Image.open(file) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (128, 128, 128)


def test_grey_frames_by_the_number_of_channels(tmp_path):
    path = written(tmp_path / "video.mp4", make_frames())
    for grey, colour in zip(read(path, 1), read(path, 3), strict=True):
        assert grey.shape == (24, 40, 1)
        expected = colour.astype(float) @ [0.299, 0.587, 0.114]
        assert np.abs(grey[2:-2, 2:16, 0] - expected[2:-2, 2:16]).max() < 4


def test_frames_are_made_one_at_a_time(tmp_path):
    """A video need not fit into memory."""
    made: list[weakref.ref] = []
    most = [0]

    def frames():
        for number in range(30):
            frame = np.full((24, 40, 3), number, np.uint8)
            made.append(weakref.ref(frame))
            most[0] = max(most[0], sum(one() is not None for one in made))
            yield frame

    write_video(tmp_path / "video.mp4", frames(), Fraction(25))
    assert len(made) == 30
    assert most[0] < 5
    frames_read = VideoFile(tmp_path / "video.mp4").frames(3)
    assert next(frames_read).shape == (24, 40, 3)
    frames_read.close()


def test_a_clip_can_be_read_again(tmp_path):
    video = VideoFile(written(tmp_path / "video.mp4", make_frames()))
    first, second = list(video.frames(3)), list(video.frames(3))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_a_video_that_fails_leaves_what_was_there(name, tmp_path):
    path = written(tmp_path / name, make_frames(2))
    before = path.read_bytes()

    def frames():
        yield from make_frames(2)
        raise ValueError("frame 2 is not there")

    with pytest.raises(ValueError, match="frame 2 is not there"):
        write_video(path, frames(), Fraction(25))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- upright ---------------------------------------------------------------------------------------


def turn(path, matrix):
    """Write a display matrix into the track: right becomes (a, b), down becomes (c, d)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    (a, b), (c, d) = matrix
    data[start : start + 36] = np.array(
        [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4"
    ).tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        (((1, 0), (0, 1)), ("top", "left")),
        (
            ((0, 1), (-1, 0)),
            ("top", "right"),
        ),  # right becomes down: a quarter clockwise, as telephones write it
        (((-1, 0), (0, -1)), ("bottom", "right")),
        (((0, -1), (1, 0)), ("bottom", "left")),
    ],
)
def test_a_video_taken_sideways_is_seen_upright(matrix, corner, tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :16] = 255  # top left
    path = written(tmp_path / "video.mp4", [frame])
    turn(path, matrix)
    for channels in (1, 3):
        (seen,) = read(path, channels)
        assert seen.shape == ((32, 64, channels) if matrix[0][0] else (64, 32, channels))
        rows, columns = np.nonzero(seen[..., 0] > 128)
        assert corner == (
            "top" if rows.mean() < seen.shape[0] / 2 else "bottom",
            "left" if columns.mean() < seen.shape[1] / 2 else "right",
        )


# -- what is a video -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.MOV", "a.m4v", "a.avi", "a.mkv", "a.webm", "a.mpg", "a.mpeg"]
)
def test_videos_are_known_by_their_names(name, tmp_path):
    assert is_video(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.mp3", "a", "mp4", "a.mp4.txt", ".mp4"])
def test_other_names_are_not_videos(name, tmp_path):
    assert not is_video(tmp_path / name)


@pytest.mark.parametrize("ending", [".gif", ".GIF"])
def test_a_gif_is_a_video_if_it_moves(ending, tmp_path):
    still, moving = tmp_path / f"still{ending}", tmp_path / f"moving{ending}"
    images = [Image.fromarray(frame) for frame in make_frames(2)]
    images[0].save(still, format="GIF")
    images[0].save(moving, format="GIF", save_all=True, append_images=images[1:])
    assert not is_video(still)
    assert is_video(moving)
    for data in (b"", b"GIF89a", b"hello"):
        still.write_bytes(data)
        assert not is_video(still)
    assert not is_video(tmp_path / f"missing{ending}")


def one_line(path):
    with pytest.raises(UserError, match=r"^[^\n]*$") as refusal:
        read(path)
    return str(refusal.value)


@pytest.mark.parametrize("data", [b"", b"hello" * 200], ids=["empty", "text"])
def test_what_is_not_a_video_is_refused(data, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    assert "cannot be read as a video" in one_line(path)


def test_a_missing_video_is_refused(tmp_path):
    assert "No such file" in one_line(tmp_path / "video.mp4")


def test_sound_alone_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        silence.rate = 8000
        silence.planes[0].update(bytes(4096))
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert "holds no video" in one_line(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_video_cut_short_is_refused(share, tmp_path):
    """With its header in front the first frames can be read; the file is refused all the same."""
    path = tmp_path / "video.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(20):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "cannot be read as a video" in one_line(path)


def test_a_folder_of_frames_may_have_a_dot_in_its_name(tmp_path):
    write_video(
        tmp_path / "my.video_attention", iter([np.zeros((8, 8, 3), np.uint8)] * 2), Fraction(25)
    )
    assert len(list((tmp_path / "my.video_attention").iterdir())) == 2


def test_pils_limit_on_pixels_does_not_apply_to_gifs_and_is_restored(tmp_path, monkeypatch):
    frames = [Image.fromarray(np.full((10, 10), grey, np.uint8)) for grey in (0, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    for limit in (60, 20):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert is_video(tmp_path / "a.gif")
        assert limit == Image.MAX_IMAGE_PIXELS


def test_frames_that_the_encoder_refuses_are_a_users_error(tmp_path):
    wide = np.zeros((2, 40_000, 3), np.uint8)  # H.264 ends at 16384
    with pytest.raises(
        UserError, match=r"cannot be written as MP4, 40000 x 2 pixels.*--image_size"
    ):
        write_video(tmp_path / "video.mp4", iter([wide]), Fraction(25))
    assert list(tmp_path.iterdir()) == []
