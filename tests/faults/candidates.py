"""Bad candidates: not finite, out of memory, crashing, hanging. Each fails alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pandas as pd

from kdnas.deploy import latency
from kdnas.distillation.module import HiddenStateDistillModule as Module
from tests.faults.harness import Bench, Row, fault


@fault("F11", "a candidate whose loss or latency is NaN or infinite, or that has no latency")
def not_finite(bench: Bench, row: Row) -> None:
    not_finite = (math.nan, math.inf, -math.inf)
    cases = [(place, value) for place in ("training", "held out") for value in not_finite]
    cases += [("latency", value) for value in (0.0, math.nan, -1.0)]
    bad, _ = max(bench.story(bench.reference), key=lambda pair: pair[1])  # else it would win
    for place, value in cases[:: 8 if bench.quick else 1]:
        name = bench.new_name()
        with hook(place, value, bad):
            error = bench.succeed(row, f"{place} {value}", bench.search(name))
        row.tried += 1
        mine = [result for result in bench.results(name).values() if result["params"] == bad]
        reasons = [result["state"] == "FAIL" and result["attrs"].get("failed") for result in mine]
        row.fault("undetected", f"{place} {value}: {reasons}", not (reasons and all(reasons)))
        frame = pd.read_csv(bench.run(name) / "trials.csv")
        on_front = frame.loc[frame.state == "FAIL", "front"].notna().any()
        row.fault("undetected", f"{place} {value}: it is on the front", on_front)
        bench.check(row, name, {}, error, in_order=False)  # another is proposed in its place


def hook(place: str, value: float, bad: dict[str, Any]) -> Any:
    """Have one shape meet such a value in such a place."""
    step, forward, measure = Module.training_step, Module.forward, latency.measure_latency

    def is_bad(config: Any) -> bool:
        return all(getattr(config, name) == known for name, known in bad.items())

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        is_here = self.trainer.is_last_batch and is_bad(self.arch)
        return step(self, batch, batch_idx) * (value if is_here else 1)

    def held_out(self: Any, student: Any, teacher: Any) -> Any:
        sums, counts = forward(self, student, teacher)
        return sums * (1 if self.training or not is_bad(self.arch) else value), counts

    def measured(models: Sequence[Any], settings: Any) -> Any:
        student, *others = measure(models, settings)
        return [replace(student, median_ms=value) if is_bad(models[0].config) else student, *others]

    if place == "held out":
        return mock.patch.object(Module, "forward", held_out)
    if place == "latency":
        return mock.patch.object(latency, "measure_latency", measured)
    return mock.patch.object(Module, "training_step", training_step)


ACTS = "gelu,relu,silu,tanh,gelu_new,quick_gelu,relu6,sigmoid,gelu_fast,mish".split(",")


def deadly_search(bench: Bench, row: Row, way: str, words: str, *more: str, **options: Any) -> None:
    """Half of the students end so; the search goes on, and the others are worth what they are."""
    acts = ACTS[: 1 if bench.quick else 10]
    shapes = {
        "num_attention_heads": "1",
        "hidden_size": "32",
        "num_hidden_layers": "2",
        "intermediate_size": "16,32",
        "hidden_act": ",".join(acts),
    }
    space = [f"--space.{key}=[{values}]" for key, values in shapes.items()]
    start = "--recipe.start=hooks.Deadly"
    args = bench.search(name := bench.new_name(), start, "--search.n_trials=20", *space, *more)
    code, error = bench.call_alone(args, environment={"DEADLY": way})
    row.expect(way, code, error)
    results = bench.results(name).values()
    deadly = [result for result in results if result["params"]["intermediate_size"] == 16]
    row.tried += len(deadly)
    reasons = [result["attrs"].get("failed", "none") for result in deadly]
    is_right = len(reasons) >= len(acts) and all(words in reason for reason in reasons)
    row.fault("undetected", f"{way}: {reasons}", not is_right)
    bench.check(row, name, {}, error, in_order=False, num_trials=len(acts))


@fault("F12", "candidates that take more memory than there is")
def memory(bench: Bench, row: Row) -> None:
    deadly_search(bench, row, "limit", "out of memory")


@fault("F38", "candidates that crash in native code, or hang", quick=False)
def crash(bench: Bench, row: Row) -> None:
    deadly_search(bench, row, "crash", "SIGSEGV")
    deadly_search(bench, row, "hang", "it took longer", "--candidate_timeout=0.25")
