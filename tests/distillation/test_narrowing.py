"""A student narrower than its teacher: what it must keep where it can, and where it can only come close."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.distillation.losses import attention_divergence, ridge_map
from kdnas.distillation.narrowing import (
    CalibrationRows,
    _best_factors,
    _fit_norm,
    fit_linear,
    narrow,
)
from kdnas.distillation.start import FromEmbeddings, FromTeacher, RandomStart, Start
from kdnas.models.arch import StudentArch, kept_layers
from kdnas.models.encoders import (
    build_encoder,
    build_student,
    family_of,
    find_teacher,
    state_sha256,
)
from kdnas.system.errors import UserError
from tests.conftest import make_batch, make_config, save_teacher, view_of

SHAPE = dict(num_hidden_layers=4, num_attention_heads=4, hidden_size=32, intermediate_size=64)
ROWS = [make_batch(24, seed, length=20) for seed in range(8)]
HELD_OUT = make_batch(24, 99, length=20)


def build(family: str, **sizes: object) -> PreTrainedModel:
    """A random model with every bias and scale of its own."""
    odd = {
        "roberta": dict(type_vocab_size=1),
        "distilbert": dict(layer_norm_eps=None),
        "modernbert": dict(layer_norm_eps=None, norm_eps=1e-9),
        "deberta-v2": dict(attention_head_size=sizes["hidden_size"] // 4),
    }.get(family, {})
    torch.manual_seed(0)
    model = build_encoder(make_config(family, **dict(layer_norm_eps=1e-9) | odd | sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model.requires_grad_(False)


@torch.no_grad()
def widened(small: PreTrainedModel, width: int, head_size: int) -> PreTrainedModel:
    """The same function in a wider stream: x becomes R x, where R is a rotation that takes the mean to the mean.

    The stream of the result lives in H_s - 1 dimensions of its ``width``; its layer norms see the same directions.
    """
    num_heads, old = small.config.num_attention_heads, small.config.hidden_size
    family = small.config.model_type
    wide = build(
        family,
        num_hidden_layers=small.config.num_hidden_layers,
        num_attention_heads=num_heads,
        hidden_size=num_heads * head_size,
        intermediate_size=2 * small.config.intermediate_size,
    )
    assert wide.config.hidden_size == width
    generator = torch.Generator().manual_seed(2)

    def basis(size: int, num: int) -> Tensor:
        turn = torch.randn(size, num, generator=generator, dtype=torch.float64)
        turn[:, 0] = 1
        return torch.linalg.qr(turn)[0] * torch.tensor([-1.0] + [1.0] * (num - 1))

    rotation = (basis(width, old) @ basis(old, old).T).float()  # (width, old)
    places = (
        torch.arange(num_heads)[:, None] * head_size + torch.arange(old // num_heads)
    ).flatten()
    scale = (
        head_size * num_heads / old
    ) ** 0.25  # the scores are divided by the root of the larger size
    for name, target in wide.embeddings.named_parameters():
        if "LayerNorm" not in name:
            target.copy_(small.embeddings.get_parameter(name) @ rotation.T)
    norms = [(small.embeddings.LayerNorm, wide.embeddings.LayerNorm)]
    names = family_of(small.config).names
    for ours, theirs in zip(
        family_of(small.config).layers(small), family_of(small.config).layers(wide), strict=True
    ):

        def part(
            name: str, ours: nn.Module = ours, theirs: nn.Module = theirs
        ) -> tuple[nn.Linear, nn.Linear]:
            return ours.get_submodule(name), theirs.get_submodule(name)

        for name, factor in ((names.query, scale), (names.key, scale), (names.value, 1.0)):
            source, target = part(name)
            target.weight.zero_()
            target.bias.zero_()
            target.weight[places] = factor * source.weight @ rotation.T
            target.bias[places] = factor * source.bias
        source, target = part(names.attention_output)
        target.weight.zero_()
        target.weight[:, places] = rotation @ source.weight
        target.bias.copy_(rotation @ source.bias)
        source, target = part(names.intermediate)
        target.weight.zero_()
        target.bias.zero_()
        target.weight[1::2] = source.weight @ rotation.T
        target.bias[1::2] = source.bias
        source, target = part(names.output)
        target.weight.zero_()
        target.weight[:, 1::2] = rotation @ source.weight
        target.bias.copy_(rotation @ source.bias)
        norms += [part(names.attention_norm), part(names.output_norm)]
    for number, (source, target) in enumerate(norms):
        source.weight.fill_(1 + 0.1 * (number % 3))
        target.weight.copy_(source.weight[:1].expand(width) * (old / width) ** 0.5)
        source.bias.sub_(source.bias.mean())
        target.bias.copy_(rotation @ source.bias)
    return wide


@pytest.fixture(scope="module", params=["bert", "roberta"])
def low_rank(request) -> PreTrainedModel:
    """A teacher, 64 wide with 4 heads of 16, whose stream lives in 31 dimensions."""
    small = build(request.param, **SHAPE)
    wide = widened(small, 64, 16)
    ours, theirs = view_of(small, HELD_OUT), view_of(wide, HELD_OUT)
    for layer in range(-1, 4):  # it is the same function: lengths and angles are kept
        torch.testing.assert_close(
            ours.real(layer) @ ours.real(layer).T,
            theirs.real(layer) @ theirs.real(layer).T,
            atol=2e-3,
            rtol=2e-3,
        )
    return wide


@pytest.fixture(scope="module", params=["bert", "roberta"])
def teacher(request, tmp_path_factory) -> PreTrainedModel:
    """A tiny real one, whose stream fills all of its 64 dimensions."""
    return find_teacher(
        str(save_teacher(tmp_path_factory.mktemp("teacher") / request.param, request.param))
    ).load()


def student_of(teacher: PreTrainedModel, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_student(teacher.config, StudentArch(**(SHAPE | sizes))).eval()


@torch.no_grad()
def unexplained(student: PreTrainedModel, teacher: PreTrainedModel, layer: int = -1) -> float:
    """Share of the variance of the teacher's last layer, on held-out rows, beyond the best linear map from a layer."""
    num_ours, num_theirs = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    layer = num_ours - 1 if layer == -1 else layer
    x, y = (
        [view_of(model, row).real(at) for row in (*ROWS, HELD_OUT)]
        for model, at in ((student, layer), (teacher, num_theirs - 1))
    )
    weight = ridge_map(torch.cat(x[:-1]), torch.cat(y[:-1]), 1e-3)
    error = (x[-1].double() @ weight[:-1] + weight[-1] - y[-1]).square().mean()
    return float(error / y[-1].var(0, correction=0).mean())


