"""Whatever names weights -> backbone; backbone -> file.

Our files are safetensors with timm's parameter names; what the tensors do not say (architecture, channels, ablations, how
images were normalised) is in their metadata as JSON, under `dino_xcit`. Files of others: `formats.py`.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.model.architectures import ABLATIONS
from dino_xcit.model.backbone import HUB, TIMM, Backbone
from dino_xcit.model.build import build_backbone
from dino_xcit.model.timm_backbone import TimmBackbone
from dino_xcit.run_folder import CONFIG, LAST, METRICS, TEACHER, read_config
from dino_xcit.weights.formats import (
    Checkpoint,
    Tensors,
    backbone_metadata,
    describe,
    listed,
    read_checkpoint,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dino_xcit.config.pretrain import PretrainConfig


def load_strict(network: nn.Module, tensors: Tensors) -> None:
    """Load strictly. Raises ValueError that lists what is missing, left over or of another shape."""
    expected = network.state_dict()
    # Official files of old lack the counters of batch norms, which nothing reads.
    counters = {
        name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")
    }
    tensors = {
        **{name: tensor for name, tensor in counters.items() if name not in tensors},
        **tensors,
    }
    shared = expected.keys() & tensors.keys()
    found = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected
            if name in shared and tensors[name].shape != expected[name].shape
        ],
    }
    if any(found.values()):
        raise UserError(
            "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)
        )
    network.load_state_dict(tensors, strict=True)


# The checkpoints that the DINO authors published; the archive says no hashes.
PUBLISHED = {
    name: f"https://dl.fbaipublicfiles.com/dino/{name}_pretrain/{name}_pretrain.pth"
    for name in (
        "dino_xcit_small_12_p16",
        "dino_xcit_small_12_p8",
        "dino_xcit_medium_24_p16",
        "dino_xcit_medium_24_p8",
    )
}
EXPECTED = (
    "a run folder, a .ckpt, .safetensors or .pth file, timm:NAME, hf-hub:ORG/NAME, or a published checkpoint: "
    f"{', '.join(PUBLISHED)}"
)


def save_backbone(backbone: Backbone, config: PretrainConfig, path: Path) -> None:
    """Write the weights as safetensors."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    write_safetensors(tensors, path, backbone_metadata(config))


def load_backbone(
    weights: str | Path, arch: str | None = None, checkpoint_key: str = "teacher"
) -> Backbone:
    """Weights by whatever names them -> the backbone in eval mode, on CPU: images (B, C, H, W) -> features (B, D).

    weights: a run folder, a file of ours, of official DINO or XCiT or of anyone with timm's names, timm:NAME,
    hf-hub:ORG/NAME, or the name of a published DINO checkpoint. An `XCiT`, or with timm: and hf-hub: whatever that is.
    arch is needed where neither the file nor its shapes say it. checkpoint_key: `teacher` or `student`, where a file holds
    both. The backbone's `metadata` has what is known beside the tensors.
    Raises ValueError in one line if there is nothing to load, the file is something else, or tensors do not fit one to one.
    """
    weights = str(weights)
    if weights.startswith((TIMM, HUB)):
        return _from_timm(weights)
    checkpoint = open_checkpoint(weights, (checkpoint_key,))
    metadata = {**checkpoint.metadata, **({"arch": arch} if arch else {})}
    if "arch" not in metadata:
        raise UserError(
            f"--weights {weights}: its shapes are of no architecture known here; name one with --arch"
        )
    backbone = build(metadata)
    try:
        load_strict(backbone, checkpoint.backbone)
    except ValueError as error:
        raise UserError(f"--weights {weights} does not fit {metadata['arch']}: {error}") from None
    return backbone.eval()


def open_checkpoint(weights: str, networks: Sequence[str], flag: str = "weights") -> Checkpoint:
    """What a run folder, a file or a published name holds of the first of these networks that is there.

    Raises ValueError, naming the flag, as `load_backbone` does.
    """
    try:
        path = _download(weights) if weights in PUBLISHED else _file(weights)
        return read_checkpoint(path, networks)
    except (ValueError, OSError) as error:
        raise UserError(f"--{flag} {weights} {error}") from None


def start_from(weights: str, student: Any, teacher: Any, loss: Any) -> str:
    """Fill the networks of a run that begins -> a line that tells what was taken. Raises ValueError as `fill_networks`."""
    taken = load_networks(weights, student, teacher, loss, "init_weights")
    anew = [
        part for part in ("the student's head", "the teacher's head", "center") if part not in taken
    ]
    return f"starting from {weights}: {', '.join(taken)}; anew: {', '.join([*anew, 'optimizer', 'schedules'])}"


