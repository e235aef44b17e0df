"""Any timm network with one feature vector per image (ViT, ResNet, ConvNeXt) as a `Backbone`.

It differs from the network itself in one point: the factors of stochastic depth come with the
images, as for XCiT, instead of being sampled on the device. The drop rate is the same in all layers
to which timm gives stochastic depth (usually all but the first), instead of rising with depth.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.model.backbone import HUB, TIMM, Backbone

if TYPE_CHECKING:
    from collections.abc import Mapping

PATCH_SIZE = 16
"""for networks that do not state the stride of their last features"""
PREFIX = "network."


class SampledDropPath(nn.Module):
    """Stochastic depth of one residual branch with factors that are set before the forward pass."""

    factors: Tensor | None = None
    """one per sample, (B,); None: 1"""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each sample of x, (B, ...), by its factor."""
        if self.factors is None:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class TimmBackbone(Backbone):
    """A timm network without its classifier. Its state dict has timm's names.

    Args:
        network: made by `timm.create_model(..., num_classes=0)`.
        arch: its name, with the prefix `timm:` or `hf-hub:`.
        in_chans: channels of the images that it was made for.
        sampled_paths: whether `forward` takes `paths`. False: the network samples stochastic depth
            by itself, if it has any.

    Raises:
        UserError: the network does not return one feature vector per image.
    """

    def __init__(
        self, network: nn.Module, arch: str, *, in_chans: int, sampled_paths: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.arch = arch
        self.metadata = {}
        self.in_chans = in_chans
        # The head of some networks (MobileNetV3) widens the pooled features.
        width = getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None)
        if not hasattr(network, "forward_features") or not isinstance(width, int):
            raise UserError(f"{arch} does not return one feature vector per image")
        self.embed_dim = width
        stages = getattr(network, "feature_info", None)
        self.patch_size = int(stages[-1]["reduction"]) if stages else PATCH_SIZE
        self._drop_paths = _replace_drop_paths(network) if sampled_paths else []
        self.path_shape = (len(self._drop_paths), 1) if self._drop_paths else (0, 0)
        self.register_state_dict_post_hook(_remove_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return repr(self.network)

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        self._set_paths(paths)
        features: Tensor = self.network(images)
        return features

    def patch_tokens(self, images: Tensor) -> Tensor:
        """See `Backbone.patch_tokens`; a cell of a convolutional network's grid is a patch."""
        self._set_paths(None)
        network: Any = self.network
        tokens: Tensor = network.forward_features(images)
        if tokens.ndim == 3:  # (B, prefix + N, C)
            return tokens[:, getattr(network, "num_prefix_tokens", 0) :]
        if getattr(network, "output_fmt", "NCHW") == "NHWC":  # Swin
            return tokens.flatten(1, 2)
        return tokens.flatten(2).mT

    def set_image_size(self, size: int) -> None:
        """Resample learned positions for square images, of networks that can and need it."""
        network: Any = self.network
        if hasattr(network, "set_input_size") and not getattr(network, "dynamic_img_size", False):
            with contextlib.suppress(AssertionError):  # no multiple of the patch
                network.set_input_size(img_size=(size, size))

    def check_image_size(self, size: int, flag: str) -> None:
        """See `Backbone.check_image_size`; computes the feature of one image."""
        device = next(self.parameters()).device
        image = torch.zeros(1, self.in_chans, size, size, device=device)
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                shape = tuple(self.network(image).shape)
        except (AssertionError, RuntimeError, ValueError) as error:  # each network has its own
            reason = " ".join(str(error).split())
            raise UserError(
                f"--{flag} {size}: {self.arch} does not take images of this size ({reason}); "
                f"set --{flag} to a multiple of {self.patch_size}, or larger"
            ) from error
        finally:
            self.train(was_training)
        if shape != (1, self.embed_dim):
            raise UserError(
                f"--arch {self.arch} returns features of the shape {shape} for one image; expected "
                f"a network that returns one vector, (1, {self.embed_dim})"
            )

    def _set_paths(self, paths: Tensor | None) -> None:
        """Set the factors of the coming forward pass, (B, layers, 1)."""
        for layer, drop_path in enumerate(self._drop_paths):
            drop_path.factors = None if paths is None else paths[:, layer, 0]


def build_timm(
    arch: str, *, in_chans: int, image_size: int | None, sampled_paths: bool
) -> TimmBackbone:
    """Build a timm network with random weights.

    Args:
        arch: `timm:NAME` or `hf-hub:ORG/NAME`.
        in_chans: channels of the images.
        image_size: side of the largest images in pixels.
        sampled_paths: whether stochastic depth comes with the images. A network that has none
            keeps `path_shape` (0, 0).

    Raises:
        UserError: timm cannot build it, or it does not return one feature vector per image.
    """
    # Any rate above 0 creates the layers that `_replace_drop_paths` replaces.
    depth = {"drop_path_rate": 0.1} if sampled_paths else {}
    necessary = {"num_classes": 0, "in_chans": in_chans, "pretrained": False}
    try:
        network = create_network(arch.removeprefix(TIMM), image_size, depth, **necessary)
    except (OSError, RuntimeError, ValueError) as error:  # of the hub, of unknown names, of sizes
        raise UserError(f"--arch {arch}: {' '.join(str(error).split())}") from error
    except TypeError:
        raise UserError(
            f"--arch {arch} takes no in_chans or num_classes; expected another network of timm"
        ) from None
    return TimmBackbone(network, arch, in_chans=in_chans, sampled_paths=sampled_paths)


def own_size(network: Any) -> int:
    """Return the side of the images of a timm network: of its positions, else as timm states it."""
    sides = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int((sides or network.pretrained_cfg["input_size"])[-1])


def create_network(
    name: str,
    image_size: int | None,
    optional: Mapping[str, Any] | None = None,
    **necessary: Any,
) -> nn.Module:
    """Call `timm.create_model` with all options that the network takes.

    A network refuses an option that it does not know by a TypeError. Those with learned positions
    know `img_size`, and some of them `dynamic_img_size`, which local crops need.

    Args:
        name: of the network, without `timm:`.
        image_size: side of the images in pixels; None: the network's own.
        optional: options that the network need not take.
        **necessary: options that it has to take.

    Raises:
        TypeError: it does not take them.
    """
    others = dict(optional or {})
    if image_size is not None:
        size: dict[str, Any] = {"img_size": image_size}
        for options in ({**size, "dynamic_img_size": True, **others}, {**size, **others}):
            with contextlib.suppress(TypeError):
                return timm.create_model(name, **necessary, **options)
    if others:
        with contextlib.suppress(TypeError):
            return timm.create_model(name, **necessary, **others)
    return timm.create_model(name, **necessary)


def is_timm(arch: str) -> bool:
    """Whether the name is `timm:NAME` of another network than XCiT, or `hf-hub:ORG/NAME`."""
    return arch.startswith((TIMM, HUB)) and not arch.startswith(f"{TIMM}xcit_")


def _replace_drop_paths(network: nn.Module) -> list[SampledDropPath]:
    """Replace the network's stochastic depth; the new modules in the order of the old."""
    replaced: list[SampledDropPath] = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                replaced.append(SampledDropPath())
                setattr(parent, name, replaced[-1])
    return replaced


def _remove_prefix(_: nn.Module, tensors: dict[str, Any], prefix: str, __: dict[str, Any]) -> None:
    """Hook of `state_dict`: rename the network's tensors to timm's names."""
    for name in [name for name in tensors if name.startswith(prefix + PREFIX)]:
        tensors[prefix + name.removeprefix(prefix + PREFIX)] = tensors.pop(name)


def _add_prefix(_: nn.Module, tensors: dict[str, Any], prefix: str, *__: object) -> None:
    """Hook of `load_state_dict`: rename tensors with timm's names to the module's."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[prefix + PREFIX + name.removeprefix(prefix)] = tensors.pop(name)
