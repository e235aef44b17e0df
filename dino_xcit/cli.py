"""`dino-xcit <command>`: parses the command line, then imports the one room that the command needs.

Exit code 0: done, or SLURM will start it again; 2: something that the user can put right, told in one line; 1: the run
failed; 128 + a signal's number: stopped by it and saved (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from dino_xcit import __version__
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig, LinearConfig, SegConfig
from dino_xcit.config.export import ExportConfig
from dino_xcit.config.pretrain import PretrainConfig

Config = TypeVar("Config")
PROGRAM = "dino-xcit"
LONGEST_MESSAGE = 500  # characters: the parser quotes what it was given
RESUMABLE = ("knn-eval", "linear-eval", "seg-eval")  # pretraining tells it by itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(overview())
        return 0
    if command == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        if command not in COMMANDS:
            closest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown command {command!r}; did you mean {closest}? Commands: {', '.join(COMMANDS)}"
            )
        _, config_class, run = COMMANDS[command]
        config: Any = parse(command, config_class, arguments)
        with ctrl_c_at_once():
            importlib.import_module(f"dino_xcit.{ROOMS[command]}")
        return run(config)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            goes_on = (
                "; the same command goes on from there (not with --no_cache)"
                if command in RESUMABLE
                else ""
            )
            print(f"\n{PROGRAM} {command}: stopped{goes_on}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("DINO_XCIT_TRACEBACK"):
            raise
        # What the user can put right is the same in every process, so the first one tells it.
        if not isinstance(error, ValueError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{PROGRAM} {command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2


@contextlib.contextmanager
def ctrl_c_at_once() -> Iterator[None]:
    """KeyboardInterrupt in the middle of an import may be swallowed, or make Python abort. Nothing is there to be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def entry() -> None:
    """The console script."""
    sys.exit(main())


def overview() -> str:
    """What `dino-xcit --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{description}" for name, (description, *_) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command.",
        ]
    )


def run_pretrain(config: PretrainConfig) -> int:
    from dino_xcit.train.pretrain import pretrain

    outcome = pretrain(config)
    if outcome.stopped_by is not None:
        print(
            f"stopped at step {outcome.step} of {outcome.steps}, saved; go on with: "
            f"{PROGRAM} pretrain --config {outcome.folder}/config.yaml",
            file=sys.stderr,
        )
        return 0 if outcome.requeued else 128 + outcome.stopped_by
    if not config.dry_run:
        print(f"step {outcome.step} of {outcome.steps}: {outcome.folder}/teacher.safetensors")
    return 0


def run_knn_eval(config: KnnConfig) -> int:
    from dino_xcit.evaluate.knn import knn_eval

    knn_eval(config)
    return 0


def run_linear_eval(config: LinearConfig) -> int:
    from dino_xcit.evaluate.linear import linear_eval

    linear_eval(config)
    return 0


def run_seg_eval(config: SegConfig) -> int:
    from dino_xcit.evaluate.segmentation import seg_eval

    seg_eval(config)
    return 0


def run_attention(config: AttentionConfig) -> int:
    from dino_xcit.figures.command import show_attention
    from dino_xcit.files import printable

    problems = show_attention(config)
    for problem in problems:
        print(printable(f"{PROGRAM} attention: {problem}"), file=sys.stderr)
    return 2 if problems else 0


def run_export(config: ExportConfig) -> int:
    from dino_xcit.weights.export import export

    for path in export(config):
        print(path)
    return 0


COMMANDS: dict[str, tuple[str, type, Callable[[Any], int]]] = {
    "pretrain": (
        "pretrain an XCiT backbone with DINO, without labels",
        PretrainConfig,
        run_pretrain,
    ),
    "knn-eval": ("classify by nearest neighbours of frozen features", KnnConfig, run_knn_eval),
    "linear-eval": ("train a linear classifier on frozen features", LinearConfig, run_linear_eval),
    "seg-eval": (
        "segment images by a linear layer on frozen patch tokens",
        SegConfig,
        run_seg_eval,
    ),
    "attention": ("draw what the class-attention heads look at", AttentionConfig, run_attention),
    "export": (
        "write a backbone for timm, Hugging Face, official DINO, ONNX or torch.export",
        ExportConfig,
        run_export,
    ),
}

ROOMS = {  # of the commands, which take seconds to import
    "pretrain": "train.pretrain",
    "knn-eval": "evaluate.knn",
    "linear-eval": "evaluate.linear",
    "seg-eval": "evaluate.segmentation",
    "attention": "figures.command",
    "export": "weights.export",
}


def parse(command: str, config_class: type[Config], arguments: list[str]) -> Config:
    """Command line -> config. Raises ValueError in one line; --help and --print_config print and exit."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"{PROGRAM} {command}",
        exit_on_error=False,
        allow_abbrev=False,
        description=config_class.__doc__,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of options; a flag on the line wins"
    )
    parser.add_class_arguments(config_class)
    joined, words = join_lists(arguments, config_class)
    refuse_bad_configs(joined)
    try:
        namespace = parser.parse_args(joined)
    except argparse.ArgumentError as error:
        raise ValueError(explain(error, parser)) from None
    except RecursionError:
        raise ValueError("an option has a value that is nested too deep") from None
    # Words pass by the parser, which reads YAML: names of files may hold anything.
    values = {**vars(namespace), **words}
    for name, hint in get_type_hints(config_class).items():
        if values[name] is None and type(None) not in get_args(hint):
            raise ValueError(f"--{name} has no value; leave it out for its default, or give it one")
    return config_class(**{name: value for name, value in values.items() if name != "config"})


