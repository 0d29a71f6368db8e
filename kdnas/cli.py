"""The command line. Nothing else touches the process: seed, warnings, log levels, exit codes."""

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kdnas import __version__
from kdnas.errors import CandidateFailed, UserError, nearest

USAGE = f"""kdnas {__version__}: small, fast students for BERT-family teachers, found by search and distilled.

  kdnas run     --config configs/quickstart.yaml    search, full KD, fine-tuning, export, report
  kdnas search  --teacher DIR --text FILE           the search alone; --dry-run says what it will need
  kdnas space   --teacher DIR                       what students a search may propose, and what they cost
  kdnas fit     --config configs/fit.yaml           one student: the Lightning CLI, with every Trainer flag
  kdnas verify  RUN                                 whether a finished run is still as its manifest says
  kdnas validate --config configs/fit.yaml --ckpt_path FILE   its held-out loss and contextual share

`kdnas COMMAND --help` lists the options of a command with units and defaults; `--print_config` writes them as YAML.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command and options; those of the process by default.

    Returns:
        The exit code: 0; 2 where the user can mend it; 1 where candidates failed; 3 where disk or
        network did; 130 after Ctrl-C, 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]!r} is no command.{nearest(args[0], COMMANDS)}")
        set_environment()
        COMMANDS[args[0]](args[1:])
    except UserError as error:
        print(f"kdnas: {error}", file=sys.stderr)
        return 2
    except CandidateFailed as error:
        print(f"kdnas: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a disk that is full or gone; what is finished is kept
        print(f"kdnas: {error}{_goes_on(args[0])}", file=sys.stderr)
        return 3
    except KeyboardInterrupt as stop:
        print(f"kdnas: interrupted{_goes_on(args[0])}", file=sys.stderr)
        return 143 if type(stop).__name__ == "Terminated" else 130
    return 0


def set_environment() -> None:
    """Tell the libraries, before they are imported, what the user has not told them."""
    # torch's threads spin for milliseconds while they wait, and one busy core makes a step seven times slower; without
    # any spinning, small matmuls wait for threads to wake up (LOG.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Nearly every batch has a shape of its own, so a larger cache of kernels is never hit, and takes memory.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they speak of LightningCLI's own calls


def _goes_on(command: str) -> str:
    return "." if command in ("fit", "validate") else "; the same command goes on from here."


def _quieten(*loggers: str) -> None:
    """Keep the libraries' chatter from hiding our own lines; once they are imported, for they set their own levels."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", message=".*is (an )?experimental")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Batches are gathered in microseconds; workers would cost more than they bring.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdnas").setLevel(logging.INFO)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)


def _objects() -> dict[str, Any]:
    """The parser cannot write default objects as YAML, so it is told their class paths."""
    from kdnas.config import as_plain
    from kdnas.distill.module import Recipe

    return {f"recipe.{name}": as_plain(getattr(Recipe(), name)) for name in ("objective", "start")}


def _run(args: Sequence[str]) -> None:
    from kdnas.config import RunConfig
    from kdnas.pipeline import run

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    run(_config(RunConfig, "run", args)[0])


def _search(args: Sequence[str]) -> None:
    from rich.console import Console

    from kdnas.config import SearchConfig
    from kdnas.job import look
    from kdnas.pipeline import search
    from kdnas.plan import plan

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    dry_run = "measure a few steps, say what the search will need, and leave it at that"
    config, flags = _config(SearchConfig, "search", args, dry_run=dry_run)
    if flags["dry_run"]:
        console = Console()
        console.print(plan(look(config, console)).table())
    else:
        search(config)


def _space(args: Sequence[str]) -> None:
    from rich.console import Console

    from kdnas.config import SpaceConfig
    from kdnas.plan import show_space

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    show_space(_config(SpaceConfig, "space", args)[0], Console())


def _verify(args: Sequence[str]) -> None:
    from jsonargparse import ArgumentParser

    from kdnas.manifest import verify
    from kdnas.runs import Run, file_sha256

    parser = ArgumentParser(prog="kdnas verify", exit_on_error=False)
    parser.add_argument("run", type=str, help="name or folder of a finished run")
    parser.add_argument("--root", default="lightning_logs", help="the folder of all runs (default: %(default)s)")
    try:
        options = parser.parse_args(args)
    except ArgumentError as error:
        raise _in_one_line(error, parser) from error
    folder = Path(options.run) if Path(options.run).is_dir() else Run(options.root, options.run).folder
    num_files, faults = verify(folder)
    for fault in faults:
        print(fault)
    if faults:
        raise UserError(f"{str(folder)!r} is not as it was made, {len(faults)} faults: take a copy, or make it anew.")
    print(f"{num_files} files of {str(folder)!r} are as they were made.")
    print(f"sha256 of its manifest: {file_sha256(folder / 'manifest.json')}")


