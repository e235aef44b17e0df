"""Load a backbone from whatever names its weights, and save one.

Our files are safetensors with timm's names of the tensors. What the tensors do not hold
(architecture, channels, ablations, normalisation of the images) is in their metadata, as JSON
under `dino_xcit`. `formats.py` reads the files of others.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dino_xcit.errors import UserError
from dino_xcit.files import replacing
from dino_xcit.model.backbone import HUB, TIMM, Backbone
from dino_xcit.model.timm_backbone import TimmBackbone, is_timm, own_size
from dino_xcit.run_folder import CONFIG, LAST, METRICS, TEACHER, read_config
from dino_xcit.runtime import say
from dino_xcit.weights.build import build, load_strict, require_finite
from dino_xcit.weights.config_json import (
    CONFIG_JSON,
    IMAGENET,
    TIMM_FILES,
    framing_beside,
    timm_folder,
)
from dino_xcit.weights.formats import backbone_metadata, file_metadata, listed, select_network
from dino_xcit.weights.from_timm import from_timm
from dino_xcit.weights.reading import read_file, write_safetensors

if TYPE_CHECKING:
    from dino_xcit.config.pretrain import RunConfig

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


# -- loading a backbone ------------------------------------------------------------------------


def load_backbone(
    weights: str | Path,
    arch: str | None = None,
    checkpoint_key: str = "teacher",
    image_size: int | None = None,
) -> Backbone:
    """Load a backbone in eval mode on the CPU.

    It computes features of normalised images, `backbone(images)`: x -> (x - mean) / std of each
    channel with x in [0, 1]; `metadata` holds mean and std. `dino_xcit.preprocess(backbone)` makes
    such images of files, arrays and PIL's images.

    Args:
        weights: a run folder; a file of this toolkit, of official DINO or XCiT, or of anyone with
            timm's names; a folder of timm or Hugging Face with config.json and weights; timm:NAME,
            hf-hub:ORG/NAME, or the name of a published DINO checkpoint.
        arch: architecture; needed if neither the file nor its shapes give it.
        checkpoint_key: `teacher` or `student`, for files with both.
        image_size: side of the images in pixels. Networks of timm with learned positions get
            positions of this size. Default: the size of the weights.

    Returns:
        An `XCiT`, or a `TimmBackbone` for any other network of timm: normalised images
        (B, C, H, W) -> features (B, D). Its `metadata` holds what is known beside the tensors.

    Raises:
        UserError: there is nothing to load, the file is something else, its tensors do not fit one
            to one or are not finite, or the network does not take images of this size.
    """
    # A network is made with random weights first: the caller's random state stays.
    with torch.random.fork_rng(devices=[]):
        backbone = _load(str(weights), arch, checkpoint_key, image_size)
    require_finite(backbone.state_dict(), f"--weights {weights}")
    if image_size is not None:
        if isinstance(backbone, TimmBackbone):
            backbone.set_image_size(image_size)
            backbone.metadata["global_crops_size"] = image_size
        backbone.check_image_size(image_size, "image_size")
    return backbone


def _load(weights: str, arch: str | None, checkpoint_key: str, image_size: int | None) -> Backbone:
    if weights.startswith((TIMM, HUB)):
        return from_timm(weights, image_size)
    try:
        folder = None if arch else timm_folder(Path(weights))
        if folder is not None:
            return from_timm(f"{TIMM}local-dir:{folder}", image_size)
        return _from_file(find(weights), weights, arch, checkpoint_key)
    except (UserError, OSError) as error:
        raise UserError(f"--weights {weights} {error}") from None


def _from_file(path: Path, weights: str, arch: str | None, checkpoint_key: str) -> Backbone:
    """Load a file; messages of errors continue after its name."""
    content, metadata = read_file(path)
    metadata = file_metadata(content, metadata) | ({"arch": arch} if arch else {})
    backbone = build(metadata) if is_timm(metadata.get("arch", "")) else None
    names = backbone.state_dict() if backbone else ()
    checkpoint = select_network(content, metadata, (checkpoint_key,), names)
    metadata = checkpoint.metadata
    if "arch" not in metadata:
        raise UserError("has shapes of no architecture known here; name one with --arch")
    known = IMAGENET if weights in PUBLISHED else framing_beside(path, metadata["arch"])
    if isinstance(backbone, TimmBackbone):
        known = {"global_crops_size": own_size(backbone.network), **known}
    backbone = backbone or build({**known, **metadata})
    backbone.metadata = {**known, **metadata}
    try:
        load_strict(backbone, checkpoint.backbone)
    except UserError as error:
        raise UserError(f"does not fit {metadata['arch']}: {error}") from None
    if checkpoint.left_behind:
        say(f"--weights {weights}: left behind: {listed(checkpoint.left_behind)}")
    return backbone.eval()


def save_backbone(backbone: Backbone, config: RunConfig, path: Path) -> None:
    """Write a backbone of a run as safetensors."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    write_safetensors(tensors, path, backbone_metadata(config))


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


def read_run(weights: str) -> RunConfig | None:
    """Return the options of the run that the weights are of, if they are in a run folder."""
    folder = run_folder_of(weights)
    return None if folder is None else read_config(folder)


def find(weights: str) -> Path:
    """Return the file of a run folder, a path or a published name."""
    if weights in PUBLISHED:
        return _download(weights)
    path = Path(weights)
    if path.is_dir():
        files = [path / name for name in (TEACHER, LAST, *TIMM_FILES) if (path / name).exists()]
        if not files:
            raise UserError(
                f"is a folder without {TEACHER} or {LAST}, and without {CONFIG_JSON} beside "
                f"{' or '.join(TIMM_FILES)}; expected a run folder, or a folder of timm"
            )
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