def refuse_bad_configs(arguments: list[str]) -> None:
    """Raises ValueError for a --config FILE on which the parser would choke."""
    for flag, following in itertools.pairwise([*arguments, ""]):
        name, _, value = flag.partition("=")
        path = Path(value or following)
        if name == "--config" and path.is_file():
            from dino_xcit.files import read_yaml

            read_yaml(path)


def join_lists(
    arguments: list[str], config_class: type
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Lists as official DINO takes them, `--nb_knn 10 20`, become YAML lists, `--nb_knn=[10, 20]`; a switch without a value,
    `--dry_run`, is switched on.

    Beside them the lists of words by option. Each flag brings one word, `--weights A --weights B`; words that belong to no
    flag, or stand after `--`, are the images.
    """
    hints = get_type_hints(config_class)
    lists = {
        f"--{name}": get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is tuple
    }
    switches = {f"--{name}" for name, hint in hints.items() if bool in (hint, *get_args(hint))}
    takes_images = "images" in hints
    joined: list[str] = []
    words: dict[str, list[str]] = {}
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        following = [value] if equals else arguments[position + 1 :]
        end = next((i for i, word in enumerate(following) if word.startswith("--")), len(following))
        taken = 0
        if arguments[position] == "--" and takes_images:
            words.setdefault("images", []).extend(arguments[position + 1 :])
            break
        if not flag.startswith("-") and takes_images:
            words.setdefault("images", []).append(arguments[position])
        elif lists.get(flag) is str and end:
            words.setdefault(flag[2:], []).append(following[0])
            taken = 1
        elif flag in lists and not equals:
            taken = _items(following[:end], lists[flag]) if takes_images else end
            values = following[:taken]
            typed_as_yaml = values and values[0].startswith("[")
            joined.append(
                f"{flag}={' '.join(values)}" if typed_as_yaml else f"{flag}=[{', '.join(values)}]"
            )
        elif (
            flag in switches
            and not equals
            and (not end or (takes_images and following[0] not in ("true", "false")))
        ):
            joined.append(f"{flag}=true")
        else:
            taken = int(
                flag.startswith("--")
                and flag not in ("--help", "--print_config")
                and not equals
                and end > 0
            )
            joined += arguments[position : position + 1 + taken]
        position += 1 + (0 if equals else taken)
    return joined, {name: tuple(values) for name, values in words.items()}


def _items(words: list[str], item: Any) -> int:
    """How many of these words a list takes where others may follow: the first, and those after it that can be its items."""
    choices = get_args(item)
    fits = [
        word in choices if choices else re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", word) is not None
        for word in words
    ]
    return next((i for i, one in enumerate(fits) if i and not one), len(words))


def explain(error: argparse.ArgumentError, parser: ArgumentParser) -> str:
    """jsonargparse's message in one line, with the flag as it is typed."""
    message = " ".join(str(error).split())
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        closest = difflib.get_close_matches(flag, flags, n=1)
        return f"unknown option {flag}" + (
            f"; did you mean {closest[0]}?" if closest else "; --help lists the options"
        )
    message = re.sub(r"Parser key \"(.*?)\":", r"--\1:", message)
    return re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))


if __name__ == "__main__":
    entry()
