"""`dino-xcit export`: write a backbone in the formats of other tools.

Every file is read back and its features are compared before its name is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dino_xcit.errors import UserError
from dino_xcit.files import replacing, write_json
from dino_xcit.model.architectures import resolve_architecture
from dino_xcit.model.xcit import XCiT
from dino_xcit.runtime import require_folder
from dino_xcit.weights.comparison import compare
from dino_xcit.weights.config_json import as_json, with_assumed
from dino_xcit.weights.export_graph import write_onnx, write_torch_export
from dino_xcit.weights.export_timm import write_hf, write_timm
from dino_xcit.weights.formats import to_official_names
from dino_xcit.weights.load import load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

    from dino_xcit.config.export import ExportConfig
    from dino_xcit.model.backbone import Backbone

RGB = 3  # channels of the mean and std that may be assumed


def export(config: ExportConfig) -> list[Path]:
    """Write a backbone in each `--format`.

    Returns:
        The files or folders written.

    Raises:
        UserError: a format cannot hold this network, or needs a package that is not installed.
    """
    folder = Path(config.output_dir)
    require_folder(folder, "output_dir")
    backbone = load_backbone(config.weights or "", config.arch, config.checkpoint_key)
    if not isinstance(backbone, XCiT):
        refused = [kind for kind in config.format if kind in XCIT_WRITERS]
        if refused:
            raise UserError(
                f"--format {refused[0]} needs an XCiT; --weights {config.weights} holds "
                f"{backbone.arch}; expected --format {' or '.join(WRITERS)}"
            )
    if backbone.in_chans == RGB:
        backbone.metadata = with_assumed(backbone.metadata, f"--weights {config.weights}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in config.format:
        if isinstance(backbone, XCiT) and kind in XCIT_WRITERS:
            paths.append(XCIT_WRITERS[kind](backbone, folder, config))
        else:
            paths.append(WRITERS[kind](backbone, folder, config))
        print(paths[-1])
    return paths


def write_official(backbone: XCiT, folder: Path, _config: ExportConfig) -> Path:
    """Write a .pth with the names of official DINO and XCiT, and a .json with the framing."""
    _, architecture, patch = resolve_architecture(backbone.arch)
    path = folder / f"dino_{architecture.official}_p{patch}.pth"
    tensors = {name: tensor.cpu() for name, tensor in backbone.state_dict().items()}
    with replacing(path) as temporary:
        torch.save(to_official_names(tensors), temporary)
        compare(backbone, load_backbone(temporary, backbone.arch), "dino_xcit")
    write_json(
        path.with_suffix(".json"), as_json(path.stem.removeprefix("dino_"), backbone.metadata)
    )
    return path


WRITERS: dict[str, Callable[[Backbone, Path, ExportConfig], Path]] = {
    "timm": write_timm,
    "hf": write_hf,
}
"""formats of any backbone"""

XCIT_WRITERS: dict[str, Callable[[XCiT, Path, ExportConfig], Path]] = {
    "official": write_official,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}
"""formats of XCiT alone"""
