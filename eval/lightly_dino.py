"""Accuracy over time on Fashion-MNIST: `dino-xcit pretrain` against DINO by lightly.

    python eval/lightly_dino.py --contender ours --data_path DIR --minutes 20
    python eval/lightly_dino.py --contender lightly --data_path DIR --minutes 20
    python eval/lightly_dino.py --figure

One thread each, so both can run side by side on two cores. k-NN (k = 20) of the teacher on the
10,000 test images with 10,000 training images as neighbours; its time does not count.

Ours: no option but the images and the time. lightly (pip install lightly): its modules, loss,
momentum update, transform and schedules, on timm's XCiT with the size of ours (3 layers of 128
channels; a stem of two strided convolutions, since timm has none for patches of 4). Its settings
for small images (its CIFAR-10 benchmark: no local crops, no blur, 2048 prototypes, a head of two
layers with batch norm, momentum 0.99, temperature 0.04, crops as large as the images, batch 128)
with the
optimizer of its vision-transformer benchmark (AdamW, 0.0005 per 256 images, weight decay 0.04,
cosine), since the former's SGD is for a ResNet; `--optimizer sgd` takes that one.
`eval/results/lightly_dino.json` keeps the curves.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

import dino_xcit
from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.images import open_images
from dino_xcit.files import write_json
from dino_xcit.model.backbone import Backbone
from dino_xcit.train.online_eval import OnlineEvaluator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dino_xcit.data.images import ImageSet

RESULTS = Path(__file__).parent / "results/lightly_dino.json"
FIGURE = RESULTS.with_suffix(".png")
MEAN, STD = 0.286, 0.353
BATCH, DIM = 128, 128
EVALUATIONS = 5
"""per run, at equal distances"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contender", choices=["ours", "lightly"])
    parser.add_argument("--data_path", help="folder of the data")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--output_dir", default="runs/lightly_dino", help="of our run")
    parser.add_argument("--figure", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if arguments.contender:
        train = ours if arguments.contender == "ours" else lightly
        name = arguments.contender + (", SGD" if arguments.optimizer == "sgd" else "")
        curve = train(arguments)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[name] = {"minutes": arguments.minutes, "torch": torch.__version__, "curve": curve}
        write_json(RESULTS, kept)
    if arguments.figure:
        draw(json.loads(RESULTS.read_text()))


class Curve:
    """Minutes of training and k-NN accuracy; the clock stands still in evaluations."""

    def __init__(self, config: RunConfig, minutes: float) -> None:
        train, validation = open_images(config, "train"), open_images(config, "validation")
        assert train is not None
        self._evaluate = OnlineEvaluator(config, train, validation)
        self.points: list[tuple[float, float]] = []
        self._minutes, self._start = minutes, time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Minutes of training."""
        return (time.perf_counter() - self._start) / 60

    def step(self, backbone: Backbone, *, last: bool = False) -> None:
        """Evaluate the backbone if it is time."""
        elapsed = self.elapsed
        if not last and elapsed < (len(self.points) + 1) * self._minutes / EVALUATIONS:
            return
        scores = self._evaluate(backbone, torch.device("cpu"))
        assert scores.knn_top1 is not None
        self.points.append((round(elapsed, 2), scores.knn_top1))
        print(self.points[-1], flush=True)
        self._start = time.perf_counter() - 60 * elapsed


def images_config(data_path: str, size: int) -> RunConfig:
    """What both have in common: the images and how they are evaluated."""
    return RunConfig(
        dataset="torch/fashion_mnist",
        data_path=data_path,
        in_chans=1,
        mean=(MEAN,),
        std=(STD,),
        global_crops_size=size,
        eval_num_images=10_000,
    )


# -- ours ----------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Records the curve of a run of ours."""

    def __init__(self, data_path: str, minutes: float) -> None:
        self._data_path, self._minutes = data_path, minutes
        self.curve: Curve

    def on_train_start(self, _trainer: L.Trainer, module: Any) -> None:
        """Start the clock."""
        config = images_config(self._data_path, module.config.global_crops_size)
        self.curve = Curve(config, self._minutes)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Evaluate the teacher if it is time, and at the end."""
        self.curve.step(module.teacher.backbone, last=trainer.global_step == trainer.max_steps)


def ours(arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Train by `dino_xcit.pretrain`."""
    watch = Watch(arguments.data_path, arguments.minutes)
    config = dino_xcit.PretrainConfig(
        dataset="torch/fashion_mnist",
        data_path=arguments.data_path,
        in_chans=1,
        mean=(MEAN,),
        std=(STD,),
        max_hours=arguments.minutes / 60,
        num_workers=0,
        accelerator="cpu",
        output_dir=arguments.output_dir,
    )
    dino_xcit.pretrain(config, callbacks=[watch])
    return watch.curve.points


# -- lightly -------------------------------------------------------------------------------------


def lightly(arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Train by lightly's parts, in a loop as in its examples, for the time."""
    from lightly.loss import DINOLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    torch.manual_seed(0)
    config = images_config(arguments.data_path, 28)
    images = open_images(config, "train")
    assert images is not None
    backbone = xcit()
    head, teacher_head, teacher = projection_head(), projection_head(), copy.deepcopy(backbone)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    criterion = DINOLoss(output_dim=2048)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer, peak = _optimizer(parameters, arguments.optimizer)
    curve, loader = Curve(config, arguments.minutes), batches(images)
    for step, views in enumerate(loader):
        if (share := curve.elapsed / arguments.minutes) >= 1:
            break
        optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * share)) / 2
        update_momentum(backbone, teacher, m=0.99)
        update_momentum(head, teacher_head, m=0.99)
        with torch.no_grad():
            targets = [teacher_head(teacher(view)) for view in views]
        loss = criterion(targets, [head(backbone(view)) for view in views], epoch=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"{curve.elapsed:.1f} min, step {step}, loss {loss.item():.3f}", flush=True)
        curve.step(Features(teacher))
    curve.step(Features(teacher), last=True)
    return curve.points


