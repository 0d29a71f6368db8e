import csv
import json
import os
import random
import re
import tempfile
import tracemalloc
from io import BufferedWriter, FileIO
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdnas.data import readers
from kdnas.data.corpus import Corpus, load_corpus
from kdnas.models.hub import HubAway
from kdnas.system.errors import UserError
from tests.conftest import examples, make_rows

ROWS = [
    "A plain row of text.",
    'Commas, "quotes", and more.',
    "Smörgåsbord \u2028 für alle \x0b 漢字",
    " space around ",
    "long " * 60_000,
]


def write(path: Path, rows: list[str | None], **columns: list) -> Path:
    """Write rows, and further columns, in the format of the suffix."""
    table = {"text": rows, **columns}
    records = [
        dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)
    ]
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(table), path, row_group_size=2)
        case ".jsonl" | ".json":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(
                    file, list(table), dialect="excel-tab" if path.suffix == ".tsv" else "excel"
                )
                writer.writeheader()
                writer.writerows(records)
        case ".txt":
            path.write_text("".join(f"{row}\n" for row in rows))
    return path


def sides(found: Corpus) -> tuple[list[str], list[str]]:
    return list(found.train), list(found.held_out)


def every(found: Corpus) -> list[str]:
    return sorted(found.texts)


SUFFIXES = [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"]


def test_there_are_six_formats():
    assert list(readers._READERS) == SUFFIXES


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    found = load_corpus(
        str(write(tmp_path / f"rows{suffix}", [*ROWS, "", "  ", ROWS[0]])), held_out_fraction=0.3
    )
    assert every(found) == sorted(ROWS)
    assert found.dropped == {"empty": 2, "duplicate": 1}
    expected = load_corpus(str(write(tmp_path / "expected.txt", ROWS)), held_out_fraction=0.3)
    assert sides(found) == sides(expected)


@pytest.mark.parametrize("suffix", SUFFIXES[:5])
def test_another_column_can_hold_the_text(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ["x", "y", "z"], body=["one", "two", "three"])
    assert every(load_corpus(str(path), column="body")) == ["one", "three", "two"]


def test_suffixes_may_be_in_capitals(tmp_path):
    path = write(tmp_path / "rows.txt", ROWS).rename(tmp_path / "ROWS.TXT")
    assert every(load_corpus(str(path))) == sorted(ROWS)


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nthree")
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbftext\r\none\r\ntwo\r\nthree\r\n")
    assert every(load_corpus(str(tmp_path / "rows.txt"))) == ["one", "three", "two"]
    assert every(load_corpus(str(tmp_path / "rows.csv"))) == ["one", "three", "two"]


def test_nulls_blank_lines_and_duplicates_are_dropped_counted_and_told(tmp_path, caplog):
    write(tmp_path / "rows.parquet", ["one", None, "two"])
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "two"}')
    assert load_corpus(str(tmp_path / "rows.parquet")).dropped == {"empty": 1, "duplicate": 0}
    assert load_corpus(str(tmp_path / "rows.jsonl")).dropped == {"empty": 2, "duplicate": 0}
    (tmp_path / "rows.txt").write_text("one\none\n\ntwo\n" + "two\n" * 100)
    load_corpus(str(tmp_path / "rows.txt"))
    assert (
        caplog.messages[-1]
        == f"'{tmp_path}/rows.txt': 1 empty and 101 duplicate rows are left out."
    )


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.csv", ["three", "four"])
    write(tmp_path / "a.txt", ["one", "two"])
    write(tmp_path / "c.parquet", ["five", "one"])
    write(tmp_path / ".hidden.txt", ["never"])
    (tmp_path / "README.md").write_text("never")
    (tmp_path / "folder.txt").mkdir()
    found = load_corpus(str(tmp_path), held_out_fraction=1e-9)
    rows = ["one", "two", "three", "four", "five"]
    assert list(found.train) == [row for row in rows if row not in found.held_out]
    assert every(found) == sorted(rows)
    assert found.dropped["duplicate"] == 1


