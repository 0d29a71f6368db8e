"""Bad input: teachers, names, YAML, texts, other settings. One line, and nothing half made."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load, save

from tests.faults.harness import Bench, Row, fault
from tests.faults.hostile import spoilt_teacher


@fault("F15", "a teacher that is missing, empty, cut, of another kind, or has no tokenizer")
def bad_teachers(bench: Bench, row: Row) -> None:
    def edit(folder: Path, **values: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def remove(folder: Path, pattern: str = "*") -> None:
        for path in folder.glob(pattern):
            path.unlink()

    def cut(folder: Path, size: int | None) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])

    bad_config, is_cut = "'{}' has a bad config.json", "'{}/model.safetensors' is truncated"
    spoil: dict[str, tuple[Callable[[Path], Any], str]] = {
        "no folder": (shutil.rmtree, "There is no folder '{}'"),
        "empty folder": (remove, "'{}' has no config.json"),
        "no tokenizer": (partial(remove, pattern="tokenizer*"), "'{}' has no tokenizer"),
        "no JSON": (lambda folder: (folder / "config.json").write_text("{no"), bad_config),
        "weights cut": (partial(cut, size=-99), is_cut),
        "weights empty": (partial(cut, size=0), is_cut),
        "a decoder": (partial(edit, is_decoder=True), "'{}' is a decoder"),
        "another family": (partial(edit, model_type="gpt2"), "'gpt2' is not supported"),
    }
    for what, (damage, words) in spoil.items():
        with spoilt_teacher(bench) as folder:
            damage(folder)
            args = bench.search(bench.new_name(), f"--teacher={folder}")
            bench.refuse(row, what, args, words.format(folder), bench.call_alone)
    with spoilt_teacher(bench) as folder:
        args = bench.search(bench.new_name(), f"--teacher={folder}", "--search.n_trials=1")
        bench.succeed(row, "nothing spoilt", args)
    away = partial(bench.call_alone, environment={"HF_HUB_OFFLINE": "1"})
    args = bench.search(bench.new_name(), "--teacher=nobody/nothing")
    bench.refuse(row, "a hub's name", args, "There is no folder 'nobody/nothing' here", away)
    row.fault("undetected", f"one took {row.worst_wait_s:.1f} s", row.worst_wait_s > 5)


NAMES = ("../x", "/etc/x", "a/../../x", "..", ".", "", "a\0b", "a\nb", "x" * 300, "-rf", "%2e%2e/")


@fault("F18", "names of runs that lead elsewhere, and a run that is a link")
def names(bench: Bench, row: Row) -> None:
    for name in (*NAMES, "a b"):
        bench.refuse(row, repr(name), bench.search(name), f"The run name {name!r} is not valid")
    bench.succeed(row, "a plain name", bench.search("a-b_1..c", "--search.n_trials=1"))
    (bench.logs / "link").symlink_to(bench.teacher)
    bench.refuse(row, "a link", bench.search("link"), f"{bench.logs / 'link'}' is a link to")
    (bench.logs / "link").unlink()


@fault("F19", "YAML: tags, keys twice or unknown, bombs, 50 MB, no mapping, NaN, too large, 1e-3")
def yaml(bench: Bench, row: Row) -> None:
    path = bench.folder / "a.yaml"
    bomb = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for below, name in zip("abcdefg", "bcdefgh", strict=True):
        bomb.append(f"{name}: &{name} [{','.join(9 * ['*' + below])}]")
    texts = {
        "tag": ("name: !!python/object/apply:os.getcwd []", "constructor"),
        "twice": ("name: a\nname: b", "given twice"),
        "unknown": ("teachr: x", "Did you mean 'teacher'?"),
        "bomb": ("\n".join(bomb), "aliases"),
        "50 MB": ("#" * 50_000_000, "characters"),
        "no mapping": ("- 1\n- 2", "holds no mapping"),
        "NaN": ("search: {alpha: .nan}", "alpha"),
        "NaN in a range": ("space: {hidden_size: [16, .nan]}", "hidden_size"),
        "beyond the teacher": ("space: {num_hidden_layers: [3]}", "num_hidden_layers"),
        "nothing": ("seed: null", "seed is null"),
        "itself": ("sampler: &a {class_path: x, init_args: *a}", "contains itself"),
        "exponent": ("recipe: {learning_rate: -1e-3}", "learning_rate is -0.001"),
    }
    path.touch()
    for what, (text, words) in texts.items():
        path.write_text(text)
        args = ["search", f"--config={path}", f"--teacher={bench.teacher}", f"--text={bench.text}"]
        bench.refuse(row, what, args, words)


def write_text(path: Path, values: Sequence[Any], column: str = "text") -> None:
    """Rows in the format that the suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: values}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    elif path.suffix == ".csv":
        path.write_text(f"{column},other\n" + "".join(f"{value or ''},\n" for value in values))
    else:
        path.write_text("".join(f"{value or ''}\n" for value in values))


