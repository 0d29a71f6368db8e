"""The rows to learn from and those held out, in a file; and the quickstart's text, the docstrings of packages."""

import ast
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from kdnas.data.masking import IntArray
from kdnas.data.readers import all_rows
from kdnas.system.errors import UserError
from kdnas.system.files import KeptFile, new_folder, placed

log = logging.getLogger(__name__)

QUICKSTART = "quickstart"
# Installed with kdnas[quickstart], each with at least 1,300 paragraphs of prose, and what else each is called in text.
PACKAGES = {
    "matplotlib": ("mpl", "plt", "pyplot", "pylab"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "scipy": ("sp",),
    "sklearn": ("scikit-learn", "scikit learn", "scikits", "scikit"),
    "sqlalchemy": ("sa",),
    "sympy": ("sym",),
}
# A source with a smaller share of usable rows is the wrong one, or the wrong column.
LEAST_USABLE = 0.01
_SPLITS = (None, "train", "held_out")
_SKIPPED = {
    "_vendor",
    "_vendored",
    "conftest",
    "examples",
    "extern",
    "externals",
    "test",
    "testing",
    "tests",
    "vendored",
}


class Texts(Sequence[str]):
    """Rows of text in a file, each read when it is asked for; a slice is a list.

    Args:
        file: the rows in UTF-8.
        starts: where each begins, in bytes.
        sizes: bytes of each.
    """

    def __init__(self, file: KeptFile, starts: IntArray, sizes: IntArray) -> None:
        self._file, self._starts, self._sizes = file, starts, sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return self._file.piece(int(self._starts[place]), int(self._sizes[place])).decode()

    def take(self, places: IntArray) -> "Texts":
        """Some of the rows, in this order."""
        return Texts(self._file, self._starts[places], self._sizes[places])


@dataclass(frozen=True)
class Corpus:
    """Distinct rows of text, split into two sides that share none.

    Args:
        texts: all rows: those to learn from, in the order of the source, then those that nothing is trained on.
        num_train: how many are to learn from.
        dropped: rows left out by rule: as the log says: ``empty`` (null, missing or only space) and ``duplicate``.
    """

    texts: Texts
    num_train: int
    dropped: dict[str, int]

    @property
    def train(self) -> Texts:
        """The rows to learn from."""
        return self.texts.take(np.arange(self.num_train))

    @property
    def held_out(self) -> Texts:
        """The rows that nothing is trained on."""
        return self.texts.take(np.arange(self.num_train, len(self.texts)))


def load_corpus(
    text: str,
    *,
    column: str = "text",
    held_out_fraction: float = 0.05,
    seed: int = 0,
    folder: Path | None = None,
) -> Corpus:
    """Read rows of text and split them into training and held-out rows.

    A column ``split`` with the values ``train`` and ``held_out`` decides where it is filled. All other rows are drawn
    by a hash of seed and text, so that neither their order nor other rows matter; each side gets at least one.

    Args:
        text: a ``.parquet``, ``.jsonl``, ``.json`` (one object a line), ``.csv``, ``.tsv`` or ``.txt`` (one row a line)
            file, a folder of such files, or the ``owner/name`` or ``owner/name:config`` of a data set on the
            Hugging Face hub (its train split).
        column: the column that holds the text; a ``.txt`` file has but one.
        held_out_fraction: share of the rows to hold out, between 0 and 1.
        seed: another seed holds out other rows.
        folder: where the rows lie, in a file without a name that ends with the corpus; by default where the system
            has its temporary files.

    Raises:
        UserError: the source is missing, unreadable, truncated or not UTF-8, lacks the column, holds a value that is no
            text or a character that no text holds, has fewer than two usable rows, or hardly any among many.
    """
    if not 0 < held_out_fraction < 1:
        raise UserError(
            f"held_out_fraction is {held_out_fraction!r}: give a share between 0 and 1, such as 0.05."
        )
    num_empty = 0
    sizes, digests, marks = array("q"), bytearray(), bytearray()
    with placed(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for row, split in all_rows(text, column):
            if row is None or not row.strip():
                num_empty += 1
                continue
            content = row.encode()
            digests += hashlib.sha256(f"{seed}\n".encode() + content).digest()[:16]
            marks.append(_SPLITS.index(split or None))
            sizes.append(file.write(content))
        file.flush()
        kept = KeptFile(os.dup(file.fileno()))
    lengths = np.frombuffer(sizes, np.int64)
    texts = Texts(kept, np.cumsum(lengths) - lengths, lengths)
    high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64).T
    order = np.lexsort((low, high))  # stable: of equal rows the first one comes first
    is_new = np.ones(len(order), dtype=bool)
    is_new[order[1:]] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    texts, high, splits = texts.take(is_new), high[is_new], np.frombuffer(marks, np.uint8)[is_new]
    dropped = {"empty": num_empty, "duplicate": len(order) - len(texts)}
    if len(texts) < 2:
        found = "only one usable row" if len(texts) else "no usable rows"
        raise UserError(
            f"{text!r} has {found} ({dropped}): give at least two distinct rows of text."
        )
    if len(texts) < LEAST_USABLE * (num_rows := len(texts) + sum(dropped.values())):
        raise UserError(
            f"{text!r} has {num_rows:,} rows, and only {len(texts):,} of them are usable ({dropped}): "
            f"is {column!r} the right column? Remove the others if it is."
        )
    if any(dropped.values()):
        counts = " and ".join(f"{count:,} {why}" for why, count in dropped.items() if count)
        log.warning("%r: %s rows are left out.", text, counts)
    given = {_SPLITS[mark] for mark in np.unique(splits)}
    drawn_from = np.flatnonzero(splits == 0)
    shares = (high[drawn_from] >> 16) / 2**48  # in [0, 1)
    fewest, most = int("held_out" not in given), len(shares) - int("train" not in given)
    if fewest > most:
        raise UserError(
            f"All rows of {text!r} have the split {given.pop()!r}: give 'train' and 'held_out', or neither."
        )
    num_drawn = int((shares < held_out_fraction).sum())
    is_held_out = splits == _SPLITS.index("held_out")
    is_held_out[
        drawn_from[np.argsort(shares, kind="stable")[: min(max(num_drawn, fewest), most)]]
    ] = True
    places = np.argsort(is_held_out, kind="stable")
    return Corpus(texts.take(places), int((~is_held_out).sum()), dropped)


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def build_quickstart_text(folder: Path, *, rows_per_package: int = 800) -> Path:
    """Write English that is on the machine already: the prose in the docstrings of installed packages.

    Sources are parsed, never imported. Whole modules are held out, with 12 % of the rows, and no two rows are equal
    without regard to case, marks, digits and names of packages. Beside the text lies a labelled task in GLUE's layout:
    ``which_package/train.parquet`` and ``which_package/validation.parquet`` ask which package a paragraph comes from,
    with the names of packages replaced. A folder that has all three files is left as it is.

    Args:
        folder: appears whole, with ``text.parquet`` (columns text, package, module, split) and ``which_package/``.
        rows_per_package: how many rows to take from each of the packages, at least 2.

    Returns:
        The path of ``text.parquet``; ``load_corpus`` reads it with its split.

    Raises:
        UserError: a package is not installed, or there are too few rows to split.
    """
    text, *task = (
        folder / name
        for name in (
            "text.parquet",
            "which_package/train.parquet",
            "which_package/validation.parquet",
        )
    )
    if text.exists() and all(path.exists() for path in task):
        return text
    if rows_per_package < 2:
        raise UserError(
            f"rows_per_package is {rows_per_package}: give at least 2, so that one row can be held out."
        )
    roots = {package: _root(package) for package in PACKAGES}
    aliases = sorted(
        (alias for group in PACKAGES.values() for alias in group), key=len, reverse=True
    )
    # A package's name counts within a word too (NumpyVersion), an alias does not ("append" has no pd in it).
    name = re.compile(
        rf"{'|'.join(PACKAGES)}|(?<![a-z])(?:{'|'.join(aliases)})(?![a-z])", re.IGNORECASE
    )
    seen: set[str] = set()

    def is_new(paragraph: str) -> bool:
        letters = re.sub(r"[^a-z]", "", name.sub("", paragraph).lower())
        if letters in seen:
            return False
        seen.add(letters)
        return True

    rows: list[dict[str, str]] = []
    console = Console(stderr=True, quiet=logging.getLogger("kdnas").level > logging.INFO)
    for package, root in track(
        roots.items(), "Reading docstrings", console=console, transient=True
    ):
        rows += _package_rows(package, root, rows_per_package, is_new)
    rows.sort(key=lambda row: _share(row["text"]))
    with new_folder(folder) as new:
        (new / "which_package").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), new / text.name)
        for path, split in zip(task, ("train", "held_out"), strict=True):
            examples = [
                (name.sub("package", row["text"]), row["package"])
                for row in rows
                if row["split"] == split
            ]
            pq.write_table(_balanced(examples), new / "which_package" / path.name)
    return text


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The package {package!r} is not installed: pip install 'kdnas[quickstart]'."
        )
    return Path(spec.submodule_search_locations[0])


