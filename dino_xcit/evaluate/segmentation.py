"""Semantic segmentation by one linear layer on frozen patch tokens: what DINOv2 calls its linear probe.

Tokens are standardised by the training images', a linear layer gives each patch its logits, which are stretched to pixels
bilinearly; cross-entropy on every pixel, AdamW, a cosine. Reported is the last step, in the framed image's own pixels.
Axes: B images of a batch, N patches, C channels, K classes, S side of the framed image.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.config.evaluation import SegConfig
from dino_xcit.data.framing import EvalDataset
from dino_xcit.data.images import SPLITS, fingerprint
from dino_xcit.data.loader import default_workers
from dino_xcit.data.masked import VOID, MaskDataset, open_masked
from dino_xcit.errors import UserError
from dino_xcit.evaluate.feature_store import DONE, WORTH_WORKERS, FeatureStore, extract
from dino_xcit.evaluate.features import ROWS, FrozenFeatures, digest_of
from dino_xcit.evaluate.inputs import Task, subjects
from dino_xcit.evaluate.report import RESAMPLES, UNNAMED, cell, describe, output_folder, table
from dino_xcit.files import printable, replacing, write_json
from dino_xcit.model.backbone import Backbone
from dino_xcit.runtime import launch, progress, resolve_precision, say, summed
from dino_xcit.weights.formats import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lightning.fabric import Fabric

WEIGHT_DECAY = 1e-4
PICTURED = 6
RESAMPLED_AT_ONCE = 500
COLOURS = "tab20"


class Scenes(NamedTuple):
    """The images of a split whose pixels and mask could be read."""

    features: Tensor
    """(n, N, C), may be memory-mapped"""
    masks: Tensor
    """uint8 (images, S, S), of all images"""
    rows: Tensor
    """int64 (n,): the images' numbers, which are the rows of the masks"""
    positions: Tensor
    """int64 (n,): and their rows in the features"""


def scenes_of(subject: FrozenFeatures, split: str) -> Scenes:
    """Features by the subject's own cache, masks beside them."""
    images: Any = subject.images[split]
    transform, config = subject.frozen.transform, subject.config
    assert isinstance(config, SegConfig)
    key = [
        "masks",
        fingerprint(images),
        list(transform),
        sorted(config.ignore_label),
        torch.__version__,
    ]
    folder, shape = (
        subject.cache / digest_of(key),
        (len(images), transform.image_size, transform.image_size),
    )
    fabric = subject.fabric
    if fabric.is_global_zero:
        FeatureStore.on_disk(folder, shape, "uint8")
    fabric.barrier()
    store = FeatureStore.on_disk(folder, shape, "uint8")
    workers = default_workers() if config.num_workers is None else config.num_workers
    extract(
        lambda masks: masks,
        MaskDataset(images, transform, config.ignore_label),
        np.arange(len(images)),
        store,
        batch_size=config.batch_size_per_gpu,
        num_workers=workers if len(images) >= WORTH_WORKERS else 0,
        share=(fabric.global_rank, fabric.world_size),
        description=f"masks, {split}" if fabric.is_global_zero else None,
    )
    fabric.barrier()
    features, numbers = subject.split(split)
    readable = torch.from_numpy(store.state == DONE)[numbers]
    if not readable.any():
        raise UserError(
            f"no mask of the {len(images)} {split} images can be read, that of {images.name(0)} for one"
        )
    lost = int((~readable).sum())
    if lost:
        name = images.name(int(numbers[~readable][0]))
        say(
            f"{lost} of {len(images)} images have no mask of their size that can be read and are left out, {name} for one"
        )
        subject.unreadable += lost
    return Scenes(
        features, torch.from_numpy(store.features), numbers[readable], readable.nonzero()[:, 0]
    )


# -- features --------------------------------------------------------------------------------------------------------


def patch_features(network: Backbone, x: Tensor) -> Tensor:
    """Normed patch tokens of the last layer (B, N, C)."""
    return network.patch_tokens(x)


