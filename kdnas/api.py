"""From Python: ``from kdnas import distill, search``. What takes seconds to import is imported by the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdnas.data.datamodule import DataSettings
    from kdnas.distillation.module import Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.models.arch import StudentArch
    from kdnas.training.trainer import TrainerSettings


def search(
    teacher: str,
    text: str,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    num_parameters: int | None = None,
    n_trials: int = 20,
    num_epochs: int = 2,
    **settings: Any,
) -> StudentArch:
    """Find the best student within a budget, as ``kdnas search`` does; the same call again goes on.

    It trains in this process, which a candidate that crashes in native code ends; the command's search survives that.

    Args:
        teacher: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        speedup: times as fast as the teacher, at least.
        latency_ms: milliseconds, at most.
        num_parameters: at most.
        n_trials: distinct candidates to train in all.
        num_epochs: of each candidate's mini-KD.
        settings: the other fields of ``SearchConfig``, such as ``name``, ``sampler``, ``workers``.

    Returns:
        The best student's shape.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from kdnas.commands import run
    from kdnas.commands.config import SearchConfig, SearchSettings
    from kdnas.nas.candidate import Budget

    asked = SearchSettings(n_trials, num_epochs, Budget(speedup, latency_ms, num_parameters))
    return run.search(SearchConfig(teacher=teacher, text=text, search=asked, **settings))


def distill(
    teacher: str,
    text: str,
    arch: StudentArch,
    *,
    num_epochs: int = 10,
    recipe: Recipe | None = None,
    data: DataSettings | None = None,
    states: StatesSettings | None = None,
    trainer: TrainerSettings | None = None,
    name: str = "distill",
    root: str = "lightning_logs",
    seed: int = 0,
) -> PreTrainedModel:
    """Distil one student on all rows, as the full KD of ``kdnas run`` does; after Ctrl-C the same call goes on.

    A call of the same name with other settings is refused then, until ``last.ckpt`` in its folder is deleted.

    Args:
        teacher: a folder, a hub name, or ``quickstart``.
        text: as for ``search``.
        arch: the student's shape.
        num_epochs: passes over the rows.
        recipe: objective, start and rates.
        data: how text becomes batches.
        states: where the teacher's states are kept.
        trainer: device and precision.
        name: of the folder for TensorBoard, below ``root``.
        root: the folder of all runs.
        seed: of the weights that are not the teacher's.

    Returns:
        The student, a plain transformers model in eval mode on the CPU; ``save_pretrained`` keeps it.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    import json
    from dataclasses import replace

    import torch
    from rich.console import Console

    from kdnas.commands.config import as_plain
    from kdnas.data.datamodule import DataSettings, KDDataModule
    from kdnas.data.quickstart import QUICKSTART, build_quickstart_text
    from kdnas.distillation.module import HiddenStateDistillModule, Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.models.encoders import find_teacher
    from kdnas.nas.search import differences
    from kdnas.system.errors import UserError
    from kdnas.system.files import Run, read_json, sweep, write_json
    from kdnas.system.yaml import flat
    from kdnas.training.progress import FitProgress, live_progress
    from kdnas.training.trainer import TrainerSettings, fit_resumable

    recipe, data = recipe or Recipe(), data or DataSettings()
    states, trainer = states or StatesSettings(), trainer or TrainerSettings()
    run = Run(root, name)
    run.check_writable()
    if run.config.exists():
        raise UserError(
            f"{str(run.folder)!r} is the folder of a search or a comparison: give another name."
        )
    trainer.check()
    found = find_teacher(teacher)
    if text == QUICKSTART:
        text = str(build_quickstart_text(run.text))
    states = replace(states, folder=states.folder or str(run.states))
    rows = KDDataModule(teacher, text, data, folder=str(run.tokens))
    rows.setup()
    assert rows.rows is not None
    asked = flat(
        {
            "teacher": found.sha256(),
            "text": rows.rows.sha256,
            "arch": arch.to_dict(),
            "num_epochs": num_epochs,
            "recipe": as_plain(recipe),
            "data": as_plain(replace(data, num_workers=0)),
            "precision": trainer.precision,
            "gradient_clip_val": trainer.gradient_clip_val,
            "states": states.precision,
            "seed": seed,
        }
    )
    asked = json.loads(json.dumps(asked))  # as it is read again
    alone = run.alone("wait for it, or give another name")
    with alone, live_progress(Console(markup=False)) as progress, torch.random.fork_rng():
        sweep(run.folder)
        last, made_with = run.folder / "last.ckpt", run.folder / "made_with.json"
        known = asked | read_json(made_with) if last.exists() and made_with.exists() else asked
        if shown := differences(known, asked):
            raise UserError(
                f"{str(last)!r} is of a distillation with other settings ({shown}): go back to them, delete it, or "
                "give another name."
            )
        write_json(made_with, asked)
        torch.manual_seed(seed)
        module = HiddenStateDistillModule(found, arch, recipe, states)
        attention = module.student.config._attn_implementation  # another one may train faster
        fit_resumable(
            trainer, run.folder, num_epochs, module, rows, [FitProgress(progress, "distillation")]
        )
        last.unlink()
    module.student.set_attn_implementation(attention)
    return module.student.cpu().eval()
