"""`dino-xcit <command>`: parses the command line, then imports the one module the command needs.

Exit codes: 0 done, or SLURM will start the job again; 2 a UserError or an OSError of a named file,
in one line; 1 the run failed or ended before its last step (one line), or a bug (traceback);
128 + a signal's number: stopped by it and saved (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1),
or the reader of stdout is gone (141 SIGPIPE).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml

from dino_xcit import __version__
from dino_xcit.config.attention import AttentionConfig
from dino_xcit.config.command_line import parse_options
from dino_xcit.config.evaluation import EmbedConfig, KnnConfig, LinearConfig, SegConfig
from dino_xcit.config.export import ExportConfig
from dino_xcit.config.pretrain import PretrainConfig
from dino_xcit.errors import LoaderError, RunFailedError, UserError
from dino_xcit.files import read_yaml
from dino_xcit.run_folder import folder_of_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Result = TypeVar("Result")
PROGRAM = "dino-xcit"
DEBUG = "--debug"
FAULT = "this is a fault of dino_xcit, not of your input: please report it with the lines above"
DEBUG_HELP = f"{DEBUG} shows the traceback of every error."


class Command(NamedTuple):
    """One row of the command table. `dino_xcit.NAME` is the same function for Python."""

    config: type[DataclassInstance]
    """dataclass of its options"""
    function: str
    """`module:function` in this package; called with the config"""
    summary: str
    """its line in `dino-xcit --help`"""
    resumes: bool = False
    """after Ctrl-C the same command continues; the command line prints that"""
    large_tensors: bool = False
    """allocates and frees large tensors often: the command's own process keeps freed memory"""


COMMANDS = {
    "pretrain": Command(
        PretrainConfig,
        "train.pretrain:pretrain",
        "pretrain a backbone with DINO, without labels",
        large_tensors=True,
    ),
    "knn-eval": Command(
        KnnConfig,
        "evaluate.knn:knn_eval",
        "classify by the nearest neighbours of frozen features",
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
        "train a linear segmentation layer on frozen patch tokens",
        resumes=True,
    ),
    "embed": Command(
        EmbedConfig,
        "evaluate.embed:embed",
        "write the features of any images, one row an image",
        resumes=True,
    ),
    "attention": Command(
        AttentionConfig,
        "figures.command:attention",
        "draw class-attention maps of images and videos",
        large_tensors=True,
    ),
    "export": Command(
        ExportConfig,
        "weights.export:export",
        "write a backbone for timm, Hugging Face, official DINO, ONNX or torch.export",
    ),
}


def entry() -> None:
    """Run the console script."""
    try:
        try:
            code = main(own_process=True)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; default: the process's own.
        own_process: whether the process is the command's own, so that it may set the allocator.

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
        if is_first_local_process():
            resumes = name in COMMANDS and COMMANDS[name].resumes
            how = "; the same command continues from there (not with --no_cache)" if resumes else ""
            print(f"\n{PROGRAM} {name}: stopped{how}", file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        sys.stdout.flush()  # raises again if stdout is the broken pipe
        return report(name, error, debug)
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
    """Import and return the command's function; this takes seconds."""
    module, _, name = command.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"dino_xcit.{module}"), name)
    return function


def with_options(
    function: Callable[..., Result], config_class: type[DataclassInstance]
) -> Callable[..., Result]:
    """Let a command's function also take the fields of its config as keywords.

    The function's other keywords are passed through. It raises TypeError for a keyword that is
    neither, and for a config together with fields.
    """
    fields = {field.name for field in dataclasses.fields(config_class)}
    _, *others = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(config: DataclassInstance | None = None, /, **keywords: object) -> Result:
        unknown = [name for name in keywords if name not in fields and name not in others]
        if unknown:
            closest = difflib.get_close_matches(unknown[0], [*fields, *others], n=1)
            hint = f"; did you mean {closest[0]}?" if closest else ""
            raise TypeError(f"{function.__name__}() has no option {unknown[0]!r}{hint}")
        options = {name: value for name, value in keywords.items() if name in fields}
        if config is not None and options:
            raise TypeError(
                f"{function.__name__}() takes a config or its options, not both: "
                f"{', '.join(options)} given beside a config"
            )
        passed = {name: value for name, value in keywords.items() if name in others}
        return function(config_class(**options) if config is None else config, **passed)

    return call


def report(name: str, error: Exception, debug: bool) -> int:
    """Print an error: in one line if it is a UserError or a failed run, else with its traceback.

    Returns:
        The exit code: 2 for the user's errors, 1 for all others.
    """
    of_file = isinstance(error, OSError) and error.filename is not None
    users = isinstance(error, UserError) or of_file
    expected = users or isinstance(error, RunFailedError)
    if debug or not expected:
        traceback.print_exception(error)
    # Every process raises the same UserError, except a loader's; the first one prints it.
    of_all = isinstance(error, UserError) and not isinstance(error, LoaderError)
    if not of_all or is_first_local_process():
        line = str(error) if expected else FAULT
        print(f"{PROGRAM} {name}: {line}", file=sys.stderr)
    return 2 if users else 1


def is_first_local_process() -> bool:
    """Whether this is the first process on its machine; the launcher sets the variable."""
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
    """Return what `dino-xcit --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    options = f"{PROGRAM} COMMAND --help lists the options of a command. {DEBUG_HELP}"
    return "\n".join([f"usage: {PROGRAM} COMMAND [options]", "", *lines, "", options])


def parse(command: str, config_class: type[Config], arguments: list[str]) -> Config:
    """Make the config of a command from its command line.

    Raises:
        UserError: an option is unknown, or its value cannot be used.
        SystemExit: --help or --print_config printed what was asked for.
    """
    arguments = with_configs_read(arguments, config_class)
    return parse_options(f"{PROGRAM} {command}", config_class, arguments, epilog=DEBUG_HELP)


def with_configs_read(arguments: list[str], config_class: type[DataclassInstance]) -> list[str]:
    """Replace each file of `--config` by its options, in YAML.

    `~` and variables in front of words are expanded. The `output_dir` of a run's own config.yaml is
    the folder in which that file lies.

    Raises:
        UserError: a file is not readable as YAML.
    """
    read = list(arguments)
    for index, (flag, following) in enumerate(itertools.pairwise([*arguments, ""])):
        name, equals, value = flag.partition("=")
        path = Path(value if equals else following)
        if name != "--config" or not path.is_file():
            continue
        content = read_yaml(path)
        if not isinstance(content, dict):
            continue
        options = {option: _expanded(value) for option, value in content.items()}
        folder = folder_of_config(path)
        if folder is not None and config_class is PretrainConfig:
            options["output_dir"] = str(folder)
            options.setdefault("recipe", "official")  # of versions that had no other
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        read[index if equals else index + 1] = f"--config={text}" if equals else text
    return read


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) if isinstance(item, str) else item for item in value]
    if isinstance(value, str) and value.startswith(("~", "$")):
        return os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111  # leaves ~nobody as it is
    return value


if __name__ == "__main__":
    entry()
