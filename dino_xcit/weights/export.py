"""A backbone -> the files that other tools read. Every file is read back and compared before its name is told."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dino_xcit.data.framing import default_resize
from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.model.architectures import ABLATIONS, resolve_architecture, timm_name
from dino_xcit.model.xcit import XCiT
from dino_xcit.run_folder import CONFIG
from dino_xcit.runtime import require_folder, say
from dino_xcit.weights.formats import to_official_names
from dino_xcit.weights.load import load_backbone, run_folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dino_xcit.config.export import ExportConfig

SMALLEST, LARGEST = (
    2,
    512,
)  # patches on a side of the images that graphs take; one patch is another graph
TOLERANCE = 1e-4  # of features, in units of their standard deviation
CARD_FILES = ("knn.json", "linear.json", "linear_dino.json", "linear_logistic.json")


class FeaturesAndMaps(nn.Module):
    """Normalised images (B, C, H, W) -> features (B, D), and with maps the class attention (B, heads, H / p, W / p)."""

    def __init__(self, backbone: XCiT, maps: bool) -> None:
        super().__init__()
        self.backbone, self.maps = backbone, maps

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens, H, W = self.backbone.xca_tokens(images)
        x, attentions = self.backbone.attend(tokens, class_token_only=True)
        features = self.backbone.norm(x[:, 0])
        return (features, attentions[-1][:, :, 1:].unflatten(-1, (H, W))) if self.maps else features


def export(config: ExportConfig) -> list[Path]:
    """What `dino-xcit export` does -> the files or folders written.

    Raises ValueError, naming the flag, if the format cannot hold this network or needs a package that is not there.
    """
    folder = Path(config.output_dir)
    require_folder(folder, "output_dir")
    backbone = load_backbone(config.weights or "", config.arch, config.checkpoint_key)
    if not isinstance(backbone, XCiT):
        raise UserError(
            f"--weights {config.weights}: {type(backbone).__name__} is no XCiT; it is exported by its own tools"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in config.format:
        paths.append(WRITERS[kind](backbone, folder, config))
        print(paths[-1])
    return paths


# -- timm and Hugging Face -------------------------------------------------------------------------------------------


def write_timm(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """A folder with config.json and model.safetensors for `timm.create_model("local-dir:FOLDER")`."""
    import timm
    from timm.models import save_for_hf

    place = folder / f"{backbone.arch}_timm"
    network = as_timm(backbone)
    about = backbone.metadata
    size, channels = about.get("global_crops_size", 224), backbone.in_chans
    pretrained: dict[str, Any] = {
        "tag": "dino",
        "input_size": [channels, size, size],
        "num_classes": 0,
    }
    pretrained |= {
        "interpolation": "bicubic",
        "crop_pct": size / default_resize(size),
        "license": None,
    }
    pretrained |= {name: list(about[name]) for name in ("mean", "std") if name in about}
    with _written_beside(place) as beside:
        save_for_hf(
            network,
            str(beside),
            model_config={"pretrained_cfg": pretrained},
            model_args={"in_chans": channels},
            safe_serialization=True,
        )
        _compare(
            backbone,
            lambda x: timm.create_model(f"local-dir:{beside}", pretrained=True).eval()(x),
            "timm",
        )
    return place


def as_timm(backbone: XCiT) -> nn.Module:
    """timm's own network with these weights. Raises ValueError if timm has none like it."""
    import timm

    name = timm_name(backbone.arch)
    ablated = [option for option in ABLATIONS if not backbone.metadata.get(option, True)]
    if name is None or ablated:
        found = f"XCiT without {ablated[0]}" if ablated else backbone.arch
        raise UserError(f"timm has no {found}; --format onnx and torch_export take any network")
    size = backbone.metadata.get("global_crops_size", 224)
    network: Any = timm.create_model(name, num_classes=0, in_chans=backbone.in_chans, img_size=size)
    network.load_state_dict(backbone.state_dict(), strict=True)
    return network.eval()


