import json
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AlbertTokenizer,
    AutoConfig,
    BertTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

from kdnas.data import datamodule
from kdnas.data.datamodule import DataSettings, KDDataModule
from kdnas.data.masking import Masker
from kdnas.data.pairs import make_pair
from kdnas.data.tokens import TokenRows
from kdnas.models.encoders import find_teacher
from kdnas.system.errors import UserError
from tests.conftest import VOCAB, WORDS, make_rows, save_teacher, write_rows

SENTENCES = [[f"s{number}w{place}" for place in range(10 + number)] for number in range(4)]
for sentence, end in zip(SENTENCES, [".", "!", '?"', "."], strict=True):
    sentence[-1] += end
TEXT = sum(SENTENCES, [])
ENDS = np.cumsum([len(sentence) for sentence in SENTENCES])[:-1].tolist()
OTHER = [f"o{place}" for place in range(30)]
PLACE = {word: place for place, word in enumerate(TEXT)}


def draw(
    number: int, text: list[str] = TEXT, other: list[str] = OTHER
) -> tuple[list[str], list[str]]:
    pair = make_pair(" ".join(text), " ".join(other), np.random.default_rng(number))
    return tuple(part.split() for part in pair)


def is_run(words: list[str], of: list[str]) -> bool:
    start = of.index(words[0])
    return words == of[start : start + len(words)]


def shape(first: list[str], second: list[str]) -> str:
    if set(second) <= set(OTHER):
        return "unrelated"
    cut = PLACE[first[-1]] + 1
    return (
        "neighbours"
        if is_run(first, TEXT) and is_run(second, TEXT) and PLACE[second[0]] == cut
        else "copy"
    )


PAIRS = [draw(number) for number in range(2000)]
OF_SHAPE = {
    name: [pair for pair in PAIRS if shape(*pair) == name]
    for name in ("neighbours", "unrelated", "copy")
}


def test_the_shapes_have_their_shares():
    for name, share in (("neighbours", 0.35), ("unrelated", 0.3), ("copy", 0.35)):
        assert len(OF_SHAPE[name]) / len(PAIRS) == pytest.approx(
            share, abs=4 * (share * (1 - share) / 2000) ** 0.5
        )


def test_neighbours_meet_at_a_sentence_end_and_have_random_lengths():
    pairs = OF_SHAPE["neighbours"]
    assert {PLACE[second[0]] for _, second in pairs} == set(ENDS)
    for number in range(2):
        lengths = Counter(len(pair[number]) for pair in pairs)
        assert min(lengths) == 4 and max(lengths) > 30 and len(lengths) > 25


def test_unrelated_pieces_are_runs_of_their_rows_anywhere_and_of_random_length():
    pairs = OF_SHAPE["unrelated"]
    assert all(is_run(first, TEXT) and is_run(second, OTHER) for first, second in pairs)
    for number in range(2):
        assert len({pair[number][0] for pair in pairs}) > 20
        assert len({len(pair[number]) for pair in pairs}) > 20


def test_a_copy_is_of_one_sentence_dropped_replaced_and_turned_on_either_side():
    whole, turned, dropped, replaced, first_is_whole = Counter(), 0, [], [], 0
    for first, second in OF_SHAPE["copy"]:
        first_is_whole += first in SENTENCES
        sentence, copy = (first, second) if first in SENTENCES else (second, first)
        whole[SENTENCES.index(sentence)] += 1
        assert set(copy) <= set(TEXT)
        dropped.append(1 - len(copy) / len(sentence))
        kept = [sentence.index(word) for word in copy if word in sentence]
        replaced.append(1 - len(kept) / len(copy))
        turned += kept != sorted(kept)
    num_pairs = sum(whole.values())
    assert set(whole) == {0, 1, 2, 3} and min(whole.values()) > num_pairs / 6
    assert first_is_whole / num_pairs == pytest.approx(0.5, abs=0.1)
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.03) and np.std(dropped) > 0.15
    # Of the replaced words a quarter are of the same sentence again.
    assert np.mean(replaced) == pytest.approx(0.15 * 3 / 4, abs=0.03) and max(replaced) > 0.35
    assert 0.4 < turned / num_pairs < 0.75  # half, and where a word of the same sentence came in


def test_a_paragraph_of_one_sentence_is_split_at_any_word():
    row = SENTENCES[2]
    pairs = [draw(number, row) for number in range(600)]
    assert {
        row.index(second[0]) for first, second in pairs if shape(first, second) == "neighbours"
    } == set(range(1, 12))


