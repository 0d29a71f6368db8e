import re
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from kdnas.data import quickstart
from kdnas.data.corpus import load_corpus
from kdnas.data.quickstart import build_quickstart_text
from kdnas.system.errors import UserError
from kdnas.tasks.tasks import load_task
from tests.conftest import make_rows

PROSE = [row.capitalize() + "." for row in make_rows(1200, seed=3, longest=40) if len(row) >= 60]


@pytest.fixture
def fake_packages(tmp_path, monkeypatch) -> Path:
    """Two packages of 40 modules with 5 paragraphs each, whose code must not run."""
    folder = tmp_path / "site"
    rows = iter(PROSE)
    for package in ("zalpha", "zbeta"):
        for number in range(40):
            path = folder / package / f"part{number % 4}" / f"module{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            first, second, *others = (next(rows) for _ in range(5))
            path.write_text(
                f'"""{first}\n\n{second}"""\nraise SystemExit("executed")\n\n\nclass A:\n    """{others[0]}"""\n\n'
                f'    def f(self):\n        """{others[1]}\n\n        {others[2]}\n        """\n'
            )
    (folder / "zalpha" / "__init__.py").write_text("")
    (folder / "zbeta" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(quickstart, "PACKAGES", {"zalpha": ("za", "za-lib"), "zbeta": ("zb",)})
    return folder


def add_module(folder: Path, source: str) -> None:
    """Put one module in the place of all."""
    for path in folder.rglob("module*.py"):
        path.unlink()
    (folder / "zalpha" / "only.py").write_text(source)


def test_the_text_has_so_many_rows_of_each_package_and_holds_out_whole_modules(
    fake_packages, tmp_path
):
    path = build_quickstart_text(tmp_path / "run" / "text", rows_per_package=66)
    assert path == tmp_path / "run" / "text" / "text.parquet"
    table = pq.read_table(path)
    assert table.column_names == ["text", "package", "module", "split"]
    rows = table.to_pylist()
    assert Counter((row["package"], row["split"]) for row in rows) == {
        ("zalpha", "train"): 58,
        ("zalpha", "held_out"): 8,
        ("zbeta", "train"): 58,
        ("zbeta", "held_out"): 8,
    }
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["module"], set()).add(row["split"])
        assert re.fullmatch(rf"{row['package']}\.part\d\.module\d+", row["module"])
    assert all(len(side) == 1 for side in sides.values())
    modules = sorted(module for module in sides if module.startswith("zalpha"))
    held_out = [module for module in modules if sides[module] == {"held_out"}]
    assert held_out != modules[: len(held_out)], (
        "not the first by name, which would be one part of the package"
    )
    assert max(Counter(row["module"] for row in rows).values()) == 3
    assert {row["text"] for row in rows} <= set(PROSE)
    assert not {"zalpha", "zbeta"} & set(sys.modules)


def test_the_text_loads_with_its_own_split(fake_packages, tmp_path):
    path = build_quickstart_text(tmp_path / "text", rows_per_package=66)
    rows = pq.read_table(path).to_pylist()
    found = load_corpus(str(path), held_out_fraction=0.9, seed=5)
    assert list(found.held_out) == [row["text"] for row in rows if row["split"] == "held_out"]
    assert found.dropped == {"empty": 0, "duplicate": 0}


def test_the_text_is_the_same_on_every_machine(fake_packages, tmp_path):
    first = build_quickstart_text(tmp_path / "first", rows_per_package=66)
    second = build_quickstart_text(tmp_path / "second", rows_per_package=66)
    assert pq.read_table(first).equals(pq.read_table(second))
    packages = [row["package"] for row in pq.read_table(first).to_pylist()]
    assert 15 < packages[:50].count("zalpha") < 35, (
        "the packages are mixed, so that the first rows are a fair sample"
    )


