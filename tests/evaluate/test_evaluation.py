"""Evaluations as commands: what they print and write, what is left of a killed one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers import TINY
from PIL import Image
from run_pictures import empty_pictures

from dino_xcit.cli import main
from dino_xcit.config.evaluation import KnnConfig
from dino_xcit.data import shapes
from dino_xcit.evaluate.knn import knn_eval
from dino_xcit.train.pretrain import pretrain

if TYPE_CHECKING:
    from pathlib import Path

VALIDATION_IMAGES = 300  # of shapes
CPU = ["--accelerator", "cpu", "--precision", "32-true"]  # the same results on every CPU


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished pretraining of two epochs, with a k-NN accuracy in its metrics."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    config = dataclasses.replace(TINY, output_dir=str(folder), num_images=200, eval_num_images=1000)
    with pytest.MonkeyPatch.context() as patch, empty_pictures():
        patch.setattr(shapes, "VALIDATION_COUNT", VALIDATION_IMAGES)
        pretrain(config)
    return folder


@pytest.fixture(autouse=True)
def few_shapes(request, monkeypatch):
    """Fewer validation images, except in tests that start processes, which have all of them."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(shapes, "VALIDATION_COUNT", VALIDATION_IMAGES)


@pytest.fixture
def options(run, tmp_path) -> list[str]:
    return [
        "--weights",
        str(run),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--output_dir",
        str(tmp_path / "out"),
        *CPU,
    ]


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_knn_eval_prints_writes_and_caches(options, tmp_path, capsys):
    assert main(["knn-eval", *options, "--nb_knn", "3", "20", "--baselines"]) == 0
    printed = capsys.readouterr().out
    report = read(tmp_path / "out", "knn.json")
    assert [row["k"] for row in report["results"]] == [3, 20]
    assert report["results"][0]["top5"] is None
    low, high = report["results"][1]["top1_ci95"]
    assert low < report["results"][1]["top1"] < high
    assert f"{report['results'][1]['top1']:.1f} [{low:.1f}, {high:.1f}]" in printed
    assert list(report["baselines"]) == ["raw pixels", "xcit_pico2_p4, untrained"]
    assert report["data"] == {
        "train": 200,
        "validation": VALIDATION_IMAGES,
        "classes": 10,
        "unreadable": 0,
    }
    assert report["feature_extraction"]["images"] == 3 * (200 + VALIDATION_IMAGES)
    assert report["options"]["image_size"] == 16
    assert report["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "out/knn_classes.png") as picture:
        assert picture.size[0] > 500

    assert main(["knn-eval", *options, "--nb_knn", "3", "20", "--baselines"]) == 0
    again = read(tmp_path / "out", "knn.json")
    assert again["feature_extraction"] == {"images": 0, "seconds": 0.0, "images_per_second": None}
    assert (again["results"], again["baselines"]) == (report["results"], report["baselines"])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["knn-eval", "linear-eval"])
def test_raw_pixels_have_one_part_whatever_parts_are_chosen(command, options, tmp_path, capsys):
    chosen = ["--baselines", "--n_last_blocks", "2", "--avgpool_patchtokens", "true"]
    own = {"knn-eval": ["--nb_knn", "3"], "linear-eval": ["--epochs", "1", "--lr", "1"]}[command]
    assert main([command, *options, *own, *chosen]) == 0
    assert (
        capsys.readouterr().err.count("raw pixels: --n_last_blocks and --avgpool_patchtokens do")
        == 1
    )
    name = {"knn-eval": "knn.json", "linear-eval": "linear.json"}[command]
    report = read(tmp_path / "out", name)
    assert list(report["baselines"]) == ["raw pixels", "xcit_pico2_p4, untrained"]
    assert report["options"]["n_last_blocks"] == 2
    if command == "linear-eval":
        parts = [
            row["chosen"]["n_last_blocks"]
            for rows in (report["results"], *report["baselines"].values())
            for row in rows
        ]
        assert parts == [2, 1, 2]


@pytest.mark.slow
def test_default_neighbours_are_at_most_the_training_images(options, tmp_path, capsys):
    few = [*options, "--num_images", "50"]
    assert main(["knn-eval", *few]) == 0
    assert [row["k"] for row in read(tmp_path / "out", "knn.json")["results"]] == [10, 20, 50]
    assert "--nb_knn 10 20 50: there are 50 training images" in capsys.readouterr().err


