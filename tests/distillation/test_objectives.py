"""What all objectives have in common, and the two that combine: hidden states and weighted sums."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from kdnas.cli.main import main
from kdnas.commands.config import as_plain
from kdnas.distillation.attention import AttentionMaps, AttentionRelations
from kdnas.distillation.module import Recipe
from kdnas.distillation.objectives import (
    Criterion,
    HiddenStates,
    LearnedMapping,
    Objective,
    Term,
    View,
    WeightedSum,
    needed_layers,
)
from kdnas.distillation.sentences import PairComparison, SentenceSimilarity, SentenceState
from kdnas.distillation.start import FromTeacher, Started
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student, find_teacher
from kdnas.models.layers import Even, Last, LastAndSkip, LastLayer, LayerMapping, Skip
from kdnas.system.errors import UserError
from tests.conftest import make_batch, masked, view_of

NARROW = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64
)
SAME = StudentArch(
    num_hidden_layers=4, num_attention_heads=2, hidden_size=64, intermediate_size=128
)
NESTED = WeightedSum(
    [
        HiddenStates(LastLayer()),
        WeightedSum([AttentionMaps(), AttentionRelations(layer=1, num_heads=4)], [3, 1]),
        SentenceState("mean"),
        PairComparison(),
    ],
    [4.0, 2.0, 1.0, 1.0],
)
OBJECTIVES = {
    "hidden states": HiddenStates(),
    "last layer": HiddenStates(LastLayer()),
    "original": HiddenStates(
        LastAndSkip(), shared_projection=True, normalize=False, fit_projections=False
    ),
    "learned": LearnedMapping(),
    "maps": AttentionMaps(),
    "relations": AttentionRelations(num_heads=4),
    "cls": SentenceState("cls"),
    "mean": SentenceState("mean"),
    "similarity": SentenceSimilarity(),
    "pairs": PairComparison(),
    "nested": NESTED,
}
any_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@pytest.fixture(scope="module")
def teacher(any_teacher) -> PreTrainedModel:
    return find_teacher(str(any_teacher)).load()


def make(objective: Objective, teacher: PreTrainedModel, arch: StudentArch = NARROW) -> tuple:
    """A random student and the criterion."""
    torch.manual_seed(0)
    student = build_student(teacher.config, arch).eval()
    return student, objective.criterion(student, teacher)


def known_view(teacher: PreTrainedModel, objective: Objective, batch: dict, depth: int) -> View:
    """The teacher's view as a cache gives it: real tokens of the needed layers alone."""
    layers = needed_layers(objective, [depth], teacher.config.num_hidden_layers)
    with torch.no_grad():
        whole = view_of(teacher, batch)
        return View(teacher, batch, real={layer: whole.real(layer) for layer in layers})


def numbers(errors: list[tuple[Tensor, int]]) -> list[float]:
    return [float(error) for error, _ in errors]


def fake(num_hidden_layers: int, hidden_size: int) -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=num_hidden_layers, hidden_size=hidden_size)
    )


class Asking(HiddenStates):
    def __init__(self, layers: set[int]) -> None:
        self.asked = layers

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return self.asked


@pytest.mark.parametrize("layer", [-2, 4, 1.5, "last"])
def test_a_layer_that_is_not_there_is_refused_with_the_objective_s_name(layer):
    assert needed_layers(Asking({-1, 0}), [2], 4) == [-1, 0, 3]
    with pytest.raises(
        UserError,
        match=f"Asking needs teacher layer {layer!r}, but the teacher has only layers 0 to 3, and -1 for",
    ):
        needed_layers(Asking({0, layer}), [2], 4)


# All objectives


@any_objective
def test_the_needed_layers_are_enough_and_there_is_one_error_a_term(teacher, objective):
    student, criterion = make(objective, teacher)
    batch = make_batch()
    errors = criterion(view_of(student, batch), known_view(teacher, objective, batch, 2))
    assert len(errors) == len(criterion.terms)
    assert all(
        error.ndim == 0 and error.isfinite() and error > 0 and count > 0 for error, count in errors
    )
    assert sum(term.weight for term in criterion.terms) == pytest.approx(1)
    assert len({term.name for term in criterion.terms}) == len(criterion.terms)


