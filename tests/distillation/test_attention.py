import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from kdnas.distillation.attention import AttentionMaps, AttentionRelations
from kdnas.distillation.objectives import View
from kdnas.distillation.start import FromTeacher, Started
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student, encode, family_of, find_teacher
from kdnas.models.families import arch_of
from kdnas.system.errors import UserError
from tests.conftest import make_batch, make_config, masked, view_of

SHAPE = dict(num_hidden_layers=2, num_attention_heads=1, hidden_size=32, intermediate_size=64)
SAME = dict(num_hidden_layers=4, num_attention_heads=2, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def teacher(any_teacher) -> PreTrainedModel:
    return find_teacher(str(any_teacher)).load()


def make(teacher: PreTrainedModel, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_student(teacher.config, StudentArch(**(SHAPE | sizes))).eval()


def projected(view: View, layer: int, part: str) -> np.ndarray:
    """Queries, keys or values (B, T, H), with the weights of the table."""
    family = family_of(view.model.config)
    linear = family.layers(view.model)[layer].get_submodule(getattr(family.names, part))
    return (
        view.padded(layer - 1).detach().numpy() @ linear.weight.detach().numpy().T
        + linear.bias.detach().numpy()
    )


def attention(
    query: np.ndarray, key: np.ndarray, head: int, num_heads: int, length: int
) -> np.ndarray:
    """One row's map of one head, (n, m) over its real tokens, by plain loops."""
    size = query.shape[-1] // num_heads
    part = slice(head * size, (head + 1) * size)
    found = np.zeros((length, length))
    for n in range(length):
        scores = [float(query[n, part] @ key[m, part]) / math.sqrt(size) for m in range(length)]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        found[n] = [exponential / sum(exponentials) for exponential in exponentials]
    return found


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float((theirs * (np.log(theirs) - np.log(ours))).sum())


def by_hand(
    num_heads: int, width: int, ones: tuple[str, ...] = (), copied: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Two layers whose queries, keys and values are 0, but for those that are 1 in each dimension, or the states."""
    model = AutoModel.from_config(
        make_config(
            num_hidden_layers=2,
            num_attention_heads=num_heads,
            hidden_size=width,
            intermediate_size=1,
        )
    ).eval()
    for layer in model.encoder.layer:
        for part in ("query", "key", "value"):
            linear = getattr(layer.attention.self, part)
            linear.weight.data = torch.eye(width) * (part in copied)
            linear.bias.data.fill_(part in ones)
    return model.requires_grad_(False)


# A row of two tokens and padding, which would be looked at by everyone, and a row of one, which sees itself alone.
TWO_AND_ONE = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}


def first_token(model: PreTrainedModel, **layers: list[float]) -> View:
    """Of each layer (``below``: under the first) the first row's first token; the second is 0, and padding 99."""
    padded = {}
    for name, values in layers.items():
        states = torch.zeros(2, 3, len(values))
        states[0, 0] = torch.tensor(values)
        states[0, 2], states[1, 1:] = 99.0, 99.0
        padded[{"below": -1, "first": 0}[name]] = states
    return View(model, TWO_AND_ONE, padded=padded)


def test_the_error_of_maps_is_as_by_hand():
    # Queries are 1, keys the states, and heads are 4 wide: the score of a token is half the sum of its head's states.
    student, teacher = (
        by_hand(heads, width, ("query",), ("key",)) for heads, width in ((1, 4), (2, 8))
    )
    criterion = AttentionMaps().criterion(student, teacher)
    criterion.fit(Started(heads=((0,), (1,))), [], [])
    seen, elsewhere = (
        math.log(3) / 2,
        7.0,
    )  # a score of ln 3, which is a map of (3/4, 1/4); and what no head looks at
    theirs = first_token(
        teacher, below=[seen] * 4 + [elsewhere] * 4, first=[elsewhere] * 4 + [0.0] * 4
    )
    ours = first_token(student, below=[0.0] * 4, first=[seen] * 4)
    # Layer 0: (3/4, 1/4) is asked for and (1/2, 1/2) given, layer 1 the reverse; both for both tokens of the first row.
    first = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    second = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    ((error, count),) = criterion(ours, theirs)
    assert (error.item(), count) == (pytest.approx((2 * first + 2 * second) / 2, rel=1e-5), 3)


def test_the_error_of_relations_is_as_by_hand():
    # Two relation heads: 1 wide in the student, 2 in the teacher. Queries and keys are the teacher's states, keys and
    # values the student's; the rest is 0, and a relation of nothing is (1/2, 1/2).
    student, teacher = (
        by_hand(1, 2, copied=("key", "value")),
        by_hand(1, 4, copied=("query", "key")),
    )
    criterion = AttentionRelations(layer=0, num_heads=2).criterion(student, teacher)
    # In the teacher's head 0 and the student's head 1 the first token's product with itself is ln 3 (over the root of
    # the width), so that it relates to both as (3/4, 1/4); the second's products are all 0.
    theirs = first_token(teacher, below=[math.sqrt(math.log(3) / math.sqrt(2))] * 2 + [0.0, 0.0])
    ours = first_token(student, first=[0.0, math.sqrt(math.log(3))])
    asked = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(
        1 / 2
    )  # (3/4, 1/4) of a student that gives (1/2, 1/2)
    given = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)  # the reverse
    queries, keys, values = asked / 2, (asked + given) / 2, given / 2  # means over two heads
    ((error, count),) = criterion(ours, theirs)
    assert (error.item(), count) == (pytest.approx((queries + keys + values) / 3, rel=1e-5), 3)


@pytest.mark.parametrize("heads", [None, ((1,), (0,))])
def test_the_error_of_maps_is_that_of_plain_loops(teacher, heads):
    student = make(teacher)
    criterion = AttentionMaps().criterion(student, teacher)
    if heads:
        criterion.fit(Started(heads=heads), [], [])
    batch = masked(make_batch())
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    total = 0.0
    for i, (source, head) in enumerate(
        zip([0, 3], [h for (h,) in heads or ((0,), (0,))], strict=True)
    ):
        q, k = projected(ours, i, "query"), projected(ours, i, "key")
        their_q, their_k = projected(theirs, source, "query"), projected(theirs, source, "key")
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            target = attention(their_q[row], their_k[row], head, 2, length)
            total += divergence(target, attention(q[row], k[row], 0, 1, length)) / 2
    ((error, count),) = criterion(ours, theirs)
    assert error.item() == pytest.approx(total, rel=1e-3)
    assert count == int(batch["attention_mask"].sum())
    assert [(term.name, term.weight, term.layer, term.scaled) for term in criterion.terms] == [
        ("attention_maps", 1.0, None, False)
    ]


@pytest.mark.parametrize(("layer", "source"), [(-1, 3), (1, 1), (0, 0), (-4, 0)])
def test_the_error_of_relations_is_that_of_plain_loops(teacher, layer, source):
    student = make(teacher)
    criterion = AttentionRelations(layer, num_heads=8).criterion(student, teacher)
    batch = masked(make_batch())
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    total = 0.0
    for part in ("query", "key", "value"):
        x, y = projected(ours, 1, part), projected(theirs, source, part)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for head in range(8):
                target = attention(y[row], y[row], head, 8, length)
                total += divergence(target, attention(x[row], x[row], head, 8, length)) / 8 / 3
    ((error, count),) = criterion(ours, theirs)
    assert error.item() == pytest.approx(total, rel=1e-3)
    assert count == int(batch["attention_mask"].sum())
    assert [(term.name, term.weight) for term in criterion.terms] == [("attention_relations", 1.0)]


@pytest.mark.parametrize("objective", [AttentionMaps(), AttentionRelations(num_heads=4)])
def test_a_copy_of_the_teacher_has_no_error(teacher, objective):
    same = StudentArch(**SAME, hidden_act=arch_of(teacher.config).hidden_act)
    student, batch = build_student(teacher.config, same).eval(), make_batch()
    criterion = objective.criterion(student, teacher)
    assert criterion(view_of(student, batch), view_of(teacher, batch))[0][0] > 0.1
    criterion.fit(FromTeacher()(student, teacher, [batch]), [], [])
    ((error, _),) = criterion(view_of(student, batch), view_of(teacher, batch))
    assert error.item() == pytest.approx(0, abs=1e-4)


def test_the_heads_are_those_that_the_start_gave_and_are_kept_in_a_checkpoint(teacher):
    student = make(teacher)
    criterion = AttentionMaps().criterion(student, teacher)
    assert criterion.heads.tolist() == [[0], [0]]
    criterion.fit(Started(), [], [])
    assert criterion.heads.tolist() == [[0], [0]]
    criterion.fit(Started(heads=((1,), (0,))), [], [])
    other = AttentionMaps().criterion(student, teacher)
    other.load_state_dict(criterion.state_dict())
    assert other.heads.tolist() == [[1], [0]]


def test_more_heads_than_the_teacher_are_refused(teacher):
    with pytest.raises(
        UserError,
        match="the student has 4 attention heads .*, the teacher only 2: give the student at most",
    ):
        AttentionMaps().criterion(make(teacher, num_attention_heads=4), teacher)


@pytest.mark.parametrize("layer", [4, -5, 12])
def test_relations_of_a_layer_that_is_not_there_are_refused(teacher, layer):
    with pytest.raises(UserError, match=f"layer is {layer}, but the teacher has 4 layers: give"):
        AttentionRelations(layer, num_heads=4).teacher_layers(2, 4)
    with pytest.raises(UserError, match=f"layer is {layer}, but the teacher has 4 layers: give"):
        AttentionRelations(layer, num_heads=4).criterion(make(teacher), teacher)


@pytest.mark.parametrize(("num_heads", "width"), [(12, 32), (64, 32), (0, 32), (-2, 32), (3, 48)])
def test_relation_heads_that_do_not_divide_a_width_are_refused(teacher, num_heads, width):
    student = make(teacher, hidden_size=width)
    undivided = width if num_heads < 1 or width % num_heads else 64
    with pytest.raises(
        UserError, match=f"the width {undivided} cannot be split into {num_heads} relation heads"
    ):
        AttentionRelations(num_heads=num_heads).criterion(student, teacher)


@pytest.mark.parametrize("num_padding", [0, 3])
def test_the_maps_that_a_model_gives_are_those_of_its_queries_and_keys(teacher, num_padding):
    student = make(teacher)
    student.set_attn_implementation("eager")
    batch = make_batch()
    if not num_padding:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    output = encode(student, batch, maps=True)
    assert len(output.attentions) == 2
    given = View(student, batch, dict(enumerate(output.hidden_states, -1)), maps=output.attentions)
    for layer in range(2):
        torch.testing.assert_close(given.attention(layer), view_of(student, batch).attention(layer))
        padding = ~batch["attention_mask"].bool()
        assert given.attention(layer).transpose(1, 3)[padding].sum() == 0
    chosen = torch.tensor([0])
    torch.testing.assert_close(given.attention(0, chosen), given.attention(0)[:, chosen])


def test_the_states_are_the_same_whether_maps_are_asked_for_or_not(teacher):
    student, batch = make(teacher), make_batch()
    without = encode(student, batch).hidden_states
    student.set_attn_implementation("eager")
    with_maps = encode(student, batch, maps=True).hidden_states
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(with_maps, without, strict=True):
        torch.testing.assert_close(ours[real], theirs[real])
