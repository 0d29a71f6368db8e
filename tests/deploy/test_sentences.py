"""``kdnas export --as sentence-transformers``: a folder that it loads, with the teacher's pooling."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoTokenizer

import kdnas.deploy.export
from kdnas.cli.main import main
from kdnas.deploy.export import export_student
from kdnas.deploy.sentences import Sentences, add_sentence_files
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, build_student, find_teacher, student_config
from kdnas.system.errors import ParityError, UserError
from tests.conftest import make_rows, save_teacher

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A sentence encoder: [CLS], normalized."""
    folder = save_teacher(tmp_path / "teacher")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    torch.manual_seed(4)
    build_student(AutoConfig.from_pretrained(teacher), ARCH).save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def stsb(tmp_path: Path) -> Path:
    folder = tmp_path / "stsb"
    folder.mkdir()
    for name, num_rows, seed in (("train", 60, 0), ("validation", 20, 1)):
        first, second = make_rows(num_rows, seed), make_rows(num_rows, seed + 9)
        labels = [float(i % 6) for i in range(num_rows)]
        table = pa.table({"sentence1": first, "sentence2": second, "label": labels})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def test_the_folder_is_a_sentence_encoder_with_the_pooling_of_the_teacher(
    student: Path, teacher: Path, stsb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--teacher={teacher}",
        f"--task={stsb}",
        "--as",
        "sentence-transformers",
        "--output",
    ]
    assert main(["export", f"--student={student}", *options, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    encoder, original = (
        SentenceTransformer(str(tmp_path / "out")),
        SentenceTransformer(str(teacher)),
    )
    texts = make_rows(5, seed=7)
    vectors = encoder.encode(texts)
    assert vectors.shape == (5, 32) and np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    model = kdnas.deploy.export.load_student(student)[0]
    batch = AutoTokenizer.from_pretrained(student)(texts, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state[:, 0].detach().numpy()
    np.testing.assert_allclose(
        vectors, states / np.linalg.norm(states, axis=1, keepdims=True), atol=1e-5
    )
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    rows = pq.read_table(stsb / "validation.parquet").to_pydict()
    for name, model in (("spearman", encoder), ("teacher_spearman", original)):
        first, second = (model.encode(rows[column]) for column in ("sentence1", "sentence2"))
        expected = spearmanr((first * second).sum(1), rows["label"]).statistic
        assert found["checks"]["sentences"][name] == pytest.approx(expected, abs=1e-4)
    assert (
        found["checks"]["sentences"]["pooling"] == "cls"
        and found["checks"]["sentences"]["normalized"]
    )
    assert "1_Pooling/config.json" in found["files"]
    assert "Sentence vectors, cosine to the teacher's vectors: " in shown
    assert f"{found['checks']['sentences']['spearman']:.3f} (its teacher" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "SentenceTransformer" in card
    done = subprocess.run(
        [sys.executable, "predict.py", texts[0]],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == pytest.approx(encoder.encode(texts[0]).tolist(), abs=1e-4)


@pytest.fixture
def parts(student: Path, teacher: Path, tmp_path: Path):
    """What ``add_sentence_files`` takes."""
    model, tokenizer = kdnas.deploy.export.load_student(student)
    return (
        student,
        model,
        tokenizer,
        Sentences(find_teacher(str(teacher)), make_rows(40), make_rows(9, 5)),
    )


def test_without_a_task_there_is_the_cosine_alone(parts) -> None:
    report = add_sentence_files(*parts)
    assert set(report) == {"pooling", "normalized", "cosine"} and -1 <= report["cosine"] <= 1


def test_other_vectors_than_the_encoders_are_found(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = SentenceTransformer.encode
    monkeypatch.setattr(
        SentenceTransformer, "encode", lambda *args, **options: encode(*args, **options) + 0.5
    )
    with pytest.raises(
        ParityError, match="vectors from sentence-transformers differ from the student's by 0.5"
    ):
        add_sentence_files(*parts)


def test_a_teacher_that_names_a_class_of_another_package_is_refused_not_imported(
    parts, teacher: Path
) -> None:
    modules = json.loads((teacher / "modules.json").read_text())
    modules[2]["type"] = "this.s"  # the standard library's module that prints when it is imported
    (teacher / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="cannot be loaded as a sentence encoder"):
        add_sentence_files(*parts)
    assert "this" not in sys.modules


def test_a_teacher_that_pools_in_another_way_is_refused(parts, teacher: Path) -> None:
    pooling = {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": True,
    }
    (teacher / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UserError, match="pools by 'max', but only mean and cls can be exported"):
        add_sentence_files(*parts)


def test_a_classifier_is_refused_and_nothing_is_left(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    model = build_classifier(student_config(AutoConfig.from_pretrained(teacher), ARCH))
    model.save_pretrained(student)
    sentences = Sentences(find_teacher(str(teacher)), make_rows(40), make_rows(9, 5))
    card = {"name": "tiny", "teacher": "tiny", "sections": {}}
    with pytest.raises(
        UserError, match="The student is a BertForSequenceClassification, but .* needs an encoder"
    ):
        export_student(student, tmp_path / "out", card=card, sentences=sentences)
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student"}


def test_what_is_missing_is_named_before_anything_is_computed(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "export",
        f"--student={student}",
        f"--teacher={teacher}",
        "--as=sentence-transformers",
    ]
    assert main(command) == 2
    assert "text and task are None" in capsys.readouterr().err
    (tmp_path / "colours").mkdir()
    for name in ("train", "validation"):
        pq.write_table(
            pa.table({"text": ["a", "b"], "label": [0, 1]}),
            tmp_path / "colours" / f"{name}.parquet",
        )
    assert main([*command, f"--task={tmp_path / 'colours'}"]) == 2
    assert (
        "The task 'colours' has no sentence pairs with a number as label" in capsys.readouterr().err
    )
    there = importlib.util.find_spec
    absent = "sentence_transformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == absent else there(n))
    assert main(command) == 2
    assert "pip install '.[sentence-transformers]'" in capsys.readouterr().err