def load_networks(weights: str, student: Any, teacher: Any, loss: Any, flag: str) -> list[str]:
    """Fill networks, each with a `backbone` and a `head`, and the loss's center -> what was taken.

    Student and teacher take their own where the file has both, else the same. Heads and center are taken where the file has
    them in this run's shapes. Raises ValueError if the weights do not load or are of another backbone.
    """
    taken = ["backbone"]
    for networks, network in ((("student", "teacher"), student), (("teacher", "student"), teacher)):
        if weights.startswith((TIMM, HUB)):
            checkpoint = Checkpoint(backbone=_from_timm(weights, flag).state_dict(), metadata={})
        else:
            checkpoint = open_checkpoint(weights, networks, flag)
        try:
            load_strict(network.backbone, checkpoint.backbone)
        except ValueError as error:
            raise UserError(
                f"--{flag} {weights} does not fit --arch {network.backbone.arch}: {error}"
            ) from None
        if _shapes(network.head.state_dict()) == _shapes(checkpoint.head):
            load_strict(network.head, checkpoint.head)
            taken.append(f"the {networks[0]}'s head")
    if checkpoint.center is not None and checkpoint.center.shape == loss.center.shape:
        loss.center.copy_(checkpoint.center)
        taken.append("center")
    return taken


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def build(metadata: dict[str, Any]) -> Backbone:
    """The network that the metadata describe, with new weights."""
    backbone = build_backbone(
        metadata["arch"],
        in_chans=metadata.get("in_chans", 3),
        image_size=metadata.get("global_crops_size", 224),
        ablations={name: metadata[name] for name in ABLATIONS if name in metadata},
    )
    backbone.metadata = metadata
    return backbone


def run_folder_of(weights: str) -> Path | None:
    """The run folder in which these weights are, or which they name; None if there is none."""
    if weights.startswith((TIMM, HUB)) or weights in PUBLISHED:
        return None
    path = Path(weights)
    for folder in (path, *list(path.parents)[:2]):
        # A config.yaml alone may be another program's.
        if (folder / CONFIG).is_file() and any(
            (folder / name).exists() for name in (METRICS, TEACHER, LAST)
        ):
            return folder
    return None


def read_run(weights: str) -> PretrainConfig | None:
    """The options of the run that the weights are of, if they are in a run folder."""
    folder = run_folder_of(weights)
    return None if folder is None else read_config(folder)


def _file(weights: str) -> Path:
    path = Path(weights)
    if path.is_dir():
        found = next((path / name for name in (TEACHER, LAST) if (path / name).exists()), None)
        if found is None:
            raise UserError(f"is a folder without {TEACHER} or {LAST}; expected a run folder")
        path = found
    if not path.exists():
        raise UserError(f"does not exist; expected {EXPECTED}")
    return path


def _download(name: str) -> Path:
    """A published checkpoint in torch.hub's cache: fetched once, with progress, and as long as its server says."""
    url = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as beside:
            with urllib.request.urlopen(url) as answer:
                length = int(answer.headers["Content-Length"])
            torch.hub.download_url_to_file(url, str(beside))
            if beside.stat().st_size != length:
                raise OSError(f"{beside.stat().st_size} bytes came of {length}")
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UserError(f"could not be fetched ({error}); put {url} at {path}") from None
    return path


def _from_timm(weights: str, flag: str = "weights") -> Backbone:
    import timm

    network: Any
    try:
        network = timm.create_model(weights.removeprefix(TIMM), pretrained=True, num_classes=0)
    except Exception as error:  # timm, Hugging Face and the network each have their own
        raise UserError(
            f"--{flag} {weights} could not be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    data = timm.data.resolve_data_config({}, model=network)
    channels, size, _ = data["input_size"]
    metadata = {
        "in_chans": channels,
        "global_crops_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    if not isinstance(network, timm.models.xcit.Xcit):
        wrapped = TimmBackbone(network, weights)
        wrapped.metadata = {**metadata, "arch": weights}
        return wrapped.eval()
    tensors = network.state_dict()
    backbone = build({**metadata, "arch": describe(tensors)["arch"]})
    load_strict(backbone, tensors)
    return backbone.eval()
