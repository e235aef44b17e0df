"""Load a backbone from whatever names its weights, and save one.

Our files are safetensors with timm's names of the tensors. What the tensors do not hold
(architecture, channels, ablations, normalisation of the images) is in their metadata, as JSON
under `dino_xcit`. `formats.py` reads the files of others.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

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
    read_file,
    select_network,
    write_safetensors,
)

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import PretrainConfig
    from dino_xcit.model.dino import DINOHead, DINOLoss

# The checkpoints that the DINO authors published. They published no hashes.
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
    "a run folder, a .ckpt, .safetensors or .pth file, timm:NAME, hf-hub:ORG/NAME, or a published "
    f"checkpoint: {', '.join(PUBLISHED)}"
)
LONGEST_REASON = 300  # characters of another library's message


class NetworkWithHead(Protocol):
    """Student or teacher of a run."""

    backbone: Backbone
    head: DINOHead


# -- loading a backbone ------------------------------------------------------------------------


def load_backbone(
    weights: str | Path, arch: str | None = None, checkpoint_key: str = "teacher"
) -> Backbone:
    """Load a backbone in eval mode on the CPU.

    Args:
        weights: a run folder; a file of this toolkit, of official DINO or XCiT, or of anyone with
            timm's names; timm:NAME, hf-hub:ORG/NAME, or the name of a published DINO checkpoint.
        arch: architecture; needed if neither the file nor its shapes give it.
        checkpoint_key: `teacher` or `student`, for files with both.

    Returns:
        An `XCiT`, or a `TimmBackbone` for any other network of timm: normalised images
        (B, C, H, W) -> features (B, D). Its `metadata` holds what is known beside the tensors.

    Raises:
        UserError: there is nothing to load, the file is something else, or its tensors do not fit
            one to one.
    """
    # A network is made with random weights first: the caller's random state stays.
    with torch.random.fork_rng(devices=[]):
        return _load(str(weights), arch, checkpoint_key)


def _load(weights: str, arch: str | None, checkpoint_key: str) -> Backbone:
    if weights.startswith((TIMM, HUB)):
        return _from_timm(weights)
    try:
        checkpoint = read_checkpoint(_find(weights), (checkpoint_key,), arch)
    except (UserError, OSError) as error:
        raise UserError(f"--weights {weights} {error}") from None
    metadata = checkpoint.metadata
    if "arch" not in metadata:
        raise UserError(
            f"--weights {weights}: its shapes are of no architecture known here; "
            "name one with --arch"
        )
    backbone = build(metadata)
    try:
        load_strict(backbone, checkpoint.backbone)
    except UserError as error:
        raise UserError(f"--weights {weights} does not fit {metadata['arch']}: {error}") from None
    return backbone.eval()


def build(metadata: dict[str, Any]) -> Backbone:
    """Build the network that the metadata of weights describe, with random weights."""
    backbone = build_backbone(
        metadata["arch"],
        in_chans=metadata.get("in_chans", 3),
        image_size=metadata.get("global_crops_size", 224),
        ablations={name: metadata[name] for name in ABLATIONS if name in metadata},
    )
    backbone.metadata = metadata
    return backbone


def load_strict(network: nn.Module, tensors: Tensors) -> None:
    """Load tensors that must be those of the network, one to one.

    Only the counters of batch norms, which nothing reads, may be missing: old official files lack
    them.

    Raises:
        UserError: lists tensors that are missing, left over or of another shape.
    """
    expected = network.state_dict()
    counters = {n: t for n, t in expected.items() if n.endswith("num_batches_tracked")}
    tensors = {**{n: t for n, t in counters.items() if n not in tensors}, **tensors}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected
            if name in tensors and tensors[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise UserError(
            "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        )
    network.load_state_dict(tensors, strict=True)


def save_backbone(backbone: Backbone, config: PretrainConfig, path: Path) -> None:
    """Write a backbone of a run as safetensors."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    write_safetensors(tensors, path, backbone_metadata(config))


# -- starting a run ----------------------------------------------------------------------------


def start_from(
    weights: str, student: NetworkWithHead, teacher: NetworkWithHead, loss: DINOLoss
) -> str:
    """Load `--init_weights` into the networks of a new run.

    Returns:
        A line that lists what was taken and what starts anew.

    Raises:
        UserError: as `load_networks`.
    """
    taken = load_networks(weights, student, teacher, loss, "init_weights")
    parts = ("the student's head", "the teacher's head", "center")
    anew = [*(part for part in parts if part not in taken), "optimizer", "schedules"]
    return f"starting from {weights}: {', '.join(taken)}; anew: {', '.join(anew)}"


