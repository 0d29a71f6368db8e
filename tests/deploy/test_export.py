import errno
import hashlib
import io
import itertools
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import kdnas.deploy.export
from kdnas.deploy.card import model_card
from kdnas.deploy.export import (
    _check_parity,
    _parity_lengths,
    export_student,
    load_student,
)
from kdnas.deploy.onnx import write_onnx
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, build_student, max_length, student_config
from kdnas.models.families import marks_pairs
from kdnas.system.errors import ParityError, UserError
from tests.conftest import make_rows, save_teacher

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64)
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "manifest.json",
}
FILES |= {"model.onnx", "model.int8.onnx", "predict.py"}
HOSTILE = 'a: "b" | c\n---\n# [d](http://e) <f> `g'
CARD = {
    "name": HOSTILE,
    "teacher": HOSTILE,
    "base_model": HOSTILE,
    "made": "searched and distilled",
    "sections": {"Scores": {"accuracy": 0.8125, HOSTILE: HOSTILE}},
}
PLAIN = {"name": "tiny", "teacher": "a tiny teacher", "sections": {}}


def save_classifier(teacher: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    build_classifier(
        student_config(AutoConfig.from_pretrained(teacher), ARCH), num_labels=3
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(
    any_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, float]]:
    """A three-label student of each family: its folder, the export of it, and what ``export_student`` returned."""
    root = tmp_path_factory.mktemp(any_teacher.name)
    source = save_classifier(any_teacher, root / "source")
    return source, root / "student", export_student(source, root / "student", card=CARD)


@pytest.fixture
def source(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A small classifier to break."""
    return save_classifier(tiny_teacher, tmp_path / "source")


@pytest.fixture(scope="module")
def graph(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of ``source``."""
    folder = tmp_path_factory.mktemp("graph")
    model, tokenizer = load_student(save_classifier(tiny_teacher, folder / "source"))
    write_onnx(model, folder / "model.onnx", tokenizer.model_input_names)
    return folder / "model.onnx"


def test_onnxruntime_does_not_fuse_additions_with_the_norms_behind_them(
    graph: Path, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_it_runs.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "as_it_runs.onnx").graph.node)
    assert kinds["LayerNormalization"] == kinds["Sum"] > 1 and "SkipLayerNormalization" not in kinds


@pytest.mark.parametrize("longest", [2, 3, 40, 512])
def test_lengths_that_are_checked_go_from_one_token_to_the_longest(longest: int) -> None:
    lengths = _parity_lengths(longest)
    assert lengths == sorted(set(lengths)) and (lengths[0], lengths[-1]) == (1, longest)
    assert all(after <= 2 * before for before, after in itertools.pairwise(lengths))


def batches(folder: Path, form: str) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (["paper"], [" ".join(["river"] * 100)], make_rows(5, seed=3))
    return [
        dict(tokenizer(text, padding=True, truncation=True, return_tensors=form)) for text in texts
    ]


@contextmanager
def hear() -> Iterator[list]:
    """What is printed, warned and logged by the exporter within."""
    heard: list = []
    logger = logging.getLogger("torch.onnx")
    level, handler = logger.level, logging.Handler()
    handler.emit = heard.append
    logger.addHandler(handler)
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield heard
        finally:
            logger.removeHandler(handler)
    heard += [str(warning.message) for warning in warned] + printed.getvalue().splitlines()
    assert logger.level == level


def test_the_folder_holds_the_model_twice_with_tokenizer_and_card(classifier):
    _, folder, report = classifier
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert report == report | {
        "onnx_megabytes": (folder / "model.onnx").stat().st_size / 1e6,
        "int8_megabytes": (folder / "model.int8.onnx").stat().st_size / 1e6,
        "safetensors_megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "opset": onnx.load(folder / "model.onnx").opset_import[0].version,
    }
    assert report["int8"]["method"] in ("dynamic", "static") and 0.9 < report["int8"]["cosine"] <= 1
    assert [(row["batch"], row["length"]) for row in report["latency"]][0] == (1, 16)
    assert all(
        row[name] > 0 for row in report["latency"] for name in ("torch_ms", "onnx_ms", "int8_ms")
    )
    assert 0 <= report["max_abs_difference"] <= 1e-4
    for name in ("model.onnx", "model.int8.onnx"):
        assert b"site-packages" not in (folder / name).read_bytes(), (
            "where it was made is nobody's business"
        )
    assert {path.name for path in folder.parent.iterdir()} == {"source", "student"}


def test_the_onnx_graph_gives_the_logits_of_the_source(classifier):
    source, folder, _ = classifier
    model = AutoModelForSequenceClassification.from_pretrained(source)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    # ALBERT's tokenizer does not mark the second sentence of itself.
    names = ["input_ids", "attention_mask", *["token_type_ids"] * marks_pairs(model.config)]
    assert [node.name for node in session.get_inputs()] == names
    assert [node.shape for node in session.get_inputs()] == [["batch", "length"]] * len(names)
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 3])]
    lengths = []
    for torch_batch, batch in zip(batches(folder, "pt"), batches(folder, "np"), strict=True):
        (found,) = session.run(["logits"], batch)
        np.testing.assert_allclose(found, model(**torch_batch).logits.detach(), atol=1e-5)
        lengths.append(batch["input_ids"].shape[1])
    assert lengths[:2] == [3, max_length(model.config)]
    assert (
        np.ptp(found, axis=0).min() > 1e-3
    )  # the rows of a batch differ, so the comparison says something


