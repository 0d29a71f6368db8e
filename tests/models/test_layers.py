import pytest

from kdnas.models.arch import kept_layers
from kdnas.models.layers import Even, Last, LastAndSkip, LastLayer, LayerMapping, Skip, spread
from kdnas.system.errors import UserError

# mapping, student layers, teacher layers, teacher layer of each student layer
TABLE = [
    (Last(), 4, 12, [8, 9, 10, 11]),
    (Last(), 5, 12, [7, 8, 9, 10, 11]),
    (Last(), 4, 6, [2, 3, 4, 5]),
    (Last(), 1, 12, [11]),
    (Last(), 3, 3, [0, 1, 2]),
    (Skip(), 4, 12, [0, 3, 6, 9]),
    (Skip(), 5, 12, [0, 2, 4, 6, 8]),
    (Skip(), 10, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (Skip(), 4, 6, [0, 1, 2, 3]),
    (Skip(), 1, 12, [0]),
    (Skip(), 3, 3, [0, 1, 2]),
    (Even(), 4, 12, [2, 5, 8, 11]),
    (Even(), 5, 12, [1, 4, 6, 9, 11]),
    (Even(), 10, 12, [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]),
    (Even(), 4, 6, [1, 2, 4, 5]),  # 1.5 and 4.5 are rounded up
    (Even(), 1, 12, [11]),
    (Even(), 3, 3, [0, 1, 2]),
]


@pytest.mark.parametrize(("mapping", "num_student", "num_teacher", "layers"), TABLE)
def test_single_mappings_are_as_by_hand(mapping, num_student, num_teacher, layers):
    assert mapping(num_student, num_teacher) == [(layer,) for layer in layers]


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "pairs"),
    [
        (4, 12, [(8, 0), (9, 3), (10, 6), (11, 9)]),
        (4, 6, [(2, 0), (3, 1), (4, 2), (5, 3)]),
        (1, 12, [(11, 0)]),
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
    ],
)
def test_last_and_skip_is_last_then_skip(num_student, num_teacher, pairs):
    assert LastAndSkip()(num_student, num_teacher) == pairs


@pytest.mark.parametrize(
    ("num_student", "pairs"), [(1, [(5,)]), (2, [(), (5,)]), (4, [(), (), (), (5,)])]
)
def test_only_the_last_layer_learns_from_the_last_layer(num_student, pairs):
    assert LastLayer()(num_student, 6) == pairs


@pytest.mark.parametrize(
    ("num_chosen", "num_all", "chosen"),
    [
        (1, 12, [0]),
        (2, 12, [0, 11]),
        (3, 6, [0, 3, 5]),  # 2.5 is rounded up
        (4, 6, [0, 2, 3, 5]),
        (4, 12, [0, 4, 7, 11]),
        (5, 6, [0, 1, 3, 4, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0]),
    ],
)
def test_layers_are_spread_evenly_first_and_last_among_them(num_chosen, num_all, chosen):
    assert spread(num_chosen, num_all) == chosen


@pytest.mark.parametrize(
    ("num_ours", "num_theirs", "kept"),
    [
        (1, 6, [0]),
        (3, 6, [0, 1, 5]),
        (4, 12, [0, 1, 2, 11]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (2, 2, [0, 1]),
    ],
)
def test_a_student_begins_as_the_first_layers_and_the_last(num_ours, num_theirs, kept):
    assert kept_layers(num_ours, num_theirs) == kept


def test_no_layer_is_chosen_twice():
    for num_all in range(1, 30):
        for num_chosen in range(1, num_all + 1):
            assert len(set(spread(num_chosen, num_all))) == num_chosen


def test_the_rule_of_the_original_s_code_differs_at_12_layers_for_5_and_7_to_10():
    originals = {depth: [(i * 12 // depth,) for i in range(depth)] for depth in range(1, 13)}
    assert [depth for depth in originals if Skip()(depth, 12) != originals[depth]] == [
        5,
        7,
        8,
        9,
        10,
    ]
    assert originals[5] == [(0,), (2,), (4,), (7,), (9,)]


@pytest.mark.parametrize("mapping", [Last(), Skip(), LastAndSkip(), Even(), LastLayer()])
@pytest.mark.parametrize("num_student", [0, 13])
def test_a_student_without_layers_or_deeper_than_its_teacher_is_refused(mapping, num_student):
    with pytest.raises(
        UserError, match=rf"{num_student} layers .* a teacher of 12 layers: give it 1 to 12"
    ):
        mapping(num_student, 12)


@pytest.mark.parametrize("layer", [-1, 6])
def test_a_custom_mapping_that_names_a_layer_that_is_not_there_is_refused(layer):
    class Custom(LayerMapping):
        def layers(self, student_layer, num_student_layers, num_teacher_layers):
            return (0, layer)

    with pytest.raises(
        UserError, match=rf"teacher layer {layer}, but the teacher has only layers 0 to 5"
    ):
        Custom()(2, 6)