def test_what_is_there_already_is_left_as_it_is(fake_packages, tmp_path, monkeypatch):
    path = build_quickstart_text(tmp_path / "text", rows_per_package=66)
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    monkeypatch.setattr(quickstart, "PACKAGES", {"no_such_package": ()})
    assert build_quickstart_text(tmp_path / "text") == path
    assert {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")} == before


def test_a_half_made_folder_is_made_anew(fake_packages, tmp_path):
    path = build_quickstart_text(tmp_path / "text", rows_per_package=66)
    (path.parent / "which_package" / "validation.parquet").unlink()
    assert build_quickstart_text(tmp_path / "text", rows_per_package=20) == path
    assert len(pq.read_table(path)) == 40
    assert (path.parent / "which_package" / "validation.parquet").exists()


def test_a_missing_package_is_refused_and_leaves_nothing(fake_packages, tmp_path, monkeypatch):
    monkeypatch.setitem(quickstart.PACKAGES, "no_such_package", ())
    with pytest.raises(
        UserError, match=r"'no_such_package' is not installed: pip install '.\[quickstart\]'"
    ):
        build_quickstart_text(tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_only_prose_is_taken(fake_packages, tmp_path):
    prose = (
        "This paragraph is plain English prose, with enough words in it to be of use.",
        "See the class orm.Session and the page about it, which is as important as all that [1]:",
        "A value of __all__ can be bold, and a name like orm.Session has lost its prefix.",
        "A heading that stands right above a paragraph of prose, as it does here, is no part of it.",
    )
    source = '''
def f():
    """Short one.

    This paragraph is plain English prose,
    with enough   words in it to be of use.

    See the class :class:`~_orm.Session` and `the page <https://example.org>`_ about it, which is *as important* as
    **all that** [1]_::

        This is indented and therefore code, even though it reads as if it were English prose.

    A value of ``__all__`` can be bold, and a name like :ref:`_orm.Session` has lost its prefix.

    Notes
    -----
    A heading that stands right above a paragraph of prose, as it does here, is no part of it.

    >>> this_is("a doctest, not prose, but it is long enough to be taken for some of it anyway.")

    .. note:: This is a directive, not prose, but it is long enough to be taken for it anyway.

    Parameters
    ----------
    x : float
        The description of a parameter is in a list and not taken, long as it may well be here.

    :param x: The description of a parameter is a field and is not taken, long as it may be.

    | a | table | with | some | cells | in | it | that | go | on | for | long | enough | to | count.

    - A bullet is in a list and is not taken, long as it may be, and this one is long enough.

    1. A number is in a list too and is not taken, long as it may be, and it is long enough.

    this paragraph does not begin as a sentence does, so it is probably the end of another one.

    This paragraph does not end as a sentence does, so it is probably only the start of another

    Let a = 1; b = (2, 3); c = {4: 5, 6: 7}; d = [8, 9, 10]; e = 11 + 12 * 13 - 14 / 15 % 16.

    The sum \\\\alpha of all these things is written in TeX and is therefore not taken as prose.

    Pneumonoultramicroscopicsilicovolcanoconiosis is surely longerthanmostotherwords here.
    """
'''
    add_module(fake_packages, source)
    for split in ("zalpha/tests", "zalpha/_vendor", "zalpha/a/externals"):
        (fake_packages / split).mkdir(parents=True)
        (fake_packages / split / "m.py").write_text(
            '"""This is in a folder whose text is not the own text of the package."""'
        )
    (fake_packages / "zalpha" / "broken.py").write_text(
        '"""This is in a file that is not Python, and is left out."""\nx = ('
    )
    path = build_quickstart_text(tmp_path / "text", rows_per_package=400)
    assert sorted(pq.read_table(path)["text"].to_pylist()) == sorted(prose)


def test_the_module_of_a_row_is_named_as_it_is_imported(fake_packages, tmp_path):
    add_module(fake_packages, f'"""{PROSE[0]}"""')
    (fake_packages / "zalpha" / "__init__.py").write_text(f'"""{PROSE[1]}"""')
    (fake_packages / "zalpha" / "part0" / "__init__.py").write_text(f'"""{PROSE[2]}"""')
    rows = pq.read_table(build_quickstart_text(tmp_path / "text", rows_per_package=400)).to_pylist()
    assert sorted(row["module"] for row in rows) == ["zalpha", "zalpha.only", "zalpha.part0"]


def test_long_paragraphs_are_cut_at_a_sentence(fake_packages, tmp_path):
    sentence = "This sentence is one of many that make up a paragraph which is too long. "
    letters_only = (
        "Nothing in this paragraph ends a sentence " + "and it goes on " * 40 + "for ever."
    )
    add_module(fake_packages, f'"""{sentence * 10}\n\n{letters_only}"""')
    rows = pq.read_table(build_quickstart_text(tmp_path / "text", rows_per_package=400)).to_pylist()
    assert [row["text"] for row in rows] == [(sentence * 5).strip()]


def test_no_two_rows_are_equal_but_for_case_marks_digits_and_names(fake_packages, tmp_path):
    twins = [
        "The first row of text is read by zalpha, and it has 7 words that nobody needs.",
        "The first row of text is read by ZBeta and it has 8 words that nobody needs!",
        "The first row of text is read by za.read, and it has words that nobody needs.",
    ]
    add_module(fake_packages, f'"""{twins[0]}\n\n{twins[1]}\n\n{PROSE[0]}"""')
    (fake_packages / "zalpha" / "other.py").write_text(f'"""{twins[2]}\n\n{PROSE[0]}"""')
    (fake_packages / "zbeta" / "other.py").write_text(
        f'"""{twins[1]}\n\n{twins[0]}\n\n{PROSE[1]}"""'
    )
    rows = pq.read_table(build_quickstart_text(tmp_path / "text", rows_per_package=400))[
        "text"
    ].to_pylist()
    assert sorted(rows) == sorted(
        [twins[0], twins[2], PROSE[0], PROSE[1]]
    )  # the read of za.read is no name


def test_the_task_asks_for_the_package_without_naming_it(fake_packages, tmp_path):
    names = [
        "Zalpha is za, za-lib, ZALPHA's, za.array, zalpha_version and ZalphaError; "
        "plaza is not, nor is zany, which is a word of English.",
        "A zbeta and a ZB are the other one here, so that the label of it cannot be read off.",
    ]
    add_module(fake_packages, f'"""{names[0]}\n\n{names[1]}"""')
    (fake_packages / "zbeta" / "other.py").write_text(f'"""{PROSE[0]}\n\n{PROSE[1]}"""')
    path = build_quickstart_text(tmp_path / "text", rows_per_package=400)
    sentences = pq.read_table(path.parent / "which_package" / "validation.parquet")[
        "sentence"
    ].to_pylist()
    assert sorted(sentences) == sorted(
        [
            "package is package, package, package's, package.array, package_version and packageError; "
            "plaza is not, nor is zany, which is a word of English.",
            "A package and a package are the other one here, so that the label of it cannot be read off.",
            *PROSE[:2],
        ]
    )
    assert set(names) < set(pq.read_table(path)["text"].to_pylist())


def test_the_task_is_balanced_and_keeps_the_split_of_the_modules(fake_packages, tmp_path):
    for path in list((fake_packages / "zbeta").rglob("module*.py"))[:30]:
        path.unlink()
    path = build_quickstart_text(tmp_path / "text", rows_per_package=66)
    rows = {row["text"]: row for row in pq.read_table(path).to_pylist()}
    num_rows = Counter((row["package"], row["split"]) for row in rows.values())
    assert num_rows["zbeta", "train"] < num_rows["zalpha", "train"] == 58
    for task, split in (("train", "train"), ("validation", "held_out")):
        examples = pq.read_table(path.parent / "which_package" / f"{task}.parquet").to_pylist()
        assert Counter(example["label"] for example in examples) == dict.fromkeys(
            (0, 1), num_rows["zbeta", split]
        )
        for example in examples:
            row = rows[example["sentence"]]
            assert (row["split"], row["package"]) == (split, ("zalpha", "zbeta")[example["label"]])


def test_the_task_loads_as_a_glue_task_does(fake_packages, tmp_path):
    path = build_quickstart_text(tmp_path / "text", rows_per_package=66)
    task = datasets.load_dataset(
        str(path.parent / "which_package"), cache_dir=str(tmp_path / "cache")
    )
    assert set(task) == {"train", "validation"}
    assert task["train"].features == datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["zalpha", "zbeta"])
    )
    assert (len(task["train"]), len(task["validation"])) == (116, 16)
    assert load_task(str(path.parent / "which_package")).task.label_names == ("zalpha", "zbeta")


def test_installed_packages_give_english(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "PACKAGES", {"networkx": ("nx",), "pandas": ("pd",)})
    path = build_quickstart_text(tmp_path / "text", rows_per_package=120)
    rows = pq.read_table(path).to_pylist()
    assert Counter((row["package"], row["split"]) for row in rows) == {
        ("networkx", "train"): 106,
        ("networkx", "held_out"): 14,
        ("pandas", "train"): 106,
        ("pandas", "held_out"): 14,
    }
    assert {row["module"].split(".")[0] for row in rows} == {"networkx", "pandas"}
    for row in rows:
        assert 60 <= len(row["text"]) <= 400
        assert len(row["text"].split()) >= 8
        assert row["text"] == " ".join(row["text"].split())
        assert not re.search(r">>>|`|\\|::$", row["text"])
    words = Counter(" ".join(row["text"].lower() for row in rows).split())
    assert words["the"] > 240


def test_the_eight_packages_of_the_quickstart_are_known_by_their_import_names():
    assert len(quickstart.PACKAGES) == 8
    assert list(quickstart.PACKAGES) == sorted(quickstart.PACKAGES)
    for package in quickstart.PACKAGES:
        assert quickstart._root(package).is_dir()
