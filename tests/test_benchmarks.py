import json
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from kdnas.cli.parser import read_config
from kdnas.commands.config import RunConfig, as_plain
from kdnas.data.datamodule import DataSettings, KDDataModule
from kdnas.distillation.attention import AttentionMaps
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import HiddenStates, needed_layers
from kdnas.distillation.start import Started
from kdnas.distillation.teacher_states import (
    LayerStats,
    LiveTeacher,
    ShareEnds,
    StatesSettings,
    TeacherStates,
    open_states,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student, find_teacher, load_classifier
from kdnas.models.layers import LastAndSkip
from kdnas.nas.trials import Outcome
from kdnas.system.files import write_json
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.tasks.tasks import load_task
from tests.conftest import save_teacher, write_task

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import base_teacher
import common
import deploy
import fidelity
import glue
import job
import latency
import overhead
import quality
import recipe
import samplers
import single_sentences
import starts
import step
import text
import variants
import worth

ARCH = StudentArch(2, 2, 32, 64)
BENCHMARKS = (
    base_teacher,
    deploy,
    fidelity,
    glue,
    job,
    latency,
    overhead,
    quality,
    recipe,
    samplers,
    single_sentences,
    starts,
    step,
    text,
    variants,
    worth,
)
GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}


@pytest.fixture
def data(tiny_teacher, text_file):
    data = KDDataModule(
        str(tiny_teacher), str(text_file), DataSettings(max_length=24, batch_tokens=240)
    )
    data.setup()
    return data


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.__name__)
def test_help_names_the_options_that_every_benchmark_has(benchmark, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--quick", "--json"))
    assert ("--text" in shown) == (benchmark not in (glue, job))


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory):
    """A teacher as wide and deep as the quickstart's, whose words are few."""
    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 130,
        "initializer_range": 0.02,
    }
    return save_teacher(tmp_path_factory.mktemp("wide") / "teacher", **sizes)


