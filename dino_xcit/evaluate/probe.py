"""What the linear protocols share: the task, the head, held-out images, saved state."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_xcit.errors import UserError
from dino_xcit.evaluate.features import Split, part_slice
from dino_xcit.evaluate.report import TOP
from dino_xcit.files import replacing
from dino_xcit.weights.formats import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import LinearConfig

ROWS = 8192  # features turned into numbers of the working precision at a time
SAVING_SHARE = 0.05  # of the time, at most, goes into saving what has been learned


class FeatureChoice(NamedTuple):
    """Which features a head sees."""

    n_last_blocks: int
    avgpool: bool

    def of(self, features: Tensor) -> Tensor:
        """(B, P, C) -> (B, D)."""
        return features[:, part_slice(*self, features.shape[1])].flatten(1)


class Head(NamedTuple):
    """A trained linear classifier."""

    weight: Tensor
    """(K, D)"""
    bias: Tensor
    """(K,)"""
    choice: FeatureChoice
    chosen: dict[str, Any]
    """what was chosen, and what for"""

    def rank(self, features: Tensor, device: torch.device) -> Tensor:
        """Features (n, P, C) -> the classes of each row by falling logit: int64 (n, 5), -1 if classes run out."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        top = min(TOP, len(bias))
        parts = [
            F.linear(self.choice.of(part.to(device)).to(weight.dtype), weight, bias)
            .topk(top)
            .indices.cpu()
            for part in features.split(ROWS)
        ]
        return F.pad(torch.cat(parts), (0, TOP - top), value=-1)


class ProbeTask(NamedTuple):
    """One classifier to train: on these rows of a subject's training images, with this seed."""

    config: LinearConfig
    subject: Any
    fabric: Fabric
    rows: np.ndarray
    seed: int
    classes: int
    folder: Path
    """where what has been learned is kept until the command ends"""
    kept: set[Path]
    """the files there that are this command's"""

    def path(self, *stage: Any) -> Path:
        """A file for this stage of this work: another for any other options, rows, images or weights."""
        c = self.config
        options = [
            c.protocol,
            c.lr,
            c.epochs,
            c.batch_size,
            c.held_out,
            c.n_last_blocks,
            c.avgpool_patchtokens,
        ]
        key = repr([self.subject.key, options, self.seed, *stage]).encode() + self.rows.tobytes()
        path = self.folder / f"{hashlib.sha256(key).hexdigest()[:20]}.pt"
        self.kept.add(path)
        return path


# -- which images ----------------------------------------------------------------------------------------------------


def stratified(labels: Tensor, share: float, key: tuple[int, ...]) -> np.ndarray:
    """Rows of a share of each class, at least one of each, picked by the key; in order."""
    rng = np.random.default_rng(key)
    taken = []
    for label in torch.unique(labels).tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        taken.append(rng.permutation(rows)[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(taken))


def hold_out(work: ProbeTask) -> tuple[np.ndarray, np.ndarray]:
    """The work's rows to train on and those to choose on: a share of each class that has at least two."""
    labels = work.subject.labels("train").numpy()[work.rows]
    rng = np.random.default_rng((work.seed, 1))
    held = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            held.append(
                rng.permutation(rows)[
                    : min(len(rows) - 1, max(1, round(work.config.held_out * len(rows))))
                ]
            )
    if not held:
        raise UserError(
            f"{len(work.rows)} training images are one of each class, which leaves none to choose on; raise "
            "--train_fraction or name a single --lr with --n_last_blocks and --avgpool_patchtokens, or a single --c"
        )
    chosen = np.sort(np.concatenate(held))
    return np.delete(work.rows, chosen), work.rows[chosen]


# -- what was learned stays ------------------------------------------------------------------------------------------


class Saver:
    """Keeps the state of a training in a file, as often as that costs at most a twentieth of the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved_at = self.cost = 0.0

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file: train again
            return None

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.cost / SAVING_SHARE

    def save(self, state: dict[str, Any]) -> None:
        start = time.monotonic()
        with replacing(self.path) as path:
            torch.save(state, path)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start


def remembered(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, else what is computed, which the file then holds."""
    saver = Saver(path)
    found = saver.load()
    if found is None:
        found = compute()
        saver.save(found)
    return found


@torch.no_grad()
def held_out_accuracy(
    weight: Tensor,
    bias: Tensor,
    choice: FeatureChoice,
    split: Split,
    rows: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Share of these rows that each head has right (H,); 0 for a head that diverged."""
    right = torch.zeros(len(weight), device=device)
    for part in torch.from_numpy(rows).split(ROWS // 8):
        x = choice.of(split.features[part].to(device)).to(weight.dtype)
        logits = torch.einsum("bd,hkd->bhk", x, weight) + bias
        right += (logits.argmax(2) == split.labels[part].to(device)[:, None]).sum(0)
    finite = weight.isfinite().flatten(1).all(1)
    return torch.where(finite, right / len(rows), 0).cpu()


# -- the head as a file ----------------------------------------------------------------------------------------------


def choice_options(choice: FeatureChoice) -> dict[str, Any]:
    return {"n_last_blocks": choice.n_last_blocks, "avgpool_patchtokens": choice.avgpool}


def save_head(head: Head, config: LinearConfig, names: dict[int, str], path: Path) -> None:
    """weight (K, D) and bias (K,) as safetensors; metadata `dino_xcit`: which features, how framed, the classes' names."""
    about = {
        "chosen": head.chosen,
        "weights": config.weights,
        "image_size": config.image_size,
        "resize_size": config.resize_size,
        "classes": names,
    }
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}
    with replacing(path) as beside:
        write_safetensors(tensors, beside, about)


def load_head(path: Path) -> tuple[Head, dict[str, Any]]:
    """The head and what `save_head` says about it. Raises ValueError if the file is not one of these."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["dino_xcit"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        about["classes"] = {int(label): name for label, name in about["classes"].items()}
        choice = FeatureChoice(
            about["chosen"]["n_last_blocks"], about["chosen"]["avgpool_patchtokens"]
        )
        return Head(weight, bias, choice, about["chosen"]), about
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--evaluate {path} is not a head that linear-eval wrote: {error}"
        ) from None
