import dataclasses
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdnas.system.errors import UserError
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.scores import make_metrics
from kdnas.tasks.tasks import TASKS, LoadedTask, Task, class_order, load_labelled, load_task
from tests.conftest import examples, make_rows, make_tokenizer, write_table, write_task

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
    assert {
        name: (task.columns, task.num_labels, task.metrics) for name, task in TASKS.items()
    } == GLUE
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.label_names) == (0 if task.num_labels == 1 else task.num_labels)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("name", GLUE)
def test_a_folder_of_a_glue_name_has_its_columns_labels_and_batches(tmp_path, name, suffix):
    columns, num_labels, metrics = GLUE[name]
    labels = [0.5, 4.0, 2.5] if num_labels == 1 else range(num_labels)
    splits = ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",)
    loaded = load_task(
        str(write_task(tmp_path / name, columns, labels, validations=splits, suffix=suffix))
    )
    assert loaded.task == TASKS[name]
    assert tuple(loaded.validations) == splits
    for rows in (loaded.train, *loaded.validations.values()):
        assert set(rows) == {*columns, "label"}
    data = GLUEDataModule(loaded, make_tokenizer(), batch_size=20, max_length=30)
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == sorted(loaded.train["label"])
    assert batch["labels"].is_floating_point() == (num_labels == 1)
    separators = (batch["input_ids"] == make_tokenizer().sep_token_id).sum(1)
    assert separators.tolist() == [len(columns)] * 20
    values = make_metrics(loaded.task)(batch["labels"], batch["labels"])
    assert {key: round(float(value), 6) for key, value in values.items()} == dict.fromkeys(
        metrics, 1.0
    )


@pytest.mark.parametrize("columns", [("sentence",), ("text",), ("sentence1", "sentence2")])
def test_another_folder_is_a_classification_with_as_many_labels_as_its_training_rows_have(
    tmp_path, columns
):
    loaded = load_task(str(write_task(tmp_path / "packages", columns, labels=[2, 0, 4, 1, 3])))
    columns = ("sentence",) if columns == ("text",) else columns
    assert loaded.task == Task("packages", columns, num_labels=5, metrics=("accuracy",))
    assert loaded.train["label"][:5] == [2, 0, 4, 1, 3]
    assert loaded.validation[columns[0]] == make_rows(20, seed=10, longest=12)


MNLI = ("validation_matched", "validation_mismatched")


def test_mnli_is_scored_on_its_matched_and_its_mismatched_rows(tmp_path):
    folder = write_task(tmp_path / "mnli", ("premise", "hypothesis"), range(3), validations=MNLI)
    loaded = load_task(str(folder))
    assert loaded.validation is loaded.validations["validation_matched"]
    assert loaded.validations["validation_matched"] != loaded.validations["validation_mismatched"]
    (folder / "validation_mismatched.parquet").unlink()
    with pytest.raises(UserError, match="no file '.*mnli/validation_mismatched.parquet'"):
        load_task(str(folder))


# GLUE's own files: their folders, first rows, and one row for each split.
ORIGINAL = {
    "CoLA": ("cola", "", "gj04\t1\t\tthe river is deep", "gj04\t0\t*\triver deep the is"),
    "SST-2": ("sst2", "sentence\tlabel", 'a "deep\t1', "wide and fast\t0"),
    "MRPC": (
        "mrpc",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\ta\tthe",
        "0\t7\t9\tis\tof",
    ),
    "STS-B": ("stsb", "index\tsentence1\tsentence2\tscore", "0\ta\tthe\t5.000", "1\tis\tof\t0.5"),
    "QQP": ("qqp", "id\tquestion1\tquestion2\tis_duplicate", "0\ta\tthe\t1", "1\tis\tof\t0"),
    "MNLI": (
        "mnli",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\ta\tthe\tneutral\tneutral",
        "1\tis\tof\tneutral\tentailment",
        "2\tis\tin\tneutral\tcontradiction",
    ),
    "QNLI": (
        "qnli",
        "index\tquestion\tsentence\tlabel",
        "0\ta\tthe\tentailment",
        "1\ta\tof\tnot_entailment",
    ),
    "RTE": (
        "rte",
        "index\tsentence1\tsentence2\tlabel",
        "0\ta\tthe\tentailment",
        "1\ta\tof\tnot_entailment",
    ),
    "WNLI": ("wnli", "index\tsentence1\tsentence2\tlabel", "0\ta\tthe\t1", "1\ta\tof\t0"),
}


