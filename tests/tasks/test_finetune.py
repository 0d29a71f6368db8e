import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    TrainingArguments,
)

from kdnas.models.encoders import load_classifier, num_parameters
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.jobs import Stopped
from kdnas.tasks import finetune
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.finetune import (
    FinetuneSettings,
    GLUEModule,
    evaluate_glue,
    usual_learning_rate,
)
from kdnas.tasks.task_distill import TaskDistillModule
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.optimizers import clip_norm
from kdnas.training.trainer import TrainerSettings
from tests.conftest import CONFIGS, make_rows, make_tokenizer, save_teacher

SETTINGS = FinetuneSettings(num_epochs=2, learning_rate=1e-3, batch_size=16, max_length=32)
LONGER = FinetuneSettings(num_epochs=4, learning_rate=1e-3, batch_size=8, max_length=32)


def write_learnable(folder: Path, num_rows: int = 64, kind: str = "single") -> LoadedTask:
    """A task that its first and last word decide: ``river`` or ``stone``."""
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "validation")):
        texts = []
        for row, text in enumerate(make_rows(num_rows, seed)):
            word = ("river", "stone")[row % 2]
            texts.append(" ".join([word, *text.split()[: row % 3 + 1], word]))
        label = [row % 2 for row in range(num_rows)]
        columns = {"sentence": texts}
        if kind != "single":
            columns = {
                "sentence1": texts,
                "sentence2": make_rows(num_rows, seed=seed + 2, longest=10),
            }
        if kind == "regression":
            label = [4.5 * i for i in label]
        pq.write_table(pa.table({**columns, "label": label}), folder / f"{split}.parquet")
    return load_task(str(folder))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT teacher, near enough to linear to learn in seconds."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "bert", initializer_range=0.1)


@pytest.fixture
def task(tmp_path) -> LoadedTask:
    return write_learnable(tmp_path / "words")


def classifier(source: Path, num_labels: int = 2):
    torch.manual_seed(0)
    return load_classifier(source, num_labels)


def evaluate(
    model,
    task: LoadedTask,
    folder: Path,
    settings: FinetuneSettings = SETTINGS,
    precision="32-true",
    callbacks=(),
) -> dict:
    trainer_settings = TrainerSettings("cpu", precision=precision)
    return evaluate_glue(
        model,
        make_tokenizer(),
        task,
        settings,
        folder=folder,
        trainer_settings=trainer_settings,
        callbacks=callbacks,
    )


def trainer(*callbacks: pl.Callback, **arguments) -> pl.Trainer:
    defaults = dict(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    defaults |= dict(enable_model_summary=False, num_sanity_val_steps=0)
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def data_module(task: LoadedTask) -> GLUEDataModule:
    return GLUEDataModule(task, make_tokenizer(), batch_size=16, max_length=32)


def test_a_result_has_everything_and_is_written_last(teacher, task, tmp_path):
    model = classifier(teacher)
    result = evaluate(model, task, tmp_path / "run" / "teacher")
    folder = tmp_path / "run" / "teacher"
    assert json.loads((folder / "result.json").read_text()) == result
    names = "task task_sha256 score metrics num_parameters megabytes seconds history settings precision "
    names += "gradient_clip_val trained_in"
    assert sorted(result) == sorted(names.split())
    assert result["task"] == "words"
    assert (result["precision"], result["trained_in"]) == ("32-true", "32-true")
    assert result["metrics"] == {"accuracy": result["score"]}
    assert [row["epoch"] for row in result["history"]] == [0, 1]
    assert result["num_parameters"] == num_parameters(model)
    size = (folder / "model" / "model.safetensors").stat().st_size
    assert result["megabytes"] * 1e6 == pytest.approx(size, rel=0.05)  # but for the file's names
    assert result["seconds"] > 0
    assert FinetuneSettings(**result["settings"]) == SETTINGS
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert not list(folder.rglob("*.ckpt")) and not model.training


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_task_is_learned(task, tmp_path, family, precision):
    teacher = save_teacher(tmp_path / "teacher", family, initializer_range=0.1)
    model, dtypes = classifier(teacher), set()
    model.register_forward_hook(lambda module, inputs, outputs: dtypes.add(outputs.logits.dtype))
    assert evaluate(model, task, tmp_path / "run", LONGER, precision)["score"] > 0.9
    assert dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}