@torch.no_grad()
def head_divergence(student: PreTrainedModel, teacher: PreTrainedModel, heads: list[int]) -> float:
    """Per token, of the first layer's maps from those of the teacher's heads that they were made from."""
    ours, theirs = view_of(student, HELD_OUT), view_of(teacher, HELD_OUT)
    maps = ours.attention(0), theirs.attention(0, torch.tensor(heads))
    return float(attention_divergence(*maps, ours.mask_BT) / ours.mask_BT.sum())


def started(student: PreTrainedModel, start: Start, teacher: PreTrainedModel) -> PreTrainedModel:
    start(student, teacher, ROWS)
    return student


@torch.no_grad()
def test_a_teacher_of_few_dimensions_is_followed_closely(low_rank):
    student = student_of(low_rank)
    assert narrow(student, low_rank, ROWS) == ((0, 1, 2, 3),) * 4
    assert (
        head_divergence(student, low_rank, [0, 1, 2, 3]) < 0.002
    )  # the first layer's maps are exact but for bfloat16
    # Not exact beyond: what goes into a layer norm is known but for its scale and shift.
    assert unexplained(student, low_rank) < 0.4
    assert unexplained(student, low_rank) < 0.5 * unexplained(
        started(student_of(low_rank), FromEmbeddings(), low_rank), low_rank
    )


