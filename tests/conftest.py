"""Tiny teachers of every family, with vocabulary, padding id and eps that are not the defaults."""

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys

from kdnas.cli.main import set_environment

set_environment()  # before torch is imported
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell starts background jobs deaf to Ctrl-C
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a hub

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from kdnas.data import datamodule
from kdnas.data.datamodule import Batch
from kdnas.data.masking import Masker
from kdnas.data.tokens import join_pieces, write_piece
from kdnas.distillation.objectives import View
from kdnas.models.encoders import FAMILIES, encode


def examples(number: int) -> settings:
    """So many random cases of a property; ``KDNAS_EXAMPLES=10000`` for a long run."""
    return settings(max_examples=int(os.environ.get("KDNAS_EXAMPLES", number)), deadline=None)


SECONDS_A_CASE = 60.0  # of a random case, which takes milliseconds


class Hangs(BaseException):
    """A random case that does not end. No Exception: Hypothesis would look for a smaller one, and wait for each."""


def limited(test: Callable[..., None]) -> Callable[..., None]:
    """The same test of one case, which fails and shows the case where it does not end (in Python's own code)."""

    @functools.wraps(test)
    def within(**case: object) -> None:
        def end(number: int, frame: object) -> None:
            raise Hangs(f"after {SECONDS_A_CASE:g} s: {case}")

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
        try:
            test(**case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return within


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of random cases is ``limited``."""
    for handle in {
        id(found): found for item in items if (found := getattr(item.obj, "hypothesis", None))
    }.values():
        handle.inner_test = limited(handle.inner_test)


def pytest_collection_finish() -> None:
    """What all tests share is not looked through by each of them, whenever memory is given back: half of their time."""
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)  # tiny models: a second thread only waits for the first

WORDS = (
    "the a of to and in is it that was for on with as by at from this an or be are not have had which their one all "
    "model layer token student teacher search small fast deep wide head loss data text row batch step learn test run "
    "river stone light house green water music paper garden winter summer market letter train bridge window doctor"
).split()
VOCAB = ["[UNUSED]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", *WORDS]

# As alike as BERT, RoBERTa and ALBERT are, most tests take these; tests/test_families.py takes all.
CONFIGS = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "albert": AlbertConfig,
}
MORE_CONFIGS = {
    "xlm-roberta": XLMRobertaConfig,
    "camembert": CamembertConfig,
    "electra": ElectraConfig,
    "distilbert": DistilBertConfig,
    "mpnet": MPNetConfig,
    "deberta-v2": DebertaV2Config,
    "modernbert": ModernBertConfig,
}
# What a family's tiny teacher has beside the sizes that all have; None: its config has no such field.
ODD = {
    "roberta": dict(type_vocab_size=1),
    "xlm-roberta": dict(type_vocab_size=1),
    "camembert": dict(type_vocab_size=1),
    "albert": dict(embedding_size=16),
    "electra": dict(embedding_size=32),
    "distilbert": dict(type_vocab_size=None, layer_norm_eps=None),
    "mpnet": dict(type_vocab_size=None),
    # As published: v3 has no table of positions, v2 has the first layer's convolution.
    "deberta-v2": dict(
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        attention_head_size=32,
        conv_kernel_size=3,
    ),
    "modernbert": dict(
        type_vocab_size=None,
        layer_norm_eps=None,
        norm_eps=3e-6,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose padding id is 3, not 0 or 1."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_teacher(folder: Path, family: str = "bert", **overrides: object) -> Path:
    """Write a 4-layer, 64-wide, 2-head teacher of the family with its tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(make_config(family, **overrides)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_config(family: str = "bert", **overrides: object) -> PreTrainedConfig:
    """The config of ``save_teacher``."""
    values = dict(
        vocab_size=len(VOCAB),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=40,
        type_vocab_size=3,
        pad_token_id=3,
        layer_norm_eps=3e-6,
        initializer_range=0.2,
    )
    values |= ODD.get(family, {}) | overrides
    names = FAMILIES[family].fields
    return (CONFIGS | MORE_CONFIGS)[family](
        **{names.get(k, k): v for k, v in values.items() if v is not None}
    )


def make_rows(num_rows: int, seed: int = 0, longest: int = 24) -> list[str]:
    """Distinct random sentences of 4 to ``longest`` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        rows.append(
            " ".join(
                WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator)
            )
        )
    return rows


def write_task(
    folder: Path,
    columns=("sentence",),
    labels=(0, 1),
    num_rows=20,
    validations=("validation",),
    suffix=".parquet",
) -> Path:
    """A task with random sentences, its labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", *validations)):
        texts = {
            name: make_rows(num_rows, seed=10 * seed + i, longest=12)
            for i, name in enumerate(columns)
        }
        write_table(
            folder / f"{split}{suffix}",
            **texts,
            label=[labels[row % len(labels)] for row in range(num_rows)],
        )
    return folder


def write_table(path: Path, **columns: list) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        options = pacsv.WriteOptions(
            delimiter="," if path.suffix == ".csv" else "\t",
            quoting_style="needed" if path.suffix == ".csv" else "none",
        )
        header = pacsv.WriteOptions(
            include_header=False, delimiter=options.delimiter, quoting_style="none"
        )
        with path.open(
            "wb"
        ) as file:  # pyarrow puts quotes around names, which GLUE's own files have not
            file.write(options.delimiter.join(table.column_names).encode() + b"\n")
            pacsv.write_csv(
                table,
                file,
                header if path.suffix == ".tsv" else pacsv.WriteOptions(include_header=False),
            )
    return path


def make_batch(num_rows: int = 3, seed: int = 0, length: int = 12) -> Batch:
    """Rows of random words, each shorter than the one before it (to 5 tokens); those of even number are pairs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(length - 1, 5, num_rows).long()
    places = torch.arange(length)
    input_ids = torch.randint(6, len(VOCAB), (num_rows, length), generator=generator)
    input_ids[:, 0] = 1
    second = (places >= 3) & (torch.arange(num_rows) % 2 == 0)[:, None]
    mask = places < lengths[:, None]
    return {
        "input_ids": input_ids.where(mask, torch.tensor(3)),
        "attention_mask": mask.long(),
        "token_type_ids": (second & mask).long(),
        "sample_ids": torch.arange(num_rows),
        "variant": torch.tensor(0),
    }


def write_rows(folder: Path, rows: list, masker: Masker, key: str, num_variants: int = 1) -> None:
    """Rows of tokens, each with where its second sentence begins, as those of a text are kept."""
    piece = folder.with_name(f"{folder.name}.piece")
    write_piece(piece, rows, masker, 0, num_variants)
    hashes, splits = np.arange(len(rows), dtype=np.uint64), np.zeros(len(rows), np.uint8)
    join_pieces(folder, [piece], hashes, splits, key=key, dropped={}, num_variants=num_variants)
    piece.unlink()


def masked(batch: Batch) -> Batch:
    """The same rows, every second of them with [MASK] in place of two words."""
    input_ids = batch["input_ids"].clone()
    input_ids[1::2, 1:3] = VOCAB.index("[MASK]")
    return batch | {"input_ids": input_ids}


def view_of(model: PreTrainedModel, batch: Batch) -> View:
    """A model's states on a batch, in float32."""
    return View(model, batch, padded=dict(enumerate(encode(model, batch).hidden_states, -1)))


@pytest.fixture(scope="session", autouse=True)
def hangups_are_heard() -> None:
    """Also under nohup, or where the tests' own terminal is gone."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where data modules keep tokenised texts that were told no other place; shared, as they are between runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "TOKENS", folder := tmp_path_factory.mktemp("tokens"))
        yield folder


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def any_teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of BERT, RoBERTa and ALBERT in turn."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / request.param, request.param)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT teacher."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "bert")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 distinct rows, one a line."""
    path = tmp_path_factory.mktemp("text") / "rows.txt"
    path.write_text("\n".join(make_rows(120)) + "\n")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip(
            "only root can mount a small disk, and not everywhere; full disks are injected elsewhere here"
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


_opened: list[list[str]] = []


def _note(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened and isinstance(args[0], str | bytes | os.PathLike):
        _opened[-1].append(os.path.abspath(os.fsdecode(args[0])))


sys.addaudithook(_note)


@contextmanager
def note_opened() -> Iterator[list[str]]:
    """Every file that Python opens meanwhile, by its path."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The same, for a whole test."""
    with note_opened() as paths:
        yield paths
