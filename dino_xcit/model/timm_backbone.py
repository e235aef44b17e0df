"""Any timm network with one feature vector an image (ViT, ResNet, ConvNeXt) as a `Backbone`.

Differs from the network by itself in one point: stochastic depth comes with the images, as for
XCiT, at the same rate in every layer, instead of from the device's random numbers.
"""

from __future__ import annotations

from typing import Any, cast

import timm
from timm.layers import DropPath
from torch import Tensor, nn

from dino_xcit.errors import UserError
from dino_xcit.model.backbone import HUB, TIMM, Backbone

PATCH = 16  # pixels, of networks that do not say
PREFIX = "network."


class SampledDropPath(nn.Module):
    """Stochastic depth whose factors, one a sample, are set before the pass."""

    factors: Tensor | None = None  # (B,)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) times its sample's factor."""
        if self.factors is None:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class TimmBackbone(Backbone):
    """A timm network without its classifier. Names of its tensors are timm's own.

    Args:
        network: made by `timm.create_model(..., num_classes=0)`.
        arch: its name, with `timm:` or `hf-hub:` before it.
        sampled_paths: whether stochastic depth is to come with the images.
    """

    def __init__(self, network: nn.Module, arch: str, *, sampled_paths: bool = False) -> None:
        super().__init__()
        self.network: Any = network
        self.arch = arch
        self.metadata = {}
        self.in_chans = timm.data.resolve_data_config({}, model=self.network)["input_size"][0]
        self.embed_dim = getattr(network, "head_hidden_size", self.network.num_features)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", PATCH)
        self.patch_size = patch if isinstance(patch, int) else patch[0]
        self._drop_paths = _sample_drop_paths(network) if sampled_paths else []
        self.path_shape = (len(self._drop_paths), 1) if self._drop_paths else (0, 0)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def __repr__(self) -> str:
        return repr(self.network)

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        for layer, drop_path in enumerate(self._drop_paths):
            drop_path.factors = None if paths is None else paths[:, layer, 0]
        return cast("Tensor", self.network(images))

    def patch_tokens(self, images: Tensor) -> Tensor:
        """See `Backbone.patch_tokens`; the grid of a convolutional network counts as patches."""
        tokens: Tensor = self.network.forward_features(images)
        if tokens.ndim == 4:
            channels = getattr(self.network, "num_features", None)
            channels_last = tokens.shape[-1] == channels != tokens.shape[1]
            return tokens.flatten(1, 2) if channels_last else tokens.flatten(2).mT
        return tokens[:, getattr(self.network, "num_prefix_tokens", 0) :]


def build_timm(arch: str, *, in_chans: int, image_size: int, sampled_paths: bool) -> TimmBackbone:
    """A timm network with new weights.

    Args:
        arch: `timm:NAME` or `hf-hub:ORG/NAME`.
        in_chans: channels of the images.
        image_size: side of the largest images it will see, in pixels.
        sampled_paths: whether stochastic depth is to come with the images.

    Raises:
        UserError: timm has no such network, or it does not give one vector an image.
    """
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans, "pretrained": False}
    # Each network takes its own options: those of positions and of stochastic depth, or fewer.
    depth = {"drop_path_rate": 0.1} if sampled_paths else {}  # only that the layers are there
    sizes = {"img_size": image_size}
    for more in ({**sizes, "dynamic_img_size": True, **depth}, {**sizes, **depth}, depth, {}):
        try:
            network = timm.create_model(arch.removeprefix(TIMM), **options, **more)
        except TypeError:
            continue
        except (RuntimeError, ValueError) as error:  # of unknown names and sizes
            raise UserError(f"--arch {arch}: {' '.join(str(error).split())}") from error
        break
    else:
        raise UserError(f"--arch {arch} takes no in_chans or num_classes; expected another network")
    backbone = TimmBackbone(network, arch, sampled_paths=sampled_paths)
    if not hasattr(network, "forward_features") or not isinstance(backbone.embed_dim, int):
        raise UserError(f"--arch {arch} does not give one feature vector an image")
    return backbone


def is_timm(arch: str) -> bool:
    """Whether the name is of a timm network: `timm:NAME` or `hf-hub:ORG/NAME`."""
    return arch.startswith((TIMM, HUB))


def _sample_drop_paths(network: nn.Module) -> list[SampledDropPath]:
    """Replace the network's stochastic depth, in the order of its modules."""
    replaced: list[SampledDropPath] = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath):
                replaced.append(SampledDropPath())
                setattr(parent, name, replaced[-1])
    return replaced


def _without_prefix(
    module: nn.Module, tensors: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Save the tensors under timm's names."""
    for name in [name for name in tensors if name.startswith(prefix + PREFIX)]:
        tensors[prefix + name.removeprefix(prefix + PREFIX)] = tensors.pop(name)


def _with_prefix(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: object) -> None:
    """Load tensors that have timm's names."""
    of_network = [name for name in tensors if name.startswith(prefix)]
    for name in of_network:
        tensors[prefix + PREFIX + name.removeprefix(prefix)] = tensors.pop(name)
