"""Whether a short distillation ranks students as a long one does, and as fine-tuning does.

Architectures spread over what a search with the shipped budget ranks (the students of the table of samplers.py that
are ``--speedup`` times as fast as the teacher) are distilled on 10 % and on 30 % of a text for 1, 2 and 4 epochs, and
on all of it. Of each student several scores are taken on the same held-out rows: the recipe's loss, the original's,
ridge probes of tokens, of [CLS] and of the pooled state, the comparison of sentence pairs (the recipe's own head),
MiniLMv2's relations. Each score of each short distillation is held against the same score after the long one, and
against GLUE (STS-B and MRPC) of some of the students, by Kendall's tau and Spearman's rho; seconds are the cores' of
the distillation and of the score itself, so that other work on the machine does not count. All distillations of a
student go on from one start, calibrated on the fewest rows. ``--make`` does what ``--table`` lacks, student by
student, and adds it; without it what is there is shown. ``--part 0 2`` and ``--part 1 2`` share the work. A sentence's
partner in a pair is drawn from the rows of a search's split, so a tenth of the rows is a tenth of the steps, and some
more rows as partners.

    python benchmarks/fidelity.py --make --text train.parquet --glue glue --rows 4000
    python benchmarks/fidelity.py
"""

import copy
import gzip
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from common import OUTPUT, ROOT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import matplotlib.pyplot as plt
import numpy as np
import samplers
import torch
from filelock import FileLock
from quality import some_rows
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr

from kdnas.data.datamodule import KDDataModule
from kdnas.distillation.attention import AttentionRelations
from kdnas.distillation.metrics import RidgeProbe
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.distillation.objectives import View
from kdnas.distillation.teacher_states import StatesSettings, TeacherStates, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.models.layers import LastAndSkip
from kdnas.system.files import new_file, new_folder, read_json, write_json
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

TABLE = ROOT / "benchmarks" / "data" / "fidelity.json.gz"
SHORT = [(share, epochs) for share in (0.1, 0.3) for epochs in (1, 2, 4)]
TASKS = ("stsb", "mrpc")
# All are errors: lower is better.
SCORES = ("loss", "original", "tokens", "cls", "pooled", "pairs", "relations")
DEFAULT = (
    "30-2",
    "loss",
)  # of a search: share of the rows in per cent and epochs; what the reward is made of


def spread_archs(rows: Sequence[dict[str, Any]], number: int, speedup: float) -> list[StudentArch]:
    """Architectures spread evenly, by depth first, over those of a table that are so much faster than the teacher."""
    fast = [
        StudentArch(**row["arch"])
        for row in rows
        if row["teacher_latency_ms"] >= speedup * row["latency_ms"]
    ]
    fast.sort(key=lambda arch: tuple(arch.to_dict().values()))
    return [
        fast[i] for i in np.linspace(0, len(fast) - 1, min(number, len(fast))).round().astype(int)
    ]


def part_of(data: KDDataModule, share: float) -> KDDataModule:
    """The same rows, of which a share is trained on: up to ``mini_fraction`` a part of the mini split's."""
    order = data.draw_order()
    order = order[np.isin(order, data.select("full").train_ids())]
    chosen = np.sort(order[: max(1, round(share * len(order)))])
    other = copy.copy(data)
    other.train_ids = lambda: chosen  # type: ignore[method-assign]
    return other


