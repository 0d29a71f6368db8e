"""The search: propose candidates, train and score them, and tell the study."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.models.arch import StudentArch
from kdnas.nas.bench import Bench
from kdnas.nas.budget import latency_attrs
from kdnas.nas.callbacks import (
    HoldStill,
    LatencyAfterFit,
    PruneByHeldOutLoss,
    RewardAfterFit,
    TrainingLoss,
)
from kdnas.nas.record import Record
from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import FrozenTrial, Outcome, Study, best_of
from kdnas.nas.weights import save_weights
from kdnas.system.engine import Engine
from kdnas.system.jobs import Job, Reporter
from kdnas.training.progress import ProgressFile, StopWhenAsked
from kdnas.training.trainer import fit, make_trainer, own_random_numbers

# A student that exceeds a limit by at least this share is refused after a short measurement.
CLEARLY_BEYOND = 0.25

MakeJob = Callable[[int, StudentArch], Job]


def search(
    study: Study,
    space: SearchSpace,
    engine: Engine,
    make_job: MakeJob,
    n_trials: int,
    show: Callable[[FrozenTrial], object] = lambda trial: None,
    watch: Callable[[Sequence[Job]], object] = lambda jobs: None,
    seconds: float = math.inf,
    first: Iterable[StudentArch] = (),
) -> FrozenTrial:
    """Search until ``n_trials`` candidates are trained, time is up, or no shape is left.

    A candidate is a student of a new shape. If the sampler proposes a shape again, the new trial
    gets a copy of the earlier result, and a shape that is not in the study is queued instead. If
    training a candidate raises an error, its trial fails with the reason. Unfinished trials of a
    killed search are continued, and keep their numbers.

    Args:
        study: study from ``open_study``.
        space: student shapes that may be proposed.
        engine: runs the candidates' jobs.
        make_job: makes the job that trains a student, given the trial's number and the student's
            shape; the job calls ``evaluate``.
        n_trials: number of candidates to train, including those from before an interruption and
            those that the pruner ended.
        show: called with each trial that has ended.
        watch: called with the running jobs, several times a second.
        seconds: wall clock time after which no candidate is started, unless none was trained yet.
            Running candidates are finished.
        first: shapes to propose before the sampler's. Each is proposed only if the student before
            it exceeded the budget.

    Returns:
        The trial with the highest reward within the budget.

    Raises:
        UserError: no candidate meets the budget, or the pruner ended every candidate.
        CandidateFailed: every candidate failed, or the last ten did; the message has the last
            error.
    """
    record = Record(study, space, make_job, first)
    deadline = time.monotonic() + seconds
    while True:
        for trial in record.running():
            if (outcome := record.outcome(trial)) is not None:
                show(record.tell(trial, outcome))
            elif record.job(trial) in engine.jobs:
                record.answer_reports(trial)
            else:
                _begin(record, trial, engine)
        while engine.has_room and record.needs_more(n_trials):
            if time.monotonic() >= deadline and record.has_trained:
                break
            _begin(record, record.ask(), engine)
        if not (record.running() or engine.jobs):
            record.refuse_failures(n_trials)
            return best_of(study, space)
        for job, error in engine.wait():
            record.note(job, error)
            del error  # its frames hold the candidate's memory
        watch(engine.jobs)


def _begin(record: Record, trial: FrozenTrial, engine: Engine) -> None:
    """Start a trial's job, or copy the result of an earlier trial with the same student shape."""
    twin = record.twin(trial)
    if twin is None:
        engine.start(record.job(trial))
    else:
        record.queue_unseen(trial)
        record.repeat(trial, twin)


def evaluate(bench: Bench, arch: StudentArch, folder: Path) -> Outcome:
    """Train a candidate, measure its latency and compute its reward, unless it exceeds the budget.

    Args:
        bench: teacher, data, settings and budget, which all candidates share.
        arch: shape of the candidate.
        folder: folder of the trial, for logs, progress and the trained weights.

    Returns:
        The outcome: ``COMPLETE`` with a reward, or ``PRUNED``. If the budget was exceeded, the
            reason is in ``attrs["refused"]``; if the pruner ended the fit, in
            ``attrs["stopped_early"]``.

    Raises:
        CandidateFailed: the candidate cannot be scored, for instance because its loss is NaN.
    """
    started, reporter = time.time(), Reporter(folder)
    attrs, violation, reason = {"arch": arch.to_dict()}, 0.0, ""
    if bench.measures_first:
        with bench.stillness.write_lock():
            measured = bench.meter.glance(arch)
            if bench.budget.violation(measured)[0] < CLEARLY_BEYOND:
                measured = bench.meter.measure(arch)
        attrs |= latency_attrs(measured)
        violation, reason = bench.budget.violation(measured)
    reporter.tell(at_once=True, attrs=attrs)
    pruning = PruneByHeldOutLoss(reporter if bench.is_pruned else None)

    def ended(state: TrialState, value: float | None = None, **more: object) -> Outcome:
        every = attrs | more | {"seconds": time.time() - started}
        limits, now = {"budget": violation}, time.time()
        return Outcome(
            arch.to_dict(), state.name, value, every, limits, pruning.reports, started, now
        )

    if violation > 0:
        return ended(TrialState.PRUNED, refused=reason)
    training, still = TrainingLoss(), HoldStill(bench.stillness)
    latency = LatencyAfterFit(bench.meter, still)
    reward = RewardAfterFit(bench.loss, training, latency, bench.alpha, bench.beta)
    told = [ProgressFile(reporter), StopWhenAsked(reporter)]
    callbacks = [training, pruning, still, latency, reward, *told]
    with still, own_random_numbers():
        torch.manual_seed(bench.seed)
        module = HiddenStateDistillModule(bench.teacher, arch, bench.recipe)
        module.states, module.calibration = bench.states, bench.calibration
        trainer = make_trainer(bench.trainer, folder, bench.num_epochs, callbacks)
        try:
            fit(trainer, module, bench.data.select("mini"))
        except optuna.TrialPruned as pruned:
            return ended(TrialState.PRUNED, stopped_early=str(pruned))
    last = {name: module.history[-1][name] for name in ("loss", "contextual_share", "sentence_r2")}
    assert latency.latency is not None
    last |= {"train_loss": training.mean, **latency_attrs(latency.latency)}
    kept = save_weights(module, trainer, folder)
    found = {"history": module.history, "reward": reward.reward, **last, **kept}
    return ended(TrialState.COMPLETE, reward.reward, **found)