# SentenceSimilarity compares a row with the others of its batch.
ROW_BY_ROW = {name: objective for name, objective in OBJECTIVES.items() if name != "similarity"}


@pytest.mark.parametrize("objective", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
def test_errors_add_up_over_rows_and_padding_never_counts(teacher, objective):
    student, criterion = make(objective, teacher)
    batch = make_batch(5)
    with torch.no_grad():
        together = criterion(view_of(student, batch), known_view(teacher, objective, batch, 2))
        sums, counts = np.zeros(len(together)), np.zeros(len(together))
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {
                name: tensor[row : row + 1, :length] if tensor.ndim == 2 else tensor
                for name, tensor in batch.items()
            }
            errors = criterion(view_of(student, alone), known_view(teacher, objective, alone, 2))
            sums += numbers(errors)
            counts += [count for _, count in errors]
    assert numbers(together) == pytest.approx(sums.tolist(), rel=1e-3)
    assert [count for _, count in together] == counts.tolist()


@any_objective
def test_gradients_reach_the_student_and_what_is_trained_beside_it_and_never_the_teacher(
    teacher, objective
):
    student, criterion = make(objective, teacher)
    batch = make_batch()
    theirs = known_view(teacher, objective, batch, 2)
    teacher.requires_grad_(True)
    try:
        sum(error for error, _ in criterion(view_of(student, batch), theirs)).backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
    finally:
        teacher.requires_grad_(False)
    words = student.embeddings.word_embeddings.weight.grad
    assert words.isfinite().all() and words.abs().sum() > 0
    for parameter in criterion.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "objective",
    [
        HiddenStates(Last()),
        AttentionMaps(),
        AttentionRelations(num_heads=4),
        SentenceState("cls"),
        SentenceState("mean"),
        SentenceSimilarity(),
    ],
)
def test_a_copy_of_the_teacher_is_nearly_without_error_once_the_projections_are_fitted(
    teacher, objective
):
    random, untrained = make(objective, teacher, SAME)
    student, criterion = make(objective, teacher, SAME)
    rows = [make_batch(24, seed) for seed in range(1, 9)]
    with torch.no_grad():
        started = FromTeacher()(student, teacher, rows)
        criterion.fit(
            started,
            [view_of(student, row) for row in rows],
            [view_of(teacher, row) for row in rows],
        )
        batch = rows[0]
        theirs = known_view(teacher, objective, batch, 4)
        fitted = numbers(criterion(view_of(student, batch), theirs))
        at_random = numbers(untrained(view_of(random, batch), theirs))
    for error, other in zip(fitted, at_random, strict=True):
        assert error < 0.05 * other


@any_objective
def test_an_objective_survives_yaml_and_the_command_line(objective, tmp_path, monkeypatch):
    plain = as_plain(Recipe(objective=objective))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"recipe": plain}))
    seen = []
    monkeypatch.setattr("kdnas.commands.run.search", lambda config, *console: seen.append(config))
    assert main(["search", "--teacher=quickstart", "--text=y", f"--config={path}"]) == 0
    found = seen[0].recipe.objective
    assert type(found) is type(objective) and found is not objective
    assert as_plain(seen[0].recipe) == plain


def test_a_nested_objective_survives_fit_too(tmp_path, capsys):
    plain = as_plain(Recipe(objective=NESTED))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"recipe": plain}}))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=configs/fit.yaml", f"--config={path}", "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]["recipe"]["objective"]
    assert shown == plain["objective"]
    assert [part["class_path"].rpartition(".")[2] for part in shown["init_args"]["objectives"]] == [
        "HiddenStates",
        "WeightedSum",
        "SentenceState",
        "PairComparison",
    ]


