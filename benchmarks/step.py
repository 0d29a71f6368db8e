"""How near a distillation step is to what the machine can do, where its time goes, and what others' steps take.

    python benchmarks/step.py [--quick] [--json PATH] [--text PATH] [--accelerator cpu|gpu] [--compile] [--objectives]
    python benchmarks/step.py --counts [--json PATH] [--text PATH] [--accelerator cpu|gpu]

The peak is the fastest matmul that this machine was seen to do, in the precision of the step. A step's FLOPs are those
of its matmuls, on real tokens alone (padding is our waste, not work): forward 2 * parameters * tokens for every linear
map, and 4 * width * length for the scores and the mix of attention, per token and layer; three times that with the
backward pass. The maps of the objective are counted likewise.
The optimizer (Muon's matmuls too), norms, activations and the embedding are not counted, so
``step_over_flop_time`` = seconds of a step / (FLOPs / peak) says what they, padding and Python cost. Target: 2.5.

Parts of a step, in milliseconds, medians over steps: ``loader`` (the wait for batches and stored states, which a
thread reads ahead); ``teacher`` (where it runs live; ``tokens_per_second_live`` is of a step with it);
``student forward``; ``criterion``; ``backward``; ``optimizer`` (clip, step, zero_grad); ``Trainer``: all the rest.
Weights are random: they do not change the time. On a GPU each part waits for the device, so that its time is its own;
``--compile`` compiles our student, for lengths that change; ``--objectives`` times those of variants.py too, 4 x 192.

``--counts`` times nothing. It counts what a step of a candidate of 4 x 192 on stored states asks of a device, which
is the same on every machine: ``ops_a_step``, the operations that torch dispatches, each a launch on a GPU (views are
none); and
``synchronisations_a_step``, those for which the host would wait: where it reads a number, where a size depends on
values (boolean indices), and where a number of Python's becomes a tensor. Medians over steps.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import common
import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from variants import VARIANTS

from kdnas.commands.config import as_plain
from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import HiddenStates, Objective, View, needed_layers
from kdnas.distillation.start import Started
from kdnas.distillation.teacher_states import (
    LiveTeacher,
    StateSource,
    StatesSettings,
    TeacherStates,
    open_states,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher, build_student, encode, find_teacher
from kdnas.models.layers import LastAndSkip
from kdnas.nas.callbacks import TrainingLoss
from kdnas.system.files import write_json
from kdnas.training.precision import autocast, bf16_is_faster
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

ARCHS = (StudentArch(4, 6, 192, 768), StudentArch(3, 12, 384, 1536))
BATCH_TOKENS = 4096
# (rows, inner, columns): square ones, and the students' own first maps on a batch.
MATMULS = (
    (2048, 2048, 2048),
    (3072, 3072, 3072),
    (4096, 4096, 4096),
    (4096, 192, 768),
    (4096, 384, 1536),
)
WARM_UP = 4
PARTS = ("loader", "teacher", "student forward", "criterion", "backward", "optimizer", "Trainer")


def clock() -> float:
    """The time when the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()


def student_flops(lengths: Sequence[int], arch: StudentArch) -> int:
    """FLOPs of a student's forward matmuls.

    ``L (2 (4 H^2 + 2 H I) sum n + 4 H sum n^2)`` for rows of n real tokens: four maps of attention, two of the
    feed-forward part; scores and mix of attention.

    Args:
        lengths: real tokens of each row.
        arch: L layers, width H, intermediate size I.
    """
    width = arch.hidden_size
    maps = 2 * (4 * width**2 + 2 * width * arch.intermediate_size) * sum(lengths)
    attention = 4 * width * sum(length**2 for length in lengths)
    return arch.num_hidden_layers * (maps + attention)


def criterion_flops(module: HiddenStateDistillModule, batch: Batch) -> int:
    """FLOPs of the objective's matmuls on a batch, forward and backward, as torch's FlopCounterMode counts them."""
    attention = module.student.config._attn_implementation
    module.student.set_attn_implementation("eager")
    with autocast("cpu"):
        _, teacher = module.views(batch)
        with torch.no_grad():
            output = encode(
                module.student, batch, maps=True
            )  # the step takes them from the model, too
        padded = {
            layer - 1: state.requires_grad_() for layer, state in enumerate(output.hidden_states)
        }
        student = View(
            module.student,
            batch,
            padded,
            maps=[attention.requires_grad_() for attention in output.attentions],
        )
        with FlopCounterMode(display=False) as counter:
            module(student, teacher)[0].sum().backward()
    module.zero_grad()
    module.student.set_attn_implementation(attention)
    return counter.get_total_flops()


