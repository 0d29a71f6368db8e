"""What can be refused at once: mistakes that show in a help page, or in a number, before torch is imported.

The parser of the command finds the same, six seconds later; what is not certain here is left to it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdnas.errors import UserError, nearest
from kdnas.pages import EVERYWHERE, page
from kdnas.safe_yaml import read_yaml

# A short name, a class path, or a mapping of class_path and init_args, as in YAML.
Spec = str | Mapping[str, Any]
SAMPLERS: Mapping[str, Spec] = {
    "tpe": {"class_path": "optuna.samplers.TPESampler", "init_args": {"n_startup_trials": 5}},
    "lstm": "kdnas.nas.sampler.LSTMSampler",
    "lstm-original": "kdnas.nas.sampler.OriginalLSTMSampler",
    "random": "optuna.samplers.RandomSampler",
    "gp": "optuna.samplers.GPSampler",
    "nsgaii": "optuna.samplers.NSGAIISampler",
}
PRUNERS: Mapping[str, Spec] = {
    "none": "optuna.pruners.NopPruner",
    "median": {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 4}},
    "hyperband": "optuna.pruners.HyperbandPruner",
}
# How many there must be at least.
LEAST = {"workers": 1, "seeds": 1, "search.n_trials": 1, "search.num_epochs": 1, "full_kd.num_epochs": 1}
_NUMBERS = {"int": "a whole number", "float": "a number"}


def refuse_fewer(key: str, number: float) -> None:
    """Refuse fewer than ``LEAST`` says.

    Raises:
        UserError: there are fewer.
    """
    if number < LEAST[key]:
        raise UserError(f"{key} is {number}: give at least {LEAST[key]}.")


def no_such(kind: str, path: object, known: Mapping[str, Spec]) -> UserError:
    """What is said of a sampler or a pruner that there is not."""
    hint = nearest(path, known, always_list=True)
    return UserError(f"There is no {kind} {path!r}: give a class path, or a short name.{hint}")


def with_shipped_configs(args: Sequence[str]) -> list[str]:
    """The options with ``--config configs/NAME.yaml`` as the file that kdnas ships, where no such file is here.

    Raises:
        UserError: kdnas ships none of that name either.
    """
    found = list(args)
    for place, (before, arg) in enumerate(zip(["", *args], args, strict=False)):
        path = Path(arg if before in ("-c", "--config") else arg.partition("--config=")[2])
        if path.parent == Path("configs") and not path.exists():
            shipped = {file.name: file for file in Path(__file__).with_name("configs").glob("*.yaml")}
            if path.name not in shipped:
                raise UserError(f"There is no {str(path)!r}.{nearest(path, (f'configs/{name}' for name in shipped))}")
            found[place] = arg.removesuffix(str(path)) + str(shipped[path.name])
    return found


def refuse_early(command: str, args: Sequence[str]) -> None:
    """Refuse options and keys of YAML that there are not, values of another kind, and what is missing.

    Args:
        command: of ``kdnas``, with a page.
        args: its options.

    Raises:
        UserError: the first of them.
    """
    if any(arg in ("-h", "--help") or arg.partition("=")[0].endswith((".help", "print_config")) for arg in args):
        return
    options = _Options.of(command)
    given: dict[str, Any] = {}
    is_read = True
    for name, value in _pairs(with_shipped_configs(args)):
        options.refuse_unknown(name, f"`kdnas {command}` has no option '--{{name}}'.")
        if name != "config":
            given[name] = value
            continue
        try:
            config = read_yaml(Path(value))
        except UserError:  # the parser says what is wrong, or takes it for something else
            is_read = False
        else:
            given |= options.values(config, value)
    for name, value in given.items():
        _refuse_value(name, value, options.kinds.get(name, ""))
    missing = [name for name in options.required if not any(f"{name}.".startswith(f"{part}.") for part in given)]
    if missing and is_read and "ckpt_path" not in given:  # a checkpoint has its own
        raise UserError(f"Give {', '.join(f'--{name}' for name in missing)}; `kdnas {command} --help` has examples.")


@dataclass(frozen=True)
class _Options:
    """The options of a command, as its page has them.

    Args:
        kinds: option -> what values it takes, in Python's words; empty where it takes none, or is a group.
        required: those that have no default.
        elsewhere: what the page has in other places: other spellings, and keys that a saved config has.
    """

    kinds: dict[str, str]
    required: list[str]
    elsewhere: set[str]

    @classmethod
    def of(cls, command: str) -> "_Options":
        text = page(command).removesuffix(EVERYWHERE)  # the options of kdnas itself, which were taken
        kinds, required = {}, []
        for entry in re.split(r"\n(?=  -)", text)[1:]:
            found = re.search(r"--([\w.]+)(.*)", " ".join(entry.partition("\n\n")[0].split()))
            if found is None or f".{found[1]}".endswith(".help"):
                continue
            said = re.search(r"\((required, )?type: (.*?)(, default: .*)?\)$", found[2])
            kinds[found[1]] = said[2] if said else ""
            if said and said[1]:
                required.append(found[1])
        elsewhere = {name.replace("-", "_") for name in re.findall(r"--(?:> )?([\w.-]+)", text)}
        return cls(kinds, required, elsewhere - kinds.keys())

    def refuse_unknown(self, name: str, message: str, group: str = "") -> None:
        """Refuse a name whose first part, or first parts, are those of groups that have no such next part.

        Args:
            name: of an option, or of a key in YAML.
            message: that there is no ``{name}``.
            group: of the name, with a dot, which whoever reads the message knows.
        """
        if name in self.elsewhere:
            return
        above = ""
        for part in name.split("."):
            inside = {option[len(above) :].partition(".")[0] for option in self.kinds if option.startswith(above)}
            if not inside:
                return  # the arguments of a class
            if part not in inside:
                names = (f"{above}{other}".removeprefix(group) for other in inside)
                shown = name.removeprefix(group)
                raise UserError(message.format(name=shown) + nearest(f"{above}{part}".removeprefix(group), names))
            above += f"{part}."

    def values(self, config: Mapping[Any, Any], file: str, group: str = "") -> dict[str, Any]:
        """What is in YAML, by the options' names; a key that there is not is refused."""
        found: dict[str, Any] = {}
        place = f"{group.rstrip('.')!r} of {file!r}" if group else repr(file)
        for key, value in config.items():
            name = f"{group}{key}"
            self.refuse_unknown(name, f"There is no key {{name!r}} for {place}.", group)
            is_group = isinstance(value, Mapping) and any(option.startswith(f"{name}.") for option in self.kinds)
            found |= self.values(value, file, f"{name}.") if is_group else {name: value}
        return found


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option's name and (first) value; of one that takes none, whatever follows."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if arg == "-c" or re.match(r"--\w", arg):
            name, equals, value = arg.removeprefix("--").partition("=")
            yield "config" if name == "-c" else name.replace("-", "_").removesuffix("+"), value if equals else following


def _refuse_value(name: str, value: Any, kind: str) -> None:
    """Refuse a value that cannot be of its kind, or is too small."""
    kind, text = kind.removesuffix(" | null"), str(value)
    choices = re.findall(r"'(.*?)'", kind) if kind.startswith("Literal[") else []
    if kind in _NUMBERS and isinstance(value, str) and not re.search(r"\d|nan|inf|null|none|^$", text.lower()):
        raise UserError(f"{name} is {value!r}: give {_NUMBERS[kind]}.")
    if choices and isinstance(value, str) and value not in choices:
        raise UserError(f"{name} is {value!r}: give one of {', '.join(choices)}.")
    if name in LEAST and re.fullmatch(r"[+-]?\d+", text):
        refuse_fewer(name, int(text))
    for option, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if name == option and re.fullmatch(r"[A-Za-z][\w-]*", text) and text not in known:
            raise no_such(option, text, known)
