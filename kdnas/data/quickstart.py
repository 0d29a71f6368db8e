"""The text and the task of the quickstart, made from docstrings of installed packages."""

import ast
import hashlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from kdnas.models.encoders import QUICKSTART
from kdnas.system.errors import UserError
from kdnas.system.files import new_folder

TASK = "which_package"

# The packages of the extra ``quickstart``, and the aliases that texts use for them.
# Each has at least 1,300 paragraphs of prose.
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
_SKIPPED = set(
    "_vendor _vendored vendored extern externals conftest examples test testing tests".split()
)


def text_and_task(text: str, task: str | None, folder: Path) -> tuple[str, str | None]:
    """Return the names of a text and a task; for ``quickstart``, a path in ``folder`` instead.

    The files at these paths are made by ``build_quickstart_text``, unless they exist.
    """
    if QUICKSTART not in (text, task):
        return text, task
    path = build_quickstart_text(folder)
    return (
        str(path) if text == QUICKSTART else text,
        str(path.parent / TASK) if task == QUICKSTART else task,
    )


def build_quickstart_text(folder: Path, *, rows_per_package: int = 800) -> Path:
    """Write an English text and a classification task from docstrings of installed packages.

    Sources are parsed, never imported. 12 % of the rows are held out, and no module has both
    training rows and held-out rows. No two rows differ only in case, punctuation, digits or names
    of packages.

    The task, in GLUE's layout, asks which package a paragraph is from. Package names in the task's
    paragraphs are replaced by "package". If all files exist already, nothing is written.

    Args:
        folder: folder of the files, which appear all at once: ``text.parquet`` (columns text,
            package, module, split), ``which_package/train.parquet`` and
            ``which_package/validation.parquet``.
        rows_per_package: largest number of rows of the text from each package, at least 2.

    Returns:
        The path of ``text.parquet``, whose column ``split`` is used by ``load_corpus``.
    """
    text = folder / "text.parquet"
    tasks = {
        "train": folder / TASK / "train.parquet",
        "held_out": folder / TASK / "validation.parquet",
    }
    if all(path.exists() for path in (text, *tasks.values())):
        return text

    names = _package_names()
    rows = _all_rows(rows_per_package, names)
    with new_folder(folder) as new:
        (new / TASK).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), new / text.name)
        for split, path in tasks.items():
            examples = [
                (names.sub("package", row["text"]), row["package"])
                for row in rows
                if row["split"] == split
            ]
            pq.write_table(_balanced(examples), new / TASK / path.name)
    return text


def _package_names() -> re.Pattern[str]:
    """Return a regular expression for package names, also inside words such as NumpyVersion.

    Aliases such as np match only as whole words.
    """
    aliases = sorted((alias for group in PACKAGES.values() for alias in group), key=len)
    names, longest_first = "|".join(PACKAGES), "|".join(reversed(aliases))
    return re.compile(rf"{names}|(?<![a-z])(?:{longest_first})(?![a-z])", re.IGNORECASE)


def _share(text: str) -> float:
    """Return a number in [0, 1), a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _all_rows(rows_per_package: int, names: re.Pattern[str]) -> list[dict[str, str]]:
    roots = {package: _root(package) for package in PACKAGES}
    seen: set[str] = set()

    def is_new(paragraph: str) -> bool:
        letters = re.sub(r"[^a-z]", "", names.sub("", paragraph).lower())
        if letters in seen:
            return False
        seen.add(letters)
        return True

    rows: list[dict[str, str]] = []
    console = Console(stderr=True, quiet=logging.getLogger("kdnas").level > logging.INFO)
    progress = track(roots.items(), "Reading docstrings", console=console, transient=True)
    for package, root in progress:
        rows += _package_rows(package, root, rows_per_package, is_new)
    return sorted(rows, key=lambda row: _share(row["text"]))


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The package {package!r} is not installed: pip install '.[quickstart]'.")
    return Path(spec.submodule_search_locations[0])


def _package_rows(
    package: str, root: Path, num_rows: int, is_new: Callable[[str], bool]
) -> list[dict[str, str]]:
    """Return at most ``num_rows`` paragraphs of a package's docstrings; the first are held out.

    The modules in the folder ``root`` are read in a fixed random order. Paragraphs for which
    ``is_new`` returns False are left out.
    """
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED.intersection(parts):
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path

    num_held_out = max(1, round(0.12 * num_rows))
    most_of_a_module = num_rows // 33 + 1  # 3 %
    rows: list[dict[str, str]] = []
    for module in sorted(modules, key=_share):
        if len(rows) == num_rows:
            break
        split, end = "train", num_rows
        if len(rows) < num_held_out:
            split, end = "held_out", num_held_out
        new = filter(is_new, _paragraphs(modules[module]))
        for text in islice(new, min(end - len(rows), most_of_a_module)):
            rows.append(dict(text=text, package=package, module=module, split=split))
    return rows


def _balanced(examples: list[tuple[str, str]]) -> pa.Table:
    """Return the examples (text, package) as a table, with equally many of each package."""
    from datasets import ClassLabel, Features, Value

    labels = sorted(PACKAGES)
    by_label = [[text for text, package in examples if package == label] for label in labels]
    rows = [
        dict(sentence=sentence, label=label)
        for sentences in zip(*by_label, strict=False)
        for label, sentence in enumerate(sentences)
    ]
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=labels)})
    return pa.Table.from_pylist(rows, features.arrow_schema)


# A paragraph with a line that starts like this is no prose: code, doctest, table, list, field,
# directive, parameter.
_MARKUP = re.compile(
    r"^(?:\s|>>>|\.\.|\*\s|[-+#|=~^\[<]|:(?!\S+:`)|\d+[.)]\s|\S+ : )", re.MULTILINE
)
_HEADING = re.compile(r"^.+\n[-=~^*]{3,} *$", re.MULTILINE)
# Markup to remove: marks of code, links and roles (their text stays), marks of references, prefixes
# of private names (_orm.Session), emphasis, and the second colon before code.
_INLINE = (
    (re.compile(r"``"), ""),
    (re.compile(r"(?::[\w:+-]+:)?`([^`<]*?)\s*(?:<[^`]*>)?`_*"), r"\1"),
    (re.compile(r"(?<=\])_|(?<![^\s(\"'])[.~]*_?(?=[^\W_])|[`~]"), ""),
    (re.compile(r"(?<![\w*])(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?![\w*])"), r"\2"),
    (re.compile(r"::$"), ":"),
)


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs of English prose in the docstrings of a module."""
    try:
        with warnings.catch_warnings():  # warnings about invalid escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for docstring in _docstrings(tree):
        for paragraph in re.split(r"\n\s*\n", _HEADING.sub("\n", docstring)):
            if _MARKUP.search(paragraph.strip("\n")):
                continue
            text = _plain(paragraph)
            if _is_prose(text):
                yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for child in getattr(node, "body", ()):
        yield from _docstrings(child)


def _plain(paragraph: str) -> str:
    """Return a paragraph as one line without markup: whole sentences, up to 400 characters."""
    text = " ".join(paragraph.split())
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    if len(text) > 400:
        end = max(text.rfind(mark, 0, 400) for mark in (". ", "! ", "? "))
        text = text[: end + 1]
    return text


def _is_prose(text: str) -> bool:
    num_letters = sum(character.isalpha() or character == " " for character in text)
    return (
        len(text) >= 60
        and len(text.split()) >= 8
        and text[0].isupper()
        and text[-1] in ".!?:"
        and num_letters >= 0.9 * len(text)
        and not {"\\", "$"}.intersection(text)
    )
