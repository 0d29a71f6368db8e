"""The help pages and the shell's completions, which the command line shows without importing torch.

``pages/`` and ``options.txt`` are written by ``WRITE_PAGES=1 pytest tests/cli/test_help.py``, from
the commands' own parsers. A page is examples, and below them what the parser says; the options of
a command are a line of ``options.txt``.
"""

import argparse
from importlib.resources import files
from typing import Any

import shtab

from kdnas.system.errors import UserError, nearest

EXAMPLES = {
    "run": """search, full KD, fine-tuning, export and report, each resumable

  kdnas run --config configs/quickstart.yaml
  kdnas run --teacher bert-base-uncased --text my.parquet --task my_task/ --name mine --search.budget.speedup 6
  kdnas run --config configs/quickstart.yaml --search.n_trials 20 --sampler lstm --name lstm
  kdnas run --config configs/quickstart.yaml --smoke      every stage on 64 rows, in a minute: does it all work?
  kdnas run --config configs/quickstart.yaml --dry-run    minutes, disk and memory that it will need
""",
    "search": """the search alone, into a study that others can join

  kdnas search --config configs/search.yaml --dry-run       minutes, disk and memory that it will need
  kdnas search --config configs/search.yaml --workers 2 --time-budget 60
  kdnas search --config configs/search.yaml --storage postgresql://user:password@host/db
""",
    "space": """what students a search may propose, and what they cost

  kdnas space --teacher bert-base-uncased
  kdnas space --teacher bert-base-uncased --space.num_hidden_layers '[4,6]'
""",
    "glue": """teacher and student on labelled tasks, with the same settings, in one table

  kdnas glue --model bert-base-uncased --model lightning_logs/mine/full_kd/encoder --task stsb --task rte --seeds 3
  kdnas glue --model bert-base-uncased --data reviews.csv --text-column review --label-column stars
  kdnas glue --model lightning_logs/mine/full_kd/encoder --task stsb --grid --distill-from my-finetuned-teacher/
""",
    "latency": """models beside each other, by backend, batch, length and threads

  kdnas latency --model bert-base-uncased --model lightning_logs/mine/student --backend torch onnxruntime-int8
  kdnas latency --model lightning_logs/mine/student --batch 1 8 --length 16 128 --threads 1 2
""",
    "export": """a student as a folder to deploy: Hugging Face, ONNX, int8, predict.py, model card, manifest

  kdnas export --run mine
  kdnas export --student my_encoder/ --output deployed/
  kdnas export --student my_classifier/ --data reviews.csv --text-column review --label-column stars
""",
    "report": """the report of a run made anew, or several runs beside each other, finished or not

  kdnas report --run mine
  kdnas report --run tpe --run lstm --run random --output searches.html
""",
    "verify": """whether a finished run, fit, comparison or export is still as its manifest says

  kdnas verify mine
  kdnas verify lightning_logs/version_0
""",
    "fit": """one student, by the Lightning CLI

  kdnas fit --config configs/fit.yaml --model.teacher bert-base-uncased --data.text my.parquet
  kdnas fit --config configs/fit.yaml --model.arch lightning_logs/quickstart/best_student.yaml
  kdnas fit --config configs/fit.yaml --trainer.accelerator gpu --trainer.devices 4 --trainer.strategy ddp
""",
    "validate": """what a checkpoint of fit knows of its teacher

  kdnas validate --config configs/fit.yaml --ckpt_path lightning_logs/version_0/checkpoints/NAME.ckpt
""",
}


EVERYWHERE = """with every command:
  --quiet               no progress: warnings and errors alone; the answers of latency, space, verify
                        and --dry-run are still printed
  --log-level LEVEL     debug, info (as it is), warning or error
"""


COMPLETION = """kdnas completion SHELL: a script that completes commands and options by TAB

  eval "$(kdnas completion bash)"      in ~/.bashrc; zsh alike in ~/.zshrc
  kdnas completion fish | source
  kdnas completion tcsh
"""


def page(command: str) -> str:
    """The help page of a command.

    Args:
        command: one of ``EXAMPLES``, or ``completion``.
    """
    return COMPLETION if command == "completion" else _shipped("pages", f"{command}.txt")


def _shipped(*path: str) -> str:
    return files("kdnas.cli").joinpath(*path).read_text(encoding="utf-8")


def completion(shell: str) -> str:
    """A script that completes commands and options.

    Args:
        shell: ``bash``, ``zsh``, ``fish`` or ``tcsh``.

    Raises:
        UserError: another shell.
    """
    if shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(
            f"{shell!r} is no shell that can be completed.{nearest(shell, shtab.SUPPORTED_SHELLS)}"
        )
    parser = argparse.ArgumentParser(prog="kdnas", add_help=False)
    commands = parser.add_subparsers()
    for line in _shipped("options.txt").splitlines():
        command, *options = line.split()
        summary = EXAMPLES[command].splitlines()[0]
        subparser = commands.add_parser(command, help=summary, add_help=False)
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
