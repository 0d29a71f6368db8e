"""The jobs of a run: a function ``..._job`` returns a job, and the next function does the work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kdnas.commands.config import RunConfig, SearchConfig
from kdnas.commands.export import export_run, rows_of_task, rows_of_texts
from kdnas.commands.inputs import inputs_of
from kdnas.data.datamodule import Split
from kdnas.distillation.full_kd import distill_student
from kdnas.distillation.teacher_states import build_share
from kdnas.models.arch import StudentArch
from kdnas.nas.search import evaluate
from kdnas.nas.trials import Outcome
from kdnas.nas.weights import OPTIMIZER, WEIGHTS
from kdnas.system.errors import UserError
from kdnas.system.files import Run
from kdnas.system.jobs import Job
from kdnas.system.pool import share_devices


def candidate_job(config: SearchConfig, number: int, arch: StudentArch) -> Job:
    """Return the job that trains candidate ``number`` by a short distillation (mini-KD)."""
    minutes = config.candidate_timeout
    return Job(
        folder=Run(config.root, config.name).trial(number),
        title=f"trial {number}: {arch}",
        call=train_candidate,
        args=(config, number, arch),
        timeout=None if minutes is None else 60 * minutes,
    )


def train_candidate(config: SearchConfig, number: int, arch: StudentArch) -> dict[str, Any]:
    """Train and measure candidate ``number`` of the search; return its ``Outcome`` as a dict."""
    inputs = inputs_of(config)
    return evaluate(inputs.bench, arch, inputs.run.trial(number)).to_dict()


def states_job(config: SearchConfig, split: Split, share: int, num_shares: int) -> Job:
    """Return the job that computes one of ``num_shares`` shares of the teacher's hidden states.

    ``share`` is the number of the share, from 0.
    """
    folder = Run(config.root, config.name).folder / f"states_{share}"
    return Job(folder, "teacher states", compute_states, (config, split, share, num_shares))


def compute_states(
    config: SearchConfig, split: Split, share: int, num_shares: int
) -> dict[str, Any]:
    """Compute and store share ``share`` (from 0) of the teacher's hidden states; return {}."""
    inputs = inputs_of(config)
    data, precision = inputs.data.select(split), config.trainer.precision
    build_share(inputs.cache, inputs.teacher, data, inputs.device, precision, share, num_shares)
    return {}


def full_kd_job(config: RunConfig, arch: StudentArch, kept: Mapping[str, Path]) -> Job:
    """Return the job of full KD (distillation on all rows), on one or several devices.

    Args:
        config: options of the run.
        arch: the best student's shape.
        kept: files with this student's weights and optimizer state from the search, by file name;
            empty: start from the teacher.
    """
    folder = Run(config.root, config.name).full_kd
    args, num_ranks = (config, arch, dict(kept)), config.num_devices
    if num_ranks == 1 or not config.full_kd.num_epochs:
        return Job(folder, "full KD", distill_best, args)
    return Job(folder, "full KD", share_devices, (num_ranks, folder, distill_best, args))


def distill_best(config: RunConfig, arch: StudentArch, kept: Mapping[str, Path]) -> dict[str, Any]:
    """Distil the best student on all rows or, without full KD, save its weights from the search.

    ``kept`` has the files of these weights and of the optimizer state, by file name.

    Returns:
        The result dictionary of ``distill_student``; without full KD, it has the metrics of the
        candidate in the search.

    Raises:
        UserError: full KD is switched off, and the student's weights from the search do not exist.
    """
    inputs, num_epochs = inputs_of(config), config.full_kd.num_epochs
    split: Split = "full" if num_epochs else "mini"
    tensors = {name: load_file(path) for name, path in kept.items()}
    if not num_epochs and WEIGHTS not in tensors:
        raise UserError(
            "full_kd is null, but the student's weights from the search do not exist: give "
            "--full_kd.num_epochs 1 or more."
        )
    found = distill_student(
        inputs.teacher,
        arch,
        config.recipe,
        inputs.data.select(split),
        inputs.states(split),
        config.trainer,
        num_epochs=num_epochs,
        folder=inputs.run.full_kd,
        seed=config.seed,
        weights=tensors.get(WEIGHTS),
        optimizer=tensors.get(OPTIMIZER),
    )
    if not num_epochs:
        attrs = Outcome.read(kept[WEIGHTS].with_name("result.json")).attrs
        names = ("loss", "contextual_share", "sentence_r2", "history")
        found |= {name: attrs[name] for name in names}
    return found


def export_job(config: RunConfig) -> Job:
    """Return the job that exports the run's student."""
    return Job(Run(config.root, config.name).folder / "export", "export", export_best, (config,))


def export_best(config: RunConfig) -> dict[str, Any]:
    """Export the run's student; return the results of its checks, as from ``export_student``."""
    inputs = inputs_of(config)
    if inputs.task:
        rows = rows_of_task(inputs.task, config.finetune.max_length)
    else:
        corpus = inputs.data.read_corpus()
        rows = rows_of_texts(corpus.train, corpus.held_out)
    return export_run(inputs.run, rows)