def test_the_torch_model_of_the_export_is_the_source(classifier):
    source, folder, _ = classifier
    expected, found = (
        load_file(source / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("task", "metrics", "expected"),
    [
        (
            "mnli",
            {"accuracy_matched": 0.81239, "accuracy_mismatched": 0.5},
            [
                ("nyu-mll/glue", "mnli", "validation_matched", "accuracy", 0.8124),
                ("nyu-mll/glue", "mnli", "validation_mismatched", "accuracy", 0.5),
            ],
        ),
        (
            "stsb",
            {"pearson": 0.5, "spearman": 0.25},
            [
                ("nyu-mll/glue", "stsb", "validation", "pearsonr", 0.5),
                ("nyu-mll/glue", "stsb", "validation", "spearmanr", 0.25),
            ],
        ),
        (HOSTILE, {"f1": 0.5}, [(HOSTILE, None, "validation", "f1", 0.5)]),
    ],
)
def test_the_hub_finds_the_results_in_the_card(source: Path, task, metrics, expected):
    model, tokenizer = load_student(source)
    report = {
        **dict.fromkeys(("safetensors_megabytes", "int8_megabytes", "max_abs_difference"), 1.0),
        **{"int8": {"cosine": 1.0, "rows": "rows"}, "latency": [], "opset": 20},
    }
    card = CARD | {"task": task, "metrics": metrics}
    data = ModelCard(model_card(model, tokenizer, card, report)).data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert (name, results) == (HOSTILE, data.eval_results)
    assert [
        (
            one.dataset_type,
            one.dataset_config,
            one.dataset_split,
            one.metric_type,
            one.metric_value,
        )
        for one in results
    ] == expected
    assert {one.task_type for one in results} == {"text-classification"}


def test_the_card_is_valid_and_nothing_from_outside_breaks_it(classifier):
    _, folder, report = classifier
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["knowledge-distillation", "neural-architecture-search", "kdnas", "onnx"],
        "base_model": HOSTILE,
        "license": "unknown",
    }
    plain = r'a: "b" \| c --- \# \[d\](http://e) \<f\> \`g'
    assert f"\n# {plain}\n" in text
    assert (
        f"A text classifier that was searched and distilled with kdnas. Its teacher: {plain}."
        in text
    )
    assert f"\n| {plain} | {plain} |\n" in text
    assert "\n| accuracy | 0.8125 |\n" in text
    assert "\n| hidden_size | 32 |\n" in text
    assert f"opset {report['opset']}" in text
    assert not re.search(r"(?<!\\)\]\(", ModelCard(text).text)
    assert str(folder.parent) not in text


