"""A search's own progress in TensorBoard, beside the curves of its trials."""

import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from kdnas.models.arch import StudentArch
from kdnas.nas.trials import Study, arch_of, best_trial, trained, trials_frame, tried
from kdnas.report.pictures import as_figure, pareto
from kdnas.training.memory import release_memory
from kdnas.training.trainer import FLUSH_SECONDS, without_tensorflow


class SearchBoard:
    """Writes a search's progress into a folder of event files; a context, called with the study after each trial.

    ``search/reward`` and ``search/best_reward`` by trained candidates, each at the time when it ended,
    ``search/exploration_ratio`` of a sampler that has one, and the picture ``search/pareto`` whenever its front moves.

    What is written follows from the study: first what it knows already, in place of older files. So a search that goes
    on has one curve.

    Args:
        folder: for the event files.
        exploration: the share of picks that explore, of the number of trained candidates; None: there is none.
    """

    def __init__(self, folder: Path, exploration: Callable[[int], float] | None = None) -> None:
        self.folder, self.exploration = folder, exploration
        self._writer: SummaryWriter | None = None
        self._written: set[StudentArch] = set()  # two workers may have been at the same one
        self._best, self._front = -math.inf, ""

    def __enter__(self) -> "SearchBoard":
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        without_tensorflow()
        self._writer = SummaryWriter(str(self.folder), flush_secs=FLUSH_SECONDS)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, study: Study) -> None:
        """Write what the study has that was not written."""
        if self._writer is None:
            return
        ends = [trial.datetime_complete or datetime.max for trial in tried(study)]
        for trial in sorted(
            trained(study), key=lambda trial: (trial.datetime_complete, trial.number)
        ):
            arch, time = arch_of(trial), trial.datetime_complete
            if arch in self._written:
                continue
            self._written.add(arch)
            self._best = max(self._best, trial.value or 0.0)
            values = {"reward": trial.value or 0.0, "best_reward": self._best}
            if self.exploration:
                num_tried = sum(
                    end <= (time or datetime.max) for end in ends
                )  # with those that a pruner ended
                values["exploration_ratio"] = self.exploration(num_tried)
            for name, value in values.items():
                self._writer.add_scalar(
                    f"search/{name}", value, len(self._written), time and time.timestamp()
                )
        frame, best = trials_frame(study), best_trial(study)
        draw = pareto(frame, best.number if best else None, study.user_attrs.get("budget") or {})
        front = str(frame.loc[frame["front"].notna(), "number"].tolist())
        if draw and front != self._front:
            self._front = front
            self._writer.add_figure(
                "search/pareto", as_figure(draw), len(self._written), close=False
            )
            release_memory()  # a figure refers to itself
        self._writer.flush()
