"""Linear classification of frozen features: official DINO's protocol, DINOv2's many heads, logistic regression.

    heads     A head for each learning rate and choice of features, all at once on features extracted once (DINOv2's
              `eval/linear.py`; it runs the backbone on augmented crops instead). The best on held-out training images is
              trained again on all of them.
    dino      One head on class tokens of augmented crops (`eval_linear.py`). Reported is the last epoch; official DINO
              reports the best epoch on the validation images.
    logistic  L-BFGS for each C (DINOv2's `eval/log_regression.py`, scikit-learn's objective).

Validation images choose nothing. Axes: B images of a batch, P parts of a feature, D numbers of a chosen feature, H heads,
K classes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_xcit.config import LinearConfig, validate_evaluation
from dino_xcit.crops import cut, draw_boxes
from dino_xcit.data import ImageSet, default_workers, leave_signals_to_the_parent
from dino_xcit.features import Frozen, Split, part_slice, subjects
from dino_xcit.formats import write_safetensors
from dino_xcit.machine import float64_device, launch, progress, resolve_precision, say, summed
from dino_xcit.report import TOP, cell, describe, draw_classes, hits, output_folder, scores, table, write_json
from dino_xcit.run_folder import replacing

DINO_LR, DINO_EPOCHS = 0.001, 100
HEADS_LR = (
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    0.1,
    0.2,
    0.5,
    1.0,
)  # DINOv2's, and three larger ones for narrow networks
HEADS_STEPS, HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS = 12_500, 1000, 100
C_VALUES = tuple(float(c) for c in np.logspace(-6, 5, 45))
MOMENTUM = 0.9
INITIAL_STD = 0.01
CROP_SHARE = (0.08, 1.0)  # of the image's area, torchvision's RandomResizedCrop
LBFGS_STEPS = 1000
LBFGS_TOLERANCE = 1e-5  # of the largest gradient of the mean loss; scikit-learn stops at 1e-4
HELD_BYTES = 4 * 2**30
ROWS = 8192  # features turned into numbers of the working precision at a time
SAVING_SHARE = 0.05  # of the time, at most, goes into saving what has been learned
EVALUATED = "linear_evaluate"  # the report's name with --evaluate
SCRATCH = ".linear"  # in the run folder, while a command runs


class Choice(NamedTuple):
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
    choice: Choice
    chosen: dict[str, Any]
    """what was chosen, and what for"""

    def rank(self, features: Tensor, device: torch.device) -> Tensor:
        """Features (n, P, C) -> the classes of each row by falling logit: int64 (n, 5), -1 if classes run out."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        top = min(TOP, len(bias))
        parts = [
            F.linear(self.choice.of(part.to(device)).to(weight.dtype), weight, bias).topk(top).indices.cpu()
            for part in features.split(ROWS)
        ]
        return F.pad(torch.cat(parts), (0, TOP - top), value=-1)


class Work(NamedTuple):
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
        options = [c.protocol, c.lr, c.epochs, c.batch_size, c.held_out, c.n_last_blocks, c.avgpool_patchtokens]
        key = repr([self.subject.key, options, self.seed, *stage]).encode() + self.rows.tobytes()
        path = self.folder / f"{hashlib.sha256(key).hexdigest()[:20]}.pt"
        self.kept.add(path)
        return path


# -- the command -----------------------------------------------------------------------------------------------------


