"""Random configs, indexes of shards, headers and rows: one line or a whole answer, nothing else.

``KDNAS_EXAMPLES=10000 pytest -m slow tests/faults/test_fuzz.py`` tries ten thousand of each kind.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kdnas.data.corpus import load_corpus
from kdnas.models.checkpoint_files import check_files, check_sizes, read_config
from kdnas.models.encoders import Teacher, find_teacher
from kdnas.system.errors import UserError
from kdnas.tasks.rows import read_table
from tests.conftest import MORE_CONFIGS, examples, limited, note_opened, save_teacher

FEW, MANY = examples(60), settings(examples(10_000), suppress_health_check=[HealthCheck.too_slow])

texts = st.text(max_size=20)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**6, 10**100])
plain = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=6
)
names = st.sampled_from(
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "a\0b",
        "model.safetensors",
        "x" * 300,
    ]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, in a folder of its own with things around it that nobody may open."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_teacher(folder / "teacher")
    shutil.copytree(folder / "teacher", folder / "whole")
    shutil.copyfile(folder / "teacher" / "model.safetensors", folder / "x.safetensors")
    return folder


@contextmanager
def told(place: Path, within: Path) -> Iterator[None]:
    """One line is all that may be raised, and no file of the outside may be opened."""
    with note_opened() as opened:
        try:
            yield
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3_000
    outside = [
        path
        for path in opened
        if path.startswith(str(place)) and not Path(path).is_relative_to(within)
    ]
    assert not outside and "/etc/passwd" not in opened


@st.composite
def configs(draw: st.DrawFn) -> str:
    """The JSON of a config: a teacher's with some values changed, or anything."""
    if draw(st.integers(0, 9)) == 0:
        return json.dumps(draw(values))
    known = json.loads(draw(st.sampled_from(CONFIGS)))
    keys = st.sampled_from(sorted(known)) | st.sampled_from(MORE_KEYS) | texts
    return json.dumps(known | draw(st.dictionaries(keys, values | names, min_size=1, max_size=3)))


MORE_KEYS = """transformers_weights quantization_config configuration_files attn_implementation
_attn_implementation auto_map num_labels id2label label2id problem_type is_decoder torch_dtype dtype
output_attentions output_hidden_states return_dict position_embedding_type use_cache tie_word_embeddings
chunk_size_feed_forward pruned_heads architectures embedding_size sub_configs fusion_config""".split()
CONFIGS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def known_configs(place: Path) -> None:
    from tests.conftest import CONFIGS as SOME
    from tests.conftest import make_config

    CONFIGS[:] = [
        make_config(family).to_json_string(use_diff=False) for family in SOME | MORE_CONFIGS
    ]
    CONFIGS.append((place / "whole" / "config.json").read_text())


def any_config(place: Path, content: str) -> None:
    folder = place / "teacher"
    (folder / "config.json").write_text(content)
    with told(place, folder):
        teacher = find_teacher(str(folder))
        assert isinstance(teacher, Teacher)
        teacher.load()


indexes = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.just({}) | values,
        "weight_map": st.dictionaries(texts, names | values) | values,
    },
)


def any_index(place: Path, index: Any) -> None:
    folder = place / "sharded"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "whole", folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with told(place, folder):
        shapes = check_files("sharded", folder)
        config = read_config(folder / "config.json")
        check_sizes("sharded", config, shapes)
        find_teacher(str(folder)).load()


headers = st.lists(st.sampled_from(["text", "split", ""]) | texts, max_size=5)
cells = st.lists(st.lists(texts, max_size=5), max_size=4)


def any_csv(place: Path, header: list[str], rows: list[list[str]], junk: bytes) -> None:
    folder = place / "tables"
    folder.mkdir(exist_ok=True)
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
        path = folder / f"rows{suffix}"
        path.write_bytes(file.getvalue().encode("utf-8", "surrogatepass") + junk)
        with told(place, folder):
            load_corpus(str(path))
        with told(place, folder):
            read_table(path, ["text"])


def lines(value: Any) -> str:
    return json.dumps(value)


rows = st.lists(
    (st.dictionaries(st.sampled_from(["text", "split"]) | texts, values) | values).map(lines)
    | texts
    | st.sampled_from(
        ['{"text": "a", "text": "b"}', '{"text": "\\ud800"}', "[" * 3000, '{"text": NaN}']
    ),
    max_size=6,
)


def any_jsonl(place: Path, rows: list[str], junk: bytes) -> None:
    folder = place / "rows"
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass") + junk)
    with told(place, folder):
        load_corpus(str(path))


junk = st.just(b"") | st.binary(max_size=8)
KINDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "config": (any_config, {"content": configs()}),
    "index": (any_index, {"index": indexes | values}),
    "csv": (any_csv, {"header": headers, "rows": cells, "junk": junk}),
    "jsonl": (any_jsonl, {"rows": rows, "junk": junk}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_given_is_read_or_refused_in_a_line(kind, place):
    check, cases = KINDS[kind]
    FEW(given(**cases)(limited(partial(check, place))))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_of_each_kind_are_read_or_refused_in_a_line(kind, place):
    check, cases = KINDS[kind]
    MANY(given(**cases)(limited(partial(check, place))))()


def test_the_teacher_that_is_changed_is_one(place):
    find_teacher(str(place / "whole")).load()
    assert len(load_file(place / "x.safetensors")) > 20