def test_named_neighbours_are_checked_before_the_extraction(options, tmp_path, capsys):
    assert main(["knn-eval", *options, "--num_images", "50", "--nb_knn", "20", "51"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("--nb_knn 51 is more than the 50 training images")
    assert not list((tmp_path / "cache").glob("*/features.npy"))


def test_pretraining_logs_the_accuracy_that_knn_eval_finds(run, options, tmp_path):
    main(["knn-eval", *options, "--nb_knn", "20"])
    logged = (run / "metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("knn_top1")
    top1 = read(tmp_path / "out", "knn.json")["results"][0]["top1"]
    assert top1 == pytest.approx(float(logged[-1].split(",")[column]), abs=1e-3)


@pytest.mark.slow
def test_results_go_to_the_run_folder_and_every_kind_of_weights_gives_the_same(run, tmp_path):
    found = []
    for weights in (run, run / "teacher.safetensors", run / "checkpoints/last.ckpt"):
        (run / "knn.json").unlink(missing_ok=True)
        assert (
            main(
                [
                    "knn-eval",
                    "--weights",
                    str(weights),
                    "--cache_dir",
                    str(tmp_path),
                    *CPU,
                    "--nb_knn",
                    "10",
                ]
            )
            == 0
        )
        found.append(read(run, "knn.json")["results"])
    assert found[0] == found[1] == found[2]
    assert len(list(tmp_path.glob("*/features.npy"))) == 2, "one cache for the same tensors"


EVALUATIONS = {
    "knn": ["knn-eval", "--nb_knn", "1", "10"],
    "linear": ["linear-eval", "--lr", "0.01", "0.1", "1", "--epochs", "20"],
    # The last step has one image for two processes.
    "linear_dino": [
        *("linear-eval", "--protocol", "dino"),
        *("--epochs", "2", "--lr", "0.5", "--batch_size", "199"),
    ],
    "linear_logistic": ["linear-eval", "--protocol", "logistic", "--c", "0.01", "1", "100"],
}
SCRIPT = f"""
import json
import sys

from dino_xcit.cli import main
from dino_xcit.data import shapes

shapes.VALIDATION_COUNT = {VALIDATION_IMAGES}
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
"""


def compared(report):
    for row in report["results"]:
        row.get("chosen", {}).pop("held_out_top1", None)
    return report["results"]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(options, tmp_path, monkeypatch):
    """All evaluations in one pair of processes, whose start takes longer than they do."""
    monkeypatch.setattr(shapes, "VALIDATION_COUNT", VALIDATION_IMAGES)
    commands, reports, dumped = {}, {}, {}
    for devices in ("1", "2"):
        of_files = [
            "--output_dir",
            str(tmp_path / devices),
            "--cache_dir",
            f"{tmp_path}/c{devices}",
        ]
        machine = [*of_files, "--devices", devices, "--batch_size_per_gpu", "16"]
        # Of an option that is repeated the last one counts.
        commands[devices] = [[*typed, *options, *machine] for typed in EVALUATIONS.values()]
        commands[devices][0] += ["--dump_features", f"{tmp_path}/dump{devices}"]
    for arguments in commands["1"]:
        assert main(arguments) == 0
    (tmp_path / "script.py").write_text(SCRIPT)
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), json.dumps(commands["2"])],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for devices in ("1", "2"):
        assert not (tmp_path / devices / ".linear").exists()
        reports[devices] = {name: read(tmp_path / devices, f"{name}.json") for name in EVALUATIONS}
        dumped[devices] = torch.load(tmp_path / f"dump{devices}/testfeat.pth")
    assert torch.equal(dumped["1"], dumped["2"])
    for name in EVALUATIONS:
        assert finished.stdout.count(f"{name}.json") == 1
        one, two = (reports[devices][name] for devices in ("1", "2"))
        assert compared(one) == compared(two), name
        assert one["feature_extraction"]["images"] == two["feature_extraction"]["images"]
    assert reports["2"]["knn"]["feature_extraction"]["images"] == 200 + VALIDATION_IMAGES


@pytest.mark.slow
def test_a_killed_evaluation_continues_from_the_batch_it_was_in(options, tmp_path):
    arguments = [
        "knn-eval",
        *options,
        "--nb_knn",
        "5",
        "--batch_size_per_gpu",
        "4",
        "--num_workers",
        "0",
    ]
    command = [sys.executable, "-m", "dino_xcit.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cache = tmp_path / "cache"
    # Where it is absent, the command creates and removes it once, to see whether it is writable.
    cache.mkdir()

    def images_done() -> int:
        return sum(int((np.load(path) > 0).sum()) for path in cache.glob("*/state.npy"))

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while images_done() < 300 and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.001)
        finally:
            process.kill()
    done = images_done()
    assert 300 <= done < 2200
    assert main(arguments) == 0
    report = read(tmp_path / "out", "knn.json")
    assert report["feature_extraction"]["images"] == 2200 - done
    assert main([*arguments, "--cache_dir", str(tmp_path / "fresh")]) == 0
    assert read(tmp_path / "out", "knn.json")["results"] == report["results"]


def test_ctrl_c_prints_how_to_continue(options, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dino_xcit.evaluate.feature_store.extract", interrupt)
    assert main(["knn-eval", *options]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_features_come_from_and_go_to_official_files(options, tmp_path):
    dump = tmp_path / "dump"
    assert main(["knn-eval", *options, "--nb_knn", "10", "--dump_features", str(dump)]) == 0
    shapes = {
        name: tuple(torch.load(dump / f"{name}.pth").shape)
        for name in ("trainfeat", "testfeat", "trainlabels")
    }
    assert shapes == {
        "trainfeat": (200, 64),
        "testfeat": (VALIDATION_IMAGES, 64),
        "trainlabels": (200,),
    }
    torch.testing.assert_close(torch.load(dump / "trainfeat.pth").norm(dim=1), torch.ones(200))
    expected = read(tmp_path / "out", "knn.json")["results"]
    assert main(["knn-eval", "--load_features", str(dump), "--nb_knn", "10", *CPU]) == 0
    assert read(dump, "knn.json")["results"] == expected
    assert (
        main(
            [
                "linear-eval",
                "--load_features",
                str(dump),
                "--protocol",
                "logistic",
                "--c",
                "1",
                *CPU,
            ]
        )
        == 0
    )
    assert read(dump, "linear_logistic.json")["results"][0]["top1"] > 10


@pytest.mark.slow
def test_parts_of_the_features_can_be_chosen(options, tmp_path):
    widths = {}
    for blocks, pooled in ((1, "false"), (2, "false"), (1, "true"), (2, "true")):
        dump = tmp_path / f"{blocks}{pooled}"
        chosen = ["--n_last_blocks", str(blocks), "--avgpool_patchtokens", pooled]
        assert (
            main(["knn-eval", *options, *chosen, "--nb_knn", "5", "--dump_features", str(dump)])
            == 0
        )
        widths[blocks, pooled] = torch.load(dump / "testfeat.pth").shape[1]
    assert widths == {(1, "false"): 64, (2, "false"): 128, (1, "true"): 128, (2, "true"): 192}


def folder_of_images(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    rng = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_three_validation_images_are_enough(run, tmp_path):
    root = folder_of_images(
        tmp_path / "images", {"train": {"a": 8, "b": 9}, "val": {"a": 2, "b": 1}}
    )
    arguments = [
        "--weights",
        str(run),
        "--data_path",
        str(root),
        "--output_dir",
        str(tmp_path),
        "--no_cache",
        *CPU,
    ]
    assert main(["knn-eval", *arguments, "--nb_knn", "1", "17"]) == 0
    assert read(tmp_path, "knn.json")["data"] == {
        "train": 17,
        "validation": 3,
        "classes": 2,
        "unreadable": 0,
    }
    assert main(["linear-eval", *arguments, "--lr", "0.1", "1", "--epochs", "3"]) == 0


def test_classes_of_one_split_only(run, tmp_path, capsys):
    root = folder_of_images(
        tmp_path / "images", {"train": {"a": 8, "b": 9}, "val": {"b": 4, "c": 4}}
    )
    arguments = [
        "--weights",
        str(run),
        "--data_path",
        str(root),
        "--output_dir",
        str(tmp_path),
        "--no_cache",
        *CPU,
    ]
    assert main(["knn-eval", *arguments, "--nb_knn", "5"]) == 0
    assert "1 classes of the validation images have no training images" in capsys.readouterr().err
    report = read(tmp_path, "knn.json")
    assert report["data"]["validation"] == 8
    assert report["results"][0]["top1"] <= 50
    assert (
        main(
            [
                "linear-eval",
                *arguments,
                "--lr",
                "0.1",
                "--epochs",
                "3",
                "--protocol",
                "dino",
                "--num_workers",
                "0",
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knn-eval"], ["--weights or --load_features, neither"]),
        (
            ["knn-eval", "--weights", "nowhere"],
            ["--weights nowhere", "does not exist", "timm:NAME"],
        ),
        (
            ["knn-eval", "--weights", "RUN", "--nb_knn", "10", "201"],
            ["--nb_knn 201", "200 training images"],
        ),
        (["knn-eval", "--weights", "RUN", "--temperature", "0"], ["--temperature", "positive"]),
        (
            ["knn-eval", "--weights", "RUN", "--image_size", "17"],
            ["--image_size 17", "patch size 4"],
        ),
        (
            ["knn-eval", "--weights", "RUN", "--resize_size", "12"],
            ["--resize_size 12", "--image_size 16"],
        ),
        (
            ["knn-eval", "--weights", "RUN", "--n_last_blocks", "3"],
            ["--n_last_blocks 3", "2 layers"],
        ),
        (["knn-eval", "--weights", "RUN", "--in_chans", "1"], ["--mean", "--in_chans 1"]),
        (
            ["knn-eval", "--weights", "RUN/teacher.safetensors", "--arch", "xcit_n12_p8"],
            ["xcit_n12_p8", "missing"],
        ),
        (["knn-eval", "--weights", "RUN", "--accelerator", "abacus"], ["--accelerator abacus"]),
        (["knn-eval", "--weights", "RUN", "--data_path", "unlabelled"], ["have no labels"]),
        (
            ["knn-eval", "--weights", "RUN", "--data_path", "noval"],
            ["no validation images", "val/"],
        ),
        (
            ["knn-eval", "--weights", "RUN", "--load_features", "dump"],
            ["--weights or --load_features, both"],
        ),
        (["knn-eval", "--load_features", "dump"], ["--load_features dump has no trainfeat.pth"]),
        (["knn-eval", "--weights", "elsewhere.safetensors"], ["--data_path or --dataset"]),
        (
            ["linear-eval", "--weights", "RUN", "--protocol", "svm"],
            ["--protocol", "heads", "dino", "logistic"],
        ),
        (
            ["linear-eval", "--weights", "RUN", "--train_fraction", "2"],
            ["--train_fraction", "up to 1"],
        ),
        (
            ["linear-eval", "--weights", "RUN", "--protocol", "dino", "--lr", "1", "2"],
            ["--lr", "one number"],
        ),
        (
            ["linear-eval", "--load_features", "dump", "--protocol", "dino"],
            ["--load_features", "--protocol dino"],
        ),
        (["linear-eval", "--weights", "RUN", "--evaluate", "nowhere"], ["--evaluate nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run, arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "unlabelled", {"train": {".": 3}, "val": {".": 3}})
    folder_of_images(tmp_path / "noval", {"train": {"a": 3, "b": 3}})
    (tmp_path / "elsewhere.safetensors").write_bytes((run / "teacher.safetensors").read_bytes())
    given = [argument.replace("RUN", str(run)) for argument in arguments]
    given += [] if "--accelerator" in given else CPU
    assert main([*given, "--output_dir", str(tmp_path / "out")]) == 2
    err = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("features of ")
    ]
    assert len(err) == 1, err
    for word in words:
        assert word in err[0]


def test_a_diverged_network_is_an_error(run, tmp_path, capsys):
    from safetensors.torch import load_file, safe_open, save_file

    with safe_open(run / "teacher.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(run / "teacher.safetensors")
    tensors["norm.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", metadata=metadata)
    arguments = [
        "--weights",
        str(tmp_path / "nan.safetensors"),
        "--dataset",
        "shapes",
        "--no_cache",
        *CPU,
    ]
    for command in ("knn-eval", "linear-eval"):
        assert main([command, *arguments, "--output_dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"--weights .*nan.safetensors holds .* not finite .*: norm\.bias", line)


@pytest.mark.slow
def test_an_evaluation_of_python_is_the_one_of_the_command(run, options, tmp_path, capsys):
    machine = {"accelerator": "cpu", "precision": "32-true"}
    report = knn_eval(
        KnnConfig(weights=str(run), nb_knn=(7,), output_dir=str(tmp_path), no_cache=True, **machine)
    )
    assert main(["knn-eval", *options, "--nb_knn", "7"]) == 0
    assert report["results"] == read(tmp_path / "out", "knn.json")["results"]
