"""Parse options and YAML into the configs of ``kdnas.commands.config``.

An error becomes a message of one line.
"""

import json
import os
import re
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
    "YAML file with these options; the last value of an option wins. If there is no "
    "configs/NAME.yaml in this folder, the one shipped with kdnas is used."
)
_LONGEST_MESSAGE = 400
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "bool": "true or false",
}
_ALONE = {"--grid": "--grid={}", "--force": "--force=true"}  # options that may come without value


def default_objects() -> dict[str, Any]:
    """Return the default loss and initialisation of ``Recipe``, as class paths with arguments.

    The parser needs these defaults in a form that YAML can store.
    """
    from kdnas.commands.config import as_plain  # imports torch, which takes seconds
    from kdnas.distillation.module import Recipe

    return {f"recipe.{name}": as_plain(getattr(Recipe(), name)) for name in ("objective", "start")}


def read_config(
    config_class: type[Any], command: str, args: Sequence[str], **flags: str
) -> tuple[Any, dict[str, bool]]:
    """Parse YAML and options into a config.

    Args:
        config_class: the dataclass of the config; its fields are the options.
        command: name of the command, such as ``run``.
        args: the options, with their values.
        flags: further options without a value (such as ``--smoke``): name -> help text.

    Returns:
        The config, and for each name in ``flags`` whether this option was given.

    Raises:
        UserError: an option or a value is wrong.
    """
    hints = get_type_hints(config_class)
    refuse_ambiguous_yaml()
    parser = ArgumentParser(prog=f"kdnas {command}", exit_on_error=False, allow_abbrev=False)
    if command != "report":  # it only takes names of runs, which nobody keeps in YAML
        parser.add_argument("--config", action="config", help=CONFIG_HELP)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(config_class)
    if "recipe" in hints:
        parser.set_defaults(default_objects())
    later = _only_of_run(config_class)  # a search accepts these in YAML, and ignores them
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
    except ValueError as error:  # the parser wraps errors of optional parts of the config
        raise next((e for e in causes(error) if isinstance(e, UserError)), error) from None

    for name in ("config", *later):
        options.pop(name, None)
    set_flags = {name: options.pop(name) for name in flags}
    return config_class(**options), set_flags


def normalize(args: Sequence[str]) -> list[str]:
    """Replace ``-`` in option names by ``_``, and ``configs/NAME.yaml`` by a shipped config's path.

    A file ``configs/NAME.yaml`` in the current folder has precedence over the shipped config.

    Raises:
        UserError: neither the current folder nor kdnas has this file.
    """
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
    """Rewrite list options as the parser reads them.

    For instance, ``--batch 1 8`` becomes ``--batch=[1] --batch+=[8]``.
    """
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
            given.clear()  # lists given after a file replace its lists
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
    """Raise an error for two mistakes that the parser accepts.

    The first is ``null`` for a field that cannot be None. The second is a single value, such as
    ``search: 3``, for a field that is a group of options.

    Args:
        config_class: the dataclass of the config or, in the recursion, of a group of options.
        values: the parsed values of its fields.
        prefix: beginning of the fields' names in messages, such as ``search.``.
    """
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
                raise UserError(
                    f"{name} is {value!r:.40}, but it is a group of options: give {name}.OPTION, "
                    f"or leave {name} out."
                )