@torch.no_grad()
def test_rows_that_remember_give_each_teacher_its_own(low_rank, monkeypatch):
    other = copy.deepcopy(low_rank)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    shared = CalibrationRows(ROWS)
    for teacher in (low_rank, other, low_rank, low_rank):
        ours, plain = student_of(teacher), student_of(teacher)
        assert narrow(ours, teacher, shared) == narrow(plain, teacher, ROWS)
        assert state_sha256(ours.state_dict()) == state_sha256(plain.state_dict())
    cov, computed = torch.cov, []
    monkeypatch.setattr(torch, "cov", lambda states: computed.append(len(states)) or cov(states))
    for num_layers in (4, 2):
        narrow(student_of(low_rank, num_hidden_layers=num_layers), low_rank, shared)
    assert low_rank.config.hidden_size not in computed  # those of the teacher's stream are known


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "odd"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("electra", {}),
        ("distilbert", {}),
        ("albert", {}),
        ("mpnet", {}),
        ("deberta-v2", {}),
        ("deberta-v2", {"share_att_key": False, "conv_kernel_size": 0}),
        ("deberta-v2", {"share_att_key": False, "pos_att_type": ["c2p"]}),
        ("deberta-v2", {"relative_attention": False}),
        ("modernbert", {}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ],
)
@pytest.mark.parametrize("num_layers", [4, 2])
def test_what_does_nothing_can_be_left_out_at_the_teacher_s_width(
    family, odd, num_layers, monkeypatch
):
    monkeypatch.setattr("kdnas.distillation.narrowing.autocast", lambda device: nullcontext())
    idle = build(family, **SHAPE | {"hidden_size": 64} | odd)
    names, generator = family_of(idle.config).names, torch.Generator().manual_seed(3)
    for module in idle.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.2, 2.0, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.5, generator=generator)
    living = copy.deepcopy(idle)
    dead = torch.randperm(64, generator=generator)[:32]
    for layer in family_of(idle.config).layers(idle):
        layer.get_submodule(names.attention_output).weight[:, 16:48] = 0  # heads 1 and 2 of four
        layer.get_submodule(names.output).weight[:, dead] = 0
    sizes = dict(
        num_hidden_layers=num_layers, hidden_size=64, num_attention_heads=2, intermediate_size=32
    )
    student = student_of(idle, **sizes)
    assert FromTeacher()(student, idle, ROWS).heads == ((0, 3),) * num_layers
    # One layer that is all layers cannot aim at others without a change where it is the first.
    is_bent = family == "albert" and num_layers < 4
    assert head_divergence(student, idle, [0, 3]) < (1e-2 if is_bent else 1e-5)
    ours, theirs = view_of(student, HELD_OUT), view_of(idle, HELD_OUT)
    for layer in range(-1, 4 if num_layers == 4 else 0):
        torch.testing.assert_close(ours.real(layer), theirs.real(layer), atol=0.03, rtol=0.01)
    if num_layers < 4:  # begun as layers 0 and 3, of which the first does the work of 1 and 2 too
        # One layer that is all layers does two at a time.
        for layer, end in ((0, 1 if family == "albert" else 2), (1, 3)):
            error, unmoved = (
                (v.real(layer) - theirs.real(end)).square().mean() for v in (ours, theirs)
            )
            assert error < 0.8 * unmoved
        return
    lacking = started(student_of(living, **sizes), FromTeacher(), living)
    error = (view_of(lacking, HELD_OUT).real(3) - view_of(living, HELD_OUT).real(3)).square().mean()
    assert error > 100 * (ours.real(3) - theirs.real(3)).square().mean()


