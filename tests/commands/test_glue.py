"""`kdnas glue`: one table of models on labelled tasks, whatever the rows come from."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from kdnas.cli.main import main
from kdnas.commands import glue as comparison
from kdnas.models.encoders import load_classifier
from kdnas.models.families import class_names, name_classes
from kdnas.system.errors import CandidateFailed
from kdnas.system.files import Run, short_names, this_host, write_text
from kdnas.tasks.tasks import TASKS
from tests.conftest import make_rows, make_tokenizer, save_teacher, write_table, write_task


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student of half its depth and width."""
    folder = tmp_path_factory.mktemp("models")
    return save_teacher(folder / "teacher"), save_teacher(
        folder / "student", hidden_size=32, num_hidden_layers=2
    )


@pytest.fixture
def command(models: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """Both on RTE in seconds, in this process; what comes later on the command line wins."""
    write_task(tmp_path / "data" / "rte", ("sentence1", "sentence2"), num_rows=16)
    return [
        "glue",
        "--model",
        str(models[0]),
        f"--model={models[1]}",
        "--task=rte",
        f"--data={tmp_path / 'data'}",
        f"--root={tmp_path / 'logs'}",
        "--name=mine",
        "--workers=0",
        "--seeds=2",
        "--trainer.accelerator=cpu",
        "--finetune.num_epochs=1",
        "--finetune.max_length=32",
        "--latency.length=16",
        "--latency.min_seconds=0.01",
    ]


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "logs" / "mine" / "results.json").read_text())


def lines(tmp_path: Path) -> list[dict]:
    text = (tmp_path / "logs" / "mine" / "runs.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def times(tmp_path: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kdnas: ")
    return error


def test_teacher_and_student_are_one_table_and_the_same_command_changes_nothing(
    command, tmp_path, capsys
):
    assert main(command) == 0
    shown = capsys.readouterr().out
    for word in ("rte: accuracy", "teacher", "student", "±", "100.0 %", "1.0x", "runs.jsonl"):
        assert word in shown
    rows = results(tmp_path)["models"]
    assert list(rows) == ["teacher", "student"]
    for row in rows.values():
        first, second = row["scores"]["rte"]
        assert row["average"] == pytest.approx((first + second) / 2)
        assert row["spread"] == pytest.approx(abs(first - second) / 2**0.5)
        assert row["share_kept"] == pytest.approx(row["average"] / rows["teacher"]["average"])
    assert rows["student"]["num_parameters"] < rows["teacher"]["num_parameters"]
    assert rows["student"]["speedup"] > 0 and rows["teacher"]["speedup"] == 1.0
    runs = lines(tmp_path)
    assert [(run["model"], run["settings"]["seed"]) for run in runs] == [
        ("teacher", 0),
        ("teacher", 1),
        ("student", 0),
        ("student", 1),
    ]
    assert all(
        run["score"] == rows[run["model"]]["scores"]["rte"][run["settings"]["seed"]] for run in runs
    )
    assert [Path(run["folder"], "model").exists() for run in runs] == [True, False, True, False]
    before, asked = times(tmp_path), results(tmp_path)
    assert len(before) == 4
    half = tmp_path / "logs" / "mine" / "student" / f".last.ckpt.{this_host()}-{2**22 + 1}.abcdefgh"
    half.parent.mkdir(exist_ok=True)
    half.touch()  # as a kill leaves it
    assert main(command) == 0
    assert times(tmp_path) == before and results(tmp_path) == asked and not half.exists()
    assert main(["verify", str(tmp_path / "logs" / "mine")]) == 0
    for share, is_told in ((0.5, True), (0.0, False)):
        for row in asked["models"].values():
            row["latency_iqr_ms"] = share * row["latency_ms"]
        (tmp_path / "logs" / "mine" / "results.json").write_text(json.dumps(asked))
        capsys.readouterr()
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert ("The latency of teacher, student spread by more than a tenth" in shown) == is_told