def linear_eval(config: LinearConfig) -> dict[str, Any]:
    """What `dino-xcit linear-eval` does -> the content of linear.json.

    Raises ValueError, naming the flag, for what the user can put right.
    """
    validate_evaluation(config)
    folder = output_folder(config)
    fabric = launch(config)
    start = time.perf_counter()
    with subjects(config, fabric) as (config, evaluated, names):
        folder.mkdir(parents=True, exist_ok=True)
        first = evaluated[0]
        kept: set[Path] = set()
        if config.evaluate is not None:
            stem, results = EVALUATED, {first.name: [_evaluate(config, first, fabric, folder, names)]}
        else:
            stem = "linear" if config.protocol == "heads" else f"linear_{config.protocol}"
            results = {s.name: _train_and_test(config, s, fabric, folder / stem, names, kept) for s in evaluated}
        report = {
            "protocol": results[first.name][0]["chosen"]["protocol"],
            "results": results[first.name],
            "baselines": {name: rows for name, rows in results.items() if name != first.name},
            "seconds": round(time.perf_counter() - start, 2),
            **describe(config, evaluated, resolve_precision(config)),
        }
        if fabric.is_global_zero:
            write_json(folder / f"{stem}.json", report)
        fabric.barrier()
        for path in kept:  # all is done; what other commands keep here stays
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty yet
            (folder / SCRATCH).rmdir()
    if fabric.is_global_zero:
        listed = [
            [name, f"{100 * row['train_fraction']:g} %", cell(row, "top1"), cell(row, "top5"), _chosen(row["chosen"])]
            for name, rows in results.items()
            for row in rows
        ]
        print(table([f"linear, {report['protocol']}", "labels", "top-1 % [95 %]", "top-5 % [95 %]", "chosen"], listed))
        print(f"{folder}: {stem}.json, {stem}_classes.png{'' if config.evaluate else f', {stem}_head*.safetensors'}")
    return report


def _evaluate(config: LinearConfig, subject: Any, fabric: Fabric, folder: Path, names: dict[int, str]) -> dict[str, Any]:
    """The row of a head that an earlier run trained."""
    head, about = load_head(Path(str(config.evaluate)))
    found = head.choice.of(torch.zeros(1, *subject.shape)).shape[1]
    if found != head.weight.shape[1]:
        raise ValueError(f"--evaluate {config.evaluate} takes {head.weight.shape[1]} numbers, these features have {found}")
    for name in ("image_size", "resize_size"):
        if about[name] != getattr(config, name):
            raise ValueError(
                f"--evaluate {config.evaluate} was trained at --{name} {about[name]}, not {getattr(config, name)}"
            )
    if about["classes"] != names:
        raise ValueError(
            f"--evaluate {config.evaluate} knows the classes {_listed(about['classes'])}; the images have {_listed(names)}"
        )
    row, ranked = _result(config, subject, fabric, [head], head.chosen["train_fraction"])
    if fabric.is_global_zero:
        _draw(folder / f"{EVALUATED}_classes.png", subject, row, ranked, names)
    return row


def _listed(names: dict[int, str]) -> str:
    shown = [names[label] for label in sorted(names)[:3]]
    return f"{', '.join(shown)}{', ...' if len(names) > 3 else ''} ({len(names)})"


def _train_and_test(
    config: LinearConfig, subject: Any, fabric: Fabric, stem: Path, names: dict[int, str], kept: set[Path]
) -> list[dict[str, Any]]:
    """A row for each train_fraction. The weights' own heads are written, and the classes of the largest one drawn."""
    rows = []
    for fraction in sorted(config.train_fraction):
        seeds = range(config.seed, config.seed + config.num_seeds)
        heads = [_train(config, subject, fabric, stem.parent / SCRATCH, fraction, seed, kept) for seed in seeds]
        row, ranked = _result(config, subject, fabric, heads, fraction)
        rows.append(row)
        if subject.name in (config.weights, config.load_features) and fabric.is_global_zero:
            suffix = "" if fraction == 1 else f"_{fraction:g}"
            save_head(heads[0], config, names, stem.with_name(f"{stem.name}_head{suffix}.safetensors"))
            _draw(stem.with_name(f"{stem.name}_classes.png"), subject, row, ranked, names)
    return rows


def _draw(path: Path, subject: Any, row: dict[str, Any], ranked: Tensor, names: dict[int, str]) -> None:
    title = f"{subject.name}: linear ({row['chosen']['protocol']}), top-1 {row['top1']:.1f} %"
    draw_classes(path, title, ranked[:, 0].numpy(), subject.labels("validation").numpy(), names)


