"""Does a student beat its teacher's static vectors on single sentences, and after how many epochs of fine-tuning?

A 4 x 192 student (``fit`` of benchmarks/variants.py), the static vectors and the teacher are fine-tuned at the usual
rates of their sizes on 3,000 rows, 94 steps an epoch, and scored on 1,000 others. The tasks are of single sentences, and
no recipe was chosen by them: which Python package a docstring is of (the quickstart's), and, if ``--text`` is a parquet
file with a column ``source`` of the kind of ``gutenberg/austen-emma`` or ``masc/blog``, which novel 16 words are of and
which genre 24 words. ``--glue`` adds STS-B, a task of pairs. A run is kept in ``--folder`` and goes on where it was
stopped; ``--only`` names models, so that processes can share the work.

    python benchmarks/single_sentences.py --text train.parquet --glue glue
"""

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten  # isort: skip (before torch)

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import variants
from quality import some_rows
from rich.console import Console
from rich.table import Table

from kdnas.data.quickstart import TASK, build_quickstart_text
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.system.files import read_json, write_json
from kdnas.tasks.baselines import static_classifier
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings

MODELS = ("student", "static", "teacher")
MOST_ROWS, SCORED = 4_000, 0.25
# Of each task: how its sources begin, words a row, most rows a source.
CUT = {"novel": ("gutenberg", 16, 700), "genre": ("masc", 24, 400)}


def which_source(text: str, name: str, folder: Path) -> str:
    """Write the task of which source a piece of text is of, and give its folder."""
    begin, num_words, most = CUT[name]
    pieces = defaultdict(list)
    for row in pq.read_table(text, columns=["text", "source"]).to_pylist():
        if row["source"].startswith(begin):
            words = row["text"].split()
            pieces[row["source"]] += [
                " ".join(words[first : first + num_words])
                for first in range(0, len(words) - num_words + 1, num_words)
            ]
    drawn = random.Random(0)
    rows = [
        {"sentence": piece, "label": label}
        for label, source in enumerate(sorted(pieces))
        for piece in drawn.sample(pieces[source], min(most, len(pieces[source])))
    ]
    drawn.shuffle(rows)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    scored = len(rows) // 10  # load_task wants such rows; for_choosing holds out others
    for split, part in (("validation", rows[:scored]), ("train", rows[scored:])):
        pq.write_table(pa.Table.from_pylist(part), place / f"{split}.parquet")
    return str(place)


def load_tasks(text: str | None, glue: Path | None, folder: Path, most: int) -> list[LoadedTask]:
    """The tasks that can be made, all with as many rows."""
    sources = [str(build_quickstart_text(OUTPUT / "text").parent / TASK)]
    if text and text.endswith(".parquet") and "source" in pq.read_schema(text).names:
        sources += [which_source(text, name, folder / "tasks") for name in CUT]
    if glue:
        sources.append(str(glue / "stsb"))
    return [some_rows(load_task(source), most).for_choosing(SCORED) for source in sources]


def finetune(
    make: Callable[[int], Any], task: LoadedTask, num_epochs: int, seed: int, folder: Path
) -> None:
    """Fine-tune and score a model, unless ``folder`` has its result."""
    torch.manual_seed(seed)
    evaluate_glue(
        make(task.task.num_labels),
        find_teacher(TEACHER).tokenizer,
        task,
        FinetuneSettings(num_epochs, weight_decay=0.01, seed=seed),
        folder=folder,
        callbacks=[EpochLines(str(folder.relative_to(folder.parents[1])), print)],
        trainer_settings=TrainerSettings(),
        keep_model=False,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("single_sentences", __doc__ or "")
    parser.add_argument("--glue", type=Path, help="a folder of task folders with stsb")
    parser.add_argument("--folder", type=Path, default=OUTPUT / "single_sentences", help="of runs")
    parser.add_argument("--kd-epochs", type=int, default=2, help="of distillation")
    parser.add_argument("--epochs", type=int, nargs="*", default=[3, 7, 12], help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="of distillation and fine-tuning")
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args(args)
    folder, most = arguments.folder, MOST_ROWS
    if arguments.quick:
        arguments.kd_epochs, arguments.epochs, arguments.seeds, most = 1, [3], 1, 400
        arguments.glue, arguments.only, folder = None, ["student", "static"], folder / "quick"
    quieten()
    folder.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(None if arguments.quick else arguments.text, arguments.glue, folder, most)
    text = cut_text(arguments.text, folder, most=600 if arguments.quick else None)
    for seed, name in product(range(arguments.seeds), arguments.only):
        place = folder / f"{name}-{seed}"
        make: Callable[[int], Any] = partial(static_classifier, TEACHER, folder / "vectors")
        if name == "student":
            variants.distil("fit", seed, text, arguments.kd_epochs, folder)
            make = partial(load_classifier, variants.place_of(folder, "fit", seed) / "encoder")
        elif name == "teacher":
            make = partial(load_classifier, find_teacher(TEACHER).source)
        for task, num_epochs in product(tasks, arguments.epochs):
            finetune(make, task, num_epochs, seed, place / f"{task.task.name}-{num_epochs}")
    show(folder, [task.task.name for task in tasks], arguments.epochs, arguments.json)


def show(folder: Path, tasks: Sequence[str], lengths: Sequence[int], path: Path) -> None:
    """A row a model and length, the mean of its seeds (and their spread) a task, and the JSON."""
    rows: list[dict[str, Any]] = []
    table = Table("model", "epochs", *tasks, "seeds")
    for name, num_epochs in product(MODELS, lengths):
        scores = {
            task: [
                read_json(file)["score"]
                for file in sorted(folder.glob(f"{name}-*/{task}-{num_epochs}/result.json"))
            ]
            for task in tasks
        }
        if not all(scores.values()):
            continue
        rows.append({"name": name, "num_epochs": num_epochs, "scores": scores})
        cells = [
            f"{statistics.mean(found):.3f}"
            + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")
            for found in scores.values()
        ]
        table.add_row(name, str(num_epochs), *cells, str(min(map(len, scores.values()))))
    Console(width=120).print(table)
    write_json(path, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
