"""YAML that could mislead or harm is refused in one line, wherever it is read."""

import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdnas.cli.main import main
from kdnas.commands import run as pipeline
from kdnas.system.errors import UserError
from kdnas.system.yaml import MOST_CHARACTERS, MOST_NODES, NO_VALUE, check_yaml, read_yaml
from tests import conftest
from tests.conftest import examples

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{below}'])}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = [
    ("name: a\nname: b\n", "the key 'name' is given twice, line 2"),
    ("data: {max_length: 3, max_length: 4}\n", "the key 'max_length' is given twice, line 1"),
    (
        "sampler: {class_path: x, init_args: &a {seed: 1}, more: {<<: *a, <<: *a}}\n",
        "the key '<<' is given twice",
    ),
    (BOMB, f"more than {MOST_NODES:,} values after its aliases are expanded, line 5"),
    ("sampler: &a {class_path: x, init_args: *a}\n", "a value contains itself, line 1"),
    ("sampler: " + 60 * "[" + 60 * "]", "nested too deeply: at most 50 levels are allowed, line 1"),
    ("sampler: " + 2_000 * "[" + 2_000 * "]", "nested too deeply: at most 50 levels are allowed"),
    ("#" * (MOST_CHARACTERS + 1), "the YAML has 262,145 characters, but at most 262,144"),
    (
        "name: !!python/object/apply:os.system ['touch CANARY']\n",
        "could not determine a constructor",
    ),
    ("name: [1", "while parsing a flow sequence"),
    ("name: \0", "unacceptable character"),
    (f"name: {'9' * 5000}\n", "Exceeds the limit"),
    ('name: !!int ""\n', "string index out of range"),
    ("name: !!bool maybe\n", "'maybe'"),
    ("name: !!timestamp x\n", "has no attribute"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_yaml_is_refused_with_its_place(text, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), BAD)
