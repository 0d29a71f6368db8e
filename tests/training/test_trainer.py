import errno
import gc
import os
import resource
import signal
import sys
import tempfile
import threading
import time
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
from kdnas.system.signals import HungUp, Terminated, honest_signals, let_go
from kdnas.training.trainer import (
    ClipFusedGradients,
    KeepLast,
    TrainerSettings,
    fit,
    make_trainer,
    one_error,
    refuse_strategy,
    settled_memory,
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


def settings(**values) -> TrainerSettings:
    return TrainerSettings(**({"accelerator": "cpu"} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"devices": 2},
            r"^devices is 2: .* run more workers on one study, or use DDP in `kdnas fit`",
        ),
        ({"devices": 0}, "^devices is 0: "),
        (
            {"strategy": "ddp"},
            r"^strategy is 'ddp': .* run more workers on one study, or use DDP in `kdnas fit`",
        ),
        ({"gradient_clip_val": -1.0}, "^gradient_clip_val is -1.0: give at least 0"),
        ({"gradient_clip_val": float("nan")}, "^gradient_clip_val is nan: "),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        TrainerSettings(**values)


def test_several_processes_are_refused(monkeypatch):
    for size in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv(
            "WORLD_SIZE", raising=False
        )
        TrainerSettings().check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^WORLD_SIZE is 4: .* run more workers on one study"):
        TrainerSettings().check()


def test_an_accelerator_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"^accelerator is 'tpu-9': "):
        TrainerSettings(accelerator="tpu-9").check()


def test_strategies_that_keep_a_student_whole_are_taken_and_all_others_refused():
    names = [*StrategyRegistry.available_strategies(), "auto", "model_parallel", "dpp"]
    refused = set()
    for name in names:
        try:
            refuse_strategy(name)
        except UserError as error:
            assert str(error).startswith(f"strategy is {name!r}: give 'ddp'")
            refused.add(name)
    taken = set(names) - refused
    assert {"auto", "ddp", "single_device"} < taken and all(
        "ddp" in name for name in taken - {"auto", "single_device"}
    )
    assert {
        "fsdp",
        "fsdp_cpu_offload",
        "deepspeed",
        "deepspeed_stage_3",
        "xla",
        "model_parallel",
        "dpp",
    } <= refused


@pytest.mark.parametrize(
    "plugin",
    [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), HalfPrecision("16-true")],
)
def test_a_precision_in_float16_is_refused_before_the_first_step(tmp_path, plugin):
    steps = []
    trainer = make_trainer(
        settings(), tmp_path / "fit", 1, [Call(lambda trainer, module: steps.append(module))]
    )
    trainer.strategy.precision_plugin = plugin
    with pytest.raises(UserError, match=f"^precision is '{plugin.precision}': take 'bf16-mixed'"):
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


def test_the_precision_is_the_one_asked_for(tmp_path):
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        seen = []

        def look(trainer, module, seen=seen):
            with trainer.precision_plugin.forward_context():
                seen.append(module.first(torch.ones(1, 2)).dtype)

        fit(
            make_trainer(settings(precision=precision), tmp_path / "fit", 1, [Call(look)]),
            Steep(),
            Data(),
        )
        assert seen == [dtype] * 3


def test_random_numbers_of_a_gpu_go_on_too(tmp_path, monkeypatch):
    kept, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    for was_there, is_there in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=was_there: found)
        state = KeepLast(tmp_path / "last.ckpt").state_dict()
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_there: found)
        resumed = KeepLast(tmp_path / "last.ckpt")
        resumed.load_state_dict(state)
        resumed.on_train_start(None, None)
        resumed.on_train_end(None, None)
        assert torch.equal(torch.get_rng_state(), state["random"])
    assert given == [kept]  # not where either has no GPU