def test_the_original_files_of_all_nine_are_read(tmp_path):
    assert {name for name, *_ in ORIGINAL.values()} == set(TASKS)
    for folder_name, (name, *lines) in ORIGINAL.items():
        folder = tmp_path / folder_name
        folder.mkdir()
        text = "\n".join(line for line in lines if line) + "\n"
        for split in (
            ("train", "dev_matched", "dev_mismatched") if name == "mnli" else ("train", "dev")
        ):
            (folder / f"{split}.tsv").write_text(text)
        loaded = load_task(str(folder))
        expected = [1, 0, 2] if name == "mnli" else [5.0, 0.5] if name == "stsb" else [1, 0]
        expected = [0, 1] if name in ("qnli", "rte") else expected
        assert loaded.task == TASKS[name] and loaded.train["label"] == expected
        assert loaded.train == loaded.validation
    assert load_task(str(tmp_path / "SST-2")).train["sentence"] == ['a "deep', "wide and fast"]
    assert load_task(str(tmp_path / "CoLA")).train["sentence"] == [
        "the river is deep",
        "river deep the is",
    ]


def test_the_hash_is_that_of_the_rows(tmp_path):
    first = load_task(str(write_task(tmp_path / "a" / "some")))
    assert load_task(str(write_task(tmp_path / "b" / "other"))).sha256 == first.sha256
    write_task(tmp_path / "a" / "some", labels=[1, 0])
    assert load_task(str(tmp_path / "a" / "some")).sha256 != first.sha256


def test_a_name_of_glue_is_loaded_from_the_hub(tmp_path, monkeypatch):
    columns = ("premise", "hypothesis")
    folder = write_task(tmp_path / "mnli", columns, range(3), validations=MNLI)
    files = {split: str(folder / f"{split}.parquet") for split in ("train", *MNLI)}
    splits = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path))
            for split, file in files.items()
        }
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    assert load_task("mnli") == load_task(str(folder))
    assert asked == [("nyu-mll/glue", "mnli")]


def test_a_task_that_is_not_in_the_cache_is_told_with_a_remedy():
    with pytest.raises(
        UserError,
        match=r"There is no folder 'rte' here, and it was not found in the hub's cache .*; give a folder with train.parquet",
    ):
        load_task("rte")


@pytest.mark.parametrize("source", ["stsbb", "/no/such/stsb", ""])
def test_what_is_neither_folder_nor_task_is_refused_with_the_nearest_name(source):
    with pytest.raises(
        UserError,
        match=rf"task '{source}' is neither a folder.*(Did you mean 'stsb'|Choose from: cola, mnli)",
    ):
        load_task(source)