def test_a_hub_name_reads_the_train_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"body": ["one", "two", "three"], "id": [1, 2, 3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert every(load_corpus("some-one/some.data", column="body")) == ["one", "three", "two"]
    load_corpus("some-one/some.data:20231101.en", column="body")
    assert asked == [
        (names, {"split": "train"})
        for names in (("some-one/some.data",), ("some-one/some.data", "20231101.en"))
    ]
    with pytest.raises(UserError, match="'some-one/some.data' has no column 'text' .*'body', 'id'"):
        load_corpus("some-one/some.data")


def test_a_hub_name_that_cannot_be_reached_is_refused():
    with pytest.raises(
        UserError,
        match=r"no file or folder 'nobody/nothing' here, and it was not found in the hub's cache \(HF_HUB_OFFLINE",
    ):
        load_corpus("nobody/nothing")


def test_without_a_network_the_hub_is_asked_once_only(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("it repeats for 23 seconds")
    )
    with pytest.raises(HubAway, match=r"'nobody/nothing' here, and .* \(no route to host\)"):
        load_corpus("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.docx",
            b"one\ntwo\n",
            r"rows.docx' has the unknown suffix '.docx': give one of .parquet, .jsonl",
        ),
        ("rows", b"one\ntwo\n", r"rows' has the unknown suffix ''"),
        *[(f"rows{suffix}", b"", rf"rows{suffix}' has no usable rows") for suffix in SUFFIXES],
        ("rows.csv", b"text,id\n", r"rows.csv' has no usable rows"),
        ("rows.txt", b" \n\t\n\n", r"rows.txt' has no usable rows \(.*'empty': 3"),
        ("rows.jsonl", b'{"text": " "}\n', r"rows.jsonl' has no usable rows"),
        ("rows.txt", b"one\none\n \n", r"only one usable row \(.*'empty': 1, 'duplicate': 1"),
        (
            "rows.txt",
            b"one\ntwo\n" + 300 * b"one\n",
            "Only 2 of the 302 rows of .* are usable .*'duplicate': 300",
        ),
        ("rows.txt", b"one\ntwo\n\xff\xfe\n", r"rows.txt' is not UTF-8 in row 3"),
        (
            "rows.jsonl",
            b'{"text": "one"}\n{"text": "\xe9"}\n',
            r"rows.jsonl' is not UTF-8 in row 2",
        ),
        ("rows.csv", b"text\none\ntwo\nth\xe9\n", r"rows.csv' is not UTF-8 in row 3"),
        ("rows.txt", b"one\nt\0wo\n", r"rows.txt' has the character '\\x00' in row 2"),
        ("rows.csv", b"text\none\nt\0wo\n", r"rows.csv' has the character '\\x00' in row 2"),
        (
            "rows.jsonl",
            b'{"text": "one"}\n{"text": "a\\u0000"}\n',
            r"rows.jsonl' has the character '\\x00' in row 2",
        ),
        (
            "rows.jsonl",
            b'{"text": "one"}\n{"text": "\\ud800"}\n',
            r"has the character '\\ud800' in row 2",
        ),
        (
            "rows.csv",
            b"body,id\none,1\n",
            r"rows.csv' has no column 'text' \(row 1\).*'body', 'id'",
        ),
        (
            "rows.tsv",
            b'id\ttext\n1\t"one.\n2\ttwo."\n',
            r"rows.tsv' cannot be read at row 1 \(a field in quotes contains a tab",
        ),
        (
            "rows.tsv",
            b"body\tid\none\t1\n",
            r"rows.tsv' has no column 'text' \(row 1\).*'body', 'id'",
        ),
        (
            "rows.jsonl",
            b'{"text": "one"}\n{"body": "two"}\n',
            r"no column 'text' \(row 2\).*'body'",
        ),
        ("rows.jsonl", b"{}\n", r"no column 'text' \(row 1\).*none"),
        ("rows.jsonl", b'{"text": "one"}\n{"text": 7}\n', r"has the int 7 in column 'text', row 2"),
        ("rows.jsonl", b'{"text": ["one"]}\n', r"has the list \['one'\] in column 'text', row 1"),
        (
            "rows.jsonl",
            b'{"text": "one"}\n\n{"text": "tw',
            r"rows.jsonl' cannot be read at row 3 \(Unterminated string",
        ),
        (
            "rows.json",
            b'[\n{"text": "one"},\n{"text": "two"}\n]',
            r"rows.json' cannot be read at row 1",
        ),
        (
            "rows.json",
            b'["one", "two"]',
            r"rows.json' cannot be read at row 1 \(the line holds a list, not a JSON object",
        ),
        ("rows.json", b"[" * 100_000, r"rows.json' cannot be read at row 1 \(maximum recursion"),
        (
            "rows.json",
            b'{"text": ' + b"9" * 5000 + b"}",
            r"rows.json' cannot be read at row 1 \(Exceeds the limit",
        ),
        (
            "rows.csv",
            b"text\none\ntwo, three\n",
            r"rows.csv' cannot be read at row 2 \(the row has more fields than the header",
        ),
        (
            "rows.csv",
            b'text\none\n"two\nthree\n',
            r"rows.csv' cannot be read at row 2 \(unexpected end of data",
        ),
        ("rows.parquet", b"PAR1 is not enough", r"rows.parquet' cannot be read at row 1"),
        (
            "rows.jsonl",
            b'{"text": "one", "split": "test"}\n',
            r"' has 'test' in row 1: give 'train' or",
        ),
        (
            "rows.csv",
            b"text,split\none,train\ntwo,train\n",
            r"All rows of .*rows.csv' have the split 'train'",
        ),
        (
            "rows.csv",
            b"text,split\none,held_out\ntwo,held_out\n",
            r"All rows of .* have the split 'held_out'",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([b"one", b"two"], "has the bytes b'one' in column 'text', row 1"),
        ([1.5, 2.5], "has the float 1.5 in column 'text', row 1"),
        ([["one"], ["two"]], r"has the list \['one'\] in column 'text', row 1"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        load_corpus(str(write(tmp_path / "rows.parquet", values)))


def test_parquet_lists_its_columns_where_the_one_asked_for_is_missing(tmp_path):
    path = write(tmp_path / "rows.parquet", ["one", "two"], source=["a", "b"])
    with pytest.raises(UserError, match=r"rows.parquet' has no column 'body' .*'text', 'source'"):
        load_corpus(str(path), column="body")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_parquet_is_refused(tmp_path, share):
    path = write(tmp_path / "rows.parquet", make_rows(200))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"rows.parquet' cannot be read at row 1"):
        load_corpus(str(path))


def test_parquet_with_text_that_is_not_utf8_is_refused(tmp_path):
    offsets, content = (
        pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 4))),
        pa.py_buffer(b"one\xff"),
    )
    pq.write_table(
        pa.table({"text": pa.StringArray.from_buffers(2, offsets, content)}),
        tmp_path / "rows.parquet",
    )
    with pytest.raises(UserError, match=r"rows.parquet' is not UTF-8 in row 2"):
        load_corpus(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    "name",
    ["", "missing.txt", "data/missing.csv", "/no/such/folder", "../up", "imdb", "json", "a\0b"],
)
def test_a_source_that_does_not_exist_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=re.escape(f"The text {name!r} does not exist: give a file (.parquet")
    ):
        load_corpus(name)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("one")
    with pytest.raises(UserError, match=f"{tmp_path.name}' contains no text file"):
        load_corpus(str(tmp_path))


