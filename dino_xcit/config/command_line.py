"""Command line -> config: flags as official DINO takes them, YAML files, and errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from dino_xcit.config.checks import AUTO
from dino_xcit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
CONFIG_HELP = "YAML file of options; a flag on the command line wins"
LONGEST_MESSAGE = 500  # characters; the parser quotes its whole input


def parse_options(
    program: str, config_class: type[Config], arguments: list[str], *, epilog: str = ""
) -> Config:
    """Make a config from a command line.

    Args:
        program: name of the command in its help.
        config_class: dataclass of the options; its docstrings are their help.
        arguments: the command line after the command.
        epilog: last paragraph of the help.

    Raises:
        UserError: an option is unknown, or its value cannot be used.
        SystemExit: --help or --print_config printed what was asked for.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        exit_on_error=False,
        allow_abbrev=False,
        description=config_class.__doc__,
        epilog=epilog,
    )
    parser.add_argument("--config", action="config", help=CONFIG_HELP)
    parser.add_class_arguments(config_class)
    joined, words = join_lists(arguments, config_class)
    try:
        namespace = parser.parse_args(joined)
    except argparse.ArgumentError as error:
        fields = [field.name for field in dataclasses.fields(config_class)]
        raise UserError(explain(error, fields)) from None
    except RecursionError:
        raise UserError("an option has a value that is nested too deep") from None
    # Lists of words bypass the parser, which reads YAML: names of files may hold anything.
    values = {**vars(namespace), **words}
    for name, hint in get_type_hints(config_class).items():
        if values[name] is None and type(None) not in get_args(hint):
            raise UserError(f"--{name} has no value; leave it out for its default, or give it one")
    return config_class(**{name: value for name, value in values.items() if name != "config"})


class _Options(NamedTuple):
    """What `join_lists` needs to know of a command's options."""

    lists: dict[str, Any]
    """flags of lists, and the type of their items"""
    several: set[str]
    """flags of one word or several"""
    switches: set[str]
    """flags of Booleans"""
    takes_images: bool
    """whether words without a flag are images"""

    @classmethod
    def of(cls, config_class: type) -> _Options:
        hints = get_type_hints(config_class)
        tuples = {n: _tuple_in(hint) for n, hint in hints.items()}
        several = {
            f"--{n}" for n, h in hints.items() if tuples[n] not in (None, h) and str in get_args(h)
        }
        lists = {f"--{n}": get_args(h)[0] for n, h in tuples.items() if h is not None}
        lists = {flag: item for flag, item in lists.items() if flag not in several}
        switches = {f"--{n}" for n, h in hints.items() if bool in (h, *get_args(h))}
        return cls(lists, several, switches, "images" in hints)


def _tuple_in(hint: Any) -> Any:
    """Return the type of the option's lists: the hint, or its part if it is a union; else None."""
    return next((part for part in (hint, *get_args(hint)) if get_origin(part) is tuple), None)


def join_lists(
    arguments: list[str], config_class: type
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Rewrite the command line for the parser.

    Lists as official DINO takes them, `--nb_knn 10 20`, become YAML lists, `--nb_knn=[10, 20]`; a
    switch without a value, `--dry_run`, gets the value true. Lists of words are taken out: each of
    their flags has one word, `--weights A --weights B`; words that belong to no flag, or come after
    `--`, are the images.

    Returns:
        The arguments for the parser, and the lists of words by option.
    """
    options = _Options.of(config_class)
    joined: list[str] = []
    words: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if options.takes_images and word == "--":
            words.setdefault("images", []).extend(rest)
            break
        if options.takes_images and not word.startswith("-"):
            words.setdefault("images", []).append(word)
            continue
        flag, equals, value = word.partition("=")
        following = [value] if equals else rest
        following = list(itertools.takewhile(lambda w: not w.startswith("--"), following))
        if options.lists.get(flag) is str and following:
            words.setdefault(flag[2:], []).append(following[0])
            taken = 1
        elif equals:
            joined.append(word)
        else:
            with_value, taken = _with_value(flag, following, options)
            joined += with_value
        if not equals:
            del rest[:taken]
    return joined, {name: tuple(values) for name, values in words.items()}


def _with_value(flag: str, following: list[str], options: _Options) -> tuple[list[str], int]:
    """Return a flag with its value as the parser takes it, and how many words the value has."""
    if flag in options.lists:
        item = options.lists[flag]
        taken = _items(following, item) if options.takes_images else len(following)
        values = following[:taken]
        as_typed = values == [AUTO] or (bool(values) and values[0].startswith("["))
        return [
            f"{flag}={' '.join(values)}" if as_typed else f"{flag}=[{', '.join(values)}]"
        ], taken
    if flag in options.several and len(following) > 1:
        return [f"{flag}={json.dumps(following)}"], len(following)
    value_is_word = following and (not options.takes_images or following[0] in ("true", "false"))
    if flag in options.switches and not value_is_word:
        return [f"{flag}=true"], 0
    takes_value = flag.startswith("--") and flag not in ("--help", "--print_config")
    taken = int(takes_value and bool(following))
    return [flag, *following[:taken]], taken


def _items(words: list[str], item: Any) -> int:
    """Return how many of these words belong to a list that images may follow.

    The first word does, and those after it that are of the items' type.
    """
    choices = get_args(item)
    fits = [
        word in choices if choices else re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", word) is not None
        for word in words
    ]
    return next((i for i, one in enumerate(fits) if i and not one), len(words))


def explain(error: argparse.ArgumentError, names: Sequence[str]) -> str:
    """Return jsonargparse's message in one line, with the flag as it is typed."""
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
    none_fits = re.match(r"(--\w+): Does not .* Subtypes: \[(.*)\] Errors:.* value: (.*)", message)
    if none_fits:
        flag, types, value = none_fits.groups()
        kinds = re.findall(r"tuple\[.*?\]|\bint\b|\bfloat\b|'\w+'", types)
        expected = " or ".join(_kind(kind) for kind in kinds if kind != "'NoneType'")
        return f"{flag} is {value}; expected {expected}" if kinds else message
    return re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))


def _kind(name: str) -> str:
    """What a type of an option is called in a message."""
    if name.startswith("tuple["):
        return f"{name.count(',') + 1} numbers"
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    return kinds.get(name.strip("'"), name.strip("'"))
