"""Every option of every command: default, unit and help in one place. Imports no torch, so that help is instant.

Names and defaults are official DINO's (`main_dino.py`) wherever it has the option.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain an XCiT backbone with DINO, without labels."""

    # Data
    data_path: str | None = None
    """folder of images (with train/ and val/ inside, or not), or the root of a named data set"""
    dataset: str | None = None
    """timm data set name: torch/..., hfds/..., or shapes (drawn in memory). Default: the folder --data_path, else shapes"""
    num_images: int | None = None
    """images to use: how many shapes to draw (default 10000); of any other set, a subset picked by the seed"""
    in_chans: int = 3
    """channels of the images: 1 grey, 3 RGB"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """mean of each channel in [0, 1], subtracted"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """standard deviation of each channel in [0, 1], divided by"""
    on_bad_image: Literal["replace", "raise"] = "replace"
    """an unreadable image is replaced by another and listed in bad_images.txt, or ends the run"""
    num_workers: int | None = None
    """loader processes per training process; default: the cores of this process less one, at most 16"""
    seed: int = 0
    """seed of everything random"""

    # Multi-crop
    global_crops_size: int = 224
    """side of the two global crops in pixels"""
    local_crops_size: int = 96
    """side of the local crops in pixels"""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """share of the image's area that a global crop covers, from and to"""
    local_crops_number: int = 8
    """local crops per image; 0 trains on the global crops alone"""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """share of the image's area that a local crop covers, from and to"""

    # Photometric augmentation; three probabilities are: global crop 1, global crop 2, local crops
    flip_prob: float = 0.5
    """probability of a horizontal flip"""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strength of brightness, contrast, saturation and hue jitter"""
    color_jitter_prob: float = 0.8
    """probability of colour jitter"""
    grayscale_prob: float = 0.2
    """probability of dropping colour"""
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """probability of Gaussian blur in global crop 1, global crop 2, local crops"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur in pixels, from and to"""
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """probability of solarization in global crop 1, global crop 2, local crops"""

    # Backbone
    arch: str = "xcit_s12_p16"
    """architecture and patch size: xcit_{n12,t12,t24,s12,s24,m24,l24}_p{16,8,4}; official and timm names too"""
    init_weights: str | None = None
    """what student and teacher start from: anything that --weights of the evaluations takes. Default: random numbers"""
    continue_from: str | None = None
    """a full checkpoint of official DINO: goes on after its last epoch, with heads, center and optimizer"""
    drop_path_rate: float = 0.1
    """stochastic depth of the student, the same in every layer"""
    grad_checkpointing: bool = False
    """recompute layers in the backward pass: less memory, more time"""
    xca: bool = True
    """cross-covariance attention (false: the paper's ablation)"""
    lpi: bool = True
    """local patch interaction (false: the paper's ablation)"""
    l2_norm: bool = True
    """L2-normalised queries and keys (false: the paper's ablation)"""
    learned_temperature: bool = True
    """learned temperature of XCA (false: the paper's ablation)"""

    # Head and loss
    out_dim: int = 65536
    """prototypes: outputs of the projection head"""
    head_hidden_dim: int = 2048
    """width of the projection head"""
    head_bottleneck_dim: int = 256
    """outputs of the projection head's last hidden layer, which the prototypes are compared with"""
    use_bn_in_head: bool = False
    """batch norm in the projection head"""
    norm_last_layer: bool = True
    """fix the gain of the weight-normalised last layer at 1 (false: better but less stable)"""
    freeze_last_layer: int = 1
    """epochs during which the last layer does not learn"""
    student_temp: float = 0.1
    """temperature of the student's softmax"""
    warmup_teacher_temp: float = 0.04
    """temperature of the teacher's softmax at the start"""
    teacher_temp: float = 0.04
    """temperature of the teacher's softmax after its warmup"""
    warmup_teacher_temp_epochs: int = 0
    """epochs over which the teacher's temperature rises linearly"""
    momentum_teacher: float = 0.996
    """momentum of the teacher at the start; rises to 1 on a cosine"""
    center_momentum: float = 0.9
    """momentum of the center"""

    # Optimisation
    epochs: int = 100
    """passes over the images"""
    batch_size_per_gpu: int = 64
    """images per process and forward pass"""
    accumulate_grad_batches: int = 1
    """forward passes per optimizer step"""
    lr: float = 0.0005
    """peak learning rate for a total batch of 256 images; scaled linearly with the total batch"""
    warmup_epochs: float = 10
    """epochs of linear warmup of the learning rate"""
    warmup_lr: float = 0.0
    """learning rate at the start of the warmup (not scaled)"""
    min_lr: float = 1e-6
    """learning rate at the end (not scaled)"""
    weight_decay: float = 0.04
    """weight decay at the start; as in official DINO it spares biases and one-dimensional tensors only"""
    weight_decay_end: float = 0.4
    """weight decay at the end, reached on a cosine"""
    clip_grad: float = 3.0
    """largest gradient norm of each parameter tensor; 0 does not clip"""

    # Machine: options of Lightning's Trainer
    accelerator: str = "auto"
    """cpu, gpu, mps, ... as Lightning names them"""
    devices: str = "auto"
    """number of processes on this machine, or a list of device numbers"""
    num_nodes: int = 1
    """machines"""
    strategy: str = "auto"
    """how processes work together: ddp or a variant of it, as Lightning names it"""
    precision: str = "auto"
    """32-true, bf16-mixed or 16-mixed; auto, settled as a run begins: bf16-mixed on GPUs with it and AVX512-BF16 CPUs"""
    compile: bool | None = None
    """torch.compile each layer: takes a minute or more at the start. Default: on a GPU, and on CPU from 10000 steps on"""
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    """any other option of Lightning's Trainer, such as --trainer.profiler simple"""

    # Run folder
    output_dir: str = "runs/pretrain"
    """run folder"""
    resume: bool = True
    """continue the run in --output_dir if it holds one of the same options; false refuses instead"""
    checkpoint_every_n_steps: int | None = None
    """steps between checkpoints, besides those at every epoch's end and by --checkpoint_every_n_minutes"""
    checkpoint_every_n_minutes: float = 10
    """minutes after which the next step is saved"""
    saveckp_freq: int = 20
    """epochs between checkpoints that are kept; 0 keeps the last one only"""
    log_every_n_steps: int = 50
    """steps between rows of metrics.csv"""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """loggers besides metrics.csv"""
    eval_every_n_epochs: int = 10
    """epochs between k-NN accuracies of the teacher, if the images have labels; 0 only at the end"""
    eval_num_images: int = 10000
    """images that this k-NN uses at most, of the training and of the validation set each"""
    on_collapse: Literal["warn", "stop"] = "warn"
    """what follows when the run has collapsed or diverges: a warning that says how, or the end of the run"""
    dry_run: bool = False
    """write crops.png, print the plan and stop"""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of every evaluation of a frozen backbone."""

    weights: str | None = None
    """run folder, .ckpt, .safetensors, .pth (official DINO's or XCiT's too), timm:NAME, hf-hub:ORG/NAME, or a published
    dino_xcit_small_12_p16, ..."""
    arch: str | None = None
    """architecture, where the weights do not say it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """which network of a checkpoint that holds both"""
    baselines: bool = False
    """also evaluate raw pixels (of at most 32 x 32) and the same network untrained"""

    # Data
    data_path: str | None = None
    """folder of labelled images with train/ and val/ inside, or the root of a named data set. Default: the run's own data"""
    dataset: str | None = None
    """timm data set name: torch/..., hfds/..., or shapes"""
    num_images: int | None = None
    """training images to use, picked by the seed (shapes: how many to draw). Default: all"""
    in_chans: int | None = None
    """channels of the images. Default: the weights' own"""
    mean: tuple[float, ...] = ()
    """mean of each channel in [0, 1], subtracted. Default: the weights' own, else ImageNet's"""
    std: tuple[float, ...] = ()
    """standard deviation of each channel in [0, 1], divided by. Default: the weights' own, else ImageNet's"""
    image_size: int | None = None
    """side of the centre crop in pixels. Default: the global crops' of the pretraining, else 224"""
    resize_size: int | None = None
    """pixels to which the short side is resized before. Default: 8 / 7 of the crop (256 for 224), below 96 the crop's own"""
    num_workers: int | None = None
    """loader processes per process; default: the cores of this process less one, at most 16"""
    seed: int = 0
    """seed of everything random"""

    # Features
    feature_dtype: Literal["auto", "float32", "float16"] = "auto"
    """numbers in which features are stored; auto: float32, float16 where --precision is half"""
    cache_dir: str | None = None
    """folder in which features are kept for the next evaluation. Default: dino_xcit in $XDG_CACHE_HOME or ~/.cache"""
    no_cache: bool = False
    """forget the features at the end"""

    # Machine
    batch_size_per_gpu: int = 128
    """images per process and forward pass; changes no result"""
    accelerator: str = "auto"
    """cpu, gpu, mps, ... as Lightning names them"""
    devices: str = "auto"
    """number of processes on this machine, or a list of device numbers"""
    precision: str = "auto"
    """32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on GPUs that have it and AVX512-BF16 CPUs, else 32-true"""

    output_dir: str | None = None
    """folder of the results. Default: the run folder of the weights, else runs/NAME"""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(EvalConfig):
    """Options of evaluations with one class an image."""

    n_last_blocks: int | None = None
    """class tokens to concatenate, of the last n class-attention layers (XCiT has 2). Default: 1"""
    avgpool_patchtokens: bool | None = None
    """append the mean of the last layer's patch tokens. Default: false"""
    load_features: str | None = None
    """folder of trainfeat.pth, testfeat.pth, trainlabels.pth, testlabels.pth to evaluate instead of --weights"""


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ClassificationConfig):
    """Weighted k-nearest-neighbour classification on frozen features, as official eval_knn.py."""

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours"""
    temperature: float = 0.07
    """temperature of the vote: a neighbour's is exp(similarity / temperature)"""
    dump_features: str | None = None
    """folder to write the four files that --load_features reads"""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ClassificationConfig):
    """Linear classification on frozen features."""

    protocol: Literal["heads", "dino", "logistic"] = "heads"
    """heads: a head for each learning rate and choice of features, as DINOv2, on features extracted once; dino: one head on
    augmented crops, as official eval_linear.py; logistic: L-BFGS for each C, as DINOv2's logistic regression"""
    lr: tuple[float, ...] = ()
    """learning rates for 256 images per step, scaled linearly. Default: dino 0.001; heads 16 from 1e-5 to 1"""
    epochs: int | None = None
    """passes over the images. Default: dino 100; heads 12500 steps, but from 1000 steps on at most 100 passes"""
    batch_size: int = 1024
    """images per SGD step, of all processes together"""
    c: tuple[float, ...] = ()
    """inverse strengths of logistic regression's L2 penalty. Default: 45 from 1e-6 to 1e5"""
    held_out: float = 0.1
    """share of the training images on which learning rate, features and C are chosen"""
    train_fraction: tuple[float, ...] = (1.0,)
    """shares of each class's training images to use, one result each"""
    num_seeds: int = 1
    """repetitions with other seeds: subset, held-out images, initial weights, order"""
    evaluate: str | None = None
    """a head that an earlier linear-eval wrote, to evaluate instead of training one"""


