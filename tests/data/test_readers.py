"""Rows of a source: all, or some, and what tells sources apart."""

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdnas.data import readers
from kdnas.data.corpus import load_corpus
from kdnas.data.readers import some_rows, text_sha256
from kdnas.system.errors import UserError
from kdnas.tasks.rows import read_table
from kdnas.tasks.tasks import load_task

NUMBERS = list(range(400))


def write(path: Path, numbers: list[int] = NUMBERS) -> Path:
    texts = [f"row {number}" for number in numbers]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("text\n" * (path.suffix == ".csv") + "\n".join(texts) + "\n")
    return path


def numbers_of(rows: list[tuple[str | None, str | None]]) -> list[int]:
    return [int(text.split()[1]) for text, _ in rows]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt", ".csv"])
def test_some_rows_are_the_first_of_a_shuffle(suffix: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / f"rows{suffix}"))
    shuffled, _ = some_rows(path, "text", 1_000)
    assert sorted(numbers_of(shuffled)) == NUMBERS != numbers_of(shuffled)
    few, num_rows = some_rows(path, "text", 40)
    assert len(set(few)) == 40 and num_rows == 400
    assert {number // 100 for number in numbers_of(few)} == {0, 1, 2, 3}
    assert few == some_rows(path, "text", 40)[0]


def test_rows_of_a_folder_are_shuffled_together(tmp_path: Path) -> None:
    for number in range(9):
        write(tmp_path / f"{number}.txt", [1000 * number + row for row in range(100)])
    rows, num_rows = some_rows(str(tmp_path), "text", 100)
    assert {number // 1000 for number in numbers_of(rows)} == set(range(9))
    assert num_rows == 900


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_rows_of_several_lines_are_counted_once(suffix: str, tmp_path: Path) -> None:
    rows = "".join(f'"row {number}{chr(10) * (suffix == ".csv") * 9}"\n' for number in NUMBERS)
    path = tmp_path / f"rows{suffix}"
    path.write_text("text\n" + rows)
    assert some_rows(str(path), "text", 40)[1] == 400


def test_a_source_may_have_fewer_rows_than_are_asked_for(tmp_path: Path) -> None:
    assert some_rows(str(write(tmp_path / "none.txt", [])), "text", 40)[1] <= 1
    rows, num_rows = some_rows(str(write(tmp_path / "few.jsonl", [1, 2, 3])), "text", 40)
    assert sorted(numbers_of(rows)) == [1, 2, 3] and num_rows == 3


def test_a_hub_data_set_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datasets.Dataset.from_dict({"text": [f"row {number}" for number in NUMBERS]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: whole)
    rows, num_rows = some_rows("some-one/some.data", "text", 40)
    assert num_rows == 400 and {number // 100 for number in numbers_of(rows)} == {0, 1, 2, 3}


def test_a_wrong_row_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"fine\n" * 240 + b"bad \xff\n" * 100 + b"fine\n" * 60)
    with pytest.raises(UserError, match=r"rows.txt' is not UTF-8 in row 241"):
        some_rows(str(path), "text", 40)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="cut.parquet' cannot be read at row 1"):
        some_rows(str(tmp_path / "cut.parquet"), "text", 40)


def test_a_source_s_hash_is_that_of_its_files_and_formats(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    first = write(tmp_path / "some" / "a.txt")
    sums = [
        text_sha256(str(path), "text", tmp_path / "known.json")
        for path in (first, tmp_path / "some", shutil.copy(first, tmp_path / "b.csv"))
    ]
    assert sums[0] == sums[1], "a folder is what it holds"
    write(tmp_path / "some" / "b.txt", NUMBERS[:7])
    sums.append(text_sha256(str(tmp_path / "some"), "text", tmp_path / "known.json"))
    (tmp_path / "some" / "b.txt").rename(tmp_path / "some" / "0.txt")
    sums.append(text_sha256(str(tmp_path / "some"), "text", tmp_path / "known.json"))
    first.write_text(first.read_text()[::-1])
    sums.append(text_sha256(str(first), "text", tmp_path / "known.json"))
    assert len(set(sums)) == 5
    with pytest.raises(UserError, match="missing.txt' does not exist"):
        text_sha256(str(tmp_path / "missing.txt"), "text", tmp_path / "known.json")


def test_a_hub_source_s_hash_is_its_fingerprint_s(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for rows in (["one", "two"], ["one", "two"], ["one", "three"]):
        held = datasets.Dataset.from_dict({"text": rows})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, held=held, **options: held)
        sums.append(text_sha256("some-one/some.data", "text", Path("unused")))
    assert sums[0] == sums[1] != sums[2]


def test_a_file_that_cannot_be_read_has_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "file_sha256", refuse)
    with pytest.raises(UserError, match=r"rows.txt' cannot be read \(.*Permission denied"):
        text_sha256(str(write(tmp_path / "rows.txt")), "text", tmp_path / "known.json")


# Tables that are not what they seem: one line, in seconds, within bounded memory


def told(path: Path, reads_table: bool = False) -> str:
    """The one line with which a source is refused, in seconds, with little more memory."""
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        load_corpus(str(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if reads_table:
        with pytest.raises(UserError, match=path.name):
            read_table(path, ["text"])
    assert time.monotonic() - started < 20 and most < 1 << 29
    message = str(caught.value)
    assert len(message) < 1_000 and "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_two_columns_of_one_name_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_arrays([pa.array(["a", "b"])] * 2, ["text", "text"]), path)
    else:
        path.write_text("text,text\na,b\nc,d\n".replace(",", "," if suffix == ".csv" else "\t"))
    assert "two columns are called 'text'" in told(path, reads_table=True)


@pytest.mark.parametrize(
    "row", ['{"text": "a", "text": "b"}', '{"text": "a", "x": {"y": 1, "y": 2}}']
)
def test_a_row_with_a_key_twice_is_told_with_its_number(row: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n' + row)
    assert "at row 3 (the key" in told(path) and "is given twice" in told(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_million_columns_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    names = ["text", *(f"c{number}" for number in range(10**6 if suffix != ".parquet" else 10_000))]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * len(names), names), path)
    else:
        path.write_text(("," if suffix == ".csv" else "\t").join(names) + "\n")
    assert f"the table has {len(names):,} columns, but at most" in told(path, reads_table=True)


def test_a_row_of_many_keys_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict.fromkeys(map(str, range(10**5)), 1)))
    assert "has no column 'text' (row 1): choose from its columns, '0', '1', " in told(path)


@pytest.mark.parametrize("bomb", ["one long value", "one value for every row", "rows of nothing"])
def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    if bomb == "one long value":
        texts = pa.array(["a" * 3 * 10**8, "b"], pa.large_string())
    elif bomb == "one value for every row":
        values = pa.array([letter * 30_000 for letter in "abc"])
        index = pa.array([number % 3 for number in range(400_000)], pa.int32())
        texts = pa.DictionaryArray.from_arrays(index, values)
    else:
        texts = pa.nulls(20_000_000, pa.string())
    table = pa.table({"text": texts}).replace_schema_metadata(None)
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 22
    assert "cannot be read at row" in told(path, reads_table=True)


def test_many_copies_of_a_row_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["one", "two"] * 150_000}), path)
    assert some_rows(str(path), "text", 1)[1] == 300_000


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_a_line_without_an_end_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    with path.open("wb") as file:
        file.write(b'text\n"' if suffix == ".csv" else b"")
        for _ in range(9):
            file.write(b"x" * (8 << 20))
    assert "a line of more than 67,108,864 bytes" in told(path)


def test_a_quote_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\n"' + ("x" * 999 + "\n") * 70_000)
    assert "field larger than field limit" in told(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_a_pipe_or_a_device_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert "is a pipe or a device" in told(path)
    (tmp_path / "task").mkdir()
    path.rename(tmp_path / "task" / f"train{suffix}")
    with pytest.raises(UserError):
        load_task(str(tmp_path / "task"))


def test_halves_of_surrogates_are_told_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two \\ud800"}\n')
    assert r"has the character '\ud800' in row 2" in told(path)
    for name in ("rows.txt", "rows.csv"):
        (tmp_path / name).write_bytes(b"text\none\ntwo \xed\xa0\x80\n")
        assert "is not UTF-8 in row" in told(tmp_path / name)
    column = pa.array([b"one", b"two \xed\xa0\x80"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    assert "is not UTF-8 in row" in told(tmp_path / "rows.parquet")