def cut_file(suffix: str, size: int) -> bytes:
    """A file of 200 rows without its last bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_text(path := Path(folder) / f"a{suffix}", [f"row {i}" for i in range(200)])
        return path.read_bytes()[:-size]


Content = bytes | Sequence[Any]
HARDLY = ["one", "two"] + 9_998 * [None]
FORMATS = ("txt", "jsonl", "csv", "parquet")
# What a text is, the words of its refusal, and its files.
TEXTS: dict[str, tuple[str, str, dict[str, Content]]] = {
    "F20": ("a text that is empty", "no usable rows", {"a.txt": b"", "a.jsonl": b""}),
    "F21": (
        "empty and blank rows only",
        "no usable rows",
        {"a.txt": b" \n\t\n\n" * 99, "a.jsonl": b'{"text": " "}\n' * 99},
    ),
    "F22": (
        "NUL bytes",
        "in row 2",
        {"a.txt": b"one\nt\0wo\n", "a.jsonl": b'{"text": "a"}\n{"text": "t\\u0000o"}\n'},
    ),
    "F24": (
        "no UTF-8",
        "in row 2",
        {"a.txt": b"one\ncaf\xe9\n", "a.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n'},
    ),
    "F25": (
        "a column of another name",
        "choose from its columns, 'body'",
        {f"body.{suffix}": ["one", "two", "three"] for suffix in FORMATS[1:]},
    ),
    "F27": (
        "rows that are no text",
        "in column 'text', row ",
        {
            **{f"{i}.jsonl": ["one", v] for i, v in enumerate((7, ["two"], {"two": 2}, True))},
            "a.parquet": [7, 8],
            "b.parquet": [["one"], ["two"]],
            "c.parquet": [b"one", b"two"],
        },
    ),
    "F28": (
        "files that are cut, or no parquet",
        "cannot be read",
        {
            "a.jsonl": cut_file(".jsonl", 5),
            "a.parquet": cut_file(".parquet", 100),
            "b.parquet": b"PAR1 and no more",
        },
    ),
    "F29": (
        "one good row among 9,999 bad ones, and two among 9,998",
        "usable",
        {f"{n}.{suffix}": [*HARDLY[:n], *9_999 * [None]] for n in (1, 2) for suffix in FORMATS},
    ),
}


def refuse_texts(name: str, bench: Bench, row: Row) -> None:
    _, words, files = TEXTS[name]
    for file, content in files.items():
        path = bench.folder / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_text(path, content, "body" if path.stem == "body" else "text")
        bench.refuse(row, file, bench.search(bench.new_name(), f"--text={path}"), words)
        path.unlink()


for name, (what, _, _) in TEXTS.items():
    fault(name, what)(partial(refuse_texts, name))


@fault("F26", "duplicate and empty rows, in each format: counted, told, and without effect")
def left_out(bench: Bench, row: Row) -> None:
    rows = bench.text.read_text().splitlines()
    for suffix in ("jsonl",) if bench.quick else FORMATS:
        write_text(path := bench.folder / f"a.{suffix}", [*rows, *rows, None])
        name = bench.new_name()
        error = bench.succeed(row, path.name, bench.search(name, f"--text={path}"))
        path.unlink()
        row.tried += 1
        for words in ("200 duplicate rows are left out", "1 empty"):
            row.fault("undetected", f"{path.name}: {error}", words not in error)
        row.fault("unequal", path.name, bench.story(name) != bench.story(bench.reference))


@fault("F23", "a row of 1 MB: cut to the longest that there is, in no more memory")
def huge_row(bench: Bench, row: Row) -> None:
    def peak(path: Path) -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        bench.succeed(row, path.name, bench.search(bench.new_name(), f"--text={path}"))
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if "VmHWM" in line)

    rows = bench.text.read_text().splitlines()
    for suffix in ("txt",) if bench.quick else ("txt", "jsonl"):
        usual = peak(bench.text)
        write_text(path := bench.folder / f"long.{suffix}", [*rows, "long " * 200_000])
        row.tried += 1
        more = peak(path) - usual
        row.notes.append(f"{suffix}: {more:.0f} MB more at the peak")
        row.fault("undetected", f"{suffix}: {more:.0f} MB more at the peak", more > 128)


@fault("F30", "several devices, DDP, or torchrun, asked of a search")
def ddp(bench: Bench, row: Row) -> None:
    for option, told in (
        ("--trainer.devices=2", "trainer.devices is 2, but only full KD"),
        ("--trainer.strategy=ddp", "--trainer.strategy=ddp"),
    ):
        bench.refuse(row, option, bench.search(bench.new_name(), option), told)
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "1"}):
        bench.refuse(row, "torchrun", bench.search(bench.new_name()), "WORLD_SIZE is 2")


@fault("F33", "the same name with another teacher, space, seed, reward or length")
def other_config(bench: Bench, row: Row) -> None:
    name, before = bench.reference, bench.story(bench.reference)
    options = ("seed=1", "space.num_hidden_layers=[1]", "search.alpha=-0.1", "data.max_length=16")
    for option in options:
        bench.refuse(row, option, bench.search(name, f"--{option}"), " there, ")
    weights = bench.teacher / "model.safetensors"
    known, stat = weights.read_bytes(), weights.stat()
    tensors = load(known)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1
    weights.write_bytes(save(tensors, {"format": "pt"}))  # another teacher at the same path
    bench.refuse(row, "a weight", bench.search(name), "(teacher: ")
    weights.write_bytes(known)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if not bench.quick:
        bench.succeed(row, "--force-new", bench.search(name, "--seed=1", "--force-new"))
        row.fault("undetected", "--force-new made nothing", not bench.story(f"{name}-2"))
    row.fault("lost", "the search", bench.story(name) != before)
