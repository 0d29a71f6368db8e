"""Fine-tune a classifier on a labelled task, and score it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from kdnas.models.encoders import max_length, num_parameters
from kdnas.models.families import marks_pairs, name_classes
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import new_folder, read_json, write_json
from kdnas.system.settings import keep_settings
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.scores import make_metrics
from kdnas.tasks.tasks import LoadedTask, Task
from kdnas.training.optimizers import JointOptimizer, adam_by_rows, is_by_rows, take_rows
from kdnas.training.trainer import (
    ClipFusedGradients,
    TrainerSettings,
    fit_resumable,
    own_random_numbers,
)


@dataclass(frozen=True)
class FinetuneSettings:
    """How a classifier is fine-tuned; the same for teacher and student.

    Args:
        num_epochs: passes over the training rows; the model is scored after the last pass. null:
            3 to 10, as many as 600 steps take (``usual_num_epochs``).
        learning_rate: AdamW's peak learning rate, reached after the warm-up; it then falls linearly
            to 0. null: by the model's size (``usual_learning_rate``): 5e-5 for BERT-base, more for
            smaller models.
        batch_size: rows per step.
        max_length: longest row in tokens, special tokens included; longer rows are cut.
        warmup_share: share of the steps in which the learning rate rises from 0; at least 0 and
            below 1.
        weight_decay: AdamW's weight decay of matrices, not of biases and layer norms; on a CPU,
            word embeddings have none either.
        seed: seed of dropout and of the order of the rows.

    Raises:
        UserError: a value is out of its range.
    """

    num_epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    max_length: int = 128
    warmup_share: float = 0.06
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_epochs", 1),
            ("batch_size", 1),
            ("max_length", 8),
            ("seed", 0),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{name} is {value}: give at least {least}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UserError(
                f"learning_rate is {self.learning_rate}: give a number above 0 and below 1, such as "
                "5e-5, or null."
            )
        if not 0 <= self.warmup_share < 1:
            raise UserError(
                f"warmup_share is {self.warmup_share}: give a share of at least 0 and below 1."
            )

    def epochs_for(self, num_rows: int) -> int:
        """Return ``num_epochs`` or, if it is null, the usual number for so many training rows."""
        return self.num_epochs or usual_num_epochs(math.ceil(num_rows / self.batch_size))


def usual_num_epochs(num_steps: int) -> int:
    """Return the epochs of a fine-tuning whose epoch has ``num_steps`` steps.

    As many as 600 steps take, but 3 to 10: on few rows, three epochs end long before a small
    student has learned its task (LOG.md).

    Source: Mosbach et al. 2021, "On the stability of fine-tuning BERT", who train longer on small
    tasks.
    """
    return min(10, max(3, math.ceil(600 / num_steps)))


def usual_learning_rate(config: PreTrainedConfig) -> float:
    """Return the peak learning rate for fine-tuning a model of this size.

    ``5e-5 * 768 / hidden_size * sqrt(12 / num_hidden_layers)``: 5e-5 for BERT-base, and 3.5e-4 for
    4 layers of width 192.

    Source: Yang et al. 2022, "Tensor Programs V" (width), Yang et al. 2023, "Tensor Programs VI"
    (depth); ``LOG.md`` compares this rule with a grid of rates.
    """
    width, depth = config.hidden_size, config.num_hidden_layers
    return 5e-5 * 768 / width * math.sqrt(12 / depth)


def classify(
    classifier: PreTrainedModel, batch: dict[str, Tensor], states: bool = False
) -> SequenceClassifierOutput:
    """Run a classifier on a batch, without passing it the labels.

    Token types are passed only if the model uses them. With ``states``, the output has
    ``hidden_states``: the output of the embeddings and of each layer, each of shape (B, T, H).
    """
    unread = {"labels"} if marks_pairs(classifier.config) else {"labels", "token_type_ids"}
    inputs = {name: value for name, value in batch.items() if name not in unread}
    return classifier(**inputs, output_hidden_states=states)


class GLUEModule(ClipFusedGradients):
    """Lightning module that fine-tunes a classifier.

    The loss is the cross entropy, or the mean squared error for a regression. The module logs
    ``train/loss``, ``val/loss``, ``val/<metric>`` for each of the task's metrics, and
    ``val/score``, the mean of the metrics. MNLI has two validation splits, so ``val/loss`` and
    ``val/<metric>`` are logged for each, with ``_matched`` or ``_mismatched`` appended.

    Args:
        classifier: a transformers model for sequence classification, with ``task.num_labels``
            outputs.
        task: what is predicted and how it is scored.
        settings: how the classifier is trained.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        task: Task,
        settings: FinetuneSettings = FinetuneSettings(),
    ) -> None:
        super().__init__()
        assert classifier.config.num_labels == task.num_labels
        self.classifier, self.task, self.settings = classifier, task, settings
        self.learning_rate = settings.learning_rate or usual_learning_rate(classifier.config)
        self.suffixes = [split.removeprefix("validation") for split in task.validations]
        self.metrics: Any = nn.ModuleList(make_metrics(task) for _ in self.suffixes)

    def on_fit_start(self) -> None:
        """Turn dropout on: ``from_pretrained`` gives eval mode, which Lightning does not change."""
        self.train()

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.strategy.root_device.type == "cpu":
            # On a CPU, the backward pass of fused attention is slower.
            self.classifier.set_attn_implementation("eager")
            take_rows(self.classifier)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return float32 logits (B, num_labels), or a regression's predictions (B,).

        Labels in the batch are optional and not used.
        """
        return self.outputs(classify(self.classifier, batch))

    def outputs(self, answer: SequenceClassifierOutput) -> Tensor:
        """Return a classifier's logits, or a regression's predictions, in float32."""
        assert answer.logits is not None
        logits = answer.logits.float()
        return logits.squeeze(-1) if self.task.num_labels == 1 else logits

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the training loss of a batch, a scalar."""
        return self.label_loss(self(batch), batch["labels"])

    def label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss against the labels: cross entropy, or squared error for a regression.

        Args:
            outputs: result of ``forward``.
            labels: class ids or numbers, (B,).
        """
        return (
            F.mse_loss(outputs, labels.float())
            if self.task.num_labels == 1
            else F.cross_entropy(outputs, labels)
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return and log the loss of a batch.

        Raises:
            CandidateFailed: the loss is not finite.
        """
        loss = self._finite(self.loss(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _finite(self, loss: Tensor) -> Tensor:
        if not loss.isfinite():
            raise CandidateFailed(
                f"The training loss of task {self.task.name!r} is {loss.item()} at step "
                f"{self.global_step}: lower the learning rate."
            )
        return loss

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch to the loss and the metrics of its validation split, ``dataloader_idx``.

        Raises:
            CandidateFailed: the loss is not finite.
        """
        outputs, labels = self(batch), batch["labels"]
        self.log(
            f"val/loss{self.suffixes[dataloader_idx]}",
            self._finite(self.label_loss(outputs, labels)),
            batch_size=len(labels),
            sync_dist=True,
            add_dataloader_idx=False,
        )
        self.metrics[dataloader_idx].update(
            outputs if self.task.num_labels == 1 else outputs.argmax(-1), labels
        )

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all rows of each split, and the score, which is their mean."""
        values: dict[str, float] = {}
        for suffix, metrics in zip(self.suffixes, self.metrics, strict=True):
            values |= {f"{name}{suffix}": float(value) for name, value in metrics.compute().items()}
            metrics.reset()
        self.log_dict({f"val/{name}": value for name, value in values.items()})
        self.log("val/score", sum(values.values()) / len(values), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW, and a learning rate that rises in the warm-up and then falls to 0."""
        parameters, settings = list(self.parameters()), self.settings
        by_rows = [p for p in parameters if is_by_rows(self.classifier, p)]
        matrices = [p for p in parameters if p.ndim > 1 and not is_by_rows(self.classifier, p)]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        ]
        if by_rows:
            parts.append(adam_by_rows([{"params": by_rows, "lr": self.learning_rate}]))
        optimizer = JointOptimizer(parts)
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(
            optimizer, round(self.settings.warmup_share * num_steps), num_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _History(pl.Callback):
    """Callback that records the score after each epoch, and all metrics after the last."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.last = list(state_dict["rows"]), state_dict["last"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, "score": self.last["val/score"]})


def keep_finetune_settings(
    folder: Path, task: LoadedTask, settings: FinetuneSettings, trainer_settings: TrainerSettings
) -> None:
    """Write a fine-tuning's settings, and the hash of its rows, to ``made_with.json``.

    If the file exists in ``folder``, compare it with the settings and rows instead.

    Raises:
        UserError: the file has other settings, or the hash of other rows.
    """
    trained = {name: getattr(trainer_settings, name) for name in ("precision", "gradient_clip_val")}
    asked = {"task": task.task.name, "task_sha256": task.sha256, **trained, **asdict(settings)}
    whose = f"The fine-tuning in {str(folder)!r}"
    keep_settings(folder / "made_with.json", asked, whose, "give a new run name")


def evaluate_glue(
    classifier: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    settings: FinetuneSettings,
    *,
    folder: Path,
    trainer_settings: TrainerSettings = TrainerSettings(),
    callbacks: Sequence[pl.Callback] = (),
    make_module: Callable[[PreTrainedModel, Task, FinetuneSettings], GLUEModule] | None = None,
    keep_model: bool = True,
) -> dict[str, Any]:
    """Fine-tune a classifier on a task, score it and save it.

    The model is scored after the last epoch. The best epoch's score would be biased, because the
    epoch would be chosen on the scored rows.

    Args:
        classifier: the classifier, whose weights are trained in place; afterwards it is in eval
            mode, on the CPU.
        tokenizer: the classifier's tokenizer.
        task: the task with its rows.
        settings: how the classifier is trained.
        folder: folder of the fine-tuning. It gets TensorBoard's logs, ``model/`` (classifier and
            tokenizer) and, at the end, ``result.json``. If the folder has a ``result.json``
            already, its content is returned and nothing is trained. If it has a ``last.ckpt``,
            training resumes from this checkpoint.
        trainer_settings: device and precision.
        callbacks: further Lightning callbacks, such as a progress bar.
        make_module: makes the module that trains the classifier; None: ``GLUEModule``.
        keep_model: whether to write ``model/``.

    Returns:
        A dictionary. It has ``task``, ``task_sha256`` (of its rows), ``score`` and ``metrics`` (0
        to 1, or -1 to 1 for correlations). It has ``num_parameters``, ``megabytes`` (of the
        weights, 10^6 bytes), ``seconds`` (since the last start or resumption) and ``history`` (for
        each epoch, from 0, its ``epoch`` and ``score``). And it has ``settings`` (with the learning
        rate that was used), ``precision`` and ``gradient_clip_val`` as requested, and
        ``trained_in``, the precision that was used.

    Raises:
        UserError: the model takes fewer than ``settings.max_length`` tokens, or the fine-tuning in
            the folder was started with another task or other settings.
        CandidateFailed: a loss is not finite.
        KeyboardInterrupt: Ctrl-C.
    """
    if settings.max_length > max_length(classifier.config):
        raise UserError(
            f"max_length is {settings.max_length}, but this model takes at most "
            f"{max_length(classifier.config)} tokens: give a smaller max_length."
        )
    keep_finetune_settings(folder, task, settings, trainer_settings)
    if (folder / "result.json").is_file():
        return dict(read_json(folder / "result.json"))
    start = time.perf_counter()
    # The teacher's class names must not stay in the config.
    unnamed = [f"LABEL_{label}" for label in range(task.task.num_labels)]
    name_classes(classifier.config, task.task.label_names or unnamed)
    attention = classifier.config._attn_implementation
    history = _History()
    num_epochs = settings.epochs_for(len(task.train["label"]))
    data = GLUEDataModule(
        task,
        tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    with own_random_numbers():
        torch.manual_seed(settings.seed)
        module = (make_module or GLUEModule)(classifier, task.task, settings)
        fit_resumable(trainer_settings, folder, num_epochs, module, data, [history, *callbacks])
    trained_in = str(module.trainer.precision)
    classifier.eval()
    classifier.set_attn_implementation(attention)
    if keep_model:
        with new_folder(folder / "model") as model:
            classifier.save_pretrained(model)
            tokenizer.save_pretrained(model)
    result = _result(module, task, history) | {
        "seconds": time.perf_counter() - start,
        "settings": asdict(settings)
        | {"num_epochs": num_epochs, "learning_rate": module.learning_rate},
        "precision": trainer_settings.precision,
        "gradient_clip_val": trainer_settings.gradient_clip_val,
        "trained_in": trained_in,
    }
    write_json(folder / "result.json", result)
    (folder / "last.ckpt").unlink()
    return result


def _result(module: GLUEModule, task: LoadedTask, history: _History) -> dict[str, Any]:
    metrics = [f"{name}{suffix}" for suffix in module.suffixes for name in task.task.metrics]
    parameters = module.classifier.parameters()
    return {
        "task": task.task.name,
        "task_sha256": task.sha256,
        "score": history.rows[-1]["score"],
        "metrics": {name: history.last[f"val/{name}"] for name in metrics},
        "num_parameters": num_parameters(module.classifier),
        "megabytes": sum(p.numel() * p.element_size() for p in parameters) / 1e6,
        "history": history.rows,
    }
