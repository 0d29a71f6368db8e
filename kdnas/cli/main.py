"""The command line. Only it changes process-wide state: environment, warnings, log levels."""

import argparse
import dataclasses
import gc
import logging
import os
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdnas import __version__
from kdnas.cli.help import completion, page, short_page, summary
from kdnas.system.errors import (
    CandidateFailed,
    ParityError,
    UserError,
    as_raised,
    causes,
    counted,
    is_memory,
    nearest,
    reason_of,
    tell,
)
from kdnas.system.modules import name_modules
from kdnas.system.signals import HungUp, exit_code

log = logging.getLogger("kdnas")

_USAGE = """`kdnas run --config configs/quickstart.yaml --smoke` tries every stage in a minute.
`kdnas COMMAND --help` shows examples and the most used options, `kdnas COMMAND --help all` shows
all of them, and `--print_config` writes them as YAML. If there is no `configs/NAME.yaml` in this
folder, the one shipped with kdnas is used. `--quiet` and `--log-level debug|info|warning|error` work
with every command.
`eval "$(kdnas completion bash)"` (or zsh; `kdnas completion fish | source`) completes commands and
options by TAB.
"""

_DRY_RUN = "measure a few steps, print the time, disk and memory that it will need, and stop"
_SMOKE = "try every stage on 64 rows, in a minute or two; keep the files only if a stage fails"
FORCE_NEW = "start a new run, as NAME-2, NAME-3, ... if the name is taken"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command and options; None: the arguments of this process.

    Returns:
        The exit code. 0: success. 1: training failed, memory ran out, or an exported file gives
        different outputs from the student's. 2: a mistake of the user, with a message that says
        what to change. 3: disk, network or hub failed. 130 after Ctrl-C, 143 after SIGTERM, 129
        after SIGHUP.
    """
    is_process = args is None
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["--version"]:
        print(__version__)
        return 0
    try:
        args = _set_log_level(args) if args else ["--help"]
        if args[0] in ("-h", "--help"):
            _print_usage()
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]!r} is not a command.{nearest(args[0], COMMANDS)}")
        if args[1:] in (["-h"], ["--help"]):
            print(short_page(args[0]), end="")
            return 0
        if args[1:] in (["-h", "all"], ["--help", "all"]):
            print(page(args[0]), end="")
            return 0
        if args[0] != "completion":
            from kdnas.cli.parser import refuse_pipes, refuse_unknown, values_in

            refuse_unknown(args[0], args[1:])
            values = list(values_in(args[1:]))
            refuse_pipes(values)
            if is_process:
                name_modules(values)
        set_environment()
        return _exit_code(args)
    except UserError as error:
        tell(str(error))
        return 2


def _print_usage() -> None:
    print(f"kdnas {__version__}: small, fast students for BERT-family teachers.\n")
    for command in COMMANDS:
        print(f"  kdnas {command:12}{summary(command)}")
    print(f"\n{_USAGE}", end="")


def _exit_code(args: list[str]) -> int:
    try:
        COMMANDS[args[0]](args[1:])
    except UserError as error:
        tell(str(error))
        log.debug("where it was found:", exc_info=error)
        return 2
    except (CandidateFailed, ParityError) as error:
        tell(str(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        log.debug("where it was found:", exc_info=error)
        tell(f"{reason_of(error)}{_goes_on(args)}")
        return 1
    except OSError as error:  # such as a disk that is full or gone; finished work is kept
        from kdnas.system.files import full_disk, room

        # After a hangup, writing to the closed terminal fails: report the hangup.
        if any(isinstance(cause, HungUp) for cause in causes(error)):
            return _interrupted(HungUp, args)
        error = full_disk(error) or error
        tell(f"{as_raised(error)}{room(error)}{_goes_on(args)}")
        return 3
    except KeyboardInterrupt as stop:
        return _interrupted(type(stop), args)
    return 0


def _interrupted(stop: type[BaseException], args: list[str]) -> int:
    tell(f"interrupted{_goes_on(args)}")
    return exit_code(stop)


def _set_log_level(args: list[str]) -> list[str]:
    """Set the log level that ``--quiet`` or ``--log-level`` gives; return the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(
        "--quiet", dest="level", action="store_const", const="warning", default="info"
    )
    parser.add_argument("--log-level", dest="level", choices=("debug", "info", "warning", "error"))
    try:
        options, others = parser.parse_known_args(args)
    except ArgumentError as error:
        raise UserError(f"{error}.") from error
    if not others:
        raise UserError("There is no command: `kdnas --help` lists them.")
    log.setLevel(options.level.upper())
    return others