def measure_matmuls(seconds_each: float, device: str = "cpu") -> list[dict[str, Any]]:
    """GFLOP/s of matmuls in the precision of a step, the fastest of many, by shape (rows, inner, columns)."""
    found, dtype = [], torch.bfloat16 if bf16_is_faster(device) else torch.float32
    for rows, inner, columns in MATMULS:
        left, right = (
            torch.randn(shape, dtype=dtype, device=device)
            for shape in ((rows, inner), (columns, inner))
        )
        fastest, stop = float("inf"), clock() + seconds_each
        while clock() < stop or fastest == float("inf"):
            begin = clock()
            F.linear(left, right)
            fastest = min(fastest, clock() - begin)
        found.append(
            {"shape": [rows, inner, columns], "gflops": 2 * rows * inner * columns / fastest / 1e9}
        )
    return found


class StepParts(pl.Callback):
    """Times every part of a Trainer's steps, and stops after some.

    Args:
        num_steps: to measure, after ``WARM_UP`` others.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.steps: list[dict[str, float]] = []  # seconds of each part, and of the whole step
        self.lengths: list[list[int]] = []
        self._now: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it takes is added to a part of the step."""

        def call(*args: Any, **options: Any) -> Any:
            begin = clock()
            result = function(*args, **options)
            self._now[name] += clock() - begin
            return result

        return call

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.views = self.timed("views", module.views)
        module.forward = self.timed("criterion", module.forward)
        module.backward = self.timed("backward", module.backward)
        module.optimizer_zero_grad = self.timed("optimizer", module.optimizer_zero_grad)
        clip = module.configure_gradient_clipping

        def clip_and_begin(*args: Any, **options: Any) -> None:
            self._clip_began = clock()
            clip(*args, **options)

        def stepped(*_: Any) -> None:
            self._now["optimizer"] += clock() - self._clip_began

        # A Lightning optimizer's step() runs the whole step inside; its own part lies between these two.
        module.configure_gradient_clipping = clip_and_begin
        trainer.optimizers[0].register_step_post_hook(stepped)
        self._last = clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = clock()
        parts = dict(self._now)
        parts["student forward"] = parts.pop("views") - parts.get("teacher", 0.0)
        parts = {name: parts.get(name, 0.0) for name in PARTS[:-1]}
        parts["Trainer"] = now - self._last - sum(parts.values())
        self.steps.append(parts | {"step": now - self._last})
        self.lengths.append(batch["attention_mask"].sum(1).tolist())
        if len(self.steps) == WARM_UP + self.num_steps:
            trainer.should_stop = True
        self._now.clear()
        self._last = clock()


class Operations(TorchDispatchMode):
    """Counts operations, and those for which the host waits for a device."""

    WAITS = {"_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero", "_unique2"}
    INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
    LAUNCH_NOTHING = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"} | {
        "_record_function_enter_new",
        "_record_function_exit",
    }

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.num_ops += not (func.is_view or name in self.LAUNCH_NOTHING)
        is_by_mask = name in self.INDEXES and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.num_waits += is_by_mask or name in self.WAITS
        return func(*args, **(kwargs or {}))


class StepCounts(pl.Callback):
    """What each step adds to the counts; the last of a Trainer's callbacks."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.totals: list[tuple[int, int]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.totals.append((self.operations.num_ops, self.operations.num_waits))

    def medians(self) -> dict[str, float]:
        """Over all steps but the first, which makes the optimizer's state."""
        steps = [
            (after[0] - before[0], after[1] - before[1]) for before, after in pairwise(self.totals)
        ]
        ops, waits = zip(*steps, strict=True)
        return {"ops_a_step": median(ops), "synchronisations_a_step": median(waits)}


