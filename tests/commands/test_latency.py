"""``kdnas latency``: what it measures, and what it refuses before it measures anything."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import kdnas.commands.latency
from kdnas.cli.main import main
from kdnas.deploy.latency import Latency
from kdnas.deploy.onnx import write_deployed
from kdnas.models.encoders import build_classifier
from tests.conftest import save_teacher


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would be measured; the n-th model takes n ms."""
    calls: list = []

    def fake(models, settings):
        calls.append((models, settings))
        return [Latency(n + 1.0, 0.5, 10, n + 2.0, 1000.0, 10.0) for n in range(len(models))]

    monkeypatch.setattr(kdnas.commands.latency, "measure_latency", fake)
    return calls


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "student", hidden_size=32, num_hidden_layers=1)


def test_every_combination_is_measured_with_all_models_in_turn(
    tiny_teacher: Path, student: Path, tmp_path: Path, measured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "figures.json"
    options = [
        "--backend",
        "torch",
        "torch-bf16",
        "--batch",
        "1",
        "8",
        "--length=16",
        "--length=32",
        "--threads",
        "1",
    ]
    assert (
        main(
            [
                "latency",
                "--model",
                str(tiny_teacher),
                "--model",
                str(student),
                *options,
                f"--json={path}",
            ]
        )
        == 0
    )
    asked = [(s.backend, s.batch_size, s.length, s.num_threads) for _, s in measured]
    assert asked == [
        (b, n, t, 1) for b in ("torch", "torch-bf16") for n in (1, 8) for t in (16, 32)
    ]
    sizes = [[model.config.hidden_size for model in models] for models, _ in measured]
    assert sizes == [[64, 32]] * 8
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 16
    assert rows[1] == {
        "model": str(student),
        "backend": "torch",
        "device": "cpu",
        "threads": 1,
        "batch": 1,
        "length": 16,
        "megabytes": rows[1]["megabytes"],
        "median_ms": 2.0,
        "iqr_ms": 0.5,
        "num_runs": 10,
        "p95_ms": 3.0,
        "tokens_per_second": 1000.0,
        "sequences_per_second": 10.0,
        "speedup": 0.5,
    }
    assert rows[9]["megabytes"] == rows[1]["megabytes"] / 2 > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    assert "torch-bf16" in capsys.readouterr().out


def test_models_of_one_name_are_told_apart(
    tmp_path: Path, measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        save_teacher(tmp_path / run / "student", hidden_size=32) for run in ("mine", "other")
    ]
    drawn, draw = [], kdnas.commands.latency._draw
    monkeypatch.setattr(
        kdnas.commands.latency, "_draw", lambda rows: drawn.append(draw(rows)) or drawn[0]
    )
    models = [f"--model={folder}" for folder in folders]
    assert main(["latency", *models, "--length=16", f"--json={tmp_path / 'a.json'}"]) == 0
    shown = capsys.readouterr().out
    assert "mine/student" in shown and "other/student" in shown
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["mine/student, torch, 1 thread", "other/student, torch, 1 thread"]


def test_it_is_said_which_device_where_not_all_is_of_the_cpu(
    student: Path,
    tmp_path: Path,
    measured,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (student / "model.onnx").write_bytes(b"graph")
    monkeypatch.setattr(kdnas.deploy.latency, "_devices", lambda: ["cpu", "cuda", "cuda:0"])
    path = tmp_path / "a.json"
    options = ["--length=16", "--backend", "torch", "cuda", "onnxruntime", f"--json={path}"]
    for device, shown in (
        ("cuda:0", ["torch, cuda:0", "cuda, cuda:0", "onnxruntime "]),
        ("cpu", ["torch ", "cuda "]),
    ):
        assert main(["latency", f"--model={student}", f"--device={device}", *options]) == 0
        table = capsys.readouterr().out
        assert all(f" {backend}" in table for backend in shown)
        devices = [row["device"] for row in json.loads(path.read_text())["rows"]]
        assert devices == [device, "cuda" if device == "cpu" else device, "cpu"]


def test_an_exported_file_is_measured_as_it_is(student: Path, tmp_path: Path, measured) -> None:
    (student / "model.onnx").write_bytes(b"8" * 3_000_000)
    assert (
        main(
            [
                "latency",
                f"--model={student}",
                "--backend=onnxruntime",
                f"--json={tmp_path / 'a.json'}",
            ]
        )
        == 2
    )
    assert measured == []  # 128 tokens are more than the tiny one takes
    options = ["--length=16", f"--json={tmp_path / 'a.json'}"]
    assert main(["latency", f"--model={student}", "--backend=onnxruntime", *options]) == 0
    assert [models for models, _ in measured] == [[student / "model.onnx"]]
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["megabytes"] == 3.0


def test_a_workload_is_measured_for_real(
    tiny_teacher: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("4\n9\n13\n")
    written = []

    def write(model, folder, int8):
        written.append(int8)
        return write_deployed(model, folder, int8)

    monkeypatch.setattr(kdnas.commands.latency, "write_deployed", write)
    options = [
        f"--lengths={lengths}",
        "--min-seconds=0.01",
        f"--json={tmp_path / 'a.json'}",
        "--batch",
        "1",
        "2",
        "64",
    ]
    assert main(["latency", f"--model={tiny_teacher}", "--backend=onnxruntime-int8", *options]) == 0
    assert written == [True]  # once for both batch sizes
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, None), (2, None), (3, None)], (
        "as large as there are"
    )
    assert "3 x workload" in capsys.readouterr().out
    assert all(row["median_ms"] > 0 and row["speedup"] == 1 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_beside_the_cpu(tiny_teacher: Path, tmp_path: Path) -> None:
    options = ["--length=16", "--min-seconds=0.01", f"--json={tmp_path / 'a.json'}"]
    assert main(["latency", f"--model={tiny_teacher}", "--backend", "torch", "cuda", *options]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["backend"] for row in found["rows"]] == ["torch", "cuda"] and found["machine"][
        "gpu"
    ]
    assert all(row["median_ms"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threads=0", "latency.num_threads is 0"),
        ("--batch=0", "latency.batch_size is 0"),
        ("--batch=x", "batch"),
        ("--length=41", "latency.length is 41, but this bert model takes at most 40 tokens"),
        ("--backend=onnx", "latency.backend is 'onnx'"),
        ("--device=tpu", "latency.device is 'tpu'"),
        ("--lengths=/nowhere.jsonl", "cannot read '/nowhere.jsonl'"),
        ("--model=/nowhere/at/all", "There is no folder '/nowhere/at/all': give one"),
        ("--min-seconds=0", "latency.min_seconds is 0"),
        ("--modell=x", "Did you mean 'model'?"),
        ("--json=/proc/kdnas/a.json", "Cannot write to '/proc/kdnas'"),
        (
            "--json=a.png",
            "json is 'a.png', which is a folder or a .png file: give a file that ends with .json",
        ),
        ("--json=", "json is '', which is a folder or a .png file"),
        ("--json=.", "json is '.', which is a folder or a .png file"),
        ("--json=/proc", "json is '/proc', which is a folder or a .png file"),
    ],
)
def test_bad_input_gets_one_line_and_measures_nothing(
    option: str,
    message: str,
    tiny_teacher: Path,
    tmp_path: Path,
    measured,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.json"
    lengths = [] if "length" in option else ["--length=16"]
    assert main(["latency", f"--model={tiny_teacher}", *lengths, f"--json={path}", option]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert measured == [] and not path.exists()


def test_cuda_without_a_gpu_and_a_folder_without_weights_are_refused(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert main(["latency", f"--model={student}", "--backend=cuda", "--length=16"]) == 2
    assert "latency.device is 'cuda'" in capsys.readouterr().err
    (student / "model.safetensors").unlink()
    assert main(["latency", f"--model={student}", "--length=16"]) == 2
    assert f"{str(student)!r} has no weights" in capsys.readouterr().err


def test_the_files_of_a_graph_carry_its_config(
    tiny_teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "kdnas.deploy.onnx.write_onnx", lambda model, path, names: path.write_bytes(b"graph")
    )
    config = AutoConfig.from_pretrained(tiny_teacher)
    path = write_deployed(build_classifier(config), tmp_path / "graph", int8=False)
    assert AutoConfig.from_pretrained(path.parent).hidden_size == 64
