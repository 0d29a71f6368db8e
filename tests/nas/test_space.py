"""The search space of real and tiny teachers: every point is a student that can be built."""

import copy
import itertools
import math
from pathlib import Path

import optuna
import pytest
import torch
from transformers import AlbertConfig, AutoConfig, BertConfig, PreTrainedConfig, RobertaConfig

from kdnas.models.arch import StudentArch
from kdnas.models.encoders import FAMILIES, build_student
from kdnas.nas.space import SearchSpace
from kdnas.system.errors import UserError


def bert(layers: int, width: int, heads: int, **others: object) -> PreTrainedConfig:
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        **others,
    )


TEACHERS: dict[str, PreTrainedConfig] = {
    "bert-base": bert(12, 768, 12),
    "minilm-l6": bert(6, 384, 12),
    "bert-large": bert(24, 1024, 16),
    "roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514),
    "albert-base": AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "albert-xxlarge": AlbertConfig(
        hidden_size=4096, num_attention_heads=64, intermediate_size=16384
    ),
    "tinybert": bert(4, 312, 12, hidden_act="relu"),
    "one layer, one head": bert(1, 16, 1),
}
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")


@pytest.fixture(params=list(TEACHERS))
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    """The config of a real teacher, and of the smallest that can be one."""
    return TEACHERS[request.param]


def test_by_rule_students_of_a_deep_teacher_are_as_wide_and_others_half_the_deepest_first():
    def shapes(config: PreTrainedConfig) -> list[tuple[int, ...]]:
        rule = list(SearchSpace.from_teacher(config).by_rule())
        assert {arch.hidden_act for arch in rule} == {config.hidden_act}
        return [tuple(getattr(arch, size) for size in SIZES) for arch in rule]

    assert shapes(TEACHERS["bert-base"]) == [
        (depth, 12, 768, 1536) for depth in (12, 10, 8, 6, 5, 4, 3, 2, 1)
    ]
    assert shapes(TEACHERS["minilm-l6"])[0] == (6, 6, 192, 384)
    assert shapes(TEACHERS["one layer, one head"]) == [(1, 1, 16, 16)]


def test_every_point_is_a_student_with_whole_heads_and_no_larger_than_the_teacher(config):
    space = SearchSpace.from_teacher(config)
    points = list(space)
    assert (
        len(points)
        == len(set(points))
        == len(space)
        == math.prod(map(len, space.choices.values()))
        > 0
    )
    for arch in points:
        assert isinstance(arch, StudentArch)  # which refuses heads that do not divide the width
        assert arch.hidden_size // arch.num_attention_heads >= 16
        assert all(getattr(arch, name) <= getattr(config, name) for name in SIZES)
        assert arch.hidden_act in (config.hidden_act, "relu")


def test_every_head_count_goes_with_every_width(config):
    choices = SearchSpace.from_teacher(config).choices
    for heads, width in itertools.product(choices["num_attention_heads"], choices["hidden_size"]):
        assert width % heads == 0


def test_the_choices_are_distinct_and_ascending_plain_values(config):
    for name, values in SearchSpace.from_teacher(config).choices.items():
        assert len(set(values)) == len(values)
        assert name == "hidden_act" or values == sorted(values)
        assert {type(value) for value in values} == {str if name == "hidden_act" else int}


def test_the_smallest_is_the_least_of_every_size(config):
    space = SearchSpace.from_teacher(config)
    smallest = space.smallest()
    assert smallest in list(space)
    for name in SIZES:
        assert getattr(smallest, name) == min(getattr(arch, name) for arch in space)


@pytest.mark.parametrize("name", list(TEACHERS))
def test_the_teachers_own_width_heads_and_activation_are_in_it(name):
    config, choices = TEACHERS[name], SearchSpace.from_teacher(TEACHERS[name]).choices
    for field in ("num_attention_heads", "hidden_size", "intermediate_size", "hidden_act"):
        assert getattr(config, field) in choices[field]


@pytest.mark.parametrize(
    ("layers", "depths"),
    [
        (1, [1]),
        (4, [1, 2, 3, 4]),
        (6, [1, 2, 3, 4, 5, 6]),
        (7, [1, 2, 3, 4, 5, 6]),
        (12, [1, 2, 3, 4, 5, 6, 8, 10, 12]),
        (24, [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24]),
    ],
)
def test_depths_are_dense_where_students_are_small(layers, depths):
    assert SearchSpace.from_teacher(bert(layers, 64, 2)).choices["num_hidden_layers"] == depths