def count_steps(
    teacher: Teacher, arch: StudentArch, data: KDDataModule, folder: Path, accelerator: str
) -> dict[str, float]:
    """What a candidate's steps on stored states ask of a device; see the module."""
    module = HiddenStateDistillModule(teacher, arch, Recipe())
    module.started = Started()
    device = "cpu" if accelerator == "cpu" else "cuda"
    stored = StatesSettings(str(folder / "states"), max_gb=float("inf"))
    module.states = open_states(teacher, data, module.target_layers, stored, device)
    operations = Operations()
    counts = StepCounts(operations)
    settings = TrainerSettings(accelerator=accelerator)
    trainer = make_trainer(settings, folder / "fit", 1, [TrainingLoss(), counts])
    trainer.limit_val_batches = 0
    with operations:
        fit(trainer, module, data)
    return counts.medians()


class LoaderTime(Profiler):
    """Tells ``StepParts`` what the next batch took."""

    def __init__(self, parts: StepParts) -> None:
        super().__init__()
        self._parts, self._begin = parts, 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._begin = clock()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._parts._now["loader"] += clock() - self._begin


def measure_ours(
    teacher: Teacher,
    arch: StudentArch,
    objective: Objective,
    data: KDDataModule,
    states: TeacherStates,
    num_steps: int,
    peak: float,
    folder: Path,
    device: str,
    compiled: bool,
) -> dict[str, Any]:
    """A step of ours as the Trainer runs it, whole and by parts.

    Args:
        teacher: whose states.
        arch: of the student.
        objective: of its recipe.
        data: set up.
        states: the cached ones.
        num_steps: to measure.
        peak: FLOP/s.
        folder: for the Trainer's files.
        device: where the student is.
        compiled: it, by torch.compile.
    """
    batches = list(data.train_dataloader())
    num_epochs = -(-(WARM_UP + num_steps) // len(batches))

    def fitted(name: str, source: StateSource, parts: StepParts) -> HiddenStateDistillModule:
        pl.seed_everything(0, verbose=False)
        module = HiddenStateDistillModule(teacher, arch, Recipe(objective=objective))
        module.started = Started()
        module.states = replace(states, source=source)
        progressing = EpochLines(f"{name}, {arch.num_hidden_layers} x {arch.hidden_size}", print)
        if compiled:
            module.student.compile(dynamic=True)
        settings = TrainerSettings(accelerator="cpu" if device == "cpu" else "gpu")
        trainer = make_trainer(settings, folder, num_epochs, [parts, progressing])
        trainer.limit_val_batches = 0
        trainer.profiler = LoaderTime(parts)  # type: ignore[attr-defined]
        fit(trainer, module, data)
        return module

    parts, live_parts = StepParts(num_steps), StepParts(max(3, num_steps // 4))
    module = fitted("ours, stored states", states.source, parts)
    fitted("ours, live", live_parts.timed("teacher", LiveTeacher(teacher.model)), live_parts)
    example = max(batches, key=lambda batch: int(batch["attention_mask"].sum()))
    teacher.model.to("cpu")  # type: ignore[arg-type]
    module.to("cpu")
    per_token = criterion_flops(module, example) / int(example["attention_mask"].sum())
    steps, lengths = parts.steps[WARM_UP:], parts.lengths[WARM_UP:]
    live_steps, live_lengths = live_parts.steps[WARM_UP:], live_parts.lengths[WARM_UP:]
    seconds = [step["step"] for step in steps]
    flops = [
        3 * student_flops(row_lengths, arch) + per_token * sum(row_lengths)
        for row_lengths in lengths
    ]
    over = median(taken * peak / work for taken, work in zip(seconds, flops, strict=True))
    return {
        "step_ms": 1e3 * median(seconds),
        "tokens_per_second": sum(map(sum, lengths)) / sum(seconds),
        "tokens_a_step": median(map(sum, lengths)),
        "gflop_a_step": median(flops) / 1e9,
        "share_of_peak": 1 / over,
        "step_over_flop_time": over,
        "parts_ms": {name: 1e3 * median(step[name] for step in steps) for name in PARTS},
        "optimizer_share": median(step["optimizer"] / step["step"] for step in steps),
        "tokens_per_second_live": sum(map(sum, live_lengths))
        / sum(step["step"] for step in live_steps),
        "live_teacher_ms": 1e3 * median(step["teacher"] for step in live_steps),
        "num_steps": len(steps),
        "num_parameters": sum(parameter.numel() for parameter in module.parameters()),
    }


def on(device: str, batch: Batch) -> Any:
    """A batch on a device."""
    values: Any = batch
    return {name: tensor.to(device) for name, tensor in values.items()}


def time_steps(
    step: Callable[[Batch], object], batches: Iterable[Batch], num_steps: int
) -> dict[str, Any]:
    """A plain loop: median milliseconds of a step, and real tokens a second."""
    seconds, tokens = [], []
    for batch in islice(cycle(batches), WARM_UP + num_steps):
        begin = clock()
        step(batch)
        seconds.append(clock() - begin)
        tokens.append(int(batch["attention_mask"].sum()))
    seconds, tokens = seconds[WARM_UP:], tokens[WARM_UP:]
    return {
        "step_ms": 1e3 * median(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "tokens_a_step": median(tokens),
        "num_steps": len(seconds),
    }


def original_step(teacher: Teacher, arch: StudentArch, device: str) -> Callable[[Batch], None]:
    """The original's: fp32, teacher live in fp32, one projection for all layers, AdamW at 1e-4 that is not fused."""
    student = build_student(teacher.config, arch).train().to(device)
    projection = nn.Linear(arch.hidden_size, 2 * teacher.config.hidden_size, device=device)
    teacher.model.to(device)
    optimizer = torch.optim.AdamW([*student.parameters(), *projection.parameters()], lr=1e-4)
    pairs = LastAndSkip()(arch.num_hidden_layers, teacher.config.num_hidden_layers)

    def step(batch: Batch) -> None:
        with torch.no_grad():
            theirs = encode(teacher.model, batch).hidden_states[1:]
        ours = encode(student, batch).hidden_states[1:]
        mask = batch["attention_mask"][..., None]
        loss = torch.zeros((), device=device)
        for state, layers in zip(ours, pairs, strict=True):
            target = torch.cat([theirs[layer] for layer in layers], -1)
            loss = (
                loss
                + ((projection(state) - target).square() * mask).sum()
                / mask.sum()
                / target.shape[-1]
            )
        optimizer.zero_grad()
        (loss / len(pairs)).backward()
        optimizer.step()

    return step


def transformers_step(teacher: Teacher, arch: StudentArch, device: str) -> Callable[[Batch], None]:
    """transformers' own encoder of the shape, in our step's precision with a fused AdamW: no teacher, hardly a loss."""
    model = build_student(teacher.config, arch).eval().to(device)  # no dropout, as ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def step(batch: Any) -> None:
        with autocast(device):
            state = model(**{name: batch[name] for name in inputs}).last_hidden_state
            loss = state.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def open_data(teacher: str, text: str) -> KDDataModule:
    """Rows as fit.yaml has them, in batches of ``BATCH_TOKENS``."""
    settings = replace(
        common.read_config("fit").data,
        max_length=128,
        batch_tokens=BATCH_TOKENS,
        num_mask_variants=1,
    )
    data = KDDataModule(teacher, text, settings)
    data.setup()
    return data


def measure(
    text: str | None,
    quick: bool,
    folder: Path,
    device: str,
    compiled: bool,
    others: bool,
) -> dict[str, Any]:
    """All figures; see the module."""
    num_steps = 5 if quick else 100
    teacher = find_teacher(common.TEACHER)
    text = common.cut_text(text, folder, most=400 if quick else 3000)
    config = common.read_config("fit")
    data = open_data(common.TEACHER, text)
    original = KDDataModule(common.TEACHER, text, common.read_config("original_fit").data)
    original.setup()
    named = {
        "HiddenStates": HiddenStates(),
        "recipe's default": Recipe().objective,
        "fit.yaml": config.recipe.objective,
    }
    if others:
        named |= {
            name: found.recipe["objective"]
            for name, found in VARIANTS.items()
            if "objective" in found.recipe
        }
    archs = ARCHS[:1] if others else ARCHS
    # Each once, under its last name.
    objectives = dict(
        {repr(as_plain(objective)): (name, objective) for name, objective in named.items()}.values()
    )
    matmuls = measure_matmuls(0.4 if quick else 3.0, device)
    peak = max(matmul["gflops"] for matmul in matmuls)
    num_layers = teacher.config.num_hidden_layers
    depths = [arch.num_hidden_layers for arch in archs]
    layers = {
        layer
        for objective in objectives.values()
        for layer in needed_layers(objective, depths, num_layers)
    }
    states = open_states(
        teacher, data, layers, StatesSettings(str(folder / "states"), max_gb=float("inf"))
    )
    students: list[dict[str, Any]] = []
    for arch in archs:
        result: dict[str, Any] = {"arch": arch.to_dict(), "ours": {}}
        for name, objective in objectives.items():
            result["ours"][name] = measure_ours(
                teacher,
                arch,
                objective,
                data,
                states,
                num_steps,
                peak * 1e9,
                folder / "fit",
                device,
                compiled,
            )
        batches = [on(device, batch) for batch in data.train_dataloader()]
        result["transformers"] = time_steps(
            transformers_step(teacher, arch, device), batches, num_steps
        )
        rows = [on(device, batch) for batch in original.train_dataloader()]
        result["original"] = time_steps(original_step(teacher, arch, device), rows, num_steps)
        for name in ("transformers", "original"):
            for ours in result["ours"].values():
                ours[f"tokens_over_{name}"] = (
                    ours["tokens_per_second"] / result[name]["tokens_per_second"]
                )
        students.append(result)
    asked = {"quick": quick, "device": device, "compiled": compiled}
    return {
        "machine": common.machine(),
        **asked,
        "matmuls": matmuls,
        "peak_gflops": peak,
        "students": students,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """The tables."""
    threads = results["machine"]["threads"]
    table = Table("rows x inner x columns", "GFLOP/s", title=f"matmuls, {threads} threads")
    for matmul in results["matmuls"]:
        table.add_row(" x ".join(map(str, matmul["shape"])), f"{matmul['gflops']:,.0f}")
    console.print(table)
    table = Table(
        "step", "ms", "tokens", "tokens/s", "ours is", "of peak", "over FLOP time", title="Steps"
    )
    parts = Table("ms of a step", title="Parts of our steps")
    columns = []
    for student in results["students"]:
        shape = f"{student['arch']['num_hidden_layers']} x {student['arch']['hidden_size']}"
        for name, ours in student["ours"].items():
            table.add_row(
                f"{shape} ours, {name}, live teacher",
                "",
                "",
                f"{ours['tokens_per_second_live']:,.0f}",
                "",
                "",
                "",
            )
            table.add_row(
                f"{shape} ours, {name}",
                *(f"{ours[key]:,.0f}" for key in ("step_ms", "tokens_a_step", "tokens_per_second")),
                "",
                f"{ours['share_of_peak']:.0%}",
                f"{ours['step_over_flop_time']:.2f}",
            )
            parts.add_column(f"{shape}\n{name}", justify="right")
            share = {"optimizer, % of the step": 100 * ours["optimizer_share"]}
            columns.append(ours["parts_ms"] | {"(live teacher)": ours["live_teacher_ms"]} | share)
        for name in ("transformers", "original"):
            other, ours = student[name], next(iter(student["ours"].values()))
            table.add_row(
                f"{shape} {name}",
                *(
                    f"{other[key]:,.0f}"
                    for key in ("step_ms", "tokens_a_step", "tokens_per_second")
                ),
                f"{ours[f'tokens_over_{name}']:.2f} x",
            )
    for name in columns[0]:
        parts.add_row(name, *(f"{column[name]:.1f}" for column in columns))
    console.print(table)
    console.print(parts)


def main(args: Sequence[str] | None = None) -> None:
    """Measure, show and write."""
    options = common.options(
        "step", "Times a distillation step against the machine's peak and others'."
    )
    options.add_argument(
        "--accelerator", choices=["cpu", "gpu"], default="cpu", help="where all of it runs"
    )
    options.add_argument("--compile", action="store_true", help="our student, by torch.compile")
    options.add_argument("--objectives", action="store_true", help="those of variants.py too")
    options.add_argument("--counts", action="store_true", help="count operations, time nothing")
    chosen = options.parse_args(args)
    common.quieten()
    console = Console()
    common.OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.OUTPUT) as folder:
        if chosen.counts:
            text = common.cut_text(chosen.text, Path(folder), most=400)
            data = open_data(common.TEACHER, text)
            teacher = find_teacher(common.TEACHER)
            results = count_steps(teacher, ARCHS[0], data, Path(folder), chosen.accelerator)
            write_json(chosen.json, results)
            console.print(results)
            return
        device = "cpu" if chosen.accelerator == "cpu" else "cuda"
        results = measure(
            chosen.text,
            chosen.quick,
            Path(folder),
            device,
            chosen.compile,
            chosen.objectives,
        )
    show(results, console)
    write_json(chosen.json, results)
    console.print(f"Figures: {chosen.json}")


if __name__ == "__main__":
    main()
