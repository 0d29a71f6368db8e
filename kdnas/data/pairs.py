"""Sentence pairs made from paragraphs, which resemble the inputs of sentence-pair tasks.

Only on sentence pairs does a teacher attend from one sentence to the other. A student whose initial
weights are the teacher's, and which is distilled on single rows alone, unlearns this attention.
"""

import re

import numpy as np

MIN_WORDS = 8  # a shorter text gives no pair
_MIN_PIECE = 4  # words; less only if the text is shorter
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+""")


def make_pair(text: str, other: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """Make a sentence pair from a paragraph.

    35 % of the pairs are two neighbouring pieces of the paragraph, 30 % are a piece of the
    paragraph and a piece of an unrelated text, and 35 % are a sentence of the paragraph and a
    corrupted copy of that sentence, in random order. A piece is a run of words of random length.

    Args:
        text: the paragraph.
        other: an unrelated text.
        rng: random generator; its state and the two texts determine the pair.

    Returns:
        The two sentences, or None if ``text`` has fewer than 8 words (``MIN_WORDS``).
    """
    words = text.split()
    if len(words) < MIN_WORDS:
        return None
    sentences = [sentence.split() for sentence in _SENTENCE_END.split(text.strip())]
    shape = rng.random()
    if shape < 0.35:
        first, second = _neighbours(words, sentences, rng)
    elif shape < 0.65:
        first, second = _piece(words, rng), _piece(other.split(), rng)
    else:
        long = [sentence for sentence in sentences if len(sentence) >= _MIN_PIECE] or [words]
        first = long[rng.integers(len(long))]
        second = _corrupted(first, words, rng)
        if rng.random() < 0.5:
            first, second = second, first
    return " ".join(first), " ".join(second)


def _length(words: list[str], rng: np.random.Generator) -> int:
    return int(rng.integers(min(_MIN_PIECE, len(words)), len(words), endpoint=True))


def _piece(words: list[str], rng: np.random.Generator) -> list[str]:
    length = _length(words, rng)
    start = int(rng.integers(len(words) - length + 1))
    return words[start : start + length]


def _neighbours(
    words: list[str], sentences: list[list[str]], rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Return some words just before and some words just after a random sentence end.

    If there is only one sentence, a random gap between two words is used instead of a sentence end.
    """
    ends = np.cumsum([len(sentence) for sentence in sentences])[:-1]
    cut = int(rng.choice(ends if len(ends) else np.arange(1, len(words))))
    before, after = words[:cut], words[cut:]
    return before[-_length(before, rng) :], after[: _length(after, rng)]


def _corrupted(sentence: list[str], words: list[str], rng: np.random.Generator) -> list[str]:
    """Return a copy of ``sentence`` with some words dropped, and some replaced by random ``words``.

    Half of the copies are also rotated: a random number of first words is moved to the end.
    """
    drops = rng.random(len(sentence)) < rng.uniform(0, 0.5)
    copy = [word for word, drop in zip(sentence, drops, strict=True) if not drop] or sentence[:1]
    replaces = rng.random(len(copy)) < rng.uniform(0, 0.3)
    copy = [
        words[rng.integers(len(words))] if replace else word
        for word, replace in zip(copy, replaces, strict=True)
    ]
    turn = int(rng.integers(len(copy))) if rng.random() < 0.5 else 0
    return copy[turn:] + copy[:turn]
