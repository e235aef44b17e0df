"""How many images of a run could not be read, and what is said of images that are all alike."""

from __future__ import annotations

import torch
from helpers import TINY

from dino_xcit.data.images import open_images
from dino_xcit.data.loader import BadImage, Batch
from dino_xcit.train.bad_images import BadImageLog
from dino_xcit.train.collapse import all_alike


def test_an_image_counts_once_however_many_were_tried_in_its_place(tmp_path, capsys):
    bad = [BadImage(f"{i}.png", "not an image") for i in range(116)]
    views = {"global_crops": torch.zeros(112, 1)}
    BadImageLog(tmp_path).add(Batch(views=views, bad_images=bad, replaced=56))
    assert "56 of the first 112 images could not be read (50.0%)" in capsys.readouterr().err


def test_images_are_alike_only_if_all_are():
    def images(*levels: int) -> list[torch.Tensor]:
        return [torch.full((3, 20, 20), level, dtype=torch.uint8) for level in levels]

    class Listed(list):
        read = list.__getitem__

    assert all_alike(Listed(images(*[7] * 9)))
    assert not all_alike(Listed(images(*[7] * 8, 90)))
    assert not all_alike(open_images(TINY, "train"))