def set_environment() -> None:
    """Set environment variables for torch and other libraries, before these are imported.

    A variable that the user has set is kept.
    """
    # Waiting torch threads spin for milliseconds, so that one busy core makes a step seven times
    # slower. Without any spinning, small matmuls wait for threads to wake up (LOG.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Nearly every batch has another shape: a larger cache of kernels only takes memory.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # TF32 for float32 matmuls on GPUs: those that remain beside bfloat16 need no more precision.
    os.environ.setdefault("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    # jsonargparse's warnings are about calls of LightningCLI, not of ours.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Python's resource tracker removes the semaphores of an ended worker, as it should, and warns.
    if "ignore:resource_tracker:UserWarning" not in sys.warnoptions:
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # Imports make half a million lasting objects; scanning them took a tenth of the start-up time.
    gc.set_threshold(10_000)


def show_logs() -> None:
    """Print log records on the terminal, above the bars of a live display."""
    # This handler looks up sys.stderr for each record; a live display replaces sys.stderr.
    handler = logging.lastResort
    assert handler is not None
    handler.setLevel(logging.NOTSET)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def _goes_on(args: Sequence[str]) -> str:
    keeps_nothing = {"--smoke", "--dry-run", "--dry_run"}.intersection(args)
    if args[0] not in ("run", "search", "glue") or keeps_nothing:
        return "."
    name = f", with --name {_new_names[-1]} in place of --force-new" if _new_names else ""
    return f"; run the same command again to resume{name}."


_new_names: list[str] = []  # names chosen by --force-new


def _quieten(*loggers: str) -> None:
    """Silence messages of libraries and of these loggers, which would hide kdnas's own lines."""
    # Import first: importing sets log levels.
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", message=".*is (an )?experimental")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="No seed found")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Batches are made in microseconds; loader workers would cost more than they save.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    show_logs()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip: " not in str(record.msg)
    )
    # A signal in the middle of a query is logged with a traceback by the study's database.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    level = logging.INFO if log.isEnabledFor(logging.DEBUG) else logging.ERROR
    for name in loggers:
        logging.getLogger(name).setLevel(level)


def _console(is_answer: bool = False) -> Any:
    """Return the rich console for progress, which ``--quiet`` silences.

    With ``is_answer``, return the console for a command's results, which are always shown.
    """
    from rich.console import Console

    return Console(markup=False, quiet=not (is_answer or log.isEnabledFor(logging.INFO)))


def _plan(config: Any) -> None:
    from rich.console import Console

    from kdnas.commands.in_time import plan_in_time
    from kdnas.report.tables import show

    log.setLevel(max(log.level, logging.WARNING))  # hide where the sample of rows is
    choice, plan = plan_in_time(config)
    console = Console()
    for line in choice.lines() if choice else ():
        show(console, line)
    console.print(plan.table())


def _new(config: Any, is_begun: bool) -> Any:
    """Return the config with an unused run name, and log this name.

    ``is_begun``: whether a run starts under this name; if not, the name is logged at debug level.
    """
    from kdnas.system.files import free_name

    name = free_name(config.root, config.name)
    _new_names.append(name)
    log.log(logging.INFO if is_begun else logging.DEBUG, "Started a new run, %s.", name)
    return dataclasses.replace(config, name=name)


