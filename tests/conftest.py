"""Tiny teachers of every family, with vocabulary, padding id and eps that are not the defaults."""

import os

from kdnas.cli import set_environment

set_environment()  # before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a hub

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from kdnas.data.datamodule import Batch
from kdnas.distill.objectives import View
from kdnas.models import encode


def examples(number: int) -> settings:
    """So many random cases of a property; ``KDNAS_EXAMPLES=10000`` for a long run."""
    return settings(max_examples=int(os.environ.get("KDNAS_EXAMPLES", number)), deadline=None)


torch.set_num_threads(1)  # tiny models: a second thread only waits for the first

WORDS = (
    "the a of to and in is it that was for on with as by at from this an or be are not have had which their one all "
    "model layer token student teacher search small fast deep wide head loss data text row batch step learn test run "
    "river stone light house green water music paper garden winter summer market letter train bridge window doctor"
).split()
VOCAB = ["[UNUSED]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", *WORDS]

CONFIGS = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "albert": AlbertConfig,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose padding id is 3, not 0 or 1."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
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
    values = dict(
        vocab_size=len(VOCAB),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=40,
        type_vocab_size=1 if family == "roberta" else 3,
        pad_token_id=3,
        layer_norm_eps=3e-6,
        initializer_range=0.2,
    )
    if family == "albert":
        values["embedding_size"] = 16
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[family](**(values | overrides))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(num_rows: int, seed: int = 0, longest: int = 24) -> list[str]:
    """Distinct random sentences of 4 to ``longest`` words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        rows.append(" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator)))
    return rows


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


def view_of(model: PreTrainedModel, batch: Batch) -> View:
    """A model's states on a batch, in float32."""
    return View(model, batch, padded=dict(enumerate(encode(model, batch).hidden_states, -1)))


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def any_teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of each family in turn."""
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
