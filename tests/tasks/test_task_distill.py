import math
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import processors

from kdnas.models.encoders import Teacher, build_classifier, load_classifier
from kdnas.system.errors import UserError
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.finetune import FinetuneSettings, GLUEModule, classify, evaluate_glue
from kdnas.tasks.task_distill import (
    TaskDistillModule,
    TaskDistillSettings,
    hidden_loss,
    load_task_teacher,
    soft_loss,
    task_loss,
)
from kdnas.tasks.tasks import TASKS, load_task
from kdnas.training.trainer import TrainerSettings
from tests.conftest import make_config, make_tokenizer, save_teacher, write_task

STUDENT = Teacher("a student", "", make_config(), make_tokenizer())


def test_soft_loss_by_hand():
    # T = 2: the teacher has 3/4 and 1/4, the student halves; the other row agrees.
    teacher = torch.tensor([[2 * math.log(3), 0.0], [1.0, 5.0]])
    student = torch.tensor([[7.0, 7.0], [0.0, 4.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(4 * divergence / 2, rel=1e-6)
    assert soft_loss(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_soft_loss_of_a_regression_is_the_mean_squared_error():
    assert soft_loss(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0]), 2.0).item() == 2.0


def test_hidden_loss_by_hand_with_padding():
    teacher = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [99.0, 99.0]]])
    student = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [-5.0, 0.0]]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    # Errors 0.5 and 0 over dimensions; around the mean (2, 0) the teacher's tokens have 0.5 each.
    loss = hidden_loss(student, teacher, mask)
    assert loss.item() == pytest.approx(0.5 / 1.0)
    loss.backward()
    assert student.grad is not None and student.grad[0, 2].tolist() == [0.0, 0.0]
    assert (
        hidden_loss(torch.full_like(teacher, 2.0) * torch.tensor([1.0, 0.0]), teacher, mask).item()
        == 1.0
    )


def test_task_loss_by_hand():
    settings = TaskDistillSettings(soft_weight=0.25, hidden_weight=2.0)
    assert (
        task_loss(torch.tensor(4.0), torch.tensor(8.0), torch.tensor(0.5), settings).item()
        == 3.0 + 2.0 + 1.0
    )


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\), .* \(2, 1\): give both the same shape"):
        soft_loss(torch.zeros(2, 3), torch.zeros(2, 1), 2.0)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 1\)"):
        hidden_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 1), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("soft_weight", 1.5),
        ("hidden_weight", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"distill.{name} is {value}"):
        TaskDistillSettings(**{name: value})


def save_classifier(folder: Path, num_labels: int = 2, **overrides: object) -> Path:
    save_teacher(folder, **overrides)
    model = load_classifier(folder, num_labels)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def student(tmp_path):
    folder = save_teacher(tmp_path / "student", hidden_size=32, num_hidden_layers=2)
    return load_classifier(folder, 2)


def fit(
    module: GLUEModule, data: GLUEDataModule, num_epochs: int, *callbacks: pl.Callback
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=num_epochs,
    )
    trainer.fit(module, data)
    return trainer


