"""Weights -> a backbone that gives attention maps, and its result for one image."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dino_xcit.config.pretrain import RunConfig
from dino_xcit.data.framing import SMALL
from dino_xcit.errors import UserError
from dino_xcit.figures.framing import Framing, without_padding
from dino_xcit.figures.maps import AttentionMaps, attention_maps, check_layer
from dino_xcit.model.architectures import CLASS_ATTENTION_LAYERS
from dino_xcit.model.xcit import XCiT, with_class_attention
from dino_xcit.run_folder import KEPT_CHECKPOINTS, LAST, TEACHER
from dino_xcit.runtime import HALF, resolve_precision
from dino_xcit.weights.load import load_backbone, run_folder_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from dino_xcit.config.attention import AttentionConfig

OFFICIAL_SIZE = 480  # pixels, of official visualize_attention.py
LONGEST_REASON = 200  # characters of torch's message in ours


@dataclass(frozen=True, kw_only=True)
class AttentionResult:
    """Maps of one image by one backbone; `AttentionMaps` without the batch, as arrays."""

    name: str
    """file name of the image without its ending, unique within a command"""
    model: str = ""
    """title of the backbone"""
    image: np.ndarray
    """uint8 (H, W, channels): input without padding; the last patches may reach beyond it"""
    patch: int
    """side of a patch in pixels"""
    attention: np.ndarray
    queries: np.ndarray | None = None
    keys: np.ndarray | None = None
    covariance: np.ndarray | None = None
    features: np.ndarray | None = None


class AttentionModel:
    """A backbone that maps uint8 images to attention maps, with its weights' normalisation.

    Raises:
        UserError: the weights do not load, or have no such layer or head.
    """

    def __init__(
        self, title: str, weights: str, config: AttentionConfig, device: torch.device
    ) -> None:
        self.title, self.weights, self.config, self.device = title, weights, config, device
        with torch.random.fork_rng(devices=[]):  # a network is built with random weights first
            loaded = load_backbone(weights, config.arch, config.checkpoint_key)
        try:
            backbone = with_class_attention(loaded)
        except UserError as error:
            raise UserError(f"--weights {weights}: {error}") from None
        self.use(backbone)
        check_layer("layer", config.layer, CLASS_ATTENTION_LAYERS)
        check_layer("xca_layer", config.xca_layer, len(backbone.blocks))
        missing = [head for head in config.head if head >= backbone.heads]
        if missing:
            raise UserError(
                f"--head is {missing[0]}; {backbone.arch} has the heads 0 to {backbone.heads - 1}"
            )

    def use(self, backbone: XCiT) -> None:
        """Take another backbone; `with_backbone` leaves this model as it is.

        Raises:
            UserError: the weights do not hold the normalisation of their channels.
        """
        self.backbone = backbone.to(self.device).eval()
        self.channels = backbone.in_chans
        options = {**dataclasses.asdict(RunConfig()), **backbone.metadata}
        self.mean, self.std = (
            self._normalisation(flag, getattr(self.config, flag), options[flag])
            for flag in ("mean", "std")
        )
        crop, requested = options["global_crops_size"], self.config.image_size
        default = crop if crop < SMALL else OFFICIAL_SIZE
        self.long_side = default if requested is None else requested

    def _normalisation(self, flag: str, named: Sequence[float], known: Sequence[float]) -> Tensor:
        """The mean or std, (C, 1, 1): as the flag names it, else as the weights hold it."""
        values = named or known
        if len(values) != self.channels:
            found = f"--{flag} has {len(named)} values" if named else f"the file holds no {flag}"
            expected = f"expected --{flag} with one value for each channel, from 0 to 1"
            raise UserError(
                f"--weights {self.weights} takes {self.channels}-channel images, and {found}; "
                f"{expected}"
            )
        return torch.tensor(values, device=self.device)[:, None, None]

    @property
    def assumed(self) -> list[str]:
        """What neither the weights nor the options hold, so that ImageNet's is taken."""
        return [
            flag
            for flag in ("mean", "std")
            if not getattr(self.config, flag) and flag not in self.backbone.metadata
        ]

    def with_backbone(self, backbone: XCiT, title: str) -> AttentionModel:
        """A model of the same options with another backbone."""
        other = copy.copy(self)
        other.title = title
        other.use(backbone)
        return other

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, *, features: bool = False, xca: bool = False
    ) -> AttentionMaps:
        """Compute the maps of a batch in one pass.

        Args:
            images: uint8 (B, C, H, W), of sides that the patch size divides.
            features: whether to return patch features.
            xca: whether to return queries, keys and covariance of `--xca_layer`.
        """
        x = (images.to(self.device).float() / 255 - self.mean) / self.std
        half = HALF.get(resolve_precision(self.config))
        layer, xca_layer = self.config.layer, self.config.xca_layer if xca else None
        with torch.autocast(self.device.type, half, enabled=half is not None):
            return attention_maps(
                self.backbone, x, layer=layer, xca_layer=xca_layer, features=features
            )


