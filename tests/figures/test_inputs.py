"""Framing, finding and reading images; eyes against a pass by hand."""

import dataclasses
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.figures import inputs
from dino_xcit.figures.inputs import Framing, find, images_in, look_at, own_images
from dino_xcit.figures.maps import look
from dino_xcit.figures.model import AttentionModel, open_checkpoints, open_models
from dino_xcit.figures.video import write_video
from dino_xcit.model.xcit import XCiT
from dino_xcit.weights.load import save_backbone

CPU = torch.device("cpu")
RUN = PretrainConfig(arch="xcit_pico2_p4", global_crops_size=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return weights_of(tmp_path_factory.mktemp("weights") / "pico.safetensors")


def weights_of(path, seed=0, **options):
    torch.manual_seed(seed)
    config = dataclasses.replace(RUN, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(XCiT(config.arch, in_chans=config.in_chans, xca=config.xca), config, path)
    return str(path)


def eye_of(weights, **options):
    config = AttentionConfig(weights=(weights,), **options)
    return AttentionModel("pico", weights, config, CPU)


def framing(patch=4, long_side=32, fit="crop", *, per_pixel=100.0, there=2**40, on_cpu=2**40):
    """A frame without a backbone."""
    frame = Framing.__new__(Framing)
    frame.patch, frame.long_side, frame.fit = patch, long_side, fit
    frame.per_pixel, frame.there, frame.on_cpu = per_pixel, there, on_cpu
    return frame


def noise(height, width, channels=3, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    )


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, **options)
    return path


# -- framing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (97, 61), (7, 31), (64, 64)])
@pytest.mark.parametrize(("patch", "long_side"), [(4, 32), (8, 50), (4, 99), (16, 480)])
def test_the_long_side_is_as_asked_and_the_aspect_is_kept(height, width, patch, long_side):
    image = noise(height, width)
    ideal = height * long_side / max(height, width), width * long_side / max(height, width)
    for fit in ("crop", "pad"):
        pixels, (H, W) = framing(patch, long_side, fit).framed(image)
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1] % patch == pixels.shape[2] % patch == 0
        if fit == "pad":
            assert max(H, W) == long_side
            for side, wanted, padded in zip((H, W), ideal, pixels.shape[1:], strict=True):
                assert abs(side - wanted) <= 0.5
                assert 0 <= padded - side < patch
        else:
            assert pixels.shape[1:] == (H, W)
            for side, wanted in zip((H, W), ideal, strict=True):
                assert -patch < side - round(wanted) <= 0


def test_a_crop_is_the_centre_of_the_image():
    image = noise(39, 58)
    pixels, size = framing(8, 0).framed(image)
    assert size == (32, 56)
    assert torch.equal(pixels, image[:, 3:35, 1:57])
    pixels, size = framing(8, 0).framed(image[:, :, :57])
    assert torch.equal(pixels, image[:, 3:35, :56])


def test_padding_repeats_the_edge():
    image = noise(39, 58)
    pixels, size = framing(8, 0, "pad").framed(image)
    assert size == (39, 58)
    expected = np.pad(image.numpy(), ((0, 0), (0, 1), (0, 6)), mode="edge")
    assert np.array_equal(pixels.numpy(), expected)
    np.testing.assert_array_equal(inputs.shown(pixels, size), image.permute(1, 2, 0).numpy())


def test_size_0_keeps_the_size():
    image = noise(64, 400)
    assert torch.equal(framing(8, 0).framed(image)[0], image)
    assert inputs.scaled(123, 45, 0) == (123, 45)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = noise(24, 32)
    for fit in ("crop", "pad"):
        assert torch.equal(framing(8, 32, fit).framed(image)[0], image)