def test_no_benchmark_is_left_out():
    files = {path.stem for path in Path(common.__file__).parent.glob("*.py")}
    assert {benchmark.__name__ for benchmark in BENCHMARKS} == files - {"common"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark",
    [benchmark for benchmark in BENCHMARKS if benchmark is not job],  # it has a test of its own
    ids=lambda benchmark: benchmark.__name__,
)
def test_every_benchmark_ends_with_its_figures(
    benchmark, wide_teacher, text_file, tmp_path, monkeypatch
):
    for module in (common, *BENCHMARKS):
        for name, value in (("TEACHER", str(wide_teacher)), ("OUTPUT", tmp_path / "output")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(base_teacher, "fetch", lambda: wide_teacher)
    monkeypatch.setattr(base_teacher, "SHAPES", ("4x192x384",))  # narrower than this teacher
    monkeypatch.setattr(base_teacher, "QUICKSTART", str(wide_teacher))
    monkeypatch.setattr(starts, "make_teacher", lambda *_: str(wide_teacher))
    for name, columns in GLUE.items():
        write_task(tmp_path / name, columns, (0.0, 2.5, 5.0) if name == "stsb" else (0, 1), 40)
    options = {"--json": tmp_path / "found.json"}
    if benchmark is not glue:
        options["--text"] = text_file
    if benchmark in (base_teacher, deploy, fidelity, glue, quality, variants, worth):
        options["--glue"] = tmp_path
    (tmp_path / "output").mkdir()
    benchmark.main(["--quick", *(f"{name}={value}" for name, value in options.items())])
    assert json.loads((tmp_path / "found.json").read_text())


def test_original_config_is_what_the_original_did():
    config = common.read_config("original_fit")
    assert config.recipe.objective.shared_projection and not config.recipe.objective.normalize
    assert (config.recipe.learning_rate, config.recipe.constant_rate, config.recipe.dropout) == (
        1e-4,
        True,
        True,
    )
    assert (config.data.max_length, config.data.batch_tokens, config.data.pad_to_max_length) == (
        50,
        32 * 50,
        True,
    )
    assert (config.trainer["precision"], config.trainer["max_epochs"]) == ("32-true", 4)
    assert (config.arch.num_hidden_layers, config.arch.hidden_size) == (4, 192)
    whole, _ = read_config(RunConfig, "run", ["--config=configs/original.yaml"])
    assert as_plain(whole.recipe) == as_plain(config.recipe)
    assert whole.data == config.data and whole.states.max_gb == 0
    assert whole.trainer.precision == "32-true" and whole.trainer.gradient_clip_val == 0
    assert (whole.search.num_epochs, whole.search.loss, whole.search.beta) == (4, "train", 0.046656)
    assert whole.latency.when == "after_fit" and not whole.full_kd.from_candidate


def test_cut_text_keeps_the_sides_apart_and_draws_the_same_rows(text_file, tmp_path):
    tables = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        tables.append(
            pq.read_table(common.cut_text(str(text_file), tmp_path / name, share=0.5, most=40))
        )
    assert tables[0].equals(tables[1])
    sides = tables[0].to_pandas().groupby("split")["text"].apply(set)
    assert (len(sides["train"]), len(sides["held_out"])) == (40, 5)
    assert not sides["train"] & sides["held_out"]


def test_a_large_text_repeats_rows_that_are_no_duplicates(tmp_path):
    rows = ["one row", "another row", "a third"]
    text.write_text(path := tmp_path / "rows.parquet", rows, 1e6)
    found = pq.read_table(path)["text"].to_pylist()
    assert 1_000_000 <= sum(map(len, found)) < path.stat().st_size < 3_000_000
    assert len(set(found)) == len(found) and {row.rpartition(" ")[0] for row in found} == set(rows)


def test_machine_says_what_a_figure_was_measured_on():
    assert {"cpu", "cores", "threads", "torch", "load_average"} <= common.machine().keys()


def test_each_stage_of_a_job_has_its_seconds_cores_and_memory(
    tiny_teacher, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "OUTPUT", tmp_path / "output")
    for function in job.STAGES:
        monkeypatch.setattr(job.job, function, getattr(job.job, function))  # put back at the end
    write_task(tmp_path / "task")
    options = {
        "teacher": tiny_teacher,
        "text": text_file,
        "task": tmp_path / "task",
        "workers": 0,
        "json": tmp_path / "job.json",
        "latency.min_seconds": 0.01,
        "search.budget.speedup": 0.01,
    }
    job.main(["--quick", *(f"--{name}={value}" for name, value in options.items())])
    found = json.loads((tmp_path / "job.json").read_text())
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == list(job.STAGES.values())
    assert all(stage["seconds"] > 0 and stage["cpu_share"] > 0 for stage in stages.values())
    assert stages["search"]["peak_memory_gb"] > 0.1
    for name in ("search", "full KD", "fine-tuning"):
        assert stages[name]["tokens_per_second"] > 0 and stages[name]["flop_seconds"] > 0
    assert found["total_minutes"] * 60 >= sum(stage["seconds"] for stage in stages.values())
    assert list((tmp_path / "output").iterdir()) == [], "the run is not kept"


def test_student_flops_by_hand():
    # One layer, H = 2, I = 3: maps 2 (4 * 4 + 2 * 6) = 56 a token; attention 4 * 2 n^2 for rows of n = 1 and 2.
    assert step.student_flops([1, 2], StudentArch(1, 1, 2, 3)) == 56 * 3 + 8 * (1 + 4)


def test_student_flops_are_torchs(tiny_teacher):
    student = build_student(find_teacher(str(tiny_teacher)).config, ARCH)
    student.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(input_ids=torch.full((3, 8), 7))
    assert counter.get_total_flops() == step.student_flops([8, 8, 8], ARCH)


def test_criterion_flops_are_three_times_the_projections(tiny_teacher, data):
    teacher = find_teacher(str(tiny_teacher))
    module = HiddenStateDistillModule(teacher, ARCH, Recipe(objective=HiddenStates(LastAndSkip())))
    module.started = Started()
    live = LiveTeacher(teacher.model)
    stats = {layer: LayerStats(1.0, 1.0, 1.0) for layer in module.target_layers}
    module.states = TeacherStates(live, module.target_layers, 64, stats, ShareEnds(1.0, 0.0))
    batch = next(iter(data.train_dataloader()))
    num_tokens = int(batch["attention_mask"].sum())
    # Two student layers, each from 32 to two of the teacher's 64.
    assert step.criterion_flops(module, batch) == 3 * 2 * (2 * 32 * 128) * num_tokens


def test_criterion_flops_of_maps_are_the_teacher_s_alone(tiny_teacher, data):
    teacher = find_teacher(str(tiny_teacher))
    module = HiddenStateDistillModule(teacher, ARCH, Recipe(objective=AttentionMaps()))
    module.started = Started()
    stats = {layer: LayerStats(1.0, 1.0, 1.0) for layer in module.target_layers}
    module.states = TeacherStates(
        LiveTeacher(teacher.model), module.target_layers, 64, stats, ShareEnds(1.0, 0.0)
    )
    batch = next(iter(data.train_dataloader()))
    num_rows, length = batch["input_ids"].shape
    # In two layers, for each head that the student has: queries and keys of 64 dimensions, and their scores.
    size = 64 // teacher.config.num_attention_heads
    per_head = 2 * 2 * 64 * size * num_rows * length + 2 * size * num_rows * length**2
    assert step.criterion_flops(module, batch) == 2 * ARCH.num_attention_heads * per_head


def test_a_step_launches_few_operations_and_hardly_waits_for_its_device(
    tiny_teacher, data, tmp_path
):
    arch = StudentArch(4, 2, 32, 64)
    teacher = find_teacher(str(tiny_teacher))
    found = step.count_steps(teacher, arch, data, tmp_path, "cpu")
    assert 100 < found["ops_a_step"] <= 700
    assert found["synchronisations_a_step"] <= 3


def test_ours_is_timed_with_stored_and_with_live_states(tiny_teacher, data, tmp_path):
    teacher, objective = find_teacher(str(tiny_teacher)), HiddenStates(LastAndSkip())
    layers = needed_layers(objective, [ARCH.num_hidden_layers], 4)
    states = open_states(teacher, data, layers, StatesSettings(str(tmp_path / "states")))
    found = step.measure_ours(
        teacher, ARCH, objective, data, states, 4, 1e9, tmp_path / "fit", "cpu", False
    )
    assert found["tokens_per_second"] > 0 and found["tokens_per_second_live"] > 0
    assert found["parts_ms"]["teacher"] == 0 < found["live_teacher_ms"]


def test_what_waits_for_a_device_is_counted():
    with step.Operations() as counted:
        x = torch.arange(4.0)
        x.view(2, 2).mul(2)
        num_ops = counted.num_ops
        assert counted.num_waits == 0
        float(x[0]), x[x > 1], x.nonzero(), torch.tensor(3.0), bool(x.any())
    assert (num_ops, counted.num_waits) == (2, 5)


def test_time_steps_leaves_the_warm_up_out(data):
    seen = []
    batches = list(data.train_dataloader())[:2]  # fewer than steps: they are gone through again
    result = step.time_steps(seen.append, batches, 3)
    assert (len(seen), result["num_steps"]) == (7, 3)


def test_compare_counts_the_start_and_the_cache():
    original = [(0.0, 1.0), (50.0, 0.8), (100.0, 0.7)]
    found = recipe.compare(original, [(4.0, 0.9), (10.0, 0.7), (20.0, 0.6)], cache_seconds=15.0)
    assert (found["original_error"], found["our_seconds"], found["reached_by_start_alone"]) == (
        0.7,
        10.0,
        False,
    )
    assert (found["speedup_to_original_error"], found["speedup_with_cache_cost"]) == (10.0, 4.0)


def test_compare_says_that_the_start_was_enough_and_that_training_was_worse():
    found = recipe.compare(
        [(0.0, 1.0), (100.0, 0.7)], [(5.0, 0.3), (6.0, 1.1), (8.0, 0.6)], cache_seconds=0.0
    )
    assert found["reached_by_start_alone"] and found["our_seconds"] == 5.0
    assert found["our_seconds_to_stay"] == 8.0
    assert found["our_end_error"] > found["our_start_error"]


def test_compare_has_no_speedup_where_the_error_is_never_reached():
    found = recipe.compare([(0.0, 1.0), (100.0, 0.7)], [(5.0, 0.9), (9.0, 0.8)], cache_seconds=1.0)
    assert (
        found["speedup_to_original_error"]
        is found["speedup_with_cache_cost"]
        is found["our_seconds"]
        is None
    )
    assert found["our_seconds_to_stay"] is None and not found["reached_by_start_alone"]


def test_original_that_was_better_before_its_end_is_timed_there():
    assert (
        recipe.compare([(0.0, 1.0), (50.0, 0.6), (100.0, 0.7)], [(5.0, 0.5)], 0.0)[
            "original_seconds"
        ]
        == 50.0
    )


SMALL_SPACE = samplers.SearchSpace(
    {**samplers.SPACE.choices, "num_hidden_layers": [1, 2], "hidden_size": [192]}
)
SMALL_TABLE = {
    arch: samplers.Known(1 - loss, [1 - (1 - loss) / 2, loss], 10.0)
    for arch in SMALL_SPACE
    for loss in [1 - 0.3 * arch.num_hidden_layers - arch.intermediate_size / 1e6]
}


def test_a_replay_finds_the_best_of_a_table_and_counts_distinct_evaluations():
    found = samplers.replay(SMALL_TABLE, SMALL_SPACE, "random", seed=3)
    assert len(found["regrets"]) == len(SMALL_SPACE) == 16 and found["trained_seconds"] == 160
    assert found["regrets"][-1] == 0 and found["regrets"] == sorted(found["regrets"], reverse=True)
    reached = found["reached"]
    assert found["regrets"][reached - 1] <= samplers.WITHIN
    assert reached == 1 or found["regrets"][reached - 2] > samplers.WITHIN


@pytest.mark.parametrize("by", ["loss", "reward"])
def test_a_pruned_replay_trains_as_many_candidates_in_less_time(by):
    found = samplers.replay(SMALL_TABLE, SMALL_SPACE, "random", 3, "median", by, most=12)
    assert len(found["regrets"]) == 12 and 60 < found["trained_seconds"] < 120


def test_a_pruned_replay_never_finds_what_the_pruner_ended():
    """The best is the worst after its first epoch; what it showed there is above every reward."""
    best = max(SMALL_TABLE, key=lambda arch: SMALL_TABLE[arch].reward)
    table = {
        arch: samplers.Known(
            0.2 if arch == best else 0.1, [0.4 if arch == best else 0.3, 0.8], 10.0
        )
        for arch in SMALL_SPACE
    }
    whole = samplers.replay(table, SMALL_SPACE, "random", 3)
    pruned = samplers.replay(table, SMALL_SPACE, "random", 3, "median")
    assert whole["regrets"][-1] == 0 and pruned["regrets"][-1] == pytest.approx(0.5)


def test_students_beyond_the_budget_neither_count_nor_are_the_best():
    table = {
        arch: samplers.Known(
            0.1 * arch.num_hidden_layers + arch.intermediate_size / 1e5,
            [0.9],
            1.0,
            6 / arch.num_hidden_layers,
        )
        for arch in SMALL_SPACE
    }
    found = samplers.replay(table, SMALL_SPACE, "tpe", 1, speedup=4)
    assert len(found["regrets"]) == 8 and found["regrets"][-1] == 0  # those of one layer
    assert found["trained_seconds"] == 8


def test_pruners_are_shown_beside_none():
    runs = [
        {"trained_seconds": 100.0, "regrets": [0.5, 0.1]},
        {"trained_seconds": 100.0, "regrets": [0.5, 0.0]},
    ]
    less = [
        run | {"trained_seconds": 60.0, "regrets": [0.5, run["regrets"][-1] + 0.2]} for run in runs
    ]
    none, median = samplers.show_pruners({"none": runs, "median": less}, Console(quiet=True))
    assert none["seconds"] == 1 and median["seconds"] == pytest.approx(0.6)
    assert median["regret"] == pytest.approx(0.25) and median["lost"] == pytest.approx((0.2, 0.2))


def test_the_rule_s_shape_has_a_rank_within_each_budget():
    deepest = max(SMALL_SPACE.by_rule(), key=lambda arch: arch.num_hidden_layers)
    table = {
        arch: samplers.Known(
            reward=0.5 if arch == deepest else 0.4,
            losses=[0.5],
            seconds=1.0,
            speedup=3.0 if arch.num_hidden_layers == 2 else 5.0,
        )
        for arch in SMALL_SPACE
    }
    rows = samplers.show_rule(table, SMALL_SPACE, Console(quiet=True))
    assert [(row["budget"], row["rank"]) for row in rows] == [(2, 1), (3, 1), (4, 1), (5, 1)]
    assert [row["arch"]["num_hidden_layers"] for row in rows] == [2, 2, 1, 1]
    table[next(arch for arch in table if arch.num_hidden_layers == 1)] = samplers.Known(
        1.0, [0.0], 1.0, 5.0
    )
    first, *_ = samplers.show_rule(table, SMALL_SPACE, Console(quiet=True))
    assert (first["rank"], first["regret"]) == (2, 0.5)


def test_a_table_that_is_not_made_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no.gz is not there: make it by --make"):
        samplers.main(["--table", str(tmp_path / "no.gz")])


def test_an_interval_holds_the_mean_of_differences():
    low, high = samplers.interval([-1.0, -2.0, -3.0, -2.0])
    assert -3 <= low < -2 < high <= -1


def test_a_score_is_held_against_the_tasks_of_another_seed():
    tasks = np.array([[0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.2, 0.4]])
    assert fidelity.tau(-tasks, tasks) == pytest.approx(4 / 6)  # one of six pairs is turned round
    assert fidelity.tau(tasks, -tasks[:, ::-1]) == pytest.approx(-4 / 6)
    # Of the first seed the third is best, which is a tenth below the second seed's best.
    errors = np.array([[4.0, 3.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert fidelity.regret(errors, tasks) == pytest.approx((20 + 0) / 2)
    low, high = fidelity.interval(fidelity.tau, -tasks, tasks)
    assert low < 4 / 6 < high <= 1


def test_the_ceiling_is_the_agreement_of_two_seeds(tmp_path, capsys):
    students = [
        {
            "arch": ARCH.to_dict(),
            "seeds": [dict.fromkeys(fidelity.SCORES[:-1], float(-number))] * 2,
            "tasks": tasks,
        }
        for number, tasks in enumerate([(0.1, 0.1), (0.2, 0.3), (0.3, 0.2), (0.4, 0.4)])
    ]
    fidelity.report(students, tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows["tasks"]["tau"] == pytest.approx(4 / 6) and rows["tasks"]["of_ceiling"] == 1
    assert rows["candidate"]["tau"] == pytest.approx(5 / 6)
    assert rows["candidate"]["of_ceiling"] == pytest.approx(5 / 4)
    assert rows["candidate"]["regret_points"] == 0
    assert "tasks (the ceiling)" in capsys.readouterr().out


def test_a_tau_of_students_that_are_all_equal_is_null(tmp_path):
    seeds = [dict.fromkeys(fidelity.SCORES[:-1], 0.5)] * 2
    students = [{"arch": ARCH.to_dict(), "seeds": seeds, "tasks": (0.1, 0.1)}] * 3
    with pytest.warns(RuntimeWarning, match="empty slice"):
        fidelity.report(students, tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows["start"]["tau"] is rows["tasks"]["of_ceiling"] is None


def test_error_of_a_ratio_is_the_median_of_relative_differences():
    rows = [{"searched": s, "exported": 0.5} for s in (0.5, 0.55, 0.4)]
    assert latency.median_error(rows) == pytest.approx(0.1)


def test_exported_files_are_measured_in_turn_by_their_own_clock(tmp_path, monkeypatch):
    now, calls = [0.0], []

    def run_of(folder, backend):
        def run():
            calls.append((folder.name, backend))
            now[0] += {"student": 0.25, "teacher": 1.0}[folder.name]

        return run

    monkeypatch.setattr(latency, "run_of", run_of)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    assert latency.ratio_of_files(tmp_path / "student", tmp_path / "teacher", "torch", 9.0) == 0.25
    order = [name for name, _ in calls]
    turns = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert turns == ["student", "teacher"] * 10


def test_the_summary_of_a_deployment_is_the_worse_of_the_tasks():
    def row(task, model, variant, speedup, score):
        return {
            "task": task,
            "model": model,
            "variant": variant,
            "speedup": speedup,
            "score": score,
        }

    rows = [row("a", "teacher", "ONNX int8", 3.0, 0.1)]
    rows += [
        row("a", "student", "torch fp32", 6.0, 0.80),
        row("a", "student", "ONNX int8", 20.0, 0.79),
    ]
    rows += [
        row("b", "student", "torch fp32", 6.0, 0.70),
        row("b", "student", "ONNX int8", 16.0, 0.71),
    ]
    found = deploy.summary(rows)
    assert found == {"int8_speedup": 16.0, "int8_points_lost": pytest.approx(1.0)}


def test_both_trainers_take_the_same_rows_the_same_number_of_times(
    tiny_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(glue, "TEACHER", str(tiny_teacher))
    task = load_task(str(write_task(tmp_path / "rte", ("sentence1", "sentence2"), num_rows=20)))
    settings = FinetuneSettings(2, learning_rate=5e-5, batch_size=8, max_length=32)
    seen: list[list[list[int]]] = [[], [], []]
    for rows, seconds in zip(seen, glue.SIDES.values(), strict=True):

        def make(num_labels, rows=rows):
            classifier = load_classifier(tiny_teacher, num_labels)
            classifier.register_forward_pre_hook(
                lambda _, args, given: rows.extend(
                    [token for token in row if token != 3] for row in given["input_ids"].tolist()
                ),
                with_kwargs=True,
            )
            return classifier

        assert seconds(make, task, settings, tmp_path / "run") > 0
    assert len(seen[0]) == 40 and sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])


def test_what_is_around_a_candidates_parts_is_the_rest_of_its_seconds():
    clocks = overhead.Clocks()
    part = clocks.part("training", lambda: time.sleep(0.02))

    def evaluate(bench, arch, folder):
        if folder.name == "refused":
            return Outcome({}, "PRUNED")
        part()
        time.sleep(0.01)
        return Outcome({}, "COMPLETE", 0.5)

    timed = clocks.candidate(evaluate)
    assert timed(None, ARCH, Path("refused")).state == "PRUNED"
    assert timed(None, ARCH, Path("trained")).value == 0.5
    (row,) = clocks.rows
    assert row["training"] >= 0.02 and row["Trainer and process"] >= 0.01
    assert row["whole"] == pytest.approx(row["training"] + row["Trainer and process"])


@pytest.mark.parametrize("is_there", [True, False])
def test_shares_kept_are_of_the_teacher_that_is_there(is_there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        quality, "LatencyMeter", lambda *args: SimpleNamespace(measure=lambda arch: Speed(6.0))
    )
    monkeypatch.setattr(quality, "find_teacher", lambda name: SimpleNamespace(config=None))
    Speed = namedtuple("Speed", "speedup")
    scores = {"teacher": (0.8, 0.4), "4x192-ours-1": (0.6, 0.5), "3x384-ours-1": (0.7, 0.5)}
    for name, pair in scores.items():
        for task, score in zip(("stsb", "rte"), pair, strict=True):
            for seed in (0, 1) if is_there or name != "teacher" else ():
                write_json(
                    tmp_path / name / f"{task}-{seed}" / "result.json",
                    {"score": score + 0.1 * seed},
                )
    write_json(
        tmp_path / "4x192-ours-1" / "result.json",
        {"seconds": 70.0, "cpu_seconds": 60.0, "threads": 1},
    )
    recipes = {"teacher": ""}
    rows = [
        quality.Entry(name, int, "", ARCH, recipes.get(name, "fit"), epochs=1) for name in scores
    ]
    quality.show(tmp_path, rows, ["stsb", "rte"], tmp_path / "out.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    ours = rows["4x192-ours-1"]
    assert (ours["average"], ours["kd_cpu_seconds"], ours["num_seeds"]) == (
        pytest.approx(0.6),
        60.0,
        2,
    )
    shares = [
        rows[name][key]
        for name in scores
        if name != "teacher"
        for key in ("kept", "kept_without_rte")
    ]
    expected = [1.2 / 1.3, 0.65 / 0.85, 1.0, 0.75 / 0.85]
    assert shares == (pytest.approx(expected) if is_there else [None] * 4)
    assert ("Shares are not known" in capsys.readouterr().out) == (not is_there)
    assert (tmp_path / "out.png").exists() == is_there


def test_a_task_of_which_source_has_whole_pieces_of_each(tmp_path):
    texts = {"masc/blog": "b" * 3, "masc/email": "e", "gutenberg/emma": "g"}
    rows = [
        {"source": source, "text": " ".join([letter] * 60)}
        for source, letters in texts.items()
        for letter in letters * 10
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet")
    place = single_sentences.which_source(str(tmp_path / "text.parquet"), "genre", tmp_path)
    task = load_task(place)
    rows = [
        *zip(task.train["sentence"], task.train["label"], strict=True),
        *zip(task.validation["sentence"], task.validation["label"], strict=True),
    ]
    assert sorted(rows) == [(" ".join("b" * 24), 0)] * 60 + [(" ".join("e" * 24), 1)] * 20


def test_what_crosses_is_between_two_sentences_alone():
    ids = torch.tensor(
        [[1, 7, 8, 2, 9, 2, 3], [1, 7, 8, 2, 3, 3, 3]]
    )  # [CLS] a b [SEP] c [SEP]; no pair
    found = starts.across(ids, ids != 3, separator=2, cls=1).nonzero().tolist()
    assert found == [[0, 1, 4], [0, 2, 4], [0, 4, 1], [0, 4, 2]]


def test_the_recipe_of_fit_is_the_default():
    config = common.read_config("fit")
    assert as_plain(config.recipe) == as_plain(Recipe())
    assert config.data == DataSettings()