def test_with_real_lengths_the_length_that_is_not_measured_refuses_no_model(command, tmp_path):
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("7\n12\n")
    own = [option for option in command if not option.startswith("--latency.length=")]
    own += [
        "--seeds=1",
        f"--latency.lengths={lengths}",
    ]  # the models take 40 tokens, the default is 128
    assert main(own) == 0
    lengths.write_text("7\n24\n")
    before = times(tmp_path), results(tmp_path)["models"]
    assert main(own) == 0
    assert times(tmp_path) == before[0] and results(tmp_path)["models"] != before[1], (
        "measured on what is there now"
    )


def test_a_comparison_goes_on_with_more_tasks_and_models(command, tmp_path, capsys):
    assert main([*command, "--seeds=1"]) == 0
    before = times(tmp_path)
    assert len(before) == 2
    write_task(tmp_path / "data" / "cola", num_rows=8)
    other = save_teacher(tmp_path / "other" / "student", num_hidden_layers=1)
    assert main([*command, "--seeds=1", f"--model={other}", "--task=cola"]) == 0
    assert before.items() <= times(tmp_path).items() and len(times(tmp_path)) == 6
    rows = results(tmp_path)["models"]
    assert len(rows) == 3 and "other/student" in rows
    assert all(list(row["scores"]) == ["rte", "cola"] for row in rows.values())
    assert len(lines(tmp_path)) == 6 and "average" in capsys.readouterr().out