def test_resizing_is_pils_bicubic_but_for_rounding():
    image = noise(60, 90)
    pixels, _ = framing(4, 48).framed(image)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (48, 32), Image.Resampling.BICUBIC
    )
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_masks_are_resized_without_new_values():
    mask = torch.zeros(1, 20, 30, dtype=torch.uint8)
    mask[:, 5:12, 8:21] = 7
    pixels, _ = framing(4, 60).framed(mask, mode="nearest-exact")
    assert set(pixels.unique().tolist()) == {0, 7}
    assert torch.equal(pixels, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(
    ("height", "width", "long_side"), [(3, 3, 0), (2, 100, 0), (100, 2, 0), (500, 10, 40)]
)
def test_an_image_smaller_than_a_patch_is_refused_unless_it_is_padded(height, width, long_side):
    image = noise(height, width)
    with pytest.raises(
        ValueError,
        match=rf"^{width} x {height} pixels, .*smaller than a patch of 4 x 4; raise --image_size or",
    ):
        framing(4, long_side).framed(image)
    pixels, size = framing(4, long_side, "pad").framed(image)
    assert min(pixels.shape[1:]) == 4
    assert size == inputs.scaled(height, width, long_side)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(1, 1000, (1, 32)), (1000, 1, (32, 1)), (1, 1, (32, 32))]
)
def test_no_side_vanishes(height, width, expected):
    assert inputs.scaled(height, width, 32) == expected


def test_a_frame_serves_every_eye(tmp_path):
    models = [
        eye_of(
            weights_of(
                tmp_path / f"{patch}.safetensors",
                arch=f"xcit_pico2_p{patch}",
                global_crops_size=size,
            )
        )
        for patch, size in ((4, 48), (16, 32), (8, 40))
    ]
    frame = Framing(models, "pad")
    assert (frame.patch, frame.long_side, frame.fit) == (16, 48, "pad")
    assert frame.per_pixel == max(inputs.bytes_per_pixel(model.backbone) for model in models)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(3000, 4000), (4000, 3000), (1000, 1000), (500, 4000)]
)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.95])
def test_an_image_too_large_for_memory_is_refused_with_a_size_that_fits(height, width, share):
    needed = 5000.0 * height * width
    there = share * needed
    with pytest.raises(ValueError, match="--image_size") as refusal:
        framing(8, 0, per_pixel=5000.0, there=there).check(height, width)
    told = rf"{width} x {height} pixels need about {needed / 2**30:.1f} GiB, there are {there / 2**30:.1f} GiB; --image_size "
    assert str(refusal.value).startswith(told)
    size = int(re.search(r"--image_size (\d+) fits$", str(refusal.value))[1])
    assert 0 < size < max(height, width)
    assert size % 8 == 0
    framing(8, size, per_pixel=5000.0, there=there).check(height, width)
    with pytest.raises(ValueError, match="fits"):  # and not much larger ones
        framing(8, size + 16, per_pixel=5000.0, there=there).check(height, width)


def test_memory_is_asked_for_the_size_that_is_looked_at():
    """Not for the file's: a large photograph is made small first."""
    framing(4, 100, per_pixel=1, there=100 * 75).check(3000, 4000)
    with pytest.raises(ValueError, match="fits"):
        framing(4, 100, per_pixel=1, there=100 * 75 - 1).check(3000, 4000)


