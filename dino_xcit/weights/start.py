"""Start a run from the weights of another: `pretrain --init_weights` and `--continue_from`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from timm.models import adapt_input_conv

from dino_xcit.errors import UserError
from dino_xcit.model.backbone import HUB, TIMM, Backbone
from dino_xcit.model.timm_backbone import TimmBackbone, is_timm, own_size
from dino_xcit.weights.build import load_strict, require_finite
from dino_xcit.weights.formats import Checkpoint, describe, file_metadata, listed, select_network
from dino_xcit.weights.from_timm import create_pretrained
from dino_xcit.weights.load import find
from dino_xcit.weights.reading import read_file

if TYPE_CHECKING:
    import torch

    from dino_xcit.model.dino import DINOHead, DINOLoss
    from dino_xcit.weights.reading import Tensors

RGB = 3  # channels from which a first convolution can be adapted


class NetworkWithHead(Protocol):
    """Student or teacher of a run."""

    backbone: Backbone
    head: DINOHead


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
    of_student, of_teacher = _open_networks(weights, flag, student.backbone)
    taken = ["backbone"]
    for name, network, checkpoint in (
        ("student", student, of_student),
        ("teacher", teacher, of_teacher),
    ):
        adapted = _load_backbone(network.backbone, checkpoint, f"--{flag} {weights}")
        if adapted and adapted not in taken:
            taken.append(adapted)
        if _shapes(network.head.state_dict()) == _shapes(checkpoint.head):
            load_strict(network.head, checkpoint.head)
            taken.append(f"the {name}'s head")
    center = of_teacher.center
    if center is not None and center.shape == loss.center.shape:
        loss.center.copy_(center)
        taken.append("center")
    if of_teacher.left_behind:
        taken.append(f"without {listed(of_teacher.left_behind)}")
    return taken


def _load_backbone(backbone: Backbone, checkpoint: Checkpoint, what: str) -> str:
    """Load the tensors; returns a phrase about a first convolution of other channels, or ""."""
    require_finite(checkpoint.backbone, what)
    tensors, adapted = _for_channels(checkpoint.backbone, backbone, what)
    try:
        load_strict(backbone, tensors)
    except UserError as error:
        arch = checkpoint.metadata.get("arch")
        if arch not in (None, backbone.arch):
            raise UserError(
                f"{what} holds {arch}, which does not fit --arch {backbone.arch}; set --arch {arch}"
            ) from None
        raise UserError(f"{what} does not fit --arch {backbone.arch}: {error}") from None
    return adapted


def _for_channels(tensors: Tensors, backbone: Backbone, what: str) -> tuple[Tensors, str]:
    """Adapt a first convolution of 3 channels to those of the backbone, as timm does.

    One channel: its weights are the sum over red, green and blue. More: they are repeated and
    scaled, so the sum over the channels stays.
    """
    channels = backbone.in_chans
    others = {
        name: tensor.shape[1]
        for name, expected in backbone.state_dict().items()
        if expected.ndim == 4 and (tensor := tensors.get(name)) is not None
        # The same convolution of other channels.
        if tensor.shape[1] != expected.shape[1] == channels
        and (tensor.shape[0], *tensor.shape[2:]) == (expected.shape[0], *expected.shape[2:])
    }
    if not others:
        return tensors, ""
    found = next(iter(others.values()))
    if found != RGB:
        raise UserError(
            f"{what} has {found} channels, this run --in_chans {channels}: only weights of {RGB} "
            f"channels can be adapted; set --in_chans {found}"
        )
    adapted = {name: adapt_input_conv(channels, tensors[name]) for name in others}
    change = "summed over" if channels == 1 else "repeated and scaled from"
    return {**tensors, **adapted}, f"its first convolution {change} {RGB} channels"


def _open_networks(weights: str, flag: str, backbone: Backbone) -> tuple[Checkpoint, Checkpoint]:
    """Return the student and the teacher of a file; the same network twice if it has only one."""
    if weights.startswith((TIMM, HUB)):
        # Positions of the run's image size.
        size = own_size(backbone.network) if isinstance(backbone, TimmBackbone) else None
        tensors = create_pretrained(weights, flag, size).state_dict()
        try:
            metadata = describe(tensors)
        except UserError:  # of another network than XCiT
            metadata = {"arch": weights}
        checkpoint = Checkpoint(backbone=tensors, metadata=metadata)
        return checkpoint, checkpoint
    names = backbone.state_dict() if is_timm(backbone.arch) else {}
    try:
        content, metadata = read_file(find(weights))
        metadata = file_metadata(content, metadata)
        return (
            select_network(content, metadata, ("student", "teacher"), names),
            select_network(content, metadata, ("teacher", "student"), names),
        )
    except (UserError, OSError) as error:
        raise UserError(f"--{flag} {weights} {error}") from None


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
