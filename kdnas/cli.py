"""The command line. Nothing else touches the process: seed, warnings, log levels, exit codes."""

import json
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from kdnas import __version__
from kdnas.errors import CandidateFailed, ParityError, UserError, nearest

USAGE = f"""kdnas {__version__}: small, fast students for BERT-family teachers, found by search and distilled.

  kdnas run     --config configs/quickstart.yaml    search, full KD, fine-tuning, export, report
  kdnas search  --teacher DIR --text FILE           the search alone; --dry-run says what it will need
  kdnas space   --teacher DIR                       what students a search may propose, and what they cost
  kdnas fit     --config configs/fit.yaml           one student: the Lightning CLI, with every Trainer flag
  kdnas validate --config configs/fit.yaml --ckpt_path FILE   its held-out loss and contextual share
  kdnas latency --model DIR --model DIR             models beside each other, by backend, batch, length and threads
  kdnas export  --run NAME                          its student as a folder to deploy: ONNX, int8, predict.py, card

`kdnas COMMAND --help` lists the options of a command with units and defaults; `--print_config` writes them as YAML.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command and options; those of the process by default.

    Returns:
        The exit code: 0; 2 where the user can mend it; 1 where candidates failed, or an export did not
        compute what its model does; 3 where disk or network failed; 130 after Ctrl-C, 143 after SIGTERM.
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
    except (CandidateFailed, ParityError) as error:
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
    return "; the same command goes on from here." if command in ("run", "search") else "."


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


def _latency(args: Sequence[str]) -> None:
    from rich.console import Console

    from kdnas.config import LatencyConfig
    from kdnas.latency_table import latency_table

    _quieten()
    latency_table(_config(LatencyConfig, "latency", args)[0], Console())


def _export(args: Sequence[str]) -> None:
    from rich.console import Console

    from kdnas.config import ExportConfig
    from kdnas.export_job import export

    _quieten()
    words = {"--force": "--force=true", "--as": "--format"}  # ``as`` can be no name in Python
    args = [re.sub(r"^--(force$|as\b)", lambda found: words[found[0]], arg) for arg in args]
    export(_config(ExportConfig, "export", args)[0], Console())


def _lightning(subcommand: str, args: Sequence[str]) -> None:
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    from kdnas.data.datamodule import KDDataModule
    from kdnas.distill.module import HiddenStateDistillModule
    from kdnas.training import honest_signals

    _quieten()

    class KDCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("model.teacher", "data.tokenizer")
            parser.set_defaults({f"model.{name}": value for name, value in _objects().items()})

        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            try:
                super().parse_arguments(parser, args)
            except ArgumentError as error:
                raise _in_one_line(error, self._subcommand_parsers[subcommand]) from error

    with honest_signals():
        KDCLI(HiddenStateDistillModule, KDDataModule, args=[subcommand, *args], parser_kwargs={"exit_on_error": False})


def _config(config_class: type[Any], command: str, args: Sequence[str], **flags: str) -> tuple[Any, dict[str, bool]]:
    """A config from YAML and options, and the flags (name -> help) that were set."""
    from jsonargparse import ArgumentParser

    fields = get_type_hints(config_class)
    parser = ArgumentParser(prog=f"kdnas {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML of these options; what comes later wins.")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(config_class)
    parser.set_defaults(_objects() if "recipe" in fields else {})
    # --time-budget and --time_budget are the same.
    args = [re.sub(r"^--[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), arg) for arg in args]
    args = _gather_lists(args, fields)
    try:
        options = vars(parser.instantiate(parser.parse_args(args)))
    except ArgumentError as error:
        raise _in_one_line(error, parser) from error
    options.pop("config")
    return config_class(**{k: v for k, v in options.items() if k not in flags}), {k: options[k] for k in flags}


def _gather_lists(args: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """``--batch 1 8`` and ``--model A --model B`` as the parser reads lists: ``--batch=[1, 8]``."""
    lists: dict[str, list[Any]] = {}
    others: list[str] = []
    target: list[Any] | None = None
    for arg in args:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--"):
            is_list = get_origin(fields.get(name)) is list and not value.startswith("[")
            target = lists.setdefault(name, []) if is_list else None
            if is_list and not equals:
                continue
        if target is None:
            others.append(arg)
            continue
        item = value if arg.startswith("--") else arg
        kind = get_args(fields[next(name for name, items in lists.items() if items is target)])[0]
        target.append(int(item) if kind is int and item.lstrip("-").isdigit() else item)
    return [*others, *(f"--{name}={json.dumps(items)}" for name, items in lists.items())]


def _in_one_line(error: ArgumentError, parser: Any) -> UserError:
    """What the parser says, with the nearest name where it does not know one."""
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
    "latency": _latency,
    "export": _export,
    "fit": partial(_lightning, "fit"),
    "validate": partial(_lightning, "validate"),
}