@pytest.mark.parametrize(
    "name, kind, num_labels, metrics",
    [("mrpc", "pair", 2, ["accuracy", "f1"]), ("stsb", "regression", 1, ["pearson", "spearman"])],
)
def test_pairs_and_regressions_are_learned_and_scored_by_the_mean_of_their_metrics(
    teacher, tmp_path, name, kind, num_labels, metrics
):
    task = write_learnable(tmp_path / name, kind=kind)
    result = evaluate(classifier(teacher, num_labels), task, tmp_path / "run", LONGER)
    assert list(result["metrics"]) == metrics
    assert result["score"] == pytest.approx(sum(result["metrics"].values()) / 2)
    assert result["score"] > 0.8


def test_the_saved_folder_loads_without_kdnas_and_scores_the_same(teacher, tmp_path):
    task = write_learnable(tmp_path / "rte", kind="pair")
    result = evaluate(classifier(teacher), task, tmp_path / "run", LONGER)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    rows = task.validation
    inputs = tokenizer(
        rows["sentence1"], rows["sentence2"], padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        right = model(**inputs).logits.argmax(-1) == torch.tensor(rows["label"])
    assert right.float().mean().item() == pytest.approx(result["score"], abs=1e-6)
    assert result["score"] > 0.9
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert model.config.label2id == {"entailment": 0, "not_entailment": 1}


def test_a_finished_fine_tuning_is_answered_from_the_record(teacher, task, tmp_path):
    first = evaluate(classifier(teacher), task, tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    model = classifier(teacher)
    before = [parameter.clone() for parameter in model.parameters()]
    assert evaluate(model, task, tmp_path / "run") == first
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("finetune", "trainer_settings", "message"),
    [
        ({"num_epochs": 3}, {}, "num_epochs: 2 there, 3 now"),
        ({}, {"precision": "bf16-mixed"}, "precision: '32-true' there, 'bf16-mixed' now"),
        ({}, {"gradient_clip_val": 0.0}, "gradient_clip_val: 1.0 there, 0.0 now"),
    ],
)
def test_a_record_of_other_settings_is_refused(
    teacher, task, tmp_path, finetune, trainer_settings, message
):
    evaluate(classifier(teacher), task, tmp_path / "run")
    with pytest.raises(UserError, match=f"{message}.: go back to them, or give a new run name"):
        evaluate_glue(
            classifier(teacher),
            make_tokenizer(),
            task,
            dataclasses.replace(SETTINGS, **finetune),
            folder=tmp_path / "run",
            trainer_settings=TrainerSettings("cpu", **{"precision": "32-true"} | trainer_settings),
        )


def test_a_record_of_other_rows_is_refused(teacher, task, tmp_path):
    evaluate(classifier(teacher), task, tmp_path / "run")
    other = write_learnable(tmp_path / "more" / "words", num_rows=32)
    with pytest.raises(UserError, match="task_sha256: "):
        evaluate(classifier(teacher), other, tmp_path / "run")


def test_a_model_is_kept_only_where_it_is_wanted(teacher, task, tmp_path):
    evaluate_glue(
        classifier(teacher),
        make_tokenizer(),
        task,
        SETTINGS,
        folder=tmp_path / "run",
        keep_model=False,
    )
    assert (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "model").exists()


def test_mnli_has_both_scores_and_their_mean(teacher, tmp_path):
    folder = tmp_path / "mnli"
    folder.mkdir()
    words = ("river", "stone", "light")
    for seed, split in enumerate(("train", "validation_matched", "validation_mismatched")):
        wrong = seed == 2  # every label of the mismatched rows is another class's
        label = [(row + wrong) % 3 for row in range(60)]
        premise = [f"{words[row % 3]} {words[row % 3]}" for row in range(60)]
        columns = {"premise": premise, "hypothesis": make_rows(60, seed, 6), "label": label}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    result = evaluate(classifier(teacher, 3), load_task(str(folder)), tmp_path / "run", LONGER)
    assert list(result["metrics"]) == ["accuracy_matched", "accuracy_mismatched"]
    matched, mismatched = result["metrics"].values()
    assert matched > 0.9 and mismatched < 0.1
    assert result["score"] == pytest.approx((matched + mismatched) / 2)


# run_glue.py leaves all of it to TrainingArguments.
RUN_GLUE = SimpleNamespace(
    **{field.name: field.default for field in dataclasses.fields(TrainingArguments)}
)


def test_a_class_has_no_name_that_was_the_teacher_s_of_another_task(teacher, task, tmp_path):
    model = classifier(teacher)
    model.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    evaluate(model, task, tmp_path / "run")
    saved = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert saved.id2label == {0: "LABEL_0", 1: "LABEL_1"} and saved.label2id == {
        "LABEL_0": 0,
        "LABEL_1": 1,
    }


def test_the_defaults_are_those_of_run_glue_but_for_batches_rates_and_epochs():
    arguments = RUN_GLUE
    settings = FinetuneSettings()
    assert settings.weight_decay == arguments.weight_decay
    assert arguments.lr_scheduler_type == "linear"
    assert settings.max_length == 128  # the script's own
    assert TrainerSettings().gradient_clip_val == arguments.max_grad_norm


@pytest.mark.parametrize(
    ("hidden_size", "num_hidden_layers", "rate"),
    [(768, 12, 5e-5), (384, 6, 1.414e-4), (192, 4, 3.464e-4), (384, 3, 2e-4)],
)
def test_the_usual_rate_goes_by_the_size_of_a_model(hidden_size, num_hidden_layers, rate):
    config = BertConfig(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    assert usual_learning_rate(config) == pytest.approx(rate, rel=1e-3)
    assert usual_learning_rate(config) == usual_learning_rate(
        DistilBertConfig(dim=hidden_size, n_layers=num_hidden_layers)
    )


def test_without_a_rate_a_model_learns_at_the_usual_one_and_the_result_has_it(
    teacher, task, tmp_path
):
    settings = dataclasses.replace(SETTINGS, learning_rate=None, num_epochs=1, warmup_share=0.0)
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    result = evaluate(classifier(teacher), task, tmp_path, settings, callbacks=[Rates()])
    usual = usual_learning_rate(AutoConfig.from_pretrained(teacher))
    assert rates[0] == usual == result["settings"]["learning_rate"]


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs"),
    [(67_349, 32, 3), (5_749, 32, 4), (3_000, 32, 7), (3_000, 64, 10), (48, 16, 10)],
)
def test_the_usual_number_of_epochs_goes_by_the_rows_of_a_task(num_rows, batch_size, epochs):
    assert FinetuneSettings(batch_size=batch_size).epochs_for(num_rows) == epochs
    assert FinetuneSettings(num_epochs=2, batch_size=batch_size).epochs_for(num_rows) == 2


def test_without_a_number_of_epochs_it_is_the_usual_one_and_the_result_has_it(
    teacher, task, tmp_path
):
    settings = dataclasses.replace(SETTINGS, num_epochs=None)
    result = evaluate(classifier(teacher), task, tmp_path, settings)
    usual = settings.epochs_for(len(task.train["label"]))
    assert len(result["history"]) == usual == result["settings"]["num_epochs"]


def test_the_optimizer_is_transformers_own(teacher, task):
    arguments = RUN_GLUE
    fit = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(GLUEModule(classifier(teacher), task.task), data_module(task))
    optimizer, by_rows = fit.optimizers[0].parts
    assert type(optimizer) is torch.optim.AdamW and "adamw_torch" in arguments.optim
    assert type(by_rows) is torch.optim.SparseAdam, "of the table of words"
    assert optimizer.defaults["betas"] == (arguments.adam_beta1, arguments.adam_beta2)
    assert optimizer.defaults["eps"] == arguments.adam_epsilon


def test_the_score_is_the_last_epochs_not_the_best(teacher, task, tmp_path, monkeypatch):
    class Worsening(GLUEModule):
        def on_validation_epoch_end(self) -> None:
            self.log_dict(
                dict.fromkeys(["val/accuracy", "val/score"], 0.75 - 0.5 * self.current_epoch)
            )

    monkeypatch.setattr(finetune, "GLUEModule", Worsening)
    result = evaluate(classifier(teacher), task, tmp_path / "run")
    assert result["history"] == [{"epoch": 0, "score": 0.75}, {"epoch": 1, "score": 0.25}]
    assert result["score"] == 0.25 and result["metrics"] == {"accuracy": 0.25}


def test_a_seed_decides_all_and_the_callers_random_numbers_are_left_alone(teacher, task, tmp_path):
    def run(name: str, seed: int) -> tuple[list, list]:
        model, rows = classifier(teacher), []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        settings = FinetuneSettings(
            num_epochs=1, learning_rate=1e-3, batch_size=32, max_length=32, seed=seed
        )
        torch.rand(len(name))
        state = torch.get_rng_state()
        evaluate(model, task, tmp_path / name, settings)
        assert torch.equal(state, torch.get_rng_state())
        return rows[0], model.classifier.weight.tolist()

    (rows, weights), (same_rows, same_weights), (other_rows, _) = (
        run("a", 3),
        run("again", 3),
        run("other", 4),
    )
    assert rows == same_rows and weights == same_weights
    assert rows != other_rows


class Modes(pl.Callback):
    """Whether dropout is on, at every step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bool]] = {"train": [], "val": []}

    def _note(self, name: str, module: pl.LightningModule) -> None:
        self.seen[name] += [
            part.training for part in module.modules() if isinstance(part, nn.Dropout)
        ]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._note("train", pl_module)

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._note("val", pl_module)


def test_dropout_is_on_in_training_and_off_in_validation(teacher, task):
    modes = Modes()
    module = GLUEModule(classifier(teacher).eval(), task.task, SETTINGS)
    # With the sanity check, whose eval mode must not stay.
    trainer(modes, max_epochs=2, num_sanity_val_steps=1).fit(module, data_module(task))
    assert len(modes.seen["train"]) > 8 and all(modes.seen["train"])
    assert len(modes.seen["val"]) > 8 and not any(modes.seen["val"])


class Steps(pl.Callback):
    """Learning rate, loss, rows and gradient norms of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.rows: list[list[list[int]]] = []
        self.norms: list[float] = []
        self.clipped: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.rows.append(batch["input_ids"].tolist())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.norms.append(self._norm(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.clipped.append(self._norm(pl_module))

    @staticmethod
    def _norm(module: nn.Module) -> float:
        return float(clip_norm(module.parameters(), math.inf))


def test_the_loss_falls_and_the_learning_rate_rises_and_falls_by_step(teacher, task):
    steps = Steps()
    settings = FinetuneSettings(learning_rate=1e-3, warmup_share=0.25)
    trainer(steps, max_epochs=5).fit(
        GLUEModule(classifier(teacher), task.task, settings), data_module(task)
    )
    assert len(steps.losses) == 20
    assert sum(steps.losses[-4:]) < 0.5 * sum(steps.losses[:4])
    rise, fall = [i / 5 for i in range(5)], [(20 - i) / 15 for i in range(5, 20)]
    assert steps.rates == pytest.approx([1e-3 * share for share in rise + fall])


def test_each_epoch_has_another_order(teacher, task):
    steps = Steps()
    trainer(steps, max_epochs=2).fit(
        GLUEModule(classifier(teacher), task.task, SETTINGS), data_module(task)
    )
    assert steps.rows[:4] != steps.rows[4:]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_by_norm_in_every_precision(teacher, task, precision):
    steps = Steps()
    module = GLUEModule(classifier(teacher), task.task, SETTINGS)
    trainer(steps, max_epochs=1, gradient_clip_val=0.01, precision=precision).fit(
        module, data_module(task)
    )
    assert min(steps.norms) > 0.02
    assert steps.clipped == pytest.approx([0.01] * 4, rel=1e-3)


def test_evaluation_clips_gradients_to_a_norm_of_1(teacher, task, tmp_path, monkeypatch):
    clips = []
    monkeypatch.setattr(
        "kdnas.training.trainer.clip_norm",
        lambda parameters, norm: clips.append(norm) or torch.zeros(()),
    )
    evaluate(classifier(teacher), task, tmp_path / "run")
    assert clips == [1.0] * 8


def test_weight_decay_is_on_matrices_only(teacher, task):
    model = classifier(teacher)
    module = GLUEModule(model, task.task, FinetuneSettings(weight_decay=0.1))
    fit = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(module, data_module(task))
    decay = {
        id(p): group.get("weight_decay", 0.0)
        for group in fit.optimizers[0].param_groups
        for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_free = name.endswith("bias") or "LayerNorm" in name or "word_embeddings" in name
        assert decay[id(parameter)] == (0.0 if is_free else 0.1), name


@pytest.mark.parametrize("num_labels", [1, 2])
def test_losses_and_metrics_are_those_computed_by_hand(teacher, tmp_path, num_labels):
    name, kind = ("stsb", "regression") if num_labels == 1 else ("mrpc", "pair")
    task = write_learnable(tmp_path / name, num_rows=22, kind=kind)
    model = classifier(teacher, num_labels)
    (logged,) = trainer().validate(GLUEModule(model, task.task), data_module(task), verbose=False)
    rows = task.validation
    labels = torch.tensor(rows["label"])
    with torch.no_grad():
        logits = model(
            **make_tokenizer()(
                rows["sentence1"], rows["sentence2"], padding=True, return_tensors="pt"
            )
        ).logits
    if num_labels == 1:
        expected = ((logits[:, 0] - labels) ** 2).mean()
        assert set(logged) == {"val/loss", "val/pearson", "val/spearman", "val/score"}
    else:
        expected = -(logits[range(22), labels] - logits.logsumexp(1)).mean()
        assert set(logged) == {"val/loss", "val/accuracy", "val/f1", "val/score"}
        assert logged["val/accuracy"] == pytest.approx(
            (logits.argmax(1) == labels).float().mean().item()
        )
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_more_callbacks_see_every_step(teacher, task, tmp_path):
    steps = Steps()
    evaluate(classifier(teacher), task, tmp_path / "run", callbacks=[steps])
    assert len(steps.losses) == 8


def raise_at_call(
    model: nn.Module, number: int, error: BaseException
) -> torch.utils.hooks.RemovableHandle:
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == number:
            raise error

    return model.register_forward_pre_hook(hook)


def test_what_fails_before_its_first_checkpoint_starts_afresh(teacher, task, tmp_path):
    model = classifier(teacher)
    raise_at_call(model, 2, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        evaluate(model, task, tmp_path / "run")
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"result.json", "model"}
    evaluate(classifier(teacher), task, tmp_path / "run")
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_a_loss_that_is_not_finite_fails_with_its_reason(teacher, task, tmp_path):
    model = classifier(teacher)
    nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(CandidateFailed, match="The training loss of task 'words' is nan at step 0"):
        evaluate(model, task, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_loss_that_is_not_finite_in_validation_alone_fails_too(teacher, task, tmp_path):
    def spoil(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return output if module.training else output * float("inf")

    model = classifier(teacher)
    model.classifier.register_forward_hook(spoil)
    with pytest.raises(
        CandidateFailed, match="The training loss of task 'words' is (nan|inf) at step 4"
    ):
        evaluate(model, task, tmp_path / "run")


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", 1.0),
        ("learning_rate", float("nan")),
        ("batch_size", 0),
        ("max_length", 7),
        ("warmup_share", -0.1),
        ("warmup_share", 1.0),
        ("weight_decay", -0.01),
        ("weight_decay", float("nan")),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        FinetuneSettings(**{name: value})


def test_the_least_settings_are_taken():
    FinetuneSettings(
        num_epochs=1, batch_size=1, max_length=8, warmup_share=0.0, weight_decay=0.0, seed=0
    )


def test_more_tokens_than_the_model_takes_are_refused_at_the_start(tmp_path, task):
    model = classifier(save_teacher(tmp_path / "teacher"))
    with pytest.raises(
        UserError, match="max_length is 128, but this model takes at most 40 tokens"
    ):
        evaluate(model, task, tmp_path / "run", FinetuneSettings())
    evaluate(model, task, tmp_path / "run", SETTINGS)  # nothing was written down of the first try


class StopsAt(pl.Callback):
    """Asks the job to stop in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            (Path(trainer.log_dir) / "stop").touch()


@pytest.mark.parametrize("helped", [False, True], ids=["alone", "with a teacher"])
def test_what_was_stopped_goes_on_in_the_middle_of_an_epoch_and_ends_as_what_was_not(
    teacher, task, tmp_path, helped
):
    distiller = partial(TaskDistillModule, teacher=classifier(teacher).eval()) if helped else None

    def tune(folder: Path, settings: FinetuneSettings = LONGER, **options):
        start = classifier(teacher)
        make = partial(
            evaluate_glue, start, make_tokenizer(), task, settings, make_module=distiller
        )
        return make(folder=tmp_path / folder, **options), start.state_dict()

    result, whole = tune("whole")
    with pytest.raises(Stopped):
        tune("stopped", callbacks=[StopsAt(19)])  # the fourth step of the third epoch
    (tmp_path / "stopped" / "stop").unlink()
    with pytest.raises(UserError, match="learning_rate: 0.001 there, 0.5 now"):
        tune("stopped", dataclasses.replace(LONGER, learning_rate=0.5))
    again, resumed = tune("stopped")
    assert [row["epoch"] for row in again["history"]] == [0, 1, 2, 3]
    assert again["history"] == result["history"]
    for name, values in whole.items():
        assert torch.equal(values, resumed[name]), name
    assert not (tmp_path / "stopped" / "last.ckpt").exists()


@pytest.mark.parametrize("last_call", ["new_folder", "write_json"])
def test_what_was_stopped_at_its_very_end_is_not_trained_again(
    teacher, task, tmp_path, monkeypatch, last_call
):
    def stop(*_):
        raise KeyboardInterrupt

    result = evaluate(classifier(teacher), task, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetune, last_call, stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(classifier(teacher), task, tmp_path / "run")
    steps = Steps()
    again = evaluate(classifier(teacher), task, tmp_path / "run", callbacks=[steps])
    assert steps.losses == []
    assert {name: again[name] for name in ("metrics", "history")} == {
        name: result[name] for name in ("metrics", "history")
    }
    assert not (tmp_path / "run" / "last.ckpt").exists()
