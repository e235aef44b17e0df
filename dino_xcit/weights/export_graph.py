"""Export of an XCiT as a graph: torch.export and ONNX, for any batch and image size."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.weights.comparison import HALF_TOLERANCE, TOLERANCE, compare

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.export import ExportConfig
    from dino_xcit.model.xcit import XCiT

# Patches on a side of the images that a graph takes; a single patch would be another graph.
SMALLEST, LARGEST = 2, 512


class FeaturesAndMaps(nn.Module):
    """A backbone that can also return its class-attention maps.

    Images and outputs are float32, also of a backbone in float16.

    Args:
        backbone: an XCiT of patch size p.
        maps: whether to return the last layer's maps.
    """

    def __init__(self, backbone: XCiT, maps: bool) -> None:
        super().__init__()
        self.backbone, self.maps = backbone, maps
        self.dtype = backbone.cls_token.dtype

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) -> features (B, D), and maps (B, heads, H / p, W / p)."""
        tokens, H, W = self.backbone.xca_tokens(images.to(self.dtype))
        x, attentions = self.backbone.attend(tokens, class_token_only=True)
        features: Tensor = self.backbone.norm(x[:, 0]).float()
        if not self.maps:
            return features
        to_patches = attentions[-1][:, :, 1:].float()  # (B, h, N)
        return features, to_patches.reshape(*to_patches.shape[:2], H, W)


def traced(backbone: XCiT, config: ExportConfig) -> torch.export.ExportedProgram:
    """Trace the backbone as a graph of any batch and of 2 to 512 patches on a side."""
    p = backbone.patch_size
    rows, columns = (
        torch.export.Dim(name, min=SMALLEST, max=LARGEST) for name in ("rows", "columns")
    )
    shapes = ({0: torch.export.Dim("batch", min=1), 2: p * rows, 3: p * columns},)
    example = torch.zeros(2, backbone.in_chans, 4 * p, 6 * p)
    network = copy.deepcopy(backbone).half() if config.half else backbone
    return torch.export.export(
        FeaturesAndMaps(network, config.attention), (example,), dynamic_shapes=shapes, strict=False
    )


def about(backbone: XCiT) -> dict[str, str]:
    """Return what a graph does not show: architecture, and framing of images, as JSON."""
    known: dict[str, Any] = {"patch_size": backbone.patch_size}
    keys = {"image_size": "global_crops_size", "mean": "mean", "std": "std"}
    known |= {name: backbone.metadata[k] for name, k in keys.items() if k in backbone.metadata}
    return {"arch": backbone.arch, **{name: json.dumps(value) for name, value in known.items()}}


def write_torch_export(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """Write a .pt2 for `torch.export.load`; `dino_xcit.json` in it has the framing of images."""
    path = folder / f"{backbone.arch}.pt2"
    extra = {"dino_xcit.json": json.dumps(about(backbone))}
    with replacing(path) as temporary:
        torch.export.save(traced(backbone, config), temporary, extra_files=extra)
        program = torch.export.load(temporary).module()
        compare(backbone, program, "torch.export", _tolerance(config))
    return path


def write_onnx(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """Write an .onnx with its weights in the same file, and the framing of images in metadata."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime"
        ) from None
    path = folder / f"{backbone.arch}.onnx"
    with replacing(path) as temporary:
        _onnx_program(backbone, config).save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        compare(backbone, run, "onnxruntime", _tolerance(config))
    return path


def _onnx_program(backbone: XCiT, config: ExportConfig) -> torch.onnx.ONNXProgram:
    """Translate the graph; its axes have names, and its metadata the framing of images."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        program = torch.onnx.export(
            traced(backbone, config),
            input_names=["images"],
            output_names=["features", "attention"] if config.attention else ["features"],
            opset_version=config.opset,
            dynamo=True,
        )
    assert program is not None  # as with dynamo=True
    graph = program.model.graph
    # The translation names axes itself: s34, 8*s30.
    (images,), (features, *maps) = graph.inputs, graph.outputs
    axes = {images: {0: "batch", 2: "height", 3: "width"}, features: {0: "batch"}}
    axes |= {attention: {0: "batch", 2: "rows", 3: "columns"} for attention in maps}
    for value, names in axes.items():
        assert value.shape is not None
        value.shape = type(value.shape)([names.get(i, n) for i, n in enumerate(value.shape)])
    program.model.metadata_props.update(about(backbone))
    return program


def _tolerance(config: ExportConfig) -> float:
    return HALF_TOLERANCE if config.half else TOLERANCE