def test_the_space_of_a_base_teacher_is_this_one():
    space = SearchSpace.from_teacher(TEACHERS["bert-base"])
    assert space.choices == {
        "num_hidden_layers": [1, 2, 3, 4, 5, 6, 8, 10, 12],
        "num_attention_heads": [3, 4, 6, 12],
        "hidden_size": [192, 288, 384, 576, 768],
        "intermediate_size": [768, 1536, 3072],
        "hidden_act": ["gelu", "relu"],
    }
    points = set(space)
    assert StudentArch(4, 12, 576, 3072) in points
    assert StudentArch(6, 12, 768, 3072) in points


def test_a_teacher_with_small_heads_gives_students_with_fewer():
    choices = SearchSpace.from_teacher(bert(2, 64, 8)).choices  # 8 a head
    assert choices["num_attention_heads"] == [1, 2, 4]
    assert choices["hidden_size"] == [64]


@pytest.mark.parametrize(
    ("act", "choices"), [("gelu", ["gelu", "relu"]), ("relu", ["relu"]), ("silu", ["silu", "relu"])]
)
def test_activations_are_the_teachers_and_relu(act, choices):
    assert SearchSpace.from_teacher(bert(2, 64, 2, hidden_act=act)).choices["hidden_act"] == choices


@pytest.mark.parametrize("width", [8, 15])
def test_a_teacher_too_narrow_for_a_head_is_refused_with_its_width(width):
    with pytest.raises(
        UserError, match=f"The teacher's hidden_size is {width}: .* needs at least 16"
    ):
        SearchSpace.from_teacher(bert(2, width, 1))


def test_it_comes_from_the_config_alone_and_leaves_it_as_it_was(config):
    before = copy.deepcopy(config.to_dict())
    torch.manual_seed(1)
    first = SearchSpace.from_teacher(config)
    torch.manual_seed(2)
    assert SearchSpace.from_teacher(copy.deepcopy(config)) == first
    assert config.to_dict() == before
    assert list(first) == list(first)


def test_a_trial_gets_the_point_and_each_name_is_suggested_once(config):
    class Counting(optuna.trial.FixedTrial):
        def suggest_categorical(self, name, choices):
            asked.append(name)
            return super().suggest_categorical(name, choices)

    space = SearchSpace.from_teacher(config)
    points = list(space)
    for arch in (points[0], points[len(points) // 2], points[-1]):
        asked: list[str] = []
        assert space.suggest(Counting(arch.to_dict())) == arch
        assert asked == list(arch.to_dict())


def test_what_a_sampler_draws_is_in_the_space():
    space = SearchSpace.from_teacher(TEACHERS["minilm-l6"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert set(drawn) <= set(space)
    assert len(set(drawn)) > 10


def test_every_point_of_a_tiny_teachers_space_is_built_in_the_shape_that_was_asked_for(
    any_teacher: Path,
):
    config = AutoConfig.from_pretrained(any_teacher)
    space = SearchSpace.from_teacher(config)
    assert len(space) >= 32
    for arch in space:
        student = build_student(config, arch)
        layers = FAMILIES[config.model_type].layers(student)
        assert len(layers) == arch.num_hidden_layers
        for layer in layers:
            names = FAMILIES[config.model_type].names
            wide_in, wide_out = (
                layer.get_submodule(name) for name in (names.intermediate, names.output)
            )
            assert tuple(wide_in.weight.shape) == (arch.intermediate_size, arch.hidden_size)
            assert tuple(wide_out.weight.shape) == (arch.hidden_size, arch.intermediate_size)
            (heads,) = {
                m.num_attention_heads for m in layer.modules() if hasattr(m, "num_attention_heads")
            }
            assert heads == arch.num_attention_heads
        assert student.config.hidden_act == arch.hidden_act


def test_a_space_is_narrowed_and_widened():
    config = BertConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    space = SearchSpace.from_teacher(config)
    found = space.replaced(
        {"hidden_size": [528, 300, 528], "num_attention_heads": [12], "hidden_act": None}, config
    )
    assert (
        found.choices["hidden_size"] == [528, 300]
        and found.choices["hidden_act"] == space.choices["hidden_act"]
    )
    assert found.smallest().hidden_size == 300 and found.largest().hidden_size == 528
    assert found.largest().num_hidden_layers == 12 and found.smallest().hidden_act == "relu"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"hidden_size": []}, "space.hidden_size is empty, so there is no student"),
        (
            {"hidden_size": [1024]},
            "space.hidden_size has 1024: give values from 1 to the teacher's 768",
        ),
        (
            {"num_hidden_layers": [0]},
            "space.num_hidden_layers has 0: give values from 1 to the teacher's 12",
        ),
        (
            {"hidden_size": [100]},
            "space.num_attention_heads has 3, which does not divide the 100 in space.hidden_size",
        ),
        (
            {"hidden_act": ["swoosh"]},
            "space.hidden_act has 'swoosh', which transformers does not know",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(choices, message):
    config = BertConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    with pytest.raises(UserError, match=message):
        SearchSpace.from_teacher(config).replaced(choices, config)