def test_a_student_comes_nearer_to_its_teachers_answers_and_states(tmp_path, student):
    task = load_task(str(write_task(tmp_path / "rte", ("sentence1", "sentence2"), num_rows=40)))
    teacher = load_task_teacher(str(save_classifier(tmp_path / "teacher")), task.task, STUDENT)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    data = GLUEDataModule(task, make_tokenizer(), batch_size=8, max_length=30)
    settings = FinetuneSettings(learning_rate=3e-3, batch_size=8, warmup_share=0.0)
    module = TaskDistillModule(
        student,
        task.task,
        settings,
        teacher,
        TaskDistillSettings(soft_weight=1.0, hidden_weight=1.0),
    )
    assert not any("teacher" in name for name in module.state_dict())
    assert len(list(module.parameters())) == len(list(student.parameters())) + 2

    class Parts(pl.Callback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.eval()
            batch = next(iter(data.train_dataloader()))
            states = [
                model(
                    **{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True
                ).hidden_states[-1]
                for model in (student, teacher)
            ]
            self.start = hidden_loss(
                pl_module.projection(states[0]), states[1], batch["attention_mask"].bool()
            ).item()
            pl_module.train()

        def on_train_batch_end(self, trainer, *args) -> None:
            self.rows.append(
                {name: float(value) for name, value in trainer.callback_metrics.items()}
            )

    parts = Parts()
    fit(module, data, 8, parts)
    rows = parts.rows
    assert {"train/loss", "train/label", "train/soft", "train/hidden"} <= set(rows[0])
    assert parts.start < 0.95, "the projection begins as the best map, not at random"
    for name in ("train/soft", "train/hidden"):
        assert sum(row[name] for row in rows[-5:]) < 0.8 * sum(row[name] for row in rows[:5])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_a_regression_has_a_teacher_too(tmp_path):
    task = load_task(str(write_task(tmp_path / "stsb", ("sentence1", "sentence2"), [0.5, 4.0])))
    teacher = load_task_teacher(str(save_classifier(tmp_path / "teacher", 1)), task.task, STUDENT)
    student = build_classifier(teacher.config, 1)

    def make_module(*given):
        return TaskDistillModule(*given, teacher=teacher)

    result = evaluate_glue(
        student,
        make_tokenizer(),
        task,
        FinetuneSettings(num_epochs=1, max_length=32),
        folder=tmp_path / "run",
        trainer_settings=TrainerSettings("cpu"),
        make_module=make_module,
    )
    assert set(result["metrics"]) == {"pearson", "spearman"}
    saved = load_classifier(tmp_path / "run" / "model", 1)
    assert not any("projection" in name for name in saved.state_dict())


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    rte = TASKS["rte"]
    with pytest.raises(UserError, match="bare' is not fine-tuned: it has no head for 'rte'"):
        load_task_teacher(str(save_teacher(tmp_path / "bare")), rte, STUDENT)
    with pytest.raises(UserError, match="three' has 3 outputs, and 'rte' needs 2"):
        load_task_teacher(str(save_classifier(tmp_path / "three", 3)), rte, STUDENT)
    names = save_classifier(tmp_path / "names")
    model = load_classifier(names, 2)
    model.config.id2label = {0: "not_entailment", 1: "entailment"}
    model.save_pretrained(names)
    with pytest.raises(
        UserError,
        match="has the classes not_entailment, entailment, and 'rte' has entailment, not_",
    ):
        load_task_teacher(str(names), rte, STUDENT)
    model.config.id2label = {0: "NOT-ENTAILMENT", 1: "Entailment"}
    model.save_pretrained(names)
    with pytest.raises(
        UserError,
        match="has the classes NOT-ENTAILMENT, Entailment, and 'rte' has entailment, not_",
    ):
        load_task_teacher(str(names), rte, STUDENT)
    model.config.id2label, model.config.problem_type = (
        {1: "entailment", 2: "not_entailment"},
        "single_label_classification",
    )
    model.save_pretrained(names)
    assert load_task_teacher(str(names), rte, STUDENT).config.num_labels == 2  # some count from 1
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(names)
    with pytest.raises(
        UserError, match="names' predicts several labels at once: give a classifier that"
    ):
        load_task_teacher(str(names), rte, STUDENT)
    other = make_tokenizer()
    other.add_tokens(["unheard"])
    with pytest.raises(
        UserError,
        match="'a student' reads text differently from its teacher .*fits': its tokenizer has other tokens",
    ):
        load_task_teacher(
            str(save_classifier(tmp_path / "fits")), rte, replace(STUDENT, tokenizer=other)
        )
    assert load_task_teacher(str(tmp_path / "fits"), rte, STUDENT).config.num_labels == 2


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (["ENTAILMENT", "not entailment"], ""),
        (["LABEL_0", "LABEL_1"], ""),
        (
            ["yes", "no"],
            "(yes, no) have other names than entailment, not_entailment of 'rte': they are matched",
        ),
    ],
)
def test_a_teacher_s_own_names_of_the_classes_are_told(tmp_path, caplog, names, warning):
    folder = save_classifier(tmp_path / "teacher")
    model = load_classifier(folder, 2)
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(folder)
    load_task_teacher(str(folder), TASKS["rte"], STUDENT)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("kdnas")]
    assert len(told) == bool(warning) and all(warning in line for line in told)


def test_a_teacher_sees_the_second_sentence_where_its_student_has_no_mark_for_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    assert "token_type_ids" not in tokenizer.model_input_names
    task = load_task(str(write_task(tmp_path / "rte", ("sentence1", "sentence2"), num_rows=16)))
    data = GLUEDataModule(task, tokenizer, batch_size=8, max_length=30)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    marks = batch["token_type_ids"]
    assert set(marks.flatten().tolist()) == {0, 1}
    teacher = load_task_teacher(str(save_classifier(tmp_path / "teacher")), task.task, STUDENT)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answer = classify(teacher, batch).logits
    assert torch.equal(answer, teacher(**inputs, token_type_ids=marks).logits)
    assert not torch.allclose(answer, teacher(**inputs).logits)
    student = load_classifier(save_teacher(tmp_path / "student", "distilbert"), 2).eval()
    assert torch.equal(classify(student, batch).logits, student(**inputs).logits)
