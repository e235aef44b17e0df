"""Draw a scene of many embedded shapes on a plain ground, unlike any training image of the demo.

python eval/scene.py eval/images/scene.png [--width 640 --height 384 --seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dino_xcit.data.shapes import SIZE, draw_shape

SPACING = 44  # pixels between the places of shapes
MAX_SHIFT = SPACING - SIZE - 2  # pixels by which a shape may leave its place
OCCUPIED = 0.45  # share of the places that have a shape


def scene(height: int, width: int, seed: int) -> np.ndarray:
    """Return the scene as uint8 (height, width)."""
    rng = np.random.default_rng(seed)
    ground = np.rint(255 * rng.normal(0.5, 0.02, (height, width)).clip(0, 1)).astype(np.uint8)
    places = [
        (y, x)
        for y in range(8, height - SPACING + 1, SPACING)
        for x in range(8, width - SPACING + 1, SPACING)
    ]
    for index, (y, x) in enumerate(place for place in places if rng.random() < OCCUPIED):
        shape = draw_shape(seed, "validation", index, channels=1)
        top, left = y + rng.integers(MAX_SHIFT), x + rng.integers(MAX_SHIFT)
        ground[top : top + SIZE, left : left + SIZE][shape.mask] = shape.image[shape.mask, 0]
    return ground


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    for name, default in (("width", 640), ("height", 384), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(options.height, options.width, options.seed)).save(
        options.file, optimize=True
    )


if __name__ == "__main__":
    main()
