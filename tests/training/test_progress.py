"""What a fit shows: bars that vanish, and lines where no bar moves."""

import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from kdnas.commands.inputs import Found
from kdnas.training.progress import FitProgress, live_progress
from kdnas.training.trainer import KeepLast, fit, make_trainer
from tests.training.test_trainer import Call, Data, Steep, fail, interrupt, leave, settings


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def test_a_fit_is_shown_step_by_step_and_removed_at_its_end(tmp_path, progress):
    other = progress.add_task("search", total=5)
    shown = []

    def look(trainer, module):
        shown.append(
            [(task.description, task.completed, task.total) for task in progress.tasks[1:]]
        )

    fit(
        make_trainer(
            settings(), tmp_path / "fit", 2, [FitProgress(progress, "full KD"), Call(look)]
        ),
        Steep(),
        Data(),
    )
    epochs = [(f"  epoch {epoch} of 2", step, 3) for epoch in (1, 2) for step in (1, 2, 3)]
    assert shown == [[("full KD", step, 6), epoch] for step, epoch in enumerate(epochs, 1)]
    assert progress.task_ids == [other]


def test_a_resumed_fit_is_shown_from_where_it_goes_on(tmp_path, progress):
    fit(
        make_trainer(settings(), tmp_path / "fit", 1, [KeepLast(tmp_path / "last.ckpt")]),
        Steep(),
        Data(),
    )
    shown = []

    class Begin(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            shown.append((progress.tasks[0].completed, progress.tasks[0].total))

    trainer = make_trainer(
        settings(), tmp_path / "fit", 2, [FitProgress(progress, "full KD"), Begin()]
    )
    fit(trainer, Steep(), Data(), ckpt_path=tmp_path / "last.ckpt")
    assert shown == [(3, 6)]


def test_a_fit_that_goes_on_within_an_epoch_is_shown_too(tmp_path, progress):
    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    last, shown = tmp_path / "last.ckpt", []
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(settings(), tmp_path / "fit", 2, [KeepLast(last), Ask()]), Steep(), Data())
    look = Call(lambda trainer, module: shown.append([task.completed for task in progress.tasks]))
    trainer = make_trainer(
        settings(), tmp_path / "fit", 2, [FitProgress(progress, "full KD"), look, KeepLast(last)]
    )
    fit(trainer, Steep(), Data(), ckpt_path=last)
    assert [len(tasks) for tasks in shown] == [2] * len(shown)
    assert shown[0] == [3, 3] and shown[-1] == [trainer.global_step, 3]


def test_the_time_that_is_left_is_told_where_candidates_take_minutes():
    progress, now = Found.progress(SimpleNamespace(console=Console(file=io.StringIO()))), 0.0
    progress.get_time = lambda: now
    bar = progress.add_task("search", total=4, completed=1)
    for completed in (2, 3):
        now += 600
        progress.update(bar, completed=completed)
    assert progress.tasks[0].time_remaining == 600


@pytest.mark.parametrize("end", [interrupt, leave, fail])
def test_a_fit_that_fails_is_removed_too(tmp_path: Path, progress, end):
    trainer = make_trainer(
        settings(), tmp_path / "fit", 2, [FitProgress(progress, "full KD"), Call(end)]
    )
    with pytest.raises((KeyboardInterrupt, SystemExit, ZeroDivisionError)):
        fit(trainer, Steep(), Data())
    assert progress.task_ids == []


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
                "full KD: epoch 1 of 2, step 3, held-out loss 0.5000, 2 min left",
                "full KD: epoch 2 of 2, step 6, ",
            ],
        ),
        (700.0, [f"full KD: epoch {1 + (step > 3)} of 2, step {step}, " for step in range(1, 7)]),
    ],
)
def test_where_no_bar_moves_long_epochs_get_lines(tmp_path, monkeypatch, seconds_a_step, expected):
    now = [0.0]
    monkeypatch.setattr("kdnas.training.progress.time.monotonic", lambda: now[0])

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args):
            now[0] += seconds_a_step

        def on_train_epoch_end(
            self, trainer, pl_module
        ):  # as after a validation, which this module has not
            trainer.callback_metrics["val_loss"] = torch.tensor(0.5)
            shown.on_validation_end(trainer, pl_module)

    file = io.StringIO()
    progress = Progress(console=Console(file=file, width=200))
    shown = FitProgress(progress, "full KD")
    trainer = make_trainer(settings(), tmp_path / "fit", 2, [Clock(), shown])
    fit(trainer, Steep(), Data())
    lines = file.getvalue().splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