# Which layers


@pytest.mark.parametrize(
    ("objective", "layers"),
    [
        (HiddenStates(), {1: {5, 0}, 2: {4, 5, 0, 3}, 4: {2, 3, 4, 5, 0, 1}}),
        (HiddenStates(LastLayer()), {1: {5}, 2: {5}, 4: {5}}),
        (HiddenStates(Even()), {1: {5}, 2: {2, 5}, 4: {1, 2, 4, 5}}),
        (
            AttentionMaps(),
            {1: {-1}, 2: {-1, 4}, 3: {-1, 0, 4}, 4: {-1, 0, 1, 4}, 6: {-1, 0, 1, 2, 3, 4}},
        ),
        (AttentionRelations(), {1: {4}, 4: {4}}),
        (AttentionRelations(layer=0), {2: {-1}}),
        (AttentionRelations(layer=-6), {2: {-1}}),
        (SentenceState("cls"), {1: {5}, 4: {5}}),
        (SentenceSimilarity(), {1: {5}, 4: {5}}),
        (PairComparison(), {1: {5}, 4: {5}}),
        (WeightedSum([AttentionRelations(2), HiddenStates(LastLayer())], [1, 1]), {2: {1, 5}}),
    ],
)
def test_the_teacher_layers_of_several_depths_are_as_by_hand(objective, layers):
    for depth, expected in layers.items():
        assert objective.teacher_layers(depth, 6) == expected
    assert needed_layers(objective, layers, 6) == sorted({5}.union(*layers.values()))


# Hidden states


def test_the_error_of_hidden_states_is_as_by_hand():
    criterion = HiddenStates(LastLayer()).criterion(fake(2, 2), fake(3, 2))
    assert criterion.terms == [Term("student_1_teacher_2", 1.0, 2, True)]
    (projection,) = criterion.projections
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        projection.bias.copy_(torch.tensor([0.0, 1.0]))
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    ours = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, -1.0], [9.0, 9.0]]])
    theirs = torch.tensor([[[1.0, 3.0], [2.0, 4.0]], [[0.0, -1.0], [0.0, 0.0]]])
    ((error, count),) = criterion(
        View(None, batch, padded={1: ours}), View(None, batch, padded={2: theirs})
    )
    # predicted: (1, 5), (0, 1), (3, -1), then padding: (0 + 4) / 2, (4 + 9) / 2, (9 + 0) / 2
    assert (error.item(), count) == (2 + 6.5 + 4.5, 3)


# Of a student with 2 layers and a teacher with 4.
MAPPED = [
    (Last(), [(2,), (3,)]),
    (Skip(), [(0,), (2,)]),
    (LastAndSkip(), [(2, 0), (3, 2)]),
    (Even(), [(1,), (3,)]),
    (LastLayer(), [(), (3,)]),
]