def load_networks(
    weights: str, student: NetworkWithHead, teacher: NetworkWithHead, loss: DINOLoss, flag: str
) -> list[str]:
    """Load weights into student, teacher and the loss's center.

    Student and teacher take their own where the file has both, else the same. Heads and center are
    taken if the file has them in this run's shapes.

    Returns:
        What was taken.

    Raises:
        UserError: the weights do not load, or are of another backbone; the message names the flag.
    """
    of_student, of_teacher = _open_networks(weights, flag)
    taken = ["backbone"]
    for name, network, checkpoint in (
        ("student", student, of_student),
        ("teacher", teacher, of_teacher),
    ):
        try:
            load_strict(network.backbone, checkpoint.backbone)
        except UserError as error:
            raise UserError(
                f"--{flag} {weights} does not fit --arch {network.backbone.arch}: {error}"
            ) from None
        if _shapes(network.head.state_dict()) == _shapes(checkpoint.head):
            load_strict(network.head, checkpoint.head)
            taken.append(f"the {name}'s head")
    center = of_teacher.center
    if center is not None and center.shape == loss.center.shape:
        loss.center.copy_(center)
        taken.append("center")
    return taken


def _open_networks(weights: str, flag: str) -> tuple[Checkpoint, Checkpoint]:
    """Return the student and the teacher of a file; the same network twice if it has only one."""
    if weights.startswith((TIMM, HUB)):
        network = _create_pretrained(weights, flag)
        checkpoint = Checkpoint(backbone=network.state_dict(), metadata={})
        return checkpoint, checkpoint
    try:
        content, metadata = read_file(_find(weights))
        return (
            select_network(content, metadata, ("student", "teacher")),
            select_network(content, metadata, ("teacher", "student")),
        )
    except (UserError, OSError) as error:
        raise UserError(f"--{flag} {weights} {error}") from None


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


# -- run folders, files and downloads ----------------------------------------------------------


def run_folder_of(weights: str) -> Path | None:
    """Return the run folder that these weights are, or are in; None if there is none."""
    if weights.startswith((TIMM, HUB)) or weights in PUBLISHED:
        return None
    path = Path(weights)
    for folder in (path, *list(path.parents)[:2]):
        of_run = any((folder / name).exists() for name in (METRICS, TEACHER, LAST))
        if of_run and (folder / CONFIG).is_file():  # config.yaml alone may be another program's
            return folder
    return None


def read_run(weights: str) -> PretrainConfig | None:
    """Return the options of the run that the weights are of, if they are in a run folder."""
    folder = run_folder_of(weights)
    return None if folder is None else read_config(folder)


def _find(weights: str) -> Path:
    """Return the file of a run folder, a path or a published name."""
    if weights in PUBLISHED:
        return _download(weights)
    path = Path(weights)
    if path.is_dir():
        files = [path / name for name in (TEACHER, LAST) if (path / name).exists()]
        if not files:
            raise UserError(f"is a folder without {TEACHER} or {LAST}; expected a run folder")
        return files[0]
    if not path.exists():
        raise UserError(f"does not exist; expected {EXPECTED}")
    return path


def _download(name: str) -> Path:
    """Return a published checkpoint in torch.hub's cache, downloaded if it is not there.

    Raises:
        UserError: it could not be downloaded in the length that the server gives.
    """
    url = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url) as answer:
                length = int(answer.headers.get("Content-Length", 0))
            torch.hub.download_url_to_file(url, str(temporary))
            if temporary.stat().st_size != length:
                raise OSError(f"{temporary.stat().st_size} bytes came of {length}")
    except OSError as error:
        raise UserError(f"could not be fetched ({error}); put {url} at {path}") from None
    return path


# -- timm --------------------------------------------------------------------------------------


def _from_timm(weights: str) -> Backbone:
    """Return a pretrained network of timm; an XCiT as ours if it is of a size that ours has."""
    network = _create_pretrained(weights, "weights")
    data = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
    channels, size, _ = data["input_size"]
    metadata = {
        "in_chans": channels,
        "global_crops_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    if isinstance(network, timm.models.xcit.Xcit):
        tensors = network.state_dict()
        arch = describe(tensors).get("arch")
        if arch is not None:
            backbone = build({**metadata, "arch": arch})
            load_strict(backbone, tensors)
            return backbone.eval()
    wrapped = TimmBackbone(network, weights, in_chans=channels)
    wrapped.metadata = {**metadata, "arch": weights}
    return wrapped.eval()


def _create_pretrained(weights: str, flag: str) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(
            weights.removeprefix(TIMM), pretrained=True, num_classes=0
        )
    except Exception as error:  # timm, Hugging Face and the network each have their own
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"--{flag} {weights} could not be loaded: {reason}") from error
    return network
