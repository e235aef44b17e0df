"""Options of the commands: the list of all, their rules, and what loads from before.

`python tests/config/test_options.py` writes options.txt again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dino_xcit.cli import COMMANDS
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig, LinearConfig, SegConfig
from dino_xcit.config.export import ExportConfig
from dino_xcit.config.pretrain import (
    FREE_ON_RESUME,
    PretrainConfig,
    RunConfig,
    differing_options,
)
from dino_xcit.errors import UserError

GOLDEN = Path(__file__).parent / "options.txt"


def default(field: dataclasses.Field) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def options() -> list[str]:
    return [
        f"{command} --{field.name} {default(field)!r}"
        for command, row in COMMANDS.items()
        for field in dataclasses.fields(row.config)
    ]


def test_every_option_and_its_default_is_listed():
    """A new option, or a changed default, is a decision: write options.txt again."""
    assert options() == GOLDEN.read_text().splitlines()


NEEDED = {
    KnnConfig: {"weights": "W"},
    LinearConfig: {"weights": "W"},
    SegConfig: {"weights": "W"},
    AttentionConfig: {"weights": ("W",)},
    ExportConfig: {"weights": "W"},
    PretrainConfig: {},
    RunConfig: {},
}


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (PretrainConfig, {"num_workers": -1}, "--num_workers is -1; expected 0 or more"),
        (PretrainConfig, {"seed": -1}, "--seed is -1; expected 0 or more"),
        (PretrainConfig, {"std": (0.2, 0.0, 0.2)}, "expected positive numbers"),
        (PretrainConfig, {"mean": (0.5,)}, "one value per channel (--in_chans 3)"),
        (PretrainConfig, {"blur_sigma": (2.0, 1.0)}, "two numbers of pixels with 0 < from <= to"),
        (PretrainConfig, {"color_jitter": (0.4, 0.4, 0.2, 0.6)}, "strengths from 0 to 1, hue to"),
        (PretrainConfig, {"warmup_epochs": 101, "epochs": 100}, "expected at most --epochs 100"),
        (PretrainConfig, {"max_hours": 1, "epochs": 9}, "expected nothing beside --epochs 9"),
        (PretrainConfig, {"max_hours": 0}, "--max_hours is 0; expected a positive number"),
        (RunConfig, {"lr": "auto"}, "--lr is 'auto'; expected a value"),
        (PretrainConfig, {"lr": float("nan")}, "--lr is nan; expected 0 or more"),
        (PretrainConfig, {"init_weights": "A", "continue_from": "B"}, "nothing beside --continue"),
        (KnnConfig, {"weights": None}, "expected --weights or --load_features, neither is"),
        (KnnConfig, {"load_features": "F"}, "expected --weights or --load_features, both are"),
        (
            KnnConfig,
            {"weights": None, "load_features": "F", "image_size": 8},
            "--image_size has no meaning with --load_features",
        ),
        (KnnConfig, {"nb_knn": ()}, "--nb_knn is (); expected numbers of at least 1"),
        (KnnConfig, {"nb_knn": (0,)}, "--nb_knn is (0,); expected at least 1"),
        (LinearConfig, {"protocol": "dino", "lr": (0.1, 0.2)}, "one number with --protocol dino"),
        (LinearConfig, {"evaluate": "H", "baselines": True}, "false with --evaluate"),
        (LinearConfig, {"train_fraction": ()}, "shares over 0, up to 1"),
        (LinearConfig, {"n_last_blocks": 0}, "--n_last_blocks is 0; expected at least 1"),
        (SegConfig, {"weights": None}, "expected --weights: a run folder"),
        (SegConfig, {"ignore_label": (-1,)}, "expected numbers from 0 to 65535"),
        (AttentionConfig, {"weights": ()}, "expected --weights: a run folder"),
        (AttentionConfig, {"point": (0.5,)}, "none without --figures similarity"),
        (AttentionConfig, {"weights": ("A", "B"), "names": ("a",)}, "a name for each of 2"),
        (AttentionConfig, {"dpi": 5}, "--dpi is 5; expected 10 to 1200"),
        (ExportConfig, {"weights": None}, "expected --weights: a run folder"),
        (ExportConfig, {"format": ()}, "--format is (); expected at least one of timm, hf"),
        (ExportConfig, {"attention": True}, "false without --format onnx or torch_export"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_their_flag(config_class, options, message):
    with pytest.raises(UserError) as caught:
        config_class(**{**NEEDED[config_class], **options})
    assert message in str(caught.value)


def test_lists_become_tuples_in_every_config():
    assert PretrainConfig(mean=[0.5] * 3) == PretrainConfig(mean=(0.5,) * 3)
    assert KnnConfig(weights="W", nb_knn=[5]).nb_knn == (5,)
    assert AttentionConfig(weights=["W"]).weights == ("W",)
    assert ExportConfig(weights="W", format=["timm"]).format == ("timm",)


def test_options_that_affect_results_are_compared():
    one = RunConfig(lr=0.25, devices="2")
    other = RunConfig(devices="4", num_workers=3)
    assert differing_options(one, other) == {"lr": (0.25, 0.0005)}
    assert {field.name for field in dataclasses.fields(PretrainConfig)} >= FREE_ON_RESUME


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(options()) + "\n")
