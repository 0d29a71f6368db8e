"""What a dry run scales from a few rows and a few steps."""

import re
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.callbacks import Timer
from rich.console import Console

from kdnas.commands import few_rows, plan
from kdnas.commands.config import FullKDSettings, RunConfig, SearchConfig, SearchSettings
from kdnas.commands.few_rows import Sizes
from kdnas.commands.inputs import Inputs, load_inputs
from kdnas.commands.plan import Cost, Finetuning, Looks, Measured, Rates, Sample
from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import ArchLatency, Latency, LatencySettings
from kdnas.distillation.teacher_states import StatesSettings, TeacherStates, state_cache
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.nas.budget import Budget
from kdnas.nas.space import SearchSpace
from tests.conftest import make_rows, save_teacher


def test_a_fit_takes_its_start_and_each_epoch_what_it_trains_and_scores() -> None:
    assert Rates(start=1, train=2, score=3).seconds(num_epochs=2, num_train=10, num_scored=5) == 71


def test_start_training_and_scoring_are_told_apart() -> None:
    def one_epoch(timer: Timer) -> None:
        time.sleep(0.1)
        timer.on_train_start(None, None)  # type: ignore[arg-type]
        time.sleep(0.2)
        timer.on_validation_start(None, None)  # type: ignore[arg-type]
        time.sleep(0.3)
        timer.on_validation_end(None, None)  # type: ignore[arg-type]
        timer.on_train_end(None, None)  # type: ignore[arg-type]

    rates = plan._rates(one_epoch, num_train=2, num_scored=10)
    assert rates == pytest.approx((0.1, 0.1, 0.03), rel=0.3)


def an_arch(width: int) -> StudentArch:
    return StudentArch(1, 1, width, width)


def a_look(milliseconds: float, num_parameters: int = 1) -> ArchLatency:
    return ArchLatency(Latency(milliseconds, 0.0, 0), Latency(100.0, 0.0, 0), num_parameters)


# A teacher of BERT-base's size on 18 MB of text and STS-B, by two cores.
SLOWEST = an_arch(4)
MEASURED = Measured(
    sizes=Sizes(num_rows=27_591, num_train=5_749, num_validation=1_500),
    about="a few rows",
    tokens=(1.9e6, 0.1e6),
    reading=5.0,
    tokenising=Cost(25.0, 2e7, 1e9),
    teacher=Cost(3_400.0, 3e9, 2e9),
    missing=1.0,
    looks=Looks({an_arch(1): a_look(1), SLOWEST: a_look(4, 10**7)}, share=0.5, seconds=1.0),
    num_archs=1_000,
    rates={an_arch(1): Rates(20.0, 1e-3, 3e-4), SLOWEST: Rates(60.0, 5e-3, 1.5e-3)},
    full=Rates(40.0, 2e-3, 6e-4),
    finetuning=Finetuning(Rates(5.0, 0.3, 0.1), Rates(2.0, 0.04, 0.02), 4e8, 2e9),
    num_slots=2,
    num_parallel=2,
    memory=2e9,
    free_bytes=10**12,
    gpu_bytes=0,
)


def test_students_between_those_that_are_measured_take_as_long_as_their_latency_says() -> None:
    latencies = {an_arch(width): a_look(width) for width in (1, 2, 3, 4, 7)}
    looks = Looks(latencies, share=1.0, seconds=2.0)
    assert looks.ends() == [an_arch(1), an_arch(7)]
    known = dict(zip(looks.ends(), (10.0, 70.0), strict=True))
    rates = {arch: Rates(seconds, 0.0, 0.0) for arch, seconds in known.items()}
    config = SearchConfig(teacher="", text="", search=SearchSettings(n_trials=5))
    measured = replace(MEASURED, looks=looks, rates=rates, num_archs=9)
    stage = measured.plan(config).stages[2]
    mean = np.mean([10, 20, 30, 40, 70])
    assert (stage.name, stage.seconds) == ("5 candidates", pytest.approx(5 * mean / 2 + 5 * 2.0))

    few = replace(measured, looks=looks._replace(share=1 / 3))
    stage = few.plan(config).stages[2]
    assert (stage.name, stage.seconds) == ("3 candidates", pytest.approx(3 * mean / 2 + 9 * 2.0))


