"""Each callback around a fit of a module that does next to nothing."""

import math
import threading
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import optuna
import pytest
import torch
from filelock import ReadWriteLock, Timeout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig

from kdnas.deploy.latency import ArchLatency, Latency, LatencyMeter, LatencySettings
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.models.arch import StudentArch
from kdnas.nas.callbacks import (
    HoldStill,
    LatencyAfterFit,
    PruneByHeldOutLoss,
    RewardAfterFit,
    TrainingLoss,
)
from kdnas.nas.reward import reward
from kdnas.system.errors import CandidateFailed
from kdnas.system.jobs import Reporter, Stopped, progress_of
from kdnas.training.trainer import TrainerSettings, make_trainer

ARCH = StudentArch(
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_size=32,
    intermediate_size=64,
    hidden_act="relu",
)
CPU = TrainerSettings(accelerator="cpu", precision="32-true")
STEPS = 4  # of an epoch


class Tiny(HiddenStateDistillModule):
    """One weight; the losses of its steps and the held-out losses of its epochs are given."""

    def __init__(self, held_out: list[float], losses: dict[int, float] | None = None) -> None:
        pl.LightningModule.__init__(self)
        self.weight = nn.Parameter(torch.ones(()))
        self.arch, self.history = ARCH, []
        self.held_out, self.losses = held_out, losses or {}

    def setup(self, stage: str | None = None) -> None:
        pass

    def configure_callbacks(self) -> list[pl.Callback]:
        return []

    def on_train_start(self) -> None:
        pass

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * self.losses.get(self.global_step, 0.5)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        loss = 99.0 if self.trainer.sanity_checking else self.held_out[self.current_epoch]
        self.log("val_loss", loss)
        self.history.append({"epoch": self.current_epoch, "loss": loss, "contextual_share": 0.25})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(
    folder: Path, module: Tiny, *callbacks: pl.Callback, sanity: int = 0, logs: bool = True
) -> None:
    trainer = make_trainer(CPU, folder / "trial_0000", len(module.held_out), callbacks)
    trainer.num_sanity_val_steps = sanity
    if not logs:
        trainer.loggers = []
    rows = DataLoader(range(STEPS))
    still = next((one for one in callbacks if isinstance(one, HoldStill)), nullcontext())
    with still:
        trainer.fit(module, rows, rows)


@pytest.fixture
def meter(monkeypatch) -> LatencyMeter:
    """A meter that must not measure."""
    monkeypatch.setattr("kdnas.deploy.latency.measure_latency", None)
    return LatencyMeter(BertConfig(), LatencySettings())


def remembered(
    meter: LatencyMeter, student_ms: float = 2.0, teacher_ms: float = 10.0
) -> ArchLatency:
    value = ArchLatency(Latency(student_ms, 0.1, 9), Latency(teacher_ms, 0.2, 9), 1234)
    meter.remember(ARCH, value)
    return value


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_fit_within_some_steps_and_names_its_own(tmp_path, loss):
    module = Tiny([0.5, 0.5], {5: loss})
    with pytest.raises(CandidateFailed, match=f"the training loss is {loss} at step 6"):
        fit(tmp_path, module, TrainingLoss())
    assert module.global_step == 2 * STEPS  # LOOK_STEPS later, or at the end of the epoch
    assert len(module.history) == 1


def test_a_finite_loss_however_large_ends_nothing(tmp_path):
    module = Tiny([0.5], {1: 1e30, 2: -1e30})
    fit(tmp_path, module, TrainingLoss())
    assert module.global_step == STEPS


def test_without_a_pruner_nothing_is_reported(tmp_path):
    callback = PruneByHeldOutLoss(None)
    fit(tmp_path, Tiny([0.75, 0.5]), callback, sanity=1)
    assert callback.reports == {}


def answered(folder: Path, *answers: str) -> PruneByHeldOutLoss:
    """The callback, whose questions are answered already."""
    for answer in answers:
        (folder / answer).touch()
    return PruneByHeldOutLoss(Reporter(folder))


def test_the_held_out_score_of_each_epoch_is_reported_and_the_last_is_not_asked_about(tmp_path):
    callback, module = answered(tmp_path, "go_on_0", "go_on_1"), Tiny([0.75, 0.5, 1.25])
    fit(tmp_path, module, callback, sanity=1)
    assert callback.reports == {"0": 0.25, "1": 0.5, "2": -0.25}
    assert progress_of(tmp_path) == {"reports": {"0": 0.25, "1": 0.5}}
    assert module.global_step == 3 * STEPS


def test_the_fit_ends_where_the_pruner_says_so(tmp_path):
    callback, module = answered(tmp_path, "go_on_0", "prune_1"), Tiny([0.5, 0.75, 0.1])
    with pytest.raises(optuna.TrialPruned, match=r"^held-out loss 0\.7500 after epoch 2 of 3$"):
        fit(tmp_path, module, callback)
    assert module.global_step == 2 * STEPS


