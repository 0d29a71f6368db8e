"""Options and YAML into the configs of ``kdnas.commands.config``, and one line for what the parser does not take."""

import inspect
import json
import re
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from kdnas.commands.config import RunConfig, SearchConfig, as_plain
from kdnas.distillation.module import Recipe
from kdnas.system.errors import UserError, first_line, nearest
from kdnas.system.yaml import NO_VALUE, check_yaml

_CONFIG_HELP = (
    "YAML of these options; what comes later wins. A configs/NAME.yaml that is not in this folder is the one that "
    "kdnas ships."
)


_OF_RUN = {field.name for field in fields(RunConfig)} - {
    field.name for field in fields(SearchConfig)
}


def default_objects() -> dict[str, Any]:
    """The parser cannot write default objects as YAML, so it is told their class paths."""
    return {f"recipe.{name}": as_plain(getattr(Recipe(), name)) for name in ("objective", "start")}


def read_config(
    config_class: type[Any], command: str, args: Sequence[str], **flags: str
) -> tuple[Any, dict[str, bool]]:
    """A config from YAML and options, and which flags were set.

    Args:
        config_class: of ``kdnas.commands.config``; its fields are the options.
        command: of ``kdnas``, for the help.
        args: options.
        flags: name -> help of options that are set or not, and no part of the config.

    Raises:
        UserError: an option or a key that there is not, or a value that it cannot have.
    """
    hints = get_type_hints(config_class)
    refuse_ambiguous_yaml()
    parser = ArgumentParser(prog=f"kdnas {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(config_class)
    parser.set_defaults(default_objects() if "recipe" in hints else {})
    args = _gather_lists(for_parser(args), hints)
    try:
        parsed = parser.parse_args(args)
        _refuse_null(config_class, parsed)
        options = vars(parser.instantiate(parsed))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise in_one_line(error, parser) from error
    except (
        ValueError
    ) as error:  # of settings that may be left out as a whole: the parser wraps what they say
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error from None
    options.pop("config")
    return config_class(**{k: v for k, v in options.items() if k not in flags}), {
        k: options[k] for k in flags
    }


def for_parser(args: Sequence[str]) -> list[str]:
    """The options with ``--time_budget`` for ``--time-budget``, which are the same, and with configs that kdnas ships.

    ``--config configs/NAME.yaml`` is one of those where no such file is here.

    Raises:
        UserError: kdnas ships none of that name either.
    """
    args = [
        re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), arg)
        for arg in args
    ]
    found = list(args)
    for place, (before, arg) in enumerate(zip(["", *args], args, strict=False)):
        path = Path(arg if before in ("-c", "--config") else arg.partition("--config=")[2])
        if path.parent == Path("configs") and not path.exists():
            shipped = {
                file.name: file for file in Path(__file__).with_name("configs").glob("*.yaml")
            }
            if path.name not in shipped:
                raise UserError(
                    f"There is no {str(path)!r}.{nearest(path, (f'configs/{name}' for name in shipped))}"
                )
            found[place] = arg.removesuffix(str(path)) + str(shipped[path.name])
    return found


def _gather_lists(args: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """``--batch 1 8`` and ``--model A --model B`` as the parser reads lists, ``--batch=[1, 8]``, where the last was."""
    lists: dict[str, list[Any]] = {}
    places: dict[str, int] = {}  # of each list among the others
    others: list[str] = []
    target: list[Any] | None = None
    for arg in args:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            is_list = get_origin(hints.get(name)) is list and not value.startswith("[")
            target = lists.setdefault(name, []) if is_list else None
            if is_list:
                places[name] = len(others)
                if not equals:
                    continue
        if target is None:
            others.append(arg)
            continue
        item = value if arg.startswith("--") else arg
        kind = get_args(hints[next(name for name, items in lists.items() if items is target)])[0]
        target.append(int(item) if kind is int and item.lstrip("-").isdigit() else item)
    for name, place in sorted(places.items(), key=lambda item: -item[1]):
        others.insert(place, f"--{name}={json.dumps(lists[name])}")
    return others


def _refuse_null(config_class: type[Any], values: Any, prefix: str = "") -> None:
    """Refuse null where it is no value, and a value where keys belong: the parser takes both everywhere."""
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        name, hint, value = f"{prefix}{field.name}", hints[field.name], values.get(field.name)
        if value is None and type(None) not in get_args(hint):
            raise UserError(f"{name} is null: give a value, or leave it out.")
        whole = next(
            (kind for kind in get_args(hint) if is_dataclass(kind)), None
        )  # which may be left out
        if whole and isinstance(value, Namespace):
            _refuse_null(whole, value, f"{name}.")  # type: ignore[arg-type]
        if is_dataclass(hint):
            if not isinstance(value, Namespace):
                raise UserError(f"{name} is {value!r:.40}: give its keys, or leave it out.")
            _refuse_null(hint, value, f"{name}.")  # type: ignore[arg-type]


_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "list[int]": "a list of whole numbers, such as [1, 2]",
    "list[str]": "a list, such as [a, b]",
}


