"""Export of an XCiT as a graph: torch.export and ONNX, for any batch and image size."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.weights.comparison import compare

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.config.export import ExportConfig
    from dino_xcit.model.xcit import XCiT

# Patches on a side of the images that a graph takes; a single patch would be another graph.
SMALLEST, LARGEST = 2, 512


class FeaturesAndMaps(nn.Module):
    """A backbone that can also return its class-attention maps.

    Args:
        backbone: an XCiT of patch size p.
        maps: whether to return the last layer's maps.
    """

    def __init__(self, backbone: XCiT, maps: bool) -> None:
        super().__init__()
        self.backbone, self.maps = backbone, maps

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) -> features (B, D), and maps (B, heads, H / p, W / p)."""
        tokens, H, W = self.backbone.xca_tokens(images)
        x, attentions = self.backbone.attend(tokens, class_token_only=True)
        features: Tensor = self.backbone.norm(x[:, 0])
        if not self.maps:
            return features
        to_patches = attentions[-1][:, :, 1:]  # (B, h, N)
        return features, to_patches.reshape(*to_patches.shape[:2], H, W)


def traced(backbone: XCiT, maps: bool) -> torch.export.ExportedProgram:
    """Trace the backbone as a graph of any batch and of 2 to 512 patches on a side."""
    p = backbone.patch_size
    rows, columns = (
        torch.export.Dim(name, min=SMALLEST, max=LARGEST) for name in ("rows", "columns")
    )
    shapes = ({0: torch.export.Dim("batch", min=1), 2: p * rows, 3: p * columns},)
    example = torch.zeros(2, backbone.in_chans, 4 * p, 6 * p)
    return torch.export.export(
        FeaturesAndMaps(backbone, maps), (example,), dynamic_shapes=shapes, strict=False
    )


def write_torch_export(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """Write a .pt2 for `torch.export.load`."""
    path = folder / f"{backbone.arch}.pt2"
    with replacing(path) as temporary:
        torch.export.save(traced(backbone, config.attention), temporary)
        compare(backbone, torch.export.load(temporary).module(), "torch.export")
    return path


def write_onnx(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """Write an .onnx with its weights in the same file."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime"
        ) from None
    path = folder / f"{backbone.arch}.onnx"
    outputs = ["features", "attention"] if config.attention else ["features"]
    with replacing(path) as temporary:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
            program = torch.onnx.export(
                traced(backbone, config.attention),
                input_names=["images"],
                output_names=outputs,
                dynamo=True,
            )
        assert program is not None  # as with dynamo=True
        program.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        compare(backbone, run, "onnxruntime")
    return path
