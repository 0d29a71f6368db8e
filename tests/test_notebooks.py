"""The notebooks: they define nothing, are small, and run on anything."""

import ast
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import write_task

ROOT = Path(__file__).parents[1] / "notebooks"
NAMES = ["compare_samplers", "glue", "kd", "kd_nas_lstm"]
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
}


def read(name: str) -> Any:
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_four() -> None:
    assert sorted(path.stem for path in ROOT.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_explains_and_defines_nothing(name: str) -> None:
    notebook = read(name)
    cells = code_cells(notebook)
    trees = [ast.parse(cell.source) for cell in cells]
    assert all(isinstance(node, ast.Assign) for node in trees[0].body), (
        "the first cell is parameters alone"
    )
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [node for tree in trees for node in ast.walk(tree) if isinstance(node, definitions)]
    assert len(notebook.cells) - len(cells) > len(cells) / 2, "text goes with code"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1, (
        "of a real run, with pictures"
    )
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run once, from top to bottom"
    )
    content = (ROOT / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(content) < 200_000
    assert not [path for path in (str(ROOT.resolve().parent), sys.prefix) if path in content]


@pytest.mark.slow
def test_all_of_them_run_on_tiny_inputs(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path / "task", labels=(0, 1, 2), num_rows=48)
    values: dict[str, Any] = {
        "TEACHER": str(tiny_teacher),
        "TEXT": str(text_file),
        "TASK": str(task),
        "ROOT": str(tmp_path / "runs"),
        "SHAPE": SHAPE,
        "SPACE": {
            "num_hidden_layers": [1, 2],
            "num_attention_heads": [2],
            "hidden_size": [32, 64],
            "intermediate_size": [64],
            "hidden_act": ["gelu"],
        },
        "SHARE": 0.3,
        "SPEEDUP": 0.01,
        "NUM_CANDIDATES": 2,
        "NUM_EPISODES": 2,
        "MAX_LENGTH": 24,
        "BATCH_TOKENS": 256,
        "MIN_SECONDS": 0.01,
        "NUM_EPOCHS": 1,
        "KD_EPOCHS": 1,
        "NUM_SEEDS": 2,
        "LEARNING_RATE": 1e-3,
        "BATCH_SIZE": 16,
        "SAMPLERS": ["random", "tpe", "lstm"],
    }
    whole = new_notebook()  # all in one kernel, whose start and imports take the longest
    for name in NAMES:
        cells = code_cells(read(name))
        asked = {
            target.id
            for node in ast.walk(ast.parse(cells[0].source))
            if isinstance(node, ast.Assign)
            for target in ast.walk(node.targets[0])
            if isinstance(target, ast.Name)
        }
        parameters = "".join(
            f"{parameter} = {values[parameter]!r}\n" for parameter in sorted(asked)
        )
        whole.cells += [new_code_cell("%reset -f"), new_code_cell(parameters)]
        whole.cells += [new_code_cell(cell.source) for cell in cells[1:]]
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    NotebookClient(
        whole, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [output for cell in whole.cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 9
    for run in ("notebook_lstm", "notebook_samplers", "notebook_glue", "notebook_kd"):
        assert (tmp_path / "runs" / run).is_dir()
    assert not (tmp_path / "lightning_logs").exists(), "everything is below ROOT"
