"""Options of `dino-xcit attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.config.checks import Checks
from dino_xcit.errors import UserError

Interpolation = Literal["nearest", "bicubic"]
FigureKind = Literal[
    "heads", "grid", "overlay", "training", "models", "magnitude", "covariance", "similarity", "pca"
]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Draw what the class-attention heads look at: dino-xcit attention --weights W [options] IMAGE|FOLDER|VIDEO ..."""

    images: tuple[str, ...] = ()
    """image files, folders of images, videos. Default: validation images of the run's own data"""
    weights: tuple[str, ...] = ()
    """run folder, .ckpt, .safetensors, .pth (official DINO's or XCiT's too), timm:NAME, hf-hub:ORG/NAME, or a published
    dino_xcit_small_12_p16, ...; several for --figures models: --weights A --weights B"""
    arch: str | None = None
    """architecture, where the weights do not say it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """which network of a checkpoint that holds both"""
    output_dir: str = "figures"
    """folder of the figures"""

    # What is looked at
    image_size: int | None = None
    """long side in pixels, the aspect is kept; 0 keeps each image's own. Default: 480, or the pretraining's crop if that was
    below 96 pixels (of several weights the larger)"""
    fit: Literal["crop", "pad"] = "crop"
    """what becomes of sides that the patch size does not divide: centre crop, or padding whose map is cut off again"""
    num_images: int | None = None
    """validation images to show where no images are named (default 4), and to score with --masks shapes (default 2000)"""
    layer: int = -1
    """class-attention layer: 0 or 1, -1 the last"""
    head: int | None = None
    """head whose map overlay, training, models and videos show, and the only one of magnitude and covariance, from 0.
    Default: the mean of the heads, and every head"""
    xca_layer: int = -1
    """XCA layer of --figures magnitude and covariance, from 0; -1 the last"""
    point: tuple[float, ...] = ()
    """x and y of the patch for --figures similarity, in shares of width and height. Default: the patch most attended to"""
    threshold: float = 0.6
    """share of a map's mass that masks keep"""

    # Figures
    figures: tuple[FigureKind, ...] = ()
    """heads: an image with all heads; grid: images by heads; overlay: image, map over it, mask, heads in colours; training:
    the kept checkpoints of a run; models: several --weights; magnitude: queries and keys of XCA; covariance: its matrices;
    similarity: of patches to one; pca: patch features as colours. Default: heads overlay, with several weights models"""
    images_per_figure: int = 8
    """rows of a figure of several images; more images make more figures"""
    format: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)
    """formats of the figures"""
    width: str = "neurips"
    """inches, or a venue whose text is as wide: neurips, iclr, icml, cvpr, eccv, aaai, ieee, acl, jmlr, tmlr, slide; one
    column: cvpr-column, icml-column, aaai-column, ieee-column, acl-column"""
    dpi: int = 300
    """pixels per inch of PNG files and of the pictures in PDF and SVG files"""
    titles: bool = True
    """titles above the pictures"""
    names: tuple[str, ...] = ()
    """titles of several --weights, in their order: --names A --names B"""
    colormap: Literal["inferno", "viridis", "magma", "plasma", "cividis", "gray"] = "inferno"
    """colours of maps; each is perceptually uniform"""
    interpolation: Interpolation = "nearest"
    """maps between patches"""
    scale: Literal["map", "image", "figure"] = "map"
    """attention and magnitude maps that share one colour scale: none, as official visualize_attention.py; those of an image;
    all of the figure, which then has a colour bar"""
    clip: float = 0.01
    """share of the patches beyond either end of that scale, so that a few do not leave the others dark"""
    html: bool = False
    """also write attention.html, an interactive page that needs no network"""

    # Videos
    frames: bool = False
    """a folder of images is a video, its frames in the order of their names"""
    video_format: Literal["mp4", "gif", "frames"] = "mp4"
    """what becomes of videos: a film, or a folder of PNG files"""
    fps: float = 25
    """frames per second of --frames; videos keep their own"""

    # Score
    masks: str | None = None
    """score the maps against object masks: a folder of masks named as the images, or shapes, for drawn images with theirs"""

    # Machine
    seed: int = 0
    """seed of the untrained network that --masks compares with"""
    accelerator: str = "auto"
    """cpu, gpu, mps, ... as Lightning names them"""
    precision: str = "32-true"
    """32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on GPUs that have it and AVX512-BF16 CPUs, else 32-true"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that no figure can use."""
        if not self.weights:
            raise UserError("expected --weights: a run folder, .ckpt, .safetensors or timm:NAME")
        check = Checks(self)
        self._check_combinations(check)
        check.at_least(0, "image_size", "head", "seed")
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
