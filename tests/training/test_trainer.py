"""How a Trainer is made and run: one device, its precision, clipped gradients, and nothing left behind."""

import os
import sys
import threading
import weakref
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.utils.data import DataLoader

from kdnas.cli.main import set_environment
from kdnas.system.errors import UserError
from kdnas.training.trainer import (
    ClipFusedGradients,
    TrainerSettings,
    fit,
    make_trainer,
    own_random_numbers,
    refuse_strategy,
    without_tensorflow,
)


class Data(pl.LightningDataModule):
    """Three batches."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.arange(24.0).view(12, 2), batch_size=4)


class Steep(ClipFusedGradients):
    """Its gradients are in the thousands."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = self.second(self.first(batch)).square().mean() * 100
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class Call(pl.Callback):
    """Calls back after each step."""

    def __init__(self, look) -> None:
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer, pl_module)


def fail(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise ZeroDivisionError


def settings(**values) -> TrainerSettings:
    return TrainerSettings(**({"accelerator": "cpu"} | values))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_norm_out_of_range_is_refused(value):
    message = f"^gradient_clip_val is {value}: give at least 0"
    with pytest.raises(UserError, match=message):
        TrainerSettings(gradient_clip_val=value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    TrainerSettings().check()
    monkeypatch.setenv("WORLD_SIZE", "1")
    TrainerSettings().check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError, match=r"^WORLD_SIZE is 4, .* give --workers .* `kdnas run` for DDP"
    ):
        TrainerSettings().check()


def test_random_numbers_are_our_own_without_a_warning_of_other_gpus(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", asked.append)
    own_random_numbers()
    monkeypatch.undo()
    assert asked == [[3]]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with own_random_numbers():
        torch.rand(1)
    assert torch.rand(1) == expected


def test_an_accelerator_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"^accelerator is 'tpu-9', "):
        TrainerSettings(accelerator="tpu-9").check()


def test_strategies_that_keep_a_student_whole_are_taken_and_all_others_refused():
    names = [*StrategyRegistry.available_strategies(), "auto", "model_parallel", "dpp"]
    refused = set()
    for name in names:
        try:
            refuse_strategy(name)
        except UserError as error:
            assert str(error).startswith(f"strategy is {name!r}, ") and "give 'ddp'" in str(error)
            refused.add(name)
    taken = set(names) - refused
    assert {"auto", "ddp", "single_device"} < taken
    assert all("ddp" in name for name in taken - {"auto", "single_device"})
    assert {"fsdp", "deepspeed", "deepspeed_stage_3", "xla", "model_parallel", "dpp"} <= refused


@pytest.mark.parametrize(
    "plugin",
    [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), HalfPrecision("16-true")],
)
def test_a_precision_in_float16_is_refused_before_the_first_step(tmp_path, plugin):
    steps = []
    look = Call(lambda trainer, module: steps.append(module))
    trainer = make_trainer(settings(), tmp_path / "fit", 1, [look])
    trainer.strategy.precision_plugin = plugin
    with pytest.raises(
        UserError,
        match=f"^precision is '{plugin.precision}', whose gradients need scaling: give 'bf16-mixed'",
    ):
        fit(trainer, Steep(), Data())
    assert not steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_a_fused_optimizer_are_clipped_together(tmp_path, precision):
    for clip, expected in ((0.5, 0.5), (0.0, None)):
        norms = []

        def look(trainer, module, norms=norms):
            assert trainer.optimizers[0].defaults["fused"]
            norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

        trainer = make_trainer(
            settings(precision=precision, gradient_clip_val=clip), tmp_path / "fit", 2, [Call(look)]
        )
        fit(trainer, Steep(), Data())
        assert len(norms) == 6
        if expected:
            assert norms == pytest.approx([expected] * 6, rel=1e-3)
        else:
            assert min(norms) > 100


def test_float32_matmuls_are_tf32_on_a_gpu_unless_the_user_has_said_no(monkeypatch):
    assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
    set_environment()
    assert os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)]
)
def test_the_precision_is_the_one_asked_for(tmp_path, precision, dtype):
    seen = []

    def look(trainer, module):
        with trainer.precision_plugin.forward_context():
            seen.append(module.first(torch.ones(1, 2)).dtype)

    trainer = make_trainer(settings(precision=precision), tmp_path / "fit", 1, [Call(look)])
    fit(trainer, Steep(), Data())
    assert seen == [dtype] * 3


def test_what_a_step_raises_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(make_trainer(settings(), tmp_path / "fit", 1, [Call(fail)]), Steep(), Data())


def test_a_trainer_logs_to_the_folder_and_saves_nothing(tmp_path):
    folder = tmp_path / "runs" / "trial_0007"
    trainer = make_trainer(settings(), folder, 2)
    fit(trainer, Steep(), Data())
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"events", "hparams"}
    assert trainer.checkpoint_callback is None and trainer.progress_bar_callback is None
    assert trainer.global_step == 6


def test_the_event_file_of_an_interrupted_fit_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "fit"
    with pytest.raises(ZeroDivisionError):
        fit(make_trainer(settings(), folder, 1, [Call(fail)]), Steep(), Data())
    (stale,) = folder.glob("events.out.tfevents.*")
    kept = [
        folder / "result.json",
        folder / "checkpoints" / "last.ckpt",
        tmp_path / "events.out.tfevents.other",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    fit(make_trainer(settings(), folder, 1), Steep(), Data())
    assert not stale.exists() and all(path.exists() for path in kept)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_the_memory_of_an_earlier_fit_is_given_back_before_the_next_one(tmp_path):
    first = Steep()
    fit(make_trainer(settings(), tmp_path / "fit", 1), first, Data())
    earlier = weakref.ref(first)
    del first
    assert earlier() is not None, "module and trainer refer to each other"
    seen = []
    look = Call(lambda trainer, module: seen.append(earlier()))
    fit(make_trainer(settings(), tmp_path / "fit", 1, [look]), Steep(), Data())
    assert seen == [None] * 3


def test_tensorboard_looks_for_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(__version__="theirs"))
    for name in [name for name in sys.modules if name.startswith("tensorboard.compat")]:
        monkeypatch.delitem(sys.modules, name)
    without_tensorflow()
    from tensorboard.compat import tf

    assert tf.__version__ != "theirs"


def test_a_writer_that_a_signal_has_torn_is_closed(tmp_path):
    """Its reader looks by itself where Python's queue was cut short in the middle of telling it."""
    trainer = make_trainer(TrainerSettings(), tmp_path / "fit", 1)
    writer = trainer.logger.experiment
    writer.add_scalar("loss", 0.5, 0)
    writer.flush()
    told = writer.file_writer.event_writer._async_writer._byte_queue.not_empty
    torn = threading.Lock()
    torn.acquire()
    with told:
        told._waiters.appendleft(torn)  # notified already, and not yet taken off the list
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()