def test_sentences_of_a_word_or_two_are_not_copied():
    row = "a1. b1 b2! c1 c2 c3. d1? e1 e2 e3. f1 f2.".split()
    pairs = [draw(number, row) for number in range(200)]
    copies = [
        pair
        for pair in pairs
        if not set(pair[1]) <= set(OTHER) and not is_run([*pair[0], *pair[1]], row)
    ]
    assert len(copies) > 40
    assert all(row in pair for pair in copies)


@pytest.mark.parametrize(("num_words", "is_pair"), [(1, False), (7, False), (8, True)])
def test_a_text_too_short_gives_no_pair(num_words, is_pair):
    for number in range(30):
        pair = make_pair(" ".join(TEXT[:num_words]), "short", np.random.default_rng(number))
        assert (pair is not None) == is_pair


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab .!?\"')\n\t\u00a0\u3002", max_size=120), seed=st.integers(0, 99))
def test_any_text_gives_two_texts_or_none_and_the_same_again(text, seed):
    pair = make_pair(text, text or "x", np.random.default_rng(seed))
    assert (pair is None) == (len(text.split()) < 8)
    assert pair is None or all(pair)
    assert pair == make_pair(text, text or "x", np.random.default_rng(seed))


def paragraphs(num_rows: int, seed: int = 0) -> list[str]:
    """Distinct rows of two sentences."""
    rows = make_rows(2 * num_rows, seed)
    return [f"{first} . {second} ." for first, second in zip(rows[::2], rows[1::2], strict=True)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [
        {"text": row, "split": "held_out" if i % 5 == 0 else "train"}
        for i, row in enumerate(paragraphs(200))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def open_data(teacher: Path, text: Path, folder: Path | None = None, **settings) -> KDDataModule:
    settings = (
        dict(
            max_length=32, batch_tokens=128, mask_probability=0.0, pair_share=0.5, masked_share=1.0
        )
        | settings
    )
    data = KDDataModule(
        str(teacher), str(text), DataSettings(**settings), folder=folder and str(folder)
    )
    data.setup()
    return data


def rows_of(data: KDDataModule) -> list[list[int]]:
    return [data.rows.masked(0, i).tolist() for i in range(len(data.rows))]


def is_pair(data: KDDataModule) -> np.ndarray:
    return data.rows.second_starts < data.rows.lengths


def template(family: str) -> PreTrainedTokenizerBase:
    """The family's own tokenizer, with a small vocabulary."""
    if family == "bert":
        return BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)})
    if family == "albert":
        special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
        return AlbertTokenizer(
            vocab=[(piece, 0.0) for piece in [*special, *("▁" + word for word in WORDS)]]
        )
    pieces = ["<s>", "</s>", "<unk>", "<pad>", "<mask>", *string.ascii_lowercase, ".", "Ġ"]
    return RobertaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@pytest.mark.parametrize("max_length", [8, 17, 36])