class Scores:
    """Every score of a student on the held-out rows, as errors, and the seconds that each takes after the fit.

    The recipe's loss and its comparison of pairs are there already.

    Args:
        module: distilled.
        data: its data.
        num_heads: that MiniLMv2's relations are cut into.
    """

    def __init__(
        self, module: HiddenStateDistillModule, data: KDDataModule, num_heads: int = 12
    ) -> None:
        self.module, self.batches = module, list(data.loader(data.held_out_ids(), shuffle=False))
        self.num_heads = num_heads

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], dict[str, float]]:
        module, states, last = (
            self.module,
            self.module.states,
            self.module.arch.num_hidden_layers - 1,
        )
        assert states is not None
        module.student.eval()
        width, target = module.arch.hidden_size, module._teacher.config.hidden_size
        strengths = {
            "tokens": 1e-2,
            "cls": 0.03,
            "pooled": 0.03,
        }  # there are fewer rows than tokens
        probes = {name: RidgeProbe(width, target, strength) for name, strength in strengths.items()}
        # The original's: every student layer on its two teacher layers, by the best map in place of a trained one.
        num_layers = (module.arch.num_hidden_layers, module._teacher.config.num_hidden_layers)
        mapped = [(i, j) for i, layers in enumerate(LastAndSkip()(*num_layers)) for j in layers]
        of_layers = {(i, j): RidgeProbe(width, target, 1e-3) for i, j in mapped}
        relations = AttentionRelations(num_heads=self.num_heads).criterion(
            module.student, module._teacher.model
        )
        sums = torch.zeros(2, dtype=torch.float64)

        def tokens(student: View, teacher: View) -> None:
            probes["tokens"].update(student.real(last), teacher.real(module.last_layer))

        def cls(student: View, teacher: View) -> None:
            first = student.batch["attention_mask"].cumsum(1).sub(1).eq(0)
            probes["cls"].update(
                student.padded(last)[first], teacher.padded(module.last_layer)[first]
            )

        def pooled(student: View, teacher: View) -> None:
            probes["pooled"].update(
                student.pooled(student.mask_BT), teacher.pooled(teacher.mask_BT)
            )

        def original(student: View, teacher: View) -> None:
            for (i, j), probe in of_layers.items():
                probe.update(student.real(i), teacher.real(j))

        def related(student: View, teacher: View) -> None:
            ((error, count),) = relations(student, teacher)
            sums.add_(torch.tensor([float(error), float(count)]))

        measures = {
            "tokens": tokens,
            "cls": cls,
            "pooled": pooled,
            "original": original,
            "relations": related,
        }
        seconds = dict.fromkeys(SCORES, 0.0)
        for batch in self.batches:
            begin = time.process_time()
            student, _ = module.views(batch)
            teacher = View(module._teacher.model, batch, real=states(batch))  # of all layers
            forward = time.process_time() - begin
            for name, measure in measures.items():
                begin = time.process_time()
                measure(student, teacher)
                seconds[name] += forward + time.process_time() - begin

        def share(probe: RidgeProbe) -> float:
            error, variance = probe.compute()
            return float(error / variance)

        found = {name: share(probe) for name, probe in probes.items()}
        found["original"] = statistics.mean(map(share, of_layers.values()))
        found["relations"] = float(sums[0] / sums[1].clamp_min(1))
        found["loss"] = module.history[-1]["loss"]
        found["pairs"] = float(module.trainer.callback_metrics["terms/pair_comparison"])
        return found, seconds


def begin(
    arch: StudentArch, data: KDDataModule, states: TeacherStates
) -> tuple[HiddenStateDistillModule, float]:
    """A student that began as its teacher, calibrated on some rows of the data, and the seconds of that."""
    torch.manual_seed(0)
    started = time.process_time()
    module = HiddenStateDistillModule(find_teacher(TEACHER), arch, read_config("fit").recipe)
    module.states = states
    module.begin(data)
    return module, time.process_time() - started


def distil(
    begun: Callable[[], tuple[HiddenStateDistillModule, float]],
    data: KDDataModule,
    num_epochs: int,
    folder: Path,
) -> dict[str, Any]:
    """Distil a student and score it, unless that is done; its scores and seconds, those of its start included."""
    if (folder / "result.json").exists():
        return dict(read_json(folder / "result.json"))
    first, seconds = begun()
    shared = (first._teacher, first.states)
    module = copy.deepcopy(
        first, {id(part): part for part in shared}
    )  # what begins alike begins once
    torch.manual_seed(0)
    started = time.process_time()
    settings = TrainerSettings(
        accelerator="cpu", precision=read_config("fit").trainer["precision"] or "auto"
    )
    fit(
        make_trainer(settings, folder, num_epochs, [EpochLines(folder.name, print)]),
        module,
        data,
    )
    seconds += time.process_time() - started
    scores, of_scores = Scores(module, data)()
    result = {
        "arch": module.arch.to_dict(),
        "seconds": seconds,
        "scores": scores,
        "score_seconds": of_scores,
    }
    with new_folder(folder / "encoder") as encoder:
        module.save_student(encoder)
    write_json(folder / "result.json", result)
    return result


