import base64
import hashlib
import io
import math
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState
from rich.console import Console

from kdnas.cli.parser import read_config
from kdnas.commands.config import GlueConfig, Grid
from kdnas.deploy.latency import LatencySettings
from kdnas.nas.trials import line, trials_frame
from kdnas.report.page import result_rows, result_table, write_report
from kdnas.report.tables import front_table
from kdnas.system.files import Run, write_json, write_text
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.training.trainer import TrainerSettings

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "col"}
CHECKED = {"max_abs_difference": 1e-6, "int8": {"cosine": 0.999, "rows": "9 texts"}}
CONFIG = {
    "teacher": "bert-tiny",
    "text": "notes.parquet",
    "task": "topics",
    "search": {"n_trials": 3},
}


class Page(HTMLParser):
    """Tags with their attributes, the text, and a check that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def row_of(html: str, number: int) -> list[str]:
    """The cells of a candidate's row."""
    (found,) = [
        row for row in re.findall(r"<tr.*?</tr>", html) if re.search(rf"<td>{number}</td>", row)
    ]
    return re.findall(r"<td[^>]*>(.*?)</td>", found)


def svgs(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


def measured(layers: int, latency_ms: float, **others: object) -> dict[str, object]:
    """What the budget gate writes down, teacher at 20 ms."""
    arch = {
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "hidden_act": "relu",
    }
    return {
        "arch": arch,
        "num_parameters": layers * 1_230_000,
        "latency_ms": latency_ms,
        "latency_iqr_ms": latency_ms / 16,
        "teacher_latency_ms": 20.0,
        "teacher_latency_iqr_ms": 0.5,
        "speedup": 20 / latency_ms,
        **others,
    }


def trained(layers: int, latency_ms: float, loss: float, reward: float) -> dict[str, object]:
    """What a candidate that was trained for two epochs has."""
    history = [
        {"epoch": 0, "loss": 2 * loss, "contextual_share": 0.05, "sentence_r2": 1 - 2 * loss},
        {"epoch": 1, "loss": loss, "contextual_share": 0.125, "sentence_r2": 1 - loss},
    ]
    last = {"loss": loss, "contextual_share": 0.125, "sentence_r2": 1 - loss}
    return measured(layers, latency_ms, **last, reward=reward, history=history, seconds=12.34)


def add(
    study: optuna.Study, state: TrialState, value: float | None = None, **attrs: object
) -> None:
    study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attrs))


def make_study(**attrs: object) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for name, value in attrs.items():
        study.set_user_attr(name, value)
    return study


def make_results(**student: object) -> dict[str, object]:
    def row(score: float, num_parameters: int, latency_ms: float) -> dict[str, object]:
        return {
            "score": score,
            "metrics": {"accuracy": score},
            "num_parameters": num_parameters,
            "megabytes": num_parameters * 4e-6,
            "latency_ms": latency_ms,
            "latency_iqr_ms": min(0.25, latency_ms / 10),
            "speedup": 20 / latency_ms,
            "share_kept": score / 0.8,
            "seconds": 3.0,
            "history": [{"epoch": 0, "score": score / 2}, {"epoch": 1, "score": score}],
        }

    return {
        "task": {
            "name": "topics",
            "metric": "accuracy",
            "num_labels": 4,
            "num_train": 300,
            "num_validation": 60,
        },
        "models": {
            "teacher": row(0.8, 11_170_000, 20.0),
            "student": row(0.776, 2_140_000, 4.0) | student,
            "random": row(0.6, 2_140_000, 4.1),
            "static": row(0.5, 500_000, 0.1),
            "layer_cut": row(0.7, 5_140_000, 8.0),
        },
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path, "fake")
    write_text(run.config, yaml.safe_dump(CONFIG))
    return run


def every_kind() -> optuna.Study:
    """Two finished, one refused, one failed, one that repeats the best, one whose process died, one in the queue."""
    study = make_study(budget={"speedup": 4.0, "latency_ms": None})
    add(study, TrialState.COMPLETE, 0.71, **trained(1, 2.5, 0.3333, 0.7111))
    add(study, TrialState.COMPLETE, 0.82, **trained(2, 4.0, 0.2222, 0.8222))
    add(
        study,
        TrialState.PRUNED,
        **measured(3, 6.25, refused="3.20x as fast as the teacher, 4x is asked for"),
    )
    add(study, TrialState.FAIL, **measured(4, 1.25, failed="the training loss is inf at step 7"))
    add(study, TrialState.COMPLETE, 0.82, **trained(2, 4.0, 0.2222, 0.8222), twin_of=1)
    add(study, TrialState.FAIL, arch=measured(5, 1.0)["arch"])
    study.enqueue_trial({})
    return study


