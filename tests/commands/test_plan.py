"""What a dry run extends from a few rows and a few steps."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from kdnas.commands import plan
from kdnas.commands.config import RunConfig, SearchSettings
from kdnas.commands.inputs import Found, look
from kdnas.commands.rates import Rates
from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import ArchLatency, Latency, LatencySettings
from kdnas.distillation.teacher_states import StatesSettings, state_cache
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student, find_teacher, num_parameters
from kdnas.nas.candidate import Budget
from kdnas.nas.space import SearchSpace
from tests.conftest import make_rows


def test_a_fit_takes_its_start_and_each_epoch_what_it_trains_and_scores() -> None:
    assert Rates(start=1, train=2, score=3).seconds(num_epochs=2, num_train=10, num_scored=5) == 71


def test_what_a_few_students_weigh_tells_the_weight_of_all(any_teacher: Path) -> None:
    config = find_teacher(str(any_teacher)).config
    archs = list(SearchSpace.from_teacher(config))
    sizes = {arch: float(num_parameters(build_student(config, arch))) for arch in archs}
    some = np.random.default_rng(0).permutation(len(archs))[:12]
    known = {archs[place]: sizes[archs[place]] for place in some}
    others = [arch for arch in archs if arch not in known]
    assert len(others) > 12
    assert plan.extend(known, others) == pytest.approx([sizes[arch] for arch in others], rel=0.02)


def test_the_memory_of_a_gpu_is_told_where_one_was_used() -> None:
    captions = [
        plan.Plan([], 10**9, "few rows", gpu_bytes).table().caption
        for gpu_bytes in (0, 1_300_000_000)
    ]
    assert captions[1] == f"{captions[0]} Of the GPU a worker takes 1.3 GB at least."


def test_the_budget_is_held_against_students_that_were_not_looked_at(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = find_teacher(str(tiny_teacher)).config
    space = SearchSpace.from_teacher(config)

    class Meter:  # as long as the student has parameters
        looked = 0

        def measure(self, arch: StudentArch) -> ArchLatency:
            self.looked += 1
            size = arch.num_hidden_layers * arch.hidden_size**2
            return ArchLatency(Latency(size / 1000, 0.0, 0), Latency(100.0, 0.0, 0), size)

    meter = Meter()
    largest = max(arch.num_hidden_layers * arch.hidden_size**2 for arch in space)
    settings = SearchSettings(budget=Budget(num_parameters=largest // 3))
    found = SimpleNamespace(
        space=space, meter=meter, config=SimpleNamespace(seed=0, search=settings)
    )
    monkeypatch.setattr(plan, "SECONDS_OF_LOOKS", 0)
    latencies, refused_share = plan._latencies(found)
    within = [
        arch for arch in space if arch.num_hidden_layers * arch.hidden_size**2 <= largest // 3
    ]
    assert meter.looked == plan.FEWEST_LOOKS < len(within) < len(space)
    assert len(latencies) == pytest.approx(len(within), rel=0.2)
    assert refused_share == pytest.approx(1 - len(within) / len(space), rel=0.2)


def test_what_a_large_text_needs_is_extended_from_a_few_rows(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paced:  # trains nothing
        num_bytes = 1_000

        def __init__(
            self, found: Found, latencies: dict[StudentArch, float], *args: object
        ) -> None:
            self.measured = list(latencies)

        def rates(self, latency: float) -> Rates:
            return Rates(start=1, train=1e-3, score=1e-3)

    monkeypatch.setattr(plan, "Distillation", Paced)
    monkeypatch.setattr(
        plan, "distillation_rates", lambda *args: (Rates(start=1, train=1e-3, score=1e-3), 1_000)
    )
    text = tmp_path / "text.txt"
    text.write_text("\n".join(make_rows(3000, seed=4)))
    monkeypatch.setattr(plan, "MOST_TOKENS", 2_000)
    monkeypatch.setattr(plan, "MOST_LOOKS", 3)
    config = RunConfig(
        teacher=str(tiny_teacher),
        text=str(text),
        root=str(tmp_path / "logs"),
        data=DataSettings(max_length=24, batch_tokens=256),
        latency=LatencySettings(length=16, min_seconds=0.01),
    )
    planned = plan.plan(config)
    assert "of 3,000 rows" in planned.measured_on and not planned.measured_on.startswith("3,000")
    found = look(replace(config, root=str(tmp_path / "whole")), Console(quiet=True))
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
    planned = plan.plan(replace(config, states=StatesSettings(max_gb=0), time_budget=1e-3))
    assert [stage.name for stage in planned.stages][1:4:2] == ["teacher, live", "full KD"]
    assert planned.stages[1].disk_bytes == 0
    lengths = found.data.rows.lengths
    train, held_out = (
        int(lengths[ids].sum()) for ids in (found.data.train_ids(), found.data.held_out_ids())
    )
    one = 1 + config.search.num_epochs * (config.data.mini_fraction * train + held_out) / 1000
    assert planned.stages[2].seconds == pytest.approx(one + 0.06, rel=0.1), (
        "none is begun after the first"
    )
    whole = 1 + config.full_kd.num_epochs * (train + held_out) / 1000
    assert planned.stages[3].seconds == pytest.approx(whole, rel=0.1)


def test_random_rows_are_text_where_bytes_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bytes:
        def __len__(self) -> int:
            return 128

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    rows = plan._random_rows(Bytes(), 24)  # type: ignore[arg-type]
    assert len(set(rows)) > 1_000
    assert not any(character in row for row in rows for character in "\0\n\r")
    assert len(plan._random_rows(Bytes(), 4)) == 2_000  # type: ignore[arg-type]
