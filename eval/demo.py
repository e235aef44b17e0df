"""`make demo`: pretrain on the embedded shapes, then measure k-NN accuracy and draw attention maps.

The images of the evaluations are held out. An interrupted run continues where it stopped; a
finished run is only evaluated. The script takes the options of `dino-xcit pretrain`; without any
it runs `--config configs/demo.yaml`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import dino_xcit
from dino_xcit.cli import parse
from dino_xcit.runtime import keep_freed_memory

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main() -> None:
    start = time.perf_counter()
    config = parse("pretrain", dino_xcit.PretrainConfig, sys.argv[1:] or ["--config", str(CONFIG)])
    keep_freed_memory()
    outcome = dino_xcit.pretrain(config)
    if outcome.interrupted:
        sys.exit(130)
    weights, figures = str(outcome.folder), f"{outcome.folder}/figures"

    print(f"\n{outcome.steps} steps; k-NN, as by the command")
    print(f"  dino-xcit knn-eval --weights {weights} --nb_knn 20 --baselines")
    dino_xcit.knn_eval(weights=weights, nb_knn=(20,), baselines=True)

    print("\nattention maps, as by the command")
    print(
        f"  dino-xcit attention --weights {weights} --masks shapes --figures heads overlay --html"
    )
    dino_xcit.attention(
        weights=(weights,),
        output_dir=figures,
        masks="shapes",
        figures=("heads", "overlay"),
        html=True,
    )
    print(f"\nfinished in {time.perf_counter() - start:.0f} s; open {weights}/attention.png,")
    print(f"{figures}/overlay.png and, in a browser, {figures}/attention.html")


if __name__ == "__main__":
    main()