@dataclass(frozen=True)
class Bench:
    """What all students share.

    Args:
        data: all rows.
        states: the teacher's, of all layers.
        num_epochs: of the long distillation.
        short: share of the rows and epochs of each short one.
        tasks: loaded, of which those students are fine-tuned on whose number says so.
        folder: where runs are kept.
    """

    data: KDDataModule
    states: TeacherStates
    num_epochs: int
    short: list[tuple[float, int]]
    tasks: list[LoadedTask]
    folder: Path

    def __call__(self, number: int, arch: StudentArch, is_finetuned: bool) -> dict[str, Any]:
        """Everything of one student: its scores after each distillation, and after fine-tuning."""
        folder, found = self.folder / str(number), {}
        settings = [*self.short, (1.0, self.num_epochs)]
        begun = cache(partial(begin, arch, part_of(self.data, settings[0][0]), self.states))
        for share, epochs in settings:
            name = f"{round(100 * share)}-{epochs}"
            found[name] = distil(begun, part_of(self.data, share), epochs, folder / name)
        scores = (
            [self._finetune(folder / name, task, number) for task in self.tasks]
            if is_finetuned
            else []
        )
        return {
            "arch": arch.to_dict(),
            "settings": found,
            "glue": statistics.mean(scores) if scores else None,
        }

    def _finetune(self, folder: Path, task: LoadedTask, number: int) -> float:
        torch.manual_seed(0)
        result = evaluate_glue(
            load_classifier(folder / "encoder", task.task.num_labels),
            find_teacher(TEACHER).tokenizer,
            task,
            FinetuneSettings(3, 2e-4, 32, 128, 0.06, weight_decay=0.01),
            folder=folder / task.task.name,
            callbacks=[EpochLines(f"{task.task.name}, student {number}", print)],
        )
        return float(result["score"])


def main(args: Sequence[str] | None = None) -> None:
    """Make what is missing of the table, if that is asked for, and show it."""
    parser = options("fidelity", __doc__ or "")
    parser.add_argument("--make", action="store_true", help="distil what the table lacks")
    parser.add_argument(
        "--part", type=int, nargs=2, default=[0, 1], help="of --make: this part (from 0) of so many"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="the table")
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "fidelity", help="where the runs are kept"
    )
    parser.add_argument(
        "--speedup", type=float, default=4.0, help="of the students, at least; a search's budget"
    )
    parser.add_argument("--archs", type=int, default=24, help="how many students")
    parser.add_argument("--finetuned", type=int, default=8, help="how many of them are fine-tuned")
    parser.add_argument("--rows", type=int, help="at most so many rows of the text are all of it")
    parser.add_argument("--epochs", type=int, default=4, help="of the long distillation")
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.archs, chosen.finetuned, chosen.rows, chosen.epochs, chosen.make = 3, 0, 240, 1, True
        chosen.folder, chosen.table = (
            OUTPUT / "fidelity_quick",
            OUTPUT / "fidelity_quick" / "table.json.gz",
        )
        shutil.rmtree(chosen.folder, ignore_errors=True)
    quieten()
    if chosen.make:
        make(chosen)
    if not chosen.table.exists():
        raise SystemExit(f"{chosen.table} is not there: make it by --make.")
    students = read_table(chosen.table)["students"]
    found = {
        setting: {number: student["settings"][setting] for number, student in students.items()}
        for setting in next(iter(students.values()))["settings"]
    }
    glue = {
        number: student["glue"]
        for number, student in students.items()
        if student["glue"] is not None
    }
    report(found, glue, list(found)[-1], chosen.json)


def read_table(path: Path) -> dict[str, Any]:
    """What was made, and of which text."""
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def make(chosen: Any) -> None:
    """Do this part of what the table lacks, and add to it what is finished, by other parts too."""
    about = {
        name: getattr(chosen, name) for name in ("archs", "speedup", "finetuned", "rows", "epochs")
    }
    known = read_table(chosen.table) if chosen.table.exists() else {"about": about, "students": {}}
    if known["about"] != about:
        raise SystemExit(
            f"{chosen.table} was made with {known['about']}, asked for is {about}: give another --table."
        )
    chosen.folder.mkdir(parents=True, exist_ok=True)
    teacher = find_teacher(TEACHER)
    archs = spread_archs(read_table(samplers.TABLE)["rows"], chosen.archs, chosen.speedup)
    data = KDDataModule(
        TEACHER, cut_text(chosen.text, chosen.folder, most=chosen.rows), read_config("fit").data
    )
    data.setup()
    layers = range(-1, teacher.config.num_hidden_layers)
    states = open_states(
        teacher, data, layers, StatesSettings(str(chosen.folder / "states"), max_gb=60)
    )
    names = TASKS if chosen.finetuned else ()
    tasks = [
        some_rows(load_task(str(chosen.glue / name) if chosen.glue else name), 6_000)
        for name in names
    ]
    finetuned = np.linspace(0, len(archs) - 1, chosen.finetuned).round().astype(int).tolist()
    part, num_parts = chosen.part
    short = SHORT[-2:-1] if chosen.quick else SHORT
    bench = Bench(data, states, chosen.epochs, short, tasks, chosen.folder)
    for number in range(part, len(archs), num_parts):
        path = chosen.folder / str(number) / "student.json"
        if str(number) not in known["students"] and not path.exists():
            write_json(path, bench(number, archs[number], number in finetuned))
        with FileLock(chosen.folder / "table.lock"):  # of all parts that are at it
            finished = {p.parent.name: read_json(p) for p in chosen.folder.glob("*/student.json")}
            students = dict(
                sorted((finished | known["students"]).items(), key=lambda pair: int(pair[0]))
            )
            with new_file(chosen.table) as file:
                file.write(
                    gzip.compress(
                        json.dumps({"about": about, "students": students}).encode(), mtime=0
                    )
                )