def interrupt(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise KeyboardInterrupt


def leave(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise SystemExit(3)


def fail(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    raise ZeroDivisionError


def test_ctrl_c_is_a_keyboard_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(settings(), tmp_path / "fit", 1, [Call(interrupt)]), Steep(), Data())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_terminations_are_told_from_ctrl_c_within_a_fit_and_outside(number, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # where Lightning would queue the job again
    kill = Call(lambda trainer, module: os.kill(os.getpid(), number))
    with pytest.raises(Terminated):
        fit(make_trainer(settings(), tmp_path / "fit", 1, [kill]), Steep(), Data())
    with pytest.raises(Terminated):
        fit(
            make_trainer(settings(), tmp_path / "fit", 1, [KeepLast(tmp_path / "last.ckpt"), kill]),
            Steep(),
            Data(),
        )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    with pytest.raises(Terminated) as stopped, honest_signals():
        os.kill(os.getpid(), number)
    assert (stopped.type is HungUp) == (number == signal.SIGHUP)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so_and_one_that_is_told_twice_is_one(tmp_path, monkeypatch):
    hang_up = Call(lambda trainer, module: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(
            make_trainer(
                settings(), tmp_path / "fit", 1, [KeepLast(tmp_path / "last.ckpt"), hang_up]
            ),
            Steep(),
            Data(),
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(HungUp):
        keep = KeepLast(tmp_path / "last.ckpt")
        fit(
            make_trainer(settings(), tmp_path / "fit", 1, [keep, hang_up, hang_up]), Steep(), Data()
        )
    assert (tmp_path / "last.ckpt").exists()


class Deaf:
    """Its finaliser is where the signal comes: Python prints the exception, and goes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning"
)  # nor is a traceback shown
@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_python_swallows_is_noticed_at_the_next_batch(number, end, tmp_path):
    steps = []
    count = Call(lambda trainer, module: steps.append(trainer.global_step))
    with pytest.raises(KeyboardInterrupt) as stopped, honest_signals():
        Deaf(number)
        fit(make_trainer(settings(), tmp_path / "fit", 1, [count]), Steep(), Data())
    assert stopped.type is end and steps == [1]
    fit(make_trainer(settings(), tmp_path / "fit", 1), Steep(), Data())  # it was for that one alone


def test_a_worker_hears_once():
    """The process that started it says again what its process group has heard; what it ends meanwhile is ended."""
    ended = []
    with pytest.raises(KeyboardInterrupt) as stopped, honest_signals(once=True):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(1)
    assert ended and stopped.type is KeyboardInterrupt


def test_a_second_signal_does_not_wait_for_the_end_of_the_step(tmp_path):
    def twice(trainer, module):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it waited")

    with pytest.raises(Terminated):
        fit(
            make_trainer(settings(), tmp_path / "fit", 1, [KeepLast(tmp_path / "a"), Call(twice)]),
            Steep(),
            Data(),
        )
    assert not (tmp_path / "a").exists()


def test_other_ends_are_left_as_they_are(tmp_path):
    with pytest.raises(SystemExit) as stop:
        fit(make_trainer(settings(), tmp_path / "fit", 1, [Call(leave)]), Steep(), Data())
    assert stop.value.code == 3
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


@pytest.mark.parametrize("num_whole_epochs", [1, 2])
def test_a_fit_goes_on_after_its_last_whole_epoch_and_ends_as_an_unbroken_one(
    tmp_path, num_whole_epochs
):
    def interrupt_later(trainer, module):
        if trainer.current_epoch == num_whole_epochs and trainer.global_step % 3 == 2:
            raise KeyboardInterrupt

    last, whole, begun, resumed = tmp_path / "kept" / "last.ckpt", Steep(), Steep(), Steep()
    fit(make_trainer(settings(), tmp_path / "whole", 3), whole, Data())
    with pytest.raises(KeyboardInterrupt):
        fit(
            make_trainer(settings(), tmp_path / "fit", 3, [KeepLast(last), Call(interrupt_later)]),
            begun,
            Data(),
        )
    assert list(last.parent.iterdir()) == [last]
    steps = []
    look = Call(lambda trainer, module: steps.append((trainer.current_epoch, trainer.global_step)))
    fit(
        make_trainer(settings(), tmp_path / "fit", 3, [KeepLast(last), look]),
        resumed,
        Data(),
        ckpt_path=last,
    )
    assert steps == [(step // 3, step + 1) for step in range(3 * num_whole_epochs, 9)]
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_that_the_disk_cannot_take_leaves_the_one_before_and_nothing_else(
    tmp_path, monkeypatch
):
    last = tmp_path / "last.ckpt"
    fit(make_trainer(settings(), tmp_path / "fit", 1, [KeepLast(last)]), Steep(), Data())
    before = last.read_bytes()
    torch.load(last, weights_only=True)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = set(tmp_path.rglob("*"))

    def fill(trainer, module):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))

    try:
        with pytest.raises(OSError, match="File too large") as full:
            fit(
                make_trainer(settings(), tmp_path / "fit", 1, [Call(fill), KeepLast(last)], True),
                Steep(),
                Data(),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert full.value.filename in (str(last), str(tmp_path / "fit"))
    assert last.read_bytes() == before
    assert {path for path in tmp_path.rglob("*") if "tfevents" not in path.name} <= files


def test_the_event_file_of_an_interrupted_fit_is_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "fit"
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(settings(), folder, 1, [Call(interrupt)]), Steep(), Data())
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


def test_what_is_there_already_is_not_looked_through_and_garbage_made_within_is_freed():
    class Node:
        pass

    def garbage() -> weakref.ref:
        node = Node()
        node.itself = node
        return weakref.ref(node)

    tests_own = gc.get_freeze_count()
    gc.unfreeze()
    try:
        before = garbage()
        with settled_memory():
            assert before() is None and gc.get_freeze_count() > 10_000
            with settled_memory():
                pass
            assert gc.get_freeze_count() > 10_000, "the inner one changes nothing"
            within = garbage()
            gc.collect()
            assert within() is None
        assert gc.get_freeze_count() == 0
    finally:
        if tests_own:
            gc.freeze()


def test_a_writer_that_fails_after_all_is_told_in_no_traceback(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    for _ in range(2):
        with one_error(tmp_path):
            pass

    class _AsyncWriterThread(threading.Thread):  # TensorBoard's, by its name
        def run(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    class Another(_AsyncWriterThread):
        pass

    for kind in (_AsyncWriterThread, Another):
        thread = kind()
        thread.start()
        thread.join()
    assert [type(args.thread) for args in told] == [Another]


def test_tensorboard_looks_for_no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(__version__="theirs"))
    for name in [name for name in sys.modules if name.startswith("tensorboard.compat")]:
        monkeypatch.delitem(sys.modules, name)
    without_tensorflow()
    from tensorboard.compat import tf

    assert tf.__version__ != "theirs"


def test_what_a_signal_tears_is_let_go_without_a_word(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def broken():
        try:
            yield
        finally:
            raise ValueError("closed already")

    def torn():
        held = broken()
        next(held)
        raise KeyboardInterrupt

    for is_let_go in (True, False):
        try:
            torn()
        except KeyboardInterrupt as stop:
            if is_let_go:
                let_go(stop)
        assert len(told) == (0 if is_let_go else 1)


def test_a_writer_that_a_signal_has_torn_is_closed(tmp_path):
    """What Python's queue was told in the middle of which a signal came, its reader sees when it looks by itself."""
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
