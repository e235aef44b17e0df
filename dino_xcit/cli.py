"""`dino-xcit <command>`: parses the command line, then imports the one room that the command needs.

Exit code 0: done; 2: something that the user can put right, told in one line; 1: the run failed; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from dino_xcit import __version__
from dino_xcit.config import KnnConfig, LinearConfig, PretrainConfig

Config = TypeVar("Config")
PROGRAM = "dino-xcit"


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
            raise ValueError(f"unknown command {command!r}; did you mean {closest}? Commands: {', '.join(COMMANDS)}")
        _, config_class, run = COMMANDS[command]
        return run(parse(command, config_class, arguments))
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"\n{PROGRAM} {command}: stopped; the same command goes on from there (not with --no_cache)", file=sys.stderr
            )
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DINO_XCIT_TRACEBACK"):
            raise
        # What the user can put right is the same in every process, so the first one tells it.
        if not isinstance(error, ValueError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{PROGRAM} {command}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def entry() -> None:
    """The console script."""
    sys.exit(main())


def overview() -> str:
    """What `dino-xcit --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{description}" for name, (description, *_) in COMMANDS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} COMMAND [options]", "", *lines, "", f"{PROGRAM} COMMAND --help lists the options of a command."]
    )


def run_pretrain(config: PretrainConfig) -> int:
    from dino_xcit.pretrain import pretrain

    outcome = pretrain(config)
    if outcome.interrupted:
        print(
            f"stopped at step {outcome.step} of {outcome.steps}, saved; go on with: "
            f"{PROGRAM} pretrain --config {outcome.folder}/config.yaml",
            file=sys.stderr,
        )
        return 130
    if not config.dry_run:
        print(f"step {outcome.step} of {outcome.steps}: {outcome.folder}/teacher.safetensors")
    return 0


def run_knn_eval(config: KnnConfig) -> int:
    from dino_xcit.knn import knn_eval

    knn_eval(config)
    return 0


def run_linear_eval(config: LinearConfig) -> int:
    from dino_xcit.linear import linear_eval

    linear_eval(config)
    return 0


COMMANDS: dict[str, tuple[str, type, Callable[[Any], int]]] = {
    "pretrain": ("pretrain an XCiT backbone with DINO, without labels", PretrainConfig, run_pretrain),
    "knn-eval": ("classify by nearest neighbours of frozen features", KnnConfig, run_knn_eval),
    "linear-eval": ("train a linear classifier on frozen features", LinearConfig, run_linear_eval),
}


def parse(command: str, config_class: type[Config], arguments: list[str]) -> Config:
    """Command line -> config. Raises ValueError in one line; --help and --print_config print and exit."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"{PROGRAM} {command}", exit_on_error=False, allow_abbrev=False, description=config_class.__doc__
    )
    parser.add_argument("--config", action="config", help="YAML file of options; a flag on the line wins")
    parser.add_class_arguments(config_class)
    try:
        namespace = parser.parse_args(join_lists(arguments, config_class))
    except argparse.ArgumentError as error:
        raise ValueError(explain(error, parser)) from None
    return config_class(**{name: value for name, value in vars(namespace).items() if name != "config"})


def join_lists(arguments: list[str], config_class: type) -> list[str]:
    """Lists as official DINO takes them, `--nb_knn 10 20`, become YAML lists, `--nb_knn=[10, 20]`; a switch without a value,
    `--dry_run`, is switched on."""
    hints = get_type_hints(config_class)
    lists = {f"--{name}" for name, hint in hints.items() if get_origin(hint) is tuple}
    switches = {f"--{name}" for name, hint in hints.items() if bool in (hint, *get_args(hint))}
    joined: list[str] = []
    position = 0
    while position < len(arguments):
        flag = arguments[position]
        position += 1
        if flag not in lists:
            alone = arguments[position : position + 1] == [] or arguments[position].startswith("--")
            joined.append(f"{flag}=true" if flag in switches and alone else flag)
            continue
        end = next((i for i in range(position, len(arguments)) if arguments[i].startswith("--")), len(arguments))
        values = " ".join(arguments[position:end])
        joined.append(f"{flag}={values}" if values.startswith("[") else f"{flag}=[{', '.join(arguments[position:end])}]")
        position = end
    return joined


def explain(error: argparse.ArgumentError, parser: ArgumentParser) -> str:
    """jsonargparse's message in one line, with the flag as it is typed."""
    message = " ".join(str(error).split())
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].split("=")[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        closest = difflib.get_close_matches(flag, flags, n=1)
        return f"unknown option {flag}" + (f"; did you mean {closest[0]}?" if closest else "; --help lists the options")
    message = re.sub(r"Parser key \"(.*?)\":", r"--\1:", message)
    return re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))


if __name__ == "__main__":
    entry()
