"""HiddenStateDistillModule: trains a student on its teacher's hidden states of masked inputs."""

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR

from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.distillation.curves import StudentCurves
from kdnas.distillation.losses import contextual_share
from kdnas.distillation.metrics import TOKEN_STRENGTH, RidgeProbe, TermErrors
from kdnas.distillation.narrowing import CalibrationRows
from kdnas.distillation.objectives import HiddenStates, Objective, View, WeightedSum, needed_layers
from kdnas.distillation.sentences import PairComparison
from kdnas.distillation.start import FromTeacher, Start, Started
from kdnas.distillation.teacher_states import (
    LayerStats,
    StatesSettings,
    TeacherStates,
    open_states,
    sample_batches,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    Teacher,
    build_student,
    encode,
    find_teacher,
    num_parameters,
    refuse_other_inputs,
)
from kdnas.models.families import arch_of
from kdnas.models.layers import LastLayer
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.training.memory import release_memory, trim_heap
from kdnas.training.optimizers import (
    JointOptimizer,
    Muon,
    adam_by_rows,
    is_by_rows,
    is_layer_matrix,
    take_rows,
)
from kdnas.training.precision import autocast
from kdnas.training.trainer import ClipFusedGradients

# Enough for least squares in a narrow student's width; takes some seconds on two cores.
CALIBRATION_TOKENS = 20_000
# Batches of changing lengths leave holes in the heap, which grows by hundreds of megabytes
# (LOG.md).
TRIM_STEPS = 25


# The best objective by the scores after fine-tuning (LOG.md). If the text gives no pairs, the pair
# term is 0.
DEFAULT_OBJECTIVE = WeightedSum([HiddenStates(LastLayer()), PairComparison()], [1.0, 0.5])


@dataclass(frozen=True)
class Recipe:
    """How a student is distilled: loss, initial weights and optimizer settings.

    Args:
        objective: the loss between student and teacher.
        start: how the student's weights are initialised from the teacher's.
        learning_rate: AdamW's peak learning rate for parameters that are not copied from the
            teacher.
        copied_learning_rate: AdamW's peak learning rate for parameters copied from the teacher, as
            all of a student that is as wide as it are; a high rate would undo the copy.
        matrix_learning_rate: Muon's peak learning rate for the matrices in the student's layers;
            null: AdamW trains them too.
        copied_matrix_learning_rate: Muon's peak learning rate for matrices copied from the teacher.
        weight_decay: weight decay of all matrices; on a CPU, word embeddings have none.
        warmup_share: share of the steps with a rising learning rate; after them it falls linearly
            to 0.
        constant_rate: keep the learning rate constant, as in the original KD-NAS.
        dropout: train the student with dropout; off by default, because small students underfit
            anyway.

    Raises:
        UserError: a value is out of its range.
    """

    objective: Objective = DEFAULT_OBJECTIVE
    start: Start = FromTeacher()
    learning_rate: float = 1.5e-3
    copied_learning_rate: float = 2e-4
    matrix_learning_rate: float | None = 2.5e-3
    copied_matrix_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    constant_rate: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        rates = {
            name: value for name, value in vars(self).items() if name.endswith("learning_rate")
        }
        for name, rate in rates.items():
            if rate is not None and not 0 < rate < math.inf:
                raise UserError(f"{name} is {rate}: give a learning rate above 0, such as 1e-3.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"weight_decay is {self.weight_decay}: give a number of at least 0, such as 0.01."
            )
        if not 0 <= self.warmup_share < 1:
            raise UserError(
                f"warmup_share is {self.warmup_share}: give a share of at least 0 and below 1."
            )