def _wrong_value(message: str) -> str | None:
    """What the parser says of a value that its key cannot have, in the user's words; None: it says something else."""
    found = re.match(r'Parser key "([\w.]+)": (.*)', message)
    if not found:
        return None
    key, said = found.groups()
    if wrong := re.search(
        r"class_path '([\w.]+)': (No module named '.*?'|module '.*?' has no attribute '.*?')", said
    ):
        where = "a file in this folder, of one on PYTHONPATH, or of a package"
        return f"{key} is {wrong[1]!r}, which is not there ({wrong[2]}): give a class of {where}."
    said, _, value = said.rpartition(" value: ") if " value: " in said else (said, "", "")
    if loaded := re.match(r"Unable to load config '(.*?)'", said):
        return f"{key} is {loaded[1]!r}: give its keys, as in --{key}.KEY VALUE, or a YAML file of them."
    if path := re.match(r"Expected a dot import path string: (.*)", said):
        return f"{key} is {path[1].rstrip('.')!r}: give the path of a class, such as package.module.Name."
    options = re.search(r"Literal\[(.*?)\]", said)
    kinds = [words for kind, words in _KINDS.items() if kind in said.partition("Errors:")[0]]
    if options:
        kinds.append(f"one of {options[1].replace(chr(39), '')}")
    value = value.rstrip(".")
    given = "not given" if value == "None" else repr(value)
    return f"{key} is {given}: give {' or '.join(kinds)}." if value and kinds else None


def in_one_line(error: ArgumentError | UnicodeDecodeError, parser: Any) -> UserError:
    """What the parser says, with the nearest name where it does not know one."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(
            f"The config is not UTF-8 ({error.reason} at byte {error.start}): give a YAML file."
        )
    message = " ".join(str(error).split())
    if wrong := _wrong_value(message):
        return UserError(wrong)
    if unmapped := re.match(r"Unexpected config: ?(.{0,60})", message):
        return UserError(
            f"A config is {unmapped[1]!r}: it must map names to values, in lines such as `name: mine`."
        )
    if message.startswith(
        ("Empty nested key", "Key must be a string", "Spaces not allowed in keys")
    ):
        return UserError(
            f"A key of the config is no name ({message.rstrip('.')}): give it one of letters."
        )
    if ambiguous := re.match(r"ambiguous option: (\S+) could match", message):
        message = f"unrecognized arguments: {ambiguous[1]}"
    unknown = re.search(r"(?:option|Option|arguments:) '?(?:--)?([\w.]+)", message)
    of_class = re.search(r"class_path '([\w.]+)': Option", message)
    hint = ""
    if unknown and of_class:
        module, _, name = of_class[1].rpartition(".")
        with suppress(
            ImportError, AttributeError
        ):  # of a class within a class the parser knows more
            hint = nearest(
                unknown[1], inspect.signature(getattr(import_module(module), name)).parameters
            )
    elif unknown and parser.prog == "kdnas search" and unknown[1].split(".")[0] in _OF_RUN:
        hint = " It is an option of `kdnas run`."
    elif unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        prefix = f"{group[1]}." if group else ""
        names = [
            key.removeprefix(prefix)
            for key in dict(parser.get_defaults().items())
            if key.startswith(prefix)
        ]
        hint = nearest(
            unknown[1], {name if "." in unknown[1] else name.split(".")[0] for name in names}
        )
    return UserError(message.rstrip(".") + "." + hint)


@cache
def refuse_ambiguous_yaml() -> None:
    """Let the parser read only YAML that means what it says."""
    parse = get_loader("yaml")

    def load(text: str) -> Any:
        check_yaml(text)
        try:
            return parse(text)
        except NO_VALUE as error:
            raise yaml.YAMLError(first_line(error)) from error

    set_loader("yaml", load, (yaml.YAMLError,))
