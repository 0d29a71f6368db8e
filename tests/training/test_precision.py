"""Which precision is taken where none is given."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from kdnas.system.errors import UserError
from kdnas.training import precision
from kdnas.training.precision import (
    VARIABLE,
    autocast,
    autocast_dtype,
    bf16_is_faster,
    keep,
    trainer_precision,
)
from kdnas.training.trainer import TrainerSettings, make_trainer


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that what a test leaves there is taken back
    monkeypatch.delenv(VARIABLE)


@pytest.fixture(params=[True, False], ids=["bfloat16 is faster", "float32 is faster"])
def bf16_wins(request, monkeypatch) -> bool:
    """A machine on which one of them takes half the time of the other."""
    monkeypatch.setattr(
        precision,
        "_seconds",
        lambda: {torch.bfloat16: 1.0, torch.float32: 2.0 if request.param else 0.5},
    )
    return request.param


def test_a_cpu_takes_what_it_multiplies_faster_and_what_is_given_is_kept(bf16_wins, tmp_path):
    def found(**settings) -> str:
        return make_trainer(TrainerSettings("cpu", **settings), tmp_path, 1).precision

    assert found() == trainer_precision("cpu") == ("bf16-mixed" if bf16_wins else "32-true")
    assert (found(precision="32-true"), found(precision="bf16-mixed")) == ("32-true", "bf16-mixed")
    assert trainer_precision("gpu") == "bf16-mixed"
    with autocast("cpu"):
        computed_in = nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
    assert computed_in == autocast_dtype("cpu") == (torch.bfloat16 if bf16_wins else torch.float32)


def test_where_a_gpu_is_seen_auto_does_not_ask_the_cpu(bf16_wins, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert trainer_precision("auto") == "bf16-mixed"


def test_it_is_measured_once_without_a_trace_in_what_is_drawn_next(monkeypatch):
    measured, seconds = [], precision._seconds
    monkeypatch.setattr(precision, "_seconds", lambda: measured.append(seconds()) or measured[-1])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert bf16_is_faster("cpu") == bf16_is_faster("cpu")
    assert torch.rand(1) == expected
    assert len(measured) == 1 and set(measured[0]) == {torch.bfloat16, torch.float32}


def test_child_processes_take_what_their_parent_found(bf16_wins):
    """Two ranks that measured for themselves on busy cores once found different ones, and stored the states twice."""
    bf16_is_faster("cpu")
    code = "from kdnas.training import precision; precision._seconds = None; print(precision.trainer_precision('cpu'))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == ("bf16-mixed" if bf16_wins else "32-true")


def test_what_is_gone_on_with_stays_as_it_was_begun(bf16_wins, monkeypatch, caplog):
    assert keep(None) == ("bfloat16" if bf16_wins else "float32")
    for begun_in in ("float32", "bfloat16"):
        monkeypatch.delenv(VARIABLE, raising=False)
        assert keep(begun_in) == begun_in and not caplog.text
        assert bf16_is_faster("cpu") == (begun_in == "bfloat16")
    assert (
        keep("float32") == "float32"
        and "begun with matmuls in float32, and continues with them, not in bfloat16" in caplog.text
    )


def test_what_the_environment_gives_is_taken_or_refused(bf16_wins, monkeypatch):
    monkeypatch.setenv(VARIABLE, "float32")
    assert not bf16_is_faster("cpu") and bf16_is_faster("cuda")
    monkeypatch.setenv(VARIABLE, "float16")
    with pytest.raises(UserError, match="KDNAS_CPU_MATMULS is 'float16': give bfloat16 or float32"):
        bf16_is_faster("cpu")
