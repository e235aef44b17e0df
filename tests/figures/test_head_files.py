"""One PNG file for each head, as official visualize_attention.py writes them."""

import matplotlib
import numpy as np
from PIL import Image
from sheet_helpers import as_uint8, ends_of, result, with_options

from dino_xcit.figures.head_files import head_files


def saved(folder, one, **options):
    head_files([one], with_options(**options)).write(folder)
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "files_cat").iterdir()}


def test_files_have_the_official_names_and_the_size_of_the_image(tmp_path):
    one = result(size=(37, 51), heads=2)
    files = saved(tmp_path, one)
    assert set(files) == {
        "img.png",
        *(f"attn-head{head}.png" for head in range(2)),
        *(f"mask_th0.6_head{head}.png" for head in range(2)),
    }
    assert {picture.shape for picture in files.values()} == {(37, 51, 3)}
    np.testing.assert_array_equal(files["img.png"], one.image)


def test_a_head_is_drawn_over_its_own_range(tmp_path):
    one = result()
    files = saved(tmp_path, one, colormap="viridis")
    for head, one_map in enumerate(one.attention):
        low, high = ends_of(one_map)
        values = (one_map.repeat(8, 0).repeat(8, 1) - low) / (high - low)
        expected = as_uint8(matplotlib.colormaps["viridis"](values)[..., :3])
        difference = expected.astype(int) - files[f"attn-head{head}.png"]
        assert np.abs(difference).max() <= 2


def test_the_heads_of_the_option_alone_are_written(tmp_path):
    assert {name for name in saved(tmp_path, result(heads=4), head=(2, 0)) if "attn" in name} == {
        "attn-head0.png",
        "attn-head2.png",
    }
