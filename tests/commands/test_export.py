"""``kdnas export``: what it takes, and what it refuses before anything is written."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import kdnas.commands.export
from kdnas.cli.main import main
from kdnas.commands.export import _run_card, _teacher_words, is_exported
from kdnas.deploy.export import source_sha256
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, find_teacher, student_config
from kdnas.system.errors import ParityError
from kdnas.system.files import Run, new_folder, this_host, write_text
from kdnas.system.manifest import write_manifest
from tests.conftest import make_rows, save_teacher

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64)
REPORT = {
    "max_abs_difference": 1e-6,
    "onnx_megabytes": 2.0,
    "int8_megabytes": 0.5,
    "int8": {"method": "dynamic", "rows": "rows", "cosine": 0.99, "score": 0.5, "int8_score": 0.49},
    "latency": [{"batch": 1, "length": 16, "torch_ms": 3.0, "onnx_ms": 1.0, "int8_ms": 2.0}],
}


@pytest.fixture
def student(tiny_teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    build_classifier(
        student_config(AutoConfig.from_pretrained(tiny_teacher), ARCH)
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list:
    """The arguments of each export that would be made."""
    calls: list = []

    def fake(source, folder, **options):
        calls.append((source, folder, options))
        return REPORT

    monkeypatch.setattr(kdnas.commands.export, "export_student", fake)
    return calls


def export(student: Path, *options: str) -> int:
    return main(["export", f"--student={student}", *options])


def task_folder(path: Path) -> Path:
    path.mkdir()
    rows = make_rows(40)
    for name, texts in (("train", rows[:24]), ("validation", rows[24:])):
        pq.write_table(
            pa.table({"text": texts, "label": [i % 2 for i in range(len(texts))]}),
            path / f"{name}.parquet",
        )
    return path


def test_a_student_is_exported_with_the_score_of_its_int8_graph(
    student: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_folder(tmp_path / "colours")
    options = [f"--task={task}", f"--teacher={tiny_teacher}", "--license=mit"]
    assert export(student, *options) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "student-export"
    checks = json.loads((folder / "manifest.json").read_text())["checks"]
    assert checks["int8"]["rows"] == "16 validation rows of colours"
    assert f"model.int8.onnx, score: {checks['int8']['int8_score']:.3f}" in shown
    assert (
        f"cosine to model.onnx: {checks['int8']['cosine']:.4f}" in shown
        and "model.onnx differ from torch's by at most" in shown
        and str(folder) in shown
    )
    card = (folder / "README.md").read_text()
    assert (
        "license: mit" in card
        and "Its teacher: bert." in card
        and str(tiny_teacher.parent) not in card
    )
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.hidden_size == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdnas.commands.export, "export_student", None)
        assert export(student) == 2
    assert (
        f"The folder {str(folder)!r} exists: give another --output, or --force"
        in capsys.readouterr().err
    )


def test_an_export_that_a_killed_process_had_set_aside_is_there_again(
    student: Path, tmp_path: Path, exported, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = tmp_path / f".deployed.{this_host()}-{2**22 + 1}.abcdefgh_set_aside"
    aside.mkdir()
    (aside / "model.onnx").touch()
    assert export(student, f"--output={tmp_path / 'deployed'}") == 2
    assert "deployed' exists and is not an earlier export" in capsys.readouterr().err
    assert (tmp_path / "deployed" / "model.onnx").exists() and not aside.exists()


def test_labelled_rows_may_be_a_table_of_ones_own(student: Path, tmp_path: Path, exported) -> None:
    rows = [f"{make_rows(60, seed=5)[i]},{('good', 'bad')[i % 2]}" for i in range(60)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,verdict", *rows]))
    columns = ["--text-column=review", "--label-column=verdict"]
    assert export(student, f"--data={tmp_path / 'reviews.csv'}", *columns) == 0
    rows_of = exported[0][2]["make_rows"](AutoTokenizer.from_pretrained(student))
    assert rows_of.name == "6 validation rows of reviews"


def test_rows_without_labels_may_have_a_column_of_another_name(
    student: Path, tmp_path: Path, exported, capsys
) -> None:
    pq.write_table(pa.table({"body": make_rows(60)}), tmp_path / "rows.parquet")
    command = ["export", f"--student={student}", f"--text={tmp_path / 'rows.parquet'}"]
    assert main(command) == 2 and "has no column 'text'" in capsys.readouterr().err
    assert main([*command, "--text-column=body"]) == 0
    assert len(exported) == 1 and exported[0][2]["make_rows"] is not None


@pytest.mark.parametrize("name", [".", "../student", "../student/"])
def test_the_default_folder_is_beside_the_student_however_it_is_named(
    student: Path, exported, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(student)
    assert main(["export", f"--student={name}"]) == 0
    assert exported[0][1].resolve() == student.with_name("student-export")


def test_it_is_said_where_int8_is_slower(
    student: Path, exported, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(student) == 0
    shown = capsys.readouterr().out
    assert re.search(r"batch 1 x 16: .*slower than model.onnx: take that", shown)
    assert "model.onnx, score: 0.500" in shown and "model.int8.onnx, score: 0.490" in shown


def test_an_existing_folder_is_replaced_with_force_alone(
    student: Path, tmp_path: Path, exported
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    assert export(student, f"--output={output}") == 0, "it is empty"
    (output / "manifest.json").write_text('{"checks": {}}')
    assert export(student, f"--output={output}") == 2
    assert [call[:2] for call in exported] == [(student, output)]
    assert export(student, f"--output={output}", "--force") == 0
    assert export(student, f"--output={student}", "--force") == 2
    assert len(exported) == 2


def test_a_link_stays_and_what_it_leads_to_is_replaced(
    student: Path, tmp_path: Path, exported
) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "output"
    link.symlink_to(tmp_path / "disk")
    assert export(student, f"--output={link}") == 0
    assert exported[0][1] == tmp_path / "disk" and link.is_symlink()


def test_force_replaces_nothing_but_an_export(
    student: Path, tmp_path: Path, exported, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "logs", student, "someone/bert")
    write_manifest(run, {"name": "mine"})
    (tmp_path / "file").write_text("mine")
    for output in (run, tmp_path / "logs", tmp_path / "file"):
        assert export(student, f"--output={output}", "--force") == 2
        shown = capsys.readouterr().err
        assert (
            f"{str(output)!r} exists and is not an earlier export, so it is not replaced" in shown
        )
    assert exported == []


def save_run(root: Path, student: Path, teacher: str) -> Path:
    run = root / "mine"
    shutil.copytree(student, run / "glue" / "student" / "model")
    ARCH.to_yaml(run / "best_student.yaml")
    latency = {
        "backend": "torch",
        "device": "cpu",
        "batch_size": 1,
        "length": 16,
        "lengths": None,
        "num_threads": 2,
    }
    task = str(task_folder(root / "colours"))
    config = {
        "teacher": teacher,
        "text": "/somewhere/rows.txt",
        "task": task,
        "latency": latency,
        "seed": 7,
    }
    config |= {"data": {"column": "body", "held_out_fraction": 0.25}, "finetune": {"max_length": 9}}
    (run / "config.yaml").write_text(json.dumps(config))
    models = {
        role: {"score": 0.5, "metrics": {"accuracy": 0.5}, "latency_ms": 2.0, "speedup": 3.0}
        for role in ("teacher", "student", "random", "static", "layer_cut")
    }
    results = {"task": {"name": "colours", "metric": "accuracy"}, "models": models}
    (run / "glue" / "results.json").write_text(json.dumps(results))
    return run


def test_rows_are_scored_where_the_student_has_their_classes(
    student: Path, tiny_teacher: Path, tmp_path: Path, exported, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{row},{('good', 'bad')[i % 2]}" for i, row in enumerate(make_rows(60, seed=5))]
    write_text(tmp_path / "reviews.csv", "\n".join(["text,label", *rows]))
    tokenizer = AutoTokenizer.from_pretrained(student)
    data = [f"--data={tmp_path / 'reviews.csv'}", "--text-column=text"]

    def labels(*names: str) -> list[int]:
        """Of the validation rows, as a student with classes of these names is scored on them."""
        model = build_classifier(
            student_config(AutoConfig.from_pretrained(tiny_teacher), ARCH), len(names)
        )
        model.config.id2label = dict(enumerate(names))
        model.save_pretrained(student)
        assert export(student, *data) == 0
        rows = exported[-1][2]["make_rows"](tokenizer)
        assert rows.task.num_labels == len(names)
        return [int(label) for batch in rows.report for label in batch["labels"]]

    plain = labels("bad", "good")
    assert sum(plain) not in (0, len(plain))
    assert labels("LABEL_0", "LABEL_1") == plain
    assert labels("GOOD", "Bad") == [1 - label for label in plain]
    assert labels("awful", "bad", "fair", "good") == [1 + 2 * label for label in plain]
    capsys.readouterr()
    assert export(student, f"--task={task_folder(tmp_path / 'colours')}") == 2
    assert (
        "has 4 outputs, but the task 'colours' needs 2: give the task that the student was trained on"
        in capsys.readouterr().err
    )
    save_teacher(student)  # an encoder
    assert export(student, *data) == 0
    rows = exported[-1][2]["make_rows"](tokenizer)
    assert rows.task is None and rows.name == "6 validation rows of reviews"


def test_texts_of_a_run_are_split_as_it_split_them(
    student: Path, tmp_path: Path, exported, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(
        kdnas.commands.export, "load_corpus", lambda text, **how: asked.append((text, how))
    )
    run = save_run(tmp_path / "logs", student, "someone/bert")
    config = json.loads((run / "config.yaml").read_text()) | {"task": None}
    (run / "config.yaml").write_text(json.dumps(config))
    command = ["export", "--run=mine", f"--root={tmp_path / 'logs'}"]
    assert main(command) == main([*command, "--text=/other/rows.txt"]) == 0
    how = {"seed": 7, "column": "body", "held_out_fraction": 0.25}
    assert asked == [("/somewhere/rows.txt", how), ("/other/rows.txt", {})]


def test_what_the_card_says_is_of_what_is_exported(student: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "logs", student, "someone/bert")
    assert _run_card(Run(str(tmp_path / "logs"), "mine"), is_encoder=True)["sections"] == {}
    assert _teacher_words("someone/bert")["base_model"] == "someone/bert"
    for folder in (
        "/home/me/secret/bert",
        "./bert",
        "../x/bert",
        "a/b/bert",
    ):  # which is no longer there
        assert _teacher_words(folder) == {"teacher": "bert"}


def test_a_text_that_a_folder_is_compared_on_is_not_what_it_was_distilled_on(
    student: Path, tmp_path: Path, exported
) -> None:
    write_text(tmp_path / "sample.txt", "\n".join(make_rows(40)))
    assert export(student, f"--text={tmp_path / 'sample.txt'}") == 0
    card = {"name": "student", "teacher": "not stated", "license": None, "sections": {}}
    assert exported[0][2]["card"] == card


def test_a_run_is_exported_with_its_own_task_and_words(
    student: Path, tiny_teacher: Path, tmp_path: Path, exported
) -> None:
    run = save_run(tmp_path / "logs", student, "someone/bert")
    assert main(["export", "--run=mine", f"--root={tmp_path / 'logs'}"]) == 0
    source, folder, options = exported[0]
    assert (source, folder) == (run / "glue" / "student" / "model", run / "student")
    rows = options["make_rows"](AutoTokenizer.from_pretrained(student))
    assert rows.name == "16 validation rows of colours"
    assert max(batch["input_ids"].shape[1] for batch in rows.report) == 9, "as in fine-tuning"
    card = options["card"]
    assert (card["name"], card["base_model"], card["text"]) == ("mine", "someone/bert", "rows.txt")
    assert card["sections"]["Scores"]["colours, accuracy"] == "0.500"
    assert card["sections"]["Scores"]["rows that were scored"] == "cut at 9 tokens"
    assert (card["task"], card["metrics"]) == ("colours", {"accuracy": 0.5})
    assert card["made"] == "searched and distilled"
    assert (
        main(
            [
                "export",
                "--run=mine",
                f"--root={tmp_path / 'logs'}",
                f"--teacher={tiny_teacher}",
                "--force",
            ]
        )
        == 0
    )
    card = exported[-1][2]["card"]
    assert card["teacher"] == tiny_teacher.name and "base_model" not in card, (
        "a folder is no link to the hub"
    )
    card = exported[0][2]["card"]
    assert card["sections"]["Latency beside its teacher"] == {
        "torch on cpu, batch 1 x 16, 2 threads": "2.00 ms, 3.0x faster than its teacher"
    }


def test_a_run_whose_student_is_exported_anew_stays_as_its_manifest_says(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fake(source, folder, **options):
        with new_folder(folder) as new:
            for name in ("model.onnx", "manifest.json"):
                (new / name).write_text('{"checks": {}}')
        return REPORT

    run = save_run(tmp_path / "logs", student, "someone/bert")
    for name in ("model.onnx", "gone.onnx", "manifest.json"):
        write_text(run / "student" / name, '{"checks": {"old": 1}}')
    write_manifest(run, {"name": "mine"})
    monkeypatch.setattr(kdnas.commands.export, "export_student", fake)
    monkeypatch.chdir(tmp_path)
    command = ["export", "--run=mine", "--root=logs"]
    for options in (["--force"], [f"--output={run / 'again'}"], ["--output=outside"]):
        assert main([*command, *options]) == 0
        assert main(["verify", str(run)]) == 0
    (tmp_path / "manifest.json").write_text("[]")  # another program's
    shutil.copytree(student, run / "mine")
    write_manifest(run, {"name": "mine"})
    assert (
        main(["export", f"--student={run / 'mine'}"]) == 0
        and (run / "mine-export" / "model.onnx").exists()
    )
    assert main(["verify", str(run)]) == 0
    assert (tmp_path / "manifest.json").read_text() == "[]"
    (run / "best_student.yaml").write_text(
        "changed"
    )  # by somebody else: no export makes that right
    assert main([*command, "--force"]) == 0
    capsys.readouterr()
    assert main(["verify", str(run)]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_onnx_what_needs_it_is_refused_at_the_start(
    package: str,
    student: Path,
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    model = f"--model={student}"
    of_run = [f"--teacher={tiny_teacher}", f"--text={text_file}", f"--root={tmp_path / 'logs'}"]
    for command in (
        ["export", f"--student={student}"],
        ["latency", model, "--backend=onnxruntime-int8"],
        ["run", *of_run],
        ["search", *of_run, "--latency.backend=onnxruntime"],
    ):
        assert main(command) == 2
        told = f"ONNX needs the package {package!r}, which is not installed: pip install '.[onnx]'."
        assert capsys.readouterr().err == f"kdnas: {told}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    json_file = tmp_path / "latency.json"
    options = ["--length=16", "--min-seconds=0.01", f"--json={json_file}"]
    assert main(["latency", model, *options]) == 0


def test_what_was_exported_before_fine_tuning_is_of_another_model(
    student: Path, tmp_path: Path
) -> None:
    run = Run(str(tmp_path / "logs"), "mine")
    assert not is_exported(run)
    shutil.copytree(student, run.full_kd / "encoder")
    write_text(run.student / "manifest.json", json.dumps({"source_sha256": source_sha256(student)}))
    assert is_exported(run)
    shutil.copytree(student, run.glue / "student" / "model")
    assert is_exported(run)
    (run.glue / "student" / "model" / "model.safetensors").write_bytes(b"fine-tuned")
    assert not is_exported(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "run is None and student is None: give exactly one of the two"),
        (["--run=x", "--student=y"], "run is 'x' and student is 'y': give exactly one of the two"),
        (["--run=nowhere"], "The run 'nowhere' in 'lightning_logs' has no student yet"),
        (["--run=../x"], "'../x'"),
        (["--task=/nowhere"], "'/nowhere'"),
        (["--text=/nowhere.txt"], "/nowhere.txt"),
        (["--teacher=/nowhere/at/all"], "There is no folder '/nowhere/at/all': give one"),
        (["--length=41"], "length is 41, but the student"),
        (["--length=long"], "length"),
        (
            ["--data=reviews.csv"],
            "data is 'reviews.csv', but text_column is []: give --data with --text-column",
        ),
        (["--data=a.csv", "--text-column=x", "--task=stsb"], "data is 'a.csv', but task is 'stsb'"),
        (
            ["--text-column=x"],
            "text_column is ['x'], but without --data FILE only one column can be given, together with",
        ),
        (
            ["--text=a.txt", "--text-column=x", "--text-column=y"],
            "text_column is ['x', 'y'], but without --data FILE only one column can be given",
        ),
        (
            ["--as=onnx"],
            "There is no export format 'onnx'. Choose from: sentence-transformers, transformers.",
        ),
        (["--as", "sentence-transformers"], "teacher is None"),
        (["--forse"], "Did you mean 'force'?"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(
    options: list[str],
    message: str,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_student = not options or options[0].startswith("--run")
    assert main(["export", *([] if with_student else [f"--student={student}"]), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_folder_without_weights_is_refused(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (student / "model.safetensors").unlink()
    assert export(student) == 2
    assert f"Cannot export {str(student)!r}" in capsys.readouterr().err
    assert main(["export", "--student=/nowhere"]) == 2
    assert "Cannot export '/nowhere': there is no such folder" in capsys.readouterr().err


def test_a_student_of_another_teacher_is_refused(
    student: Path, tmp_path: Path, exported, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_teacher(tmp_path / "other", "roberta")
    assert export(student, f"--teacher={other}") == 2
    assert (
        f"is a bert model, but the teacher {str(other)!r} is a roberta model"
        in capsys.readouterr().err
    )
    shorter = save_teacher(tmp_path / "shorter", max_position_embeddings=30)
    assert export(student, f"--teacher={shorter}") == 2
    assert (
        f"reads text differently from its teacher {str(shorter)!r}: it takes"
        in capsys.readouterr().err
    )
    smaller = save_teacher(tmp_path / "smaller", hidden_size=16)
    assert export(student, f"--teacher={smaller}") == 2
    assert "has hidden_size 32, but its teacher" in capsys.readouterr().err
    twin, own = (
        save_teacher(tmp_path / "twin", initializer_range=0.1),
        save_teacher(tmp_path / "own"),
    )
    config = json.loads((student / "config.json").read_text())
    config["teacher_sha256"] = find_teacher(str(own)).sha256()
    (student / "config.json").write_text(json.dumps(config))
    assert export(student, f"--teacher={twin}") == 2
    assert (
        f"learned from other weights (sha256 {config['teacher_sha256'][:8]})"
        in capsys.readouterr().err
    )
    assert exported == []
    assert export(student, f"--teacher={own}") == 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            3,
            "kdnas: [Errno 28] No space left on device.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/removed/with/its/file"),
            3,
            "kdnas: [Errno 28] No space left on device: '/tmp/removed/with/its/file' (N bytes are free there).\n",
        ),
        (ParityError("logits differ by 1"), 1, "kdnas: logits differ by 1\n"),
    ],
)
def test_what_is_no_mistake_of_the_user_ends_with_one_line_too(
    student: Path, monkeypatch, capsys: pytest.CaptureFixture[str], error, code, line
) -> None:
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(kdnas.commands.export, "export_student", fail)
    assert export(student) == code
    assert re.sub(r"[\d,]+ bytes", "N bytes", capsys.readouterr().err) == line


def test_sigterm_ends_an_export_with_one_line(student, monkeypatch, capsys):
    monkeypatch.setattr(
        kdnas.commands.export,
        "export_student",
        lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert export(student) == 143
    assert capsys.readouterr().err == "kdnas: interrupted.\n"


def test_a_folder_is_pushed_where_a_repository_is_named(
    student: Path, exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list = []

    class Hub:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, repo, **options):
            calls.append((repo, options, len(exported)))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))
            return "https://hub/me/small"

    monkeypatch.setattr(kdnas.commands.export, "HfApi", Hub)
    assert export(student, "--hub-repo=me/small") == 0
    folder = Path(f"{student}-export")
    created = ("me/small", {"private": True, "exist_ok": True}, 1)
    assert calls == ["whoami", created, ("me/small", folder)]
    assert "Pushed: https://hub/me/small" in capsys.readouterr().out
    monkeypatch.setattr(Hub, "upload_folder", lambda *args, **options: [][0])
    assert export(student, "--hub-repo=me/small") == 2
    error = capsys.readouterr().err
    assert (
        "Cannot push to 'me/small': list index out of range" in error
        and f"The export is in {str(folder)!r}" in error
    )


def test_a_run_whose_export_cannot_be_pushed_is_verified_all_the_same(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(student, tmp_path / "mine" / "student")
    write_manifest(tmp_path / "mine", {"name": "mine"})

    def change(source, folder, **options):
        (folder / "config.json").write_text("{}")
        return REPORT

    def refuse(folder, repo):
        raise KeyboardInterrupt

    monkeypatch.setattr(kdnas.commands.export, "export_student", change)
    monkeypatch.setattr(kdnas.commands.export, "push", refuse)
    monkeypatch.setattr(kdnas.commands.export, "check_hub", lambda repo: None)
    monkeypatch.setattr(kdnas.commands.export, "_output", lambda config, _: Path(config.output))
    output = tmp_path / "mine" / "student"
    assert export(student, f"--output={output}", "--hub-repo=me/small") == 130
    assert main(["verify", str(tmp_path / "mine")]) == 0, capsys.readouterr()


def test_without_a_login_nothing_is_exported(
    student: Path, exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hub:
        def whoami(self):
            raise ValueError("no token")

    monkeypatch.setattr(kdnas.commands.export, "HfApi", Hub)
    assert export(student, "--hub-repo=me/small") == 2
    assert (
        "Cannot push to 'me/small': no token. Log in by `hf auth login`." in capsys.readouterr().err
    )
    assert exported == []
