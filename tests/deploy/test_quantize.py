"""The int8 graph: how it is chosen and what is reported."""

import errno
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import kdnas.deploy.quantize
from kdnas.deploy.onnx import write_int8, write_onnx
from kdnas.deploy.quantize import (
    Rows,
    cosine,
    random_rows,
    score,
    task_rows,
    text_rows,
    write_best_int8,
)
from kdnas.models.encoders import build_classifier
from kdnas.system.errors import ParityError
from kdnas.tasks.tasks import LoadedTask, Task
from tests.conftest import make_rows


@pytest.fixture(scope="module")
def graph(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three labels as ONNX."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    write_onnx(build_classifier(AutoConfig.from_pretrained(tiny_teacher), 3).eval(), path)
    return path


@pytest.fixture
def rows(tiny_teacher: Path) -> Rows:
    return random_rows(
        AutoConfig.from_pretrained(tiny_teacher), ["input_ids", "attention_mask"], 20
    )


def test_random_rows_differ_and_have_padding(rows: Rows) -> None:
    assert len(rows.choose) == len(rows.report) == 8
    first, second = rows.choose[0], rows.report[0]
    assert not np.array_equal(first["input_ids"][:2, :2], second["input_ids"][:2, :2])
    for batch in rows.choose + rows.report:
        assert ((batch["input_ids"] == 3) == (batch["attention_mask"] == 0)).all()


def test_rows_of_a_task_are_chosen_on_training_rows_and_reported_on_validation_rows(
    tiny_teacher: Path, graph: Path
):
    texts = make_rows(60)
    task = LoadedTask(
        Task("tiny", ("text",), 3),
        {"text": texts[:40], "label": [i % 3 for i in range(40)]},
        {"validation": {"text": texts[40:], "label": [i % 3 for i in range(20)]}},
    )
    found = task_rows(task, AutoTokenizer.from_pretrained(tiny_teacher), 12)
    count = [sum(len(batch["labels"]) for batch in split) for split in (found.choose, found.report)]
    assert count == [40, 20] and found.name == "20 validation rows of tiny"
    assert max(batch["input_ids"].shape[1] for batch in found.choose) == 12
    outputs = kdnas.deploy.quantize.outputs(graph, found.report)
    right = sum(
        int((o.argmax(1) == b["labels"]).sum()) for o, b in zip(outputs, found.report, strict=True)
    )
    assert score(found.task, outputs, found.report) == pytest.approx(right / 20)


def test_rows_of_texts_are_held_out_where_they_are_reported(tiny_teacher: Path) -> None:
    found = text_rows(["river"] * 9, ["stone"] * 3, AutoTokenizer.from_pretrained(tiny_teacher), 12)
    assert found.task is None and found.name == "3 held-out texts"
    assert [len(np.unique(split[0]["input_ids"])) for split in (found.choose, found.report)] == [
        3,
        3,
    ]
    assert not np.array_equal(found.choose[0]["input_ids"][0], found.report[0]["input_ids"][0])


def test_matrices_have_a_scale_a_column_and_the_table_of_words_is_in_eight_bits(
    graph: Path, tmp_path: Path
) -> None:
    exact, int8 = onnx.load(graph), tmp_path / "int8.onnx"
    write_int8(graph, int8)
    arrays = {
        one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(int8).graph.initializer
    }
    matrices = {node.input[1] for node in exact.graph.node if node.op_type == "MatMul"}
    weights = [one for one in exact.graph.initializer if one.name in matrices]
    assert len(weights) > 4
    for weight in weights:
        assert arrays[f"{weight.name}_quantized"].dtype == np.int8
        assert arrays[f"{weight.name}_scale"].shape == (weight.dims[1],)
    (words,) = (
        one for one in exact.graph.initializer if one.name.endswith("word_embeddings.weight")
    )
    assert arrays[f"{words.name}_quantized"].dtype.itemsize == 1


@pytest.mark.parametrize("full", ["its folder", "the temporary one"])
@pytest.mark.parametrize("is_static", [False, True])
def test_a_full_disk_that_native_code_does_not_tell_is_told(
    is_static: bool,
    full: str,
    graph: Path,
    rows: Rows,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    folder = small_disk if full == "its folder" else tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if full == "its folder" else small_disk))
    source = shutil.copy(graph, folder / "model.onnx")
    failed = []
    for share in (0.0, 0.5, 0.9, 9.0):
        room = shutil.disk_usage(small_disk).free - int(share * graph.stat().st_size)
        (small_disk / "filler").write_bytes(bytes(max(0, room)))
        try:
            write_int8(source, folder / "int8.onnx", rows.choose if is_static else None)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed.append(share)
        for path in (small_disk / "filler", folder / "model-inferred.onnx", folder / "int8.onnx"):
            path.unlink(missing_ok=True)
    assert failed == [0.0, 0.5, 0.9]