def whole(root: Path, name: str = "fake") -> Run:
    """A run whose stages are all done."""
    run = Run(root, name)
    write_text(run.best_student, "")
    write_text(run.config, yaml.safe_dump(CONFIG))
    kd = trained(2, 4.0, 0.1818, 0.0)
    names = (
        "arch",
        "num_parameters",
        "loss",
        "contextual_share",
        "sentence_r2",
        "seconds",
        "history",
    )
    write_json(
        run.full_kd / "result.json",
        {name: kd[name] for name in names}
        | {
            "num_rows": 90,
            "num_epochs": 2,
            "vector_cosine": 0.9125,
            "similarity_order": 0.8765,
        },
    )
    write_json(run.glue / "results.json", make_results())
    return run


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a whole run with every kind of trial."""
    return write_report(whole(tmp_path_factory.mktemp("logs")), every_kind()).read_text(
        encoding="utf-8"
    )


def test_the_report_is_one_well_formed_file_that_asks_for_nothing(html):
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"} == set()
    urls = [
        attrs[name]
        for _, attrs in page.tags
        for name in ("src", "href", "xlink:href")
        if name in attrs
    ]
    assert [url for url in urls if not url.startswith("#")] == []
    assert re.findall(r"@import|url\((?!#)", html) == []
    (script,) = re.findall(r"(?s)<script>(.*?)</script>", html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in [
        attrs for _, attrs in page.tags
    ]


def test_ids_are_unique_and_every_reference_within_the_pictures_is_met(html):
    ids = [attrs["id"] for _, attrs in Page(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 4
    assert set(re.findall(r'(?:href="|url\()#(\w+)', html)) == set(ids)
    assert len(svgs(html)) == 4


def test_every_trial_is_there_with_its_numbers_best_first(html):
    numbers = ["2.46", "4.00", "5.0x", "0.2222", "0.7778", "0.125", "0.8222", "12.3"]
    assert row_of(html, 1) == ["1", "finished", "2 x 64, 2 heads, 96 relu", *numbers, ""]
    assert row_of(html, 4)[1:2] + row_of(html, 4)[-1:] == ["repeated", "same shape as trial 1"]
    refused = [
        "2",
        "refused",
        "3 x 64, 2 heads, 96 relu",
        "3.69",
        "6.25",
        "3.2x",
        "-",
        "-",
        "-",
        "-",
        "-",
    ]
    assert row_of(html, 2) == [*refused, "3.20x as fast as the teacher, 4x is asked for"]
    assert row_of(html, 3)[1:2] + row_of(html, 3)[-1:] == [
        "failed",
        "the training loss is inf at step 7",
    ]
    assert row_of(html, 5)[1:5] == ["failed", "5 x 64, 2 heads, 96 relu", "-", "-"]
    assert re.findall(r'<tr(?: class="\w+")?><td>(\d+)</td>', html) == [
        "1",
        "4",
        "0",
        "2",
        "3",
        "5",
    ]
    assert re.findall(r'<tr class="best"><td>(\d+)</td>', html) == ["1"]
    assert "2 finished, 1 repeated, 1 refused, 2 failed." in Page(html).text


def test_the_leaders_of_each_episode_are_told_and_what_a_controller_predicted(tmp_path):
    study = make_study(num_candidates=2)
    for place, (reward, predicted) in enumerate(
        [(0.5, None), (0.6, None), (0.4, 0.45), (0.7, 0.65), (0.55, 0.7)]
    ):
        more = {} if predicted is None else {"predicted_reward": predicted}
        attrs = trained(place + 1, 2.5, 1 - reward, reward) | more
        add(study, TrialState.COMPLETE, reward, **attrs)
    frame = trials_frame(study)
    assert frame["episode"].tolist() == [1, 1, 2, 2, 3]
    assert frame["best_so_far"].tolist() == [0.5, 0.6, 0.6, 0.7, 0.7]
    assert frame["episode_best"].tolist() == [0.5, 0.6, 0.4, 0.7, 0.55]
    assert frame["previous_best"].fillna(0).tolist() == [0, 0, 0.6, 0.6, 0.7]
    assert frame["predicted_reward"].fillna(0).tolist() == [0, 0, 0.45, 0.65, 0.7]
    run = Run(tmp_path, "fake")
    write_text(run.config, yaml.safe_dump(CONFIG))
    html = write_report(run, study).read_text()
    rows = [row for row in re.findall(r"<tr.*?</tr>", html) if row.count("trial ") > 1]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    assert cells == [
        ["1", "trial 1: 0.6000", "trial 1: 0.6000", "-"],
        ["2", "trial 3: 0.7000", "trial 3: 0.7000", "trial 1: 0.6000"],
        ["3", "trial 3: 0.7000", "trial 4: 0.5500", "trial 3: 0.7000"],
    ]
    assert "predicted 0.6500" in html
    assert "controller predicted" not in write_report(run, every_kind()).read_text()


def test_the_headline_is_computed_from_the_final_figures(html):
    text = Page(html).text
    assert (
        "The best of 2 trained candidates has 2.1 M parameters, is 5.0x as fast and keeps 97 % of its teacher's acc"
        in text
    )
    assert "Its shape: 2 layers x 64 wide, 2 heads, 96 intermediate, relu." in text
    assert "Its accuracy is 0.776, its teacher's 0.800; the same shape, started at random" in text
    assert "reaches 0.600, the static vectors 0.500, the layer cut 0.700." in text


@pytest.mark.parametrize(
    ("done", "left"),
    [
        ([], "search, full KD, fine-tuning, export"),
        (["best_student"], "full KD, fine-tuning, export"),
        (["best_student", "full_kd", "glue"], "export"),
        (["best_student", "full_kd", "glue", "student"], None),
    ],
)
def test_an_unfinished_run_says_what_is_still_to_come(tmp_path, done, left):
    there = whole(tmp_path)
    write_json(there.student / "manifest.json", {"checks": CHECKED})
    write_text(there.config, yaml.safe_dump(CONFIG | {"full_kd": {"num_epochs": 2}}))
    for name in {"best_student", "full_kd", "glue", "student"} - set(done):
        getattr(there, name).rename(tmp_path / name)
    text = Page(write_report(there, every_kind()).read_text()).text
    assert ("trained candidates so far has" in text) == (not done)
    said = re.findall(r"This run is not finished. Still to come: ([\w, -]+)\.", text)
    assert said == ([left] if left else [])


def test_a_search_is_finished_without_the_stages_of_a_run(run):
    write_text(run.best_student, "")
    assert "not finished" not in write_report(run, every_kind()).read_text()


def test_one_epoch_has_one_tick(run):
    study = make_study()
    attrs = trained(1, 2.5, 0.3, 0.7)
    add(study, TrialState.COMPLETE, 0.7, **attrs | {"history": attrs["history"][:1]})
    _, errors, shares = svgs(write_report(run, study).read_text())
    for picture in (errors, shares):
        assert re.findall(r"<text[^>]*>([\d.]+)</text>", picture)[0] == "1"
        assert "0.9" not in re.findall(r"<text[^>]*>([\d.]+)</text>", picture)


def test_the_headline_falls_back_to_variance_where_no_share_of_the_score_can_be_kept(tmp_path):
    run = whole(tmp_path)
    write_json(run.glue / "results.json", make_results(share_kept=None))
    text = Page(write_report(run, every_kind()).read_text()).text
    assert (
        "5.0x as fast and explains 82 % of the variance of its teacher's sentence vectors." in text
    )
    assert result_rows(make_results(share_kept=None))[1]["share kept (%)"] == "-"


def test_a_trial_that_was_measured_on_a_busy_machine_is_marked():
    study = make_study()
    for spread in (0.3, 0.5):
        add(
            study,
            TrialState.COMPLETE,
            0.7,
            **trained(1, 4.0, 0.3, 0.7) | {"latency_iqr_ms": spread},
        )
    add(
        study,
        TrialState.COMPLETE,
        0.7,
        **trained(1, 4.0, 0.3, 0.7) | {"teacher_latency_iqr_ms": 2.1},
    )
    assert ["(unsteady)" in line(trial) for trial in study.trials] == [False, True, True]
    assert "5.0x (unsteady), reward 0.7000, 12 s" in line(study.trials[1])


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"score": 0.6}, "A random start of the same shape scores as high"),
        ({"latency_iqr_ms": 0.5}, "The machine is busy"),
        ({"score": 0.7}, "The student does not beat the layer cut, which took"),
        ({"score": 0.5}, "The student does not beat the static vectors and the layer cut,"),
    ],
)
def test_figures_that_mean_little_say_so_in_the_headline_and_the_terminal(tmp_path, student, said):
    how = {"backend": "onnxruntime", "length": 32, "num_threads": 2}
    assert (
        result_table(make_results(), how).caption
        == "Latency: onnxruntime on cpu, batch 1 x 32, 2 threads."
    )
    assert said in str(result_table(make_results(**student), {}).caption)
    run = whole(tmp_path)
    write_json(run.glue / "results.json", make_results(**student))
    html = write_report(run, every_kind()).read_text()
    headline, *warnings = re.findall(r'<p class="(?:headline|warning)">(.*?)</p>', html)
    assert any(said in warning for warning in warnings) and ". " not in headline
    busy = '<dt class="look">Is the latency real?' in html
    assert busy == ("latency_iqr_ms" in student)


def test_the_page_and_the_terminal_show_the_same_final_table(html):
    rows = result_rows(make_results())
    assert [list(row.values()) for row in rows] == [
        ["teacher", "11.17", "44.7", "20.00", "0.25", "1.0x", "0.800", "100.0"],
        ["best student", "2.14", "8.6", "4.00", "0.25", "5.0x", "0.776", "97.0"],
        ["random start", "2.14", "8.6", "4.10", "0.25", "4.9x", "0.600", "75.0"],
        ["static vectors", "0.50", "2.0", "0.10", "0.01", "200.0x", "0.500", "62.5"],
        ["layer cut", "5.14", "20.6", "8.00", "0.25", "2.5x", "0.700", "87.5"],
    ]
    headings = [
        "model",
        "parameters (M)",
        "MB",
        "latency (ms)",
        "IQR (ms)",
        "speed-up",
        "accuracy",
        "share kept (%)",
    ]
    assert [list(row) for row in rows] == [headings] * 5
    console = Console(file=io.StringIO(), width=80)
    console.print(result_table(make_results(), {}))
    lines = console.file.getvalue().splitlines()
    assert "Fine-tuned on topics" in lines[0]
    for row in rows:
        assert "".join(f"<td>{cell}</td>" for cell in list(row.values())[1:]) in html
        assert [line.split() for line in lines].count(" ".join(row.values()).split()) == 1


def test_what_was_asked_is_said(tmp_path):
    run = whole(tmp_path)
    text = Page(write_report(run, every_kind()).read_text()).text
    assert text.startswith("kdnas: fake")
    assert "teacher bert-tiny text notes.parquet task topics search 3 candidates by tpe" in text
    assert "budget at least 4x as fast as the teacher" in text
    assert f"Distil it on all rows, export it kdnas run --config {run.config}" in text
    assert f"tensorboard --logdir {run.folder}" in text
    assert "n_trials: 3" in text
    assert "what machine and software wrote this page. search ended" in text
    assert re.search(
        r"processor \S.* Python 3\.\d+\.\d+ kdnas \S+ torch \d\S* transformers \d\S* optuna \d\S*",
        text,
    )


def test_the_command_for_more_seeds_asks_for_what_the_run_asked(tmp_path):
    run = whole(tmp_path)
    asked = {
        "finetune": {
            "num_epochs": 5,
            "learning_rate": 3e-5,
            "batch_size": 32,
            "max_length": 64,
            "seed": 7,
            "old": 1,
        },
        "grid": {"batch_sizes": [8, 16], "learning_rates": [1e-4], "held_out": 0.1},
        "trainer": {"accelerator": "cpu", "precision": "auto", "gradient_clip_val": 0.5},
        "latency": {
            "backend": "onnxruntime-int8",
            "length": 32,
            "lengths": "my lengths.jsonl",
            "num_threads": 2,
        },
    }
    write_text(run.config, yaml.safe_dump(CONFIG | asked))
    write_json(run.student / "manifest.json", {"checks": CHECKED})
    page = write_report(run, every_kind()).read_text()
    commands = re.findall("(?s)<pre>(.*?)</pre>", page)
    (command,) = [one.replace("\\\n", "") for one in commands if one.startswith("kdnas glue")]
    config, _ = read_config(GlueConfig, "glue", shlex.split(unescape(command))[2:])
    assert config.finetune == FinetuneSettings(num_epochs=5, learning_rate=3e-5, max_length=64)
    assert config.grid == Grid([8, 16], [1e-4])
    assert config.trainer == TrainerSettings(accelerator="cpu", gradient_clip_val=0.5)
    assert config.latency == LatencySettings(**asked["latency"])
    assert (
        (config.seeds, len(config.model)) == (3, 2)
        and "finetune.batch_size" not in command
        and "auto" not in command
    )
    assert (
        "the median, by onnxruntime-int8 on cpu, batch of at most 1 x workload, 2 threads; IQR"
        in page
    )


def test_the_gpu_is_named_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100 <PCIe>")
    assert (
        "GPU H100 <PCIe> system"
        in Page(write_report(whole(tmp_path), every_kind()).read_text()).text
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert " GPU " not in Page(write_report(whole(tmp_path), every_kind()).read_text()).text


@pytest.mark.parametrize(
    ("budget", "words", "num_lines"),
    [
        ({"speedup": None, "latency_ms": 5.5}, "budget at most 5.5 ms", 1),
        (
            {"speedup": 4.0, "latency_ms": 5.5},
            "budget at least 4x as fast as the teacher, at most 5.5 ms",
            2,
        ),
        ({"speedup": None, "latency_ms": None}, "budget none", 0),
        (None, "budget none", 0),
    ],
)
def test_each_limit_of_the_budget_is_a_dashed_line(run, budget, words, num_lines):
    study = make_study(budget=budget)
    add(study, TrialState.COMPLETE, 0.7, **trained(1, 2.5, 0.3, 0.7))
    html = write_report(run, study).read_text()
    assert words in Page(html).text
    assert svgs(html)[0].count("stroke-dasharray") == num_lines


def test_a_speed_up_is_drawn_at_the_latency_that_it_means(run):
    study = make_study(budget={"speedup": 4.0, "latency_ms": 5.0})  # the teacher takes 20 ms
    add(study, TrialState.COMPLETE, 0.7, **trained(1, 2.5, 0.3, 0.7))
    pareto = svgs(write_report(run, study).read_text())[0]
    first, second = re.findall(r'<path d="([^"]*)"[^>]*stroke-dasharray', pareto)
    assert first == second


def test_the_front_goes_through_the_candidates_that_none_beats_in_both(run):
    study = make_study()
    for latency_ms, loss in ((4.0, 0.2), (2.0, 0.4), (3.0, 0.5), (5.0, 0.2)):
        add(study, TrialState.COMPLETE, 1 - loss, **trained(1, latency_ms, loss, 1 - loss))
    pareto = svgs(write_report(run, study).read_text())[0]
    (front,) = re.findall(
        r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: currentColor(?!; stroke-op)',
        pareto,
    )
    assert len(re.findall("[ML]", front)) == 3  # one step between two candidates


def test_the_pareto_picture_shows_each_measured_candidate_once(html):
    pareto = svgs(html)[0]
    assert sorted(re.findall(r"<title>(.*?)</title>", pareto)) == [
        "trial 0: 1 x 64, 2 heads, 2.50 ms, 8.0x, loss 0.3333, contextual share 0.125, reward 0.7111",
        "trial 1: 2 x 64, 2 heads, 4.00 ms, 5.0x, loss 0.2222, contextual share 0.125, reward 0.8222",
        "trial 2: 3 x 64, 2 heads, 6.25 ms, 3.2x",
        "trial 3: 4 x 64, 2 heads, 1.25 ms, 16.0x",
    ]
    assert pareto.count("#d9722b") > 0  # the best one


def test_the_curves_show_each_trained_candidate_full_kd_and_the_models(html):
    _, errors, shares, scores = svgs(html)
    for picture in (errors, shares):
        names = ["trial 0", "trial 1", "full KD"]
        assert [
            tip.partition(":")[0] for tip in re.findall(r"<title>(.*?)</title>", picture)
        ] == names
        assert re.findall(r"<text[^>]*>(\d)</text>", picture) == ["1", "2"]  # epochs count from 1
    assert "<title>trial 1: 0.444, 0.222</title>" in errors
    tips = ["teacher: 0.400, 0.800", "best student: 0.388, 0.776", "random start: 0.300, 0.600"]
    tips += ["static vectors: 0.250, 0.500", "layer cut: 0.350, 0.700"]
    assert sorted(re.findall(r"<title>(.*?)</title>", scores)) == sorted(tips)


def test_of_very_many_candidates_the_front_and_the_best_are_named_and_the_others_shown(
    run, monkeypatch
):
    study = make_study()
    for latency_ms, loss, reward in (
        (4, 0.2, 0.1),
        (2, 0.4, 0.2),
        (3, 0.5, 0.9),
        (5, 0.2, 0.3),
        (6, 0.3, 0.4),
    ):
        add(study, TrialState.COMPLETE, reward, **trained(1, latency_ms, loss, reward))
    for latency_ms in (1.0, 1.1, 1.2, 1.3):
        add(study, TrialState.FAIL, **measured(2, latency_ms, failed="nan"))
    whole = write_report(run, study).read_text()
    monkeypatch.setattr("kdnas.report.pictures.MOST_NAMED", 3)
    monkeypatch.setattr("kdnas.report.page.MOST_NAMED", 3)
    html = write_report(run, study).read_text()
    pareto, errors, *_ = svgs(html)
    assert sorted(re.findall(r"<title>trial (\d):", pareto)) == ["0", "1", "2"], (
        "the front, and the best"
    )
    assert pareto.count("<use ") == svgs(whole)[0].count("<use ") > 9
    assert sorted(re.findall(r"<title>trial (\d):", errors)) == ["2", "3", "4"], "the best three"
    assert "the 3 with the best rewards" in html and "best rewards" not in whole


def test_text_from_outside_stays_text(run):
    evil = "<script>alert('$x$')</script>"
    write_text(run.config, yaml.safe_dump(CONFIG | {"teacher": evil}))
    results = make_results()
    results["task"] |= {"name": evil, "metric": evil}
    write_json(run.glue / "results.json", results)
    study = make_study()
    add(study, TrialState.COMPLETE, 0.7, **trained(1, 2.5, 0.3, 0.7))
    add(study, TrialState.FAIL, **measured(2, 1.5, failed=evil))
    page = Page(write_report(run, study).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1
    # sentence, teacher, fine-tuning, heading, axis, caption, headline, reason, config
    assert page.text.count(evil) == 9
    console = Console(file=io.StringIO(), width=300)
    console.print(result_table(results, {}))
    assert console.file.getvalue().count(evil) == 2


def test_brackets_in_a_metric_are_no_markup_of_the_terminal():
    results = make_results()
    results["task"]["metric"] = "[bold]f1"
    console = Console(file=io.StringIO(), width=120)
    console.print(result_table(results, {}))
    assert "[bold]f1" in console.file.getvalue()


def test_without_a_labelled_task_its_sections_are_left_out(tmp_path):
    run = whole(tmp_path)
    (run.glue / "results.json").unlink()
    html = write_report(run, every_kind()).read_text()
    text = Page(html).text
    assert "Teacher beside student" not in text and "ine-tun" not in text
    assert "a mean cosine of 0.912 to its teacher's" in text and "(Spearman 0.876)." in text
    assert len(svgs(html)) == 3


def test_a_search_alone_is_reported_from_its_best_trial(run):
    text = Page(write_report(run, every_kind()).read_text()).text
    assert (
        "The best of 2 trained candidates so far has 2.5 M parameters, is 5.0x as fast and explains 78 %"
        in text
    )


def test_a_study_without_a_scored_candidate_is_reported_too(run):
    study = make_study(budget={"speedup": 4.0, "latency_ms": None})
    add(study, TrialState.PRUNED, **measured(3, 6.0, refused="too slow"))
    add(study, TrialState.PRUNED, **measured(3, 6.0, refused="too slow"), twin_of=0)
    add(study, TrialState.PRUNED, **measured(2, 4.0))
    add(study, TrialState.FAIL, failed="no memory", **measured(1, 2.0))
    html = write_report(run, study).read_text()
    text = Page(html).text
    assert "None of 3 candidates could be scored." in text
    assert "1 refused, 1 repeated, 1 stopped early, 1 failed." in text
    assert "Learning curves" not in text
    assert len(svgs(html)) == 1
    assert re.search(r"\b(nan|none|null)\b", text.replace("None of 3", ""), re.IGNORECASE) is None


def test_a_study_without_trials_is_reported_too(run):
    text = Page(write_report(run, make_study()).read_text()).text
    assert "None of 0 candidates could be scored." in text and "No trial was begun." in text


def test_numbers_that_are_none_are_shown_as_a_dash_and_leave_a_gap(run):
    study = make_study()
    attrs = trained(1, 2.5, 0.3, 0.7)
    attrs["history"][0] |= {"loss": math.nan, "contextual_share": None}
    attrs |= {"contextual_share": math.nan}
    add(study, TrialState.COMPLETE, 0.7, **attrs)
    add(study, TrialState.FAIL, **measured(2, 1.5, loss=math.nan, failed="diverged"))
    html = write_report(run, study).read_text()
    assert re.search(r"\bnan\b", html, re.IGNORECASE) is None
    assert row_of(html, 0)[8] == "-"
    assert len(svgs(html)) == 3


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run, study = whole(tmp_path), every_kind()
    first = write_report(run, study).read_bytes()
    assert write_report(run, study).read_bytes() == first
    ended = max(trial.datetime_complete for trial in study.trials if trial.datetime_complete)
    assert f"<dd>{ended:%Y-%m-%d %H:%M}</dd>" in first.decode()


def test_the_frame_has_one_row_a_trial_and_whole_numbers_stay_whole():
    frame = trials_frame(every_kind())
    assert ",".join(frame) == (
        "number,state,num_hidden_layers,num_attention_heads,hidden_size,intermediate_size,hidden_act,loss,"
        "contextual_share,sentence_r2,latency_ms,latency_iqr_ms,speedup,num_parameters,reward,predicted_reward,"
        "episode,best_so_far,episode_best,previous_best,front,seconds,reason"
    )
    lines = frame.to_csv(index=False).splitlines()
    assert lines[2] == (
        "1,COMPLETE,2,2,64,96,relu,0.2222,0.125,0.7778,4.0,0.25,5.0,2460000,0.8222,"
        ",1,0.8222,0.8222,,latency and parameters,12.34,"
    )
    assert lines[4].startswith("3,FAIL,4,2,64,96,relu,,,,1.25,") and lines[4].endswith(
        ",the training loss is inf at step 7"
    )
    assert lines[5].endswith(",same shape as trial 1")
    assert lines[6] == "5,FAIL,5,2,64,96,relu,,,,,,,,,,,,,,,,"
    assert len(lines) == 7
    pd.testing.assert_index_equal(trials_frame(make_study()).columns, frame.columns)


def test_the_fronts_hold_what_no_other_candidate_beats_in_both():
    study = make_study()
    # layers (parameters), latency, loss: the fourth is beaten in both senses, the third in parameters alone
    for layers, latency_ms, loss in ((1, 3.0, 0.5), (2, 4.0, 0.3), (4, 2.0, 0.4), (3, 5.0, 0.35)):
        add(study, TrialState.COMPLETE, 1 - loss, **trained(layers, latency_ms, loss, 1 - loss))
    add(study, TrialState.PRUNED, **measured(1, 0.5, refused="slow"))
    add(study, TrialState.FAIL, **trained(1, 0.5, 0.1, 0.9))  # killed before it was told
    front = trials_frame(study)["front"]
    assert (
        front[0] == "parameters" and front[1] == "latency and parameters" and front[2] == "latency"
    )
    assert front[3:].isna().all()
    console = Console(width=120, file=io.StringIO())
    console.print(front_table(study))
    shown = console.file.getvalue()
    assert [
        line.split()[:2] for line in shown.splitlines() if " ms" not in line and "0." in line
    ] == [
        ["2", "0.4000"],
        ["0", "0.5000"],
        ["*", "1"],
    ]


def test_the_best_may_be_on_no_front():
    """Two workers measured the teacher at two moments, so the reward is another's order than the latency."""
    study = make_study()
    add(study, TrialState.COMPLETE, 0.6, **trained(1, 2.0, 0.4, 0.6))
    add(study, TrialState.COMPLETE, 0.7, **trained(2, 3.0, 0.5, 0.7))
    table = front_table(study)
    assert [str(cell) for cell in table.columns[-1].cells] == ["latency and parameters", ""]
    Console(width=120, file=io.StringIO()).print(table)


def test_a_study_without_candidates_has_an_empty_front():
    assert front_table(make_study()).row_count == 0