def test_a_file_too_large_to_decode_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", noise(50, 70))
    monkeypatch.setattr(inputs, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^70 x 50 pixels: decoding alone needs about 0.0 GiB"):
        framing(on_cpu=3 * 3 * 50 * 70 - 1).read(path, 1)
    with pytest.raises(ValueError, match="no size fits"):
        framing(there=10).read(path, 3)


def test_failing_for_memory_after_all_is_one_line(weights, monkeypatch):
    model = eye_of(weights)

    def fail(*_, **__):
        raise RuntimeError("out of\nmemory " + 500 * "x")

    monkeypatch.setattr(inputs, "look", fail)
    with pytest.raises(
        ValueError, match=r"^32 x 24 pixels: out of memory x+; lower --image_size$"
    ) as refusal:
        look_at("name", noise(24, 32), model, Framing([model], "crop"))
    assert len(str(refusal.value)) < 300


# -- reading -----------------------------------------------------------------------------------------------------------


def test_grey_rgba_palette_and_16_bit_files_become_the_channels_asked_for(tmp_path):
    colour = noise(6, 9)
    grey = noise(6, 9, 1)
    array = colour.permute(1, 2, 0).numpy()
    alpha = np.concatenate([array, np.full((6, 9, 1), 200, np.uint8)], axis=-1)
    Image.fromarray(alpha).save(tmp_path / "rgba.png")
    Image.fromarray(grey[0].numpy().astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey[0].numpy().astype(np.uint16) * 257).save(tmp_path / "sixteen.tif")
    Image.fromarray(array).convert("P", palette=Image.Palette.ADAPTIVE, colors=200).save(
        tmp_path / "palette.gif"
    )
    save(tmp_path / "grey.bmp", grey)
    save(tmp_path / "colour.tif", colour)
    frame = framing()
    read = {path.name: (frame.read(path, 1), frame.read(path, 3)) for path in tmp_path.iterdir()}
    assert all(one.shape == (1, 6, 9) and three.shape == (3, 6, 9) for one, three in read.values())
    assert all(one.dtype == three.dtype == torch.uint8 for one, three in read.values())
    for name in ("grey.bmp", "sixteen.png", "sixteen.tif"):
        assert (read[name][0].int() - grey).abs().max() <= 1, name
        assert torch.equal(read[name][1], read[name][0].expand(3, -1, -1)), name
    for name in ("colour.tif", "rgba.png"):
        assert torch.equal(read[name][1], colour), name
    expected = array.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(read["colour.tif"][0][0].numpy() - expected).max() <= 1


def test_turned_photographs_are_read_upright(tmp_path):
    image = noise(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    path = save(tmp_path / "turned.png", image, exif=exif)
    assert torch.equal(framing().read(path, 3), image.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "does not exist"),
        (b"", "an empty file"),
        (b"hello", "not an image"),
        (b"\x89PNG\r\n", "not an image"),
    ],
)
def test_what_is_no_image_is_told_in_a_word(data, told, tmp_path):
    path = tmp_path / "image.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{told}[^\n]*$"):
        framing().read(path, 3)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".webp"])