@dataclass(frozen=True, kw_only=True)
class SegConfig(EvalConfig):
    """Semantic segmentation by one linear layer on frozen patch tokens.

    --data_path: images/ beside masks/ (or annotations/), each with train/ and val/ inside, as ADE20K, or a folder of VOC.
    """

    lr: float = 0.01
    """peak learning rate of AdamW, which falls to 0 on a cosine"""
    epochs: int = 10
    """passes over the images"""
    batch_size: int = 64
    """images per step, of all processes together"""
    ignore_label: tuple[int, ...] = (255,)
    """numbers in the masks that are no class: neither trained on nor scored (ADE20K: 0 255)"""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a backbone as the files that other tools read."""

    weights: str | None = None
    """run folder, .ckpt, .safetensors, .pth (official DINO's or XCiT's too), timm:NAME, hf-hub:ORG/NAME, or a published
    dino_xcit_small_12_p16, ..."""
    arch: str | None = None
    """architecture, where the weights do not say it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """which network of a checkpoint that holds both"""
    format: tuple[Literal["timm", "hf", "official", "onnx", "torch_export"], ...] = ("timm",)
    """timm: a folder for timm's local-dir:; hf: the same with a model card, to upload; official: a .pth under official
    DINO's names; onnx, torch_export: graphs for any batch and image size"""
    attention: bool = False
    """onnx, torch_export: the last layer's class-attention maps as a second output"""
    output_dir: str = "export"
    """folder of the files"""