@pytest.mark.parametrize("any_teacher", ["bert"], indirect=True)
def test_the_card_code_runs_where_kdnas_is_not(classifier):
    _, folder, _ = classifier
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert [len(block.splitlines()) for block in blocks] == [5, 5]
    plain = (
        "from transformers import AutoModel; print(type(AutoModel.from_pretrained('.')).__name__)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(["import sys; sys.modules['kdnas'] = None", *blocks, plain]),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from_torch, from_onnx, name = done.stdout.splitlines()
    numbers = [
        [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
        for line in (from_torch, from_onnx)
    ]
    assert len(numbers[0]) == 3
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)
    assert name == "BertModel"


def test_an_encoder_gives_its_hidden_states_without_pooler_and_without_noise(
    tiny_teacher: Path, tmp_path: Path
):
    torch.manual_seed(2)
    student = build_student(AutoConfig.from_pretrained(tiny_teacher), ARCH).eval()
    student.save_pretrained(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "source")
    folder = tmp_path / "student"
    with hear() as heard:
        export_student(tmp_path / "source", folder, card=PLAIN)
    assert heard == []
    assert load_file(folder / "model.safetensors").keys() == student.state_dict().keys()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [node.name for node in session.get_inputs()] == tokenizer.model_input_names
    assert [node.name for node in session.get_outputs()] == ["last_hidden_state"]
    reloaded = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    for torch_batch, batch in zip(batches(folder, "pt"), batches(folder, "np"), strict=True):
        torch_batch["token_type_ids"][:, 2:] = 1
        batch["token_type_ids"][:, 2:] = 1
        (found,) = session.run(None, batch)
        real = batch["attention_mask"].astype(bool)
        for model in (student, reloaded):
            expected = model(**torch_batch).last_hidden_state.detach().numpy()
            np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    front = ModelCard((folder / "README.md").read_text()).data.to_dict()
    assert front["pipeline_tag"] == "feature-extraction" and "base_model" not in front


def add_half(logits):
    return logits + (0.5 if len(logits) == 8 else 0.0)


def lose_a_number(logits):
    return np.where(logits == logits.max(), np.nan, logits) if len(logits) == 8 else logits


def ignore_mask(batch):
    return batch | {"attention_mask": np.ones_like(batch["attention_mask"])}


@pytest.mark.parametrize(
    ("change_batch", "change_logits", "message"),
    [
        (dict, add_half, "by 0.5 at batch size 8 and length 1, but only 0.0001 is allowed"),
        (dict, lose_a_number, "by nan at batch size 8 and length 1"),
        (ignore_mask, np.copy, r"by [\d.e-]+ at batch size 8 and length [235]"),
    ],
)
def test_a_graph_that_disagrees_leaves_the_old_folder_as_it_was(
    source: Path, graph: Path, tmp_path: Path, monkeypatch, change_batch, change_logits, message
):
    class Off(onnxruntime.InferenceSession):
        def run(self, names, batch):
            return [change_logits(logits) for logits in super().run(names, change_batch(batch))]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    # The same weights: what the exporter would write.
    monkeypatch.setattr(
        "kdnas.deploy.export.write_onnx", lambda model, path, names: shutil.copy(graph, path)
    )
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(ParityError, match=f"logits differs from torch's {message}"):
        export_student(source, folder, card=PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "student"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def remove_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


def cut_weights(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_head(source: Path) -> None:
    config = (source / "config.json").read_text()
    save_teacher(source, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    (source / "config.json").write_text(config)


def give_several_labels(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"problem_type": "multi_label_classification"})
    )


def give_other_inputs(source: Path) -> None:
    path = source / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "bbox"]})
    )


def tag_tokens(source: Path) -> None:
    AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(source)).save_pretrained(
        source
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (tag_tokens, "the head of BertForTokenClassification cannot be exported"),
        (give_several_labels, "the classifier predicts several labels at once: give one that"),
        (remove_tokenizer, "has no tokenizer"),
        (give_other_inputs, "the tokenizer returns 'bbox', an input that is not supported"),
        (cut_weights, "incomplete|truncated|[Hh]eader|deserializing"),
        (lose_head, r"the weights lack 'classifier.bias' \(and 1 more\)"),
        (shutil.rmtree, "."),
    ],
)
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_made(
    source: Path, tmp_path: Path, spoil, reason
):
    spoil(source)
    with pytest.raises(
        UserError, match=f"Cannot export {re.escape(repr(str(source)))}: .*({reason})"
    ):
        export_student(source, tmp_path / "student", card=PLAIN)
    assert not (tmp_path / "student").exists()


# What is new beside the graph


