"""Time of k-NN: ours against one pass for each k, as in official `eval_knn.py`.

    python eval/speed/knn.py [--train 50000 --test 5000 --dim 384 --classes 1000 --output FILE]

The official form builds a one-hot tensor of B x k x classes. The contenders take turns on the
same features. The floor is the single matrix product of all similarities.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_xcit.evaluate.knn import knn_classify

if TYPE_CHECKING:
    from collections.abc import Callable

NB_KNN = (10, 20, 100, 200)
TEMPERATURE = 0.07
BLOCKS = 100  # of test images, the number in official eval_knn.py


def pass_for_each_k(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> dict[int, Tensor]:
    """Return the predicted class of each test image for each k; features are normalised."""
    first: dict[int, list[Tensor]] = {k: [] for k in NB_KNN}
    for k in NB_KNN:
        for block in test.split(max(1, len(test) // BLOCKS)):
            similarity, neighbours = (block @ train.T).topk(k)
            one_hot = torch.zeros(len(block) * k, classes, device=test.device)
            one_hot.scatter_(1, labels[neighbours].view(-1, 1), 1)
            votes = (
                one_hot.view(-1, k, classes) * (similarity / TEMPERATURE).exp()[:, :, None]
            ).sum(1)
            first[k].append(votes.sort(dim=1, descending=True).indices[:, 0])
    return {k: torch.cat(parts) for k, parts in first.items()}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("train", 50_000),
        ("test", 5000),
        ("dim", 384),
        ("classes", 1000),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    centres = torch.randn(options.classes, options.dim, device=device)
    labels, test_labels = (
        torch.randint(options.classes, (n,), device=device) for n in (options.train, options.test)
    )
    train, test = (
        F.normalize(centres[y] + 3 * torch.randn(len(y), options.dim, device=device))
        for y in (labels, test_labels)
    )

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: knn_classify(train, labels, test, NB_KNN, TEMPERATURE),
        "a pass for each k": lambda: pass_for_each_k(train, labels, test, options.classes),
        "the matrix product alone": lambda: [block @ train.T for block in test.split(512)],
    }
    reference, ours = (
        pass_for_each_k(train, labels, test, options.classes),
        knn_classify(train, labels, test, NB_KNN, TEMPERATURE),
    )
    agree = {k: (ours[k][:, 0] == reference[k].cpu()).float().mean().item() for k in NB_KNN}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        ratio = medians[name] / medians["ours"]
        print(
            f"{name:26} {medians[name]:7.2f} s  ({min(values):.2f} to {max(values):.2f}), "
            f"{ratio:.2f} x ours"
        )
    shares = ", ".join(f"k = {k}: {100 * share:.2f} %" for k, share in agree.items())
    print(f"same first class: {shares}")
    if options.output:
        about = {
            "device": device,
            "machine": platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        content = {
            **{k: v for k, v in vars(options).items() if k != "output"},
            **about,
            "seconds": times,
            "agree": agree,
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