def agreement(scores: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Kendall's tau and Spearman's rho of two rankings, and the 95 % bootstrap interval of tau over the students."""
    pairs, generator = np.array([scores, reference]), np.random.default_rng(0)
    drawn = [
        kendalltau(*pairs[:, generator.integers(len(scores), size=len(scores))])[0]
        for _ in range(500)
    ]
    low, high = np.nanquantile(drawn, (0.025, 0.975)).tolist()
    return {
        "tau": float(kendalltau(*pairs)[0]),
        "interval": [low, high],
        "rho": float(spearmanr(*pairs)[0]),
    }


def report(found: dict[str, dict[str, Any]], glue: dict[str, float], long: str, path: Path) -> None:
    """Tables, JSON and a picture of tau against seconds."""
    numbers = list(found[long])
    rows: list[dict[str, Any]] = []
    for setting, results in found.items():
        seconds = statistics.mean(results[number]["seconds"] for number in numbers)
        for score in SCORES:
            mine = [results[number]["scores"][score] for number in numbers]
            row: dict[str, Any] = {"setting": setting, "score": score}
            row["seconds"] = seconds + statistics.mean(
                results[n]["score_seconds"][score] for n in numbers
            )
            row["full_kd"] = agreement(
                mine, [found[long][number]["scores"][score] for number in numbers]
            )
            row["full_kd_loss"] = agreement(
                mine, [found[long][number]["scores"]["loss"] for number in numbers]
            )
            if len(glue) > 1:  # lower error, higher score
                row["glue"] = agreement(
                    [-results[number]["scores"][score] for number in glue], list(glue.values())
                )
            rows.append(row)
    columns = {
        "full_kd": "tau, rho to the same after full KD",
        "full_kd_loss": "to its loss",
        "glue": "to GLUE",
    }
    table = Table("share %-epochs", "score", "seconds", *columns.values())
    for row in rows:
        shown = [_with_interval(row[column]) if column in row else "-" for column in columns]
        table.add_row(row["setting"], row["score"], f"{row['seconds']:.1f}", *shown)
    console = Console(width=120)
    console.print(table)
    default = next((row for row in rows if (row["setting"], row["score"]) == DEFAULT), None)
    if default:
        tau = _with_interval(default["full_kd"])
        console.print(f"A search's default, {' by '.join(DEFAULT)}: tau, rho {tau} to full KD.")
    good = [row for row in rows if row["setting"] != long and row["full_kd_loss"]["tau"] >= 0.8]
    cheapest = min(good, key=lambda row: row["seconds"], default=None)
    console.print(
        f"The cheapest with tau of at least 0.8 to the loss after full KD: {cheapest['setting']} by "
        f"{cheapest['score']}, {cheapest['seconds']:.0f} s a candidate."
        if cheapest
        else "None has a tau of 0.8 to full KD."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {"machine": machine(), "rows": rows, "glue": glue, "results": found, "cheapest": cheapest},
    )
    figure, axes = plt.subplots(figsize=(6, 4))
    for score in SCORES:
        points = sorted(
            (row["seconds"], row["full_kd"]["tau"])
            for row in rows
            if row["score"] == score and row["setting"] != long
        )
        axes.plot(*zip(*points, strict=True), "o-", label=score)
    axes.set(xlabel="seconds a candidate", ylabel="Kendall's tau to the same score after full KD")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")


def _with_interval(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['tau']:.2f} ({low:.2f} to {high:.2f}), {found['rho']:.2f}"


if __name__ == "__main__":
    main()
