"""The data that the attention page embeds."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from page_helpers import HOSTILE, cosines, make_exhibit, write_exhibits
from PIL import Image

from dino_xcit.errors import UserError
from dino_xcit.figures.page import TEMPLATE, Exhibit, compress


def embedded(path):
    (block,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>',
        path.read_text(encoding="utf-8"),
    )
    return json.loads(block)


def numbers(text, kind, *shape):
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


def test_maps_are_embedded_to_within_half_a_step(tmp_path):
    shown = make_exhibit()
    (of_image,) = embedded(write_exhibits(tmp_path / "page.html", shown))["exhibits"]
    top = np.array(of_image["top"])
    assert top.tolist() == [head.max() for head in shown.attention]
    read = (
        numbers(of_image["attention"], "<u2", *shown.attention.shape) * top[:, None, None] / 65535
    )
    assert (np.abs(read - shown.attention) <= top[:, None, None] / 131070 * (1 + 1e-9)).all()
    assert (of_image["size"], of_image["grid"], of_image["patch"]) == ([45, 37], [5, 6], 8)


def test_a_head_without_attention_to_patches_is_embedded(tmp_path):
    shown = make_exhibit()
    shown.attention[1] = 0
    (of_image,) = embedded(write_exhibits(tmp_path / "page.html", shown))["exhibits"]
    assert not numbers(of_image["attention"], "<u2", *shown.attention.shape)[1].any()


def test_a_small_image_is_lossless_and_a_large_one_nearly(tmp_path):
    shades = np.linspace(0, 255, 264 * 264 * 3).reshape(264, 264, 3).astype(np.uint8)
    small, large = (
        Exhibit(
            name="",
            image=image,
            patch=8,
            attention=np.ones((1, *(s // 8 for s in image.shape[:2]))) / 2e3,
        )
        for image in (shades[:256, :256], shades)
    )
    for shown, kind in zip((small, large), ("png", "jpeg"), strict=True):
        url = embedded(write_exhibits(tmp_path / "page.html", shown))["exhibits"][0]["image"]
        start, data = url.split(",")
        assert start == f"data:image/{kind};base64"
        read = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert np.abs(read - shown.image).mean() <= (0 if kind == "png" else 1.5)


@pytest.mark.parametrize(("axes", "rank"), [(10, 10), (64, 64), (200, 30)])
def test_cosines_of_embedded_features_are_those_of_the_features(axes, rank):
    rng = np.random.default_rng(0)
    features = np.einsum(
        "cr,rhw->chw", rng.standard_normal((axes, rank)), rng.standard_normal((rank, 9, 7))
    )
    values, side, energy = compress(features)
    assert (values.dtype, values.shape, side) == (np.int8, (9, 7, min(axes, 64)), 1)
    assert energy == pytest.approx(1)
    error = np.abs(cosines(np.moveaxis(values, -1, 0)) - cosines(features))
    assert error.mean() < 0.005
    assert error.max() < 0.02


def test_of_many_axes_those_with_most_energy_are_kept():
    features = (
        np.random.default_rng(0).standard_normal((200, 20, 20))
        * np.geomspace(1, 0.02, 200)[:, None, None]
    )
    values, _, energy = compress(features)
    unit = features.reshape(200, -1) / np.linalg.norm(features.reshape(200, -1), axis=0)
    powers = np.linalg.svd(unit, compute_uv=False) ** 2
    assert energy == pytest.approx(powers[:64].sum() / powers.sum())
    assert 0.8 < energy < 0.99
    assert np.abs(cosines(np.moveaxis(values, -1, 0)) - cosines(features)).mean() < 0.02


def test_features_of_a_fine_grid_are_averaged_over_blocks():
    features = np.random.default_rng(0).standard_normal((8, 257, 5))
    values, side, _ = compress(features)
    assert (values.shape, side) == ((86, 2, 8), 3)
    means = [
        [features[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean((1, 2)) for j in range(2)]
        for i in range(86)
    ]
    assert (
        np.abs(
            cosines(np.moveaxis(values, -1, 0)) - cosines(np.moveaxis(np.array(means), -1, 0))
        ).mean()
        < 0.005
    )
    assert compress(features[:, :128])[1] == 1


def test_features_of_zero_are_embedded():
    values, _, energy = compress(np.zeros((70, 3, 3)))
    assert (values.any(), energy) == (False, 0)


def test_the_page_requests_nothing(tmp_path):
    page = write_exhibits(tmp_path / "page.html", make_exhibit(), subtitle="runs/demo").read_text()
    assert "://" not in page
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', TEMPLATE.read_text())) == {"data:,"}
    assert "{{" not in page.replace(
        embedded_text := re.search(r"<script type=.*?</script>", page)[0], ""
    )
    assert len(embedded_text) > len(page) / 20


def test_names_and_titles_are_text(tmp_path):
    shown = [
        make_exhibit(name=name)
        for name in (HOSTILE, "a\"b&c'd", "\udce9t\u00e9.png", "<!--<script>")
    ]
    path = write_exhibits(
        tmp_path / "page.html",
        *shown,
        title=f"{HOSTILE} {{{{data}}}}",
        subtitle="<b>\udce9 & co</b>",
    )
    assert [e["name"] for e in embedded(path)["exhibits"]] == [
        HOSTILE,
        "a\"b&c'd",
        "?t\u00e9.png",
        "<!--<script>",
    ]
    page = path.read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>?" not in page
    assert (
        "<title>&lt;/script&gt;&lt;img src=x onerror=window.hacked=1&gt;.png {{data}}</title>"
        in page
    )
    assert page.count("</script>") == TEMPLATE.read_text().count("</script>")


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_exhibits(tmp_path / "page.html", make_exhibit())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="viridian"):
        write_exhibits(path, make_exhibit(1), colormap="viridian")
    monkeypatch.delattr("os.replace")  # stopped before the last step
    with pytest.raises(AttributeError):
        write_exhibits(path, make_exhibit(1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_maps_that_do_not_fit_the_image_or_are_not_finite_are_refused():
    shown = make_exhibit()
    with pytest.raises(AssertionError, match="patches of 4"):
        Exhibit(name="", image=shown.image, patch=4, attention=shown.attention)
    shown.attention[0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"cat\.png"):
        Exhibit(name="cat.png", image=shown.image, patch=8, attention=shown.attention)
