from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.distillation import start as student_init
from kdnas.distillation.narrowing import copied_tables
from kdnas.distillation.start import (
    FromEmbeddings,
    FromTeacher,
    RandomStart,
    Start,
    Started,
    embedding_basis,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    build_student,
    find_teacher,
    state_sha256,
    student_config,
)
from kdnas.system.errors import UserError
from tests.conftest import VOCAB, make_batch

SAME = StudentArch(
    num_hidden_layers=4, num_attention_heads=2, hidden_size=64, intermediate_size=128
)
NARROW = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64
)
ROWS = [make_batch(16, seed, length=20) for seed in range(10, 16)]


def load(folder: Path) -> PreTrainedModel:
    """A teacher as after training: no mean or bias is 0, and no layer norm the identity."""
    teacher = find_teacher(str(folder)).load()
    generator = torch.Generator().manual_seed(1)
    for module in teacher.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.bias.data.normal_(0, 0.6, generator=generator)
    words = teacher.embeddings.word_embeddings.weight.data
    words += torch.randn(len(words), 1, generator=generator) * words.any(
        -1, keepdim=True
    )  # padding stays 0
    return teacher


@pytest.fixture(scope="module")
def teacher(any_teacher) -> PreTrainedModel:
    return load(any_teacher)


@pytest.fixture(scope="module")
def bert(tiny_teacher) -> PreTrainedModel:
    return load(tiny_teacher)


def started(
    teacher: PreTrainedModel, start: Start, **sizes: object
) -> tuple[PreTrainedModel, Started]:
    torch.manual_seed(0)
    arch = StudentArch(**(SAME.to_dict() | sizes | {"hidden_act": teacher.config.hidden_act}))
    student = build_student(teacher.config, arch).eval()
    return student, start(student, teacher, ROWS)