def _optimizer(parameters: list[nn.Parameter], name: str) -> tuple[torch.optim.Optimizer, float]:
    if name == "sgd":
        peak = 0.06 * BATCH / 128
        return torch.optim.SGD(parameters, peak, momentum=0.9, weight_decay=5e-4), peak
    peak = 0.0005 * BATCH / 256
    return torch.optim.AdamW(parameters, peak, weight_decay=0.04), peak


def projection_head() -> nn.Module:
    """The head of the CIFAR-10 benchmark, which gives student and teacher one each."""
    from lightly.models.modules.heads import DINOProjectionHead, ProjectionHead

    head: nn.Module = DINOProjectionHead(DIM, 2048, 256, 2048, batch_norm=True)
    blocks = [(DIM, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
    head.layers = ProjectionHead(blocks).layers
    return head


def xcit() -> nn.Module:
    """timm's XCiT with the size of XCiT-N3/4."""
    from timm.models.xcit import Xcit, conv3x3

    def halve(channels: int, out: int) -> nn.Module:
        convolution: nn.Module = conv3x3(channels, out, 2)  # type: ignore[no-untyped-call]
        return convolution

    network = Xcit(
        img_size=32,
        patch_size=8,  # both only of the stem that is replaced
        in_chans=1,
        num_classes=0,
        embed_dim=DIM,
        depth=3,
        num_heads=4,
        eta=1.0,
        tokens_norm=True,
    )
    network.patch_embed.proj = nn.Sequential(halve(1, DIM // 2), nn.GELU(), halve(DIM // 2, DIM))
    return network


class Features(Backbone):
    """timm's network in the form that our evaluation takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, _paths: Tensor | None = None) -> Tensor:
        """Images -> features (B, D)."""
        features: Tensor = self.network(images)
        return features


def batches(images: ImageSet) -> Iterator[list[Tensor]]:
    """Endless batches of two views, made by lightly's transform."""
    from lightly.transforms import DINOTransform
    from torchvision.transforms.v2.functional import to_pil_image

    transform = DINOTransform(
        global_crop_size=28,
        n_local_views=0,
        gaussian_blur=(0, 0, 0),
        normalize={"mean": [MEAN] * 3, "std": [STD] * 3},
    )

    class Views(torch.utils.data.Dataset[list[Tensor]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> list[Tensor]:
            picture = to_pil_image(images.read(index)).convert("RGB")
            return [view[:1] for view in transform(picture)]

    loader = torch.utils.data.DataLoader(Views(), BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


# -- figure --------------------------------------------------------------------------------------


def draw(kept: dict[str, Any]) -> None:
    """Draw all curves."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for name, of_run in kept.items():
        axes.plot(*zip(*of_run["curve"], strict=True), marker="o", ms=3, label=name)
    axes.axhline(85.7, color="0.6", lw=1, ls="--", label="raw pixels")
    axes.set(xlabel="minutes of training on one core", ylabel="k-NN accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
