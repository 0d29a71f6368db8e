"""What a student knows before any training, by its start.

    python benchmarks/starts.py [--quick] [--teachers NAME ...] [--steps N] [--json PATH] [--text PATH]

Each start of kdnas.distillation.start makes two students, which are then validated on the held-out rows as after an
epoch: one of half the teacher's width, and one that is as wide, with half of its layers; of the quickstart teacher, or
one in a folder, 4 layers x 192 and 3 x 384. A family's name stands for a teacher of 6 layers x 128 with 2,000 word
pieces, trained here from random weights as a masked language model on the text. ``crossing`` is what survives of the
attention between the two sentences of a pair: the correlation of the student's and the teacher's maps over all tokens n
and m of different sentences, [CLS] and [SEP] left out, in all layers and heads that the start took over (1: the same,
0: nothing). Seconds are of the start alone, CPU time.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import numpy as np
import torch
from quality import SHAPES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, BatchEncoding, PreTrainedTokenizerFast

from kdnas.data.corpus import Corpus, load_corpus
from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.data.quickstart import build_quickstart_text
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import View
from kdnas.distillation.start import FromEmbeddings, FromTeacher, RandomStart
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch, kept_layers
from kdnas.models.encoders import Teacher, encode, find_teacher, student_config
from kdnas.models.families import FAMILIES
from kdnas.models.layers import spread
from kdnas.system.files import write_json
from kdnas.training.precision import autocast
from kdnas.training.trainer import TrainerSettings, make_trainer

STARTS = {"random": RandomStart(), "embeddings": FromEmbeddings(), "teacher": FromTeacher()}
FIGURES = {  # in the table: as it is logged
    "loss": "val/loss",
    "contextual_share": "val/contextual_share",
    "sentence_r2": "val/sentence_r2",
}
ROLES = ("pad", "cls", "sep")
SPECIAL = ["[PAD]", "[unused]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # 1 is MPNet's padding
# Of the teachers that are trained here, and of their students.
MADE = StudentArch(6, 4, 128, 512, "gelu")
MADE_SHAPES = {
    "4x64": StudentArch(4, 2, 64, 256, "gelu"),
    "3x128": StudentArch(3, 4, 128, 512, "gelu"),
}
# What a family's config needs beside its sizes, as its base model has it.
CONFIGS: dict[str, dict[str, Any]] = {
    "roberta": dict(type_vocab_size=1),
    "xlm-roberta": dict(type_vocab_size=1),
    "camembert": dict(type_vocab_size=1),
    "albert": dict(embedding_size=32),
    "electra": dict(embedding_size=32),
    "deberta-v2": dict(
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "modernbert": dict(local_attention=32),
}


def make_teacher(family: str, corpus: Corpus, num_steps: int, folder: Path) -> str:
    """Train a teacher of a family from random weights, as a masked language model; its folder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(corpus)
    ids = {f"{role}_token_id": SPECIAL.index(f"[{role.upper()}]") for role in ROLES}
    values = dict(vocab_size=len(tokenizer), bos_token_id=ids["cls_token_id"]) | ids
    values["eos_token_id"] = ids["sep_token_id"]
    base = AutoConfig.for_model(family, **values | CONFIGS.get(family, {}))
    model = AutoModelForMaskedLM.from_config(student_config(base, MADE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    losses = []
    for inputs, labels in masked_batches(tokenizer, corpus, num_steps):
        with autocast("cpu"):
            logits = model(**inputs).logits[labels >= 0]
        loss = F.cross_entropy(logits.float(), labels[labels >= 0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    Console().print(f"{family}: cross-entropy {np.mean(losses[-50:]):.2f} after {num_steps} steps")
    model.base_model.save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return str(folder / family)


def make_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Word pieces of the text."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL)
    pieces.train_from_iterator(corpus.train[:5000], trainer)
    pieces.post_processor = processors.BertProcessing(
        *((f"[{x}]", SPECIAL.index(f"[{x}]")) for x in ("SEP", "CLS"))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": f"[{role.upper()}]" for role in (*ROLES, "unk", "mask")},
    )


def masked_batches(
    tokenizer: Any, corpus: Corpus, num_batches: int
) -> Iterator[tuple[BatchEncoding, Tensor]]:
    """Batches of 32 rows with 15 % of the tokens masked; labels are -100 elsewhere."""
    rows, draw = corpus.train, np.random.default_rng(0)
    for _ in range(num_batches):
        chosen = [rows[i] for i in draw.integers(len(rows), size=32)]
        inputs = tokenizer(
            chosen,
            truncation=True,
            max_length=64,
            padding=True,
            return_tensors="pt",
            return_special_tokens_mask=True,
            return_token_type_ids=False,
        )
        special = inputs.pop("special_tokens_mask").bool()
        masked = torch.from_numpy(draw.random(special.shape) < 0.15) & ~special
        labels = inputs["input_ids"].masked_fill(~masked, -100)
        inputs["input_ids"][masked] = tokenizer.mask_token_id
        yield inputs, labels


def across(ids: Tensor, mask_BT: Tensor, separator: int, cls: int) -> Tensor:
    """From which tokens to which is from one sentence of a pair to the other: (B, T, T)."""
    inside = mask_BT & (ids != separator) & (ids != cls)
    second = (ids == separator).cumsum(1) > 0
    return inside[:, :, None] & inside[:, None] & (second[:, :, None] != second[:, None])


def crossing(module: HiddenStateDistillModule, batch: Batch, separator: int, cls: int) -> Tensor:
    """Attention between two sentences, the student's beside the teacher's: (2, number of entries).

    Args:
        module: its student has begun.
        batch: of rows.
        separator: the token id between sentences.
        cls: that of the first token.
    """
    student, teacher = module.views(batch)
    ids, ours, theirs = batch["input_ids"], student.model.config, teacher.model.config
    between = across(ids, student.mask_BT, separator, cls)

    sources = kept_layers(ours.num_hidden_layers, theirs.num_hidden_layers)
    heads = [spread(ours.num_attention_heads, theirs.num_attention_heads)] * len(sources)
    if module.started is not None and module.started.heads is not None:
        heads = [list(kept) for kept in module.started.heads]
    whole = View(
        teacher.model, batch, dict(enumerate(encode(teacher.model, batch).hidden_states, -1))
    )
    maps = [
        torch.stack([student.attention(i), whole.attention(layer, torch.tensor(kept))]).float()
        for i, (layer, kept) in enumerate(zip(sources, heads, strict=True))
    ]
    return torch.cat([both.movedim(2, 1)[..., between].flatten(1) for both in maps], 1)


def measure(
    teacher: Teacher, data: KDDataModule, recipe: Recipe, arch: StudentArch, folder: Path
) -> dict[str, Any]:
    """The figures of one start."""
    torch.manual_seed(0)
    module = HiddenStateDistillModule(teacher, arch, recipe)
    module.states = open_states(
        teacher, data, module.target_layers, StatesSettings(str(OUTPUT / "teacher_states"), 100)
    )
    begin = time.process_time()
    module.begin(data)
    seconds = time.process_time() - begin
    found = make_trainer(TrainerSettings(), folder, 1).validate(module, data, verbose=False)[0]
    special = teacher.tokenizer.sep_token_id, teacher.tokenizer.cls_token_id
    module.student.eval()
    with torch.no_grad():
        parts = [crossing(module, batch, *special) for batch in data.val_dataloader()]
    figures = {name: found[logged] for name, logged in FIGURES.items()}
    return {
        "seconds": seconds,
        **figures,
        "crossing": float(torch.corrcoef(torch.cat(parts, 1))[0, 1]),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Measure and show."""
    parser = options("starts", __doc__ or "")
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=[TEACHER, *FAMILIES],
        help="quickstart, folders, or names of families",
    )
    parser.add_argument("--steps", type=int, default=500, help="of training a family's teacher")
    chosen = parser.parse_args(args)
    quieten()
    if chosen.quick:
        chosen.teachers, chosen.steps = [TEACHER, "mpnet"], 30
    config = read_config("fit")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=OUTPUT) as name:
        folder = Path(name)
        corpus = load_corpus(chosen.text or str(build_quickstart_text(OUTPUT / "text")))
        text = cut_text(chosen.text, folder, most=600 if chosen.quick else 2400)
        for asked in track(chosen.teachers, "teachers", transient=True, console=Console()):
            is_made = asked in FAMILIES
            path = make_teacher(asked, corpus, chosen.steps, folder) if is_made else asked
            teacher, shapes = find_teacher(path), MADE_SHAPES if is_made else SHAPES
            data = KDDataModule(path, text, config.data, split="full")
            data.setup()
            for shape, start in product(list(shapes)[: 1 if chosen.quick else 2], STARTS):
                recipe = replace(config.recipe, start=STARTS[start])
                figures = measure(teacher, data, recipe, shapes[shape], folder)
                rows.append({"teacher": asked, "student": shape, "start": start, **figures})
                write_json(chosen.json, {"machine": machine(), "rows": rows})
    columns = ("seconds", *FIGURES, "crossing")
    table = Table("teacher", "student", "start", *columns, title="Before any training")
    for row in rows:
        table.add_row(
            *(row[name] for name in ("teacher", "student", "start")),
            f"{row['seconds']:.1f}",
            *(f"{row[name]:.3f}" for name in columns[1:]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
