"""Options and YAML into the configs of ``kdnas.commands.config``; mistakes into one line."""

import json
import os
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from kdnas.cli.help import known_options
from kdnas.system.errors import UserError, causes, first_line, nearest
from kdnas.system.modules import strings_in
from kdnas.system.yaml import NO_VALUE, check_yaml, flat, read_yaml

CONFIG_HELP = (
    "YAML of these options; what comes later wins. A configs/NAME.yaml that is not in this "
    "folder is the one that kdnas ships."
)
_LONGEST_MESSAGE = 400
_ALONE = {"--grid": "--grid={}", "--force": "--force=true"}  # options that need no value


def default_objects() -> dict[str, Any]:
    """The parser cannot write default objects as YAML, so it is told their class paths."""
    from kdnas.commands.config import as_plain  # imports torch, which takes seconds
    from kdnas.distillation.module import Recipe

    return {f"recipe.{name}": as_plain(getattr(Recipe(), name)) for name in ("objective", "start")}


def read_config(
    config_class: type[Any], command: str, args: Sequence[str], **flags: str
) -> tuple[Any, dict[str, bool]]:
    """A config from YAML and options, and which flags were set.

    ``flags`` are names and helps of options that are set or not, and no part of the config.
    """
    hints = get_type_hints(config_class)
    refuse_ambiguous_yaml()
    parser = ArgumentParser(prog=f"kdnas {command}", exit_on_error=False, allow_abbrev=False)
    if command != "report":  # which asks for the names of runs, and for nothing that files hold
        parser.add_argument("--config", action="config", help=CONFIG_HELP)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(config_class)
    if "recipe" in hints:
        parser.set_defaults(default_objects())
    later = _only_of_run(config_class)  # in YAML these may stand for a search too
    for name in later:
        parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
    args = [_ALONE.get(arg, arg) for arg in normalize(args)]
    for arg in args:
        option = arg.partition("=")[0]
        if option.startswith("--") and option[2:].partition(".")[0] in later:
            raise UserError(f"{option} is an option of `kdnas run`.")

    args = _one_value_each(args, hints)
    parsed = parse(parser, args)
    if "full_kd" in hints and parsed.full_kd is None:
        parsed.full_kd = Namespace(num_epochs=0, from_candidate=True)  # type: ignore[no-untyped-call]
    _refuse_null(config_class, parsed)
    try:
        options = vars(parser.instantiate(parsed))
    except ValueError as error:  # the parser wraps what an optional part of the config raises
        raise next((e for e in causes(error) if isinstance(e, UserError)), error) from None

    for name in ("config", *later):
        options.pop(name, None)
    set_flags = {name: options.pop(name) for name in flags}
    return config_class(**options), set_flags


def normalize(args: Sequence[str]) -> list[str]:
    """``--time_budget`` for ``--time-budget``, and the path of a config that kdnas ships."""
    found: list[str] = []
    is_config = False
    for arg in args:
        name, equals, value = arg.partition("=")
        if is_config:
            arg = _shipped(arg)
        elif arg.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            arg = name + equals + (_shipped(value) if name == "--config" else value)
        found.append(arg)
        is_config = arg in ("-c", "--config")
    return found


def _shipped(name: str) -> str:
    path = Path(name)
    if path.parent != Path("configs") or path.exists():
        return name
    folder = Path(__file__).with_name("configs")
    shipped = {f"configs/{file.name}": str(file) for file in folder.glob("*.yaml")}
    if str(path) not in shipped:
        raise UserError(f"There is no {str(path)!r}.{nearest(path, shipped)}")
    return shipped[str(path)]