def test_a_file_is_no_task_and_where_it_belongs_is_told(tmp_path):
    (tmp_path / "mine.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError, match=r"mine.csv' is a file: give a folder with train.csv"):
        load_task(str(tmp_path / "mine.csv"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_file_is_refused(tmp_path, split):
    (write_task(tmp_path / "some") / f"{split}.parquet").unlink()
    with pytest.raises(UserError, match=rf"no file '.*some/{split}.parquet'"):
        load_task(str(tmp_path / "some"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (write_task(tmp_path / "some") / "train.parquet").write_text("sentence,label\n")
    with pytest.raises(UserError, match=r"some/train.parquet' is not a readable parquet file"):
        load_task(str(tmp_path / "some"))


def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(
        UserError, match="mrpc' lack the column 'sentence1': they have sentence, label"
    ):
        load_task(str(write_task(tmp_path / "mrpc")))
    with pytest.raises(UserError, match="'some' has no text column, only prose, label"):
        load_task(str(write_task(tmp_path / "some", ["prose"])))
    folder = write_task(tmp_path / "other")
    write_table(folder / "validation.parquet", sentence=["the model"])
    with pytest.raises(
        UserError, match="validation rows of .* lack the column 'label': they have sentence"
    ):
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
    folder = write_task(tmp_path / "sst2")
    write_table(folder / "validation.parquet", sentence=["the model"], label=[value])
    with pytest.raises(
        UserError,
        match=f"Row 0 .*validation rows .* has {value!r} as its label: give a whole number",
    ):
        load_task(str(folder))


@pytest.mark.parametrize("value", ["yes", None, True, float("nan"), float("inf")])
def test_a_target_of_a_regression_that_is_no_number_is_refused(tmp_path, value):
    folder = write_task(tmp_path / "stsb", ("sentence1", "sentence2"), [0.5, 2.5])
    write_table(folder / "train.parquet", sentence1=["a"], sentence2=["the"], label=[value])
    with pytest.raises(UserError, match=f"has {value!r} as its label: give a finite number"):
        load_task(str(folder))


@pytest.mark.parametrize(
    "name, labels, message",
    [
        ("cola", [0, 2], "labels 0, 2, but must have every label from 0 to 1"),
        ("cola", [1], "labels 1, but must have every label from 0 to 1"),
        ("some", [0], "have the label 0: give two classes or more"),
        ("sst2", [0, 1, 2], "labels 0, 1, 2, but must have every label from 0 to 1"),
        ("sst2", [-1, 0, 1], "labels -1, 0, 1, but must have every label from 0 to 1"),
    ],
)
def test_training_labels_that_make_no_classification_are_refused(tmp_path, name, labels, message):
    with pytest.raises(UserError, match=message):
        load_task(str(write_task(tmp_path / name, labels=labels)))


def test_a_validation_label_without_training_rows_is_refused(tmp_path):
    folder = write_task(tmp_path / "some")
    write_table(folder / "validation.parquet", sentence=["the model", "a model"], label=[1, 7])
    with pytest.raises(UserError, match="label 7, which no training row has"):
        load_task(str(folder))


def labelled(tmp_path: Path, suffix=".csv", labels=(1, 3, 5), num_rows=60, **columns: list) -> str:
    """One file of reviews with stars."""
    table = {
        "review": make_rows(num_rows),
        "stars": [labels[row % len(labels)] for row in range(num_rows)],
    }
    return str(write_table(tmp_path / f"mine{suffix}", **(table | columns)))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("labels", [(1, 3, 5), ("bad", "fair", "good")])
def test_any_labelled_text_is_a_classification_with_a_tenth_of_its_texts_held_out(
    tmp_path, suffix, labels
):
    data = labelled(tmp_path, suffix, labels)
    loaded = load_labelled(data, ["review"], "stars")
    assert loaded.task == Task("mine", ("sentence",), 3, ("accuracy",), tuple(map(str, labels)))
    train, held_out = loaded.train["sentence"], loaded.validation["sentence"]
    assert len(held_out) == 6 and sorted(train + held_out) == sorted(make_rows(60))
    stars = dict(zip(make_rows(60), [0, 1, 2] * 20, strict=True))
    for rows in (loaded.train, loaded.validation):
        assert rows["label"] == [stars[text] for text in rows["sentence"]]
    assert load_labelled(data, ["review"], "stars") == loaded


def save_classes(path: Path, names: list[str], labels: list[int]) -> None:
    """Labelled rows as ``datasets`` writes them."""
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    path.parent.mkdir(exist_ok=True)
    rows = {"text": make_rows(len(labels)), "label": labels}
    datasets.Dataset.from_dict(rows, features).to_parquet(path)


def test_a_class_label_gives_the_classes_their_names_in_its_own_order(tmp_path):
    names = ["no", "maybe", "unseen", "yes"]
    save_classes(tmp_path / "mine" / "train.parquet", names, [0, 1, 3, -1] * 4)
    save_classes(tmp_path / "mine" / "validation.parquet", names[::-1], [0, 2, 3])
    loaded = load_task(str(tmp_path / "mine"))
    assert loaded.task.label_names == ("-1", "no", "maybe", "yes")
    assert loaded.train["label"] == [1, 2, 3, 0] * 4
    assert loaded.validation["label"] == [3, 2, 1]
    assert load_task(str(loaded.save(tmp_path / "few", 4))).task == loaded.task


def test_fractional_labels_are_a_regression_and_two_columns_are_pairs(tmp_path):
    data = labelled(tmp_path, labels=(0.5, 2.0, 4.5), reply=make_rows(60, seed=1))
    loaded = load_labelled(data, ["review", "reply"], "stars")
    assert loaded.task == Task("mine", ("sentence1", "sentence2"), 1, ("pearson", "spearman"))
    assert set(loaded.train["label"]) == {0.5, 2.0, 4.5}
    assert set(loaded.validation["sentence2"]) <= set(make_rows(60, seed=1))


def test_csv_fields_may_hold_commas_quotes_newlines_and_look_like_numbers(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('\ufeffreview,stars\n"a, ""deep""\nriver",yes\n12,no\n007,yes\ntrue,no\n')
    loaded = load_labelled(str(path), ["review"], "stars")
    texts = loaded.train["sentence"] + loaded.validation["sentence"]
    assert sorted(texts) == ["007", "12", 'a, "deep"\nriver', "true"]
    assert loaded.task.label_names == ("no", "yes")


def test_equal_texts_stay_on_one_side(tmp_path):
    data = labelled(tmp_path, review=make_rows(6) * 10, labels=(0, 1, 0, 1, 0))
    loaded = load_labelled(data, ["review"], "stars")
    assert len(loaded.validation["sentence"]) == 10
    assert not set(loaded.validation["sentence"]) & set(loaded.train["sentence"])


def test_own_train_and_validation_files_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_table(folder / "train.csv", review=["a", "the", "of"], stars=[5, 1, 5])
    write_table(folder / "dev.tsv", review=["is"], stars=[5])
    loaded = load_labelled(str(folder), ["review"], "stars")
    assert loaded.train == {"sentence": ["a", "the", "of"], "label": [1, 0, 1]}
    assert loaded.validation == {"sentence": ["is"], "label": [1]}


@pytest.mark.parametrize(
    "table, columns, label, message",
    [
        ({}, ["body"], "stars", "lack the column 'body': they have review, stars"),
        ({}, ["review"], "label", "lack the column 'label': they have review, stars"),
        ({}, [], "stars", "text_column is empty and label_column"),
        ({}, ["review", "review"], "stars", "'review', 'review' and label_column is 'stars'"),
        ({}, ["stars"], "stars", "'stars' and label_column is 'stars'"),
        (
            {"review": ["a"] * 59 + [None]},
            ["review"],
            "stars",
            "Row 59 .* has None in 'review': give text",
        ),
        (
            {"review": [None, "a"] * 30},
            ["review"],
            "stars",
            "has None in 'review', and so have 29 more",
        ),
        (
            {"stars": [None, "a"] * 30},
            ["review"],
            "stars",
            "Row 0 .* has None as its label, and so have 29 more",
        ),
        (
            {"stars": [1.5, float("nan")] * 30},
            ["review"],
            "stars",
            "Row 1 .* has (None|nan) as its label",
        ),
        (
            {"stars": ["same"] * 60},
            ["review"],
            "stars",
            "have the label 'same': give two classes or more",
        ),
        ({"review": ["same"] * 60}, ["review"], "stars", "60 rows have only 1 distinct texts"),
        (
            {"stars": [f"label {i}" for i in range(60)]},
            ["review"],
            "stars",
            "which no training row has",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_labelled_text_that_cannot_be_learned_is_refused(
    tmp_path, table, columns, label, message, suffix
):
    with pytest.raises(UserError, match=message):
        load_labelled(labelled(tmp_path, suffix, **table), columns, label)


def test_no_data_another_format_a_broken_file_and_an_empty_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="'/no/such.csv' does not exist"):
        load_labelled("/no/such.csv", ["review"], "stars")
    (tmp_path / "mine.xlsx").write_text("x")
    with pytest.raises(UserError, match="has the suffix '.xlsx'"):
        load_labelled(str(tmp_path / "mine.xlsx"), ["review"], "stars")
    for name, content in (
        ("cut.csv", b"review,stars\na,1\nb\n"),
        ("latin.csv", b"review,stars\n\xe4,1\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}' is not a readable csv file"):
            load_labelled(str(tmp_path / name), ["review"], "stars")
    write_table(tmp_path / "train.csv", review=["a", "b"], stars=[1, 2])
    (tmp_path / "validation.csv").write_text("review,stars\n")
    with pytest.raises(UserError, match="There are no validation rows"):
        load_labelled(str(tmp_path), ["review"], "stars")


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        (
            ("Spam", "ham", "spam"),
            ["Spam", "ham", "spam"],
            [0, 1, 2],
        ),  # three, whatever one thinks of it
        (("spam", "Spam"), ["ham", "Spam", "spam"], [2, 1]),
        (("not_it", "it"), ["IT", "NOT IT"], [1, 0]),
        (("spam", "ham"), ["Spam", "spam", "HAM"], None),  # which of the two is meant?
        (("a", "b"), ["a", "c"], None),
        ((), ["a"], None),
    ],
)
def test_classes_are_found_by_their_names(ours, theirs, order):
    assert class_order(dataclasses.replace(TASKS["sst2"], label_names=ours), theirs) == order


@pytest.mark.parametrize(
    "names", [["equivalent", "not_equivalent"], ["Equivalent", "Not equivalent"]]
)
def test_rows_numbered_as_a_classifier_s_classes_keep_their_positive_class(names):
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    config = SimpleNamespace(id2label={1: names[0], 2: names[1]}, num_labels=2)  # some count from 1
    found = LoadedTask(TASKS["mrpc"], rows, {"validation": rows}).for_classifier(config, "mine")
    assert found.validation["label"] == [1, 0]
    assert (found.task.label_names, found.task.positive) == (tuple(names), 0)


def test_columns_that_are_left_out_are_told(tmp_path, caplog):
    texts = {"sentence": ["a", "b"], "question": ["c", "d"], "label": ["x", "y"]}
    for split in ("train", "validation"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(pa.table(texts), tmp_path / "mine" / f"{split}.parquet")
    assert load_task(str(tmp_path / "mine")).task.columns == ("sentence",)
    assert (
        "'mine' is read from sentence; 'question' is left out: `kdnas glue --data` takes any columns"
        in caplog.text
    )


def test_a_file_of_an_odd_name_stays_within_its_folder(tmp_path):
    (tmp_path / "...csv").write_text(
        "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40))
    )
    assert load_labelled(str(tmp_path / "...csv"), ["text"], "label").task.name == "data"


def test_settings_are_chosen_on_training_rows_alone(tmp_path):
    loaded = load_task(
        str(write_task(tmp_path / "mnli", ("premise", "hypothesis"), range(3), 60, MNLI))
    )
    part = loaded.for_choosing(0.2)
    pairs = [
        list(zip(rows["premise"], rows["hypothesis"], rows["label"], strict=True))
        for rows in (part.train, part.validation)
    ]
    assert [len(rows) for rows in pairs] == [48, 12]
    assert sorted(pairs[0] + pairs[1]) == sorted(
        zip(loaded.train["premise"], loaded.train["hypothesis"], loaded.train["label"], strict=True)
    )
    assert part.task.validations == ("validation",) and part.sha256 != loaded.sha256
    few = load_task(str(write_task(tmp_path / "few", labels=(0, 1), num_rows=2)))
    with pytest.raises(UserError, match="label [01] of 'few' has so few training rows"):
        few.for_choosing(0.1)


CELLS = st.one_of(
    st.none(), st.integers(-1, 3), st.floats(), st.text(max_size=4), st.binary(max_size=3)
)
COLUMN = st.one_of(
    *(
        st.lists(cells, min_size=3, max_size=3)
        for cells in (CELLS, st.integers(0, 1), st.text("ab"))
    )
)


def test_a_column_whose_name_is_no_line_is_shown_in_one(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text('"a\n\x1b[2Jb"\nx\n')
    with pytest.raises(UserError) as error:
        load_task(str(folder))
    assert r"only a\n\x1b[2Jb: rename the text column" in str(error.value)


@examples(60)
@given(
    name=st.sampled_from(["mine", "stsb", "cola", "mnli"]),
    columns=st.dictionaries(
        st.sampled_from(
            ["sentence", "sentence1", "sentence2", "premise", "hypothesis", "label", "text", ""]
        ),
        COLUMN,
    ),
    content=st.none() | st.binary(max_size=40) | st.text('a1\t\n,"', max_size=20).map(str.encode),
    suffix=st.sampled_from([".parquet", ".csv", ".tsv"]),
)
def test_any_files_give_a_task_or_one_line(name, columns, content, suffix):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        folder.mkdir()
        for split in ("train", "validation", "validation_matched", "validation_mismatched"):
            if content is None:
                with suppress(pa.ArrowException):  # cells of a column that have no type in common
                    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
            else:
                (folder / f"{split}{suffix}").write_bytes(content)
        before = set(Path(parent).rglob("*"))
        try:
            loaded = load_task(str(folder))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert loaded.train["label"] and all(loaded.validations.values())
        assert set(Path(parent).rglob("*")) == before
