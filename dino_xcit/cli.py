"""`dino-xcit <command>`: parses the command line, then imports the one module the command needs.

Exit code 0: done, or SLURM will start the job again; 2: input the user can put right, in one line;
1: the run failed; 128 + a signal's number: stopped by it and saved (130 Ctrl-C, 143 SIGTERM,
138 SIGUSR1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from dino_xcit import __version__
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.evaluation import KnnConfig, LinearConfig, SegConfig
from dino_xcit.config.export import ExportConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Config = TypeVar("Config")
PROGRAM = "dino-xcit"
DEBUG = "--debug"
LONGEST_MESSAGE = 500  # characters: the parser quotes what it was given
FAULT = "this is a fault of dino_xcit, not of your input: please report it with the lines above"


class Command(NamedTuple):
    """One row of the command table. `dino_xcit.NAME` is the same function for Python."""

    config: type
    """dataclass of its options"""
    function: str
    """`module:function` in this package; called with the config"""
    summary: str
    """what `dino-xcit --help` says of it"""
    resumes: bool = False
    """the same command continues after Ctrl-C, and does not say so by itself"""
    large_tensors: bool = False
    """takes and frees large tensors all the time: the command's process keeps freed memory"""


COMMANDS = {
    "pretrain": Command(
        PretrainConfig,
        "train.pretrain:pretrain",
        "pretrain an XCiT backbone with DINO, without labels",
        large_tensors=True,
    ),
    "knn-eval": Command(
        KnnConfig,
        "evaluate.knn:knn_eval",
        "classify by nearest neighbours of frozen features",
        resumes=True,
    ),
    "linear-eval": Command(
        LinearConfig,
        "evaluate.linear:linear_eval",
        "train a linear classifier on frozen features",
        resumes=True,
    ),
    "seg-eval": Command(
        SegConfig,
        "evaluate.segmentation:seg_eval",
        "segment images by a linear layer on frozen patch tokens",
        resumes=True,
    ),
    "attention": Command(
        AttentionConfig,
        "figures.command:attention",
        "draw what the class-attention heads look at",
        large_tensors=True,
    ),
    "export": Command(
        ExportConfig,
        "weights.export:export",
        "write a backbone for timm, Hugging Face, official DINO, ONNX or torch.export",
    ),
}


def entry() -> None:
    """The console script."""
    sys.exit(main(own_process=True))


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; default: the process's own.
        own_process: whether the process is this command's, so that it may set the allocator.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    debug = DEBUG in arguments
    arguments = [word for word in arguments if word != DEBUG]
    try:
        return run(name, arguments, own_process)
    except KeyboardInterrupt:
        if is_first_process():
            resumes = name in COMMANDS and COMMANDS[name].resumes
            how = "; the same command continues from there (not with --no_cache)" if resumes else ""
            print(f"\n{PROGRAM} {name}: stopped{how}", file=sys.stderr)
        return 130
    except Exception as error:
        return report(name, error, debug)


def run(name: str, arguments: list[str], own_process: bool) -> int:
    """Parse the options of the command and call its function.

    Returns:
        The `exit_code` of what the function returns; 0 if that has none.

    Raises:
        UserError: the command or an option is unknown, or an option's value cannot be used.
    """
    if name not in COMMANDS:
        closest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown command {name!r}; did you mean {closest}? Commands: {', '.join(COMMANDS)}"
        )
    command = COMMANDS[name]
    config = parse(name, command.config, arguments)
    with interrupt_ends_the_process():
        function = load_function(command)
    if own_process and command.large_tensors:
        from dino_xcit.runtime import keep_freed_memory

        keep_freed_memory()
    return getattr(function(config), "exit_code", 0)


def load_function(command: Command) -> Callable[..., Any]:
    """Import the command's function, which takes seconds."""
    module, _, name = command.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"dino_xcit.{module}"), name)
    return function


def report(name: str, error: Exception, debug: bool) -> int:
    """Print the error: one line if it is the user's to put right or the run's end, else a traceback.

    Returns:
        The exit code: 2 for the user's errors, 1 for all others.
    """
    users = isinstance(error, UserError) or (
        isinstance(error, OSError) and error.filename is not None
    )
    expected = users or isinstance(error, RunFailedError)
    if debug or not expected:
        traceback.print_exception(error)
    # A user's error is the same in every process, so the first one prints it.
    if not isinstance(error, UserError) or is_first_process():
        line = str(error) if expected else FAULT
        print(f"{PROGRAM} {name}: {line}", file=sys.stderr)
    return 2 if users else 1


def is_first_process() -> bool:
    """Whether this is the first process of its machine, as the launcher left it in the environment."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def interrupt_ends_the_process() -> Iterator[None]:
    """Ctrl-C in the middle of an import may be swallowed, or make Python abort: end at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def overview() -> str:
    """What `dino-xcit --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    options = f"{PROGRAM} COMMAND --help lists the options of a command; {DEBUG} shows tracebacks."
    return "\n".join([f"usage: {PROGRAM} COMMAND [options]", "", *lines, "", options])


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
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of every error")
    parser.add_class_arguments(config_class)
    joined, words = join_lists(arguments, config_class)
    refuse_bad_configs(joined)
    try:
        namespace = parser.parse_args(joined)
    except argparse.ArgumentError as error:
        raise UserError(
            explain(error, [field.name for field in dataclasses.fields(config_class)])
        ) from None
    except RecursionError:
        raise UserError("an option has a value that is nested too deep") from None
    # Words pass by the parser, which reads YAML: names of files may hold anything.
    values = {**vars(namespace), **words}
    for name, hint in get_type_hints(config_class).items():
        if values[name] is None and type(None) not in get_args(hint):
            raise UserError(f"--{name} has no value; leave it out for its default, or give it one")
    return config_class(
        **{name: value for name, value in values.items() if name not in ("config", "debug")}
    )


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


def explain(error: argparse.ArgumentError, names: Sequence[str]) -> str:
    """jsonargparse's message in one line, with the flag as it is typed."""
    message = " ".join(str(error).split())
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        flag = unknown[1].split("=")[0]
        flags = [f"--{name}" for name in (*names, "config", "help", "print_config", "debug")]
        closest = difflib.get_close_matches(flag, flags, n=1)
        return f"unknown option {flag}" + (
            f"; did you mean {closest[0]}?" if closest else "; --help lists the options"
        )
    message = re.sub(r"Parser key \"(.*?)\":", r"--\1:", message)
    return re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))


if __name__ == "__main__":
    entry()