def _one_value_each(args: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """``--batch 1 8`` as the parser reads lists: ``--batch=[1] --batch+=[8]``."""
    lists = {
        f"--{name}": get_args(kind)[0] for name, kind in hints.items() if get_origin(kind) is list
    }
    given: set[str] = set()
    found: list[str] = []
    name = ""
    for arg in args:
        value = arg
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            if name in lists and not equals:
                continue
        if name == "--config":
            given.clear()  # what comes later wins
        if name not in lists:
            found.append(arg)
        elif value.startswith("["):
            found.append(f"{name}={value}")
        else:
            item = value if lists[name] is int else json.dumps(value)
            found.append(f"{name}{'+' if name in given else ''}=[{item}]")
            given.add(name)
    return found


def _refuse_null(config_class: Any, values: Namespace, prefix: str = "") -> None:
    """Refuse null where it is no value, and a value where keys belong: the parser takes both."""
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        name, value = prefix + field.name, values.get(field.name)
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        if value is None and type(None) not in kinds:
            raise UserError(f"{name} is null: give a value, or leave it out.")
        for part in filter(is_dataclass, kinds):
            if isinstance(value, Namespace):
                _refuse_null(part, value, f"{name}.")
            elif value is not None:
                raise UserError(f"{name} is {value!r:.40}: give its keys, or leave it out.")


def parse(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """What the parser makes of the options; what it says of a mistake becomes one line."""
    try:
        return parser.parse_args(args)
    except (ArgumentError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        if len(message) > _LONGEST_MESSAGE:  # what it is about is said first, and the value last
            message = f"{message[: _LONGEST_MESSAGE - 100]} ... {message[-100:]}"
        raise UserError(f"{message}. `{parser.prog} --help all` explains the options.") from error
    except AttributeError as error:  # the parser's, of a class path over one with init_args
        if error.name != "init_args":
            raise
        raise UserError(
            "The command line gives another class than YAML, whose init_args are of its own: "
            "change the class in YAML."
        ) from error


def refuse_unknown(command: str, args: Sequence[str]) -> None:
    """Refuse an option or a key of YAML that a command has not; before torch is imported.

    Raises:
        UserError: with the nearest name.
    """
    options = known_options()
    takes = options[command] + (options["run"] if command in ("search", "space") else [])
    known = {one[2:].rstrip("+").replace("-", "_") for one in takes if not one.endswith(".help")}
    for what, name in _names(normalize(args)):
        group, _, last = name.rpartition(".")
        while group and group not in known:
            group, _, last = group.rpartition(".")
        # What is below one that has no keys of ours is a setting of a class.
        ours = {one[len(group) + 1 :] for one in known if one.startswith(f"{group}.")}
        if name in known or (group and not ours):
            continue
        if name.partition(".")[0] in ("optimizer", "lr_scheduler"):
            why = "It would replace the recipe's optimizer and all its rates: set those instead."
            raise UserError(f"There is no {what}. {why}")
        siblings = ours if group else {one.partition(".")[0] for one in known}
        hint = nearest(last, {one.partition(".")[0] for one in siblings})
        raise UserError(f"There is no {what}.{hint}")


def _only_of_run(config_class: type[Any]) -> list[str]:
    """What a run's config has beyond a search's; nothing for another class."""
    from kdnas.commands.config import RunConfig, SearchConfig

    if not issubclass(config_class, SearchConfig):
        return []
    known = {field.name for field in fields(config_class)}
    return [field.name for field in fields(RunConfig) if field.name not in known]


def _names(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names in options, and in the YAML files that they name; each in words, and alone."""
    for arg, path in _with_config(args):
        if path is not None:
            for key in flat(read_yaml(path)):
                yield f"key {key!r} of {str(path)!r}", str(key)
        elif arg.startswith("--"):
            name = arg.partition("=")[0]
            yield f"option {name}", name[2:].rstrip("+")


def _with_config(args: Sequence[str]) -> Iterator[tuple[str, Path | None]]:
    """Each option, and the YAML file that it names, if it names one."""
    for before, arg in zip(["", *args], args, strict=False):
        name, _, value = arg.partition("=")
        path = Path(arg if before in ("-c", "--config") else value if name == "--config" else "")
        # Which a name that no file can have is not, and which a pipe must not be: it is read twice.
        yield arg, path if os.path.exists(path) and not path.is_dir() else None


def values_in(args: Sequence[str]) -> Iterator[Any]:
    """The values of options, and those in the YAML that they name or hold."""
    for arg, path in _with_config(normalize(args)):
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        if path is not None:
            yield read_yaml(path)
        elif value.startswith(("{", "[")):
            with suppress(yaml.YAMLError, *NO_VALUE):  # the parser tells what is wrong with it
                check_yaml(value)
                yield yaml.safe_load(value)
        else:
            yield value


def refuse_pipes(values: Iterable[Any]) -> None:
    """Refuse a pipe or a device as the value of any option: the parser reads the file of a group.

    Raises:
        UserError: with the first.
    """
    for value in strings_in(list(values)):
        if os.path.exists(value) and not (os.path.isfile(value) or os.path.isdir(value)):
            raise UserError(f"{value!r} is a pipe or a device: give a file or a folder.")


@cache
def refuse_ambiguous_yaml() -> None:
    """Let the parser read only YAML that means what it says."""
    parse_yaml = get_loader("yaml")

    def load(text: str) -> Any:
        check_yaml(text)
        try:
            return parse_yaml(text)
        except NO_VALUE as error:
            raise yaml.YAMLError(first_line(error)) from error

    set_loader("yaml", load, (yaml.YAMLError,))