def test_cosine_by_hand() -> None:
    ones = np.ones((2, 32), np.float32)
    assert cosine([ones], [ones * [[1], [-1]]]) == pytest.approx(
        0.0
    )  # mean over two tokens, 1 and -1
    assert cosine([np.array([[3.0], [4.0]])], [np.array([[4.0], [3.0]])]) == pytest.approx(
        24 / 25
    )  # a regression


@pytest.mark.parametrize(
    ("dynamic_loses", "static_loses", "method"), [(0.009, 0, "dynamic"), (0.02, 0.01, "static")]
)
def test_static_calibration_is_tried_where_dynamic_loses_more_than_a_percent(
    graph: Path, rows: Rows, tmp_path: Path, monkeypatch, dynamic_loses, static_loses, method
) -> None:
    shutil.copy(graph, tmp_path / "model.onnx")
    seen = []

    def compare(exact, int8, batches, task):
        seen.append((int8.name, batches is rows.report))
        loses = static_loses if int8.name.startswith("static") else dynamic_loses
        return {"cosine": 0.95, "score": 0.5, "int8_score": 0.5 * (1 - loses)}

    monkeypatch.setattr(kdnas.deploy.quantize, "compare", compare)
    result = write_best_int8(tmp_path / "model.onnx", tmp_path / "model.int8.onnx", rows)
    assert result["method"] == method and result["rows"] == rows.name
    expected = [
        ("model.int8.onnx", False),
        *[("static.model.int8.onnx", False)] * (method == "static"),
    ]
    assert seen == [*expected, ("model.int8.onnx", True)]
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.int8.onnx"}
    nodes = {node.op_type for node in onnx.load(tmp_path / "model.int8.onnx").graph.node}
    assert ("DynamicQuantizeLinear" in nodes) == (method == "dynamic")


def test_a_static_graph_that_is_no_better_is_not_taken(
    graph: Path, rows: Rows, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(kdnas.deploy.quantize, "compare", lambda *args: {"cosine": 0.95})
    assert write_best_int8(graph, tmp_path / "model.int8.onnx", rows)["method"] == "dynamic"


def test_both_graphs_agree_with_the_exact_one(
    graph: Path, rows: Rows, tmp_path: Path, monkeypatch
) -> None:
    for most_lost, method in ((1.0, "dynamic"), (-1.0, None)):
        monkeypatch.setattr(kdnas.deploy.quantize, "MOST_LOST", most_lost)
        result = write_best_int8(graph, tmp_path / "model.int8.onnx", rows)
        assert result["method"] == method or method is None
        assert 0.97 < result["cosine"] <= 1


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_outputs_that_have_little_to_do_with_each_other_are_refused(
    graph: Path, rows: Rows, tmp_path: Path, monkeypatch, value
) -> None:
    monkeypatch.setattr(kdnas.deploy.quantize, "cosine", lambda *args: value)
    with pytest.raises(
        ParityError,
        match=f"logits of model.int8.onnx have a cosine of {value:.3f} .* 0.9 is needed",
    ):
        write_best_int8(graph, tmp_path / "model.int8.onnx", rows)
