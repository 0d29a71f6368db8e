"""What a fit tells, and what is shown of it: bars that vanish, and lines where no bar moves."""

import io
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from kdnas.commands.inputs import RunContext
from kdnas.system.jobs import Job, Reporter, Stopped, progress_of
from kdnas.training.progress import (
    EpochLines,
    JobBars,
    ProgressFile,
    StopWhenAsked,
    live_progress,
)
from kdnas.training.trainer import fit, make_trainer
from tests.training.test_trainer import Call, Data, Steep, settings


class Reports(Reporter):
    """Everything is told at once."""

    def tell(self, at_once: bool = False, **known: object) -> None:
        super().tell(at_once=True, **known)


def test_a_fit_tells_how_far_it_is(tmp_path):
    told = []
    look = Call(lambda trainer, module: told.append(progress_of(tmp_path)))
    callbacks = [ProgressFile(Reports(tmp_path)), look]
    fit(make_trainer(settings(), tmp_path, 2, callbacks), Steep(), Data())
    whole = {"num_steps": 6, "first_step": 0, "num_epochs": 2}
    assert told == [whole | {"step": step, "epoch": (step - 1) // 3} for step in range(1, 7)]


def test_a_fit_without_checkpoints_ends_at_once_where_it_is_asked_to(tmp_path):
    ask = Call(lambda trainer, module: (tmp_path / "stop").touch())
    trainer = make_trainer(settings(), tmp_path, 2, [ask, StopWhenAsked(Reporter(tmp_path))])
    with pytest.raises(Stopped):
        fit(trainer, Steep(), Data())
    assert trainer.global_step == 1


@pytest.fixture
def job(tmp_path) -> Job:
    """One that is at its fourth step of six."""
    known = {"num_steps": 6, "first_step": 0, "num_epochs": 2, "step": 4, "epoch": 1}
    Reports(tmp_path).tell(**known, val_loss=0.5)
    return Job(tmp_path, "trial 3: [4 x 192]", dict)


def test_a_terminal_shows_a_bar_for_each_job_that_runs(job, tmp_path):
    progress = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    other = progress.add_task("search", total=5)
    show, begun = JobBars(progress), Job(tmp_path / "begun", "full KD", dict)
    show([job, begun])
    show([job, begun])
    assert [(task.completed, task.total) for task in progress.tasks] == [(0, 5), (4, 6), (0, None)]
    assert "[4 x 192]" in progress.console.render_str(progress.tasks[1].description).plain
    show([begun])
    assert [task.description for task in progress.tasks] == ["search", "full KD"]
    show([])
    assert progress.task_ids == [other]


def test_a_file_gets_a_line_of_each_job_a_minute(job, monkeypatch):
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr("kdnas.training.progress.time.monotonic", lambda: now[0])
    progress = Progress(console=Console(file=file, width=30, markup=False))
    show = JobBars(progress)
    for now[0] in (0.0, 30.0, 60.1, 90.0, 120.2):
        show([job])
    line = "trial 3: [4 x 192]: epoch 2 of 2, step 4 of 6, held-out loss 0.5000\n"
    assert file.getvalue() == 2 * line and progress.task_ids == []


def test_the_time_that_is_left_is_told_where_candidates_take_minutes():
    context, now = SimpleNamespace(console=Console(file=io.StringIO())), 0.0
    progress = RunContext.progress(context)
    progress.get_time = lambda: now
    bar = progress.add_task("search", total=4, completed=1)
    for completed in (2, 3):
        now += 600
        progress.update(bar, completed=completed)
    assert progress.tasks[0].time_remaining == 600


@pytest.mark.parametrize("in_notebook", [True, False])
def test_bars_in_a_notebook_leave_stderr_alone(in_notebook):
    before = sys.stderr
    with live_progress(Console(force_jupyter=in_notebook, file=io.StringIO(), force_terminal=True)):
        assert (sys.stderr is before) == in_notebook


@pytest.mark.parametrize(
    ("seconds_a_step", "expected"),
    [
        (1.0, []),  # short epochs need no line
        (
            30.0,
            [
                "fit: epoch 1 of 2, step 2, 2 min left",
                "fit: epoch 1 of 2, step 3, held-out loss 0.5000, contextual share 0.250, 2 min left",
                "fit: epoch 2 of 2, step 5, ",
                "fit: epoch 2 of 2, step 6, held-out loss 0.5000",
            ],
        ),
        (
            700.0,
            [
                f"fit: epoch {1 + (step > 3)} of 2, step {step}, {more}"
                for step in range(1, 7)
                for more in (["", "held-out loss"] if step % 3 == 0 else [""])
            ],
        ),
    ],
)
def test_where_no_bar_moves_long_epochs_get_lines(tmp_path, monkeypatch, seconds_a_step, expected):
    now, lines = [0.0], []
    monkeypatch.setattr("kdnas.training.progress.time.monotonic", lambda: now[0])
    told = EpochLines("fit", lines.append)

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args):
            now[0] += seconds_a_step

        def on_train_epoch_end(self, trainer, pl_module):
            """As after a validation, which this module has not."""
            trainer.callback_metrics["val_loss"] = torch.tensor(0.5)
            trainer.callback_metrics["contextual_share"] = torch.tensor(0.25)
            told.on_validation_end(trainer, pl_module)

    fit(make_trainer(settings(), tmp_path / "fit", 2, [Clock(), told]), Steep(), Data())
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