@torch.no_grad()
def test_an_interrupted_narrowing_leaves_nothing_on_the_teacher(low_rank, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in low_rank.modules())

    before = hooks()  # transformers has some of its own
    monkeypatch.setattr("kdnas.distillation.narrowing.encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        narrow(student_of(low_rank), low_rank, ROWS)
    assert hooks() == before


@torch.no_grad()
@pytest.mark.parametrize(("num_heads", "size"), [(1, 32), (2, 16), (4, 8)])
def test_heads_smaller_or_larger_than_the_teacher_s_keep_its_maps(low_rank, num_heads, size):
    # Of the teacher's head size of 16 at most 8 dimensions are in use.
    student = student_of(low_rank, num_attention_heads=num_heads)
    assert student.config.hidden_size // num_heads == size
    heads = narrow(student, low_rank, ROWS)[0]
    assert len(set(heads)) == num_heads and sorted(heads) == list(heads)
    random = student_of(low_rank, num_attention_heads=num_heads)
    found = head_divergence(student, low_rank, list(heads))
    assert found < 0.002 and found < 0.2 * head_divergence(random, low_rank, list(heads))


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "albert", "mpnet", "deberta-v2", "modernbert"]
)
@pytest.mark.parametrize("num_teacher_heads", [8, 2])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_heads_of_a_real_teacher_of_any_size_are_kept(
    family, num_teacher_heads, num_heads, tmp_path
):
    sizes = dict(num_attention_heads=num_teacher_heads)
    if family == "deberta-v2":
        sizes |= dict(attention_head_size=64 // num_teacher_heads)
    other = find_teacher(str(save_teacher(tmp_path / family, family, **sizes))).load()
    student = student_of(other, num_attention_heads=num_heads)
    heads = list(narrow(student, other, ROWS)[0])
    wrong = [(head + 1) % num_teacher_heads for head in heads]
    found = head_divergence(student, other, heads)
    # At random, a table of distances has no few directions, and dimensions that turn nearly alike
    # have nothing in common.
    most = 0.5 if family in ("deberta-v2", "modernbert") else 0.4
    assert found < most * head_divergence(
        student_of(other, num_attention_heads=num_heads), other, heads
    )
    assert num_heads == num_teacher_heads or found < 0.5 * head_divergence(student, other, wrong)


@pytest.mark.parametrize("depth", [2, 4])
def test_narrowing_beats_the_embeddings_alone_on_a_real_teacher(teacher, depth):
    sizes = dict(
        num_hidden_layers=depth, num_attention_heads=2, hidden_size=48, intermediate_size=128
    )
    found = {
        type(start).__name__: unexplained(
            started(student_of(teacher, **sizes), start, teacher), teacher
        )
        for start in (FromTeacher(), FromEmbeddings(), RandomStart())
    }
    assert found["FromTeacher"] < 0.9 * min(found["FromEmbeddings"], found["RandomStart"])


@pytest.mark.parametrize("family", ["albert", "mpnet", "deberta-v2", "modernbert"])
def test_narrowing_beats_the_embeddings_alone_in_families_with_steps_of_their_own(family, tmp_path):
    teacher = find_teacher(str(save_teacher(tmp_path / family, family))).load()
    sizes = dict(num_hidden_layers=4, num_attention_heads=2, hidden_size=48, intermediate_size=128)
    found = {
        type(start).__name__: unexplained(
            started(student_of(teacher, **sizes), start, teacher), teacher
        )
        for start in (FromTeacher(), FromEmbeddings(), RandomStart())
    }
    assert found["FromTeacher"] < 0.85 * min(found["FromEmbeddings"], found["RandomStart"])


def test_the_start_is_that_of_narrow_and_deterministic_and_the_teacher_is_not_changed(teacher):
    before = state_sha256(teacher.state_dict())
    hashes = set()
    for seed in (0, 1):
        student = student_of(teacher, num_attention_heads=2)
        torch.manual_seed(seed)
        start = FromTeacher()(student, teacher, ROWS)
        hashes.add(state_sha256(student.state_dict()))
    assert len(hashes) == 1
    assert start.copied == frozenset() and start.heads == ((0, 1),) * 4
    assert state_sha256(teacher.state_dict()) == before
    assert not teacher.embeddings.LayerNorm._forward_hooks
    for parameter in student.parameters():
        assert parameter.requires_grad and parameter.is_leaf and parameter.isfinite().all()


@torch.no_grad()
def test_a_teacher_whose_states_are_beyond_float16_is_refused():
    teacher = build("bert", **SHAPE)
    family_of(teacher.config).layers(teacher)[2].output.LayerNorm.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"reach \d,\d{3},\d{3}. They .* largest number is 65,504"):
        narrow(build("bert", **SHAPE | {"hidden_size": 16}), teacher, ROWS)


