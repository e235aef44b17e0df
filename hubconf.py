"""`torch.hub.load("OWNER/dino_xcit", "xcit_small_12_p16", weights="runs/s12_p16")`.

Each backbone has its official name. weights: anything that `dino_xcit.load_backbone` takes; without
weights they are random. `dino_xcit_small_12_p16` and the like are those that the DINO authors
published.
"""

dependencies = ["torch", "timm", "safetensors", "yaml"]

from dino_xcit.model.architectures import ARCHITECTURES as _ARCHITECTURES
from dino_xcit.model.architectures import PATCH_SIZES as _PATCH_SIZES
from dino_xcit.model.xcit import XCiT as _XCiT
from dino_xcit.weights.load import PUBLISHED as _PUBLISHED
from dino_xcit.weights.load import load_backbone as _load_backbone


def _backbone(name):
    def entry(weights=None, **options):
        return _XCiT(name, **options) if weights is None else _load_backbone(weights, name)

    entry.__name__, entry.__doc__ = name, f"{name}: images (B, C, H, W) -> features (B, D)"
    return entry


def _published(name):
    def entry():
        return _load_backbone(name)

    entry.__name__, entry.__doc__ = name, f"{name}, pretrained by the DINO authors"
    return entry


for _architecture in _ARCHITECTURES.values():
    for _patch in _PATCH_SIZES:
        _name = f"{_architecture.official}_p{_patch}"
        globals()[_name] = _backbone(_name)
for _name in _PUBLISHED:
    globals()[_name] = _published(_name)