def test_a_candidate_that_waits_for_the_pruner_can_be_stopped(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, Tiny([0.5, 0.75]), answered(tmp_path, "stop"))


def test_a_loss_that_is_no_number_is_not_the_pruners(tmp_path):
    callback = answered(tmp_path)
    fit(tmp_path, Tiny([math.inf, 0.5]), callback)
    assert progress_of(tmp_path) == {} and callback.reports["1"] == 0.5


def rewarding(
    folder: Path, meter: LatencyMeter, loss: str = "held_out", alpha: float = -0.06
) -> list[pl.Callback]:
    """The callbacks of a candidate that end with its reward."""
    training, still = TrainingLoss(), HoldStill(ReadWriteLock(folder / "stillness.lock"))
    latency = LatencyAfterFit(meter, still)
    return [training, still, latency, RewardAfterFit(loss, training, latency, alpha, beta=0.6)]


def test_the_latency_is_measured_after_the_fit_while_the_others_hold_still(
    tmp_path, meter, monkeypatch
):
    lock = ReadWriteLock(tmp_path / "stillness.lock")
    other = ReadWriteLock(tmp_path / "stillness.lock", is_singleton=False)
    value, measured = remembered(meter), []

    def measure(arch: StudentArch) -> ArchLatency:
        with pytest.raises(Timeout):
            other.acquire_read(timeout=0)
        measured.append(module.global_step)
        return value

    monkeypatch.setattr(meter, "measure", measure)
    module, still = Tiny([0.5]), HoldStill(lock)
    callback = LatencyAfterFit(meter, still)
    fit(tmp_path, module, still, callback)
    assert callback.latency is value and measured == [STEPS]


def test_whoever_wants_to_measure_need_not_wait_for_a_start(tmp_path):
    lock = ReadWriteLock(tmp_path / "stillness.lock")
    other = ReadWriteLock(tmp_path / "stillness.lock", is_singleton=False)
    measured = threading.Event()

    def measure() -> None:
        with other.write_lock():
            measured.set()

    class Started(Tiny):
        def setup(self, stage: str) -> None:
            measuring.start()
            for _ in range(500):
                nn.Linear(2, 2)(torch.ones(2))
                if measured.wait(0.01):
                    return
            pytest.fail("nobody gave way")

    measuring = threading.Thread(target=measure, daemon=True)
    still = HoldStill(lock)
    fit(tmp_path, Started([0.5]), still)
    with other.write_lock(timeout=1):
        nn.Linear(2, 2)(torch.ones(2))  # the lock is not asked for any more


def test_the_reward_is_that_of_the_last_epoch_and_the_latency(tmp_path, meter):
    remembered(meter, 2.0, 10.0)
    *others, rewarded = rewarding(tmp_path, meter, alpha=-0.5)
    assert math.isnan(rewarded.reward)
    fit(tmp_path, Tiny([0.9, 0.2]), *others, rewarded)
    assert rewarded.reward == reward(0.2, 2.0, 10.0, -0.5) == pytest.approx(0.8 * 3**0.5)


def test_the_rewards_loss_may_be_the_last_epochs_mean_training_loss(tmp_path, meter):
    remembered(meter, 2.0, 10.0)
    *others, rewarded = rewarding(tmp_path, meter, "train")
    fit(tmp_path, Tiny([0.9, 0.2], {4: 0.1, 5: 0.3}), *others, rewarded)
    assert rewarded.reward == pytest.approx(reward((0.1 + 0.3 + 0.5 + 0.5) / 4, 2.0, 10.0))


def test_the_event_file_holds_the_arch_the_reward_and_what_it_is_made_of(tmp_path, meter):
    remembered(meter, 2.0, 10.0)
    *others, rewarded = rewarding(tmp_path, meter)
    fit(tmp_path, Tiny([0.5]), *others, rewarded)
    assert len(list((tmp_path / "trial_0000").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "trial_0000"))
    events.Reload()
    written = {
        tag: events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("hp/")
    }
    assert written == pytest.approx(
        {
            "hp/reward": rewarded.reward,
            "hp/loss": 0.5,
            "hp/contextual_share": 0.25,
            "hp/latency_ms": 2.0,
            "hp/speedup": 5.0,
        }
    )
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert {
        name: value.number_value or value.string_value for name, value in hparams.items()
    } == ARCH.to_dict()


def test_the_reward_is_computed_without_a_logger_too(tmp_path, meter):
    remembered(meter)
    *others, rewarded = rewarding(tmp_path, meter)
    fit(tmp_path, Tiny([0.5]), *others, rewarded, logs=False)
    assert rewarded.reward == reward(0.5, 2.0, 10.0)
