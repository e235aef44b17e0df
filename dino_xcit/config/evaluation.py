"""Options of the evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.config.checks import Checks, lists_to_tuples
from dino_xcit.errors import UserError

WEIGHTS = "a run folder, a file, timm:NAME or hf-hub:ORG/NAME"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of every evaluation of a frozen backbone."""

    weights: str | None = None
    """run folder, .ckpt, .safetensors, .pth (also of official DINO or XCiT), timm:NAME,
    hf-hub:ORG/NAME, or a published name (dino_xcit_small_12_p16, ...)"""
    arch: str | None = None
    """architecture, if the weights do not contain it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """network to load from a checkpoint that holds both"""
    baselines: bool = False
    """also evaluate raw pixels (at most 32 x 32) and the same network untrained"""

    # Data
    data_path: str | tuple[str, ...] | None = None
    """folder of labelled images or tar files in train/ and val/, tar files such as
    'shards/{train,val}-{000..099}.tar', .txt files of paths and classes, .npz arrays, several of
    these, or the root of a named data set. Default: the run's own data"""
    dataset: str | None = None
    """images by name: torch/NAME (torchvision), hfds/NAME (Hugging Face) or a generated source
    such as shapes"""
    input_key: str | None = None
    """column of the images of hfds/NAME. Default: image, else the first column of images"""
    target_key: str | None = None
    """column of the labels of hfds/NAME. Default: label, else the images have no labels"""
    num_images: int | None = None
    """training images to use, sampled with the seed (generated images: how many). Default:
    all"""
    in_chans: int | None = None
    """image channels. Default: the weights' own"""
    mean: tuple[float, ...] = ()
    """mean of each channel in [0, 1], subtracted from the images. Default: the weights' own,
    else ImageNet's"""
    std: tuple[float, ...] = ()
    """standard deviation of each channel in [0, 1], by which the images are divided. Default:
    the weights' own, else ImageNet's"""
    image_size: int | None = None
    """side of the centre crop in pixels. Default: the global crops' of the pretraining, else
    224"""
    resize_size: int | None = None
    """length in pixels to which the short side is resized before the crop. Default: 8 / 7 of
    the crop (256 for 224); for crops below 96, the crop's own"""
    num_workers: int | None = None
    """loader processes per process. Default: its share of the CPU cores less one, at most 16"""
    seed: int = 0
    """seed of all random numbers"""

    # Features
    feature_dtype: Literal["auto", "float32", "float16"] = "auto"
    """dtype of stored features; auto: float32, or float16 if --precision is half"""
    cache_dir: str | None = None
    """folder in which features are cached for later evaluations. Default: dino_xcit in
    $XDG_CACHE_HOME or ~/.cache"""
    no_cache: bool = False
    """delete the features at the end"""

    # Machine
    batch_size_per_gpu: int = 128
    """images per process and forward pass; does not affect results"""
    accelerator: str = "auto"
    """cpu, gpu, mps, ...: Lightning's names"""
    devices: str = "auto"
    """processes on this machine, or a list of device indices"""
    precision: str = "auto"
    """32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on GPUs with bfloat16 and CPUs that
    multiply it faster, else 32-true"""

    output_dir: str | None = None
    """folder of the results. Default: the run folder of the weights, else runs/NAME"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        lists_to_tuples(self)
        self._check_source()
        check = Checks(self)
        check.at_least(
            1, "num_images", "in_chans", "image_size", "resize_size", "batch_size_per_gpu"
        )
        check.at_least(0, "seed", "num_workers")
        check.positive("std")
        check.precision()
        check.columns()

    def _check_source(self) -> None:
        if self.weights is None:
            raise UserError(f"expected --weights: {WEIGHTS}")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(EvalConfig):
    """Options of evaluations with one class an image."""

    n_last_blocks: int | None = None
    """class tokens to concatenate, from the last n class-attention layers (XCiT has 2).
    Default: 1"""
    avgpool_patchtokens: bool | None = None
    """append the mean of the last layer's patch tokens. Default: false"""
    val_fraction: float | None = None
    """share of each class's images to hold out, sampled with the seed, as validation images of a
    data set that has none"""
    load_features: str | None = None
    """folder with trainfeat.pth, testfeat.pth, trainlabels.pth and testlabels.pth to evaluate
    instead of --weights"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        check = Checks(self)
        check.at_least(1, "n_last_blocks")
        share = self.val_fraction
        check(share is None or 0 < share < 1, "val_fraction", "a share between 0 and 1")

    def _check_source(self) -> None:
        if (self.weights is None) == (self.load_features is None):
            found = "both are given" if self.weights else "neither is"
            raise UserError(f"expected --weights or --load_features, {found}")
        of_images = (
            "baselines",
            "data_path",
            "dataset",
            "num_images",
            "val_fraction",
            "image_size",
        )
        unused = [flag for flag in (*of_images, "n_last_blocks") if getattr(self, flag)]
        if self.load_features is not None and unused:
            raise UserError(
                f"--{unused[0]} has no meaning with --load_features, which brings features "
                "instead of images"
            )


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ClassificationConfig):
    """Weighted k-nearest-neighbour classification on frozen features, as official eval_knn.py."""

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours k. The default ones are at most the number of training images"""
    temperature: float = 0.07
    """softmax temperature of the vote: a neighbour's weight is exp(similarity / temperature)"""
    dump_features: str | None = None
    """folder in which to write the four files that --load_features reads"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        check = Checks(self)
        check(bool(self.nb_knn), "nb_knn", "numbers of at least 1")
        check.at_least(1, "nb_knn")
        check.positive("temperature")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ClassificationConfig):
    """Linear classification on frozen features."""

    protocol: Literal["heads", "dino", "logistic"] = "heads"
    """heads: one head per learning rate and feature choice, as DINOv2, on features extracted
    once; dino: one head on augmented crops, as official eval_linear.py; logistic: L-BFGS for
    each C, as DINOv2's logistic regression"""
    lr: tuple[float, ...] = ()
    """learning rates for 256 images per step, scaled linearly. Default: dino 0.001; heads 16 from
    1e-5 to 1"""
    epochs: int | None = None
    """passes over the images. Default: dino 100; heads 12500 steps, but from 1000 steps on at
    most 100 passes"""
    batch_size: int = 1024
    """images per SGD step, over all processes"""
    c: tuple[float, ...] = ()
    """inverse strengths C of logistic regression's L2 penalty. Default: 45 from 1e-6 to 1e5"""
    held_out: float = 0.1
    """share of the training images held out to select learning rate, features and C"""
    train_fraction: tuple[float, ...] = (1.0,)
    """shares of each class's training images to use; one result each"""
    num_seeds: int = 1
    """repetitions with other seeds: subset, held-out images, initial weights, order"""
    evaluate: str | None = None
    """head file written by an earlier linear-eval, to evaluate instead of training one"""
    predict: str | None = None
    """head file written by an earlier linear-eval: write the class of each image in --data_path,
    which needs no labels, to predictions.csv"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        check = Checks(self)
        check.positive("lr", "c")
        one_head = self.protocol == "dino"
        check(not one_head or len(self.lr) <= 1, "lr", "one number with --protocol dino")
        images = not one_head or self.load_features is None
        check(images, "load_features", "images, for --protocol dino")
        alone = not (self.evaluate and self.baselines)
        check(alone, "baselines", "false with --evaluate, which is one head's")
        check_predict(self)
        check(not (self.predict and self.evaluate), "evaluate", "none with --predict")
        check(not (self.predict and self.load_features), "load_features", "none with --predict")
        check(0 < self.held_out < 1, "held_out", "a share between 0 and 1")
        shares = self.train_fraction
        in_range = bool(shares) and all(0 < share <= 1 for share in shares)
        check(in_range, "train_fraction", "shares over 0, up to 1")
        check.at_least(1, "epochs", "batch_size", "num_seeds")


@dataclass(frozen=True, kw_only=True)
class SegConfig(EvalConfig):
    """Semantic segmentation by one linear layer on frozen patch tokens.

    --data_path: images/ beside masks/ (or annotations/), each with train/ and val/ inside, as
    ADE20K, or train/ and val/ with images/ and masks/ in each; also the folders of VOC,
    Cityscapes, COCO and MMSegmentation. Masks in colour need a list of colours beside, as CamVid's
    label_colors.txt.
    """

    lr: float = 0.01
    """peak learning rate of AdamW, which falls to 0 along a cosine"""
    epochs: int = 10
    """passes over the images"""
    batch_size: int = 64
    """images per step, over all processes"""
    ignore_label: tuple[int, ...] = (255,)
    """mask values that are no class: neither trained on nor scored (ADE20K: 0 255; no value: all
    are classes)"""
    predict: str | None = None
    """head file written by an earlier seg-eval: write a mask of each image in --data_path, which
    needs no masks, to seg_masks/"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        check = Checks(self)
        check.positive("lr")
        check.at_least(1, "epochs", "batch_size")
        check.within(0, 65535, "numbers from 0 to 65535", "ignore_label")
        check_predict(self)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EvalConfig):
    """Features of any images, which need no labels: one row an image, with its name.

    All images in the folder --data_path are taken, at any depth (no tar files, lists or arrays);
    of a named data set its training images.
    """

    tokens: Literal["class", "patch_mean", "both", "patches"] = "class"
    """class token, mean of the patch tokens, both after each other, or every patch token"""
    normalize: bool = False
    """divide each vector by its Euclidean norm"""
    format: Literal["npy", "npz", "parquet"] = "npy"
    """file: embeddings.npy beside embeddings.csv, which has the name of each row's image; or
    embeddings.npz or .parquet with the names inside (parquet: pip install dino_xcit[parquet])"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        super().__post_init__()
        check = Checks(self)
        check(not self.baselines, "baselines", "false: embed takes the weights' features alone")
        in_columns = self.format == "parquet" and self.tokens == "patches"
        check(not in_columns, "format", "npy or npz with --tokens patches")


def check_predict(config: LinearConfig | SegConfig) -> None:
    """Raise UserError if options do not go with --predict."""
    if config.predict is not None:
        check = Checks(config)
        check(config.data_path is not None, "data_path", "a folder of images, for --predict")
        for flag in ("baselines", "dataset", "num_images"):
            check(not getattr(config, flag), flag, "none with --predict, which takes all images")