Interpolation = Literal["nearest", "bicubic"]
FigureKind = Literal["heads", "grid", "overlay", "training", "models", "magnitude", "covariance", "similarity", "pca"]


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


PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")

# Options that a resumed run may change: they say where it runs and what it tells, not what it computes. (Of the images per
# process only the sum over all processes matters, which is compared on loading.)
FREE_ON_RESUME = frozenset(
    {
        "accelerator",
        "batch_size_per_gpu",
        "checkpoint_every_n_minutes",
        "checkpoint_every_n_steps",
        "compile",
        "data_path",
        "devices",
        "dry_run",
        "eval_every_n_epochs",
        "eval_num_images",
        "log_every_n_steps",
        "logger",
        "num_nodes",
        "num_workers",
        "on_collapse",
        "output_dir",
        "resume",
        "saveckp_freq",
        "strategy",
        "trainer",
    }
)


def differing_options(one: PretrainConfig, other: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options that change what a run computes and on which the two disagree, with both values."""
    return {
        f.name: (getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(one)
        if f.name not in FREE_ON_RESUME and getattr(one, f.name) != getattr(other, f.name)
    }


class _Requirements:
    """Raises ValueError, naming the flag, for a value that was not expected."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, condition: bool, flag: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"--{flag} is {getattr(self.config, flag)!r}; expected {expected}")


def validate(config: PretrainConfig) -> None:
    """Raise ValueError, naming the flag, for values that no run can use."""
    require = _Requirements(config)

    for flag in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(config, flag)
        require(0 < low <= high <= 1, flag, "two shares with 0 < from <= to <= 1")
    for flag in ("mean", "std"):
        require(len(getattr(config, flag)) == config.in_chans, flag, f"one value per channel (--in_chans {config.in_chans})")
    require(all(s > 0 for s in config.std), "std", "positive values")
    low, high = config.blur_sigma
    require(0 < low <= high, "blur_sigma", "two numbers of pixels with 0 < from <= to")
    for flag in ("flip_prob", "color_jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
        value = getattr(config, flag)
        require(
            all(0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))), flag, "probabilities from 0 to 1"
        )
    require(all(0 <= s <= 1 for s in config.color_jitter[:3]), "color_jitter", "strengths from 0 to 1, hue to 0.5")
    require(0 <= config.color_jitter[3] <= 0.5, "color_jitter", "strengths from 0 to 1, hue to 0.5")
    for flag in ("momentum_teacher", "center_momentum", "drop_path_rate"):
        require(0 <= getattr(config, flag) <= 1, flag, "a number from 0 to 1")
    for flag in ("student_temp", "warmup_teacher_temp", "teacher_temp"):
        require(getattr(config, flag) > 0, flag, "a positive number")
    for flag in ("epochs", "batch_size_per_gpu", "accumulate_grad_batches", "in_chans", "log_every_n_steps", "num_nodes"):
        require(getattr(config, flag) >= 1, flag, "at least 1")
    for flag in ("out_dim", "head_hidden_dim", "head_bottleneck_dim", "global_crops_size", "local_crops_size"):
        require(getattr(config, flag) >= 1, flag, "at least 1")
    for flag in ("local_crops_number", "lr", "clip_grad", "eval_every_n_epochs", "freeze_last_layer", "saveckp_freq"):
        require(getattr(config, flag) >= 0, flag, "0 or more")
    require(config.warmup_epochs <= config.epochs, "warmup_epochs", f"at most --epochs {config.epochs}")
    require(
        config.warmup_teacher_temp_epochs <= config.epochs, "warmup_teacher_temp_epochs", f"at most --epochs {config.epochs}"
    )
    require(config.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
    require(
        config.strategy == "auto" or config.strategy.startswith("ddp"), "strategy", "auto or ddp (every process is whole)"
    )
    require(config.eval_num_images >= 1, "eval_num_images", "at least 1")
    require(
        config.init_weights is None or config.continue_from is None,
        "init_weights",
        "nothing beside --continue_from, which brings weights",
    )
    require(config.checkpoint_every_n_minutes >= 0, "checkpoint_every_n_minutes", "0 or more")
    for flag in ("num_images", "checkpoint_every_n_steps"):
        value = getattr(config, flag)
        require(value is None or value >= 1, flag, "at least 1")


def validate_evaluation(config: EvalConfig) -> None:
    """Raise ValueError, naming the flag, for values that no evaluation can use."""
    require = _Requirements(config)
    if isinstance(config, ClassificationConfig):
        _validate_features(config, require)
    elif config.weights is None:
        raise ValueError("expected --weights: a run folder, a file, timm:NAME or hf-hub:ORG/NAME")
    for flag in ("num_images", "in_chans", "image_size", "resize_size", "batch_size_per_gpu"):
        require(getattr(config, flag) is None or getattr(config, flag) >= 1, flag, "at least 1")
    require(config.seed >= 0, "seed", "0 or more")
    require(config.num_workers is None or config.num_workers >= 0, "num_workers", "0 or more")
    require(all(s > 0 for s in config.std), "std", "positive values")
    require(config.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
    if isinstance(config, KnnConfig):
        require(bool(config.nb_knn) and min(config.nb_knn) >= 1, "nb_knn", "numbers of at least 1")
        require(config.temperature > 0, "temperature", "a positive number")
    if isinstance(config, LinearConfig):
        require(all(lr > 0 for lr in config.lr), "lr", "positive numbers")
        require(config.protocol != "dino" or len(config.lr) <= 1, "lr", "one number with --protocol dino")
        require(config.protocol != "dino" or config.load_features is None, "load_features", "images, for --protocol dino")
        require(all(c > 0 for c in config.c), "c", "positive numbers")
        require(not (config.evaluate and config.baselines), "baselines", "false with --evaluate, which is one head's")
        require(0 < config.held_out < 1, "held_out", "a share between 0 and 1")
        shares = config.train_fraction
        require(bool(shares) and all(0 < share <= 1 for share in shares), "train_fraction", "shares over 0, up to 1")
        for flag in ("epochs", "batch_size", "num_seeds"):
            require(getattr(config, flag) is None or getattr(config, flag) >= 1, flag, "at least 1")
    if isinstance(config, SegConfig):
        require(config.lr > 0, "lr", "a positive number")
        for flag in ("epochs", "batch_size"):
            require(getattr(config, flag) >= 1, flag, "at least 1")
        require(all(0 <= label <= 255 for label in config.ignore_label), "ignore_label", "numbers from 0 to 255")


def _validate_features(config: ClassificationConfig, require: _Requirements) -> None:
    if (config.weights is None) == (config.load_features is None):
        found = "both are given" if config.weights else "neither is"
        raise ValueError(f"expected --weights or --load_features, {found}")
    if config.load_features is not None:
        for flag in ("baselines", "data_path", "dataset", "num_images", "image_size", "n_last_blocks"):
            if getattr(config, flag):
                raise ValueError(f"--{flag} has no meaning with --load_features, which brings features instead of images")
    require(config.n_last_blocks is None or config.n_last_blocks >= 1, "n_last_blocks", "at least 1")


def validate_export(config: ExportConfig) -> None:
    """Raise ValueError, naming the flag, for values that no export can use."""
    require = _Requirements(config)
    if not config.weights:
        raise ValueError("expected --weights: a run folder, a file, timm:NAME or hf-hub:ORG/NAME")
    require(bool(config.format), "format", "at least one of timm, hf, official, onnx, torch_export")
    graphs = {"onnx", "torch_export"} & set(config.format)
    require(not config.attention or bool(graphs), "attention", "false without --format onnx or torch_export")


def validate_attention(config: AttentionConfig) -> None:
    """Raise ValueError, naming the flag, for values that no figure can use."""
    require = _Requirements(config)
    if not config.weights:
        raise ValueError("expected --weights: a run folder, .ckpt, .safetensors or timm:NAME")
    several = len(config.weights) > 1
    require(not several or set(config.figures) <= {"models"}, "figures", "models alone with several --weights")
    require(several or "models" not in config.figures, "figures", "no models with one --weights")
    require(not several or not (config.html or config.masks), "weights", "one with --html or --masks")
    draws_its_own = config.masks == "shapes" and not (config.figures or config.html)
    require(not (draws_its_own and config.images), "masks", "a folder of masks of the images that are named")
    require(len(config.names) in (0, len(config.weights)), "names", f"a name for each of {len(config.weights)} --weights")
    require(len(set(config.names)) == len(config.names), "names", "different names")
    require(config.frames or config.fps == AttentionConfig.fps, "fps", "no rate without --frames: videos keep their own")
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
