"""Help pages and shell completions, shown without importing torch.

A page in ``pages/`` begins with its head, which is written by hand: a summary, examples and the
most used options. The output of the command's parser follows. Options that several commands share
are in ``search.txt`` and ``lightning.txt``, which a page includes by a line in MkDocs' syntax.
``WRITE_PAGES=1 pytest tests/cli/test_help.py`` rewrites the parsers' parts and ``options.txt``,
which lists the options of each command in a line.
"""

import argparse
import re
from importlib.resources import files
from typing import Any

import shtab

from kdnas.system.errors import UserError, nearest

_TWO_SCREENS = 60  # lines


def short_page(command: str) -> str:
    """Return the help page of a command.

    If the page is longer than two screens, return its head and how to see the rest.
    """
    whole = page(command)
    if whole.count("\n") <= _TWO_SCREENS:
        return whole
    return f"{head(command)}\n\n`kdnas {command} --help all` explains all options.\n"


def head(command: str) -> str:
    """Return the head of a command's help page: the part that is written by hand."""
    return re.split("\n\n(?:positional arguments|options):\n", page(command))[0]


def page(command: str) -> str:
    """Return the help page of a command, with all options."""
    text = _shipped("pages", f"{command}.txt")
    for file in ("search.txt", "lightning.txt"):
        text = text.replace(f'--8<-- "kdnas/cli/{file}"', _shipped(file).strip())
    return text


def summary(command: str) -> str:
    """Return what a command does, in one line."""
    return page(command).splitlines()[0].partition(": ")[2]


def _shipped(*path: str) -> str:
    return files("kdnas.cli").joinpath(*path).read_text(encoding="utf-8")


def known_options() -> dict[str, list[str]]:
    """Return a dictionary from each command to the list of its options."""
    lines = (line.split() for line in _shipped("options.txt").splitlines())
    return {command: options for command, *options in lines}


def completion(shell: str) -> str:
    """Return a shell script that completes commands and options.

    Raises:
        UserError: completion for this shell is not supported.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(
            f"{shell!r} is not a supported shell.{nearest(shell, shtab.SUPPORTED_SHELLS)}"
        )
    parser = argparse.ArgumentParser(prog="kdnas", add_help=False)
    commands = parser.add_subparsers()
    for command, options in known_options().items():
        subparser = commands.add_parser(command, help=summary(command), add_help=False)
        for option in options:
            dashed = option if "." in option else option.replace("_", "-")
            added: Any = subparser.add_argument(*dict.fromkeys((option, dashed)))
            added.complete = shtab.FILE
    shells = commands.add_parser("completion", help="a script for a shell", add_help=False)
    shells.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    # Let bash complete file names if no command or option matches, as it does by default.
    return shtab.complete(parser, shell).replace(
        "complete -o bashdefault ", "complete -o bashdefault -o default "
    )
