"""HiddenStateDistillModule: a student learns its teacher's hidden states under masked inputs.

Shapes: B rows, T padded tokens, N real tokens, H_s and H_t widths, k teacher layers a student layer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from kdnas.arch import StudentArch
from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.distill.layer_map import LastAndSkip, LayerMapping
from kdnas.distill.losses import contextual_share, squared_error
from kdnas.distill.teacher import StatesSettings, TeacherStates, open_states
from kdnas.errors import CandidateFailed, UserError
from kdnas.models import Teacher, build_student, find_teacher
from kdnas.student_init import FromTeacher, Start
from kdnas.training import ClipFusedGradients


@dataclass(frozen=True)
class Recipe:
    """How a student is distilled; the same for mini-KD, full KD and ``kdnas fit``.

    Args:
        mapping: which teacher layers each student layer learns from.
        start: the student's first weights.
        shared_projection: one projection for all student layers (the original's code) instead of one each.
        normalize: divide each layer's error by that layer's variance, so that no layer owns the loss by its scale.
        learning_rate: peak rate of new parameters.
        copied_learning_rate: peak rate of parameters that hold the teacher's values; a high one destroys them.
        weight_decay: AdamW's, on matrices only.
        warmup_share: share of the steps in which the rate rises; it falls linearly to 0 in the rest.
        constant_rate: no warm-up and no decay (the original).
        dropout: train the student with its dropout (a student that small underfits; off by default).

    Raises:
        UserError: a value is out of its range.
    """

    mapping: LayerMapping = LastAndSkip()
    start: Start = FromTeacher()
    shared_projection: bool = False
    normalize: bool = True
    learning_rate: float = 3e-3
    copied_learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    constant_rate: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "copied_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: give a rate above 0, such as 1e-3.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay is {self.weight_decay}: give a number of at least 0, such as 0.01.")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share is {self.warmup_share}: give a share of at least 0 and below 1.")


class PairErrors(Metric):
    """Sums of squared errors for each pair (student layer, teacher layer), and the number of tokens, over all ranks."""

    full_state_update = False

    def __init__(self, num_pairs: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.num_tokens: Tensor
        # float64: a float32 sum stops growing at 16 million tokens.
        self.add_state("sums", torch.zeros(num_pairs, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, errors: Tensor, num_tokens: int) -> None:
        """Add a batch: sums over its tokens, shape (pairs,)."""
        self.sums += errors.detach()
        self.num_tokens += num_tokens

    def compute(self) -> Tensor:
        """Mean squared error of each pair, shape (pairs,)."""
        return self.sums / self.num_tokens


class HiddenStateDistillModule(ClipFusedGradients):
    """Mean squared error between projected student states and teacher states, on real tokens.

    ``loss = mean_i mean_j mean_n |W_ij h_i(n) - t_j(n)|^2 / (H_t var_j)`` for student layer i, its teacher layers j and
    real tokens n. Each student layer has its own linear projection H_s -> k * H_t, for its k teacher layers together.

    The teacher is no submodule: ``parameters()``, checkpoints and DDP never see it. It is ``self.states``, a call from
    batch to states, opened in ``setup`` from the data module; a search sets it once for all candidates.

    Args:
        teacher: a folder, a hub name or ``quickstart``.
        arch: shape of the student.
        recipe: how it is distilled.
        states: where the teacher's states are kept.
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
        config = self._teacher.config
        self.pairs = recipe.mapping(arch.num_hidden_layers, config.num_hidden_layers)
        self.flat_pairs = [(i, layer) for i, layers in enumerate(self.pairs) for layer in layers]
        self.target_layers = sorted({layer for _, layer in self.flat_pairs})
        self.student = build_student(config, arch)
        self.started = recipe.start(self.student, self._teacher.model)
        num_projections = 1 if recipe.shared_projection else arch.num_hidden_layers
        self.projections = nn.ModuleList(self._projection() for _ in range(num_projections))
        self.states: TeacherStates | None = None
        self.val_errors = PairErrors(len(self.flat_pairs))
        self.history: list[dict[str, float]] = []

    def _projection(self) -> nn.Linear:
        """H_s -> k * H_t; where the start relates the two streams, it begins as that relation."""
        num_targets = len(self.pairs[0])
        projection = nn.Linear(self.arch.hidden_size, num_targets * self._teacher.config.hidden_size)
        if self.started.basis is not None:
            projection.weight.data.copy_(self.started.basis.repeat(num_targets, 1))
            projection.bias.data.zero_()
        return projection

    def setup(self, stage: str | None = None) -> None:
        if self.states is None:
            data = getattr(self.trainer, "datamodule", None)
            if not isinstance(data, KDDataModule):
                raise UserError("HiddenStateDistillModule needs a KDDataModule: give the Trainer datamodule=.")
            device = str(self.trainer.strategy.root_device)
            self.states = open_states(self._teacher, data, self.target_layers, self._states_settings, device)

    def on_train_start(self) -> None:
        self.student.train(self.recipe.dropout)

    def forward(self, batch: Batch) -> list[Tensor]:
        """The predicted teacher states: for each student layer a tensor (N, k * H_t), its teacher layers in order."""
        mask = batch["attention_mask"]
        output = self.student(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        real = mask.bool()
        hidden = [states[real] for states in output.hidden_states[1:]]  # hidden_states[0] is the embedding output
        projections = list(self.projections)
        if self.recipe.shared_projection:
            projections *= len(hidden)
        return [projection(states) for projection, states in zip(projections, hidden, strict=True)]

    def errors(self, batch: Batch) -> tuple[Tensor, int]:
        """Sums over tokens of the squared error of each pair, shape (pairs,), and the number of real tokens."""
        assert self.states is not None, "setup() sets it"
        targets = self.states(batch, self.target_layers)
        sums = []
        for predicted, layers in zip(self(batch), self.pairs, strict=True):
            for part, layer in zip(predicted.chunk(len(layers), dim=-1), layers, strict=True):
                sums.append(squared_error(part, targets[layer]))
        return torch.stack(sums), int(batch["attention_mask"].sum())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sums, num_tokens = self.errors(batch)
        loss = self._mean(sums / num_tokens, [self.stats(layer).variance for _, layer in self.flat_pairs])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_errors.update(*self.errors(batch))

    def on_validation_epoch_end(self) -> None:
        mse = self.val_errors.compute().cpu()
        self.val_errors.reset()
        if not torch.isfinite(mse).all():
            raise CandidateFailed(f"the held-out error is {float(mse.mean())} after epoch {self.current_epoch}")
        stats = [self.stats(layer) for _, layer in self.flat_pairs]
        loss = float(self._mean(mse, [s.held_out_variance for s in stats]))
        metrics = {"val/loss": loss, "val/raw_mse": float(mse.mean())}
        r2 = 1 - mse / torch.tensor([s.held_out_variance for s in stats])
        metrics["val/r2"] = float(r2.mean())
        # Several student layers may learn from one teacher layer: what is logged of it is what the best of them knows.
        for layer in self.target_layers:
            pairs = [p for p, (_, teacher_layer) in enumerate(self.flat_pairs) if teacher_layer == layer]
            best = min(pairs, key=lambda p: float(mse[p]))
            share = contextual_share(float(mse[best]), stats[best].held_out_mse_context_free)
            metrics |= {
                f"teacher_layer_{layer}/raw_mse": float(mse[best]),
                f"teacher_layer_{layer}/r2": float(r2[best]),
                f"teacher_layer_{layer}/contextual_share": share,
            }
            metrics["val/contextual_share"] = share  # in the end that of the highest layer
        self.log_dict(metrics)
        self.log("val_loss", loss, prog_bar=True, logger=False)
        if not self.trainer.sanity_checking:
            names = ("loss", "r2", "contextual_share", "raw_mse")
            self.history.append({"epoch": self.current_epoch} | {name: metrics[f"val/{name}"] for name in names})

    def stats(self, layer: int) -> Any:
        """Variance and context-free error of a teacher layer."""
        assert self.states is not None, "setup() sets it"
        return self.states.stats[layer]

    def _mean(self, mse: Tensor, variances: list[float]) -> Tensor:
        """The mean over pairs, each divided by its layer's variance where the recipe says so."""
        if self.recipe.normalize:
            mse = mse / torch.tensor(variances, dtype=mse.dtype, device=mse.device)
        return mse.mean()

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            copied = name.removeprefix("student.") in self.started.copied
            rate = recipe.copied_learning_rate if copied else recipe.learning_rate
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()], fused=True
        )
        if recipe.constant_rate:
            return optimizer
        if self.trainer.estimated_stepping_batches == math.inf:
            raise UserError(
                "The training has no last step, at which the rate is 0: give trainer.max_epochs or trainer.max_steps, "
                "or recipe.constant_rate."
            )
        num_steps = max(1, int(self.trainer.estimated_stepping_batches))
        num_warmup = max(1, round(recipe.warmup_share * num_steps))
        schedule = LambdaLR(
            optimizer,
            lambda step: min((step + 1) / num_warmup, (num_steps - step) / max(1, num_steps - num_warmup)),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint["history"])