@pytest.mark.parametrize(
    ("mapping", "shared", "expected"),
    [
        # Below, what a layer of the student is compared with is one of the teacher's:
        # 0: (0, 0), 1: (1, 4), 2: (2, 2), 3: (3, 1) for the two real tokens.
        (Last(), False, [1 + 0, 1 + 1]),  # (1, 2) with layer 2, (4, 0) with layer 3
        (Last(), True, [1 + 0, 0 + 4]),  # (1, 2) with layer 2, (3, -1) with layer 3
        (Skip(), False, [1 + 4, 4 + 4]),  # (1, 2) with layer 0, (4, 0) with layer 2
        (Skip(), True, [1 + 4, 1 + 9]),  # (1, 2) with layer 0, (3, -1) with layer 2
        (
            LastAndSkip(),
            False,
            [1 + 0, 4 + 16, 1 + 1, 16 + 16],
        ),  # as Last, then (2, 4) with 0; Last, (6, -2) with 2
        (LastAndSkip(), True, [1 + 0, 4 + 16, 0 + 4, 16 + 16]),  # the same
        (Even(), False, [0 + 4, 1 + 1]),  # (1, 2) with layer 1, (4, 0) with layer 3
        (Even(), True, [0 + 4, 0 + 4]),  # (1, 2) with layer 1, (3, -1) with layer 3
        (LastLayer(), False, [0 + 4]),  # (3, -1) with layer 3, through the only projection
        (LastLayer(), True, [0 + 4]),
    ],
)
def test_the_error_of_each_mapping_is_as_by_hand(mapping, shared, expected):
    criterion = HiddenStates(mapping, shared_projection=shared).criterion(fake(2, 1), fake(4, 1))
    with torch.no_grad():
        for i, projection in enumerate(
            criterion.projections
        ):  # x + i for the first teacher layer, 2 x for the second
            projection.weight.copy_(torch.tensor([[1.0], [2.0]])[: len(projection.weight)])
            projection.bias.copy_(torch.tensor([float(i), 0.0])[: len(projection.bias)])
    batch = {"attention_mask": torch.tensor([[1, 0], [1, 0]])}
    ours = {0: [[1.0, 77.0], [2.0, 77.0]], 1: [[3.0, 77.0], [-1.0, 77.0]]}
    theirs = {0: [[0.0, 5.0], [0.0, 5.0]], 1: [[1.0, 5.0], [4.0, 5.0]], 2: [[2.0, 5.0], [2.0, 5.0]]}
    theirs |= {3: [[3.0, 5.0], [1.0, 5.0]]}
    student, teacher = (
        View(
            None,
            batch,
            padded={layer: torch.tensor(states)[..., None] for layer, states in layers.items()},
        )
        for layers in (ours, theirs)
    )
    errors = criterion(student, teacher)
    assert numbers(errors) == expected and {count for _, count in errors} == {2}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("mapping", "pairs"), MAPPED)
def test_errors_of_hidden_states_are_those_of_plain_loops(
    teacher, mapping, pairs, shared, normalize
):
    student, criterion = make(HiddenStates(mapping, shared, normalize), teacher)
    batch = masked(make_batch())
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    expected, names = [], []
    projections = list(criterion.projections)
    assert len(projections) == (1 if shared else sum(1 for layers in pairs if layers))
    position = 0
    for i, layers in enumerate(pairs):
        for place, layer in enumerate(layers):
            projection = projections[0 if shared else position]
            weight = projection.weight.detach().numpy()[64 * place : 64 * (place + 1)]
            bias = projection.bias.detach().numpy()[64 * place : 64 * (place + 1)]
            total = 0.0
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                for token in range(length):
                    predicted = weight @ ours.padded(i)[row, token].detach().numpy() + bias
                    total += ((predicted - theirs.padded(layer)[row, token].numpy()) ** 2).mean()
            expected.append(total)
            names.append(f"student_{i}_teacher_{layer}")
        position += bool(layers)
    errors = criterion(ours, theirs)
    assert numbers(errors) == pytest.approx(expected, rel=1e-4)
    assert {count for _, count in errors} == {int(batch["attention_mask"].sum())}
    assert [term.name for term in criterion.terms] == names
    assert {term.weight for term in criterion.terms} == {1 / len(names)}
    assert {term.scaled for term in criterion.terms} == {normalize}


