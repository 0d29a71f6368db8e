"""What a student knows before any training, by its start.

    python benchmarks/starts.py [--quick] [--json PATH] [--text PATH]

Each start of kdnas.distillation.start makes a student of 4 layers x 192 and one of 3 x 384, which is then validated on
the held-out rows as after an epoch. ``crossing`` is what survives of the attention between the two sentences of a pair:
the correlation of the student's and the teacher's maps over all tokens n and m of different sentences, [CLS] and [SEP] left
out, in all layers and heads that the start took over (1: the same, 0: nothing). Seconds are of the start alone, CPU
time.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import torch
from quality import SHAPES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import View
from kdnas.distillation.start import FromEmbeddings, FromTeacher, RandomStart
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.encoders import Teacher, find_teacher
from kdnas.system.files import write_json
from kdnas.training.trainer import TrainerSettings, make_trainer

STARTS = {"random": RandomStart(), "embeddings": FromEmbeddings(), "teacher": FromTeacher()}
FIGURES = {  # in the table: as it is logged
    "loss": "val/loss",
    "contextual_share": "val/contextual_share",
    "sentence_r2": "val/sentence_r2",
    "attention_maps": "terms/attention_maps",
}


def crossing(student: View, teacher: View, criterion: Any, outside: Sequence[int]) -> Tensor:
    """Attention between two sentences, the student's beside the teacher's: shape (2, number of entries).

    Args:
        student: its states and maps on a batch.
        teacher: the same of the teacher.
        criterion: of ``AttentionMaps``, which knows whose map each of the student's heads has.
        outside: token ids that belong to neither sentence.
    """
    batch: Batch = student.batch
    inside = student.mask_BT & ~torch.isin(batch["input_ids"], torch.tensor(outside))
    second = batch["token_type_ids"].bool()
    between = inside[:, :, None] & inside[:, None] & (second[:, :, None] != second[:, None])
    maps = [
        torch.stack([student.attention(i), teacher.attention(layer, heads)]).float()
        for i, (layer, heads) in enumerate(zip(criterion.sources, criterion.heads, strict=True))
    ]
    return torch.cat([both.movedim(2, 1)[..., between].flatten(1) for both in maps], 1)


def measure(
    teacher: Teacher, data: KDDataModule, recipe: Recipe, shape: str, folder: Path
) -> dict[str, Any]:
    """The figures of one start."""
    torch.manual_seed(0)
    module = HiddenStateDistillModule(teacher, SHAPES[shape], recipe)
    module.states = open_states(
        teacher, data, module.target_layers, StatesSettings(str(OUTPUT / "teacher_states"), 100)
    )
    begin = time.process_time()
    module.begin(data)
    seconds = time.process_time() - begin
    found = make_trainer(TrainerSettings(), folder, 1).validate(module, data, verbose=False)[0]
    (criterion,) = [part for part in module.criterion.modules() if hasattr(part, "sources")]
    outside = [teacher.tokenizer.cls_token_id, teacher.tokenizer.sep_token_id]
    module.student.eval()
    with torch.no_grad():
        parts = [
            crossing(*module.views(batch), criterion, outside) for batch in data.val_dataloader()
        ]
    figures = {name: found[logged] for name, logged in FIGURES.items()}
    return {
        "seconds": seconds,
        **figures,
        "crossing": float(torch.corrcoef(torch.cat(parts, 1))[0, 1]),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Measure and show."""
    chosen = options("starts", __doc__ or "").parse_args(args)
    quieten()
    shapes = ["4x192"] if chosen.quick else list(SHAPES)
    config, teacher = read_config("fit"), find_teacher(TEACHER)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=OUTPUT) as name:
        folder = Path(name)
        data = KDDataModule(
            TEACHER,
            cut_text(chosen.text, folder, most=600 if chosen.quick else None),
            config.data,
            split="mini",
        )
        data.setup()
        pairs = [(shape, start) for shape in shapes for start in STARTS]
        for shape, start in track(pairs, "starts", transient=True, console=Console()):
            recipe = replace(config.recipe, start=STARTS[start])
            rows.append(
                {"shape": shape, "start": start, **measure(teacher, data, recipe, shape, folder)}
            )
    columns = ("seconds", *FIGURES, "crossing")
    table = Table("student", "start", *columns, title="Before any training")
    for row in rows:
        table.add_row(
            row["shape"],
            row["start"],
            f"{row['seconds']:.1f}",
            *(f"{row[name]:.2f}" for name in columns[1:]),
        )
    Console(width=120).print(table)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(chosen.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