def test_an_image_cut_short_is_refused_in_one_line(ending, tmp_path):
    path = save(tmp_path / f"image{ending}", noise(64, 64))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises((ValueError, OSError), match=r"^[^\n]+$"):
        framing().read(path, 3)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize(
    "limit", [20, 60]
)  # PIL warns beyond its limit and refuses beyond twice as many pixels
def test_how_large_an_image_may_be_is_not_for_pil_to_say(ending, limit, tmp_path, monkeypatch):
    image = noise(8, 10)
    path = save(tmp_path / f"image{ending}", image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert torch.equal(framing().read(path, 3), image)
    assert limit == Image.MAX_IMAGE_PIXELS  # for others it stands
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not an image"):
        framing().read(path, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


# -- finding -----------------------------------------------------------------------------------------------------------


def found(*images, **options):
    return find(AttentionConfig(images=tuple(map(str, images)), **options), framing())


def test_images_of_a_folder_are_those_at_any_depth_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/c/d.tif", "c.webp", "notes.txt", "film.mp4", "a.b/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    names = [path.relative_to(tmp_path).as_posix() for path in images_in(tmp_path)]
    assert names == ["a/c/d.tif", "a/z.JPG", "a.b/x.png", "b.png", "c.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"a folder without images; expected files ending in .png .jpg"
    ):
        images_in(tmp_path / "empty")


def test_images_folders_and_videos_are_found_in_the_order_given(tmp_path):
    image = noise(8, 12)
    save(tmp_path / "folder" / "two.png", image)
    save(tmp_path / "folder" / "one.png", image)
    save(tmp_path / "still.gif", image)
    frames = [image.permute(1, 2, 0).numpy(), 255 - image.permute(1, 2, 0).numpy()]
    for name in ("film.mp4", "moving.gif"):
        write_video(tmp_path / name, iter(frames), Fraction(5))
    given = [tmp_path / name for name in ("film.mp4", "still.gif", "folder", "moving.gif")]
    sources, films, problems = found(*given)
    assert problems == []
    assert [source.name for source in sources] == ["still", "one", "two"]
    assert [source.where for source in sources] == [
        str(given[1]),
        str(tmp_path / "folder" / "one.png"),
        str(tmp_path / "folder" / "two.png"),
    ]
    assert torch.equal(sources[1].read(3), image)
    assert sources[1].read(1).shape == (1, 8, 12)
    assert [(film.name, film.where, film.fps, film.expected) for film in films] == [
        ("film", str(given[0]), 5, 2),
        ("moving", str(given[3]), 5, films[1].expected),
    ]
    for film in films:
        for channels in (1, 3):
            assert [frame.shape for frame in film.frames(channels)] == 2 * [(channels, 8, 12)]
            assert all(frame.dtype == torch.uint8 for frame in film.frames(channels))
    first, second = films[1].frames(3)
    assert (first.float() - image).abs().mean() < 40  # 256 colours
    assert (second.float() - 255 + image).abs().mean() < 40


def test_with_frames_a_folder_is_a_film(tmp_path):
    pictures = [noise(8, 12, seed=seed) for seed in range(3)]
    for number, picture in enumerate(pictures):
        save(tmp_path / "shots" / f"{number}.png", picture)
    save(tmp_path / "alone.png", pictures[0])
    sources, films, problems = found(
        tmp_path / "shots", tmp_path / "alone.png", frames=True, fps=29.97
    )
    assert problems == []
    assert [source.name for source in sources] == ["alone"]
    (film,) = films
    assert (film.name, film.expected) == ("shots", 3)
    assert float(film.fps) == pytest.approx(29.97)
    assert film.fps.denominator <= 1000
    for seen, picture in zip(film.frames(3), pictures, strict=True):
        assert torch.equal(seen, picture)
    (tmp_path / "shots" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"^1\.png: not an image$"):
        list(film.frames(3))


def test_files_of_one_name_get_names_of_their_own(tmp_path):
    for name in ("a/cat.png", "b/cat.png", "cat.jpg", "dog.png", "c/cat.tif"):
        save(tmp_path / name, noise(8, 8))
    sources, _, _ = found(*(tmp_path / name for name in ("a", "b", "cat.jpg", "dog.png", "c")))
    assert [source.name for source in sources] == ["cat", "cat_2", "cat_3", "dog", "cat_4"]
    write_video(tmp_path / "cat.mp4", iter([np.zeros((8, 8, 3), np.uint8)]), Fraction(5))
    sources, films, _ = found(
        tmp_path / "dog.png", tmp_path / "dog.png", tmp_path / "cat.mp4", tmp_path / "cat.jpg"
    )
    assert [one.name for one in (*sources, *films)] == ["dog", "dog_2", "cat_2", "cat"]


def test_names_differ_by_more_than_their_case_and_are_not_made_twice(tmp_path):
    for name in ("a/cat.png", "b/Cat.png", "c/cat_2.png"):
        save(tmp_path / name, noise(8, 8))
    sources, _, _ = found(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert len({source.name.casefold() for source in sources}) == 3
    assert [source.name for source in sources] == ["cat", "Cat_2", "cat_2_2"]


def test_long_names_leave_room_for_what_is_put_before_and_behind(tmp_path):
    for ending in ("png", "tif"):
        save(tmp_path / f"{'ä' * 125}.{ending}", noise(8, 8))
    sources, _, _ = found(tmp_path)
    assert [len(source.name.encode()) for source in sources] == [200, 202]
    assert sources[1].name == f"{'ä' * 100}_2"


def test_figures_among_the_images_are_not_looked_at_again(tmp_path):
    for name in ("cat.png", "figures/heads_cat.png", "figures2/dog.png"):
        save(tmp_path / name, noise(8, 8))
    sources, _, _ = found(tmp_path, output_dir=str(tmp_path / "figures"))
    assert [source.name for source in sources] == ["cat", "dog"]
    sources, _, _ = found(tmp_path, output_dir=str(tmp_path))
    assert [source.name for source in sources] == ["cat", "heads_cat", "dog"]


def test_a_run_folder_among_the_images_is_told(tmp_path):
    sources, _, problems = found(run_folder(tmp_path / "run"))
    assert sources == []
    assert problems[0].endswith(
        "a run folder, not images; several weights have a flag each: --weights A --weights B"
    )


def test_what_cannot_be_found_is_told_and_the_rest_goes_on(tmp_path):
    save(tmp_path / "good.png", noise(8, 8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"hello")
    (tmp_path / "text.txt").write_text("hello")
    given = [
        tmp_path / name
        for name in ("empty", "broken.mp4", "good.png", "missing.png", "text.txt", "missing.mp4")
    ]
    sources, films, problems = found(*given)
    assert films == []
    assert [problem.split(": ")[0] for problem in problems] == [
        str(given[0]),
        str(given[1]),
        str(given[5]),
    ]
    assert all("\n" not in problem for problem in problems)
    assert "a folder without images" in problems[0]
    assert [source.name for source in sources] == [
        "good",
        "missing",
        "text",
    ]  # these are told when they are read
    assert sources[0].read(3).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="does not exist"):
        sources[1].read(3)
    with pytest.raises(ValueError, match="not an image"):
        sources[2].read(3)


def test_nothing_given_finds_nothing():
    assert find(AttentionConfig(), framing()) == ([], [], [])


# -- the run's own images ----------------------------------------------------------------------------------------------


def run_folder(folder, **options):
    from dino_xcit.run_folder import write_config

    config = dataclasses.replace(RUN, dataset="shapes", output_dir=str(folder), **options)
    weights_of(
        folder / "teacher.safetensors",
        **{key: options[key] for key in options if key in ("in_chans", "mean", "std")},
    )
    write_config(config, folder)
    return str(folder)


def test_own_images_are_the_first_validation_images_of_the_run(tmp_path):
    from dino_xcit.data.shapes import draw_shape

    weights = run_folder(tmp_path / "run", seed=3)
    sources = own_images(AttentionConfig(weights=(weights,)), 3)
    assert [source.name for source in sources] == ["image0", "image1", "image2", "image3"]
    assert "shape 2" in sources[2].where
    expected = draw_shape(3, "validation", 2).image
    np.testing.assert_array_equal(sources[2].read(3).permute(1, 2, 0).numpy(), expected)
    assert len(own_images(AttentionConfig(weights=(weights,), num_images=7), 3)) == 7
    grey = sources[2].read(1)
    assert grey.shape == (1, 32, 32)


def test_weights_without_a_run_have_no_images_of_their_own(weights):
    with pytest.raises(ValueError, match=r"expected images: the weights are not in a run folder"):
        own_images(AttentionConfig(weights=(weights,)), 3)


# -- eyes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "size"), [("crop", (24, 28)), ("pad", (24, 30))])
def test_a_view_is_what_the_backbone_sees_of_the_normalised_image(fit, size, tmp_path):
    path = weights_of(tmp_path / "w.safetensors", mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    model = eye_of(path, image_size=30, layer=0, xca_layer=0)
    view = look_at("cat", noise(72, 90), model, Framing([model], fit), features=True, xca=True)
    assert view.name == "cat"
    assert view.patch == 4
    assert view.image.shape == (*size, 3)
    pixels, _ = framing(4, 30, fit).framed(noise(72, 90))
    np.testing.assert_array_equal(
        view.image, pixels[:, : size[0], : size[1]].permute(1, 2, 0).numpy()
    )
    x = (pixels.double() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.4, 0.3]
    )[:, None, None]
    expected = look(model.backbone, x[None].float(), layer=0, xca_layer=0, features=True)
    for name, maps in expected._asdict().items():
        np.testing.assert_allclose(getattr(view, name), maps[0].numpy(), rtol=1e-3, atol=1e-5)
    assert view.attention.shape == (4, 6, -(-size[1] // 4))
    plain = look_at("cat", noise(72, 90), model, Framing([model], fit))
    assert plain.queries is plain.keys is plain.covariance is plain.features is None


def test_backbones_of_one_frame_keep_their_own_patches(tmp_path):
    models = [
        eye_of(weights_of(tmp_path / f"{patch}.safetensors", arch=f"xcit_pico2_p{patch}"))
        for patch in (4, 8)
    ]
    frame = Framing(models, "crop")
    seen = [look_at("cat", noise(32, 44), model, frame) for model in models]
    assert [view.patch for view in seen] == [4, 8]
    assert [view.attention.shape for view in seen] == [
        (4, 4, 8),
        (4, 2, 4),
    ]  # 32 x 23 is cropped to 32 x 16 for both
    np.testing.assert_array_equal(seen[0].image, seen[1].image)


def test_too_large_an_image_is_not_looked_at(weights, monkeypatch):
    model = eye_of(weights)
    frame = Framing([model], "crop")
    frame.there = 10
    monkeypatch.setattr(inputs, "look", lambda *_, **__: pytest.fail("looked"))
    with pytest.raises(ValueError, match="32 x 32 pixels need about"):
        look_at("cat", noise(32, 32), model, frame)


def test_one_channel_weights_see_grey_images(tmp_path):
    path = weights_of(tmp_path / "w.safetensors", in_chans=1, mean=(0.5,), std=(0.2,))
    model = eye_of(path)
    view = look_at("cat", noise(32, 32, 1), model, Framing([model], "crop"))
    assert view.image.shape == (32, 32, 1)
    assert view.attention.shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("crop", "asked", "expected"),
    [(32, None, 32), (95, None, 95), (96, None, 480), (224, None, 480), (32, 100, 100), (32, 0, 0)],
)
def test_images_are_looked_at_in_the_size_asked_for_or_that_suits_the_weights(
    crop, asked, expected, tmp_path
):
    model = eye_of(weights_of(tmp_path / "w.safetensors", global_crops_size=crop), image_size=asked)
    assert model.long_side == expected


def test_half_precision_is_near(weights):
    views_of = []
    for precision in ("32-true", "bf16-mixed"):
        model = eye_of(weights, precision=precision)
        views_of.append(
            look_at("cat", noise(32, 32), model, Framing([model], "crop"), features=True)
        )
    assert views_of[1].attention.dtype == np.float32
    np.testing.assert_allclose(views_of[0].attention, views_of[1].attention, rtol=0.2, atol=1e-3)
    assert not np.array_equal(views_of[0].attention, views_of[1].attention)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head": 4}, r"--head is 4; xcit_pico2_p4 has the heads 0 to 3"),
        ({"layer": 2}, r"--layer is 2; expected 0 to 1"),
        ({"xca_layer": 99}, r"--xca_layer is 99; expected 0 to \d"),
    ],
)
def test_heads_and_layers_that_are_not_there_are_refused(options, told, weights):
    with pytest.raises(ValueError, match=told):
        eye_of(weights, **options)
    eye_of(weights, head=3, layer=1, xca_layer=0)


def test_weights_of_another_network_are_refused(monkeypatch):
    monkeypatch.setattr(inputs, "load_backbone", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"^--weights timm:vit: Linear has no class-attention layers"
    ):
        eye_of("timm:vit")


def test_an_eye_with_other_weights_keeps_its_options_and_leaves_the_first_as_it_is(
    tmp_path, weights
):
    model = eye_of(weights, image_size=24, layer=0)
    other = XCiT("xcit_pico2_p8")
    other.metadata = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "global_crops_size": 64}
    before = model(noise(16, 16)[None]).attention
    changed = model.with_backbone(other, "other")
    assert (changed.title, changed.backbone, changed.config, changed.long_side) == (
        "other",
        other,
        model.config,
        24,
    )
    assert changed.offset.flatten().tolist() == [0, 0, 0]
    assert not changed.backbone.training
    assert model.title == "pico"
    assert torch.equal(model(noise(16, 16)[None]).attention, before)


def titles(*weights, names=()):
    return [
        model.title for model in open_models(AttentionConfig(weights=weights, names=names), CPU)
    ]


def test_backbones_are_titled_by_their_names_folders_or_files(tmp_path):
    a, b = (
        weights_of(tmp_path / "a" / "one.safetensors"),
        weights_of(tmp_path / "b" / "two.safetensors"),
    )
    same = weights_of(tmp_path / "b" / "one.safetensors")
    run = run_folder(tmp_path / "run")
    assert titles(a, b) == ["one.safetensors", "two.safetensors"]
    assert titles(run, f"{run}/teacher.safetensors", names=("x", "y")) == ["x", "y"]
    assert titles(run, a) == ["run", "one.safetensors"]
    assert titles(a, same) == [a, same]  # file names alone would not tell them apart
    assert len(set(titles(a, a))) == 2


# -- checkpoints over training -----------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run folder whose checkpoints are weights files; their number is their seed."""
    run = tmp_path / "run"
    run_folder(run)
    (run / "checkpoints").mkdir()
    load = inputs.load_backbone

    def load_any(path, *rest):
        if str(path).endswith(".ckpt"):
            path = weights_of(
                tmp_path / "loaded.safetensors", seed=int(re.findall(r"\d+", str(path))[-1])
            )
        return load(path, *rest)

    monkeypatch.setattr(inputs, "load_backbone", load_any)
    return run


def test_checkpoints_come_in_the_order_of_their_epochs_and_the_teacher_last(kept):
    for epoch in (20, 5, 0):
        (kept / "checkpoints" / f"epoch{epoch:04}.ckpt").touch()
    weights_of(kept / "teacher.safetensors", seed=99)
    models = open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    assert [model.title for model in models] == ["epoch 0", "epoch 5", "epoch 20", "last"]
    for model, seed in zip(models, (0, 5, 20, 99), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(model.backbone.cls_token, XCiT("xcit_pico2_p4").cls_token)


def test_the_teacher_is_left_out_where_the_last_checkpoint_holds_it(kept):
    for epoch in (5, 20):
        (kept / "checkpoints" / f"epoch{epoch:04}.ckpt").touch()
    weights_of(kept / "teacher.safetensors", seed=20)
    assert [
        model.title for model in open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    ] == ["epoch 5", "epoch 20"]


def test_without_a_last_one_the_checkpoints_alone_are_shown(kept):
    (kept / "teacher.safetensors").unlink()
    (kept / "metrics.csv").touch()
    for name in ("epoch0005.ckpt", "epoch0020.ckpt", "epoch_best.ckpt"):
        (kept / "checkpoints" / name).touch()
    assert [
        model.title for model in open_checkpoints(AttentionConfig(weights=(str(kept),)), CPU)
    ] == ["epoch 5", "epoch 20"]


def test_a_run_without_checkpoints_is_told_how_to_keep_them(kept, weights):
    for given in (str(kept), weights):
        with pytest.raises(
            ValueError,
            match=rf"{re.escape(given)} is not a run folder that kept .* --saveckp_freq N keeps",
        ):
            open_checkpoints(AttentionConfig(weights=(given,)), CPU)


def test_other_failures_are_not_taken_for_want_of_memory(weights, monkeypatch):
    model = eye_of(weights)

    def fail(*_, **__):
        raise RuntimeError("a kernel is not there")

    monkeypatch.setattr(inputs, "look", fail)
    with pytest.raises(RuntimeError, match="a kernel is not there"):
        look_at("name", noise(24, 32), model, Framing([model], "crop"))


def test_memory_of_the_device_and_of_the_machine_are_asked_apart(weights, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs, "memory_there", lambda device: asked.append(device.type) or 1000)
    model = eye_of(weights)
    Framing(
        [SimpleNamespace(device=torch.device("meta"), backbone=model.backbone, long_side=32)],
        "crop",
    )
    assert asked == ["meta", "cpu"]


def test_covariance_in_half_precision_is_float32(weights):
    seen = {}
    for precision in ("bf16-mixed", "32-true"):
        model = eye_of(weights, precision=precision)
        seen[precision] = look_at(
            "cat", noise(32, 32), model, Framing([model], "crop"), xca=True
        ).covariance
    assert seen["bf16-mixed"].dtype == np.float32
    np.testing.assert_allclose(seen["bf16-mixed"], seen["32-true"], atol=0.05)


@pytest.mark.parametrize("size", [(20, 20), (1, 4000), (4, 4000), (30, 4000)])
@pytest.mark.parametrize("there", [10, 300, 5000])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_size_that_is_told_to_fit_fits(size, there, fit):
    with pytest.raises(ValueError, match=r"--image_size|no size fits") as refusal:
        framing(8, 8000, fit, per_pixel=1.0, there=there).check(*size)
    if "no size fits" in str(refusal.value):
        assert there < 64  # one patch
        return
    told = int(str(refusal.value).split("--image_size ")[1].split(" ")[0])
    assert told > 0  # 0 would keep the size
    smaller = framing(8, told, fit, per_pixel=1.0, there=there)
    smaller.check(*size)
    if fit == "pad":
        assert np.prod(smaller.framed(torch.zeros(1, *size, dtype=torch.uint8))[0].shape) <= there
