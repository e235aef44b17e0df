"""Images per second on one core, from JPEG to views: our loader, official DINO's and lightly's.

    python eval/speed/loader.py --official_dino CLONE [--images FOLDER --output FILE]

Each image gives 2 x 224 + 8 x 96 pixels with the published augmentation. Ours is measured twice:
the work of the loader's processes (read the file, decode, crop, resize), and that together with
the photometric augmentation of the batch, which runs on the GPU where there is one. Official
DINO and lightly do all of it in the loader. Without `--images` the photographs of scikit-image
are used, resized to 500 x 375 pixels and saved as JPEG of quality 90. Contenders take turns,
round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import circumstances
from PIL import Image

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.crops import GLOBAL_CROPS
from dino_xcit.data.decode import decode
from dino_xcit.data.images import open_images
from dino_xcit.data.loader import CropDataset
from dino_xcit.data.photometric import photometric
from dino_xcit.model.architectures import BRANCHES, resolve_architecture

SIZE, QUALITY = (500, 375), 90
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
BATCH = 64
Contender = Callable[[int], object]


def write_photographs(folder: Path) -> None:
    from skimage import data  # type: ignore[import-not-found]  # pip install scikit-image

    for name in PHOTOGRAPHS:
        image = (
            Image.fromarray(getattr(data, name)())
            .convert("RGB")
            .resize(SIZE, Image.Resampling.BICUBIC)
        )
        (folder / "train" / "photographs").mkdir(parents=True, exist_ok=True)
        image.save(folder / "train" / "photographs" / f"{name}.jpg", quality=QUALITY)


def ours(folder: Path) -> dict[str, Contender]:
    """Return functions that load a given number of images."""
    config = RunConfig(data_path=str(folder))
    images = open_images(config, "train")
    architecture = resolve_architecture(config.arch)[1]
    path_shape = (architecture.depth, BRANCHES)
    assert images is not None
    dataset, files = CropDataset(images, config, path_shape), sorted(folder.rglob("*.jpg"))
    contents = [path.read_bytes() for path in files]

    def only_decode(count: int) -> object:
        return [decode(contents[i % len(contents)], 3) for i in range(count)]

    def loader(count: int) -> object:
        return dataset.batch([(i, i % len(images)) for i in range(count)])

    def end_to_end(count: int) -> object:
        views = dataset.batch([(i, i % len(images)) for i in range(count)]).views
        return [
            photometric(
                views[f"{group}_crops"].flatten(0, 1),
                views[f"{group}_params"].flatten(0, 1),
                config.mean,
                config.std,
                config.blur_sigma[1],
            )
            for group in ("global", "local")
        ]

    return {"decoding alone": only_decode, "ours, loader": loader, "ours, end to end": end_to_end}


def others(folder: Path, official_dino: str) -> dict[str, Contender]:
    files = sorted(folder.rglob("*.jpg"))
    transforms: dict[str, Callable[[Image.Image], object]] = {}
    if official_dino:
        sys.path.insert(0, official_dino)
        import main_dino  # type: ignore[import-not-found]

        transforms["official"] = main_dino.DataAugmentationDINO(
            (0.4, 1.0), (0.05, 0.4), 10 - GLOBAL_CROPS
        )
    try:
        from lightly.transforms import DINOTransform  # type: ignore[import-not-found]

        transforms["lightly"] = DINOTransform(
            local_crop_scale=(0.05, 0.4), n_local_views=10 - GLOBAL_CROPS
        )
    except ImportError as error:
        print(f"lightly: left out: {error}")

    def contender(transform: Callable[[Image.Image], object]) -> Contender:
        def load(count: int) -> object:
            return [
                transform(Image.open(files[i % len(files)]).convert("RGB")) for i in range(count)
            ]

        return load

    return {name: contender(transform) for name, transform in transforms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder with train/CLASS/*.jpg inside")
    parser.add_argument("--official_dino", default="", help="a clone of facebookresearch/dino")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = options.images or Path(made)
        if options.images is None:
            write_photographs(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contenders = {**ours(folder), **others(folder, options.official_dino)}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(options.rounds + 1):
            for name, load in contenders.items():
                start = time.perf_counter()
                load(BATCH)
                if number:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: BATCH / statistics.median(times) for name, times in seconds.items()}
    base = rates.get("official")
    for name, rate in rates.items():
        slowest, fastest = (BATCH / edge(seconds[name]) for edge in (max, min))
        ratio = f", {rate / base:.2f} of official" if base else ""
        print(f"{name:17} {rate:6.0f} images/s on one core ({slowest:.0f} to {fastest:.0f}){ratio}")
    if options.output:
        options.output.write_text(
            json.dumps({**circumstances(), "images_per_second": rates}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
