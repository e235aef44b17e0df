"""Options of `dino-xcit attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.config.checks import PRECISIONS, Checks

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


def validate_attention(config: AttentionConfig) -> None:
    """Raise ValueError, naming the flag, for values that no figure can use."""
    require = Checks(config)
    if not config.weights:
        raise ValueError("expected --weights: a run folder, .ckpt, .safetensors or timm:NAME")
    several = len(config.weights) > 1
    require(
        not several or set(config.figures) <= {"models"},
        "figures",
        "models alone with several --weights",
    )
    require(several or "models" not in config.figures, "figures", "no models with one --weights")
    require(
        not several or not (config.html or config.masks), "weights", "one with --html or --masks"
    )
    draws_its_own = config.masks == "shapes" and not (config.figures or config.html)
    require(
        not (draws_its_own and config.images),
        "masks",
        "a folder of masks of the images that are named",
    )
    require(
        len(config.names) in (0, len(config.weights)),
        "names",
        f"a name for each of {len(config.weights)} --weights",
    )
    require(len(set(config.names)) == len(config.names), "names", "different names")
    require(
        config.frames or config.fps == AttentionConfig.fps,
        "fps",
        "no rate without --frames: videos keep their own",
    )
    similar = "similarity" in config.figures
    require(similar or not config.point, "point", "none without --figures similarity")
    require(config.image_size is None or config.image_size >= 0, "image_size", "0 or more")
    require(config.num_images is None or config.num_images >= 1, "num_images", "at least 1")
    require(config.images_per_figure >= 1, "images_per_figure", "at least 1")
    require(config.head is None or config.head >= 0, "head", "0 or more")
    in_the_image = len(config.point) == 2 and all(0 <= share <= 1 for share in config.point)
    require(not config.point or in_the_image, "point", "two shares from 0 to 1")
    require(0 < config.threshold < 1, "threshold", "a share between 0 and 1")
    require(0 <= config.clip < 0.5, "clip", "a share from 0 to below 0.5")
    require(bool(config.format), "format", "at least one of png, pdf, svg")
    require(10 <= config.dpi <= 1200, "dpi", "10 to 1200")
    require(config.fps > 0, "fps", "a positive number")
    require(config.seed >= 0, "seed", "0 or more")
    require(config.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
