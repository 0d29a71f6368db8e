"""How much sooner our recipe reaches what the original's reaches in four epochs.

    python benchmarks/recipe.py [--quick] [--json PATH] [--text PATH] [--epochs NUMBER]
                                 [--learning-rate RATE] [--matrix-learning-rate RATE]

Both train the same student (4 layers x 192) on the same 30 % of a text's rows, cut at 50 tokens. The original's recipe
is configs/original_fit.yaml, with the teacher in float32 too. Ours is the default Recipe with the original's own objective,
in bf16, on stored teacher states, 4,096 tokens a batch.

The error of both is the original's objective: on the same held-out rows with the same masks, the mean squared error of
the student's layers, each through its recipe's own trained projection, on the two teacher layers that LastAndSkip gives
each, over the variance of those layers (1: no more than their mean). Seconds are of training alone, with ours' start
from the teacher, without the reading of text and teacher and without the measuring, for which the clock stops. What
storing the teacher's states took is counted in ``speedup_with_cache_cost`` alone: that of the training rows, by their
share of the tokens, since held-out rows serve the measuring (``cache_seconds_all_rows`` has both).
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.distillation.start import FromTeacher
from kdnas.distillation.teacher_states import (
    LiveTeacher,
    StatesSettings,
    TeacherStates,
    open_states,
)
from kdnas.models.encoders import encode, find_teacher
from kdnas.models.layers import LastAndSkip
from kdnas.system.files import write_json
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

Curve = list[tuple[float, float]]  # seconds, error

SHARE = 0.3
BATCH_TOKENS = 4096
STEPS_TO_MEASURE = (
    4  # ours is measured every so many steps, until it is as good as the original at its end
)
# What --quick takes for the original's four epochs, in place of training them: the error after them, and the tokens in
# them, as a whole run measured them on 30 % of a text of 27,591 rows (LOG.md, 2026-11-27). On another text it is rough.
ORIGINAL_ERROR = 0.562
ORIGINAL_TOKENS = 1_321_108
QUICK_ROWS, QUICK_STEPS, QUICK_WARM_UP = 1_200, 16, 4


def seconds_to(curve: Curve, error: float) -> float | None:
    """The seconds after which a curve is at or below an error for the first time; None: never."""
    return next((seconds for seconds, measured in curve if measured <= error), None)


def seconds_to_stay(curve: Curve, error: float) -> float | None:
    """The seconds after which a curve is never above an error again; None: it ends above it."""
    above = [i for i, (_, measured) in enumerate(curve) if measured > error]
    first = above[-1] + 1 if above else 0
    return curve[first][0] if first < len(curve) else None


def compare(original: Curve, ours: Curve, cache_seconds: float) -> dict[str, Any]:
    """How much sooner ours has the error that the original has at its end.

    Args:
        original: its last error is the one to reach.
        ours: its first point is the start, whose seconds are counted.
        cache_seconds: what storing the teacher's states took.

    Returns:
        The figures; the speed-ups are None where ours never has that error.
    """
    error = original[-1][1]
    theirs, mine = seconds_to(original, error), seconds_to(ours, error)
    assert theirs is not None, "its last point has it"
    return {
        "original_error": error,
        "original_seconds": theirs,
        "our_seconds": mine,
        "our_seconds_to_stay": seconds_to_stay(ours, error),
        "our_start_error": ours[0][1],
        "our_end_error": ours[-1][1],
        "reached_by_start_alone": mine == ours[0][0],
        "speedup_to_original_error": theirs / mine if mine else None,
        "speedup_with_cache_cost": theirs / (mine + cache_seconds) if mine else None,
    }


class HeldOutError(pl.Callback):
    """Records error against seconds while a Trainer trains; the clock stands still meanwhile.

    Args:
        batches: the held-out rows.
        variance: of the targets.
        seconds: on the clock before the first step.
        points: times an epoch.
        target: until the error is that low, every ``STEPS_TO_MEASURE`` steps instead.
        num_steps: stop after so many steps, without a point.
    """

    def __init__(
        self,
        batches: list[Batch],
        variance: float,
        seconds: float = 0.0,
        points: int = 1,
        target: float | None = None,
        num_steps: int | None = None,
    ) -> None:
        self.batches, self.variance, self.seconds, self.points = batches, variance, seconds, points
        self.target, self.num_steps = target, num_steps
        self.curve: Curve = []
        self.steps: list[tuple[float, int]] = []  # seconds, tokens

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.measure(trainer, module)
        self._since = perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = perf_counter() - self._since
        self.seconds += taken
        self.steps.append((taken, int(batch["attention_mask"].sum())))
        if self.num_steps is not None:
            trainer.should_stop = len(self.steps) >= self.num_steps
        elif self._due(trainer):
            self.measure(trainer, module)
        self._since = perf_counter()

    def _due(self, trainer: pl.Trainer) -> bool:
        if self.target is not None and self.curve[-1][1] > self.target:
            return trainer.global_step % STEPS_TO_MEASURE == 0
        num_batches = int(trainer.num_training_batches)
        return trainer.global_step % num_batches % max(1, num_batches // self.points) == 0

    def measure(self, trainer: pl.Trainer, module: HiddenStateDistillModule) -> None:
        """Add a point to the curve."""
        training = module.student.training
        module.student.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            results = [module(*module.views(batch)) for batch in self.batches]
        module.student.train(training)
        sums, counts = (
            torch.stack(values).double().sum(0) for values in zip(*results, strict=True)
        )
        self.curve.append((self.seconds, float((sums / counts).mean()) / self.variance))


class Float32Teacher(LiveTeacher):
    """A live teacher in the precision of its weights, as the original's is."""

    @torch.no_grad()
    def __call__(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        states = encode(self.model, batch).hidden_states  # type: ignore[arg-type]
        return [states[layer + 1][batch["attention_mask"].bool()] for layer in layers]


def train(
    module: HiddenStateDistillModule,
    data: KDDataModule,
    watch: HeldOutError,
    trainer_settings: TrainerSettings,
    num_epochs: int,
    folder: Path,
    name: str,
) -> None:
    """One fit of the product's own, watched."""
    trainer = make_trainer(trainer_settings, folder, num_epochs, [watch, EpochLines(name, print)])
    trainer.limit_val_batches = 0  # the watch measures
    fit(trainer, module, data)


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; see the module."""
    config = common.read_config("original_fit")
    num_epochs = int(config.trainer["max_epochs"])
    text = common.cut_text(
        chosen.text, folder, share=SHARE, most=QUICK_ROWS if chosen.quick else None
    )
    teacher = find_teacher(common.TEACHER)
    teacher.model.eval()  # read before any clock runs
    theirs = KDDataModule(common.TEACHER, text, config.data)
    our_data = replace(
        config.data, batch_tokens=BATCH_TOKENS, pad_to_max_length=False, num_mask_variants=1
    )
    ours = KDDataModule(common.TEACHER, text, our_data)
    for data in (theirs, ours):
        data.setup()
    recipe = Recipe(
        objective=HiddenStates(LastAndSkip()),
        start=FromTeacher(),
        learning_rate=chosen.learning_rate,
        matrix_learning_rate=chosen.matrix_learning_rate or None,
    )

    pl.seed_everything(0, verbose=False)
    module = HiddenStateDistillModule(teacher, config.arch, recipe)
    begin = perf_counter()
    stored = StatesSettings(str(folder / "states"), max_gb=float("inf"))
    module.states = open_states(teacher, ours, module.target_layers, stored)
    cache_seconds_all_rows = perf_counter() - begin
    lengths = ours.rows.lengths
    cache_seconds = cache_seconds_all_rows * float(lengths[ours.train_ids()].sum() / lengths.sum())
    begin = perf_counter()
    module.begin(ours)
    start_seconds = perf_counter() - begin

    layers = [term.layer for term in module.terms if term.layer is not None]
    variance = sum(module.stats(layer).held_out_variance for layer in layers) / len(layers)
    batches = list(ours.loader(ours.held_out_ids(), shuffle=False))
    pl.seed_everything(0, verbose=False)
    original = HiddenStateDistillModule(teacher, config.arch, config.recipe)
    original.states = TeacherStates(
        Float32Teacher(teacher.model),
        original.target_layers,
        teacher.config.hidden_size,
        module.states.stats,
        module.states.ends,
    )
    watch = HeldOutError(batches, variance, num_steps=QUICK_STEPS if chosen.quick else None)
    settings = TrainerSettings(
        accelerator="cpu",
        precision=config.trainer["precision"] or "auto",
        gradient_clip_val=config.trainer.get("gradient_clip_val", 0.0),
    )
    train(
        original, theirs, watch, settings, num_epochs, folder / "original", "the original's recipe"
    )
    curve, tokens = watch.curve, sum(tokens for _, tokens in watch.steps)
    if chosen.quick:
        steps = watch.steps[QUICK_WARM_UP:]
        per_token = sum(seconds for seconds, _ in steps) / sum(tokens for _, tokens in steps)
        curve, tokens = (
            [*curve, (per_token * ORIGINAL_TOKENS, chosen.original_error)],
            ORIGINAL_TOKENS,
        )
        cache_seconds *= (
            ORIGINAL_TOKENS / num_epochs / float(lengths[ours.train_ids()].sum())
        )  # of the larger text, too

    our_watch = HeldOutError(batches, variance, start_seconds, points=4, target=curve[-1][1])
    train(
        module,
        ours,
        our_watch,
        TrainerSettings(accelerator="cpu"),
        chosen.epochs,
        folder / "ours",
        "our recipe",
    )
    return compare(curve, our_watch.curve, cache_seconds) | {
        "quick": chosen.quick,
        "original_error_source": "constant or option, not measured here"
        if chosen.quick
        else "measured",
        "original_extended_from_steps": QUICK_STEPS - QUICK_WARM_UP if chosen.quick else None,
        "original_num_epochs": num_epochs,
        "original_tokens": tokens,
        "original_curve": curve,
        "our_num_epochs": chosen.epochs,
        "our_learning_rate": chosen.learning_rate,
        "our_matrix_learning_rate": chosen.matrix_learning_rate or None,
        "our_tokens": sum(tokens for _, tokens in our_watch.steps),
        "our_curve": our_watch.curve,
        "start_seconds": start_seconds,
        "cache_seconds": cache_seconds,
        "cache_seconds_all_rows": cache_seconds_all_rows,
        "cache_tokens": int(lengths.sum()),
        "train_rows": len(ours.train_ids()),
        "held_out_rows": len(ours.held_out_ids()),
        "target_variance": variance,
        "arch": config.arch.to_dict(),
        "machine": common.machine(),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Error against wall seconds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label, marker in (
        ("original", "the original's recipe", "o"),
        ("our", "our recipe", "."),
    ):
        points = [point for point in results[f"{name}_curve"] if point[0] > 0]  # the axis has no 0
        style = "--" if name == "original" and results["quick"] else "-"
        axes.plot(*zip(*points, strict=True), style, marker=marker, label=label)
    axes.axhline(results["original_error"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        xlabel="seconds of training",
        ylabel="held-out error / variance",
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(results: dict[str, Any], console: Console) -> None:
    """The table."""
    title = "Error on held-out rows, as a share of the variance"
    table = Table(
        "recipe",
        "start",
        "end",
        "seconds to the end",
        f"seconds to {results['original_error']:.3f}",
        title=title,
    )
    for name, label in (("original", "the original's"), ("our", "ours")):
        curve, reached = results[f"{name}_curve"], results[f"{name}_seconds"]
        table.add_row(
            f"{label}, {results[f'{name}_num_epochs']} epochs",
            *(f"{error:.3f}" for error in (curve[0][1], curve[-1][1])),
            f"{curve[-1][0]:,.1f}",
            "never" if reached is None else f"{reached:,.1f}",
        )
    console.print(table)
    if results["our_seconds"] is None:
        console.print("Ours did not reach the original's error.")
    else:
        console.print(
            f"{results['speedup_to_original_error']:.1f} times sooner; {results['speedup_with_cache_cost']:.1f} times "
            f"with the {results['cache_seconds']:.1f} s that storing the teacher's states took."
        )
    if results["reached_by_start_alone"]:
        console.print(
            "Ours is below that error before its first step: its seconds are those of the start alone."
        )
    if results["our_end_error"] > results["our_start_error"]:
        console.print(
            "Training made ours worse than its start by this measure: the seconds say nothing of the training."
        )
    if results["our_seconds_to_stay"] not in (None, results["our_seconds"]):
        console.print(
            f"It rose above that error again, and stays below from {results['our_seconds_to_stay']:,.1f} s on."
        )
    if results["quick"]:
        console.print(
            f"--quick: the original ran {QUICK_STEPS} steps here; its seconds are extended to the "
            f"{results['original_tokens']:,} tokens of its four epochs on a larger text, whose error it takes, and "
            "those of the teacher's states to one of the four. Rough."
        )


def main(args: Sequence[str] | None = None) -> None:
    """Measure, show, draw and write."""
    parser = common.options(
        "recipe", "Compares our recipe with the original KD-NAS's: seconds to the same error."
    )
    parser.add_argument(
        "--learning-rate", type=float, default=Recipe().learning_rate, help="ours, of AdamW"
    )
    parser.add_argument(
        "--matrix-learning-rate",
        type=float,
        default=Recipe().matrix_learning_rate,
        help="ours, of Muon; 0: AdamW alone",
    )
    parser.add_argument("--epochs", type=int, default=4, help="of ours")
    parser.add_argument(
        "--original-error",
        type=float,
        default=ORIGINAL_ERROR,
        help="with --quick: the original's after its four epochs",
    )
    chosen = parser.parse_args(args)
    common.quieten()
    console = Console()
    common.OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.OUTPUT) as folder:
        results = measure(chosen, Path(folder))
    show(results, console)
    write_json(chosen.json, results)
    draw(results, chosen.json.with_suffix(".png"))
    console.print(f"Figures: {chosen.json} and {chosen.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