def test_a_comparison_that_was_stopped_does_only_what_is_missing(command, tmp_path, monkeypatch):
    evaluate, calls = comparison.evaluate_glue, []

    def stop_at_third(*args, **options):
        calls.append(options["folder"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(comparison, "evaluate_glue", stop_at_third)
    assert main(command) == 130
    assert len(lines(tmp_path)) == 2 and not (tmp_path / "logs" / "mine" / "results.json").exists()
    assert main(command) == 0
    assert len(calls) == 5 and calls[2] == calls[3] and len(lines(tmp_path)) == 4


def test_a_grid_chooses_on_training_rows_for_each_model(command, tmp_path, monkeypatch, capsys):
    evaluate, seen = comparison.evaluate_glue, []

    def fake(classifier, tokenizer, task, settings, **options):
        seen.append((len(task.train["label"]), len(task.validation["label"])))
        if settings.learning_rate == 0.5:
            raise CandidateFailed("the loss is nan")
        score = 0.9 if settings.batch_size == 16 else 0.3
        return evaluate(classifier, tokenizer, task, settings, **options) | {"score": score}

    monkeypatch.setattr(comparison, "evaluate_glue", fake)
    grid = [*command, "--seeds=1", "--grid.batch_sizes=[8,16]", "--grid.learning_rates=[1e-3,0.5]"]
    grid.append("--grid.held_out=0.25")
    assert main(grid) == 0
    assert sorted(seen) == [*[(12, 4)] * 8, (16, 16), (16, 16)]
    runs = lines(tmp_path)
    points = [run for run in runs if run["kind"] == "grid"]
    assert [run["score"] for run in points] == [0.3, None, 0.9, None] * 2
    assert points[1]["failed"] == "the loss is nan"
    chosen = [run["settings"] for run in runs if run["kind"] == "run"]
    assert [(one["batch_size"], one["learning_rate"]) for one in chosen] == [(16, 1e-3)] * 2
    assert not list(tmp_path.rglob("grid_*/model"))
    assert "batch 16, learning rate 0.001" in capsys.readouterr().out

    assert main([*grid, "--seeds=2"]) == 0
    assert seen[10:] == [(16, 16)] * 2, "what failed is not tried again"
    assert [run for run in lines(tmp_path) if run["kind"] == "grid"] == points
    told = "grid_8_0.5: failed, and not tried again while this folder exists: the loss is nan"
    assert capsys.readouterr().out.count(told) == 2


def test_a_comparison_that_another_process_makes_is_refused_with_who_that_is(
    command, tmp_path, capsys
):
    with Run(tmp_path / "logs", "mine").alone("wait"):
        error = refused(command, capsys)
    assert f"The run 'mine' is in use by process {os.getpid()} of " in error and error.endswith(
        ": wait for it.\n"
    )


def test_a_point_of_a_grid_that_fails_does_so_alone_and_any_other_fine_tuning_ends_the_command(
    command, tmp_path, monkeypatch, capsys
):
    evaluate = comparison.evaluate_glue

    def fake(classifier, tokenizer, task, settings, **options):
        if settings.batch_size == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return evaluate(classifier, tokenizer, task, settings, **options)

    monkeypatch.setattr(comparison, "evaluate_glue", fake)
    grid = [*command, "--seeds=1", "--grid.batch_sizes=[8,16]", "--grid.learning_rates=[1e-3]"]
    assert main(grid) == 0
    told = "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    failures = [(run["kind"], run.get("failed")) for run in lines(tmp_path)]
    assert sorted(failures, key=str) == sorted(
        [("grid", None), ("grid", told), ("run", None)] * 2, key=str
    )
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"grid_16_0.001: failed, and not tried again while this folder exists: {told}" in shown
    assert main([*command, "--seeds=1", "--finetune.batch_size=16", "--name=other"]) == 1
    assert capsys.readouterr().err == f"kdnas: {told}\n"
    assert main([*grid, "--grid.batch_sizes=[16]", "--name=third"]) == 1
    assert (
        "All combinations of the grid failed for 'teacher' on 'rte': see" in capsys.readouterr().err
    )


def test_grid_alone_has_the_originals_lists(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["glue", "--model=x", "--grid", "--print_config"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "batch_sizes: - 8 - 16 - 32 - 64 - 128 learning_rates: - 0.0003 - 0.0001 - 5.0e-05 - 3.0e-05"
        in shown
    )


def test_a_fine_tuned_teacher_helps_in_a_row_of_its_own(command, tmp_path, capsys):
    assert main([*command, "--seeds=1"]) == 0
    (teacher,) = (tmp_path / "logs" / "mine" / "rte").glob("teacher-*/seed_0/model")
    helped = [*command, "--seeds=1", f"--distill-from={teacher}"]
    assert main(helped) == 0
    rows = results(tmp_path)["models"]
    assert list(rows) == ["teacher", "student", "student, distilled"]
    assert rows["student, distilled"]["latency_ms"] == rows["student"]["latency_ms"]
    before, gap = (
        rows["student"]["average"],
        rows["teacher"]["average"] - rows["student"]["average"],
    )
    expected = (rows["student, distilled"]["average"] - before) / gap if gap > 0 else None
    assert rows["student, distilled"]["gap_closed"] == expected
    assert len(times(tmp_path)) == 3
    assert main([*helped, "--distill.temperature=4"]) == 0
    assert len(times(tmp_path)) == 4, "other help is another run"
    assert "no head for 'rte'" in refused([*command, f"--distill_from={command[2]}"], capsys)


@pytest.mark.parametrize(
    "columns, labels, title",
    [
        (["review"], ["bad", "good"], "accuracy"),
        (["review", "reply"], [0.5, 2.5, 4.0], "pearson + spearman"),
    ],
)
def test_any_labelled_text_has_the_same_table(command, tmp_path, capsys, columns, labels, title):
    texts = {name: make_rows(40, seed) for seed, name in enumerate(columns)}
    path = write_table(
        tmp_path / "mine.csv", **texts, stars=[labels[row % len(labels)] for row in range(40)]
    )
    own = [option for option in command if not option.startswith(("--task", "--data"))]
    own += [
        f"--data={path}",
        "--label-column",
        "stars",
        *(f"--text-column={name}" for name in columns),
    ]
    assert main([*own, "--seeds=1"]) == 0
    assert f"mine: {title}" in capsys.readouterr().out
    (about,) = results(tmp_path)["tasks"]
    assert (about["num_train"], about["num_validation"]) == (36, {"validation": 4})
    assert "lack the column 'text'" in refused(
        [*own[: -len(columns)], "--text-column=text"], capsys
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            [f"LABEL_{i}" for i in range(8)],
            "has a head of another task (outputs: 8; 'rte' needs 2): it is replaced.",
        ),
        (["negative", "positive"], "(negative, positive) have other names than "),
        (["entailment", "not_entailment"], ""),
        (["LABEL_0", "LABEL_1"], ""),
    ],
)
def test_a_classifier_of_another_task_lends_its_encoder_and_that_is_said(
    command, models, tmp_path, caplog, names, told
):
    model = load_classifier(models[1], len(names))
    name_classes(model.config, names)
    model.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    own = ["glue", f"--model={tmp_path / 'other'}", *command[4:], "--seeds=1"]
    assert main(own) == 0
    messages = [record.getMessage() for record in caplog.records if record.name[:5] == "kdnas"]
    assert len(messages) == bool(told) and told in "".join(messages)
    (saved,) = (tmp_path / "logs" / "mine").glob("rte/*/seed_0/model")
    assert class_names(AutoConfig.from_pretrained(saved)) == ["entailment", "not_entailment"]


def test_all_nine_tasks_are_fine_tuned(command, models, tmp_path, capsys):
    for name, task in TASKS.items():
        labels = [0.5, 4.0, 2.5] if task.num_labels == 1 else range(task.num_labels)
        write_task(tmp_path / "data" / name, task.columns, labels, 8, task.validations)
    student = [
        "glue",
        f"--model={models[1]}",
        *command[5:],
        "--seeds=1",
        "--finetune.max_length=16",
    ]
    assert main([*student, *(f"--task={name}" for name in TASKS)]) == 0
    (row,) = results(tmp_path)["models"].values()
    assert list(row["scores"]) == list(TASKS) and len(row["scores"]) == 9
    assert {tuple(run["metrics"]) for run in lines(tmp_path) if run["task"] == "mnli"} == {
        ("accuracy_matched", "accuracy_mismatched")
    }


def test_two_tasks_of_one_name_are_refused_before_anything_is_trained(command, tmp_path, capsys):
    for language in ("english", "german"):
        write_task(tmp_path / language / "reviews", ("sentence",), num_rows=16)
    own = [option for option in command if not option.startswith(("--task", "--data"))]
    own += [f"--task={tmp_path / language / 'reviews'}" for language in ("english", "german")]
    assert "Two tasks are called 'reviews': rename the folder of one." in refused(own, capsys)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task=stsbb"],
            "The task 'stsbb' is not a GLUE task. Did you mean 'stsb'? Choose from: cola, mnli,",
        ),
        (["--task=xyz"], "Choose from: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli."),
        (["--task=cola"], "cola' does not exist"),
        (["--task=rte", "--task=rte"], "task is ['rte', 'rte']"),
        (["--seeds=0"], "seeds is 0"),
        (["--trainer.devices=2"], "trainer.devices is 2, but only full KD of `kdnas run`"),
        (["--trainer.logger=CSVLoger"], "CSVLoger"),
        (["--model=/nowhere/at/all"], "There is no folder '/nowhere/at/all': give one"),
        (
            ["--text-column=review"],
            "text_column is ['review'], but the task 'rte' has columns of its own",
        ),
        (["--finetune.max_length=99"], "finetune.max_length is 99, but the model"),
        (["--latency.length=99"], "latency.length is 99"),
        (["--latency.lengths=/nowhere.jsonl"], "/nowhere.jsonl"),
        (
            ["--latency.lengths=long.jsonl"],
            "latency.length is 99 in 'long.jsonl', but this bert model takes at most 40 tokens",
        ),
        (["--finetune.batch_size=0"], "batch_size is 0"),
        (["--grid.batch_sizes=[]"], "grid.batch_sizes is []"),
        (["--grid.batch_sizes=[0]"], "batch_size is 0"),
        (["--grid.held_out=1"], "grid.held_out is 1"),
        (["--distill.soft_weight=2"], "distill.soft_weight is 2"),
        (["--name=../x"], "'../x'"),
        (["--sedes=3"], "Did you mean 'seeds'?"),
    ],
)
def test_bad_input_gets_one_line_and_makes_nothing(
    command, options, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("long.jsonl").write_text("7\n99\n")
    given = {option.partition("=")[0] for option in options}
    kept = [option for option in command if option.partition("=")[0] not in given - {"--model"}]
    assert message in refused([*kept, *options], capsys)
    assert not (tmp_path / "logs").exists()


def test_the_same_model_twice_no_task_and_labels_that_are_wrong_are_refused(
    command, tmp_path, capsys
):
    assert "each once" in refused([*command, f"--model={command[2]}"], capsys)
    bare = [option for option in command if not option.startswith(("--task", "--data"))]
    assert "There is no task" in refused(bare, capsys)
    folder = tmp_path / "data" / "rte"
    for columns, message in (
        ({"sentence1": ["a"], "sentence2": ["a"]}, "lack the column 'label'"),
        ({"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [1, 1]}, "have the labels 1"),
        ({"sentence1": ["a", None], "sentence2": ["a", "b"], "label": [0, 1]}, "Row 1 (from 0)"),
    ):
        write_table(folder / "train.parquet", **columns)
        assert message in refused(command, capsys)
    write_table(folder / "train.parquet", sentence1=["a", "b"], sentence2=["a", "b"], label=[0, 1])
    for columns, message in (
        ({"sentence1": ["a"], "sentence2": ["a"], "label": [2]}, "label 2"),
        ({"sentence1": [], "sentence2": [], "label": []}, "There are no validation rows"),
    ):
        write_table(folder / "validation.parquet", **columns)
        assert message in refused(command, capsys)
    assert not (tmp_path / "logs").exists()


def test_other_settings_under_the_same_name_are_refused(command, tmp_path, capsys):
    assert main([*command, "--seeds=1"]) == 0
    error = refused([*command, "--finetune.learning_rate=1e-3"], capsys)
    assert "was made with other settings (learning_rate: " in error and "0.001 now)" in error


def test_a_folder_is_a_searchs_or_a_comparisons_and_never_both(
    command, models, text_file, tmp_path, capsys
):
    config = tmp_path / "logs" / "mine" / "config.yaml"
    write_text(config, known := f"teacher: {models[0]}\nname: mine\n")
    assert (
        "logs/mine' was made as the folder of a search, and cannot be used for a comparison"
        in refused(command, capsys)
    )
    assert config.read_text() == known
    write_text(config, known := f"model: [{models[0]}]\nname: mine\n")
    for asked in ("search", "run"):
        own = [asked, f"--teacher={models[0]}", f"--text={text_file}", *command[6:9]]
        assert (
            "logs/mine' was made as the folder of a comparison, and cannot be used for a search: "
            in refused(own, capsys)
        )
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_names_are_the_shortest_ends_that_differ():
    assert short_names(["quickstart", "a/student", "/b/teacher/"]) == [
        "quickstart",
        "student",
        "teacher",
    ]
    assert short_names(["x/a/student", "y/b/student"]) == ["a/student", "b/student"]
    assert short_names(["student", "b/student"]) == ["student", "b/student"]


def test_the_head_and_the_random_numbers_of_a_run_are_its_seeds(command, tmp_path, monkeypatch):
    heads = []

    def fake(classifier, *args, **options):
        heads.append(classifier.classifier.weight.clone())
        return {"score": 0.5, "settings": {"seed": 0}}

    monkeypatch.setattr(comparison, "evaluate_glue", fake)
    torch.rand(3)
    assert main([*command, "--seeds=3"]) == 0
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    torch.rand(7)
    assert main([*command, "--seeds=3", "--name=other"]) == 0
    assert all(map(torch.equal, heads[:6], heads[6:])) and len(heads) == 12
