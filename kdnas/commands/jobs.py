"""What the engine's processes do: each function is a job, of plain data, that gives plain data."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kdnas.commands.config import RunConfig, SearchConfig
from kdnas.commands.export import export_run, rows_of_task, rows_of_texts
from kdnas.commands.inputs import inputs_of
from kdnas.distillation.full_kd import distill_student
from kdnas.models.arch import StudentArch
from kdnas.nas.search import evaluate
from kdnas.nas.weights import OPTIMIZER, WEIGHTS


def train_candidate(config: SearchConfig, number: int, arch: StudentArch) -> dict[str, Any]:
    """Mini-KD of one shape; gives an ``Outcome``."""
    inputs = inputs_of(config)
    return evaluate(inputs.bench, arch, inputs.run.trial(number)).to_dict()


def distill_best(config: RunConfig, arch: StudentArch, kept: dict[str, Path]) -> dict[str, Any]:
    """Full KD of the best student, from what its candidate has kept."""
    inputs = inputs_of(config)
    tensors = {name: load_file(path) for name, path in kept.items()}
    return distill_student(
        inputs.teacher,
        arch,
        config.recipe,
        inputs.data.select("full"),
        inputs.states("full"),
        config.trainer,
        num_epochs=config.full_kd.num_epochs,
        folder=inputs.run.full_kd,
        seed=config.seed,
        weights=tensors.get(WEIGHTS),
        optimizer=tensors.get(OPTIMIZER),
    )


def export_best(config: RunConfig) -> dict[str, Any]:
    """The run's student, as a folder to deploy; gives what was checked."""
    inputs = inputs_of(config)
    if inputs.task:
        rows = rows_of_task(inputs.task, config.finetune.max_length)
    else:
        corpus = inputs.data.read_corpus()
        rows = rows_of_texts(corpus.train, corpus.held_out)
    return export_run(inputs.run, rows)
