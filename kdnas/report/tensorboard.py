"""Write a search's progress for TensorBoard, beside the curves of its trials."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from kdnas.models.arch import StudentArch
from kdnas.nas.controller import NUM_CANDIDATES, ModelRanking
from kdnas.nas.trials import Study, arch_of, best_trial, trained, trials_frame, tried
from kdnas.report.pictures import Draw, as_figure, pareto, predictions
from kdnas.system.files import placed
from kdnas.training.memory import release_memory
from kdnas.training.trainer import FLUSH_SECONDS, without_tensorflow


class SearchBoard:
    """Writes a search's progress as TensorBoard event files.

    Use the object as a context manager, and call it with the study after each trial. A step of the
    curves is a trained candidate, in the order in which trials ended. An episode is a fixed number
    of trained candidates in sequence. The curves are:

    - ``search/reward``, ``search/loss`` and ``search/latency_ms`` of the candidate;
    - ``search/best_reward``, the best so far; ``search/episode_best``, the best of this episode;
      ``search/previous_best``, the best of the previous episode;
    - ``search/exploration_ratio``, the probability that ``exploration`` returns, if it is given.

    The picture ``search/pareto`` is written whenever the Pareto front changes. The picture
    ``search/predictions`` is written at the end of each episode, if the sampler predicts rewards.

    Older event files in the folder are removed, and their content is written again from the study,
    so that a resumed search has one curve.

    Args:
        folder: folder of the event files.
        exploration: function from the number of candidates trained so far, pruned ones included, to
            the probability that the sampler explores; None: there is no such probability.
    """

    def __init__(self, folder: Path, exploration: Callable[[int], float] | None = None) -> None:
        self.exploration = exploration
        self._rewards: dict[StudentArch, float] = {}  # two workers may train the same shape
        self._front: list[int] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        without_tensorflow()
        with placed(folder):
            self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)

    def __enter__(self) -> "SearchBoard":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._writer.close()

    def __call__(self, study: Study) -> None:
        """Write the trained candidates of the study that are not written yet."""
        size = study.user_attrs.get("num_candidates", NUM_CANDIDATES)
        # Includes candidates that a pruner stopped: they count for the exploration ratio.
        ends = [trial.datetime_complete or datetime.max for trial in tried(study)]
        for trial in sorted(trained(study), key=lambda one: (one.datetime_complete, one.number)):
            arch, time = arch_of(trial), trial.datetime_complete
            if arch in self._rewards:
                continue
            self._rewards[arch] = trial.value or 0.0
            step = len(self._rewards)
            ranking = ModelRanking.of(list(self._rewards.items()), size, (step - 1) // size)
            leaders = {
                "best_reward": ranking.global_best,
                "episode_best": ranking.episode_best,
                "previous_best": ranking.previous_best,
            }
            values = {name: best[1] for name, best in leaders.items() if best}
            values["reward"] = self._rewards[arch]
            values |= {name: trial.user_attrs[name] for name in ("loss", "latency_ms")}
            if self.exploration:
                num_tried = sum(end <= (time or datetime.max) for end in ends)
                values["exploration_ratio"] = self.exploration(num_tried)
            for name, value in values.items():
                self._writer.add_scalar(f"search/{name}", value, step, time and time.timestamp())
            if step % size == 0:
                self._draw("predictions", predictions(trials_frame(study)))
        frame, best = trials_frame(study), best_trial(study)
        front = frame.loc[frame["front"].notna(), "number"].tolist()
        if front != self._front:
            self._front = front
            budget = study.user_attrs.get("budget") or {}
            self._draw("pareto", pareto(frame, best.number if best else None, budget))
        self._writer.flush()

    def _draw(self, name: str, draw: Draw | None) -> None:
        if draw:
            figure = as_figure(draw)
            self._writer.add_figure(f"search/{name}", figure, len(self._rewards), close=False)
            release_memory()  # a figure has reference cycles, which only the collector frees
