import copy
import re

import pytest
import torch
from torch import nn

from kdnas.system.errors import UserError
from kdnas.training import optimizers
from kdnas.training.optimizers import (
    JointOptimizer,
    Muon,
    adam_by_rows,
    clip_norm,
    is_layer_matrix,
    orthogonalised,
)
from kdnas.training.precision import DTYPES, VARIABLE


def make() -> tuple[nn.Linear, JointOptimizer]:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    adamw = torch.optim.AdamW([linear.bias], lr=0.1, weight_decay=0.0, fused=True)
    matrices = [{"params": [linear.weight], "lr": 0.02}]
    return linear, JointOptimizer([adamw, Muon(matrices, weight_decay=0.0)])


def step(linear: nn.Linear, optimizer: JointOptimizer, seed: int) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    linear(inputs).square().sum().backward()
    optimizer.step()


def test_a_matrix_moves_alike_in_every_direction_by_the_size_of_adamws_step():
    linear, optimizer = make()
    before, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    step(linear, optimizer, 1)
    moved = before - linear.weight.detach()
    # Orthogonalised in bfloat16: singular values near 1, times 0.2 * sqrt(6) * 0.02.
    singular = torch.linalg.svdvals(moved) / (0.2 * 6**0.5 * 0.02)
    assert singular.min() > 0.45 and singular.max() < 1.55
    torch.testing.assert_close(
        (linear.bias.detach() - bias).abs(), torch.full((4,), 0.1), rtol=1e-3, atol=0
    )


def test_with_its_polynomials_and_margin_it_is_torchs(monkeypatch):
    monkeypatch.setattr(optimizers, "MARGIN", 1.0)
    monkeypatch.setenv(VARIABLE, "bfloat16")  # as torch's
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (24, 8), (8, 24), (8, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    torchs = [(3.4445, -4.775, 2.0315)] * 5
    one = Muon([{"params": ours, "lr": 0.02}], weight_decay=0.1, steps=torchs)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for parameter, its in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn(parameter.shape)
            its.grad = parameter.grad.clone()
        ours[-1].grad = theirs[-1].grad = None
        one.step()
        other.step()
    for parameter, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, its, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (40, 12)])
def test_singular_values_end_near_1_and_their_vectors_stay(shape, precision, monkeypatch):
    monkeypatch.setenv(VARIABLE, precision)
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    matrices[2] = torch.outer(matrices[2, :, 0], matrices[2, 0])  # all of its norm in one
    found = orthogonalised(matrices)
    assert found.dtype == DTYPES[precision]
    found = found.float()
    u, before, vh = torch.linalg.svd(matrices, full_matrices=False)
    after = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
    is_large = before > 0.005 * before.norm(dim=1, keepdim=True)
    assert after[is_large].min() > 0.45 and after.max() < 1.6


def test_a_schedule_reaches_both_and_a_checkpoint_goes_on_with_equal_weights():
    linear, optimizer = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    step(linear, optimizer, 1)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.05, 0.01]
    saved, weights = (
        copy.deepcopy(optimizer.state_dict()),
        {k: v.clone() for k, v in linear.state_dict().items()},
    )
    step(linear, optimizer, 2)
    other, resumed = make()
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert [group["lr"] for group in resumed.param_groups] == [0.05, 0.01]
    step(other, resumed, 2)
    torch.testing.assert_close(other.weight, linear.weight, rtol=0, atol=0)
    torch.testing.assert_close(other.bias, linear.bias, rtol=0, atol=0)