@torch.no_grad()
def test_the_heads_that_move_the_stream_most_are_kept(low_rank):
    changed = build(
        low_rank.config.model_type, **{name: getattr(low_rank.config, name) for name in SHAPE}
    )
    changed.load_state_dict(low_rank.state_dict())
    names = family_of(changed.config).names
    for number, layer in enumerate(family_of(changed.config).layers(changed)):
        weight = layer.get_submodule(names.attention_output).weight
        for head in {0, 1, 2, 3} - {number, (number + 2) % 4}:
            weight[:, 16 * head : 16 * head + 16] *= 0.01
    student = student_of(changed, num_attention_heads=2)
    assert narrow(student, changed, ROWS) == ((0, 2), (1, 3), (0, 2), (1, 3))


@torch.no_grad()
def test_the_kept_heads_are_those_of_the_source_layers(low_rank):
    shallow = student_of(low_rank, num_hidden_layers=2, num_attention_heads=2)
    whole = student_of(low_rank, num_attention_heads=2)
    heads = narrow(whole, low_rank, ROWS)
    assert narrow(shallow, low_rank, ROWS) == tuple(heads[layer] for layer in kept_layers(2, 4))


@pytest.mark.parametrize("rank", [2, 3, 6, 9])
def test_the_best_factors_are_those_of_the_singular_value_decomposition(rank):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 6, generator=generator) for rows in (40, 30))
    less_left, less_right = _best_factors(left, right, rank)
    assert less_left.shape == (40, min(rank, 6)) and less_right.shape == (30, min(rank, 6))
    product = (left @ right.T).numpy()
    u, s, vh = np.linalg.svd(product)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] if rank < 6 else product
    np.testing.assert_allclose(less_left @ less_right.T, best, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("adds", [False, True])
def test_a_fitted_map_equals_scikit_learn_s_in_each_head_s_first_outputs(adds):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator) * torch.tensor([0.3, 1.0, 4.0, 2.0, 1.0]) + 1
    targets = torch.randn(60, 6, generator=generator) + inputs @ torch.randn(
        5, 6, generator=generator
    )
    linear = nn.Linear(5, 8)  # two heads of four; the teacher's are of three
    weight, bias, fitted = linear.weight.clone(), linear.bias.clone(), [0, 1, 2, 4, 5, 6]
    given = fit_linear(linear, inputs, targets, num_heads=2, strength=0.1, adds=adds)
    lacks = targets - (inputs @ weight[fitted].T + bias[fitted] if adds else 0)
    oracle = Ridge(alpha=float(0.1 * 60 * inputs.var(0, correction=0).mean())).fit(inputs, lacks)
    np.testing.assert_allclose(
        linear.weight[fitted] - weight[fitted] * adds, oracle.coef_, atol=1e-4
    )
    np.testing.assert_allclose(
        linear.bias[fitted] - bias[fitted] * adds, oracle.intercept_, atol=1e-4
    )
    assert torch.equal(linear.weight[[3, 7]], weight[[3, 7]]) and torch.equal(
        linear.bias[[3, 7]], bias[[3, 7]]
    )
    torch.testing.assert_close(given, linear(inputs))


@torch.no_grad()
def test_the_scale_and_shift_of_a_norm_are_those_of_a_line_through_each_dimension():
    generator = torch.Generator().manual_seed(0)
    before, target = (torch.randn(50, 6, generator=generator) for _ in range(2))
    target += 3 * before
    norm = nn.LayerNorm(6)
    given = _fit_norm(norm, before, target)
    normed = nn.LayerNorm(6)(before)
    for i in range(6):
        line = np.polyfit(normed[:, i].double(), target[:, i].double(), 1)
        np.testing.assert_allclose([norm.weight[i], norm.bias[i]], line, rtol=1e-4)
    torch.testing.assert_close(given, norm(before))