def test_the_error_of_a_learned_mapping_is_as_by_hand():
    criterion = LearnedMapping().criterion(fake(2, 1), fake(2, 1))
    with torch.no_grad():
        criterion.logits.copy_(
            torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
        )  # p = (3/4, 1/4) and (1/2, 1/2)
        for projection, weight, bias in zip(
            criterion.projections, [(1, 2), (1, -1)], [(0, 0), (3, 0)], strict=True
        ):
            projection.weight.copy_(torch.tensor(weight)[:, None])
            projection.bias.copy_(torch.tensor(bias))
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    student, teacher = (
        View(
            None,
            batch,
            padded={
                layer: torch.tensor([[[x], [y], [99.0]]]) for layer, (x, y) in enumerate(states)
            },
        )
        for states in ([(1.0, 2.0), (0.0, 1.0)], [(1.0, 3.0), (2.0, 2.0)])
    )
    # on layer 0, (1, 3): (1, 2) gives 0 + 1, (3, 4) gives 4 + 1, and 3/4 * 1 + 1/4 * 5 = 2
    # on layer 1, (2, 2): (2, 4) gives 0 + 4, (0, -1) gives 4 + 9, and 1/2 * 4 + 1/2 * 13 = 8.5
    errors = criterion(student, teacher)
    assert numbers(errors) == pytest.approx([2.0, 8.5]) and [count for _, count in errors] == [2, 2]
    assert criterion.terms == [Term("teacher_0", 0.5, 0, True), Term("teacher_1", 0.5, 1, True)]


def test_the_error_of_a_learned_mapping_is_that_of_plain_loops_and_its_mixture_is_learned(teacher):
    student, criterion = make(LearnedMapping(), teacher)
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 3.0, 0.5]])
    criterion.logits.data.copy_(logits)
    batch = masked(make_batch())
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    errors = criterion(ours, theirs)
    for j, (error, count) in enumerate(errors):
        target, expected = theirs.real(j).detach().numpy(), 0.0
        odds = [np.exp(logits[i, j].item()) for i in range(2)]
        for i, projection in enumerate(criterion.projections):
            part = slice(64 * j, 64 * (j + 1))
            weight, bias = (
                projection.weight[part].detach().numpy(),
                projection.bias[part].detach().numpy(),
            )
            squares = (ours.real(i).detach().numpy() @ weight.T + bias - target) ** 2
            expected += odds[i] / sum(odds) * squares.mean(-1).sum()
        assert error.item() == pytest.approx(float(expected), rel=1e-4) and count == len(target)
    assert [(term.layer, term.scaled, term.weight) for term in criterion.terms] == [
        (j, True, 0.25) for j in range(4)
    ]
    sum(error for error, _ in errors).backward()
    better = torch.stack([criterion.logits.grad[0], criterion.logits.grad[1]])
    torch.testing.assert_close(
        better[0], -better[1]
    )  # what one student layer gains the other loses


@pytest.mark.parametrize("shared", [False, True])
def test_fitted_projections_are_the_least_squares_answer(teacher, shared):
    student, criterion = make(HiddenStates(Even(), shared_projection=shared), teacher)
    rows = [make_batch(30, seed) for seed in range(3)]
    with torch.no_grad():
        ours, theirs = ([view_of(model, row) for row in rows] for model in (student, teacher))
        criterion.fit(Started(), ours, theirs)
    groups = [[(0, 1), (1, 3)]] if shared else [[(0, 1)], [(1, 3)]]
    for projection, group in zip(criterion.projections, groups, strict=True):
        x = np.concatenate([view.real(i).numpy() for i, _ in group for view in ours]).astype(float)
        y = np.concatenate([view.real(j).numpy() for _, j in group for view in theirs]).astype(
            float
        )
        centred = x - x.mean(0)
        strength = 1e-3 * (centred**2).sum(0).mean()
        weight = np.linalg.solve(
            centred.T @ centred + strength * np.eye(32), centred.T @ (y - y.mean(0))
        )
        np.testing.assert_allclose(projection.weight.detach(), weight.T, atol=2e-3)
        np.testing.assert_allclose(
            projection.bias.detach(), y.mean(0) - x.mean(0) @ weight, atol=2e-3
        )