@pytest.fixture
def fast(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of ``source`` without the exporter's seconds."""
    monkeypatch.setattr(
        "kdnas.deploy.export.write_onnx", lambda model, path, names: shutil.copy(graph, path)
    )


def test_rows_whose_attention_would_take_gigabytes_are_not_compared(
    graph: Path, source: Path, monkeypatch
):
    seen, batch = [], kdnas.deploy.export.random_batch
    monkeypatch.setattr(kdnas.deploy.export, "MOST_SCORES", 2 * 20**2)  # of two heads
    monkeypatch.setattr(
        kdnas.deploy.export, "random_batch", lambda *args: seen.append(args[1]) or batch(*args)
    )
    model, tokenizer = load_student(source)
    _check_parity(model, tokenizer, graph, 1e-4)
    assert max(map(max, seen)) == 20
    assert max(max(lengths) for lengths in seen if len(lengths) == 8) == 5


@pytest.mark.usefixtures("fast")
def test_the_manifest_has_the_hash_of_every_file_and_what_was_checked(source: Path, tmp_path: Path):
    report = export_student(source, tmp_path / "student", card=PLAIN, min_seconds=0.001)
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    for name, known in manifest["files"].items():
        content = (tmp_path / "student" / name).read_bytes()
        assert known == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["checks"] == json.loads(json.dumps(report))
    text = (tmp_path / "student" / "README.md").read_text()
    assert (
        "Licence: not stated" in text and "A text classifier that was exported with kdnas." in text
    )
    assert ModelCard(text).data.tags == ["kdnas", "onnx"]
    config = json.loads((source / "config.json").read_text()) | {"teacher_sha256": "abc"}
    (source / "config.json").write_text(json.dumps(config))
    export_student(
        source,
        tmp_path / "licensed",
        card=PLAIN | {"license": "mit", "text": "a b"},
        length=9,
        min_seconds=0.001,
    )
    text = (tmp_path / "licensed" / "README.md").read_text()
    assert (
        ModelCard(text).data.license == "mit"
        and "distilled on a b." in text
        and "up to 9 tokens" in text
    )
    assert "that was distilled with kdnas" in text
    assert ModelCard(text).data.tags == ["knowledge-distillation", "kdnas", "onnx"]
    assert AutoTokenizer.from_pretrained(tmp_path / "licensed").model_max_length == 9


@pytest.mark.usefixtures("fast")
def test_classes_that_count_from_1_count_from_0_where_they_are_deployed(
    source: Path, tmp_path: Path
):
    config = json.loads((source / "config.json").read_text())
    config |= {"id2label": {"1": "a", "2": "b", "3": "c"}, "label2id": {"a": 1, "b": 2, "c": 3}}
    (source / "config.json").write_text(json.dumps(config))
    export_student(source, tmp_path / "student", card=PLAIN, min_seconds=0.001)
    found = AutoConfig.from_pretrained(tmp_path / "student")
    assert found.id2label == {0: "a", 1: "b", 2: "c"} and found.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.usefixtures("fast")
def test_predict_needs_neither_torch_nor_transformers(source: Path, tmp_path: Path):
    folder = tmp_path / "student"
    export_student(source, folder, card=PLAIN, min_seconds=0.001)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'kdnas')))\n"
        "import runpy; sys.argv = ['predict.py', *sys.argv[1:]]; runpy.run_path('predict.py', run_name='__main__')"
    )

    def predict(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True
        )

    done = predict("the river", "paper " * 100)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer(
        ["the river", "paper " * 100], padding=True, truncation=True, return_tensors="pt"
    )
    expected = model(**batch).logits.softmax(-1).max(-1)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in found] == [
        model.config.id2label[int(i)] for i in expected.indices
    ], done.stderr
    assert [row["probability"] for row in found] == pytest.approx(
        expected.values.tolist(), abs=1e-5
    )
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("id2label")["0"] == "LABEL_0"
    (folder / "config.json").write_text(
        json.dumps(config)
    )  # as transformers saves two classes without names
    assert predict("the river", "paper " * 100).stdout == done.stdout
    pair = json.loads(predict("--int8", "--pair", "the river", "a stone").stdout)
    batch = tokenizer("the river", "a stone", return_tensors="pt")
    assert pair["probability"] == pytest.approx(
        float(model(**batch).logits.softmax(-1).max()), abs=0.05
    )
    assert (
        predict().returncode
        == predict("--pair", "one").returncode
        == predict("--help").returncode
        == 2
    )


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("length", [1, 41])
def test_a_length_beyond_the_positions_is_refused(source: Path, tmp_path: Path, length: int):
    with pytest.raises(
        UserError, match=f"length is {length}, but the student .* takes from 2 to 40 tokens"
    ):
        export_student(source, tmp_path / "student", card=PLAIN, length=length)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("fast")
def test_a_full_disk_and_a_wrong_tokenizer_leave_nothing(source: Path, tmp_path: Path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("kdnas.deploy.export.write_best_int8", full)
        export_student(source, tmp_path / "student", card=PLAIN)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ParityError, match="predict.py gives other input_ids than"),
    ):
        patch.setattr(
            "kdnas.deploy.predict.Predictor.encode",
            lambda self, texts: {"input_ids": np.zeros((3, 2))},
        )
        export_student(source, tmp_path / "student", card=PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