def test_the_memory_of_a_gpu_is_told_where_one_was_used() -> None:
    captions = [
        plan.Plan([], 10**9, "few rows", gpu_bytes).table().caption
        for gpu_bytes in (0, 1_300_000_000)
    ]
    assert captions[1] == f"{captions[0]} A worker takes 1.3 GB of GPU memory at least."


def test_the_budget_is_held_against_students_from_all_over_the_space(tiny_teacher: Path) -> None:
    space = SearchSpace.from_teacher(find_teacher(str(tiny_teacher)).config)

    def size(arch: StudentArch) -> int:
        return arch.num_hidden_layers * arch.hidden_size**2

    def looks(most: int) -> Looks:
        settings = SearchSettings(budget=Budget(num_parameters=most))
        meter = SimpleNamespace(measure=lambda arch: a_look(size(arch), size(arch)))
        config = SimpleNamespace(seed=0, search=settings)
        return plan._looks(SimpleNamespace(space=space, meter=meter, config=config))  # type: ignore[arg-type]

    half = sorted(map(size, space))[len(space) // 2]
    found = looks(most=half)
    sizes = [size(arch) for arch in found.within]
    assert sizes == sorted(sizes) and len(set(sizes)) > 1 and max(sizes) <= half
    assert found.share == len(sizes) / plan.NUM_LOOKS == pytest.approx(0.5, abs=0.3)
    nobody = looks(most=1)
    assert (list(nobody.within), nobody.share) == ([space.smallest()], 0.0)


# What docs/scale.md takes for granted of 100 GB of text, and of a machine with eight GPUs.
NUM_ROWS, TOKENS_A_ROW = 145_000_000, 74
READ, TOKENISED = 10e-6, 600e-6 / 64  # seconds a row: one process, and 64 cores
TRAINED, SCORED, TAUGHT = 200_000, 600_000, 400_000  # tokens a second, on one GPU
HUGE = {
    "search.n_trials": 500,
    "data.mini_fraction": 0.001,
    "data.held_out_fraction": 0.001,
    "full_kd.num_epochs": 1,
    "time_budget": None,
}


def stages_of_the_page() -> dict[str, list[float]]:
    """Of the stages in docs/scale.md: minutes, and GB of disk and of memory."""
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    section = page.partition("## 100 GB of text")[2].partition("\n## ")[0]
    for name, value in HUGE.items():
        assert f"--{name} {'null' if value is None else value} " in section
    for number in (1e6 * READ, 64e6 * TOKENISED, TRAINED, SCORED, TAUGHT):
        assert f" {number:,.0f}" in " ".join(section.split())
    rows = re.findall(r"(?m)^\| ([^|]+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \|$", section)
    return {name: [float(value.replace(",", "")) for value in values] for name, *values in rows}


def test_the_page_about_100_gb_says_what_a_dry_run_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = save_teacher(
        tmp_path / "teacher",
        hidden_size=768,  # BERT-base's
        num_attention_heads=12,
        num_hidden_layers=6,
        max_position_embeddings=128,
    )
    text = tmp_path / "text.txt"
    words = " ".join(make_rows(200, longest=60)).split()
    rows = [" ".join(words[i : i + TOKENS_A_ROW - 2]) for i in range(0, 2000, 40)]
    text.write_text("\n".join(rows))
    monkeypatch.setattr(
        few_rows, "some_rows", lambda *args: ([(row, None) for row in rows], NUM_ROWS)
    )
    monkeypatch.setattr(plan, "NUM_LOOKS", 1)
    monkeypatch.setattr(plan, "num_threads", lambda slots: 64)

    num_tokens = NUM_ROWS * TOKENS_A_ROW
    rates = Rates(start=30.0, train=1 / TRAINED, score=1 / SCORED)
    monkeypatch.setattr(plan, "_distillation", lambda *args: rates)
    reading, taught, looks = plan._reading, plan._teacher, plan._looks

    def at_the_speed_of_the_page(sample: Sample) -> tuple[float, Cost]:
        _, cost = reading(sample)
        return NUM_ROWS * READ, cost._replace(seconds=NUM_ROWS * TOKENISED)

    def taught_at_its_speed(sample: Sample) -> tuple[TeacherStates, Cost, float]:
        states, cost, missing = taught(sample)
        return states, cost._replace(seconds=num_tokens / TAUGHT), missing

    def looked_at_in_two_seconds(found: Inputs) -> Looks:
        return looks(found)._replace(seconds=2.0, share=1.0)

    monkeypatch.setattr(plan, "_reading", at_the_speed_of_the_page)
    monkeypatch.setattr(plan, "_teacher", taught_at_its_speed)
    monkeypatch.setattr(plan, "_looks", looked_at_in_two_seconds)
    config = RunConfig(
        teacher=str(teacher),
        text=str(text),
        root=str(tmp_path / "logs"),
        workers=8,
        time_budget=HUGE["time_budget"],
        data=DataSettings(
            mini_fraction=HUGE["data.mini_fraction"],
            held_out_fraction=HUGE["data.held_out_fraction"],
            pair_share=0.0,
        ),
        search=SearchSettings(n_trials=HUGE["search.n_trials"]),
        full_kd=FullKDSettings(num_epochs=HUGE["full_kd.num_epochs"]),
        latency=LatencySettings(length=16, min_seconds=0.01),
    )
    planned = plan.plan(config)
    page = stages_of_the_page()
    assert list(page) == [stage.name for stage in planned.stages]
    for stage in planned.stages:
        minutes, disk, memory = page[stage.name]
        assert minutes == pytest.approx(stage.seconds / 60, rel=0.3), stage
        assert memory == pytest.approx(stage.memory_bytes / 1e9, rel=0.3), stage
        if stage.name in ("reading the text", "teacher states"):  # others grow with the student
            assert disk == pytest.approx(stage.disk_bytes / 1e9, rel=0.3), stage


def test_what_a_large_text_needs_is_scaled_from_a_few_rows(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(start=1, train=1e-3, score=1e-3)  # nothing is trained

    monkeypatch.setattr(plan, "_distillation", lambda *args: rates)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(make_rows(3000, seed=4)))
    monkeypatch.setattr(plan, "MOST_TOKENS", 2_000)
    monkeypatch.setattr(plan, "NUM_LOOKS", 3)
    config = RunConfig(
        teacher=str(tiny_teacher),
        text=str(text),
        root=str(tmp_path / "logs"),
        data=DataSettings(max_length=24, batch_tokens=256),
        latency=LatencySettings(length=16, min_seconds=0.01),
    )
    planned = plan.plan(config)
    assert "of 3,000 rows" in planned.measured_on and not planned.measured_on.startswith("3,000")
    found = load_inputs(replace(config, root=str(tmp_path / "whole")), Console(quiet=True))
    states = state_cache(found.teacher, found.data, found.target_layers, found.states_settings)
    by_name = {stage.name: stage for stage in planned.stages}
    stored = [by_name[name].disk_bytes for name in ("teacher states", "teacher states, other rows")]
    assert sum(stored) == pytest.approx(states.num_bytes(), rel=0.1)
    share = config.data.mini_fraction * 0.95 + 0.05
    assert stored[0] / sum(stored) == pytest.approx(share, rel=0.15)

    budget = sum(stored) / 2e9  # enough for the search, not for full KD
    planned = plan.plan(replace(config, states=StatesSettings(max_gb=budget)))
    assert [stage.name for stage in planned.stages][1:4:2] == [
        "teacher states",
        "teacher, live in full KD",
    ]
    planned = plan.plan(replace(config, states=StatesSettings(max_gb=0)))
    assert [stage.name for stage in planned.stages][1:5] == [
        "teacher, live",
        "20 candidates",
        "teacher, live in full KD",
        "full KD",
    ]
    assert planned.stages[1].disk_bytes == planned.stages[3].disk_bytes == 0
    passes = 20 * config.search.num_epochs * share / config.full_kd.num_epochs
    most = (passes + 1) * planned.stages[3].seconds
    assert passes * planned.stages[3].seconds < planned.stages[1].seconds < most
    lengths = found.data.rows.lengths
    train, held_out = (
        int(lengths[ids].sum()) for ids in (found.data.train_ids(), found.data.held_out_ids())
    )
    whole = 1 + config.full_kd.num_epochs * (train + held_out) / 1000
    assert planned.stages[4].seconds == pytest.approx(whole, rel=0.1)

    names = {field.name for field in fields(SearchConfig)}
    asked = {name: value for name, value in vars(config).items() if name in names}
    planned = plan.plan(SearchConfig(**asked | {"time_budget": 1e-3}))
    one = 1 + config.search.num_epochs * (config.data.mini_fraction * train + held_out) / 1000
    assert planned.stages[2].seconds == pytest.approx(one + 0.06, rel=0.1), (
        "none is begun after the first"
    )