def write_hf(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """What timm reads, with a model card and its figure: ready for Hugging Face's `upload_folder`."""
    place = folder / f"{backbone.arch}_hf"
    written = write_timm(backbone, folder, config)
    with _written_beside(place) as beside:
        for path in written.iterdir():
            shutil.copy(path, beside / path.name)
        run = run_folder_of(config.weights or "")
        if run is not None:
            for name in (CONFIG, "attention.png", *CARD_FILES):
                if (run / name).exists():
                    shutil.copy(run / name, beside / name)
        (beside / "README.md").write_text(model_card(backbone, beside))
    if "timm" not in config.format:
        shutil.rmtree(written)
    return place


def model_card(backbone: XCiT, folder: Path) -> str:
    """Markdown with the header that Hugging Face reads: recipe, data, scores and figure, as far as the folder has them."""
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    about = backbone.metadata
    lines = [
        *("---", "library_name: timm", "pipeline_tag: image-feature-extraction"),
        *("tags:", "- timm", "- dino", "- xcit", "---", ""),
        f"# {backbone.arch}",
        "",
        f"XCiT backbone ({parameters:.1f} M parameters, patch {backbone.patch_size}, {backbone.embed_dim} features), "
        "pretrained without labels by DINO with `dino_xcit`.",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("hf-hub:ORG/NAME", pretrained=True)  # or local-dir:FOLDER',
        "features = model(images)  # (B, C, H, W) -> (B, D)",
        "```",
        "",
        f"Images: {backbone.in_chans} channels, "
        f"mean {list(about.get('mean', ()))}, standard deviation {list(about.get('std', ()))} of values in [0, 1].",
    ]
    if (folder / CONFIG).exists():
        lines += [
            "",
            "## Recipe",
            "",
            f"Every option is in `{CONFIG}`; `dino-xcit pretrain --config {CONFIG}` repeats the run.",
        ]
        lines += ["", "```yaml", (folder / CONFIG).read_text().strip(), "```"]
    rows = [
        row for name in CARD_FILES if (folder / name).exists() for row in _scores(folder / name)
    ]
    if rows:
        lines += [
            "",
            "## Scores",
            "",
            "| evaluation | images | top-1 % | 95 % interval |",
            "|---|---|---|---|",
            *rows,
        ]
    if (folder / "attention.png").exists():
        lines += [
            "",
            "## What it attends to",
            "",
            "![attention maps over the pretraining](attention.png)",
        ]
    return "\n".join([*lines, ""])


def _scores(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    lines = []
    for row in content["results"]:
        name = content["protocol"] + (f", k = {row['k']}" if "k" in row else "")
        low, high = row["top1_ci95"]
        lines.append(
            f"| {name} | {content['data']['validation']} | {row['top1']:.1f} | {low:.1f} to {high:.1f} |"
        )
    return lines


# -- official --------------------------------------------------------------------------------------------------------


def write_official(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """A .pth under the names of official DINO and XCiT."""
    _, architecture, patch = resolve_architecture(backbone.arch)
    path = folder / f"dino_{architecture.official}_p{patch}.pth"
    with replacing(path) as beside:
        torch.save(
            to_official_names(
                {name: tensor.cpu() for name, tensor in backbone.state_dict().items()}
            ),
            beside,
        )
        _compare(backbone, load_backbone(beside, backbone.arch), "dino_xcit")
    return path


# -- torch.export and ONNX -------------------------------------------------------------------------------------------


def write_torch_export(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """A .pt2 of any batch and image size, for torch.export.load."""
    path = folder / f"{backbone.arch}.pt2"
    with replacing(path) as beside:
        torch.export.save(traced(backbone, config.attention), beside)
        _compare(backbone, torch.export.load(beside).module(), "torch.export")
    return path


def write_onnx(backbone: XCiT, folder: Path, config: ExportConfig) -> Path:
    """An .onnx of any batch and image size, in one file."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime"
        ) from None
    path = folder / f"{backbone.arch}.onnx"
    outputs = ["features", "attention"] if config.attention else ["features"]
    with replacing(path) as beside:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its every step
            program: Any = torch.onnx.export(
                traced(backbone, config.attention),
                input_names=["images"],
                output_names=outputs,
                dynamo=True,
            )
        program.save(str(beside), external_data=False)
        session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
        _compare(
            backbone,
            lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
            "onnxruntime",
        )
    return path


def traced(backbone: XCiT, maps: bool) -> torch.export.ExportedProgram:
    """The backbone as a graph of any batch, and any image of 2 to 512 patches on a side."""
    p = backbone.patch_size
    sides = [p * torch.export.Dim(name, min=SMALLEST, max=LARGEST) for name in ("rows", "columns")]
    shapes = ({0: torch.export.Dim("batch", min=1), 2: sides[0], 3: sides[1]},)
    example = torch.zeros(2, backbone.in_chans, 4 * p, 6 * p)
    return torch.export.export(
        FeaturesAndMaps(backbone, maps), (example,), dynamic_shapes=shapes, strict=False
    )


# -- checks ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _compare(backbone: XCiT, other: Callable[[Tensor], Any], name: str) -> None:
    """Raise RuntimeError if what was read back gives other features: of another batch and size than it was traced with."""
    p = backbone.patch_size
    images = torch.randn(
        3, backbone.in_chans, 7 * p, 3 * p, generator=torch.Generator().manual_seed(0)
    )
    expected, found = backbone(images), other(images)
    found = found[0] if isinstance(found, (tuple, list)) else found
    off = float((expected - found).abs().max() / expected.std())
    if not off < TOLERANCE:
        raise RuntimeError(f"{name} gives other features, by {off:.2g} of their standard deviation")
    say(f"{name}: the same features, to {off:.1g} of their standard deviation")


@contextlib.contextmanager
def _written_beside(place: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of another once it is whole."""
    beside = place.with_name(f".{place.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


WRITERS: dict[str, Callable[[XCiT, Path, ExportConfig], Path]] = {
    "timm": write_timm,
    "hf": write_hf,
    "official": write_official,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}
