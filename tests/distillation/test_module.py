import dataclasses
import math
import threading
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from kdnas.cli.main import main
from kdnas.commands.config import as_plain
from kdnas.data.datamodule import Batch, DataSettings, KDDataModule
from kdnas.distillation.attention import AttentionMaps, AttentionRelations
from kdnas.distillation.full_kd import distill_student
from kdnas.distillation.metrics import too_long
from kdnas.distillation.module import (
    CALIBRATION_TOKENS,
    DEFAULT_OBJECTIVE,
    HiddenStateDistillModule,
    Recipe,
)
from kdnas.distillation.objectives import HiddenStates, View, WeightedSum
from kdnas.distillation.sentences import PairComparison, SentenceState
from kdnas.distillation.start import FromEmbeddings, FromTeacher, RandomStart, Started
from kdnas.distillation.state_cache import StateCache
from kdnas.distillation.teacher_states import (
    StatesSettings,
    TeacherStates,
    open_states,
    sample_batches,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher, embed, find_teacher
from kdnas.models.families import arch_of
from kdnas.models.layers import Even, Last, LastLayer
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.jobs import Stopped
from kdnas.training.checkpoints import KeepLast
from kdnas.training.precision import VARIABLE
from kdnas.training.trainer import TrainerSettings, fit
from tests.conftest import make_rows, view_of

NARROW = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64
)
SHORT = StudentArch(
    num_hidden_layers=3, num_attention_heads=2, hidden_size=64, intermediate_size=64
)
GENTLE = {"learning_rate": 3e-4, "copied_learning_rate": 3e-4, "matrix_learning_rate": 1e-3}
SUM = WeightedSum(
    [
        HiddenStates(LastLayer()),
        AttentionMaps(),
        AttentionRelations(num_heads=4),
        SentenceState(),
        PairComparison(),
    ],
    [4, 1, 1, 1, 1],
)
PAIRS = {2: [(2, 0), (3, 2)], 3: [(1, 0), (2, 1), (3, 2)]}  # last and skip, of 4 layers


@pytest.fixture(scope="module")
def states_settings(tmp_path_factory) -> StatesSettings:
    """One cache for all tests."""
    return StatesSettings(str(tmp_path_factory.mktemp("states")))


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> Teacher:
    return find_teacher(str(tiny_teacher))


@pytest.fixture(scope="module")
def data(tiny_teacher, text_file) -> KDDataModule:
    return open_data(tiny_teacher, text_file)


@pytest.fixture(scope="module")
def states(teacher, data, states_settings) -> TeacherStates:
    return open_states(teacher, data, range(-1, 4), states_settings)


def open_data(teacher: Path, text: Path, **settings) -> KDDataModule:
    settings = (
        dict(max_length=32, batch_tokens=300, held_out_fraction=0.3, mask_probability=0.3)
        | settings
    )
    data = KDDataModule(
        str(teacher),
        str(text),
        DataSettings(**({"pair_share": 0.0, "masked_share": 1.0} | settings)),
    )
    data.setup()
    return data


def make(
    teacher: Teacher | str, states: TeacherStates | None, arch: StudentArch = NARROW, **recipe
):
    torch.manual_seed(0)
    module = HiddenStateDistillModule(
        teacher, arch, Recipe(**({"objective": HiddenStates()} | recipe))
    )
    module.states = states
    return module


def begun(module, data: KDDataModule):
    """The module as ``fit`` begins with it."""
    module.begin(data)
    return module


def errors(module, batch: Batch) -> Tensor:
    """The sums of the terms' errors on a batch."""
    return module(*module.views(batch))[0]


