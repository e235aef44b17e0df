"""What all evaluations share: processes, inputs, report, table.

To add an evaluation, write

1. a config class that extends `EvalConfig` (any images) or `ClassificationConfig` (one class an
   image), with a field for each further option;
2. a function `score(evaluation, features)` that returns the rows of results for the features of
   one network; `features.chosen_parts` returns what --n_last_blocks and --avgpool_patchtokens name;
3. a function for the command that passes both to `evaluate`, with the stem of the JSON file, which
   is a constant in `run_folder.py`;
4. its row in `cli.COMMANDS`, which makes it a command and `dino_xcit.NAME`. `resumes=True` prints,
   after Ctrl-C, that the same command continues: true of features, which are cached.

`tests/evaluate/test_frame.py` contains a complete one.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from dino_xcit.config.evaluation import ClassificationConfig, EvalConfig
from dino_xcit.evaluate.inputs import CLASSIFICATION, open_inputs
from dino_xcit.evaluate.report import Report, Result, output_folder, provenance, table
from dino_xcit.files import write_json
from dino_xcit.run_folder import result_file
from dino_xcit.runtime import launch, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lightning.fabric import Fabric

    from dino_xcit.evaluate.features import Features
    from dino_xcit.evaluate.inputs import Task

Config = TypeVar("Config", bound=EvalConfig)


@dataclasses.dataclass
class Evaluation(Generic[Config]):
    """An evaluation in progress: what its `score` function needs beside the features."""

    config: Config
    """options, with defaults of the weights filled in"""
    fabric: Fabric
    """the processes; `score` runs in all of them"""
    folder: Path
    """where results are written"""
    class_names: dict[int, str]
    """by label; classes may have no names"""
    weights: Features
    """features of the weights; `score` gets these first, then those of the baselines"""
    files: list[str] = dataclasses.field(default_factory=list)
    """names of the files written so far"""
    classes: int | None = None
    """number of classes, if the images' labels do not show it"""

    def writes(self, features: Features) -> bool:
        """Whether to write files about these features: the first process, not for baselines."""
        return features is self.weights and self.fabric.is_global_zero

    def file(self, name: str) -> Path:
        """Path of a file to write; its name is printed at the end."""
        if name not in self.files:
            self.files.append(name)
        return self.folder / name


def evaluate(
    config: Config,
    score: Callable[[Evaluation[Config], Features], list[Result]],
    *,
    name: str,
    protocol: str,
    title: str,
    columns: Mapping[str, Callable[[Result], str]],
    task: Task = CLASSIFICATION,
) -> Report:
    """Run one evaluation of the weights and the baselines, and write and print its results.

    Args:
        config: Options as typed.
        score: Computes the rows of results for one network. Called in every process.
        name: Stem of the JSON file.
        protocol: One line about the method, for the report.
        title: Header of the table's first column, which names the network.
        columns: The table's other columns: header, and text for a row of results.
        task: Which images and features are evaluated.

    Returns:
        The content of `NAME.json`.

    Raises:
        UserError: Input that the user can put right; the message names the flag.
    """
    folder = output_folder(config)
    fabric = launch(config)
    start = time.perf_counter()
    # Loading weights initialises a network first, which uses torch's global random numbers.
    with torch.random.fork_rng(devices=[]), open_inputs(config, fabric, task) as inputs:
        folder.mkdir(parents=True, exist_ok=True)
        weights = inputs.features[0]
        evaluation = Evaluation(inputs.config, fabric, folder, inputs.class_names, weights)
        results = {
            features.name: score(_of_its_parts(evaluation, features), features)
            for features in inputs.features
        }
        report = {
            "protocol": protocol,
            "results": results[weights.name],
            "baselines": {key: rows for key, rows in results.items() if key != weights.name},
            "seconds": round(time.perf_counter() - start, 2),
            **provenance(inputs.config, inputs.features),
        }
        if evaluation.classes is not None:
            report["data"]["classes"] = evaluation.classes
        if fabric.is_global_zero:
            write_json(folder / result_file(name), report)
    if fabric.is_global_zero:
        print(_table(title, columns, results))
        print(f"{folder}: {', '.join([result_file(name), *evaluation.files])}")
    return report


def _of_its_parts(evaluation: Evaluation[Config], features: Features) -> Evaluation[Config]:
    """The evaluation, without a choice of parts for a baseline of one part: raw pixels."""
    config = evaluation.config
    if features is evaluation.weights or not isinstance(config, ClassificationConfig):
        return evaluation
    if features.shape[0] > 1 or not (config.avgpool_patchtokens or (config.n_last_blocks or 1) > 1):
        return evaluation
    if evaluation.fabric.is_global_zero:
        say(f"{features.name}: --n_last_blocks and --avgpool_patchtokens do not apply")
    whole = dataclasses.replace(config, n_last_blocks=None, avgpool_patchtokens=None)
    return dataclasses.replace(evaluation, config=whole)


def _table(
    title: str,
    columns: Mapping[str, Callable[[Result], str]],
    results: Mapping[str, list[Result]],
) -> str:
    """One line for each network and row of results."""
    rows = [
        [network, *(text(row) for text in columns.values())]
        for network, of_network in results.items()
        for row in of_network
    ]
    return table([title, *columns], rows)