def test_pairs_are_tokenised_by_each_family_s_own_template(
    tmp_path, text, monkeypatch, family, max_length
):
    made = {}

    def recorded(row, other, rng):
        made[row] = make_pair(row, other, rng)
        return made[row]

    monkeypatch.setattr(datamodule, "make_pair", recorded)
    tokenizer = template(family)
    teacher = save_teacher(tmp_path / family, family)
    tokenizer.save_pretrained(teacher)
    config = AutoConfig.from_pretrained(teacher)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    config.update(
        {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    )
    config.save_pretrained(teacher)
    data = open_data(teacher, text, tmp_path, max_length=max_length, batch_tokens=8 * max_length)
    texts = data.read_corpus().texts
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert max(batch["input_ids"].shape[1] for batch in batches) == max_length
    seen = 0
    for batch in batches:
        model = find_teacher(str(teacher)).model if seen == 0 else None
        for i, ids, types in zip(
            batch["sample_ids"], batch["input_ids"], batch["token_type_ids"], strict=True
        ):
            columns = made.get(texts[i]) or (texts[i],)
            expected = tokenizer(
                *columns,
                truncation=True,
                max_length=max_length,
                padding="max_length",
                return_token_type_ids=True,
            )
            assert ids.tolist() == expected["input_ids"][: len(ids)]
            assert set(expected["input_ids"][len(ids) :]) <= {tokenizer.pad_token_id}
            if family == "roberta":  # has no types of its own
                second = ids.tolist().index(1) + 2 if len(columns) == 2 else data.rows.lengths[i]
                expected = {
                    "token_type_ids": [
                        int(second <= p < data.rows.lengths[i]) for p in range(len(ids))
                    ]
                }
            assert types.tolist() == expected["token_type_ids"][: len(ids)]
            seen += 1
        if model is not None:
            assert (
                model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
                .isfinite()
                .all()
            )
    assert seen == len(texts)
    assert is_pair(data).sum() == len(made) > 50


def test_a_share_of_the_rows_becomes_pairs_and_the_others_stay(tiny_teacher, text):
    singles = rows_of(open_data(tiny_teacher, text, pair_share=0.0))
    chosen = {}
    for share in (0.0, 0.3, 0.6, 1.0):
        data = open_data(tiny_teacher, text, pair_share=share)
        chosen[share] = set(np.flatnonzero(is_pair(data)).tolist())
        assert len(chosen[share]) / 200 == pytest.approx(share, abs=0.12)
        assert all(
            row == singles[i] for i, row in enumerate(rows_of(data)) if i not in chosen[share]
        )
    assert chosen[0.0] < chosen[0.3] < chosen[0.6] < chosen[1.0] == set(range(200))


def test_pairs_depend_on_rows_alone(tiny_teacher, text):
    data = open_data(tiny_teacher, text)
    again = open_data(
        tiny_teacher, text, num_workers=2, batch_tokens=64, mask_probability=0.5, seed=1
    )
    assert (again.rows.second_starts == data.rows.second_starts).all()
    here, there = (
        [batch["token_type_ids"].tolist() for batch in loader]
        for loader in (
            data.train_dataloader(),
            open_data(tiny_teacher, text, num_workers=2).train_dataloader(),
        )
    )
    assert here == there and len(here) > 10


@pytest.mark.parametrize("splits", [(None,), (None, "train"), (None, "held_out", "train")])
def test_for_every_seed_and_share_rows_are_paired_within_their_part(
    tiny_teacher, tmp_path, monkeypatch, splits
):
    rows = [
        {"text": row, "split": splits[i % len(splits)]} for i, row in enumerate(paragraphs(200))
    ]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    asked = {}
    monkeypatch.setattr(datamodule, "make_pair", lambda row, other, rng: asked.update({row: other}))
    for seed, share in ((0, 0.05), (0, 0.5), (1, 0.3), (2, 0.9)):
        data = open_data(
            tiny_teacher, text, tmp_path, pair_share=1.0, seed=seed, held_out_fraction=share
        )
        corpus = data.read_corpus()
        train, held_out = set(corpus.train), set(corpus.held_out)
        for part, ids in ((train, data.train_ids()), (held_out, data.held_out_ids())):
            used = {corpus.texts[i] for i in ids}
            assert used <= part and len(part) - len(used) <= 1
            assert {asked[row] for row in used} <= part
        assert data.train_ids().size + data.held_out_ids().size >= 198
    assert sorted(asked) == sorted(asked.values()) == sorted(corpus.texts)
    assert not is_pair(data).any(), "a text that gives no pair stays as it is"


def test_a_row_that_is_alone_in_its_part_stays_single(tiny_teacher, tmp_path):
    rows = [
        {"text": row, "split": "held_out" if i == 0 else "train"}
        for i, row in enumerate(paragraphs(4))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = open_data(tiny_teacher, path, pair_share=1.0)
    assert is_pair(data)[data.train_ids()].tolist() == [True] * 3
    assert is_pair(data)[data.held_out_ids()].tolist() == [False]


def test_the_fingerprint_covers_where_the_second_sentence_begins(tiny_teacher, text, tmp_path):
    data, single = (open_data(tiny_teacher, text, pair_share=share) for share in (0.5, 0.0))
    assert data.rows.sha256 != single.rows.sha256
    sums = set()
    for second_start in (4, 5, 6):
        folder = tmp_path / str(second_start)
        folder.mkdir()
        write_rows(
            folder,
            [([1, 7, 8, 2, 9, 2], second_start)],
            Masker(4, 70, [1, 2, 3]),
            key=folder.name,
        )
        sums.add(TokenRows(folder, 3, 8).sha256)
    assert len(sums) == 3


def test_a_text_that_is_no_token_has_no_second_sentence(tmp_path, text, monkeypatch):
    tokenizer = template("bert")
    teacher = save_teacher(tmp_path / "bert")
    tokenizer.save_pretrained(teacher)
    monkeypatch.setattr(datamodule, "make_pair", lambda row, other, rng: ("the model", "\0"))
    data = open_data(teacher, text, tmp_path, pair_share=1.0)
    assert set(map(tuple, rows_of(data))) == {
        tuple(tokenizer.convert_tokens_to_ids(["[CLS]", "the", "model", "[SEP]", "[SEP]"]))
    }
    assert (data.rows.second_starts == data.rows.lengths).all()


def test_pairs_need_room_for_two_sentences():
    with pytest.raises(UserError, match="^max_length is 7: sentence pairs need at least 8 tokens"):
        DataSettings(pair_share=0.1, max_length=7)
    DataSettings(pair_share=0.1, max_length=8)
    DataSettings(pair_share=0.0, max_length=7)
