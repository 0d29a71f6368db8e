"""What one change to configs/fit.yaml is worth, judged by fine-tuning on rows that no other benchmark reports.

Each variant changes one thing of the recipe, of the data or of how the training goes, and distils a student of
4 layers x 192 (3 x 384 where the name says so) on 30 % of a text; those called full go on to all rows, from the weights
of ``fit``, from its weights and its optimizer's state, or anew. Then each is fine-tuned on rows of STS-B, CoLA, MRPC
and SST-2's training split and scored on others of that split. ``--kd-seeds`` draw the rows, their masks and order anew:
what they change is noise. Seconds are the cores' own, without those of the teacher's states. A loss is shown where the
held-out rows are those of ``fit``. A run is kept in ``--folder`` and goes on where it was stopped; ``--only`` names
parts of it, so that processes can share the work.

    python benchmarks/variants.py --text train.parquet --glue glue --kd-seeds 0 1 --only fit dropout
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from quality import SHAPES, some_rows
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.data.datamodule import Batch, KDDataModule, Split
from kdnas.distillation.attention import AttentionMaps, AttentionRelations
from kdnas.distillation.losses import ridge_map, squared_error
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.narrowing import fit_linear
from kdnas.distillation.objectives import (
    Criterion,
    HiddenStates,
    Objective,
    Term,
    View,
    WeightedSum,
)
from kdnas.distillation.sentences import PairComparison, SentenceState
from kdnas.distillation.start import (
    FromEmbeddings,
    FromTeacher,
    RandomStart,
    Start,
    Started,
    copy_layers,
)
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.models.layers import Even, LastAndSkip, LastLayer
from kdnas.system.files import new_file, new_folder, read_json, write_json
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

ARCH = SHAPES["4x192"]
WIDE = SHAPES["3x384"]
BETWEEN = dataclasses.replace(ARCH, hidden_size=288, intermediate_size=1152)
# Epochs of fine-tuning; small students take more than their teachers (LOG.md).
TASKS = {"stsb": 6, "cola": 4, "mrpc": 4, "sst2": 2}
MOST_ROWS, HELD_OUT = 7_000, 0.25
READ_WORDS = 96  # what max_length holds of a row
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


class Shaped(pl.Callback):
    """The learning rate as another function of the share of the training that is done, behind the same warm-up."""

    def __init__(self, shape: Callable[[float], float]) -> None:
        self.shape = shape

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        warmup = max(1, round(0.1 * total))

        def rate(step: int) -> float:
            return (
                min(1.0, (step + 1) / warmup)
                if step < warmup
                else self.shape((step - warmup) / (total - warmup))
            )

        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.lr_lambdas = [rate] * len(scheduler.lr_lambdas)


class Averaged(pl.Callback):
    """The student ends as the moving average of its weights over the steps, and is validated last as that."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        for name, parameter in pl_module.student.named_parameters():  # type: ignore[union-attr, operator]
            value = parameter.detach().float()
            self.mean.setdefault(name, value.clone()).lerp_(value, 1 - self.decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            pl_module.student.load_state_dict(self.mean, strict=False)  # type: ignore[union-attr, operator]


class ShortFirst(pl.Callback):
    """The first epoch goes from the shortest rows to the longest; later ones have their batches in any order."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sampler: Any = trainer.train_dataloader.sampler  # type: ignore[union-attr]
        draw = sampler.batches
        sampler.batches = lambda: (
            draw()
            if sampler.epoch
            else sorted(draw(), key=lambda rows: sampler.padded_lengths[rows].max())
        )


class Narrowed(Start):
    """Begin as a wider student that is distilled already, narrowed."""

    def __init__(self, wider: HiddenStateDistillModule) -> None:
        self.wider = wider

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        known = self.wider.started
        found = FromTeacher()(student, self.wider.student.eval(), rows)
        assert known is not None and known.heads is not None and found.heads is not None
        layers = zip(found.heads, known.heads, strict=True)
        return Started(heads=tuple(tuple(theirs[head] for head in ours) for ours, theirs in layers))


class Copied(Start):
    """Copies alone, of a student that is only shallower than its teacher; they learn at the rates of copies."""

    @torch.no_grad()
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        return copy_layers(student, teacher)


class Residual(Objective):
    """Of the teacher's last layer, what the best linear map from its embeddings does not know."""

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {-1, num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _Residual(student.config, teacher.config)


class _Residual(Criterion):
    def __init__(self, ours: PreTrainedConfig, theirs: PreTrainedConfig) -> None:
        super().__init__()
        self.ours, self.theirs = ours.num_hidden_layers - 1, theirs.num_hidden_layers - 1
        self.terms = [Term("residual", 1.0)]
        self.projection = nn.Linear(ours.hidden_size, theirs.hidden_size)
        self.register_buffer("known", torch.zeros(theirs.hidden_size + 1, theirs.hidden_size))
        self.register_buffer("variance", torch.ones(()))

    def target(self, teacher: View) -> Tensor:
        last, embedding, known = (
            teacher.real(self.theirs).float(),
            teacher.real(-1).float(),
            self.known,
        )
        return last - embedding @ known[:-1] - known[-1]  # type: ignore[index]

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        target = self.target(teacher)
        return [
            (
                squared_error(self.projection(student.real(self.ours)), target) / self.variance,
                len(target),
            )
        ]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        embeddings, last = (
            torch.cat([view.real(layer) for view in teachers]) for layer in (-1, self.theirs)
        )
        self.known = ridge_map(embeddings, last, strength=1e-3).float()
        target = torch.cat([self.target(view) for view in teachers])
        self.variance = target.var(0, correction=0).mean()
        fit_linear(
            self.projection,
            torch.cat([view.real(self.ours) for view in students]),
            target,
            strength=1e-3,
        )


class MeanInFirst(Objective):
    """Of a row that is no pair, the student's [CLS] predicts the mean of the teacher's last states."""

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _MeanInFirst(student.config.hidden_size, teacher.config.hidden_size)


class _MeanInFirst(Criterion):
    variance: Tensor

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.terms = [Term("mean_in_first", 1.0)]
        self.projection = nn.Linear(student_width, teacher_width)
        self.register_buffer("variance", torch.ones(()))

    @staticmethod
    def vectors(student: View, teacher: View) -> tuple[Tensor, Tensor]:
        alone = ~teacher.batch["token_type_ids"].bool().any(1)
        first = student.padded(student.model.config.num_hidden_layers - 1)[:, 0].float()
        return first[alone], teacher.pooled(teacher.mask_BT)[alone]

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        first, mean = self.vectors(student, teacher)
        return [(squared_error(self.projection(first), mean) / self.variance, len(mean))]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        pairs = [self.vectors(*views) for views in zip(students, teachers, strict=True)]
        firsts, means = (torch.cat(vectors) for vectors in zip(*pairs, strict=True))
        self.variance.copy_(means.var(0, correction=0).mean().clamp_min(1e-6))
        fit_linear(self.projection, firsts, means, strength=1e-3)


def with_task_rows(text: str, tasks: Sequence[LoadedTask], folder: Path) -> str:
    """The text with half of its training rows replaced by the tasks', without their labels, a pair as one row."""
    rng = np.random.default_rng(0)
    theirs = task_texts(tasks)
    rows = pq.read_table(text).to_pydict()
    ours = np.flatnonzero(np.array(rows["split"]) == "train")
    replaced = rng.permutation(ours)[: min(len(ours) // 2, len(theirs))]
    for row, chosen in zip(replaced, rng.permutation(len(theirs)), strict=False):
        rows["text"][row] = theirs[chosen]
    return write_rows(rows, folder / "task_rows.parquet")


def at_task_lengths(text: str, tasks: Sequence[LoadedTask], folder: Path) -> str:
    """The text with what is read of its training rows cut into as many words as rows of the tasks have."""
    rng = np.random.default_rng(0)
    lengths = np.array([len(row.split()) for row in task_texts(tasks)])
    rows = pq.read_table(text).to_pydict()
    pieces: list[tuple[str, str]] = []
    for row, split in zip(rows["text"], rows["split"], strict=True):
        words = row.split()[:READ_WORDS] if split == "train" else [row]
        while words:
            length = int(rng.choice(lengths))
            pieces.append((" ".join(words[:length]), split))
            words = words[length:]
    texts, splits = zip(*pieces, strict=True)
    return write_rows({"text": texts, "split": splits}, folder / "task_lengths.parquet")


def with_neighbours(text: str, tasks: Sequence[LoadedTask], folder: Path) -> str:
    """The text with 15 % of the words of its training rows replaced by one of the eight nearest to them.

    Near by the cosine of the teacher's word embeddings, among words of one token and three letters; other words stay.
    TinyBERT augments its tasks' rows so, by GloVe and BERT (https://arxiv.org/abs/1909.10351).
    """
    rng = np.random.default_rng(0)
    teacher = find_teacher(TEACHER)
    words = {
        word: index
        for word, index in teacher.tokenizer.get_vocab().items()
        if word.isalpha() and len(word) > 2
    }
    names = np.array(list(words))
    table = nn.functional.normalize(
        teacher.model.get_input_embeddings().weight.detach()[list(words.values())]
    )
    near = torch.cat(
        [(part @ table.T).topk(9).indices[:, 1:] for part in table.split(2_000)]
    ).numpy()
    place = {name: index for index, name in enumerate(names)}
    rows = pq.read_table(text).to_pydict()
    for row in np.flatnonzero(np.array(rows["split"]) == "train"):
        found = rows["text"][row].split()[:READ_WORDS]
        for index in np.flatnonzero(rng.random(len(found)) < 0.15):
            if (known := place.get(found[index].lower())) is not None:
                found[index] = str(names[rng.choice(near[known])])
        rows["text"][row] = " ".join(found)
    return write_rows(rows, folder / "neighbours.parquet")


def task_texts(tasks: Sequence[LoadedTask]) -> list[str]:
    """The training rows of all tasks, the sentences of a pair as one."""
    return [
        " ".join(row)
        for task in tasks
        for row in zip(*(task.train[c] for c in task.task.columns), strict=True)
    ]


def write_rows(rows: dict[str, Any], path: Path) -> str:
    """Write rows of text, and give their path."""
    with new_file(path) as file:
        pq.write_table(pa.table(rows), file)
    return str(path)


@dataclass(frozen=True)
class Variant:
    """One change to configs/fit.yaml.

    Args:
        recipe: of ``Recipe``.
        data: of ``DataSettings``.
        arch: of the student.
        rows: writes other rows, by the tasks, and gives their path.
        callbacks: makes the Trainer's.
        epochs: for ``--epochs``, as a factor.
        in_steps: half of the epochs, rounded down, go to a student of 288, which is then narrowed.
        split: the rows.
        goes_on: files of ``fit``'s result that it begins with.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    arch: StudentArch = ARCH
    rows: Callable[[str, Sequence[LoadedTask], Path], str] | None = None
    callbacks: Callable[[], list[pl.Callback]] = list
    epochs: float = 1.0
    in_steps: bool = False
    split: Split = "mini"
    goes_on: tuple[str, ...] = ()


def _sum(*objectives: Objective, weights: Sequence[float]) -> dict[str, Any]:
    return {"objective": WeightedSum(list(objectives), list(weights))}


LAST = HiddenStates(LastLayer())
MAPS = _sum(LAST, AttentionMaps(), PairComparison(), weights=[1.0, 1.0, 0.5])
# An epoch at such rates leaves the start as it is, and measures it.
UNMOVED = {
    field.name: 1e-12
    for field in dataclasses.fields(Recipe)
    if field.name.endswith("learning_rate")
}
NEW_RATES = {"learning_rate": 3e-3, "matrix_learning_rate": 5e-3}

VARIANTS = {
    "fit": Variant(),
    "twice-as-long": Variant(epochs=2),
    "start-alone": Variant(recipe=UNMOVED, epochs=1 / 3),
    "3x384-start-alone": Variant(arch=WIDE, recipe=UNMOVED, epochs=1 / 3),
    "last-layer": Variant(recipe={"objective": LAST}),
    "last-and-skip": Variant(recipe={"objective": HiddenStates(LastAndSkip())}),
    "even": Variant(recipe={"objective": HiddenStates(Even())}),
    "maps": Variant(recipe=MAPS),
    # As many seconds as without the maps, which cost a sixth of a step.
    "maps-shorter": Variant(recipe=MAPS, data={"mini_fraction": 0.25}),
    "no-comparison": Variant(recipe=_sum(LAST, AttentionMaps(), weights=[1.0, 1.0])),
    "relations": Variant(
        recipe=_sum(LAST, AttentionRelations(), PairComparison(), weights=[1.0, 1.0, 0.5])
    ),
    "residual": Variant(
        recipe=_sum(Residual(), AttentionMaps(), PairComparison(), weights=[1.0, 1.0, 0.5])
    ),
    "upper": Variant(
        recipe=_sum(
            LAST, HiddenStates(Even()), AttentionMaps(), PairComparison(), weights=[1, 0.5, 1, 0.5]
        )
    ),
    "cls": Variant(
        recipe=_sum(
            LAST, AttentionMaps(), PairComparison(), SentenceState(), weights=[1, 1, 0.5, 0.5]
        )
    ),
    "mean-in-first": Variant(
        recipe=_sum(LAST, PairComparison(), MeanInFirst(), weights=[1.0, 0.5, 0.5])
    ),
    "start-random": Variant(recipe={"start": RandomStart()}),
    "start-random-fast": Variant(recipe={"start": RandomStart(), **NEW_RATES}),
    "start-embeddings": Variant(recipe={"start": FromEmbeddings()}),
    "start-embeddings-fast": Variant(recipe={"start": FromEmbeddings(), **NEW_RATES}),
    "task-rows": Variant(rows=with_task_rows),
    "task-lengths": Variant(rows=at_task_lengths),
    "neighbours": Variant(rows=with_neighbours),
    "in-steps": Variant(in_steps=True),
    "masked-0": Variant(data={"masked_share": 0.0}),
    "masked-100": Variant(data={"masked_share": 1.0}),
    "mask-30": Variant(data={"mask_probability": 0.3}),
    "variants-3": Variant(data={"num_mask_variants": 3}),
    "pairs-0": Variant(data={"pair_share": 0.0}),
    "pairs-100": Variant(data={"pair_share": 1.0}),
    "tokens-2048": Variant(data={"batch_tokens": 2048}),
    "tokens-8192": Variant(data={"batch_tokens": 8192}),
    "dropout": Variant(recipe={"dropout": True}),
    "adamw": Variant(recipe={"matrix_learning_rate": None}),
    "adamw-5e-4": Variant(recipe={"matrix_learning_rate": None, "learning_rate": 5e-4}),
    "decay-0.1": Variant(recipe={"weight_decay": 0.1}),
    "cosine": Variant(
        callbacks=lambda: [Shaped(lambda done: 0.5 + 0.5 * math.cos(math.pi * done))]
    ),
    "wsd": Variant(callbacks=lambda: [Shaped(lambda done: min(1.0, (1 - done) / 0.3))]),
    "short-first": Variant(callbacks=lambda: [ShortFirst()]),
    "average": Variant(callbacks=lambda: [Averaged(0.98)]),
    "constant-average": Variant(callbacks=lambda: [Shaped(lambda done: 1.0), Averaged(0.98)]),
    "3x384": Variant(arch=WIDE),
    "3x384-maps-shorter": Variant(arch=WIDE, recipe=MAPS, data={"mini_fraction": 0.25}),
    "3x384-copied": Variant(arch=WIDE, recipe={"start": Copied()}),
    "full-anew": Variant(split="full"),
    "full-weights": Variant(split="full", goes_on=(WEIGHTS,)),
    "full-optimizer": Variant(split="full", goes_on=(WEIGHTS, OPTIMIZER)),
}
SAME_ROWS = {
    "batch_tokens",
    "num_mask_variants",
}  # what of the data leaves the held-out rows as they are


def place_of(folder: Path, name: str, seed: int) -> Path:
    """Where a variant's run with one seed of distillation is kept."""
    return folder / (f"{name}-seed-{seed}" if seed else name)


def distil(
    name: str,
    seed: int,
    text: str,
    tasks: Sequence[LoadedTask],
    num_epochs: int,
    folder: Path,
) -> None:
    """Distil a variant into its place, unless it is there."""
    variant, target = VARIANTS[name], place_of(folder, name, seed)
    if (target / "result.json").exists():
        return
    if variant.goes_on:
        distil("fit", seed, text, tasks, num_epochs, folder)
    begun = place_of(folder, "fit", seed)
    config, teacher = read_config("fit"), find_teacher(TEACHER)
    text = variant.rows(text, tasks, folder) if variant.rows else text
    recipe = dataclasses.replace(config.recipe, **variant.recipe)
    data_settings = dataclasses.replace(config.data, seed=seed, **variant.data)
    data = KDDataModule(TEACHER, text, data_settings, split=variant.split)
    data.setup()
    settings = TrainerSettings(gradient_clip_val=config.trainer["gradient_clip_val"])

    def student(arch: StudentArch, recipe: Recipe) -> HiddenStateDistillModule:
        module = HiddenStateDistillModule(teacher, arch, recipe)
        wanted = StatesSettings(str(OUTPUT / "teacher_states"), 100)
        module.states = open_states(teacher, data, module.target_layers, wanted)
        return module

    torch.manual_seed(seed)
    module = student(variant.arch, recipe)
    begin = time.process_time()
    num_epochs = max(1, round(num_epochs * variant.epochs))
    if variant.in_steps:
        first = num_epochs // 2
        wider = student(BETWEEN, recipe)
        fit(
            make_trainer(settings, target / "wider", first, [EpochLines(f"{name}, wider", print)]),
            wider,
            data,
        )
        module.recipe = dataclasses.replace(recipe, start=Narrowed(wider))
        num_epochs -= first
    if WEIGHTS in variant.goes_on:
        module.begin(data)
        module.load_state_dict(load_file(begun / WEIGHTS))
    if OPTIMIZER in variant.goes_on:
        module.optimizer_tensors = load_file(begun / OPTIMIZER)
    trainer = make_trainer(
        settings, target, num_epochs, [EpochLines(name, print), *variant.callbacks()]
    )
    fit(trainer, module, data)
    seconds = time.process_time() - begin
    with new_folder(target / "encoder") as encoder:
        module.save_student(encoder)
    if name == "fit":
        save_file(module.state_dict(), target / WEIGHTS)
        optimizer: Any = trainer.optimizers[0]
        save_file(optimizer.tensors(module), target / OPTIMIZER)
    write_json(target / "result.json", {"cpu_seconds": seconds, "history": module.history})


def finetune(folder: Path, tasks: Sequence[LoadedTask], num_seeds: int) -> None:
    """Fine-tune the student in ``folder`` on each task, several times."""
    tokenizer = find_teacher(TEACHER).tokenizer
    for task in tasks:
        for seed in range(num_seeds):
            torch.manual_seed(seed)
            classifier = load_classifier(folder / "encoder", task.task.num_labels)
            evaluate_glue(
                classifier,
                tokenizer,
                task,
                FinetuneSettings(
                    TASKS[task.task.name], 2e-4, 32, 128, 0.06, weight_decay=0.01, seed=seed
                ),
                folder=folder / f"{task.task.name}-{seed}",
                trainer_settings=TrainerSettings(),
                callbacks=[EpochLines(f"{folder.name} {task.task.name} {seed}", print)],
                keep_model=False,
            )


def show(folder: Path, seeds: Sequence[int], tasks: Sequence[str], path: Path) -> None:
    """A table of the variants that are done on every task, and its JSON."""
    rows: list[dict[str, Any]] = []
    for name, seed in product(VARIANTS, seeds):
        place = place_of(folder, name, seed)
        file = place / "result.json"
        scores = {
            task: [
                read_json(found)["score"] for found in sorted(place.glob(f"{task}-*/result.json"))
            ]
            for task in tasks
        }
        if file.exists() and all(scores.values()):
            result = read_json(file)
            last = result["history"][-1]
            rows.append(
                {
                    "name": name,
                    "kd_seed": seed,
                    **{key: last[key] for key in ("loss", "contextual_share", "sentence_r2")},
                    "cpu_seconds": result["cpu_seconds"],
                    "scores": scores,
                    "mean": statistics.mean(statistics.mean(found) for found in scores.values()),
                }
            )
    table = Table(
        "variant", "seed of KD", "loss", "context", "sentence R2", "CPU s", *tasks, "mean"
    )
    for row in rows:
        cells = [" / ".join(f"{score:.3f}" for score in row["scores"][task]) for task in tasks]
        variant = VARIANTS[row["name"]]
        comparable = variant.data.keys() <= SAME_ROWS and not variant.rows
        figures = [
            f"{row[key]:.3f}" if comparable else ""
            for key in ("loss", "contextual_share", "sentence_r2")
        ]
        table.add_row(
            row["name"],
            str(row["kd_seed"]),
            *figures,
            f"{row['cpu_seconds']:.0f}",
            *cells,
            f"{row['mean']:.3f}",
        )
    Console(width=150).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "rows": rows})


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("variants", __doc__ or "")
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "variants", help="where the runs are kept"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of distillation")
    parser.add_argument("--seeds", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--kd-seeds", type=int, nargs="*", default=[0], help="of distillation")
    parser.add_argument(
        "--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="these variants"
    )
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="these tasks"
    )
    arguments = parser.parse_args(args)
    names, task_names = arguments.only, arguments.tasks
    if arguments.quick:
        names, arguments.epochs, arguments.seeds, arguments.kd_seeds = ["fit", "dropout"], 1, 1, [0]
        arguments.folder = OUTPUT / "variants_quick"
    quieten()
    arguments.folder /= f"{arguments.epochs}_epochs"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(arguments.text, arguments.folder, most=600 if arguments.quick else None)
    tasks = [
        some_rows(
            load_task(str(arguments.glue / name) if arguments.glue else name), MOST_ROWS
        ).for_choosing(HELD_OUT)
        for name in (["sst2"] if arguments.quick else task_names)
    ]
    if arguments.quick:
        tasks = [some_rows(task, 600) for task in tasks]
    for seed, name in product(arguments.kd_seeds, names):
        distil(name, seed, text, tasks, arguments.epochs, arguments.folder)
        finetune(place_of(arguments.folder, name, seed), tasks, arguments.seeds)
    show(arguments.folder, arguments.kd_seeds, [task.task.name for task in tasks], arguments.json)


if __name__ == "__main__":
    main()