def _package_rows(
    package: str, root: Path, num_rows: int, is_new: Callable[[str], bool]
) -> list[dict[str, str]]:
    """Rows of one package: its modules in the order of their hashes, the first of them held out."""
    num_held_out = max(1, round(0.12 * num_rows))
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED.intersection(parts):
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    rows: list[dict[str, str]] = []
    for module in sorted(modules, key=_share):
        if len(rows) == num_rows:
            break
        split, end = ("held_out", num_held_out) if len(rows) < num_held_out else ("train", num_rows)
        most = min(
            end - len(rows), num_rows // 33 + 1
        )  # no module is more than 3 % of its package's rows
        new = filter(is_new, _paragraphs(modules[module]))
        rows += [
            dict(text=text, package=package, module=module, split=split)
            for text in islice(new, most)
        ]
    return rows


def _balanced(examples: list[tuple[str, str]]) -> pa.Table:
    """As many examples of each label as of the rarest; the labels' names lie where ``datasets`` looks for them."""
    labels = sorted(PACKAGES)
    by_label = [
        [sentence for sentence, package in examples if package == label] for label in labels
    ]
    smallest = min(map(len, by_label))
    rows = [
        (sentences[i], label) for i in range(smallest) for label, sentences in enumerate(by_label)
    ]
    features = {
        "sentence": {"dtype": "string", "_type": "Value"},
        "label": {"names": labels, "_type": "ClassLabel"},
    }
    schema = pa.schema(
        {"sentence": pa.string(), "label": pa.int64()},
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.Table.from_pylist(
        [dict(sentence=sentence, label=label) for sentence, label in rows], schema
    )


# A paragraph with a line that starts like this is no prose: code, doctest, table, list, field, directive, parameter.
_MARKUP = re.compile(
    r"^(?:\s|>>>|\.\.|\*\s|[-+#|=~^\[<]|:(?!\S+:`)|\d+[.)]\s|\S+ : )", re.MULTILINE
)
_HEADING = re.compile(r"^.+\n[-=~^*]{3,} *$", re.MULTILINE)
# Code, links and roles keep their text; marks of references, prefixes of private names (_orm.Session), emphasis and the
# second colon before code go.
_INLINE = (
    (re.compile(r"``"), ""),
    (re.compile(r"(?::[\w:+-]+:)?`([^`<]*?)\s*(?:<[^`]*>)?`_*"), r"\1"),
    (re.compile(r"(?<=\])_|(?<![^\s(\"'])[.~]*_?(?=[^\W_])|[`~]"), ""),
    (re.compile(r"(?<![\w*])(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?![\w*])"), r"\2"),
    (re.compile(r"::$"), ":"),
)


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs of English prose, 60 to 400 characters and at least 8 words each, in the docstrings of a module."""
    try:
        with warnings.catch_warnings():  # of invalid escapes, in sources that are not ours to mend
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for docstring in _docstrings(tree):
        for paragraph in re.split(r"\n\s*\n", _HEADING.sub("\n", docstring)):
            if _MARKUP.search(paragraph.strip("\n")):
                continue
            text = " ".join(paragraph.split())
            for pattern, replacement in _INLINE:
                text = pattern.sub(replacement, text)
            if len(text) > 400:
                text = text[: max(text.rfind(mark, 0, 400) for mark in (". ", "! ", "? ")) + 1]
            num_letters = sum(character.isalpha() or character == " " for character in text)
            if (
                len(text) >= 60
                and len(text.split()) >= 8
                and text[0].isupper()
                and text[-1] in ".!?:"
                and num_letters >= 0.9 * len(text)
                and not {"\\", "$"}.intersection(text)
            ):
                yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for child in getattr(node, "body", ()):
        yield from _docstrings(child)
