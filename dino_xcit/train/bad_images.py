"""bad_images.txt: which images of a run could not be read, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dino_xcit.files import on_one_line
from dino_xcit.run_folder import BAD_IMAGES, read_bad_images
from dino_xcit.runtime import say

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.data.loader import Batch

NOTABLE_SHARE, NOTABLE_FROM = 0.01, 100  # of the images, once there are so many


class BadImageLog:
    """Collects the unreadable images of the batches, each once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / BAD_IMAGES
        self.names = read_bad_images(folder)
        self.images = self.unreadable = 0
        self.is_reported = False

    def add(self, batch: Batch) -> None:
        """Append the batch's unreadable images to the file; report once that there are many.

        Raises:
            OSError: the file cannot be written.
        """
        self.images += len(batch.views["global_crops"])
        self.unreadable += batch.replaced
        new = {on_one_line(bad.name): bad.reason for bad in batch.bad_images}
        for name in new.keys() - self.names:
            self.names.add(name)
            with self.path.open("a") as file:
                file.write(f"{name}\t{new[name]}\n")
        share = self.unreadable / self.images
        if share > NOTABLE_SHARE and self.images >= NOTABLE_FROM and not self.is_reported:
            self.is_reported = True
            say(
                f"{self.unreadable} of the first {self.images} images could not be read "
                f"({share:.1%}); see {self.path}"
            )
