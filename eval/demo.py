"""`make demo`: pretrain on the embedded shapes, then compare k-NN accuracies on held-out images and see what is attended to.

A run that was interrupted goes on where it stopped; a finished one is only evaluated. Takes the options of
`dino-xcit pretrain`; without any, `--config configs/demo.yaml`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dino_xcit.cli import parse
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.figures.command import attention
from dino_xcit.train.pretrain import pretrain

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main() -> None:
    start = time.perf_counter()
    config = parse("pretrain", PretrainConfig, sys.argv[1:] or ["--config", str(CONFIG)])
    outcome = pretrain(config)
    if outcome.interrupted:
        sys.exit(130)
    print(
        f"\n{outcome.steps} steps; the same as `dino-xcit knn-eval --weights {outcome.folder} --nb_knn 20 --baselines`:"
    )
    knn_eval(KnnConfig(weights=str(outcome.folder), nb_knn=(20,), baselines=True))
    weights, figures = str(outcome.folder), f"{outcome.folder}/figures"
    print(
        f"\nthe same as `dino-xcit attention --weights {weights} --masks shapes --figures heads overlay --html`:"
    )
    attention(
        AttentionConfig(
            weights=(weights,),
            output_dir=figures,
            masks="shapes",
            figures=("heads", "overlay"),
            html=True,
        )
    )
    print(
        f"\nall of this took {time.perf_counter() - start:.0f} s; look at {weights}/attention.png, {figures}/overlay.png"
    )
    print(f"and at {figures}/attention.html in a browser")


if __name__ == "__main__":
    main()