def test_the_fitted_projections_of_a_learned_mapping_are_the_least_squares_answers(teacher):
    student, criterion = make(LearnedMapping(), teacher)
    rows = [masked(make_batch(30, seed)) for seed in range(3)]
    with torch.no_grad():
        ours, theirs = ([view_of(model, row) for row in rows] for model in (student, teacher))
        criterion.fit(Started(), ours, theirs)
    for i, projection in enumerate(criterion.projections):
        x = np.concatenate([view.real(i).numpy() for view in ours]).astype(float)
        centred = x - x.mean(0)
        gram = centred.T @ centred + 1e-3 * (centred**2).sum(0).mean() * np.eye(32)
        for j in range(4):
            y = np.concatenate([view.real(j).numpy() for view in theirs]).astype(float)
            weight, part = (
                np.linalg.solve(gram, centred.T @ (y - y.mean(0))),
                slice(64 * j, 64 * (j + 1)),
            )
            np.testing.assert_allclose(projection.weight[part].detach(), weight.T, atol=2e-3)
            np.testing.assert_allclose(
                projection.bias[part].detach(), y.mean(0) - x.mean(0) @ weight, atol=2e-3
            )


def test_projections_that_are_not_to_be_fitted_stay_as_they_are(teacher):
    student, criterion = make(HiddenStates(fit_projections=False), teacher)
    before = [parameter.clone() for parameter in criterion.parameters()]
    with torch.no_grad():
        criterion.fit(Started(), [view_of(student, make_batch())], [view_of(teacher, make_batch())])
    assert all(
        torch.equal(one, other) for one, other in zip(before, criterion.parameters(), strict=True)
    )


class Uneven(LayerMapping):
    """Two teacher layers for the first student layer, one for the others."""

    def layers(self, student_layer, num_student_layers, num_teacher_layers):
        return (0, 1) if student_layer == 0 else (2,)


def test_a_shared_projection_of_an_uneven_mapping_is_refused():
    with pytest.raises(UserError, match=r"in this mapping the numbers are \[1, 2\]"):
        HiddenStates(Uneven(), shared_projection=True).criterion(fake(2, 8), fake(3, 8))
    assert len(HiddenStates(Uneven()).criterion(fake(2, 8), fake(3, 8)).projections) == 2
    assert (
        len(
            HiddenStates(LastLayer(), shared_projection=True)
            .criterion(fake(2, 8), fake(3, 8))
            .projections
        )
        == 1
    )


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(UserError, match="4 layers cannot learn from a teacher of 3"):
        HiddenStates().criterion(fake(4, 8), fake(3, 8))


# Weighted sums


def test_weights_are_relative_to_each_other_and_multiply(teacher):
    _, criterion = make(NESTED, teacher)
    assert [(term.name, term.weight, term.layer) for term in criterion.terms] == [
        ("student_1_teacher_3", 4 / 8, 3),
        ("attention_maps", 2 / 8 * 3 / 4, None),
        ("attention_relations", 2 / 8 * 1 / 4, None),
        ("sentence_mean", 1 / 8, None),
        ("pair_comparison", 1 / 8, None),
    ]
    assert [term.scaled for term in criterion.terms] == [True, False, False, False, False]


def test_a_weighted_sum_is_as_by_hand():
    parts = [
        HiddenStates(LastLayer(), normalize=False),
        SentenceState("cls"),
        SentenceState("mean"),
    ]
    criterion = WeightedSum(parts, [3.0, 2.0, 1.0]).criterion(fake(1, 1), fake(1, 1))
    for parameter in criterion.parameters():
        torch.nn.init.ones_(parameter)  # each projection is x + 1
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    ours, theirs = torch.tensor([[1.0, 2.0], [3.0, 50.0]]), torch.tensor([[1.0, 5.0], [4.0, -50.0]])
    views = [View(fake(1, 1), batch, padded={0: states[..., None]}) for states in (ours, theirs)]
    errors = criterion(*views)
    # tokens: (2 - 1)^2 + (3 - 5)^2 + (4 - 4)^2; [CLS]: (2 - 1)^2 + (4 - 4)^2; means: (2.5 - 3)^2 + (4 - 4)^2
    assert [(error.item(), count) for error, count in errors] == [(5.0, 3), (1.0, 2), (0.25, 2)]
    # 3/6 * 5/3 + 2/6 * 1/2 + 1/6 * 0.25/2
    loss = sum(
        term.weight * error / count
        for term, (error, count) in zip(criterion.terms, errors, strict=True)
    )
    assert loss.item() == pytest.approx(5 / 6 + 1 / 6 + 1 / 48)


