"""What the linear protocols share: the task, the head, held-out images, saved state."""

from __future__ import annotations

import contextlib
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
from dino_xcit.evaluate.features import Split, choose_parts, select_parts
from dino_xcit.evaluate.report import TOP
from dino_xcit.evaluate.torch_file import DamagedFileError, read_torch_file
from dino_xcit.files import replacing
from dino_xcit.weights.reading import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.config.evaluation import LinearConfig
    from dino_xcit.evaluate.features import Features

BLOCK = 8192  # features that are converted to another dtype at a time
SAVING_SHARE = 0.05  # of the time, at most, is spent on saving state


class FeatureChoice(NamedTuple):
    """Which parts of a feature a head takes."""

    n_last_blocks: int
    avgpool: bool

    @classmethod
    def of_options(cls, config: LinearConfig) -> FeatureChoice:
        """Return the choice of a protocol that tries only one."""
        return cls(config.n_last_blocks or 1, bool(config.avgpool_patchtokens))

    def select(self, features: Tensor) -> Tensor:
        """(B, P, C) -> (B, D)."""
        return select_parts(features, choose_parts(*self, features.shape[1]))

    def dim(self, features: Features) -> int:
        """D."""
        return self.select(torch.zeros(1, *features.shape)).shape[1]

    def options(self) -> dict[str, Any]:
        """Return the choice as options of the command line."""
        return {"n_last_blocks": self.n_last_blocks, "avgpool_patchtokens": self.avgpool}


# -- the task ----------------------------------------------------------------------------------


class Scratch:
    """Files in which a command keeps its progress; the same command, started again, continues.

    Args:
        folder: Is created with the first file. Other commands may keep files there too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: set[Path] = set()

    def file(self, name: str) -> Path:
        """Path of a file of this command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        self.files.add(path)
        return path

    def remove(self) -> None:
        """Delete this command's files, and the folder if it is empty."""
        for path in self.files:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or another process was faster
            self.folder.rmdir()


class ProbeTask(NamedTuple):
    """One classifier to train."""

    config: LinearConfig
    features: Features
    fabric: Fabric
    rows: np.ndarray
    """training images to use"""
    seed: int
    classes: int
    scratch: Scratch

    def file(self, *stage: object) -> Path:
        """File for a stage of this task; differs for other options, rows, images or weights."""
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
        key = repr([self.features.key, options, self.seed, *stage]).encode() + self.rows.tobytes()
        return self.scratch.file(f"{hashlib.sha256(key).hexdigest()[:20]}.pt")


# -- which images ------------------------------------------------------------------------------