@cache
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values as a tensor on the device; it is cached, so do not change it in place."""
    with torch.inference_mode(False):  # a cached inference tensor could not enter autograd later
        return torch.tensor(values, dtype=dtype, device=device)


def calibration_rows(data: KDDataModule) -> CalibrationRows:
    """Return batches of a random sample of training rows, on which students' weights are fitted.

    The sample is the same on all ranks.
    """
    return CalibrationRows(sample_batches(data, data.train_ids(), CALIBRATION_TOKENS))


class HiddenStateDistillModule(ClipFusedGradients):
    """Lightning module that trains a student on its teacher's hidden states of masked inputs.

    ``loss = sum_k w_k e_k / s_k`` over the terms k of the recipe's loss. e_k is the mean error of
    term k and w_k its weight. s_k is the variance of the term's teacher layer if ``Term.scaled``,
    else 1. The held-out loss, which a search uses to rank students, is the weighted mean of the
    terms by which students of different shapes can be ranked (``Term.compares``) or, if there are
    none, of all terms.

    The teacher is not a submodule, so ``parameters()``, checkpoints and DDP do not include it.
    ``setup`` opens ``self.states``, the teacher's stored hidden states. A search sets
    ``self.states`` itself, once for all its students, and also ``self.calibration``, the training
    rows used to initialise students.

    Args:
        teacher: a model folder, a Hugging Face name or ``quickstart``.
        arch: shape of the student.
        recipe: loss, initial weights and optimizer settings.
        states: where and how the teacher's hidden states are stored.
    """

    def __init__(
        self,
        teacher: str | Teacher,
        arch: StudentArch,
        recipe: Recipe = Recipe(),
        states: StatesSettings = StatesSettings(),
    ) -> None:
        super().__init__()
        self._teacher = find_teacher(teacher) if isinstance(teacher, str) else teacher
        self.arch, self.recipe, self._states_settings = arch, recipe, states
        config, objective = self._teacher.config, recipe.objective
        num_layers, widths = config.num_hidden_layers, (arch.hidden_size, config.hidden_size)
        self.last_layer = num_layers - 1
        self.target_layers = needed_layers(objective, [arch.num_hidden_layers], num_layers)

        self.student = build_student(config, arch)
        recipe.start.check(self.student.config, config)
        self.criterion = objective.criterion(self.student, self._teacher.model)
        self.terms = self.criterion.terms

        self.states: TeacherStates | None = None
        self.calibration: CalibrationRows | None = None
        self.started: Started | None = None
        # State of the optimizer of an earlier fit that this one continues.
        self.optimizer_tensors: dict[str, Tensor] = {}

        self.val_errors = TermErrors(len(self.terms))
        self.token_probe = RidgeProbe(*widths, strength=TOKEN_STRENGTH)
        self.sentence_probe = RidgeProbe(
            *widths, strength=0.03
        )  # stronger, for there are fewer rows than tokens
        self.history: list[dict[str, float]] = []
        self._has_bar = False  # each number in a progress bar waits for the device

    def describe(self) -> str:
        """Return Markdown: a table of student and teacher sizes, and the terms of the loss."""
        teacher, student = arch_of(self._teacher.config).to_dict(), self.arch.to_dict()
        teacher["parameters"] = f"{num_parameters(self._teacher.model):,}"
        student["parameters"] = f"{num_parameters(self.student):,}"
        rows = "".join(
            f"| {name} | {teacher[name]} | {value} |\n" for name, value in student.items()
        )
        terms = "".join(f"- {term.name}, weight {term.weight:g}\n" for term in self.terms)
        num_tensors = len(list(self.student.parameters()))
        num_copied = len(self.started.copied) if self.started else 0
        return (
            f"| | teacher | student |\n| --- | --- | --- |\n{rows}\n"
            f"Of the student's {num_tensors} tensors, {num_copied} train at the learning rates of "
            f"copied parameters. Terms of its loss:\n\n{terms}"
        )

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return a ``StudentCurves`` callback, which logs the learning rate and the speed."""
        return [StudentCurves()]

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, KDDataModule):
            raise UserError(
                "HiddenStateDistillModule needs a KDDataModule: call trainer.fit(module, "
                "datamodule=KDDataModule(...))."
            )
        if data.teacher != self._teacher.name:
            refuse_other_inputs(find_teacher(data.teacher), self._teacher)
        device = self.trainer.strategy.root_device
        self._has_bar = self.trainer.progress_bar_callback is not None
        if self.states is None and stage != "predict":
            layers, precision = self.target_layers, str(self.trainer.precision)
            where = self._states_settings
            self.states = open_states(self._teacher, data, layers, where, str(device), precision)
        if self.states is not None:
            layers, is_gpu = self.target_layers, device.type == "cuda"
            data.prepare = partial(self.states.prepare, layers=layers, pin=is_gpu)
        if stage == "fit":
            self.begin(data)
            if device.type == "cpu":
                # Fused attention's backward pass takes twice as long, and gives no attention maps.
                self.student.set_attn_implementation("eager")
                take_rows(self.student)
            # Lightning warns of a fit that begins in eval mode; on_train_start decides.
            self.student.train()
        self._teacher.model.to(device)  # type: ignore[arg-type]

    @torch.no_grad()
    def begin(self, data: KDDataModule) -> None:
        """Initialise the student, and then the parameters of the loss.

        Both can be fitted to training rows of ``data``. A second call does nothing.
        """
        if self.started is not None:
            return
        release_memory()  # memory that reading the text has left allocated
        rows = self.calibration or calibration_rows(data)
        self.student.eval()
        teacher = self._teacher.model.to("cpu")  # type: ignore[arg-type]
        self.started = self.recipe.start(self.student, teacher, rows)

        with autocast("cpu"):
            students, teachers = zip(*map(self.views, rows), strict=True)
        self.criterion.fit(self.started, students, teachers)
        del students, teachers
        release_memory()

    def save_student(self, folder: Path) -> None:
        """Save the student and the teacher's tokenizer in a folder.

        The teacher's hash is stored in the student's config, as ``teacher_sha256``.
        """
        self.student.config.teacher_sha256 = self._teacher.sha256()
        self.student.save_pretrained(folder)
        self._teacher.tokenizer.save_pretrained(folder)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.student.train(self.recipe.dropout)

    def views(self, batch: Batch) -> tuple[View, View]:
        """Return the ``View`` of the student and that of the teacher on a batch.

        A ``View`` holds a model's hidden states and attention. The teacher's hidden states are
        read if they are stored, and computed otherwise.
        """
        assert self.states is not None, "setup() sets it"
        # In train mode the attention maps would have dropout.
        is_eager = self.student.config._attn_implementation == "eager"
        output = encode(self.student, batch, maps=is_eager and not self.student.training)
        padded = dict(enumerate(output.hidden_states or (), -1))
        student = View(self.student, batch, padded, maps=output.attentions)

        real = self.states(batch, self.target_layers)
        return student, View(self._teacher.model, batch, real=real)

    def forward(self, student: View, teacher: View) -> tuple[Tensor, Tensor]:
        """Return, for each loss term, the sum of a batch's errors and the number of errors.

        These are two tensors of shape (terms,). A term has one error per token, row or sentence
        pair. A ``View`` holds a model's hidden states and attention.
        """
        errors, counts = zip(*self.criterion(student, teacher), strict=True)
        sums = torch.stack(errors)
        # Filled on the device: copying a tensor of the list there would wait for the device.
        return sums, torch.stack([sums.new_full((), count) for count in counts])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sums, counts = self(*self.views(batch))
        is_distributed = distributed.is_available() and distributed.is_initialized()
        num_ranks = distributed.get_world_size() if is_distributed else 1
        known = torch.stack([counts, sums.detach()])
        if num_ranks > 1:
            # DDP averages over ranks, and a rank may have no pairs: so divide by the counts of all
            # ranks. The sums go along for the log.
            distributed.all_reduce(known)
        weights = self._weights("variance") / known[0].clamp_min(1)
        self.log("train/loss", (known[1] * weights).sum(), prog_bar=self._has_bar)
        return (sums * num_ranks * weights).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        student, teacher = self.views(batch)
        self.val_errors.update(*self(student, teacher))
        self.token_probe.update(
            student.real(self.arch.num_hidden_layers - 1), teacher.real(self.last_layer)
        )
        self.sentence_probe.update(student.pooled(student.mask_BT), teacher.pooled(teacher.mask_BT))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.device.type == "cpu" and batch_idx % TRIM_STEPS == TRIM_STEPS - 1:
            trim_heap()

    def on_validation_epoch_end(self) -> None:
        metrics, terms = self._held_out_metrics()
        if not self.trainer.sanity_checking:
            self.history.append({"epoch": self.current_epoch, **metrics})

        # All ranks have the same figures; without sync_dist Lightning doubts it.
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, sync_dist=True)
        shown = {"val_loss": metrics["loss"], "contextual_share": metrics["contextual_share"]}
        self.log_dict(shown, prog_bar=True, logger=False, sync_dist=True)
        self.log_dict(terms, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        metrics, terms = self._held_out_metrics()
        named = {f"test/{name}": value for name, value in (metrics | terms).items()}
        self.log_dict(named, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> tuple[list[str], Tensor]:
        """Return the texts of a batch and the student's sentence vectors, (B, H).

        A sentence vector is the mean of the last layer's hidden states over real tokens.
        """
        states = dict(enumerate(encode(self.student, batch).hidden_states or (), -1))
        view = View(self.student, cast(Batch, batch), states)
        return batch["texts"], view.pooled(view.mask_BT)

    def _held_out_metrics(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return held-out metrics: of the student as a whole, and of each loss term and layer."""
        means, counts = self.val_errors.compute().cpu()
        if not torch.isfinite(means).all():
            raise CandidateFailed(
                f"the held-out loss is {float(means.mean())} after epoch {self.current_epoch}: "
                "give lower learning rates"
            )
        if not counts.any():
            raise UserError(
                "The held-out rows have nothing that the loss can compare (a loss on sentence "
                "pairs needs pairs): give more text, or longer rows."
            )
        metrics = {"loss": self._held_out_loss(means, counts), **self._probe_metrics()}
        for metric in (self.val_errors, self.token_probe, self.sentence_probe):
            metric.reset()
        return metrics, self._term_metrics(means.tolist())

    def _held_out_loss(self, means: Tensor, counts: Tensor) -> float:
        weights = self._weights("held_out_variance").cpu()
        # A text without pairs gives the pair term a count of 0.
        compares = torch.tensor([term.compares for term in self.terms]) & (counts > 0)
        if compares.any():
            pairs = zip(self.terms, compares.tolist(), strict=True)
            weights = weights * compares / sum(term.weight for term, is_one in pairs if is_one)
        return float((means * weights).sum())

    def _probe_metrics(self) -> dict[str, float]:
        assert self.states is not None, "setup() sets it"
        ends = self.states.ends
        token_mse, _ = self.token_probe.compute()
        share = contextual_share(float(token_mse), ends.context_free, ends.teacher)
        mse, variance = (float(value) for value in self.sentence_probe.compute())
        r2 = 1 - mse / variance if variance > 0 else 0.0
        return {"contextual_share": share, "sentence_r2": r2}

    def _term_metrics(self, means: list[float]) -> dict[str, float]:
        """Return metrics: each loss term's mean error, and each teacher layer's lowest error."""
        metrics = {}
        best: dict[int, float] = {}
        for term, mean in zip(self.terms, means, strict=True):
            metrics[f"terms/{term.name}"] = mean
            if term.layer is not None:
                best[term.layer] = min(mean, best.get(term.layer, mean))
        for layer, mse in sorted(best.items()):
            stats, name = self.stats(layer), f"teacher_layer_{layer}"
            share = contextual_share(mse, stats.held_out_mse_context_free)
            metrics[f"{name}/raw_mse"] = mse
            metrics[f"{name}/r2"] = 1 - mse / stats.held_out_variance
            metrics[f"{name}/contextual_share"] = share
        return metrics

    def stats(self, layer: int) -> LayerStats:
        """Return what errors on a teacher layer are compared with, such as the layer's variance."""
        assert self.states is not None, "setup() sets it"
        return self.states.stats[layer]

    def _weights(self, scale: str) -> Tensor:
        """Return the loss terms' weights, (terms,), divided by a variance if ``Term.scaled``.

        ``scale`` names the field of ``LayerStats`` that holds the variance of the term's layer.
        """
        weights = tuple(
            term.weight / getattr(self.stats(term.layer), scale)
            if term.scaled and term.layer is not None
            else term.weight
            for term in self.terms
        )
        return _on_device(weights, torch.get_default_dtype(), self.device)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        copied = self.started.copied if self.started is not None else frozenset()
        matrices: dict[float, list[nn.Parameter]] = {}
        by_rows: list[dict[str, Any]] = []
        adamw: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            is_copied = name.removeprefix("student.") in copied
            if recipe.matrix_learning_rate is not None and is_layer_matrix(name, parameter):
                rates = (recipe.matrix_learning_rate, recipe.copied_matrix_learning_rate)
                matrices.setdefault(rates[is_copied], []).append(parameter)
                continue
            rates = (recipe.learning_rate, recipe.copied_learning_rate)
            if is_by_rows(self.student, parameter):
                by_rows.append({"params": [parameter], "lr": rates[is_copied]})
            else:
                decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
                adamw.setdefault((rates[is_copied], decay), []).append(parameter)
        groups = [
            {"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in adamw.items()
        ]
        parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, fused=True)]
        if matrices:
            groups = [{"params": p, "lr": rate} for rate, p in matrices.items()]
            parts.append(Muon(groups, recipe.weight_decay))
        if by_rows:
            parts.append(adam_by_rows(by_rows))
        optimizer = JointOptimizer(parts)
        # A checkpoint of this fit overwrites these tensors later.
        optimizer.load_tensors(self, self.optimizer_tensors)
        self.optimizer_tensors = {}
        if recipe.constant_rate:
            return optimizer

        if self.trainer.estimated_stepping_batches == math.inf:
            raise UserError(
                "The number of training steps is unlimited, so the learning rate cannot fall to 0 "
                "at the end: give trainer.max_epochs or trainer.max_steps, or set "
                "recipe.constant_rate."
            )
        num_steps = max(1, int(self.trainer.estimated_stepping_batches))
        num_warmup = max(1, round(recipe.warmup_share * num_steps))

        def factor(step: int) -> float:
            rising, falling = (step + 1) / num_warmup, num_steps - step
            return min(rising, falling / max(1, num_steps - num_warmup))

        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history
        checkpoint["copied"] = sorted(self.started.copied) if self.started is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = (self.state_dict(), checkpoint["state_dict"])
        ours, theirs = (
            {name: getattr(value, "shape", None) for name, value in state.items()}
            for state in states
        )
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differing or "history" not in checkpoint:
            what = f": {differing[0]!r} and {len(differing) - 1} more differ" if differing else ""
            raise UserError(
                f"The checkpoint does not fit this student and loss{what}. Use the student and the "
                "objective that it was saved with, or another checkpoint."
            )
        self.history = list(checkpoint["history"])
        if checkpoint["copied"] is not None:
            self.started = Started(frozenset(checkpoint["copied"]))