def test_a_weighted_sum_is_that_of_plain_loops(teacher):
    student, criterion = make(
        WeightedSum([HiddenStates(Even()), SentenceState("mean")], [0.2, 0.6]), teacher
    )
    batch = masked(make_batch(4))
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    # projections of student layer 0 on the teacher's 1, of 1 on 3, and of the mean of 1 on that of 3
    weights = [parameter.detach().numpy() for parameter in criterion.parameters()]
    expected = np.zeros(3)
    for row, length in enumerate(lengths):
        x, y = (
            [view.padded(i)[row, :length].detach().numpy() for i in layers]
            for view, layers in ((ours, (0, 1)), (theirs, (1, 3)))
        )
        x, y = [*x, x[1].mean(0)], [*y, y[1].mean(0)]
        for term in range(3):
            error = x[term] @ weights[2 * term].T + weights[2 * term + 1] - y[term]
            expected[term] += (error**2).sum() / 64
    expected *= np.array([0.25 / 2, 0.25 / 2, 0.75]) / [sum(lengths), sum(lengths), 4]
    found = criterion(ours, theirs)
    assert [
        term.weight * error.item() / count
        for term, (error, count) in zip(criterion.terms, found, strict=True)
    ] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_sum_gives_the_errors_of_its_parts_and_fits_them(teacher):
    parts = [HiddenStates(LastLayer()), SentenceState("mean")]
    student, criterion = make(WeightedSum(parts, [2, 1]), teacher)
    rows = [make_batch(9, seed) for seed in range(3)]
    with torch.no_grad():
        ours, theirs = ([view_of(model, row) for row in rows] for model in (student, teacher))
        criterion.fit(Started(), ours, theirs)
        alone = []
        for part in parts:
            single = part.criterion(student, teacher)
            single.fit(Started(), ours, theirs)
            alone += numbers(single(ours[0], theirs[0]))
        assert numbers(criterion(ours[0], theirs[0])) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("objectives", "weights", "message"),
    [
        ([], [], "0 objectives and 0 weights: give at least one"),
        ([AttentionMaps()], [1.0, 2.0], "1 objectives and 2 weights: give at least one"),
        (
            [AttentionMaps(), PairComparison()],
            [1.0],
            "2 objectives and 1 weights: give at least one",
        ),
        ([AttentionMaps()], [0.0], r"a weight is 0\.0: give a number above 0"),
        (
            [AttentionMaps(), AttentionMaps()],
            [1.0, -0.5],
            r"a weight is -0\.5: give a number above 0",
        ),
        ([AttentionMaps()], [math.inf], "a weight is inf: give a number above 0"),
        ([AttentionMaps()], [math.nan], "a weight is nan: give a number above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(objectives, weights, message):
    with pytest.raises(UserError, match=message):
        WeightedSum(objectives, weights)


# Views


def test_a_view_turns_padded_states_into_real_ones_and_back():
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    padded = torch.arange(12.0).view(2, 3, 2)
    view = View(fake(1, 2), batch, padded={0: padded})
    assert view.real(0).tolist() == [[0, 1], [2, 3], [6, 7]]
    back = View(fake(1, 2), batch, real={0: view.real(0)})
    assert back.padded(0).tolist() == [[[0, 1], [2, 3], [0, 0]], [[6, 7], [0, 0], [0, 0]]]
    assert back.pooled(back.mask_BT).tolist() == [[1, 2], [6, 7]]
    # of no token the mean is 0, not a division by nothing
    assert back.pooled(torch.tensor([[False, True, False], [False, False, False]])).tolist() == [
        [2, 3],
        [0, 0],
    ]


def test_a_criterion_fits_nothing_unless_it_says_so():
    assert Criterion.fit(None, Started(), [], []) is None
