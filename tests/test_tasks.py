import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows, make_tokenizer
from scipy import stats
from sklearn import metrics as sk

from kdnas.errors import UserError
from kdnas.glue.tasks import TASKS, GLUEDataModule, LengthGroupedSampler, LoadedTask, Task, load_task, make_metrics


def write_task(folder: Path, columns=("sentence",), labels=(0, 1), num_rows=20, validation="validation") -> Path:
    """A task with random sentences, its labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", validation)):
        texts = {name: make_rows(num_rows, seed=10 * seed + i, longest=12) for i, name in enumerate(columns)}
        table = pa.table({**texts, "label": [labels[row % len(labels)] for row in range(num_rows)]})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def write_table(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


# Columns, labels and metrics as on the hub (nyu-mll/glue) and in GLUE's table 1.
GLUE = {
    "cola": (("sentence",), 2, ("matthews",)),
    "sst2": (("sentence",), 2, ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "stsb": (("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), 2, ("accuracy", "f1")),
    "mnli": (("premise", "hypothesis"), 3, ("accuracy",)),
    "qnli": (("question", "sentence"), 2, ("accuracy",)),
    "rte": (("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), 2, ("accuracy",)),
}


def test_the_table_holds_the_nine_tasks_of_glue():
    assert len(TASKS) == 9
    assert {name: (task.columns, task.num_labels, task.metrics) for name, task in TASKS.items()} == GLUE
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.label_names) == (0 if task.num_labels == 1 else task.num_labels)


@pytest.mark.parametrize("name", GLUE)
def test_a_folder_of_a_glue_name_has_its_columns_labels_and_batches(tmp_path, name):
    columns, num_labels, metrics = GLUE[name]
    labels = [0.5, 4.0, 2.5] if num_labels == 1 else range(num_labels)
    loaded = load_task(str(write_task(tmp_path / name, columns, labels)))
    assert loaded.task == TASKS[name]
    assert set(loaded.train) == set(loaded.validation) == {*columns, "label"}
    data = GLUEDataModule(loaded, make_tokenizer(), batch_size=20, max_length=30)
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == sorted(loaded.train["label"])
    assert batch["labels"].is_floating_point() == (num_labels == 1)
    separators = (batch["input_ids"] == make_tokenizer().sep_token_id).sum(1)
    assert separators.tolist() == [len(columns)] * 20
    values = make_metrics(loaded.task)(batch["labels"], batch["labels"])
    assert {key: round(float(value), 6) for key, value in values.items()} == dict.fromkeys(metrics, 1.0)


def oracle(name: str, preds: np.ndarray, targets: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "pearson":
            return float(np.nan_to_num(stats.pearsonr(preds, targets)[0]))
        if name == "spearman":
            return float(np.nan_to_num(stats.spearmanr(preds, targets)[0]))
        score = {"accuracy": sk.accuracy_score, "f1": sk.f1_score, "matthews": sk.matthews_corrcoef}[name]
        return float(score(targets, preds))


def by_batches(task: Task, preds: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    collection = make_metrics(task)
    for part in torch.arange(len(preds)).split(32):
        collection.update(preds[part], targets[part])
    return {name: float(value) for name, value in collection.compute().items()}


def class_ids(num_labels: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    targets = torch.randint(num_labels, (301,)) * (torch.rand(301) > 0.5)
    preds = torch.where(torch.rand(301) > 0.3, targets, torch.randint(num_labels, (301,)))
    last = torch.full_like(targets, num_labels - 1)
    return {
        "usual": (preds, targets),
        "all right": (targets, targets),
        "constant 0": (last * 0, targets),
        "constant last": (last, targets),
        "one class, constant": (last, last),
        "one class of targets": (preds, last),
        "all wrong": ((targets + 1) % num_labels, targets),
    }


@pytest.mark.parametrize("case", class_ids(2))
@pytest.mark.parametrize("name", ["cola", "mrpc", "mnli"])
def test_metrics_of_classes_equal_scikit_learn(name, case):
    preds, targets = class_ids(TASKS[name].num_labels)[case]
    values = by_batches(TASKS[name], preds, targets)
    assert values == {key: pytest.approx(oracle(key, preds.numpy(), targets.numpy()), abs=1e-6) for key in values}


def numbers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    targets = (torch.rand(301) * 25).round() / 5
    preds = targets + torch.randn(301)
    return {
        "usual": (preds, targets),
        "ties": (preds.round(), targets),
        "bfloat16": (preds.bfloat16(), targets),
        "barely varying": (preds * 1e-4 + 300, targets),
        "constant predictions": (torch.full_like(preds, 0.1), targets),
        "constant targets": (preds, torch.full_like(preds, 2.5)),
        "one row": (preds[:1], targets[:1]),
        "reversed": (-targets, targets),
    }


@pytest.mark.parametrize("case", numbers())
def test_metrics_of_a_regression_equal_scipy_and_are_0_where_undefined(case):
    preds, targets = numbers()[case]
    values = by_batches(TASKS["stsb"], preds, targets)
    expected = {"pearson": 0.0, "spearman": 0.0}
    if case != "one row":  # scipy refuses one
        expected = {key: oracle(key, preds.double().numpy(), targets.double().numpy()) for key in values}
    assert values == {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()}


@pytest.mark.parametrize("columns", [("sentence",), ("text",), ("sentence1", "sentence2")])
def test_another_folder_is_a_classification_with_as_many_labels_as_its_training_rows_have(tmp_path, columns):
    loaded = load_task(str(write_task(tmp_path / "packages", columns, labels=[2, 0, 4, 1, 3])))
    assert loaded.task == Task("packages", columns, num_labels=5, metrics=("accuracy",))
    assert loaded.train["label"][:5] == [2, 0, 4, 1, 3]
    assert loaded.validation[columns[0]] == make_rows(20, seed=10, longest=12)


def test_mnli_is_scored_on_its_matched_rows(tmp_path):
    folder = write_task(tmp_path / "mnli", ("premise", "hypothesis"), range(3), validation="validation_matched")
    matched = load_task(str(folder))
    write_task(folder, ("premise", "hypothesis"), (2, 1, 0))
    assert load_task(str(folder)).validation == matched.validation


def test_the_hash_is_that_of_the_rows(tmp_path):
    first = load_task(str(write_task(tmp_path / "a" / "some")))
    assert load_task(str(write_task(tmp_path / "b" / "other"))).sha256 == first.sha256
    write_task(tmp_path / "a" / "some", labels=[1, 0])
    assert load_task(str(tmp_path / "a" / "some")).sha256 != first.sha256


def test_a_name_of_glue_is_loaded_from_the_hub(tmp_path, monkeypatch):
    columns = ("premise", "hypothesis")
    folder = write_task(tmp_path / "mnli", columns, range(3), validation="validation_matched")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation_matched")}
    splits = datasets.DatasetDict(
        {split: datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path)) for split, file in files.items()}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    assert load_task("mnli") == load_task(str(folder))
    assert asked == [("nyu-mll/glue", "mnli")]


def test_a_hub_that_cannot_be_reached_is_told_with_a_remedy():
    with pytest.raises(UserError, match=r"'rte' cannot be loaded from the hub .*: give a folder with train.parquet"):
        load_task("rte")


@pytest.mark.parametrize("source", ["stsbb", "/no/such/stsb", ""])
def test_what_is_neither_folder_nor_task_is_refused_with_the_nearest_name(source):
    with pytest.raises(
        UserError, match=rf"task '{source}' is no folder.*(Did you mean 'stsb'|Choose from: cola, mnli)"
    ):
        load_task(source)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_file_is_refused(tmp_path, split):
    (write_task(tmp_path / "some") / f"{split}.parquet").unlink()
    with pytest.raises(UserError, match=rf"some/{split}.parquet' is missing"):
        load_task(str(tmp_path / "some"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (write_task(tmp_path / "some") / "train.parquet").write_text("sentence,label\n")
    with pytest.raises(UserError, match=r"some/train.parquet' is no parquet file"):
        load_task(str(tmp_path / "some"))


def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match="mrpc' lack the column 'sentence1': they have sentence, label"):
        load_task(str(write_task(tmp_path / "mrpc")))
    with pytest.raises(UserError, match="'some' has no text column: it has prose, label"):
        load_task(str(write_task(tmp_path / "some", ["prose"])))
    folder = write_task(tmp_path / "other")
    write_table(folder / "validation.parquet", sentence=["the model"])
    with pytest.raises(UserError, match="validation rows of .* lack the column 'label': they have sentence"):
        load_task(str(folder))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_refused(tmp_path, split):
    folder = write_task(tmp_path / "some")
    write_table(folder / f"{split}.parquet", sentence=[], label=[])
    with pytest.raises(UserError, match=f"There are no {split}.*some"):
        load_task(str(folder))


@pytest.mark.parametrize("value", [None, 5])
def test_a_text_that_is_no_string_is_refused(tmp_path, value):
    folder = write_task(tmp_path / "some")
    write_table(folder / "train.parquet", sentence=[value, value], label=[0, 1])
    with pytest.raises(UserError, match=f"Row 0 .*training rows of .* has {value} in 'sentence'"):
        load_task(str(folder))


@pytest.mark.parametrize("value", [0.5, "yes", None, True, float("nan")])
def test_a_label_that_is_no_whole_number_is_refused(tmp_path, value):
    folder = write_task(tmp_path / "some")
    write_table(folder / "validation.parquet", sentence=["the model"], label=[value])
    with pytest.raises(UserError, match=f"Row 0 .*validation rows of .* has the label {value!r}: give a whole number"):
        load_task(str(folder))


@pytest.mark.parametrize("value", ["yes", None, True, float("nan"), float("inf")])
def test_a_target_of_a_regression_that_is_no_number_is_refused(tmp_path, value):
    folder = write_task(tmp_path / "stsb", ("sentence1", "sentence2"), [0.5, 2.5])
    write_table(folder / "train.parquet", sentence1=["a"], sentence2=["the"], label=[value])
    with pytest.raises(UserError, match=f"has the label {value!r}: give a finite number"):
        load_task(str(folder))


@pytest.mark.parametrize(
    "name, labels, message",
    [
        ("some", [0, 2], "labels 0, 2: every label from 0 to 1"),
        ("some", [0], "labels 0: every label from 0 to 1"),
        ("some", [1, 2, 3], "labels 1, 2, 3: every label from 0 to 2"),
        ("sst2", [0, 1, 2], "labels 0, 1, 2: every label from 0 to 1"),
        ("sst2", [-1, 0, 1], "labels -1, 0, 1: every label from 0 to 1"),
    ],
)
def test_training_labels_other_than_0_to_n_minus_1_are_refused(tmp_path, name, labels, message):
    with pytest.raises(UserError, match=message):
        load_task(str(write_task(tmp_path / name, labels=labels)))


def test_a_validation_label_without_training_rows_is_refused(tmp_path):
    folder = write_task(tmp_path / "some")
    write_table(folder / "validation.parquet", sentence=["the model", "a model"], label=[1, 7])
    with pytest.raises(UserError, match="label 7, which no training row has"):
        load_task(str(folder))


@pytest.fixture
def data(tmp_path) -> GLUEDataModule:
    loaded = load_task(str(write_task(tmp_path / "some", labels=range(5), num_rows=203)))
    module = GLUEDataModule(loaded, make_tokenizer(), batch_size=16, max_length=10, seed=1)
    module.setup()
    return module


def test_training_batches_hold_every_row_once_and_rows_of_similar_length(data):
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [16] * 12 + [11]
    assert sorted(label for batch in batches for label in batch["labels"].tolist()) == sorted(data.task.train["label"])
    assert sum(batch["attention_mask"].numel() for batch in batches) < 1.1 * sum(
        int(batch["attention_mask"].sum()) for batch in batches
    )
    lengths = [batch["attention_mask"].sum(1).float().mean().item() for batch in batches[:-1]]
    assert lengths != sorted(lengths)


def test_validation_batches_hold_every_row_once_sorted_by_length(data):
    batches = list(data.val_dataloader())
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths) and len(lengths) == 203
    assert sorted(label for b in batches for label in b["labels"].tolist()) == sorted(data.task.validation["label"])


def test_padding_is_dynamic_masked_and_the_tokenizers_own(data):
    widths = set()
    for batch in data.val_dataloader():
        padding = batch["attention_mask"] == 0
        assert batch["input_ids"][padding].eq(3).all() and batch["input_ids"][~padding].ne(3).all()
        widths.add(batch["input_ids"].shape[1])
    assert max(widths) == 10 and len(widths) > 1


def test_rows_are_tokenised_once(data):
    rows = data.rows
    data.setup("validate")
    assert data.rows is rows


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(list(range(5, 105)), batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(100))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_loaded_task_does_not_print_its_rows(data):
    assert isinstance(data.task, LoadedTask) and len(repr(data.task)) < 400