def _run(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import RunConfig
    from kdnas.commands.run import run

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    config, flags = read_config(
        RunConfig, "run", args, dry_run=_DRY_RUN, smoke=_SMOKE, force_new=FORCE_NEW
    )
    if flags["dry_run"] and flags["smoke"]:
        raise UserError("--dry-run and --smoke are both given: give one of them.")
    if config.trial is not None and any(flags.values()):
        raise UserError(
            "--trial uses a candidate of a finished search: leave out --dry-run, --smoke and "
            "--force-new."
        )
    if flags["force_new"]:
        config = _new(config, not (flags["dry_run"] or flags["smoke"]))
    if flags["dry_run"]:
        _plan(config)
    elif flags["smoke"]:
        _try(config, args)
    else:
        run(config, _console())


def _try(config: Any, args: Sequence[str]) -> None:
    from kdnas.commands.smoke import smoke
    from kdnas.nas.study import without_password
    from kdnas.report.tables import show

    console = _console()
    smoke(config, console)
    real = ["kdnas", "run", *(without_password(arg) for arg in args if arg != "--smoke")]
    show(console, f"Start the real run with:  {shlex.join(real)}")


def _search(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import SearchConfig
    from kdnas.commands.run import search

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    config, flags = read_config(SearchConfig, "search", args, dry_run=_DRY_RUN, force_new=FORCE_NEW)
    if flags["force_new"]:
        config = _new(config, not flags["dry_run"])
    if flags["dry_run"]:
        _plan(config)
    else:
        search(config, _console())


def _space(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import SpaceConfig
    from kdnas.commands.plan import show_space

    _quieten("lightning.pytorch", "lightning.fabric", "optuna")
    show_space(read_config(SpaceConfig, "space", args)[0], _console(is_answer=True))


def _latency(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import LatencyConfig
    from kdnas.commands.latency import latency_table

    _quieten()
    latency_table(read_config(LatencyConfig, "latency", args)[0], _console(is_answer=True))


def _glue(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import GlueConfig
    from kdnas.commands.glue import glue

    _quieten("lightning.pytorch", "lightning.fabric")
    glue(read_config(GlueConfig, "glue", args)[0], _console())


def _verify(args: Sequence[str]) -> None:
    from jsonargparse import ArgumentParser

    from kdnas.cli.parser import normalize, parse
    from kdnas.system.files import MANIFEST, Run, file_sha256
    from kdnas.system.manifest import verify

    parser = ArgumentParser(prog="kdnas verify", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", type=str, help="name or folder of a finished run")
    parser.add_argument(
        "--root", default="lightning_logs", help="the folder of all runs (default: %(default)s)"
    )
    options = parse(parser, normalize(args))
    folder = Path(options.run)
    if not folder.is_dir():
        if os.sep in options.run:
            raise UserError(
                f"There is no folder {options.run!r} to check: give one, or the name of a run in "
                "--root."
            )
        folder = Run(options.root, options.run).folder
    num_files, faults = verify(folder)
    if faults:
        print(*faults, sep="\n")
        raise UserError(
            f"{str(folder)!r} does not match its manifest.json ({counted(len(faults), 'fault')}, "
            "listed above): restore the folder from a copy, or make it again."
        )
    print(f"{num_files} files of {str(folder)!r} match its manifest.")
    print(f"sha256 of its manifest: {file_sha256(folder / MANIFEST)}")


def _export(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import ExportConfig
    from kdnas.commands.export import export

    _quieten()
    # ``as`` is a keyword of Python, so this field of the config is called ``format``.
    args = ["--format" + arg[4:] if arg.partition("=")[0] == "--as" else arg for arg in args]
    export(read_config(ExportConfig, "export", args)[0], _console())


def _report(args: Sequence[str]) -> None:
    from kdnas.cli.parser import read_config
    from kdnas.commands.config import ReportConfig
    from kdnas.commands.report import report

    report(read_config(ReportConfig, "report", args)[0], _console())


def _lightning(command: str, args: Sequence[str]) -> None:
    from kdnas.cli.fit import run_lightning

    is_quiet = not log.isEnabledFor(logging.INFO)
    _quieten(*["lightning.pytorch", "lightning.fabric"] * is_quiet)
    run_lightning(command, args)


def _completion(args: Sequence[str]) -> None:
    if len(args) != 1:
        raise UserError("`kdnas completion` takes one shell: bash, zsh, fish or tcsh.")
    print(completion(args[0]))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _run,
    "search": _search,
    "space": _space,
    "glue": _glue,
    "latency": _latency,
    "export": _export,
    "report": _report,
    "verify": _verify,
    "fit": partial(_lightning, "fit"),
    "validate": partial(_lightning, "validate"),
    "test": partial(_lightning, "test"),
    "predict": partial(_lightning, "predict"),
    "completion": _completion,
}