def attention_result(
    name: str,
    image: Tensor,
    model: AttentionModel,
    framing: Framing,
    *,
    features: bool = False,
    xca: bool = False,
) -> AttentionResult:
    """Frame an image and compute its maps.

    Args:
        name: of the result.
        image: uint8 (C, H, W) of any size.
        model: the backbone.
        framing: how the image is framed.
        features: whether to return patch features.
        xca: whether to return queries, keys and covariance.

    Raises:
        UserError: there is too little memory, the image is smaller than a patch, or maps are not
            finite.
    """
    framing.check(*image.shape[-2:])
    pixels, size = framing.apply(image)
    try:
        maps = finite_maps(model(pixels[None], features=features, xca=xca), model)
    except (MemoryError, RuntimeError) as error:  # `Framing.check` is an estimate
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"{size[1]} x {size[0]} pixels: {reason}; lower --image_size") from error
    arrays: dict[str, Any] = {
        key: None if of_batch is None else of_batch[0].cpu().numpy()
        for key, of_batch in maps._asdict().items()
    }
    image_array = without_padding(pixels, size)
    patch = model.backbone.patch_size
    return AttentionResult(name=name, model=model.title, image=image_array, patch=patch, **arrays)


def finite_maps(maps: AttentionMaps, model: AttentionModel) -> AttentionMaps:
    """Return the maps.

    Raises:
        UserError: they have values that are not finite.
    """
    for kind, of_kind in maps._asdict().items():
        if of_kind is not None and not bool(of_kind.isfinite().all()):
            raise UserError(
                f"--weights {model.weights}: values of its {kind} are not finite: its tensors are "
                f"not, or they overflow in --precision {model.config.precision}"
            )
    return maps


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a failed allocation.

    torch has a class for it on GPUs alone. On the CPU and on MPS it raises a bare RuntimeError,
    whose text is all there is to go by.
    """
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(text in " ".join(str(error).split()) for text in texts)


# -- the models of a command -----------------------------------------------------------------------


def open_models(config: AttentionConfig, device: torch.device) -> list[AttentionModel]:
    """One model for each of `--weights`, titled by `--names`, else by its folder or file.

    Raises:
        UserError: weights do not load, or have no such layer or head.
    """
    titles = _titles(config)
    return [
        AttentionModel(title, weights, config, device)
        for title, weights in zip(titles, config.weights, strict=True)
    ]


def _titles(config: AttentionConfig) -> list[str]:
    if config.names:
        return list(config.names)
    titles = [
        (run_folder_of(weights) or Path(weights.replace(":", "_"))).name
        for weights in config.weights
    ]
    if len(set(titles)) < len(titles):
        titles = list(config.weights)
    if len(set(titles)) < len(titles):
        titles = [f"{title}, {number}" for number, title in enumerate(titles)]
    return titles


def open_checkpoints(config: AttentionConfig, device: torch.device) -> list[AttentionModel]:
    """One model for each checkpoint that the run kept, in the order of the epochs.

    The finished teacher comes last, unless it equals the last of the checkpoints.

    Raises:
        UserError: `--weights` is not a run folder that kept checkpoints.
    """
    folder = run_folder_of(config.weights[0])
    kept = sorted(folder.glob(KEPT_CHECKPOINTS)) if folder else []
    if not folder or not kept:
        raise UserError(
            f"--figures training: --weights {config.weights[0]} is not a run folder that kept "
            "checkpoints; pretrain --saveckp_freq N keeps one every N epochs"
        )
    models = [
        AttentionModel(f"epoch {int(path.stem.removeprefix('epoch'))}", str(path), config, device)
        for path in kept
    ]
    last = next((folder / name for name in (TEACHER, LAST) if (folder / name).exists()), kept[-1])
    final = AttentionModel("last", str(last), config, device)
    states = (model.backbone.state_dict().values() for model in (models[-1], final))
    same = all(torch.equal(*pair) for pair in zip(*states, strict=True))
    return models if same else [*models, final]