def stratified(labels: Tensor, share: float, seed: tuple[int, ...]) -> np.ndarray:
    """Sample a share of each class, at least one image each; return the rows, sorted."""
    rng = np.random.default_rng(seed)
    sampled = []
    for label in torch.unique(labels).tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        sampled.append(rng.permutation(rows)[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(sampled))


def hold_out(task: ProbeTask) -> tuple[np.ndarray, np.ndarray]:
    """Split the task's rows into those to train on and those to select hyperparameters on.

    A share of each class is held out; classes with one image keep it for training.

    Raises:
        UserError: All classes have one image.
    """
    labels = task.features.labels("train").numpy()[task.rows]
    rng = np.random.default_rng((task.seed, 1))
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            count = min(len(rows) - 1, max(1, round(task.config.held_out * len(rows))))
            held_out.append(rng.permutation(rows)[:count])
    if not held_out:
        raise UserError(
            f"the {len(task.rows)} training images are one of each class, which leaves none to "
            "select hyperparameters on; raise --train_fraction or name a single --lr with "
            "--n_last_blocks and --avgpool_patchtokens, or a single --c"
        )
    indices = np.sort(np.concatenate(held_out))
    return np.delete(task.rows, indices), task.rows[indices]


@torch.no_grad()
def held_out_accuracy(
    weight: Tensor,
    bias: Tensor,
    choice: FeatureChoice,
    split: Split,
    rows: np.ndarray,
    device: torch.device,
) -> Tensor:
    """Accuracy of each head on these rows, (H,); 0 for a head that diverged.

    Args:
        weight: Of all heads, (H, K, D).
        bias: (H, K).
        choice: Parts of the features.
        split: Features and labels.
        rows: To test on.
        device: Where to compute.
    """
    correct = torch.zeros(len(weight), device=device)
    for block in torch.split(torch.from_numpy(rows), BLOCK // 8):
        x = choice.select(split.features[block].to(device)).to(weight.dtype)
        logits = torch.einsum("bd,hkd->bhk", x, weight) + bias
        correct += (logits.argmax(2) == split.labels[block].to(device)[:, None]).sum(0)
    finite = weight.isfinite().flatten(1).all(1)
    return torch.where(finite, correct / len(rows), 0).cpu()


# -- saved state -------------------------------------------------------------------------------


class Saver:
    """Keeps state in a file, as often as saving takes at most a twentieth of the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved_at = self.cost = 0.0  # seconds

    def load(self) -> dict[str, Any] | None:
        """Return the saved state; None if there is none, or the file is damaged."""
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = read_torch_file(self.path)
        except DamagedFileError:  # the work is done again
            return None
        return state

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self.saved_at >= self.cost / SAVING_SHARE

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""
        start = time.monotonic()
        with replacing(self.path) as path:
            torch.save(state, path)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start


def cached(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Load the cached result, or compute and cache it."""
    saver = Saver(path)
    result = saver.load()
    if result is None:
        result = compute()
        saver.save(result)
    return result


# -- the head ----------------------------------------------------------------------------------


class Head(NamedTuple):
    """A trained linear classifier."""

    weight: Tensor
    """(K, D)"""
    bias: Tensor
    """(K,)"""
    choice: FeatureChoice
    chosen: dict[str, Any]
    """hyperparameters selected on held-out images, and how many were tried"""

    def rank(self, features: Tensor, device: torch.device) -> Tensor:
        """Features (n, P, C) -> classes by descending logit, int64 (n, 5), -1 beyond K classes."""
        top = min(TOP, len(self.bias))
        ranked = [logits.topk(top).indices.cpu() for logits in self._logits(features, device)]
        return F.pad(torch.cat(ranked), (0, TOP - top), value=-1)

    def classify(self, features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features (n, P, C) -> probability and number of the likeliest class, (n,) each."""
        best = [logits.softmax(1).max(1) for logits in self._logits(features, device)]
        probability, number = zip(*best, strict=True)
        return torch.cat(probability).cpu(), torch.cat(number).cpu()

    def _logits(self, features: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Logits of each block of features, (BLOCK, K)."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        for block in torch.split(features, BLOCK):
            yield F.linear(self.choice.select(block.to(device)).to(weight.dtype), weight, bias)


def save_head(head: Head, config: LinearConfig, names: Mapping[int, str], path: Path) -> None:
    """Write weight (K, D) and bias (K,) as safetensors.

    Metadata `dino_xcit`: choice of features, sizes of the framed image, names of the classes.
    """
    about = {
        "chosen": head.chosen,
        "weights": config.weights,
        "image_size": config.image_size,
        "resize_size": config.resize_size,
        "classes": dict(names),
    }
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}
    with replacing(path) as beside:
        write_safetensors(tensors, beside, about)


def load_head(path: Path, flag: str = "evaluate") -> tuple[Head, dict[str, Any]]:
    """Return a head and its file's metadata, as `save_head` writes them.

    `flag`: That names the file, for the error.

    Raises:
        UserError: The file is not such a head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["dino_xcit"])
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        about["classes"] = {int(label): name for label, name in about["classes"].items()}
        chosen = about["chosen"]
        choice = FeatureChoice(chosen["n_last_blocks"], chosen["avgpool_patchtokens"])
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--{flag} {path} is not a head that linear-eval wrote: {error}") from None
    return Head(weight, bias, choice, chosen), about
