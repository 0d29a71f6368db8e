"""What ``kdnas.distill`` does: distil one student, as in the full KD of ``kdnas run``."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from kdnas.commands.config import as_plain
from kdnas.data.datamodule import DataSettings, KDDataModule
from kdnas.data.quickstart import text_and_task
from kdnas.distillation.full_kd import distill_student
from kdnas.distillation.module import Recipe
from kdnas.distillation.objectives import needed_layers
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.system.engine import Engine
from kdnas.system.errors import UserError
from kdnas.system.files import Run, sweep
from kdnas.system.jobs import Job
from kdnas.system.settings import keep_settings
from kdnas.system.signals import honest_signals
from kdnas.system.yaml import flat
from kdnas.training.progress import JobBars, live_progress
from kdnas.training.trainer import TrainerSettings


@honest_signals()
def distill(
    teacher: str,
    text: str,
    arch: StudentArch,
    num_epochs: int,
    recipe: Recipe,
    data: DataSettings,
    states: StatesSettings,
    trainer: TrainerSettings,
    name: str,
    root: str,
    seed: int,
) -> dict[str, Any]:
    """Distil one student on all rows.

    Arguments and errors are those of ``kdnas.distill``, but teacher and text are paths or names.

    Returns:
        The result dictionary of ``distill_student``.
    """
    if num_epochs < 1:
        raise UserError(f"num_epochs is {num_epochs}: give at least 1.")
    run = Run(root, name)
    run.check_writable()
    if run.config.exists():
        raise UserError(
            f"{str(run.folder)!r} was made by a search or a comparison: give another name."
        )
    trainer.check()
    found = find_teacher(teacher)
    text, _ = text_and_task(text, None, run.text)
    rows = KDDataModule(teacher, text, data, folder=str(run.tokens))
    rows.setup()
    asked = {
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

    def train() -> dict[str, Any]:
        num_layers = found.config.num_hidden_layers
        layers = needed_layers(recipe.objective, [arch.num_hidden_layers], num_layers)
        where = replace(states, folder=states.folder or str(run.states))
        known = open_states(found, rows, layers, where)
        return distill_student(
            found,
            arch,
            recipe,
            rows,
            known,
            trainer,
            num_epochs=num_epochs,
            folder=run.folder,
            seed=seed,
        )

    alone = run.alone("wait for it, or give another name")
    with alone, Engine() as engine, live_progress(Console(markup=False)) as progress:
        sweep(run.folder)
        last = run.folder / "last.ckpt"
        if not last.exists():
            run.made_with.unlink(missing_ok=True)  # settings of a finished distillation do not bind
        remedy = f"delete {str(last)!r}, or give another name"
        keep_settings(run.made_with, flat(asked), f"The distillation in {str(last)!r}", remedy)
        job = Job(run.folder, "distillation", train)
        job.result_file.unlink(missing_ok=True)
        (result,) = engine.run([job], JobBars(progress))
        last.unlink(missing_ok=True)
    return result