@torch.no_grad()
def states(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Embedding output and states of all layers on some rows, of the real tokens."""
    input_ids = torch.randint(4, len(VOCAB), (8, 20), generator=torch.Generator().manual_seed(2))
    attention_mask = (torch.arange(20) < torch.arange(4, 20, 2)[:, None]).long()
    input_ids = input_ids.where(attention_mask.bool(), torch.tensor(3))
    output = model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return tuple(layer[attention_mask.bool()] for layer in output.hidden_states)


def test_at_equal_shape_the_student_is_the_teacher(teacher):
    student, _ = started(teacher, FromTeacher())
    random, _ = started(teacher, RandomStart())
    for ours, others, theirs in zip(states(student), states(random), states(teacher), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert (others - theirs).abs().mean() > 0.1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_layers_and_the_last_are_kept_and_the_work_of_others_is_aimed_at(
    bert, depth, monkeypatch
):
    monkeypatch.setattr("kdnas.distillation.narrowing.autocast", lambda device: nullcontext())
    student, start = started(bert, FromTeacher(), num_hidden_layers=depth)
    assert state_sha256(student.embeddings.state_dict()) == state_sha256(
        bert.embeddings.state_dict()
    )
    names = frozenset(name for name, _ in student.named_parameters())
    assert start == Started(names, ((0, 1),) * depth)
    ours, theirs = states(student), states(bert)
    for place in range(max(1, depth - 1)):  # 0: the embeddings
        torch.testing.assert_close(ours[place], theirs[place], atol=2e-2, rtol=1e-2)
    for place in range(
        max(1, depth - 1), depth + 1
    ):  # before the last layer of the four, and behind it
        aim = theirs[4 - depth + place]
        assert (ours[place] - aim).square().mean() < 0.9 * (theirs[place] - aim).square().mean()


def test_of_the_same_shape_all_parameters_are_copied(teacher):
    student, start = started(teacher, FromTeacher())
    assert start.copied == {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize("sizes", [{"intermediate_size": 48}, {"num_attention_heads": 1}])
def test_other_sizes_at_the_teacher_s_width_train_at_the_rates_of_copies(teacher, sizes):
    student, start = started(teacher, FromTeacher(), num_hidden_layers=3, **sizes)
    num_heads = sizes.get("num_attention_heads", 2)
    assert start.copied == {name for name, _ in student.named_parameters()}
    assert [len(layer) for layer in start.heads] == [num_heads] * 3


@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_basis_is_orthonormal_and_its_directions_hold_the_most_variance(teacher, width):
    basis = embedding_basis(teacher, width)
    assert basis.shape == (64, width) and basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(width), atol=1e-5, rtol=0)
    with torch.no_grad():
        words = teacher(torch.arange(len(VOCAB))[:, None], output_hidden_states=True).hidden_states[
            0
        ][:, 0]
    singular = np.linalg.svd(words - words.mean(0), compute_uv=False)
    found = ((words - words.mean(0)) @ basis).norm(dim=0)
    np.testing.assert_allclose(found[:16], singular[:16], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_basis_is_that_of_all_words_together_however_few_are_embedded_at_once(
    bert, monkeypatch
):
    monkeypatch.setattr(student_init, "WORDS_AT_ONCE", 7)
    sizes, embed = [], student_init.embed
    monkeypatch.setattr(
        student_init,
        "embed",
        lambda model, batch: sizes.append(len(batch["input_ids"])) or embed(model, batch),
    )
    basis = embedding_basis(bert, 16)
    assert sum(sizes) == len(VOCAB) and set(sizes[:-1]) == {7} and len(sizes) > 2
    word_ids = torch.arange(len(VOCAB))[:, None]
    words = embed(bert, {"input_ids": word_ids, "token_type_ids": torch.zeros_like(word_ids)})[:, 0]
    _, vectors = torch.linalg.eigh(torch.cov(words.double().T))
    cosines = (
        (basis * vectors[:, -16:].flip(-1).float()).sum(0).abs()
    )  # a component's sign is by chance
    torch.testing.assert_close(cosines, torch.ones(16), atol=1e-5, rtol=0)


def correlation(student: PreTrainedModel, target: Tensor) -> float:
    return float(np.corrcoef(states(student)[0].flatten(), target.flatten())[0, 1])


@pytest.mark.parametrize("width", [32, 48])
def test_a_narrower_student_embeds_words_as_its_teacher_does(teacher, width):
    student, start = started(
        teacher, FromEmbeddings(), **(NARROW.to_dict() | {"hidden_size": width})
    )
    target = states(teacher)[0] @ embedding_basis(teacher, width)
    assert start.heads is None
    assert correlation(student, target) > 0.97
    error = (states(student)[0] - target).square().mean() / target.var()
    assert error < 0.12
    random, _ = started(teacher, RandomStart(), **(NARROW.to_dict() | {"hidden_size": width}))
    assert abs(correlation(random, target)) < 0.2


def test_what_is_copied_of_a_narrower_student_are_albert_s_tables_alone(teacher):
    student, start = started(teacher, FromEmbeddings(), **NARROW.to_dict())
    theirs = dict(teacher.named_parameters())
    copied = {
        name
        for name, parameter in student.named_parameters()
        if parameter.shape == theirs[name].shape and torch.equal(parameter, theirs[name])
    }
    if teacher.config.model_type == "albert":
        assert start.copied == {
            name for name, _ in student.named_parameters() if name.startswith("embeddings.")
        }
        assert start.copied <= copied
    else:
        assert start.copied == copied == set()


@pytest.mark.parametrize("start", [FromTeacher(), FromEmbeddings()])
@pytest.mark.parametrize("sizes", [SAME.to_dict(), NARROW.to_dict(), {"intermediate_size": 48}])
def test_the_teacher_is_not_changed_and_shares_nothing(teacher, sizes, start):
    before = state_sha256(teacher.state_dict())
    student, _ = started(teacher, start, **sizes)
    for parameter in student.parameters():
        assert parameter.requires_grad and parameter.is_leaf
        parameter.data.add_(1)
    assert state_sha256(teacher.state_dict()) == before


def test_a_random_start_changes_nothing_and_relates_nothing(teacher):
    torch.manual_seed(0)
    untouched = build_student(teacher.config, SAME)
    student, start = started(teacher, RandomStart())
    assert state_sha256(student.state_dict()) == state_sha256(untouched.state_dict())
    assert start == Started(copied=frozenset(), heads=None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 128}, "hidden_size is 128, but its teacher's only 64"),
        ({"intermediate_size": 129}, "intermediate_size is 129, but its teacher's only 128"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, but its teacher's only 2"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but its teacher's only 4"),
        (
            NARROW.to_dict() | {"num_attention_heads": 4},
            "num_attention_heads is 4, but its teacher's only 2",
        ),
    ],
)
def test_a_student_larger_than_its_teacher_is_refused(teacher, sizes, message):
    with pytest.raises(UserError, match=message):
        started(teacher, FromTeacher(), **sizes)
    sizes = SAME.to_dict() | sizes
    with pytest.raises(UserError, match=message):  # before anything is computed
        FromTeacher().check(student_config(teacher.config, StudentArch(**sizes)), teacher.config)


def test_the_embeddings_alone_ask_for_no_more_than_the_width(teacher):
    started(teacher, FromEmbeddings(), hidden_size=32, intermediate_size=256, num_hidden_layers=6)
    with pytest.raises(UserError, match="hidden_size is 80, but its teacher's only 64"):
        started(teacher, FromEmbeddings(), hidden_size=80)


def test_the_embeddings_alone_leave_the_layers_as_they_were(teacher):
    student, _ = started(teacher, FromEmbeddings(), **NARROW.to_dict())
    random, _ = started(teacher, RandomStart(), **NARROW.to_dict())
    untouched = {
        name
        for name, tensor in random.state_dict().items()
        if torch.equal(tensor, student.state_dict()[name])
    }
    layers = {
        name
        for name in random.state_dict()
        if name.startswith("encoder.") and "mapping_in" not in name
    }
    assert layers and layers <= untouched
    assert "embeddings.word_embeddings.weight" not in untouched


def test_a_narrower_student_is_narrowed(teacher):
    student, start = started(teacher, FromTeacher(), **NARROW.to_dict())
    embeddings, _ = started(teacher, FromEmbeddings(), **NARROW.to_dict())
    assert state_sha256(student.state_dict()) != state_sha256(embeddings.state_dict())
    assert start.heads == ((0, 1),) * 2 and start.copied == copied_tables(student)


def test_positions_and_token_types_are_kept_by_a_narrower_student(bert):
    student, _ = started(bert, FromEmbeddings(), **NARROW.to_dict())
    basis = embedding_basis(bert, 32)
    for name, ids in (
        ("position_ids", torch.arange(40)[None]),
        ("token_type_ids", torch.tensor([[0, 1, 2]])),
    ):
        words = torch.full_like(ids, 20)
        with torch.no_grad():
            ours, theirs = (model.embeddings(words, **{name: ids})[0] for model in (student, bert))
        assert np.corrcoef(ours.flatten(), (theirs @ basis).flatten())[0, 1] > 0.97