class PatchPixels(Backbone):
    """Baseline: the pixels of each patch."""

    arch = "raw pixels"
    metadata: ClassVar[dict[str, Any]] = {}

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch_size = patch

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Give the pixels of each patch, (B, N, C * patch * patch)."""
        return F.pixel_unshuffle(images, self.patch_size).flatten(2).mT


SEGMENTATION = Task(open_masked, patch_features, lambda network: PatchPixels(network.patch_size))


# -- the linear layer ------------------------------------------------------------------------------------------------


class LinearSegHead(NamedTuple):
    """A linear layer on tokens."""

    weight: Tensor
    """(K, C)"""
    bias: Tensor
    """(K,)"""

    def __call__(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens of a square grid (B, N, C) -> logits (B, K, side, side)."""
        logits = F.linear(tokens.to(self.weight.dtype), *self).mT  # (B, K, N)
        grid = math.isqrt(logits.shape[-1])
        return F.interpolate(
            logits.unflatten(-1, (grid, grid)), (side, side), mode="bilinear", align_corners=False
        )


def standardisation(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the tokens of these images, float32 (C,)."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for positions in scenes.positions.split(max(1, ROWS // scenes.features.shape[1])):
        tokens = scenes.features[positions].flatten(0, 1).double()
        total, squares, count = (
            total + tokens.sum(0),
            squares + tokens.square().sum(0),
            count + len(tokens),
        )
    mean = total / count
    variance = squares / count - mean.square()
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


def train(
    config: SegConfig, scenes: Scenes, classes: int, fabric: Fabric, name: str
) -> LinearSegHead:
    """The linear layer, with the standardisation in it. Each process takes its share of every batch."""
    mean, std = (values.to(fabric.device) for values in standardisation(scenes))
    weight = torch.zeros(classes, len(mean), device=fabric.device, requires_grad=True)
    bias = torch.zeros(classes, device=fabric.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=config.lr, weight_decay=WEIGHT_DECAY)
    steps = config.epochs * -(-len(scenes.rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(steps, f"{name}: linear layer", "steps", fabric.is_global_zero) as bar:
        for tokens, truth in _batches(config, scenes, fabric):
            logits = LinearSegHead(weight, bias)((tokens - mean) / std, truth.shape[-1])
            loss = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            counted = summed(fabric, (truth != VOID).sum()).clamp(min=1)
            for parameter in (weight, bias):
                assert parameter.grad is not None
                parameter.grad = summed(fabric, parameter.grad) / counted
            optimizer.step()
            schedule.step()
            bar.update()
    with torch.no_grad():
        return LinearSegHead(weight / std, bias - (weight / std) @ mean)


def _batches(config: SegConfig, scenes: Scenes, fabric: Fabric) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each batch: tokens (B, N, C), masks int64 (B, S, S)."""
    for epoch in range(config.epochs):
        order = torch.from_numpy(
            np.random.default_rng((config.seed, epoch)).permutation(len(scenes.rows))
        )
        for batch in order.split(config.batch_size):
            mine = batch[fabric.global_rank :: fabric.world_size]
            tokens, truth = scenes.features[scenes.positions[mine]], scenes.masks[scenes.rows[mine]]
            yield tokens.to(fabric.device).float(), truth.to(fabric.device).long()


# -- the score -------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Pixels of each class in each image, int64 (n, K)."""

    both: Tensor
    """true and predicted"""
    true: Tensor
    predicted: Tensor


def count(
    head: LinearSegHead, scenes: Scenes, classes: int, fabric: Fabric, batch: int, name: str
) -> Counts:
    """Compare with the masks; each process takes its share of the images. The layer need not have met all classes."""
    images = len(scenes.rows)
    counts = torch.zeros(3, images, classes, dtype=torch.int64)
    with (
        progress(images, f"{name}: pixels", "images", fabric.is_global_zero) as bar,
        torch.no_grad(),
    ):
        for number, mine in enumerate(torch.arange(images).split(batch)):
            if number % fabric.world_size == fabric.global_rank:
                truth = scenes.masks[scenes.rows[mine]].to(fabric.device).long()
                tokens = scenes.features[scenes.positions[mine]].to(fabric.device).float()
                guess = head(tokens, truth.shape[-1]).argmax(1)
                counts[:, mine] = torch.stack(_counted(guess, truth, classes)).cpu()
            bar.update(len(mine))
    return Counts(*summed(fabric, counts))  # rows of other processes are zero


def _counted(guess: Tensor, truth: Tensor, classes: int) -> list[Tensor]:
    """(B, S, S) each -> right, true and guessed pixels of each class (B, K), where the mask says."""
    image = torch.arange(len(truth), device=truth.device)[:, None, None] * classes
    says = truth != VOID
    kinds = ((says & (guess == truth), truth), (says, truth), (says, guess))
    return [
        torch.bincount((image + label)[where], minlength=len(truth) * classes).unflatten(
            0, (-1, classes)
        )
        for where, label in kinds
    ]


def measures(both: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels of each class (..., K), summed over images -> mean IoU over the classes met, and the share of right pixels."""
    union = true + predicted - both
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = both / union
    return {"miou": np.nanmean(iou, axis=-1), "pixel_accuracy": both.sum(-1) / true.sum(-1)}


def result(counts: Counts, names: list[str], seed: int) -> dict[str, Any]:
    """What seg.json holds of one network: percents, 95 % intervals over resampled images, the IoU of each class."""
    arrays = [part.double().numpy() for part in counts]
    sums = [array.sum(0) for array in arrays]
    rng, images = np.random.default_rng(seed), len(arrays[0])
    drawn: dict[str, list[np.ndarray]] = {}
    for _ in range(RESAMPLES // RESAMPLED_AT_ONCE):
        times = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLED_AT_ONCE).astype(
            float
        )
        for name, values in measures(*(times @ array for array in arrays)).items():
            drawn.setdefault(name, []).append(values)
    row: dict[str, Any] = {}
    for name, value in measures(*sums).items():
        low, high = np.quantile(np.concatenate(drawn[name]), [0.025, 0.975])
        row[name] = round(100 * float(value), 3)
        row[f"{name}_ci95"] = [round(100 * float(low), 3), round(100 * float(high), 3)]
    union = sums[1] + sums[2] - sums[0]
    return {
        **row,
        "iou": {
            name: round(100 * b / u, 3)
            for name, b, u in zip(names, sums[0], union, strict=True)
            if u
        },
    }


# -- the command -----------------------------------------------------------------------------------------------------


def seg_eval(config: SegConfig) -> dict[str, Any]:
    """What `dino-xcit seg-eval` does -> the content of seg.json.

    Raises ValueError, naming the flag, for what the user can put right.
    """
    folder = output_folder(config)
    fabric = launch(config)
    start = time.perf_counter()
    with subjects(config, fabric, SEGMENTATION) as (config, evaluated, known):
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, dict[str, Any]] = {}
        for subject in evaluated:
            scenes = {split: scenes_of(subject, split) for split in SPLITS}
            trained, met = (_classes(scenes[split], split) for split in SPLITS)
            classes = max(trained, met)  # of a class without training images no pixel is right
            names = [known.get(label, UNNAMED.format(label)) for label in range(classes)]
            head = train(config, scenes["train"], trained, fabric, subject.name)
            counts = count(
                head, scenes["validation"], classes, fabric, config.batch_size_per_gpu, subject.name
            )
            rows[subject.name] = result(counts, names, config.seed)
            if subject is evaluated[0] and fabric.is_global_zero:
                save_layer(head, config, names, folder / "seg_head.safetensors")
                draw(
                    folder / "seg_classes.png",
                    subject,
                    scenes["validation"],
                    head,
                    rows[subject.name],
                    names,
                )
        report = {
            "protocol": "linear layer on frozen patch tokens",
            "results": [rows.pop(evaluated[0].name)],
            "baselines": rows,
            "seconds": round(time.perf_counter() - start, 2),
            **describe(config, evaluated, resolve_precision(config)),
        }
        report["data"]["classes"] = classes
    if fabric.is_global_zero:
        write_json(folder / "seg.json", report)
        listed = [
            [name, cell(row, "miou"), cell(row, "pixel_accuracy")]
            for name, row in {evaluated[0].name: report["results"][0], **rows}.items()
        ]
        print(table(["segmentation, linear", "mean IoU % [95 %]", "right pixels % [95 %]"], listed))
        print(f"{folder}: seg.json, seg_classes.png, seg_head.safetensors")
    return report


def _classes(scenes: Scenes, split: str) -> int:
    """One more than the largest number in the masks. Raises ValueError if all is void."""
    chunks = [scenes.masks[rows] for rows in scenes.rows.split(ROWS)]
    found = [int(said.max()) for masks in chunks if (said := masks[masks != VOID]).numel()]
    if not found:
        raise UserError(f"no pixel of the {split} masks has a class; --ignore_label leaves nothing")
    return max(found) + 1


def save_layer(head: LinearSegHead, config: SegConfig, names: list[str], path: Path) -> None:
    """weight (K, C) and bias (K,) as safetensors, for the normed patch tokens; metadata `dino_xcit`: framing and classes."""
    about = {
        "weights": config.weights,
        "image_size": config.image_size,
        "resize_size": config.resize_size,
        "classes": dict(enumerate(names)),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head._asdict().items()}
    with replacing(path) as beside:
        write_safetensors(tensors, beside, about)


def draw(
    path: Path,
    subject: FrozenFeatures,
    scenes: Scenes,
    head: LinearSegHead,
    row: dict[str, Any],
    names: list[str],
) -> None:
    """The first images with their masks and what was predicted, and the IoU of each class, from worst to best."""
    import matplotlib
    from matplotlib.figure import Figure

    palette = matplotlib.colormaps[COLOURS].colors  # type: ignore[attr-defined]
    colours = np.array(
        [palette[label % len(palette)] for label in range(len(names))] + [(1.0, 1.0, 1.0)]
    )
    dataset = EvalDataset(subject.images["validation"], subject.frozen.transform)
    side = max(3.4, 0.14 * len(row["iou"]))
    figure = Figure(figsize=(10, side), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1), squeeze=False)[0]
    shown = min(PICTURED, len(scenes.rows))
    grid = left.subplots(3, shown, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for column in range(shown):
        number = int(scenes.rows[column])
        truth = scenes.masks[number].long()
        with torch.no_grad():
            tokens = scenes.features[scenes.positions[column]][None].to(head.weight.device).float()
            guess = head(tokens, len(truth)).argmax(1)[0].cpu()
        image = dataset[number][0].permute(1, 2, 0).numpy()
        truth[truth >= len(names)] = len(names)
        pictures = (
            image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1),
            colours[truth],
            colours[guess],
        )
        for axes, picture in zip(grid[:, column], pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[:, 0], ("image", "mask", "predicted"), strict=True):
        axes.set_ylabel(title, fontsize=8)
    axes = right.subplots()
    ordered = sorted(row["iou"], key=lambda name: row["iou"][name])
    axes.barh(
        range(len(ordered)),
        [row["iou"][name] for name in ordered],
        color=[colours[names.index(n)] for n in ordered],
    )
    axes.axvline(row["miou"], color="#D55E00", label=f"mean {row['miou']:.1f} %")
    axes.set_yticks(
        range(len(ordered)), [printable(name) for name in ordered], fontsize=7, parse_math=False
    )
    axes.set(xlim=(0, 100), xlabel="intersection over union, %")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    title = f"{subject.name}: linear segmentation, mean IoU {row['miou']:.1f} %"
    figure.suptitle(printable(title), parse_math=False, fontsize=10)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)
