"""Rows of a source: all, or some, and what tells sources apart."""

import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdnas.data import readers
from kdnas.data.readers import some_rows, text_sha256
from kdnas.system.errors import UserError

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
        text_sha256(str(path), "text")
        for path in (first, tmp_path / "some", shutil.copy(first, tmp_path / "b.csv"))
    ]
    assert sums[0] == sums[1], "a folder is what it holds"
    write(tmp_path / "some" / "b.txt", NUMBERS[:7])
    sums.append(text_sha256(str(tmp_path / "some"), "text"))
    (tmp_path / "some" / "b.txt").rename(tmp_path / "some" / "0.txt")
    sums.append(text_sha256(str(tmp_path / "some"), "text"))
    first.write_text(first.read_text()[::-1])
    sums.append(text_sha256(str(first), "text"))
    assert len(set(sums)) == 5
    with pytest.raises(UserError, match="missing.txt' does not exist"):
        text_sha256(str(tmp_path / "missing.txt"), "text")


def test_a_hub_source_s_hash_is_its_fingerprint_s(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for rows in (["one", "two"], ["one", "two"], ["one", "three"]):
        held = datasets.Dataset.from_dict({"text": rows})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, held=held, **options: held)
        sums.append(text_sha256("some-one/some.data", "text"))
    assert sums[0] == sums[1] != sums[2]


def test_a_file_that_cannot_be_read_has_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "file_sha256", refuse)
    with pytest.raises(UserError, match=r"rows.txt' cannot be read \(.*Permission denied"):
        text_sha256(str(write(tmp_path / "rows.txt")), "text")