def parse(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse options, and turn the parser's errors into messages of one line.

    Raises:
        UserError: an option or a value is wrong.
    """
    try:
        return parser.parse_args(args)
    except (ArgumentError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        if missing := re.search(r"following arguments are required: ([\w, ]+)", message):
            message = ", ".join(f"--{name} is missing" for name in missing[1].split(", "))
        elif absent := re.fullmatch(r'Parser key "config": File does not exist: (.+)', message):
            message = f"There is no config {absent[1]}"
        elif wrong := re.match(r'Parser key "([^"]+)": (?:Does not validate|Expected a)', message):
            value = re.search(r"(?:Given value|Got value): (.*)", message)
            kinds = re.findall(
                r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", message
            )
            wanted = [_KINDS.get(kind, kind) for pair in kinds for kind in pair if kind]
            # Of a union, one alternative may have failed by a message of its own, which says more.
            if value and wanted and message.count(" - ") in (0, len(kinds)):
                message = f"{wrong[1]} is {value[1]!r}: give {' or '.join(dict.fromkeys(wanted))}"
        # The message begins with the option and ends with the value: cut the middle.
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE - 100]} ... {message[-100:]}"
        raise UserError(f"{message}. `{parser.prog} --help all` explains the options.") from error
    except AttributeError as error:  # the parser's, if a class path overrides one with init_args
        if error.name != "init_args":
            raise
        raise UserError(
            "The command line gives another class than the YAML file, whose init_args are for the "
            "file's class: change the class in the YAML file instead."
        ) from error


def refuse_unknown(command: str, args: Sequence[str]) -> None:
    """Raise an error for unknown options and YAML keys of a command, without importing torch.

    Raises:
        UserError: an option or key is unknown; the message has the nearest known name.
    """
    options = known_options()
    takes = options[command] + (options["run"] if command in ("search", "space") else [])
    known = {one[2:].rstrip("+").replace("-", "_") for one in takes if not one.endswith(".help")}
    for what, name in _names(normalize(args)):
        group, _, last = name.rpartition(".")
        while group and group not in known:
            group, _, last = group.rpartition(".")
        # Names below an option that has no options of its own are arguments of a class.
        ours = {one[len(group) + 1 :] for one in known if one.startswith(f"{group}.")}
        if name in known or (group and not ours):
            continue
        if name.partition(".")[0] in ("optimizer", "lr_scheduler"):
            why = "It would replace the recipe's optimizer: set the recipe's rates instead."
            raise UserError(f"There is no {what}. {why}")
        siblings = ours if group else {one.partition(".")[0] for one in known}
        hint = nearest(last, {one.partition(".")[0] for one in siblings})
        full = sorted(one for one in known if one.endswith(f".{last}"))
        if full and not any(one.startswith(last) for one in siblings):  # its group was left out
            hint = f" Did you mean {' or '.join(full)}?"
        raise UserError(f"There is no {what}.{hint}")


def _only_of_run(config_class: type[Any]) -> list[str]:
    """Return the names of the fields that ``RunConfig`` has and ``config_class`` lacks.

    If ``config_class`` is not ``SearchConfig`` or a subclass, return an empty list.
    """
    from kdnas.commands.config import RunConfig, SearchConfig

    if not issubclass(config_class, SearchConfig):
        return []
    known = {field.name for field in fields(config_class)}
    return [field.name for field in fields(RunConfig) if field.name not in known]


def _names(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each option in the arguments, and each key of their YAML files.

    Each is a pair: words for messages (``option --seed``), and the name alone (``seed``).
    """
    for arg, path in _with_config(args):
        if path is not None:
            for key in flat(read_yaml(path)):
                yield f"key {key!r} of {str(path)!r}", str(key)
        elif arg.startswith("--"):
            name = arg.partition("=")[0]
            yield f"option {name}", name[2:].rstrip("+")


def _with_config(args: Sequence[str]) -> Iterator[tuple[str, Path | None]]:
    """Yield each argument in a pair with the file that it gives to ``--config``, or with None."""
    for before, arg in zip(["", *args], args, strict=False):
        name, _, value = arg.partition("=")
        path = Path(arg if before in ("-c", "--config") else value if name == "--config" else "")
        # os.path.exists is False for names that no file can have. A pipe goes on to read_yaml, which
        # refuses it: the parser would have to read it a second time.
        yield arg, path if os.path.exists(path) and not path.is_dir() else None


def values_in(args: Sequence[str]) -> Iterator[Any]:
    """Yield the value of each argument: its text or, for YAML, its content as Python objects.

    YAML is a file after ``--config``, or a value that begins with ``{`` or ``[``.
    """
    for arg, path in _with_config(normalize(args)):
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        if path is not None:
            yield read_yaml(path)
        elif value.startswith(("{", "[")):
            with suppress(yaml.YAMLError, *NO_VALUE):  # the parser reports errors in it
                check_yaml(value)
                yield yaml.safe_load(value)
        else:
            yield value


def refuse_pipes(values: Iterable[Any]) -> None:
    """Raise an error for pipes and devices as values of options.

    The parser would try to read them, as the value of an option group such as ``--search`` may be a
    YAML file.

    Raises:
        UserError: a value is a pipe or a device; the message names the first such value.
    """
    for value in strings_in(list(values)):
        if os.path.exists(value) and not (os.path.isfile(value) or os.path.isdir(value)):
            raise UserError(f"{value!r} is a pipe or a device: give a file or a folder.")


@cache
def refuse_ambiguous_yaml() -> None:
    """Make jsonargparse refuse YAML that ``check_yaml`` finds ambiguous, such as duplicate keys."""
    parse_yaml = get_loader("yaml")

    def load(text: str) -> Any:
        check_yaml(text)
        try:
            return parse_yaml(text)
        except NO_VALUE as error:
            raise yaml.YAMLError(first_line(error)) from error

    set_loader("yaml", load, (yaml.YAMLError,))
