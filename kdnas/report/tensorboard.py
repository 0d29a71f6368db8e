"""A search's progress in TensorBoard, beside the curves of its trials."""

import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from kdnas.models.arch import StudentArch
from kdnas.nas.trials import Study, arch_of, best_trial, trained, trials_frame, tried
from kdnas.report.pictures import as_figure, pareto
from kdnas.system.files import placed
from kdnas.training.memory import release_memory
from kdnas.training.trainer import FLUSH_SECONDS, without_tensorflow


class SearchBoard:
    """Writes a search's progress as event files: a context manager, called after each trial.

    It writes ``search/reward`` and ``search/best_reward`` by trained candidates, each at the time
    when it ended, ``search/exploration_ratio`` of a sampler that has one, and the picture
    ``search/pareto`` whenever the front changes.

    All is written from the study, in place of older files, so a resumed search has one curve.

    Args:
        folder: where the event files go.
        exploration: maps the number of trained candidates to the share of picks that explore; None:
            no curve.
    """

    def __init__(self, folder: Path, exploration: Callable[[int], float] | None = None) -> None:
        self.folder, self.exploration = folder, exploration
        self._writer: SummaryWriter | None = None
        self._written: set[StudentArch] = set()  # two workers may have trained the same one
        self._best = -math.inf
        self._front: list[int] | None = None

    def __enter__(self) -> "SearchBoard":
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        without_tensorflow()
        with placed(self.folder):
            self._writer = SummaryWriter(str(self.folder), flush_secs=FLUSH_SECONDS)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def __call__(self, study: Study) -> None:
        """Write what is new in the study."""
        if self._writer is None:
            return
        # With those that a pruner ended.
        ends = [trial.datetime_complete or datetime.max for trial in tried(study)]
        for trial in sorted(trained(study), key=lambda one: (one.datetime_complete, one.number)):
            arch, time = arch_of(trial), trial.datetime_complete
            if arch in self._written:
                continue
            self._written.add(arch)
            step, reward = len(self._written), trial.value or 0.0
            self._best = max(self._best, reward)
            values = {"reward": reward, "best_reward": self._best}
            if self.exploration:
                num_tried = sum(end <= (time or datetime.max) for end in ends)
                values["exploration_ratio"] = self.exploration(num_tried)
            for name, value in values.items():
                self._writer.add_scalar(f"search/{name}", value, step, time and time.timestamp())
        self._draw_front(self._writer, study)
        self._writer.flush()

    def _draw_front(self, writer: SummaryWriter, study: Study) -> None:
        frame, best = trials_frame(study), best_trial(study)
        draw = pareto(frame, best.number if best else None, study.user_attrs.get("budget") or {})
        front = frame.loc[frame["front"].notna(), "number"].tolist()
        if draw and front != self._front:
            self._front = front
            writer.add_figure("search/pareto", as_figure(draw), len(self._written), close=False)
            release_memory()  # a figure refers to itself
