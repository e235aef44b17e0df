"""The model card of `dino-xcit export --format hf`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import ATTENTION, CONFIG, KNN, LINEAR, result_file

if TYPE_CHECKING:
    from pathlib import Path

    from dino_xcit.model.backbone import Backbone

SCORES = tuple(map(result_file, (KNN, *LINEAR.values())))
"""Results that a card shows."""


def model_card(backbone: Backbone, folder: Path) -> str:
    """Return the card as Markdown, with the header that Hugging Face reads.

    It shows recipe, scores and figure as far as the folder holds their files.
    """
    parts = [_header(backbone, of_run=(folder / CONFIG).exists())]
    if (folder / CONFIG).exists():
        parts.append(_recipe((folder / CONFIG).read_text().strip()))
    rows = [row for name in SCORES if (folder / name).exists() for row in _scores(folder / name)]
    if rows:
        head = ["| evaluation | images | top-1 % | 95 % interval |", "|---|---|---|---|"]
        parts.append(["## Scores", "", *head, *rows])
    if (folder / ATTENTION).exists():
        picture = f"![attention maps over the pretraining]({ATTENTION})"
        parts.append(["## What it attends to", "", picture])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _header(backbone: Backbone, *, of_run: bool) -> list[str]:
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    about = backbone.metadata
    kind = "XCiT" if isinstance(backbone, XCiT) else "timm"
    trained = ", pretrained without labels by DINO with `dino_xcit`" if of_run else ""
    return [
        *("---", "library_name: timm", "pipeline_tag: image-feature-extraction"),
        *("tags:", "- timm", "- dino", *(["- xcit"] if kind == "XCiT" else []), "---", ""),
        f"# {backbone.arch}",
        "",
        f"{kind} backbone ({parameters:.1f} M parameters, patch {backbone.patch_size}, "
        f"{backbone.embed_dim} features){trained}.",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("hf-hub:ORG/NAME", pretrained=True)  # or local-dir:FOLDER',
        "features = model(images)  # (B, C, H, W) -> (B, D)",
        "```",
        "",
        f"Images: {backbone.in_chans} channels, mean {list(about.get('mean', ()))}, "
        f"standard deviation {list(about.get('std', ()))} of values in [0, 1].",
    ]


def _recipe(config: str) -> list[str]:
    repeat = f"`dino-xcit pretrain --config {CONFIG}` repeats the run."
    return [
        *("## Recipe", "", f"Every option is in `{CONFIG}`; {repeat}", ""),
        *("```yaml", config, "```"),
    ]


def _scores(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    images = content["data"]["validation"]
    lines = []
    for row in content["results"]:
        name = content["protocol"] + (f", k = {row['k']}" if "k" in row else "")
        low, high = row["top1_ci95"]
        lines.append(f"| {name} | {images} | {row['top1']:.1f} | {low:.1f} to {high:.1f} |")
    return lines