def test_a_full_disk_for_temporary_files_is_an_error_of_the_disk_with_the_place(
    tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text("\n".join(make_rows(20)))
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda dir: BufferedWriter(FileIO("/dev/full", "w"))
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        load_corpus(str(tmp_path / "a.txt"))


def test_rows_are_read_from_the_file_when_they_are_asked_for(tmp_path):
    rows = [f"{row} é" for row in make_rows(50)]
    path, folder = write(tmp_path / "rows.txt", rows), tmp_path / "folder"
    folder.mkdir()
    found = load_corpus(str(path), held_out_fraction=0.2, folder=folder)
    assert list(folder.iterdir()) == [], "it has no name, so a kill leaves none"
    path.unlink()
    texts = found.texts
    assert [texts[i] for i in range(50)] == list(texts) == texts[:] == rows
    assert sorted([*found.train, *found.held_out]) == sorted(rows)
    assert (texts[-1], texts[1:9:3]) == (list(texts)[-1], list(texts)[1:9:3])
    with pytest.raises(IndexError):
        texts[50]


@pytest.mark.parametrize("suffix", [".parquet", ".txt"])
def test_a_text_is_in_no_memory_whatever_its_size(tmp_path, suffix):
    words = " ".join(make_rows(100))
    rows = [f"{number} {words}" for number in range(2_000)]
    table = pa.table({"text": rows})
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":  # in one row group
        pages = dict(data_page_size=1 << 16, write_batch_size=16)
        pq.write_table(
            table, path, compression="none", use_dictionary=False, row_group_size=len(rows), **pages
        )
        assert pq.ParquetFile(path).num_row_groups == 1
    else:
        write(path, rows)
    size, pool, before = (
        path.stat().st_size,
        pa.proxy_memory_pool(pa.default_memory_pool()),
        pa.default_memory_pool(),
    )
    assert size > 10_000_000
    lengths = list(map(len, rows))
    del rows, table
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        found = load_corpus(str(path), folder=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert pool.max_memory() < size / 2
    assert len(found.texts) == len(lengths)


def test_the_limit_of_the_csv_module_is_given_back(tmp_path):
    before = csv.field_size_limit(1234)
    try:
        load_corpus(str(write(tmp_path / "rows.csv", ROWS)))
        assert csv.field_size_limit() == 1234
        (tmp_path / "bad.csv").write_text("text\none\ntwo, three\n")
        with pytest.raises(UserError, match="bad.csv"):
            load_corpus(str(tmp_path / "bad.csv"))
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


def test_the_share_of_held_out_rows_is_as_asked(tmp_path):
    path = str(write(tmp_path / "rows.txt", [f"row {i}" for i in range(4000)]))
    assert len(load_corpus(path, held_out_fraction=0.05).held_out) == pytest.approx(200, abs=45)
    assert len(load_corpus(path, held_out_fraction=0.9).held_out) == pytest.approx(3600, abs=65)


def test_neither_order_nor_duplicates_nor_other_rows_change_where_a_row_goes(tmp_path):
    rows = make_rows(300)
    shuffled = rows + rows[:50] + make_rows(100, seed=1)
    random.Random(0).shuffle(shuffled)
    first = load_corpus(str(write(tmp_path / "first.txt", rows)), held_out_fraction=0.2)
    second = load_corpus(str(write(tmp_path / "second.jsonl", shuffled)), held_out_fraction=0.2)
    assert list(first.train) == [row for row in rows if row in set(first.train)]
    assert set(first.held_out) == set(second.held_out) & set(rows)
    assert not set(second.held_out) & set(second.train)


def test_another_seed_holds_out_other_rows(text_file):
    first, again, other = (
        load_corpus(str(text_file), held_out_fraction=0.2, seed=seed) for seed in (0, 0, 1)
    )
    assert sides(first) == sides(again)
    assert set(first.held_out) != set(other.held_out)
    assert every(first) == every(other)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_side_gets_at_least_one_row(tmp_path, fraction):
    found = load_corpus(
        str(write(tmp_path / "rows.txt", ["one", "two"])), held_out_fraction=fraction
    )
    assert (len(found.train), len(found.held_out)) == (1, 1)


@pytest.mark.parametrize("suffix", SUFFIXES[:5])
def test_a_split_column_decides(tmp_path, suffix):
    path = write(
        tmp_path / f"rows{suffix}", ["one", "two", "three"], split=["held_out", "train", "held_out"]
    )
    found = load_corpus(str(path))
    assert sides(found) == (["two"], ["one", "three"])


def test_rows_without_a_split_are_drawn_and_a_twin_stays_on_the_first_side(tmp_path):
    rows = ["one", "two", "three", "one"]
    path = write(tmp_path / "rows.parquet", rows, split=["held_out", None, None, "train"])
    found = load_corpus(str(path), held_out_fraction=1e-9)
    assert sides(found) == (["two", "three"], ["one"])
    found = load_corpus(str(path), held_out_fraction=1 - 1e-9)
    assert len(found.train) == 1


LINES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.text(max_size=12).map(lambda text: text.encode("utf-8", "replace")),
    )
)
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["text", "split", "id"]),
        st.one_of(st.none(), st.integers(), st.text(max_size=9)),
    )
)


@examples(60)
@given(
    content=st.one_of(
        st.binary(max_size=80),
        LINES.map(b"\n".join),
        LINES.map(lambda lines: b"text\n" + b"\n".join(lines)),
        RECORDS.map(lambda records: "\n".join(map(json.dumps, records)).encode()),
    ),
    suffix=st.sampled_from(SUFFIXES),
)
def test_any_bytes_give_a_corpus_or_a_user_error(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            found = load_corpus(str(path))
        except UserError as error:
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
        else:
            assert found.train and found.held_out
            assert len(set(every(found))) == len(every(found))
            assert all(row.strip() for row in every(found))
        assert os.listdir(folder) == [path.name]
