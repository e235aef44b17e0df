"""Options of `dino-xcit attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.config.checks import Checks, lists_to_tuples
from dino_xcit.errors import UserError

Interpolation = Literal["nearest", "bicubic"]
FigureKind = Literal[
    "heads",
    "files",
    "grid",
    "overlay",
    "training",
    "models",
    "magnitude",
    "covariance",
    "similarity",
    "pca",
]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Draw class-attention maps: dino-xcit attention --weights W [options] IMAGE|FOLDER|VIDEO..."""

    images: tuple[str, ...] = ()
    """image files, folders of images, videos. Default: validation images of the run's own
    data"""
    weights: tuple[str, ...] = ()
    """run folder, .ckpt, .safetensors, .pth (also of official DINO or XCiT), timm:NAME,
    hf-hub:ORG/NAME, or a published name (dino_xcit_small_12_p16, ...); repeat it for --figures
    models: --weights A --weights B"""
    arch: str | None = None
    """architecture, if the weights do not contain it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """network to load from a checkpoint that holds both"""
    output_dir: str = "figures"
    """folder of the figures"""

    # Images and maps
    mean: tuple[float, ...] = ()
    """mean of each channel in [0, 1], subtracted from the images. Default: the weights' own,
    else ImageNet's"""
    std: tuple[float, ...] = ()
    """standard deviation of each channel in [0, 1], by which the images are divided. Default:
    the weights' own, else ImageNet's"""
    image_size: int | None = None
    """length of the long side in pixels, at the image's aspect ratio; 0: the image's own.
    Default: 480, or the pretraining's crop size if that is below 96 (of several weights the
    largest)"""
    fit: Literal["crop", "pad"] = "crop"
    """for sides that the patch size does not divide: centre crop, or padding that is cut off
    the maps again"""
    num_images: int | None = None
    """validation images to show if no images are named (default 4), and to score with --masks
    shapes (default 2000)"""
    layer: int = -1
    """class-attention layer: 0 or 1; -1: the last"""
    head: tuple[int, ...] = ()
    """heads, from 0: files, grid, magnitude and covariance show each; overlay, training, models
    and videos their mean. Default: all heads"""
    xca_layer: int = -1
    """XCA layer of --figures magnitude and covariance, from 0; -1: the last"""
    point: tuple[float, ...] = ()
    """x and y of the patch for --figures similarity, as shares of width and height. Default:
    the patch with the most attention"""
    threshold: float = 0.6
    """share of a map's mass that masks keep"""

    # Figures
    figures: tuple[FigureKind, ...] = ()
    """heads: an image with all heads; files: a folder for each image, with a PNG file of each
    head as official visualize_attention.py; grid: images by heads; overlay: image, map over it,
    mask, heads in colours; training: the kept checkpoints of a run; models: several --weights;
    magnitude: norms of XCA's queries and keys; covariance: XCA's matrices; similarity: of all
    patches to one; pca: patch features as colours. Default: heads overlay; with several weights
    models"""
    images_per_figure: int = 8
    """images, one a row, per figure; more images make more figures"""
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """file formats of the figures"""
    width: str = "neurips"
    """inches, or a venue's text width: neurips, iclr, icml, cvpr, eccv, aaai, ieee, acl, jmlr,
    tmlr, slide; one column: cvpr-column, icml-column, aaai-column, ieee-column, acl-column"""
    dpi: int = 300
    """pixels per inch of PNG files and of the images in PDF and SVG files"""
    titles: bool = True
    """titles above the images"""
    names: tuple[str, ...] = ()
    """titles of several --weights, in their order: --names A --names B"""
    colormap: Literal["inferno", "viridis", "magma", "plasma", "cividis", "gray"] = "inferno"
    """colours of the maps; each is perceptually uniform"""
    interpolation: Interpolation = "nearest"
    """interpolation of the maps between patches"""
    scale: Literal["map", "image", "figure"] = "map"
    """maps of attention and magnitude that share one colour scale: none, as official
    visualize_attention.py; those of an image; all of the figure, which then has a colour bar"""
    clip: float = 0.01
    """share of the patches clipped at either end of the colour scale, so that a few do not
    darken the rest"""
    html: bool = False
    """also write attention.html, an interactive page that needs no network"""

    # Videos
    frames: bool = False
    """treat a folder of images as a video: its frames in the order of their names"""
    video_format: Literal["mp4", "gif", "frames"] = "mp4"
    """output of videos: a video file, or a folder of PNG files"""
    fps: float = 25
    """frames per second of --frames; videos keep their own"""

    # Score
    masks: str | None = None
    """score the maps against object masks: a folder of masks named like the images, or shapes,
    for generated images with masks"""

    # Machine
    seed: int = 0
    """seed of the untrained network that --masks compares with"""
    accelerator: str = "auto"
    """cpu, gpu, mps, ...: Lightning's names"""
    precision: str = "32-true"
    """32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on GPUs with bfloat16 and CPUs that
    multiply it faster, else 32-true"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        lists_to_tuples(self)
        if not self.weights:
            raise UserError("expected --weights: a run folder, .ckpt, .safetensors or timm:NAME")
        check = Checks(self)
        self._check_combinations(check)
        check.at_least(0, "image_size", "head", "seed")
        check(len(set(self.head)) == len(self.head), "head", "different heads")
        check.within(0, 1, "shares from 0 to 1, of the images' range", "mean")
        check.positive("std")
        check.at_least(1, "num_images", "images_per_figure")
        in_the_image = len(self.point) == 2 and all(0 <= share <= 1 for share in self.point)
        check(not self.point or in_the_image, "point", "two shares from 0 to 1")
        check(0 < self.threshold < 1, "threshold", "a share between 0 and 1")
        check(0 <= self.clip < 0.5, "clip", "a share from 0 to below 0.5")
        check(bool(self.format), "format", "at least one of png, pdf, svg")
        check.within(10, 1200, "10 to 1200", "dpi")
        check.positive("fps")
        check.precision()

    def _check_combinations(self, check: Checks) -> None:
        several, kinds = len(self.weights) > 1, set(self.figures)
        alone = not several or kinds <= {"models"}
        check(alone, "figures", "models alone with several --weights")
        check(several or "models" not in kinds, "figures", "no models with one --weights")
        one = not several or not (self.html or self.masks)
        check(one, "weights", "one with --html or --masks")
        draws_its_own = self.masks == "shapes" and not (self.figures or self.html)
        named = draws_its_own and bool(self.images)
        check(not named, "masks", "a folder of masks of the images that are named")
        count = f"a name for each of {len(self.weights)} --weights"
        check(len(self.names) in (0, len(self.weights)), "names", count)
        check(len(set(self.names)) == len(self.names), "names", "different names")
        default = self.frames or self.fps == AttentionConfig.fps
        check(default, "fps", "no rate without --frames: videos keep their own")
        points = "similarity" in kinds or not self.point
        check(points, "point", "none without --figures similarity")
