"""The help pages and the shell's completions, which the command line shows without importing torch.

A page of ``pages/`` begins with what is written by hand: a summary, examples, the options that
people use. What the command's own parser says follows; options that several commands share are in
``search.txt`` and ``lightning.txt``, which a page names in a line as MkDocs has it.
``WRITE_PAGES=1 pytest tests/cli/test_help.py`` writes what parsers say, and ``options.txt``: a line
for each command, with its options.
"""

import argparse
import re
from importlib.resources import files
from typing import Any

import shtab

from kdnas.system.errors import UserError, nearest

_TWO_SCREENS = 60  # lines


def short_page(command: str) -> str:
    """The help page of a command; where it is longer than two screens, what is written by hand."""
    whole = page(command)
    if whole.count("\n") <= _TWO_SCREENS:
        return whole
    return f"{head(command)}\n\n`kdnas {command} --help all` explains all options.\n"


def head(command: str) -> str:
    """What of a page is written by hand."""
    return re.split("\n\n(?:positional arguments|options):\n", page(command))[0]


def page(command: str) -> str:
    """The help page of a command, with all options."""
    text = _shipped("pages", f"{command}.txt")
    for file in ("search.txt", "lightning.txt"):
        text = text.replace(f'--8<-- "kdnas/cli/{file}"', _shipped(file).strip())
    return text


def summary(command: str) -> str:
    """What a command is for, in a line."""
    return page(command).splitlines()[0].partition(": ")[2]


def _shipped(*path: str) -> str:
    return files("kdnas.cli").joinpath(*path).read_text(encoding="utf-8")


def known_options() -> dict[str, list[str]]:
    """All options, by command."""
    lines = (line.split() for line in _shipped("options.txt").splitlines())
    return {command: options for command, *options in lines}


def completion(shell: str) -> str:
    """A script that completes commands and options in a shell."""
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(
            f"{shell!r} is no shell that can be completed.{nearest(shell, shtab.SUPPORTED_SHELLS)}"
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
    # Where nothing of ours fits, bash completes names of files as it does for any other command.
    return shtab.complete(parser, shell).replace(
        "complete -o bashdefault ", "complete -o bashdefault -o default "
    )
