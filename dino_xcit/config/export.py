"""Options of `dino-xcit export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dino_xcit.config.checks import Checks, lists_to_tuples
from dino_xcit.config.evaluation import WEIGHTS
from dino_xcit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a backbone in the formats of other tools."""

    weights: str | None = None
    """run folder, .ckpt, .safetensors, .pth (also of official DINO or XCiT), timm:NAME,
    hf-hub:ORG/NAME, or a published name (dino_xcit_small_12_p16, ...)"""
    arch: str | None = None
    """architecture, if the weights do not contain it"""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """network to load from a checkpoint that holds both"""
    format: tuple[Literal["timm", "hf", "official", "onnx", "torch_export"], ...] = ("timm",)
    """timm: a folder for timm's local-dir:; hf: the same with a model card, for the Hugging
    Face hub; official: a .pth with official DINO's names; onnx, torch_export: graphs for any
    batch and image size"""
    attention: bool = False
    """onnx, torch_export: the last layer's class-attention maps as a second output"""
    half: bool = False
    """onnx, torch_export: weights and arithmetic in float16; images and outputs stay float32"""
    opset: int | None = None
    """onnx: version of the operator set, 18 or more. Default: torch's"""
    output_dir: str = "export"
    """folder of the files"""

    def __post_init__(self) -> None:
        """Raise UserError, naming the flag, for values that are not allowed."""
        lists_to_tuples(self)
        if not self.weights:
            raise UserError(f"expected --weights: {WEIGHTS}")
        check = Checks(self)
        formats = "at least one of timm, hf, official, onnx, torch_export"
        check(bool(self.format), "format", formats)
        graphs = {"onnx", "torch_export"} & set(self.format)
        has_output = not self.attention or bool(graphs)
        check(has_output, "attention", "false without --format onnx or torch_export")
        check(not self.half or bool(graphs), "half", "false without --format onnx or torch_export")
        of_onnx = self.opset is None or "onnx" in self.format
        check(of_onnx, "opset", "none without --format onnx")
        check.at_least(18, "opset")
