"""Record: keeps the study of a search in agreement with the result files of its trials."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import optuna
from optuna.pruners import NopPruner
from optuna.trial import TrialState

from kdnas.models.arch import StudentArch
from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import (
    FrozenTrial,
    Outcome,
    Study,
    failed,
    is_complete,
    known,
    tried,
    unseen,
)
from kdnas.system.errors import CandidateFailed, reason_of
from kdnas.system.files import write_json
from kdnas.system.jobs import Job, Stopped, progress_of

# Number of failed candidates, before any success, at which the search stops and says why.
MOST_FAILURES = 5
# Number of consecutive failures at which it stops in any case: the error is not the shapes' then.
MOST_IN_A_ROW = 10


class Record:
    """Asks an Optuna study for trials, and tells the study how they ended.

    The study is told the content of ``result.json`` in the trial's folder, so a search can resume
    after any interruption. If the study says that a trial is running, but the trial has neither a
    result nor a running job, its job is started again.

    Args:
        study: study from ``open_study``.
        space: search space of the study.
        make_job: makes the job of a trial, given its number and shape.
        first: student shapes to propose before the sampler's. Each is proposed only if the student
            before it exceeded the budget.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        make_job: Callable[[int, StudentArch], Job],
        first: Iterable[StudentArch] = (),
    ) -> None:
        self.study, self.space, self._make_job = study, space, make_job
        self._first = list(first)
        self._trials: dict[int, optuna.Trial] = {}
        self._in_a_row: list[str] = []  # reasons of the failures since the last success
        self._is_pruned = not isinstance(study.pruner, NopPruner)

    def running(self) -> list[FrozenTrial]:
        """Return the trials in state ``RUNNING``; some may have ended without the study knowing."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def ask(self) -> FrozenTrial:
        """Return a new trial, with a shape from ``first``, the study's queue or the sampler."""
        if (arch := self._next_of_first()) is not None:
            self.study.enqueue_trial(arch.to_dict(), skip_if_exists=True)
        trial = self.study.ask()
        self._trials[trial.number] = trial
        self.space.suggest(trial)
        predicted = getattr(self.study.sampler, "predictions", {}).get(trial.number)
        if predicted is not None:
            trial.set_user_attr("predicted_reward", predicted)
        return self._frozen(trial.number)

    def _next_of_first(self) -> StudentArch | None:
        """Return the next shape of ``first`` to propose; None: take the sampler's.

        None if all of ``first`` were proposed, or if the last of them did not exceed the budget.
        """
        seen = known(self.study)
        for arch in self._first:
            if arch not in seen:
                return arch
            if "refused" not in seen[arch].user_attrs:
                return None
        return None

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _trial(self, frozen: FrozenTrial) -> optuna.Trial:
        """Return a writable Optuna ``Trial``, also for a trial that an earlier process began."""
        if frozen.number not in self._trials:
            self._trials[frozen.number] = optuna.Trial(self.study, frozen._trial_id)
        return self._trials[frozen.number]

    def arch(self, trial: FrozenTrial) -> StudentArch:
        """Return the student shape of a trial.

        If an earlier process was killed before it had suggested all parameters of the trial, the
        remaining ones are suggested now.
        """
        if len(trial.params) < len(self.space.choices):
            return self.space.suggest(self._trial(trial))
        return StudentArch.from_dict(trial.params)

    def job(self, trial: FrozenTrial) -> Job:
        """Return the job that trains the student of a trial."""
        return self._make_job(trial.number, self.arch(trial))

    def twin(self, trial: FrozenTrial) -> FrozenTrial | None:
        """Return the first earlier trial with the same student shape; None: there is none."""
        first = known(self.study).get(self.arch(trial))
        return first if first is not None and first.number < trial.number else None

    def queue_unseen(self, trial: FrozenTrial) -> None:
        """Queue a student shape that the study has not proposed yet, to replace a repeated one.

        Args:
            trial: trial whose shape was proposed before; at most one shape is queued for it.
        """
        trials = self.study.get_trials(deepcopy=False)
        is_queued = any(other.user_attrs.get("queued_for") == trial.number for other in trials)
        arch = None if is_queued else unseen(self.study, self.space, trial.number)
        if arch is not None:
            attrs = {"queued_for": trial.number}
            self.study.enqueue_trial(arch.to_dict(), user_attrs=attrs)

    def repeat(self, trial: FrozenTrial, twin: FrozenTrial) -> None:
        """Write the result of a trial that has the same shape as an earlier one.

        Args:
            trial: trial whose result to write.
            twin: the earlier trial, whose result is copied; if it still runs, the result is
                ``FAIL``.
        """
        if twin.state.is_finished():
            outcome = Outcome.read(self.job(twin).result_file)
        else:
            outcome = Outcome(twin.params, TrialState.FAIL.name)
        attrs = outcome.attrs | {"arch": twin.params, "twin_of": twin.number}
        self._write(trial, replace(outcome, attrs=attrs))

    def note(self, job: Job, error: BaseException | None) -> None:
        """Write a ``FAIL`` result for a job's trial if the job has ended with an error.

        Nothing is written for a job that was asked to stop: its trial will be resumed.

        Args:
            job: job that has ended.
            error: error of the job; None: it succeeded.
        """
        if error is None or isinstance(error, Stopped) or job.is_done:
            return
        trial = next((trial for trial in self.running() if self.job(trial) == job), None)
        if trial is None:  # the database was damaged meanwhile, and rebuilt without this trial
            return
        reason = reason_of(error) if isinstance(error, Exception) else str(error)
        attrs = progress_of(job.folder).get("attrs", {})
        attrs |= {"arch": self.arch(trial).to_dict(), "failed": reason}
        now = time.time()
        started = trial.datetime_start.timestamp() if trial.datetime_start else now
        state = TrialState.FAIL.name
        outcome = Outcome(
            self.arch(trial).to_dict(), state, attrs=attrs, started=started, ended=now
        )
        self._write(trial, outcome)

    def _write(self, trial: FrozenTrial, outcome: Outcome) -> None:
        write_json(self.job(trial).result_file, outcome.to_dict())

    def outcome(self, trial: FrozenTrial) -> Outcome | None:
        """Return how a trial ended, from its ``result.json``; None: it has not ended."""
        job = self.job(trial)
        return Outcome.read(job.result_file) if job.is_done else None

    def tell(self, frozen: FrozenTrial, outcome: Outcome) -> FrozenTrial:
        """Tell the study how a trial ended, and return the finished trial."""
        trial = self._trial(frozen)
        predicted = frozen.user_attrs.get("predicted_reward")
        if predicted is not None and "predicted_reward" not in outcome.attrs:
            # Only the study has it, but the study must be possible to rebuild from the results.
            outcome = replace(outcome, attrs=outcome.attrs | {"predicted_reward": predicted})
            self._write(frozen, outcome)
        for name, value in outcome.attrs.items():
            trial.set_user_attr(name, value)
        for name, violation in outcome.constraints.items():
            if name not in frozen.constraints:
                trial.set_constraint(name, violation)
        for step, value in outcome.reports.items():
            if int(step) not in frozen.intermediate_values:
                trial.report(value, int(step))
        self.study.tell(trial, outcome.value, TrialState[outcome.state])
        if "failed" in outcome.attrs and "twin_of" not in outcome.attrs:
            self._in_a_row.append(outcome.attrs["failed"])
        elif outcome.state == "COMPLETE":
            self._in_a_row.clear()
        return self._frozen(frozen.number)

    def answer_reports(self, frozen: FrozenTrial) -> None:
        """Ask the pruner whether a trial may continue, and write the answer for its waiting job."""
        job = self.job(frozen)
        reports = progress_of(job.folder).get("reports", {}) if self._is_pruned else {}
        for step, value in reports.items():
            answers = {False: job.folder / f"go_on_{step}", True: job.folder / f"prune_{step}"}
            if not any(answer.exists() for answer in answers.values()):
                trial = self._trial(frozen)
                if int(step) not in self._frozen(frozen.number).intermediate_values:
                    trial.report(value, int(step))
                answers[trial.should_prune()].touch()

    def refuse_failures(self, n_trials: int) -> None:
        """Raise an error if the search stopped because the last ten candidates failed.

        Without this error, earlier candidates would make the search seem successful.

        Args:
            n_trials: number of candidates to train.

        Raises:
            CandidateFailed: the last ten candidates failed, an earlier one was trained, and the
                search is not over: fewer than ``n_trials`` were trained, and shapes are left.
        """
        is_over = is_complete(self.study, self.space, n_trials)
        if len(self._in_a_row) >= MOST_IN_A_ROW and tried(self.study) and not is_over:
            raise CandidateFailed(
                f"The last {len(self._in_a_row)} candidates failed, the last one with: "
                f"{self._in_a_row[-1]}. Fix the cause and run the same command again: it continues "
                "with other candidates."
            )

    @property
    def has_trained(self) -> bool:
        """Whether a candidate was trained, or is being trained."""
        return bool(tried(self.study) or self.running())

    def needs_more(self, n_trials: int) -> bool:
        """Whether to propose another candidate.

        It is False if ``n_trials`` candidates were trained or are being trained, or if all shapes
        were proposed. It is also False if the first five candidates (``MOST_FAILURES``) or the
        last ten (``MOST_IN_A_ROW``) all failed.
        """
        num_tried = len(tried(self.study))
        only_fails = len(failed(self.study)) >= MOST_FAILURES and num_tried == 0
        only_fails |= len(self._in_a_row) >= MOST_IN_A_ROW
        is_enough = num_tried + len(self.running()) >= n_trials
        return not (only_fails or is_enough or len(known(self.study)) >= len(self.space))
