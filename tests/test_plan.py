"""What a dry run extends from a few rows and a few steps."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_rows
from rich.console import Console

from kdnas import plan
from kdnas.arch import StudentArch
from kdnas.config import RunConfig
from kdnas.data.datamodule import DataSettings
from kdnas.distill.teacher import StatesSettings, state_cache
from kdnas.job import Found, look
from kdnas.latency import LatencySettings
from kdnas.rates import Rates


def test_a_fit_takes_its_start_and_each_epoch_what_it_trains_and_scores() -> None:
    assert Rates(start=1, train=2, score=3).seconds(num_epochs=2, num_train=10, num_scored=5) == 71


def test_what_a_large_text_needs_is_extended_from_a_few_rows(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paced:  # trains nothing
        num_bytes = 1_000

        def __init__(self, found: Found, latencies: dict[StudentArch, float], *args: object) -> None:
            self.measured = list(latencies)

        def rates(self, latency: float) -> Rates:
            return Rates(start=1, train=1e-3, score=1e-3)

    monkeypatch.setattr(plan, "Distillation", Paced)
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
    assert [stage.name for stage in planned.stages][1:4:2] == ["teacher states", "teacher, live in full KD"]
    planned = plan.plan(replace(config, states=StatesSettings(max_gb=0), time_budget=1e-3))
    assert [stage.name for stage in planned.stages][1:4:2] == ["teacher, live", "full KD"]
    assert planned.stages[1].disk_bytes == 0
    lengths = found.data.rows.lengths
    train, held_out = (int(lengths[ids].sum()) for ids in (found.data.train_ids(), found.data.held_out_ids()))
    one = 1 + config.search.num_epochs * (config.data.mini_fraction * train + held_out) / 1000
    assert planned.stages[2].seconds == pytest.approx(one + 0.06, rel=0.1), "none is begun after the first"
    whole = 1 + config.full_kd.num_epochs * (train + held_out) / 1000
    assert planned.stages[3].seconds == pytest.approx(whole, rel=0.1)
