"""Operations that one training step launches on a GPU, counted without one.

    python eval/speed/launches.py [--arch ... --output FILE]

A launch takes the host a few microseconds, whatever the size of the tensors, so small networks are
bound by their number. The step is not compiled. It is made on CUDA tensors without content
(`tests/fake_cuda.py`); an operation of torch counts as one launch, although some launch two or
three kernels, and a foreach operation one for every few dozen tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from common import circumstances

from dino_xcit.config.pretrain import RunConfig

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from fake_cuda import fake_run

PRINTED = 20  # operations
COUNTED = 1  # the second step: it neither logs nor is it the first


def count(arch: str, precision: str, batch: int) -> dict[str, Any]:
    """Launches of a step, in all and by operation."""
    config = RunConfig(
        arch=arch,
        precision=precision,
        batch_size_per_gpu=batch,
        drop_path_rate=0.1,
        output_dir=tempfile.gettempdir(),  # nothing is written
    )
    watch = fake_run(config, COUNTED + 1)
    operations = dict(watch.names[COUNTED].most_common())
    return {"arch": arch, "launches": watch.launches(COUNTED), "operations": operations}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["xcit_n12_p16", "xcit_s12_p16"])
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for arch in options.arch:
        row = count(arch, options.precision, options.batch)
        rows.append(row)
        print(f"{arch}, {options.precision}: {row['launches']} launches a step")
        for name, number in list(row["operations"].items())[:PRINTED]:
            print(f"  {number:5}  {name}")
    if options.output:
        described = {"precision": options.precision, "batch": options.batch}
        text = json.dumps({**circumstances(), **described, "rows": rows}, indent=2)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