def _chosen(chosen: dict[str, Any]) -> str:
    """`lr 0.01, 2 blocks, avgpool` for the terminal."""
    words = [f"{name} {chosen[name]:.3g}" for name in ("lr", "C") if name in chosen]
    words.append(f"{chosen['n_last_blocks']} block{'s' if chosen['n_last_blocks'] > 1 else ''}")
    return ", ".join(words + ["avgpool"] * chosen["avgpool_patchtokens"])


def _train(
    config: LinearConfig, subject: Any, fabric: Fabric, scratch: Path, fraction: float, seed: int, kept: set[Path]
) -> Head:
    if config.protocol != "dino":
        subject.split("train")  # features first: unreadable images drop out
    labels = subject.labels("train")
    rows = stratified(labels, fraction, (seed, 0)) if fraction < 1 else np.arange(len(labels))
    if fabric.is_global_zero:
        scratch.mkdir(parents=True, exist_ok=True)
    fabric.barrier()
    head = PROTOCOLS[config.protocol](Work(config, subject, fabric, rows, seed, int(labels.max()) + 1, scratch, kept))
    return head._replace(chosen={"protocol": config.protocol, "train_fraction": fraction, **head.chosen})


def _result(
    config: LinearConfig, subject: Any, fabric: Fabric, heads: list[Head], fraction: float
) -> tuple[dict[str, Any], Tensor]:
    """The row of linear.json, and the first head's ranked classes of the validation images."""
    validation = subject.split("validation")
    ranked = [head.rank(validation.features, fabric.device) for head in heads]
    tops = {"top1": 1, "top5": TOP} if len(heads[0].bias) >= TOP else {"top1": 1}
    hit = {name: np.mean([hits(r, validation.labels, top) for r in ranked], axis=0) for name, top in tops.items()}
    of_seeds = [100 * float(hits(r, validation.labels, 1).mean()) for r in ranked]
    row = {"train_fraction": fraction, "top1": None, "top5": None, **scores(hit, config.seed)}
    if len(heads) > 1:
        row |= {
            "top1_of_seeds": [round(value, 3) for value in of_seeds],
            "top1_std": round(float(np.std(of_seeds, ddof=1)), 3),
        }
    return {**row, "chosen": heads[0].chosen}, ranked[0]


# -- which images ----------------------------------------------------------------------------------------------------


