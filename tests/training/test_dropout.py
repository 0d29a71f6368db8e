import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdnas.training.dropout import dropout, fast_dropout


def test_so_many_are_dropped_and_the_mean_stays():
    ones = torch.ones(3, 50_001, requires_grad=True)
    torch.manual_seed(0)
    dropped = dropout(ones, 0.1)
    assert dropped.unique().tolist() == pytest.approx([0, 256 / 230])
    assert float((dropped == 0).float().mean()) == pytest.approx(26 / 256, abs=0.003)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.003)
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach()), "the same values are dropped on the way back"
    torch.manual_seed(0)
    assert torch.equal(dropout(ones, 0.1), dropped), "torch's own generator decides"
    assert not torch.equal(dropout(ones, 0.1), dropped)
    assert dropout(ones.bfloat16(), 0.1).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_modules_and_functions_take_it_while_a_fit_lasts(training):
    ones, module = torch.ones(10_000), nn.Dropout(0.1).train(training)
    with fast_dropout():
        for found in (module(ones), F.dropout(ones, 0.1, training)):
            assert found.max() == pytest.approx(256 / 230 if training else 1)
    assert module(ones).max() == pytest.approx(1 / 0.9 if training else 1)


def test_nothing_is_dropped_by_a_rate_of_0_and_all_by_1():
    ones = torch.ones(100)
    assert torch.equal(dropout(ones, 0.0), ones) and not dropout(ones, 1.0).any()