def test_another_optimizer_goes_on_with_what_one_knew_at_its_own_rates():
    linear, optimizer = make()
    for seed in (1, 2):
        step(linear, optimizer, seed)
    known = {name: tensor.clone() for name, tensor in optimizer.tensors(linear).items()}
    assert set(known) == {"weight/momentum_buffer", "bias/step", "bias/exp_avg", "bias/exp_avg_sq"}
    assert known["bias/step"] == 2
    other, fresh = make()
    assert fresh.tensors(other) == {}
    other.load_state_dict(linear.state_dict())
    fresh.param_groups[0]["lr"] = 0.3
    fresh.load_tensors(other, {name: tensor.clone() for name, tensor in known.items()})
    assert all(torch.equal(tensor, known[name]) for name, tensor in fresh.tensors(other).items())
    assert [group["lr"] for part in fresh.parts for group in part.param_groups] == [0.3, 0.02]
    fresh.param_groups[0]["lr"] = 0.1
    for one, its in ((linear, optimizer), (other, fresh)):
        step(one, its, 3)
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)


@pytest.mark.parametrize(
    ("place", "shape"), [("other/exp_avg", (4,)), ("bias/exp_avg", (5,)), ("bias", ())]
)
def test_what_was_known_of_another_student_is_refused(place, shape):
    linear, optimizer = make()
    with pytest.raises(
        UserError,
        match=re.escape(
            f"The optimizer state {place!r}, of shape {shape}, does not fit this student"
        ),
    ):
        optimizer.load_tensors(linear, {place: torch.zeros(shape)})


def test_the_closure_is_called_once_with_gradients():
    linear, optimizer = make()
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        linear(torch.ones(1, 6)).sum().backward()
        return 3.0

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert calls == [True]


def test_a_table_of_words_moves_by_the_rows_of_a_batch_and_its_norm_is_clipped_with_the_others():
    dense, sparse = nn.Embedding(5, 3), nn.Embedding(5, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    linear = nn.Linear(3, 1, bias=False)
    norms, tables = [], []
    for table in (dense, sparse):
        linear.zero_grad()
        linear(table(torch.tensor([1, 4, 4]))).square().sum().mul(100).backward()
        norms.append(clip_norm([table.weight, linear.weight], 1.0))
        assert nn.utils.get_total_norm([linear.weight.grad]) < 1
        tables.append(table.weight.grad.to_dense())
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(tables[0], tables[1])
    before = sparse.weight.detach().clone()
    groups = [{"params": sparse.parameters(), "lr": 0.1}]
    optimizer = JointOptimizer([adam_by_rows(groups)])
    optimizer.step()
    moved = (sparse.weight.detach() != before).any(1)
    assert moved.tolist() == [False, True, False, False, True]
    known = optimizer.tensors(sparse)
    assert {name: tensor.shape for name, tensor in known.items()} == {
        "weight/step": (),
        "weight/exp_avg": (5, 3),
        "weight/exp_avg_sq": (5, 3),
    }
    fresh = JointOptimizer([adam_by_rows(groups)])
    fresh.load_tensors(sparse, known)
    fresh.step()
    assert fresh.tensors(sparse)["weight/step"] == 2


def test_the_word_of_one_batch_moves_by_rows_as_far_as_a_dense_adam_moves_it():
    moved = []
    for is_sparse in (False, True):
        table = nn.Embedding(2, 1, sparse=is_sparse)
        nn.init.zeros_(table.weight)
        groups = [{"params": [table.weight], "lr": 1.0}]
        optimizer = adam_by_rows(groups) if is_sparse else torch.optim.Adam(groups)
        for step in range(400):
            optimizer.zero_grad()
            table(torch.tensor([int(step == 300)])).sum().backward()
            optimizer.step()
        moved.append(table.weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [
        ("student.encoder.layer.0.output.dense.weight", (4, 4), True),
        ("student.encoder.layer.0.output.dense.bias", (4,), False),
        ("student.embeddings.word_embeddings.weight", (4, 4), False),
        ("student.encoder.embedding_hidden_mapping_in.weight", (4, 4), False),
        ("criterion.projections.0.weight", (4, 4), False),
    ],
)
def test_muon_takes_the_matrices_of_layers_alone(name, shape, answer):
    assert is_layer_matrix(name, nn.Parameter(torch.zeros(shape))) is answer