def _lightning(subcommand: str, args: Sequence[str]) -> None:
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    from kdnas.data.datamodule import KDDataModule
    from kdnas.distill.module import HiddenStateDistillModule
    from kdnas.training import check_checkpoint, honest_signals

    _quieten()
    _refuse_ambiguous_yaml()

    class KDCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.teacher", "data.tokenizer")
            parser.set_defaults({f"model.{name}": value for name, value in _objects().items()})

        def before_instantiate_classes(self) -> None:
            path = self.config[subcommand].get("ckpt_path")
            if path and os.path.isfile(path):
                check_checkpoint(Path(path))

        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            try:
                super().parse_arguments(parser, args)
            except (ArgumentError, UnicodeDecodeError) as error:
                raise _in_one_line(error, self._subcommand_parsers[subcommand]) from error

    with honest_signals():
        KDCLI(HiddenStateDistillModule, KDDataModule, args=[subcommand, *args], parser_kwargs={"exit_on_error": False})


@cache
def _refuse_ambiguous_yaml() -> None:
    """Let the parser read only YAML that means what it says."""
    import yaml
    from jsonargparse import get_loader, set_loader

    from kdnas.safe_yaml import check_yaml

    parse = get_loader("yaml")

    def load(text: str) -> Any:
        check_yaml(text)
        try:
            return parse(text)
        except ValueError as error:  # an integer of a million digits
            raise yaml.YAMLError(str(error)) from error

    set_loader("yaml", load, (yaml.YAMLError,))


def _config(config_class: type[Any], command: str, args: Sequence[str], **flags: str) -> tuple[Any, dict[str, bool]]:
    """A config from YAML and options, and the flags (name -> help) that were set."""
    from jsonargparse import ArgumentParser

    _refuse_ambiguous_yaml()
    parser = ArgumentParser(prog=f"kdnas {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML of these options; what comes later wins.")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(config_class)
    parser.set_defaults(_objects())
    # --time-budget and --time_budget are the same.
    args = [re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), arg) for arg in args]
    try:
        parsed = parser.parse_args(args)
        _refuse_null(config_class, parsed)
        options = vars(parser.instantiate(parsed))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise _in_one_line(error, parser) from error
    options.pop("config")
    return config_class(**{k: v for k, v in options.items() if k not in flags}), {k: options[k] for k in flags}


def _refuse_null(config_class: type[Any], values: Any, prefix: str = "") -> None:
    """Refuse null where it is no value, and a value where keys belong: the parser takes both everywhere."""
    from jsonargparse import Namespace

    hints = get_type_hints(config_class)
    for field in fields(config_class):
        name, hint, value = f"{prefix}{field.name}", hints[field.name], values.get(field.name)
        if value is None and type(None) not in get_args(hint):
            raise UserError(f"{name} is null: give a value, or leave it out.")
        if is_dataclass(hint):
            if not isinstance(value, Namespace):
                raise UserError(f"{name} is {value!r:.40}: give its keys, or leave it out.")
            _refuse_null(hint, value, f"{name}.")  # type: ignore[arg-type]


def _in_one_line(error: ArgumentError | UnicodeDecodeError, parser: Any) -> UserError:
    """What the parser says, with the nearest name where it does not know one."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"The config is not UTF-8 ({error.reason} at byte {error.start}): give a YAML file.")
    message = " ".join(str(error).split())
    unknown = re.search(r"(?:option|Option|arguments:) '?(?:--)?([\w.]+)", message)
    hint = ""
    if unknown:
        group = re.search(r"Group '([\w.]+)'", message)
        prefix = f"{group[1]}." if group else ""
        names = [key.removeprefix(prefix) for key in dict(parser.get_defaults().items()) if key.startswith(prefix)]
        hint = nearest(unknown[1], {name if "." in unknown[1] else name.split(".")[0] for name in names})
    return UserError(message.rstrip(".") + "." + hint)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _run,
    "search": _search,
    "space": _space,
    "fit": partial(_lightning, "fit"),
    "verify": _verify,
    "validate": partial(_lightning, "validate"),
}