def trainer(*callbacks: pl.Callback, num_epochs: int = 1, **arguments) -> pl.Trainer:
    defaults = dict(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    defaults |= dict(enable_model_summary=False, num_sanity_val_steps=0, max_epochs=num_epochs)
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def validate(module, data: KDDataModule) -> dict[str, float]:
    fitted = trainer()
    fitted.validate(module, data, verbose=False)
    return {name: float(value) for name, value in fitted.callback_metrics.items()}


class Watch(pl.Callback):
    """Calls back after each step, with the step's loss."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer, pl_module, float(outputs["loss"]))


def variances(data: KDDataModule, sample_ids: np.ndarray, teacher: Teacher) -> list[float]:
    """Of each teacher layer on some rows, from padded data."""
    batch = data.rows[0, sample_ids]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = teacher.model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
    real = batch["attention_mask"].bool()
    return [
        float(np.var(layer[real].float().numpy(), axis=0).mean())
        for layer in output.hidden_states[1:]
    ]


def oracle(
    module, teacher: Teacher, batch: Batch, scales: list[float], pairs: list[tuple[int, ...]]
) -> float:
    """The loss, by plain loops over padded data: over student layers, rows and real tokens."""
    inputs = dict(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    )
    with torch.no_grad():
        ours = [layer.numpy() for layer in module.student(**inputs).hidden_states[1:]]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = [layer.float().numpy() for layer in teacher.model(**inputs).hidden_states[1:]]
    lengths = batch["attention_mask"].sum(1).tolist()
    total, count = 0.0, 0
    for i, layers in enumerate(pairs):
        projections = module.criterion.projections
        projection = projections[i if len(projections) > 1 else 0]
        weight, bias = projection.weight.detach().numpy(), projection.bias.detach().numpy()
        for row, length in enumerate(lengths):
            for token in range(length):
                predicted = weight @ ours[i][row, token] + bias
                target = np.concatenate([theirs[layer][row, token] for layer in layers])
                scale = np.concatenate([np.full(64, scales[layer]) for layer in layers])
                total += ((predicted - target) ** 2 / scale).mean()
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("arch", "recipe", "pairs"),
    [
        (NARROW, {}, PAIRS[2]),
        (SHORT, {}, PAIRS[3]),
        (NARROW, {"normalize": False}, PAIRS[2]),
        (NARROW, {"shared_projection": True}, PAIRS[2]),
        (SHORT, {"mapping": Last()}, [(1,), (2,), (3,)]),
        (NARROW, {"mapping": Even()}, [(1,), (3,)]),
    ],
)
def test_the_loss_is_that_of_plain_loops_over_real_tokens(
    teacher, data, states, arch, recipe, pairs
):
    objective = HiddenStates(**recipe)
    module = begun(
        make(teacher, states, arch, start=RandomStart(), objective=objective), data
    ).eval()
    batch = data.rows[0, np.array([3, 40, 7, 119])]
    assert 0 < batch["attention_mask"].float().mean() < 1
    scales = (
        [states.stats[layer].variance for layer in range(4)] if objective.normalize else [1.0] * 4
    )
    if objective.normalize:
        assert scales == pytest.approx(
            variances(data, data.select("mini").train_ids(), teacher), rel=0.01
        )
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0).item()
    assert loss == pytest.approx(oracle(module, teacher, batch, scales, pairs), rel=5e-3)


def test_padding_changes_no_loss(teacher, data, states):
    module = make(teacher, states).eval()
    rows = data.rows.lengths.argsort()[[0, 1, -1]]
    together, _ = module(*module.views(data.rows[0, rows]))
    assert data.rows[0, rows]["attention_mask"][0].sum() < 8
    alone = [errors(module, data.rows[0, rows[i : i + 1]]) for i in range(3)]
    torch.testing.assert_close(together, sum(alone), rtol=1e-4, atol=0)
    batch = data.rows[0, rows]
    batch["input_ids"][batch["attention_mask"] == 0] = 17
    torch.testing.assert_close(errors(module, batch), together)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("arch", [NARROW, SHORT])
@pytest.mark.parametrize("objective", [HiddenStates(), SUM], ids=["hidden states", "sum"])
def test_cached_and_live_states_give_the_same_loss(
    any_teacher, text_file, tmp_path, arch, objective, precision, monkeypatch
):
    monkeypatch.setenv(VARIABLE, "float32")  # bfloat16 rounds a row by the batch that it is in
    teacher, data = (
        find_teacher(str(any_teacher)),
        open_data(any_teacher, text_file, pair_share=0.5),
    )
    losses = []
    for settings in (
        StatesSettings(str(tmp_path), 0),
        StatesSettings(str(tmp_path), precision=precision),
    ):
        states = open_states(teacher, data, range(-1, 4), settings)
        metrics = validate(begun(make(teacher, states, arch, objective=objective), data), data)
        losses.append([metrics["val/loss"], *(metrics[name] for name in sorted(metrics))])
    close = 1e-3 if precision == "float16" else 2e-2
    assert losses[0][0] == pytest.approx(losses[1][0], rel=close, abs=close)
    assert losses[0] == pytest.approx(losses[1], rel=5 * close, abs=5 * close)
    assert losses[0] != losses[1]  # one of them is rounded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matmuls", "precision", "close"),
    [("float32", "32-true", 1e-3), ("bfloat16", "bf16-mixed", 3e-3)],
)
def test_an_epoch_on_stored_states_is_one_on_the_live_teacher(
    tmp_path, monkeypatch, matmuls, precision, close
):
    monkeypatch.setenv(VARIABLE, matmuls)
    text = tmp_path / "rows.txt"
    text.write_text("\n".join(row for seed in range(2) for row in make_rows(200, seed)))
    teacher, ends = find_teacher("quickstart"), []
    for max_gb in (0, 1):
        data = open_data("quickstart", text, pair_share=0.5, masked_share=0.5)
        module = make(teacher, None, StudentArch(2, 6, 192, 384), objective=DEFAULT_OBJECTIVE)
        module.states = open_states(
            teacher, data, module.target_layers, StatesSettings(str(tmp_path), max_gb)
        )
        fit(trainer(precision=precision), begun(module, data), data)
        ends.append(module.history[-1]["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=close) and ends[0] != ends[1]


@pytest.mark.parametrize("arch", [NARROW, SHORT])
@pytest.mark.parametrize(
    "objective", [HiddenStates(fit_projections=False), SUM], ids=["hidden states", "sum"]
)
def test_steps_lower_the_loss(any_teacher, text_file, tmp_path, arch, objective):
    data = open_data(any_teacher, text_file, pair_share=0.9)
    teacher = find_teacher(str(any_teacher))
    states = open_states(teacher, data, range(-1, 4), StatesSettings(str(tmp_path), max_gb=0))
    module = make(
        teacher,
        states,
        arch,
        constant_rate=True,
        start=FromEmbeddings(),
        objective=objective,
        **GENTLE,
    )
    begun(module, data)
    module.log = lambda *args, **kwargs: None
    module.student.eval()
    optimizer, batch, losses = module.configure_optimizers(), data.rows[0, np.arange(8)], []
    for _ in range(4):
        losses.append(module.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(
            parameter.grad is not None for parameter in module.parameters()
        )  # DDP refuses others
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_all_their_rows(
    teacher, tiny_teacher, text_file, tmp_path, monkeypatch
):
    data = open_data(tiny_teacher, text_file, pair_share=0.5)
    states = open_states(teacher, data, range(-1, 4), StatesSettings(str(tmp_path), max_gb=0))
    module = begun(make(teacher, states, objective=DEFAULT_OBJECTIVE), data).eval()
    logged: list[float] = []

    def log(name: str, value: Tensor, prog_bar: bool) -> None:  # sync_dist would exchange again
        logged.append(float(value))

    module.log = log

    def gradient(rows: np.ndarray) -> Tensor:
        module.zero_grad()
        module.training_step(data.rows[0, rows], 0).backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])

    rows = data.train_ids()[:40]
    is_pair = data.rows[0, rows]["token_type_ids"].any(1).numpy()
    parts = rows[~is_pair][:3], rows[is_pair][:8]  # the first rank has no pairs
    counts = [module(*module.views(data.rows[0, part]))[1] for part in parts]
    assert 0 == counts[0][-1] < counts[1][-1] == 8
    together = gradient(np.concatenate(parts))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    views = [module.views(data.rows[0, part]) for part in parts]
    known = sum(torch.stack(module(*view)[::-1]).detach() for view in views)
    exchanged, loss = [], logged.pop()

    def all_reduce(tensor: Tensor) -> None:
        exchanged.append(tensor)
        tensor.copy_(known)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert (sum(map(gradient, parts)) / 2 - together).norm() < 1e-2 * together.norm()
    # One exchange a step, in which the loss of all ranks' rows comes too.
    assert len(exchanged) == 2
    assert logged[-2:] == pytest.approx([loss, loss], rel=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_every_precision_that_trains_a_student_trains(teacher, data, states, precision):
    module = make(teacher, states, objective=DEFAULT_OBJECTIVE)
    trainer(precision=precision).fit(module, datamodule=data)
    assert (
        0 < module.history[-1]["loss"] < 2 and module.student.config._attn_implementation == "eager"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_gb", [0, 20])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_on_a_gpu_learns_as_one_on_the_cpu_does(teacher, data, tmp_path, max_gb, precision):
    losses = []
    for accelerator, device in (("cpu", "cpu"), ("gpu", "cuda")):
        source = open_states(
            teacher,
            data,
            range(-1, 4),
            StatesSettings(str(tmp_path / device), max_gb=max_gb),
            device,
        )
        module = make(teacher, source, objective=DEFAULT_OBJECTIVE)
        trainer(accelerator=accelerator, precision=precision, num_epochs=2).fit(
            module, datamodule=data
        )
        losses.append([row["loss"] for row in module.history])
    teacher.model.to("cpu")
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1][1] < losses[1][0]


def test_a_fit_learns_and_leaves_the_teacher_as_it_was(teacher, data, states):
    before = teacher.sha256()
    module = make(teacher, states, learning_rate=3e-3, matrix_learning_rate=5e-3)
    trainer(num_epochs=3).fit(module, datamodule=data)
    assert [row["epoch"] for row in module.history] == [0, 1, 2]
    assert module.history[0]["loss"] > module.history[2]["loss"]
    assert teacher.sha256() == before


def test_stored_states_are_read_by_another_thread_than_the_one_that_trains(
    teacher, data, states, monkeypatch
):
    read, threads = StateCache.__call__, []

    def watched(cache: StateCache, *args) -> list[Tensor]:
        threads.append(threading.current_thread())
        return read(cache, *args)

    module = begun(make(teacher, states), data)
    monkeypatch.setattr(StateCache, "__call__", watched)
    fit(trainer(), module, data)
    num_batches = len(data.train_dataloader()) + len(data.val_dataloader())
    assert len(threads) == num_batches and threading.current_thread() not in threads


def test_the_heap_s_holes_are_given_back_every_some_steps(teacher, data, states, monkeypatch):
    trimmed, module = [], make(teacher, states)
    monkeypatch.setattr("kdnas.distillation.module.TRIM_STEPS", 3)
    monkeypatch.setattr(
        "kdnas.distillation.module.trim_heap", lambda: trimmed.append(module.global_step)
    )
    trainer(num_epochs=2, limit_train_batches=5).fit(module, datamodule=data)
    assert trimmed == [3, 8]


def test_every_epoch_trains_on_every_row_and_is_validated(tiny_teacher, tmp_path, states_settings):
    (tmp_path / "rows.txt").write_text("\n".join(make_rows(150)))
    data = open_data(tiny_teacher, tmp_path / "rows.txt", batch_tokens=32, held_out_fraction=0.04)
    rows = data.train_ids().tolist()
    seen = []

    class Counting(HiddenStateDistillModule):
        def training_step(self, batch, batch_idx):
            seen.extend((self.current_epoch, int(row)) for row in batch["sample_ids"])
            return super().training_step(batch, batch_idx)

    module = Counting(str(tiny_teacher), StudentArch(1, 2, 16, 16), states=states_settings)
    trainer(num_epochs=2).fit(module, datamodule=data)
    assert sorted(seen) == [(epoch, row) for epoch in range(2) for row in rows]
    assert [row["epoch"] for row in module.history] == [0, 1]


def test_the_student_s_dropout_is_off_unless_asked_for(teacher, data, states):
    for dropout in (False, True):
        module, modes = make(teacher, states, dropout=dropout), []
        assert module.student.config.hidden_dropout_prob > 0
        watch = Watch(
            lambda trainer, module, loss, modes=modes: modes.append(module.student.training)
        )
        trainer(watch, num_epochs=2, limit_train_batches=3).fit(module, datamodule=data)
        assert modes == [dropout] * 6  # also after a validation
        batch = data.rows[0, np.arange(4)]
        module.on_train_start()
        same = torch.equal(errors(module, batch), errors(module, batch))
        assert same is not dropout


def test_parameters_are_the_student_s_and_one_projection_a_layer(teacher, states):
    for shared, num_projections in ((False, 3), (True, 1)):
        module = make(teacher, states, SHORT, objective=HiddenStates(shared_projection=shared))
        assert {name.split(".")[0] for name in module.state_dict()} == {"student", "criterion"}
        student = sum(parameter.numel() for parameter in module.student.parameters())
        assert (
            sum(p.numel() for p in module.parameters())
            == student + num_projections * (64 + 1) * 128
        )
        assert not any("pooler" in name for name in module.state_dict())


def test_the_student_is_started_once_when_the_fit_is_set_up_on_training_rows_alone(
    teacher, data, states
):
    calls = []

    class Watched(FromTeacher):
        def __call__(self, student, teacher, rows):
            calls.append(
                (
                    student.training,
                    torch.is_grad_enabled(),
                    [row["sample_ids"].tolist() for row in rows],
                )
            )
            return super().__call__(student, teacher, rows)

    module = make(teacher, states, start=Watched())
    trainer().validate(module, data, verbose=False)
    assert calls == [] and module.started is None
    trainer().fit(module, datamodule=data)
    trainer().fit(module, datamodule=data)
    assert len(calls) == 1
    training, grad, rows = calls[0]
    assert not training and not grad
    seen = sorted(sum(rows, []))
    assert seen == sorted(set(seen)) and set(seen) <= set(data.train_ids().tolist())
    assert seen == sorted(
        int(i)
        for b in sample_batches(data, data.train_ids(), CALIBRATION_TOKENS)
        for i in b["sample_ids"]
    )


@pytest.mark.parametrize("arch", [NARROW, SHORT])
def test_the_criterion_is_fitted_to_the_started_student(teacher, data, states, arch):
    losses = []
    for fitted in (True, False):
        module = begun(
            make(teacher, states, arch, objective=HiddenStates(fit_projections=fitted)), data
        )
        module.log = lambda *args, **kwargs: None
        module.states = states
        losses.append(float(module.training_step(data.rows[0, data.train_ids()], 0)))
    assert losses[0] < 0.95 and losses[0] < 0.7 * losses[1]  # 1: the mean of each layer
    module = begun(make(teacher, states, arch, objective=AttentionMaps()), data)
    assert module.criterion.heads.tolist() == [list(heads) for heads in module.started.heads]


def test_a_checkpoint_holds_no_teacher_and_is_loaded_with_the_defaults(
    teacher, data, states, tmp_path, tiny_teacher
):
    module = make(teacher, states, objective=SUM)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(saver, enable_checkpointing=True, num_epochs=2).fit(module, datamodule=data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student", "criterion"}
    size = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    buffers = sum(buffer.numel() for buffer in module.criterion.buffers())
    assert (
        size == sum(parameter.numel() for parameter in module.parameters()) + buffers
        and buffers > 64
    )
    assert (
        tmp_path / "last.ckpt"
    ).stat().st_size < 3 * 4 * size + 200_000  # weights and two moments
    again = HiddenStateDistillModule.load_from_checkpoint(
        tmp_path / "last.ckpt", teacher=str(tiny_teacher), arch=NARROW, recipe=Recipe(objective=SUM)
    )
    assert again.history == module.history and len(again.history) == 2
    again.states = states
    batch = data.rows[0, data.held_out_ids()]
    with torch.no_grad():
        torch.testing.assert_close(
            errors(again.eval(), batch), errors(module.eval(), batch)
        )  # one of them attends eagerly


@pytest.mark.parametrize("objective", [HiddenStates(), SUM], ids=["hidden states", "sum"])
def test_a_resumed_fit_ends_as_an_unbroken_one(teacher, data, states, tmp_path, objective):
    whole = make(teacher, states, objective=objective)
    trainer(num_epochs=3).fit(whole, datamodule=data)
    broken = make(teacher, states, objective=objective)

    class StopAfterTwo(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer(KeepLast(tmp_path / "last.ckpt"), StopAfterTwo(), num_epochs=3).fit(
            broken, datamodule=data
        )
    resumed = make(teacher, states, objective=objective)
    trainer(num_epochs=3).fit(resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in resumed.history] == [0, 1, 2]
    assert resumed.history == whole.history
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


class StartOnce(FromTeacher):
    """Counts what starts it."""

    num_calls = 0

    def __call__(self, *args) -> Started:
        StartOnce.num_calls += 1
        return super().__call__(*args)


class StopInSecondEpoch(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise InterruptedError


def test_full_kd_that_goes_on_starts_no_student_anew(teacher, data, states, tmp_path):
    def distil(*callbacks: type[pl.Callback]) -> dict:
        recipe = Recipe(objective=HiddenStates(), start=StartOnce())
        settings = TrainerSettings("cpu", "32-true", callbacks=[*callbacks])
        options = dict(num_epochs=2, folder=tmp_path)
        return distill_student(teacher, NARROW, recipe, data, states, settings, **options)

    with pytest.raises(InterruptedError):
        distil(StopInSecondEpoch)
    assert StartOnce.num_calls == 1
    resumed = distil()["history"]
    assert StartOnce.num_calls == 1
    (tmp_path / "last.ckpt").unlink()
    assert distil()["history"] == resumed and StartOnce.num_calls == 2


class StopAt(pl.Callback):
    """The job is asked to stop while a step, counted over all epochs, is made.

    Args:
        step: of them; -1: none.
        folder: of the job.
    """

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder, self.seen = step, folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch["sample_ids"].tolist()))
        if trainer.global_step == self.step:
            (self.folder / "stop").touch()
        else:
            (self.folder / "stop").unlink(missing_ok=True)


DROPPED = {"objective": HiddenStates(), "dropout": True}  # the random numbers go on too


@pytest.fixture(scope="module")
def unbroken(teacher, data, states, tmp_path_factory):
    """A fit of three epochs and the rows that it saw."""
    whole, seen = make(teacher, states, **DROPPED), StopAt(-1, tmp_path_factory.mktemp("whole"))
    fit(trainer(seen, num_epochs=3), whole, data)
    return whole, seen.seen


@pytest.mark.parametrize("place", ["first", "middle", "last but one", "last"])
def test_a_fit_that_is_stopped_within_an_epoch_goes_on_at_the_next_row(
    teacher, data, states, tmp_path, unbroken, place
):
    whole, seen = unbroken
    num_steps = len(data.train_dataloader())
    assert num_steps > 3
    places = {"first": 0, "middle": 2, "last but one": num_steps - 2, "last": num_steps - 1}
    step = num_steps + places[place]
    last, broken = tmp_path / "last.ckpt", StopAt(step, tmp_path)
    with pytest.raises(Stopped):
        fit(trainer(KeepLast(last), broken, num_epochs=3), make(teacher, states, **DROPPED), data)
    assert len(broken.seen) == step + 1  # the step itself is finished and kept
    resumed, rest = make(teacher, states, **DROPPED), StopAt(-1, tmp_path)
    fit(trainer(KeepLast(last), rest, num_epochs=3), resumed, data, ckpt_path=last)
    assert broken.seen + rest.seen == seen
    assert resumed.history == whole.history
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_fit_of_short_epochs_goes_on_at_the_next_row_too(teacher, data, states, tmp_path):
    limit, last = len(data.train_dataloader()) - 2, tmp_path / "last.ckpt"
    whole = StopAt(-1, tmp_path)
    fit(trainer(whole, num_epochs=3, limit_train_batches=limit), make(teacher, states), data)
    assert len(whole.seen) == 3 * limit
    for step in (limit - 1, limit, limit + 1):  # the last of the first epoch, and two of the second
        broken, rest = StopAt(step, tmp_path), StopAt(-1, tmp_path)
        with pytest.raises(Stopped):
            fit(
                trainer(KeepLast(last), broken, num_epochs=3, limit_train_batches=limit),
                make(teacher, states),
                data,
            )
        arguments = dict(num_epochs=3, limit_train_batches=limit)
        fit(trainer(KeepLast(last), rest, **arguments), make(teacher, states), data, ckpt_path=last)
        assert broken.seen + rest.seen == whole.seen
        last.unlink(missing_ok=True)


class Beginning(pl.Callback):
    """What the optimizer knows before the first step, and its rates."""

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.tensors = {
            name: tensor.clone() for name, tensor in optimizer.tensors(pl_module).items()
        }
        self.rates = [group["lr"] for group in optimizer.param_groups]


def test_a_fit_goes_on_from_another_s_moments_but_where_it_goes_on_from_its_own(
    teacher, data, states, tmp_path
):
    def go_on(tensors: dict[str, Tensor], *callbacks: pl.Callback, **options):
        module, beginning = make(teacher, states), Beginning()
        module.optimizer_tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        fitted = trainer(beginning, *callbacks)
        fit(fitted, module, data, **options)
        return (
            module,
            beginning,
            {name: t.clone() for name, t in fitted.optimizers[0].tensors(module).items()},
        )

    first, fresh, known = go_on({})
    assert {name.rpartition("/")[2] for name in known} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "momentum_buffer",
    }
    whole, beginning, _ = go_on(known)
    assert fresh.tensors == {} and fresh.rates == beginning.rates
    assert beginning.tensors.keys() == known.keys()
    assert all(torch.equal(tensor, known[name]) for name, tensor in beginning.tensors.items())
    assert not all(
        torch.equal(one, other)
        for one, other in zip(whole.parameters(), first.parameters(), strict=True)
    )

    last = tmp_path / "last.ckpt"
    with pytest.raises(Stopped):
        go_on(known, KeepLast(last), StopAt(2, tmp_path))
    (tmp_path / "stop").unlink()
    others = {name: tensor + 1 for name, tensor in known.items()}
    resumed, beginning, _ = go_on(others, KeepLast(last), ckpt_path=last)
    steps = [beginning.tensors[name] - known[name] for name in known if name.endswith("/step")]
    assert steps and set(map(float, steps)) == {3.0}
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_written_every_few_minutes(teacher, data, states, tmp_path):
    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(
            trainer(KeepLast(tmp_path / "last.ckpt", every_seconds=0), Kill()),
            make(teacher, states),
            data,
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def rates(module, data: KDDataModule, num_epochs: int = 4) -> tuple[list[list[float]], list[float]]:
    """The rate of each group at each step, and after the last."""
    found = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            found.append([group["lr"] for group in optimizer.param_groups])

    fitted = trainer(Rates(), num_epochs=num_epochs)
    fitted.fit(module, datamodule=data)
    return found, [group["lr"] for group in fitted.optimizers[0].param_groups]


def test_the_rates_rise_and_fall_to_zero(teacher, data, states):
    module = make(teacher, states, learning_rate=1e-2, matrix_learning_rate=2e-2, warmup_share=0.25)
    steps, last = rates(module, data)
    num_steps = 4 * len(data.train_dataloader())
    num_warmup = round(0.25 * num_steps)
    assert len(steps) == num_steps > 8
    shape = [
        min((i + 1) / num_warmup, (num_steps - i) / (num_steps - num_warmup))
        for i in range(num_steps)
    ]
    assert max(shape) == 1 and shape[0] < 1
    for group in range(len(last)):
        peak = max(step[group] for step in steps)
        assert peak in (pytest.approx(1e-2), pytest.approx(2e-2))
        assert [step[group] / peak for step in steps] == pytest.approx(shape)
        assert last[group] == 0


def test_without_warm_up_the_first_step_has_the_full_rate(teacher, data, states):
    steps, last = rates(make(teacher, states, warmup_share=0.0), data, num_epochs=1)
    assert steps[0][0] == pytest.approx(1.5e-3) and steps[-1][0] > last[0] == 0


def test_a_constant_rate_stays(teacher, data, states):
    steps, last = rates(make(teacher, states, constant_rate=True), data, num_epochs=2)
    assert all(step == steps[0] == last for step in steps)


def test_a_falling_rate_needs_a_last_step(teacher, data, states):
    for arguments in ({"num_epochs": -1}, {"num_epochs": None, "max_time": "00:00:01:00"}):
        with pytest.raises(
            UserError,
            match=r"training steps is unlimited.* trainer.max_epochs .*recipe.constant_rate",
        ):
            trainer(**arguments).fit(make(teacher, states), datamodule=data)


@pytest.mark.parametrize("matrix_rate", [None, 2e-2])
def test_copied_parameters_have_their_own_rate_and_only_matrices_decay(
    any_teacher, text_file, states_settings, matrix_rate
):
    teacher = find_teacher(str(any_teacher))
    whole = arch_of(teacher.config)
    shallow = dataclasses.replace(whole, num_hidden_layers=1)
    for arch in (NARROW, shallow, whole):
        recipe = dict(
            learning_rate=1e-2, copied_learning_rate=1e-4, weight_decay=0.5, constant_rate=True
        )
        recipe |= dict(matrix_learning_rate=matrix_rate, copied_matrix_learning_rate=1e-3)
        module, data = make(teacher, None, arch, **recipe), open_data(any_teacher, text_file)
        module.states = open_states(teacher, data, module.target_layers, states_settings)
        begun(module, data)
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = module.configure_optimizers().param_groups
        found = {
            names[p]: (group["lr"], group.get("weight_decay", 0.0))
            for group in groups
            for p in group["params"]
        }
        assert found.keys() == set(names.values())
        for parameter, name in names.items():
            is_copied = name.startswith("student.") and (
                arch is not NARROW
                or (
                    teacher.config.model_type == "albert" and name.startswith("student.embeddings.")
                )
            )
            is_table = "embedding" in name or not name.startswith("student.")
            if matrix_rate is not None and parameter.ndim > 1 and not is_table:
                assert found[name] == (1e-3 if is_copied else 2e-2, 0.5)
            else:
                assert found[name] == (
                    1e-4 if is_copied else 1e-2,
                    0.5 if parameter.ndim > 1 else 0.0,
                )


def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batches(
    teacher, tiny_teacher, text_file, data, states
):
    module = begun(make(teacher, states), data)
    found = []
    for batch_tokens in (32, 100, 5000):
        other = open_data(tiny_teacher, text_file, batch_tokens=batch_tokens)
        found.append(validate(module, other))
    rows = [data.rows[0, np.array([row])] for row in data.held_out_ids()]
    module.eval()
    with torch.no_grad():
        sums = sum(errors(module, row).double() for row in rows)
    mse = sums / data.rows.lengths[data.held_out_ids()].sum()
    by_pair = dict(zip([(0, 2), (0, 0), (1, 3), (1, 2)], mse.tolist(), strict=True))
    loss = np.mean(
        [error / states.stats[layer].held_out_variance for (_, layer), error in by_pair.items()]
    )
    for metrics in found:
        assert metrics["val_loss"] == metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
        for (i, layer), error in by_pair.items():
            assert metrics[f"terms/student_{i}_teacher_{layer}"] == pytest.approx(error, rel=1e-5)


def test_every_mapped_teacher_layer_has_its_metrics(teacher, data, states):
    module = begun(make(teacher, states), data)
    metrics = validate(module, data)
    with torch.no_grad():
        sums, count = module.eval()(*module.views(data.rows[0, data.held_out_ids()]))
    mse = (sums / count).tolist()  # of student layers 0, 0, 1, 1 on teacher layers 2, 0, 3, 2
    best = {0: mse[1], 2: min(mse[0], mse[3]), 3: mse[2]}
    assert {name.split("/")[0] for name in metrics if "layer" in name} == {
        f"teacher_layer_{layer}" for layer in best
    }
    for layer, error in best.items():
        stats = states.stats[layer]
        assert metrics[f"teacher_layer_{layer}/raw_mse"] == pytest.approx(error, rel=1e-4)
        assert metrics[f"teacher_layer_{layer}/r2"] == pytest.approx(
            1 - error / stats.held_out_variance, abs=1e-4
        )
        share = 1 - error / stats.held_out_mse_context_free
        assert metrics[f"teacher_layer_{layer}/contextual_share"] == pytest.approx(share, abs=1e-4)


def half_and_half(
    xs: list[np.ndarray], ys: list[np.ndarray], strength: float
) -> tuple[float, float]:
    """Error and variance on the second half of a shrunk linear map fitted on the first; the first batch is cut."""
    middle = len(xs[0]) // 2
    parts = [(xs[0][:middle], ys[0][:middle], 0), (xs[0][middle:], ys[0][middle:], 1)]
    parts += [
        (x, y, number % 2) for number, (x, y) in enumerate(zip(xs, ys, strict=True)) if number
    ]
    (x, y), (test_x, test_y) = (
        [
            np.concatenate([part[i] for part in parts if part[2] == half]).astype(float)
            for i in (0, 1)
        ]
        for half in (0, 1)
    )
    x, test_x = (np.c_[inputs, np.ones(len(inputs))] for inputs in (x, test_x))
    shrink = np.diag([strength * (x[:, :-1] ** 2).sum(0).mean()] * (x.shape[1] - 1) + [0])
    weight = np.linalg.solve(x.T @ x + shrink, x.T @ y)
    return ((test_x @ weight - test_y) ** 2).mean(), test_y.var(0).mean()


def test_the_contextual_share_and_the_sentences_r2_are_those_of_a_linear_map_on_half_of_the_rows(
    teacher, data, states
):
    module = begun(make(teacher, states, objective=AttentionMaps()), data)
    metrics = validate(module, data)
    batches = list(data.val_dataloader())
    assert len(batches) > 2
    xs, ys, words, rows = [], [], [], {"x": [], "y": []}
    with torch.no_grad():
        for batch in batches:
            ours, theirs = (
                view_of(module.student.eval(), batch).padded(1).numpy(),
                states(batch, [3])[3].float().numpy(),
            )
            lengths = batch["attention_mask"].sum(1).tolist()
            xs.append(
                np.concatenate([row[:length] for row, length in zip(ours, lengths, strict=True)])
            )
            ys.append(theirs)
            below = view_of(teacher.model, batch).padded(-1).numpy()
            words.append(
                np.concatenate([row[:length] for row, length in zip(below, lengths, strict=True)])
            )
            ends = np.cumsum(lengths)
            rows["x"].append(
                np.stack(
                    [xs[-1][end - n : end].mean(0) for end, n in zip(ends, lengths, strict=True)]
                )
            )
            rows["y"].append(
                np.stack(
                    [theirs[end - n : end].mean(0) for end, n in zip(ends, lengths, strict=True)]
                )
            )
    mse, _ = half_and_half(xs, ys, 1e-2)
    table, itself = half_and_half(words, ys, 1e-2)[0], half_and_half(ys, ys, 1e-2)[0]
    share = 1 - (mse - itself) / (table - itself)
    assert metrics["val/contextual_share"] == pytest.approx(share, abs=2e-3)
    mse, variance = half_and_half(rows["x"], rows["y"], 0.03)
    assert metrics["val/sentence_r2"] == pytest.approx(1 - mse / variance, abs=2e-3)
    assert not any(name.startswith("teacher_layer_") for name in metrics)
    assert metrics["val/loss"] == pytest.approx(
        metrics["terms/attention_maps"]
    )  # where nothing else is asked


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("layer", "share"), [(-1, 0.0), (3, 1.0)])
def test_the_share_of_the_teacher_s_embedding_output_is_0_and_that_of_the_teacher_1(
    teacher, data, states, monkeypatch, precision, layer, share
):
    module = make(teacher, states, SHORT, objective=HiddenStates(LastLayer()))

    def teacher_s(batch: Batch) -> tuple[View, View]:
        theirs = states(batch, [3])
        ours = (
            theirs[3] if layer == 3 else embed(teacher.model, batch)[batch["attention_mask"].bool()]
        )
        return View(module.student, batch, real={2: ours.float()}), View(
            teacher.model, batch, real=theirs
        )

    monkeypatch.setattr(module, "views", teacher_s)
    fitted = trainer(precision=precision)
    fitted.validate(module, data, verbose=False)
    assert fitted.callback_metrics["val/contextual_share"].item() == share
    assert fitted.progress_bar_metrics["contextual_share"] == share


def test_the_loss_weighs_the_terms_and_scales_those_of_hidden_states_alone(teacher, data, states):
    module = begun(make(teacher, states, objective=SUM), data)
    metrics = validate(module, data)
    named = {term.name: metrics[f"terms/{term.name}"] for term in module.terms}
    assert len(named) == 5
    hidden = named.pop("student_1_teacher_3") / states.stats[3].held_out_variance
    assert named["attention_maps"] > 0
    named.pop(
        "attention_maps"
    )  # asked of the layers that a student happens to have: it does not rank students
    assert metrics["val/loss"] == pytest.approx((4 * hidden + sum(named.values())) / 6, rel=1e-5)
    assert (
        named["pair_comparison"] == 0
    )  # there are no pairs in these rows, so its weight does not count


def test_the_history_is_what_was_logged_and_begins_after_the_sanity_check(teacher, data, states):
    logged = []

    class Logged(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                logged.append(
                    {name: float(value) for name, value in trainer.callback_metrics.items()}
                )

    module = make(teacher, states, objective=HiddenStates(normalize=False))
    trainer(Logged(), num_epochs=2, num_sanity_val_steps=2).fit(module, datamodule=data)
    assert [list(row) for row in module.history] == [
        ["epoch", "loss", "contextual_share", "sentence_r2"]
    ] * 2
    for row, metrics in zip(module.history, logged, strict=True):
        for name in ("loss", "contextual_share", "sentence_r2"):
            assert row[name] == pytest.approx(metrics[f"val/{name}"], rel=1e-6)
        raw = [value for name, value in metrics.items() if name.startswith("terms/")]
        assert row["loss"] == pytest.approx(np.mean(raw), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_fails_the_candidate(teacher, data, states, value):
    module = make(teacher, states)
    module.criterion.projections[0].bias.data[5] = value  # of one pair alone
    with pytest.raises(CandidateFailed, match=f"the held-out loss is {value} after epoch 0"):
        trainer().validate(module, data, verbose=False)
    assert module.history == []


def test_an_objective_with_nothing_to_compare_is_refused_not_perfect(teacher, data, states):
    module = make(teacher, states, objective=PairComparison())  # these rows have no pairs
    with pytest.raises(
        UserError, match="have nothing that the loss can compare.*: give more text, or longer rows"
    ):
        trainer().validate(module, data, verbose=False)
    assert module.history == []


def test_a_loss_that_rises_is_remarked_with_the_epoch_that_was_better():
    history = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate([0.6, 0.523, 0.539])]
    assert (
        too_long(history) == " (the loss was 0.523 after epoch 2: give fewer epochs, or more text)"
    )
    assert (
        too_long(history[:2])
        == too_long(history[:1])
        == too_long([*history, {"epoch": 3, "loss": 0.527}])
        == ""
    )


def test_a_loader_without_a_data_module_is_refused(teacher, data):
    with pytest.raises(UserError, match=r"needs a KDDataModule: call trainer.fit"):
        trainer().fit(make(teacher, None), data.train_dataloader())


def test_the_states_are_opened_for_the_mapped_layers_alone(teacher, data, states_settings):
    module = HiddenStateDistillModule(
        teacher, NARROW, Recipe(objective=HiddenStates()), states_settings
    )
    trainer().validate(module, data, verbose=False)
    assert module.states.layers == [0, 2, 3]
    module = HiddenStateDistillModule(
        teacher, NARROW, Recipe(objective=AttentionMaps()), states_settings
    )
    trainer().validate(module, data, verbose=False)
    assert module.states.layers == [-1, 2, 3]


class Begun(Exception):
    pass


def test_mini_kd_full_kd_and_fit_build_the_same_module(
    tiny_teacher, text_file, tmp_path, monkeypatch
):
    seen: list[tuple[StudentArch, Recipe, list[float], dict[str, Tensor]]] = []

    def look(module: HiddenStateDistillModule) -> None:
        groups = [
            (group["initial_lr"], group.get("weight_decay", 0.0))
            for group in module.optimizers().param_groups
        ]
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        seen.append((module.arch, module.recipe, groups, weights))
        if len(seen) > 1:
            raise Begun

    monkeypatch.setattr(HiddenStateDistillModule, "on_fit_start", look)
    common = ["--data.max_length=24", f"--{{}}.folder={tmp_path / 'states'}"]
    objective = WeightedSum([HiddenStates(Even()), SUM], [1, 2])
    recipe = as_plain(Recipe(objective=objective, learning_rate=2e-3, copied_learning_rate=1e-4))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"model": {"recipe": recipe}}))
    options = {
        "teacher": tiny_teacher,
        "text": text_file,
        "root": tmp_path,
        "seed": 7,
        "search.n_trials": 1,
        "search.num_epochs": 1,
        "latency.length": 8,
        "latency.min_seconds": 0.01,
        "workers": 0,
    }
    run = [f"--{name}={value}" for name, value in options.items()] + [
        common[0],
        common[1].format("states"),
    ]
    run.append(f"--config={tmp_path / 'run.yaml'}")
    assert main(["run", *run]) != 0
    assert len(seen) == 2
    arch = seen[0][0]
    fit = [
        f"--model.teacher={tiny_teacher}",
        f"--data.text={text_file}",
        common[1].format("model.states"),
    ]
    fit += [f"--model.arch.{name}={value}" for name, value in arch.to_dict().items()]
    fit.append(f"--config={tmp_path / 'fit.yaml'}")
    fit += [
        "--seed_everything=7",
        "--data.max_length=24",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
    ]
    fit += [
        "--trainer.accelerator=cpu",
        "--trainer.enable_checkpointing=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    with pytest.raises(Begun):
        main(["fit", *fit])
    assert len(seen) == 3
    assert (
        isinstance(seen[0][1].objective.objectives[0].mapping, Even)
        and seen[0][1].learning_rate == 2e-3
    )
    for other in seen[1:]:
        assert other[0] == arch
        assert as_plain(other[1]) == as_plain(seen[0][1])
        assert other[2] == seen[0][2]
        assert other[3].keys() == seen[0][3].keys()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [0.0, -1e-3, math.inf, math.nan]),
        ("copied_learning_rate", [0.0, -1e-3, math.inf, math.nan]),
        ("matrix_learning_rate", [0.0, -1e-3, math.inf, math.nan]),
        ("copied_matrix_learning_rate", [0.0, -1e-3, math.inf, math.nan]),
        ("weight_decay", [-0.01, math.inf, math.nan]),
        ("warmup_share", [-0.1, 1.0, math.nan]),
    ],
)
def test_a_recipe_out_of_range_is_refused_with_its_value(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{name} is {value}: "):
            Recipe(**{name: value})


def test_the_ends_of_a_recipe_s_ranges_are_accepted():
    Recipe(weight_decay=0, warmup_share=0)
    Recipe(warmup_share=0.999)
