"""StudentArch: what it refuses, and that nothing is lost on the way to YAML and back."""

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kdnas.models.arch import StudentArch
from kdnas.system.errors import UserError
from tests.conftest import examples

VALUES = {
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "hidden_size": 192,
    "intermediate_size": 768,
    "hidden_act": "relu",
}
sizes = st.integers(1, 64)
archs = st.builds(
    lambda layers, heads, per_head, inner, act: StudentArch(
        layers, heads, heads * per_head, inner, act
    ),
    sizes,
    sizes,
    sizes,
    sizes,
    st.sampled_from(["gelu", "relu", "silu"]),
)


def test_it_has_hugging_faces_five_names_and_gelu_is_the_default():
    assert [field.name for field in dataclasses.fields(StudentArch)] == list(VALUES)
    assert StudentArch(1, 1, 16, 32).hidden_act == "gelu"


def test_it_is_frozen_and_can_be_a_key():
    arch = StudentArch(**VALUES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.hidden_size = 1
    assert {arch: 1}[StudentArch(**VALUES)] == 1


def test_it_reads_as_one_line():
    assert str(StudentArch(**VALUES)) == "4 layers x 192 wide, 6 heads, 768 intermediate, relu"


@pytest.mark.parametrize("name", list(VALUES)[:4])
@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "4", True, None])
def test_a_size_that_is_no_whole_number_of_at_least_one_is_refused(name, value):
    with pytest.raises(UserError) as caught:
        StudentArch(**{**VALUES, name: value})
    assert f"{name} is {value!r}:" in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, ["gelu"], False])
def test_an_activation_that_is_no_name_is_refused(value):
    with pytest.raises(UserError) as caught:
        StudentArch(**{**VALUES, "hidden_act": value})
    assert f"hidden_act is {value!r}:" in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="hidden_size 192 cannot be split into 5 heads"):
        StudentArch(**{**VALUES, "num_attention_heads": 5})


@given(archs)
def test_it_comes_back_from_a_dict_of_plain_values(arch):
    values = arch.to_dict()
    assert {type(value) for value in values.values()} == {int, str}
    assert StudentArch.from_dict(values) == arch


@given(archs)
def test_it_comes_back_from_yaml(tmp_path_factory, arch):
    path = tmp_path_factory.getbasetemp() / "arch.yaml"
    arch.to_yaml(path)
    assert StudentArch.from_yaml(path) == arch
    assert list(yaml.safe_load(path.read_text())) == list(VALUES)


def test_a_dict_may_leave_out_the_activation_only():
    values = {name: value for name, value in VALUES.items() if name != "hidden_act"}
    assert StudentArch.from_dict(values).hidden_act == "gelu"
    del values["hidden_size"], values["intermediate_size"]
    with pytest.raises(UserError, match="lacks hidden_size, intermediate_size"):
        StudentArch.from_dict(values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "num_layers",
            "'num_layers' is not a field of a student architecture. Did you mean 'num_hidden_layers'?",
        ),
        ("hidden_sise", "'hidden_sise' is not a field .* Did you mean 'hidden_size'"),
        ("zzz", "'zzz' is not a field .* Choose from: hidden_act, hidden_size"),
        (1, "1 is not a field .* Choose from: hidden_act"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        StudentArch.from_dict({**VALUES, name: 4})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "codec can't decode"),
        (b"a: [1, 2", "while parsing a flow sequence"),
        (b"", "holds no mapping"),
        (b"- 1\n- 2\n", "holds no mapping"),
        (b"hidden_size: 192\n", "lacks num_hidden_layers, num_attention_heads, intermediate_size"),
        (b"!!python/object/apply:os.system ['exit 1']", "could not determine a constructor"),
    ],
)
def test_a_file_that_holds_no_architecture_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "best_student.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        StudentArch.from_yaml(path)
    assert "\n" not in str(caught.value)
    assert "lacks" in message or str(path) in str(caught.value)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.text(max_size=5), st.just([1])
)


@examples(60)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.dictionaries(st.sampled_from([*VALUES, "hidden_sise", 1, None]), ODD).map(
            lambda odd: yaml.safe_dump(VALUES | odd).encode()
        ),
    )
)
def test_any_file_gives_an_architecture_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(content)
        try:
            arch = StudentArch.from_yaml(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert arch.hidden_size % arch.num_attention_heads == 0
            arch.to_yaml(path)
        assert os.listdir(folder) == [path.name]