@pytest.mark.parametrize("command", ["search", "fit"])
def test_bad_config_is_refused_by_every_command_and_nothing_runs(
    command, text, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    assert main([command, "--config", "a.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_aliases_and_merged_mappings_within_reason_are_read(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"only text\n"])
def test_what_is_no_mapping_is_refused(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match="holds no mapping"):
        read_yaml(tmp_path / "a.yaml")


@pytest.fixture
def asked(monkeypatch):
    """What a search would have been asked for."""
    configs = []
    monkeypatch.setattr(pipeline, "search", lambda config, console: configs.append(config))
    return configs


def test_a_number_with_an_exponent_is_one(asked, tmp_path):
    numbers = "recipe: {learning_rate: 1e-3}\nsearch: {alpha: -6E-2}\n"
    (tmp_path / "a.yaml").write_text(f"teacher: quickstart\ntext: y\n{numbers}")
    assert main(["search", "--config", str(tmp_path / "a.yaml")]) == 0
    assert (asked[0].recipe.learning_rate, asked[0].search.alpha) == (1e-3, -0.06)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("seed: null", "seed"),
        ("data:", "data"),
        ("search: {budget: null}", "search.budget"),
        ("seed: ~", "seed"),
    ],
)
def test_null_is_refused_where_it_is_no_value(text, name, asked, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"teacher: quickstart\ntext: y\nstorage: null\n{text}\n")
    assert main(["search", "--config", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err == f"kdnas: {name} is null: give a value, or leave it out.\n"
    assert asked == []


def test_null_within_what_may_be_left_out_is_refused_too(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model: [x]\ntask: [rte]\ngrid:\n  held_out:\n")
    assert main(["glue", "--config", str(tmp_path / "a.yaml")]) == 2
    assert (
        capsys.readouterr().err == "kdnas: grid.held_out is null: give a value, or leave it out.\n"
    )


@pytest.mark.parametrize("value", ["[]", "1"])
def test_a_value_is_refused_where_keys_belong(value, asked, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"teacher: quickstart\ntext: y\ndata: {value}\n")
    assert main(["search", "--config", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err.startswith("kdnas: data is ") and asked == []


def test_a_value_with_a_nul_is_refused(asked, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text('teacher: x\ntext: y\ndata: "\\0"\n')
    assert main(["search", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "a value contains a NUL, line 3" in capsys.readouterr().err and asked == []


def test_a_config_that_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(bytes(range(256)))
    for command in ("search", "fit"):
        assert main([command, "--config", str(tmp_path / "a.yaml")]) == 2
        error = capsys.readouterr().err
        assert "a.yaml': 'utf-8' codec can't decode byte 0x80 in position 128" in error


KEYS = [
    *"teacher text name seed workers sampler data search recipe latency storage".split(),
    "data.seed",
    "1",
    "",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["x", "1e-3", "tpe"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from([*KEYS, "max_length", "class_path", "init_args"]), SCALARS),
            inner,
        ),
    ),
    max_leaves=6,
)


def test_a_random_case_that_hangs_fails_and_is_shown(monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS_A_CASE", 0.2)
    with pytest.raises(conftest.Hangs, match="after 0.2 s: {'number': 7}"):
        conftest.limited(lambda number: time.sleep(60))(number=7)
    conftest.limited(lambda number: None)(number=7)
    time.sleep(0.3)  # nothing comes later
    assert test_whatever_is_plain_passes.hypothesis.inner_test.__wrapped__, (
        "every test of random cases is limited"
    )


@examples(30)
@given(
    content=st.one_of(
        st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5).map(
            lambda values: yaml.safe_dump({"teacher": "quickstart", "text": "y"} | values).encode()
        ),
        st.lists(
            st.sampled_from(
                ["a: ", "&a ", "*a", "\n", "  ", "- ", "[", "}", "<<: ", "!!", "x", "1"]
            )
        ).map(lambda parts: "".join(parts).encode()),
        st.binary(max_size=40),
    )
)
def test_any_config_is_read_or_refused_in_one_line_that_names_what_is_wrong(content):
    with (
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
        redirect_stderr(io.StringIO()) as errors,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path("any.yaml").write_bytes(content)
        patch.setattr(pipeline, "search", lambda config, console: None)
        code, told = main(["search", "--config", "any.yaml"]), errors.getvalue()
        assert os.listdir() == ["any.yaml"]
    assert code in (0, 2)
    if code == 2:
        assert told.startswith("kdnas: ") and len(told.splitlines()) == 1
        try:
            keys = {
                str(key).rpartition(".")[2] or '""' for key in every_key(yaml.safe_load(content))
            }
        except (yaml.YAMLError, *NO_VALUE):
            keys = set()
        assert any(name in told for name in {"config", "any.yaml", "teacher", "text", *keys})


def every_key(value: Any) -> Iterator[Any]:
    """The keys of a mapping, and of all that is in it."""
    if isinstance(value, dict):
        yield from value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from every_key(inner)


@examples(200)
@given(VALUES.filter(lambda value: "\\u0000" not in json.dumps(value)))
def test_whatever_is_plain_passes(value):
    check_yaml(yaml.safe_dump(value))
    check_yaml(json.dumps(value))


@pytest.mark.parametrize(
    "content", ["! :", '"": 1', "data.: 1", ".data: 1", "data: {0e0: 1}", "$ ! :"]
)
def test_a_key_without_a_name_is_told(content, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(content)
    assert main(["search", "--config", str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "key" in error.lower()


@pytest.mark.parametrize("content", ["", "- 1", "text"])
def test_a_config_that_maps_nothing_is_told_what_it_must_be(content, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(content)
    assert main(["search", "--config", str(tmp_path / "config.yaml")]) == 2
    told = (
        f"{str(tmp_path / 'config.yaml')!r} holds no mapping: "
        "write names with values, such as 'seed: 1'."
    )
    assert capsys.readouterr().err == f"kdnas: {told}\n"