def stratified(labels: Tensor, share: float, key: tuple[int, ...]) -> np.ndarray:
    """Rows of a share of each class, at least one of each, picked by the key; in order."""
    rng = np.random.default_rng(key)
    taken = []
    for label in torch.unique(labels).tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        taken.append(rng.permutation(rows)[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(taken))


def hold_out(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """The work's rows to train on and those to choose on: a share of each class that has at least two."""
    labels = work.subject.labels("train").numpy()[work.rows]
    rng = np.random.default_rng((work.seed, 1))
    held = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            held.append(rng.permutation(rows)[: min(len(rows) - 1, max(1, round(work.config.held_out * len(rows))))])
    if not held:
        raise ValueError(
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


# -- heads: many at once on features ---------------------------------------------------------------------------------


def choices(config: LinearConfig, parts: int) -> list[Choice]:
    """Choices of features that the options leave open."""
    blocks = [config.n_last_blocks] if config.n_last_blocks else range(1, max(2, parts))
    pooled = [config.avgpool_patchtokens] if config.avgpool_patchtokens is not None else [False, True][: min(2, parts)]
    found = [Choice(n, avgpool) for n, avgpool in itertools.product(blocks, pooled)]
    for choice in found:
        part_slice(*choice, parts)  # raises for what the network does not have
    return found


def heads_protocol(work: Work) -> Head:
    """The best head on held-out images, trained again on all."""
    split, fabric = work.subject.split("train"), work.fabric
    of = choices(work.config, split.features.shape[1])
    rates = work.config.lr or HEADS_LR
    accuracy = torch.zeros(len(of), len(rates))
    if accuracy.numel() > 1:
        train, held = hold_out(work)
        for number in range(fabric.global_rank, len(of), fabric.world_size):
            weight, bias = train_heads(work, train, of[number], rates, f"heads of choice {number + 1}/{len(of)}")
            accuracy[number] = held_out_accuracy(weight, bias, of[number], split, held, fabric.device)
        accuracy = summed(fabric, accuracy)
    best, rate = divmod(int(accuracy.argmax()), len(rates))
    if rate == len(rates) - 1 and len(rates) > 1:
        say(f"the best learning rate is the largest tried, {rates[rate]:g}; try larger ones with --lr")
    trained: Any = None
    if fabric.is_global_zero:
        weight, bias = train_heads(work, work.rows, of[best], rates[rate : rate + 1], "chosen head")
        trained = weight[0].cpu(), bias[0].cpu()
    weight, bias = fabric.broadcast(trained)
    chosen = {"lr": rates[rate], **_plain(of[best])}
    if accuracy.numel() > 1:
        chosen |= {"held_out_top1": round(100 * float(accuracy.max()), 3), "tried": accuracy.numel()}
    return Head(weight, bias, of[best], chosen)


def train_heads(
    work: Work, rows: np.ndarray, choice: Choice, rates: Sequence[float], description: str
) -> tuple[Tensor, Tensor]:
    """A head for each learning rate, trained together by SGD on these rows -> weights (H, K, D) and biases (H, K).

    One step serves all heads: without weight decay, SGD on a loss times a learning rate is SGD with that learning rate.
    """
    features, labels = work.subject.split("train")
    device, config = work.fabric.device, work.config
    batch = min(config.batch_size, len(rows))
    per_epoch = math.ceil(len(rows) / batch)
    steps = (
        config.epochs * per_epoch
        if config.epochs
        else min(HEADS_STEPS, max(HEADS_LEAST_STEPS, HEADS_MOST_EPOCHS * per_epoch))
    )
    scale = torch.tensor(rates, device=device) * batch / 256
    weight, bias = initial_heads(len(rates), work.classes, choice.of(features[:1]).shape[1], work.seed, device)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=MOMENTUM)
    saver = Saver(work.path("heads", len(rows), choice, rates))
    step = restore(saver, [weight, bias], optimizer)
    with progress(steps, f"{work.subject.name}: {description}", "steps", work.fabric.is_global_zero, initial=step) as bar:
        while step < steps:
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == bar.initial:
                order = np.random.default_rng((work.seed, 2, epoch)).permutation(rows)
            picked = torch.from_numpy(order[number * batch : (number + 1) * batch])
            x, y = choice.of(features[picked].to(device)).float(), labels[picked].to(device)
            logits = torch.einsum("bd,hkd->bkh", x, weight) + bias.T
            loss = F.cross_entropy(logits, y[:, None].expand(-1, len(rates)), reduction="none").mean(0) @ scale
            optimizer.param_groups[0]["lr"] = cosine(step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if saver.due():
                saver.save(training_state(step, [weight, bias], optimizer))
            bar.update()
    return weight.detach(), bias.detach()


def initial_heads(heads: int, classes: int, dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Official initialisation, the same for every head: weights (H, K, D) and biases (H, K)."""
    weight = INITIAL_STD * torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))
    weights = weight.expand(heads, -1, -1).contiguous().to(device).requires_grad_()
    return weights, torch.zeros(heads, classes, device=device, requires_grad=True)


def training_state(step: int, tensors: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"step": step, "tensors": [t.detach().cpu() for t in tensors], "optimizer": optimizer.state_dict()}


def restore(saver: Saver, tensors: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what the file holds, if there is one -> the steps done."""
    state = saver.load()
    if state is None:
        return 0
    with torch.no_grad():
        for tensor, saved in zip(tensors, state["tensors"], strict=True):
            tensor.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def cosine(done: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def held_out_accuracy(
    weight: Tensor, bias: Tensor, choice: Choice, split: Split, rows: np.ndarray, device: torch.device
) -> Tensor:
    """Share of these rows that each head has right (H,); 0 for a head that diverged."""
    right = torch.zeros(len(weight), device=device)
    for part in torch.from_numpy(rows).split(ROWS // 8):
        x = choice.of(split.features[part].to(device)).to(weight.dtype)
        logits = torch.einsum("bd,hkd->bhk", x, weight) + bias
        right += (logits.argmax(2) == split.labels[part].to(device)[:, None]).sum(0)
    finite = weight.isfinite().flatten(1).all(1)
    return torch.where(finite, right / len(rows), 0).cpu()


# -- dino: one head on augmented crops -------------------------------------------------------------------------------


class AugmentedCrops(Dataset[Any]):
    """(epoch, index) -> a random crop, flipped or not, uint8 (C, S, S), the label, and whether the image could be read."""

    def __init__(self, images: ImageSet, size: int, channels: int, seed: int) -> None:
        self.images, self.size, self.channels, self.seed = images, size, channels, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, int, bool]:
        epoch, index = position
        rng = np.random.default_rng((self.seed, 3, epoch, index))
        assert self.images.labels is not None
        label = int(self.images.labels[index])
        try:
            image = self.images.read(index)
        except (OSError, ValueError):
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), label, False
        low, high = (np.array([share]) for share in CROP_SHARE)
        box = draw_boxes(rng, image.shape[1], image.shape[2], low, high)
        crop = cut(image, box, self.size, mode="bilinear")[0]
        return crop.flip(-1) if rng.random() < 0.5 else crop, label, True


class Passes(Sampler[list[tuple[int, int]]]):
    """What this process puts through the backbone, from a step on: lists of (epoch, index), several for a step."""

    def __init__(self, work: Work, first_step: int, epochs: int) -> None:
        config, fabric = work.config, work.fabric
        self.rows, self.seed, self.epochs, self.first_step = work.rows, work.seed, epochs, first_step
        self.batch, self.most = min(config.batch_size, len(self.rows)), config.batch_size_per_gpu
        self.rank, self.world_size = fabric.global_rank, fabric.world_size
        self.per_epoch = math.ceil(len(self.rows) / self.batch)

    def of_step(self, order: np.ndarray, number: int) -> list[np.ndarray]:
        share = np.array_split(order[number * self.batch : (number + 1) * self.batch], self.world_size)[self.rank]
        return np.array_split(share, math.ceil(len(share) / self.most)) if len(share) else []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first_step
        for epoch in range(first // self.per_epoch, self.epochs):
            order = np.random.default_rng((self.seed, 2, epoch)).permutation(self.rows)
            for number in range(first - epoch * self.per_epoch if first > epoch * self.per_epoch else 0, self.per_epoch):
                for rows in self.of_step(order, number):
                    yield [(epoch, int(row)) for row in rows]


def dino_protocol(work: Work) -> Head:
    """SGD with momentum on random crops and flips, the learning rate falling by a cosine from epoch to epoch."""
    config, subject, fabric = work.config, work.subject, work.fabric
    frozen: Frozen = subject.frozen
    choice = Choice(config.n_last_blocks or 1, bool(config.avgpool_patchtokens))
    dim = choice.of(torch.zeros(1, *subject.shape)).shape[1]
    epochs, lr = config.epochs or DINO_EPOCHS, (config.lr or (DINO_LR,))[0]
    weight, bias = (t[0].detach().requires_grad_() for t in initial_heads(1, work.classes, dim, work.seed, fabric.device))
    optimizer = torch.optim.SGD([weight, bias], lr=0.0, momentum=MOMENTUM)
    lost = torch.zeros(())  # unreadable images, counted in the first epoch
    saver = Saver(work.path("dino", subject.frozen.transform))
    step = restore(saver, [weight, bias, lost], optimizer)
    fabric.barrier()  # all have read before one writes
    passes = Passes(work, step, epochs)
    images = subject.images["train"]
    crops = AugmentedCrops(images, frozen.transform.image_size, len(frozen.transform.mean), work.seed)
    workers = default_workers() if config.num_workers is None else config.num_workers
    loader = iter(DataLoader(crops, batch_sampler=passes, num_workers=workers, worker_init_fn=leave_signals_to_the_parent))
    batch = passes.batch
    last = len(work.rows) - (passes.per_epoch - 1) * batch  # images of an epoch's last step
    in_a_step, in_last = (len(passes.of_step(np.zeros(images), 0)) for images in (batch, last))
    with progress(epochs * len(work.rows), f"{subject.name}: dino", "images", fabric.is_global_zero) as bar:
        bar.update(step // passes.per_epoch * len(work.rows) + step % passes.per_epoch * batch)
        while step < epochs * passes.per_epoch:
            epoch, number = divmod(step, passes.per_epoch)
            ends = number == passes.per_epoch - 1
            features, labels = [], []
            for _ in range(in_last if ends else in_a_step):
                x, y, readable = next(loader)
                if readable.any():
                    features.append(choice.of(frozen(x[readable])))
                    labels.append(y[readable])
            count = int(summed(fabric, torch.tensor(sum(map(len, labels)))))
            lost += (last if ends else batch) - count if epoch == 0 else 0
            optimizer.zero_grad()
            if features:
                logits = F.linear(torch.cat(features), weight, bias)
                (F.cross_entropy(logits, torch.cat(labels).to(fabric.device), reduction="sum") / max(1, count)).backward()
            for tensor in (weight, bias):
                tensor.grad = summed(fabric, torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            optimizer.param_groups[0]["lr"] = lr * batch / 256 * cosine(epoch / epochs)
            optimizer.step()
            step += 1
            if fabric.is_global_zero and saver.due():
                saver.save(training_state(step, [weight, bias, lost], optimizer))
            bar.update(last if ends else batch)
    subject.unreadable += int(lost)
    chosen = {"lr": lr, **_plain(choice)}
    return Head(weight.detach().cpu(), bias.detach().cpu(), choice, chosen)


# -- logistic: L-BFGS ------------------------------------------------------------------------------------------------


def logistic_protocol(work: Work) -> Head:
    """The best C on held-out images, fitted again on all. One process fits, the others wait."""
    choice = Choice(work.config.n_last_blocks or 1, bool(work.config.avgpool_patchtokens))
    fitted: Any = _choose_c(work, choice) if work.fabric.is_global_zero else None
    weight, bias, chosen = work.fabric.broadcast(fitted)
    return Head(weight.float(), bias.float(), choice, {**chosen, **_plain(choice)})


def _choose_c(work: Work, choice: Choice) -> tuple[Tensor, Tensor, dict[str, Any]]:
    values = sorted(work.config.c or C_VALUES)
    if len(values) == 1:
        return *fit(work, work.rows, choice, values[0], principal_axes(work, work.rows, choice), None), {"C": values[0]}
    train, held = hold_out(work)
    axes = principal_axes(work, train, choice)
    start, best, accuracy = None, values[0], -1.0
    with progress(len(values), f"{work.subject.name}: C", "fits", shown=True) as bar:
        for c in values:  # each fit starts where the last ended
            start = fit(work, train, choice, c, axes, start)
            weight, bias = (tensor[None].to(work.fabric.device) for tensor in start)
            found = held_out_accuracy(weight, bias, choice, work.subject.split("train"), held, work.fabric.device).item()
            if found > accuracy:
                best, accuracy = c, found
            bar.update()
    if best in (values[0], values[-1]):
        say(f"the best C is at an end of those tried, {best:g}; try others with --c")
    chosen = {"C": best, "held_out_top1": round(100 * accuracy, 3), "tried": len(values)}
    return *fit(work, work.rows, choice, best, principal_axes(work, work.rows, choice), None), chosen


class Axes(NamedTuple):
    """Of chosen features, float64: mean (D,), variance along each principal axis (D,), and the axes as columns (D, D)."""

    mean: Tensor
    variance: Tensor
    axes: Tensor


def chosen_batches(split: Split, rows: np.ndarray, choice: Choice, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Features in float64 (B, D) and labels (B,), in order."""
    for part in torch.from_numpy(rows).split(ROWS):
        yield choice.of(split.features[part].to(device)).double(), split.labels[part].to(device)


def principal_axes(work: Work, rows: np.ndarray, choice: Choice) -> Axes:
    data = work.subject.split("train"), rows, choice, float64_device(work.fabric)
    mean = torch.stack([x.sum(0) for x, _ in chosen_batches(*data)]).sum(0) / len(rows)
    covariance = sum((x - mean).T @ (x - mean) for x, _ in chosen_batches(*data)) / len(rows)
    variance, axes = torch.linalg.eigh(covariance)
    return Axes(mean, variance.clamp(min=0), axes)


def fit(
    work: Work, rows: np.ndarray, choice: Choice, c: float, axes: Axes, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Minimise C * sum of cross-entropies + |W|^2 / 2, scikit-learn's objective -> W (K, D), bias (K,), float64 on CPU."""
    found = remembered(
        work.path("logistic", len(rows), choice, c),
        lambda: _minimise(
            work.subject.split("train"), rows, choice, c, work.classes, float64_device(work.fabric), axes, start
        ),
    )
    return found["weight"], found["bias"]


def _minimise(
    split: Split,
    rows: np.ndarray,
    choice: Choice,
    c: float,
    classes: int,
    device: torch.device,
    axes: Axes,
    start: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """L-BFGS in coordinates V with W = V A, in which the objective curves about alike in every direction."""

    n, dim = len(rows), len(axes.mean)
    batches = functools.partial(chosen_batches, split, rows, choice, device)
    # Read again in every step only if they do not fit.
    held = list(batches()) if 8 * n * dim <= HELD_BYTES else None
    penalty = 1 / (c * n)
    scale = (axes.variance / classes + penalty).rsqrt()
    A, inverse = (axes.axes * scale) @ axes.axes.T, (axes.axes / scale) @ axes.axes.T
    W, b = start or (torch.zeros(classes, dim), torch.zeros(classes))
    W, b = W.to(device, torch.float64), b.to(device, torch.float64)
    V = (W @ inverse).requires_grad_()
    bias = (b + W @ axes.mean).requires_grad_()  # for features without their mean
    optimizer = torch.optim.LBFGS(
        [V, bias],
        max_iter=LBFGS_STEPS,
        max_eval=2 * LBFGS_STEPS,
        tolerance_grad=LBFGS_TOLERANCE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        W = V @ A
        weight = W.detach().requires_grad_()
        total = weight.square().sum() * penalty / 2
        total.backward()
        for x, y in held or batches():
            loss = F.cross_entropy(F.linear(x, weight, bias - weight @ axes.mean), y, reduction="sum") / n
            loss.backward()
            total = total + loss.detach()
        W.backward(weight.grad)
        return total.detach()

    optimizer.step(objective)
    W = (V @ A).detach()
    return {"weight": W.cpu(), "bias": (bias.detach() - W @ axes.mean).cpu()}


PROTOCOLS: dict[str, Callable[[Work], Head]] = {
    "heads": heads_protocol,
    "dino": dino_protocol,
    "logistic": logistic_protocol,
}


# -- the head as a file ----------------------------------------------------------------------------------------------


def _plain(choice: Choice) -> dict[str, Any]:
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
        choice = Choice(about["chosen"]["n_last_blocks"], about["chosen"]["avgpool_patchtokens"])
        return Head(weight, bias, choice, about["chosen"]), about
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--evaluate {path} is not a head that linear-eval wrote: {error}") from None
