"""Semantic segmentation by one linear layer on frozen patch tokens (DINOv2's linear probe).

The last step is reported, in the pixels of the framed image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.data.framing import EvalDataset
from dino_xcit.data.masked import MaskedSet, open_masked
from dino_xcit.data.splits import SPLITS
from dino_xcit.evaluate.class_figures import UNNAMED, SegmentedImage, draw_segmentation
from dino_xcit.evaluate.features import FrozenFeatures
from dino_xcit.evaluate.frame import evaluate
from dino_xcit.evaluate.inputs import Task
from dino_xcit.evaluate.predict import predict_masks
from dino_xcit.evaluate.report import with_interval
from dino_xcit.evaluate.seg_head import (
    check_classes,
    mask_values,
    masked_features,
    save_head,
    train,
    with_classes,
)
from dino_xcit.evaluate.seg_score import count_pixels, predict, result
from dino_xcit.model.backbone import Backbone
from dino_xcit.run_folder import SEG, classes_picture, head_file

if TYPE_CHECKING:
    from dino_xcit.config.evaluation import SegConfig
    from dino_xcit.evaluate.features import Features
    from dino_xcit.evaluate.frame import Evaluation
    from dino_xcit.evaluate.report import Report, Result
    from dino_xcit.evaluate.seg_head import LinearSegHead, MaskedFeatures

SHOWN_IMAGES = 6


# -- what is evaluated -------------------------------------------------------------------------


def patch_features(network: Backbone, x: Tensor) -> Tensor:
    """Normed patch tokens of the last layer, (B, N, C)."""
    return network.patch_tokens(x)


class PatchPixels(Backbone):
    """Baseline: the pixels of each patch."""

    arch = "raw pixels"

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.metadata = {}

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Return the pixels of each patch, (B, N, C * patch_size * patch_size)."""
        return F.pixel_unshuffle(images, self.patch_size).flatten(2).mT


SEGMENTATION = Task(open_masked, patch_features, lambda backbone: PatchPixels(backbone.patch_size))


# -- the command -------------------------------------------------------------------------------


COLUMNS = {
    "mean IoU % [95 %]": lambda row: with_interval(row, "miou"),
    "right pixels % [95 %]": lambda row: with_interval(row, "pixel_accuracy"),
}


def seg_eval(config: SegConfig) -> Report:
    """Run `dino-xcit seg-eval`; return the content of seg.json.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    if config.predict is not None:
        return predict_masks(config, SEGMENTATION)
    return evaluate(
        config,
        _score,
        name=SEG,
        protocol="linear layer on frozen patch tokens",
        title="segmentation, linear",
        columns=COLUMNS,
        task=SEGMENTATION,
    )


def _score(evaluation: Evaluation[SegConfig], features: Features) -> list[Result]:
    assert isinstance(features, FrozenFeatures)
    config, fabric = evaluation.config, evaluation.fabric
    masked = {
        split: masked_features(features, cast("MaskedSet", features.images[split]), split)
        for split in SPLITS
    }
    of_train, of_test = (mask_values(masked[split], split) for split in SPLITS)
    check_classes(config, masked["train"], of_train)
    # No pixel of a class without training images is correct.
    values = [*of_train, *sorted({*of_test} - {*of_train})]
    classes = evaluation.classes = len(values)
    names = [evaluation.class_names.get(value, UNNAMED.format(value)) for value in values]
    training, test = (with_classes(masked[split], values, fabric.device) for split in SPLITS)
    head = train(config, training, len(of_train), fabric, features.name)
    batch_size = config.batch_size_per_gpu
    row = result(
        count_pixels(head, test, classes, fabric, batch_size, features.name), names, config.seed
    )
    if evaluation.writes(features):
        of_head = dict(zip(values[: len(of_train)], names, strict=False))
        save_head(head, config, of_head, evaluation.file(head_file(SEG)))
        draw_segmentation(
            evaluation.file(classes_picture(SEG)),
            f"{features.name}: linear segmentation, mean IoU {row['miou']:.1f} %",
            _examples(features, test, head),
            names,
            row["iou"],
            row["miou"],
        )
    return [row]


def _examples(
    features: FrozenFeatures, test: MaskedFeatures, head: LinearSegHead
) -> list[SegmentedImage]:
    """The first validation images, segmented."""
    dataset = EvalDataset(features.images["validation"], features.extractor.transform)
    examples: list[SegmentedImage] = []
    for index in test.indices[:SHOWN_IMAGES].tolist():
        image = torch.tensor([len(examples)])
        mask = test.masks_of(image, head.weight.device)[0].cpu().numpy()
        predicted = predict(head, test, image, len(mask))[0].cpu().numpy()
        pixels = dataset[index][0].permute(1, 2, 0).numpy()
        examples.append(SegmentedImage(pixels, mask, predicted))
    return examples
