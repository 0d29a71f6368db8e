"""Task distillation: a classifier learns from a task's labels and from a fine-tuned teacher."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kdnas.distillation.losses import ridge_map, squared_error
from kdnas.models.encoders import (
    Teacher,
    find_teacher,
    refuse_no_values,
    refuse_other_inputs,
)
from kdnas.models.families import class_names, has_classifier
from kdnas.system.errors import UserError, first_line
from kdnas.tasks.finetune import FinetuneSettings, GLUEModule, classify
from kdnas.tasks.tasks import Task, class_order, warn_of_names

# Enough tokens to fit a linear map between two widths; takes a second.
_BATCHES_TO_BEGIN_WITH = 32


@dataclass(frozen=True)
class TaskDistillSettings:
    """How a classifier learns from labels and from a fine-tuned teacher.

    The loss is ``(1 - soft_weight) * labels + soft_weight * soft + hidden_weight * hidden``.
    ``labels`` is the loss against the labels, ``soft`` the one against the teacher's outputs, and
    ``hidden`` the squared error against the teacher's last hidden states, divided by their
    variance.

    Args:
        temperature: temperature of the softmax of student and teacher in the soft loss; a
            regression ignores it.
        soft_weight: weight of the loss against the teacher's outputs, 0 to 1.
        hidden_weight: weight of the squared error against the teacher's last hidden states, at
            least 0.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 2.0
    soft_weight: float = 0.5
    hidden_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"distill.temperature is {self.temperature}: give a number above 0, such as 2."
            )
        if not 0 <= self.soft_weight <= 1:
            raise UserError(f"distill.soft_weight is {self.soft_weight}: give a share of 0 to 1.")
        if not 0 <= self.hidden_weight < math.inf:
            raise UserError(f"distill.hidden_weight is {self.hidden_weight}: give at least 0.")


def soft_loss(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """Return the soft-label loss of a student against its teacher's outputs, a scalar.

    ``T^2 * mean_b KL(softmax(t_b / T) || softmax(s_b / T))``; for a regression, the mean squared
    error.

    Args:
        outputs: logits s of the student, shape (B, C), or predictions of a regression, shape (B,).
        teacher_outputs: outputs t of the teacher, the same shape.
        temperature: T, above 0. The factor T^2 keeps the size of the gradients.

    Raises:
        ValueError: the shapes differ (they would broadcast silently).

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    if outputs.shape != teacher_outputs.shape:
        raise ValueError(
            f"outputs have the shape {tuple(outputs.shape)}, but teacher_outputs have "
            f"{tuple(teacher_outputs.shape)}: give both the same shape."
        )
    if outputs.ndim == 1:
        return F.mse_loss(outputs, teacher_outputs)
    ours, theirs = (
        values.div(temperature).log_softmax(-1) for values in (outputs, teacher_outputs)
    )
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def hidden_loss(predicted_BTH: Tensor, teacher_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the squared error of predicted hidden states, divided by the teacher's variance.

    ``sum_n |p_n - t_n|^2 / sum_n |t_n - mean t|^2`` over the real tokens n of the batch.

    Args:
        predicted_BTH: p, the teacher's states as predicted from the student's, shape (B, T, H).
        teacher_BTH: t, the teacher's states, the same shape.
        mask_BT: True on real tokens.

    Returns:
        A float32 scalar: 0 if both are equal, 1 if the batch's mean is predicted for every token.

    Raises:
        ValueError: the shapes differ.
    """
    predicted, teacher = predicted_BTH[mask_BT], teacher_BTH[mask_BT].float()
    return squared_error(predicted, teacher) / squared_error(
        teacher.mean(0).expand_as(teacher), teacher
    )


def task_loss(label: Tensor, soft: Tensor, hidden: Tensor, settings: TaskDistillSettings) -> Tensor:
    """Return ``(1 - soft_weight) * label + soft_weight * soft + hidden_weight * hidden``.

    Args:
        label: the loss against the labels.
        soft: the loss against the teacher's outputs.
        hidden: the loss against the teacher's hidden states.
        settings: gives the two weights.
    """
    return (
        (1 - settings.soft_weight) * label
        + settings.soft_weight * soft
        + settings.hidden_weight * hidden
    )


class TaskDistillModule(GLUEModule):
    """Lightning module that trains a classifier, the student, on labels and a fine-tuned teacher.

    The teacher runs on the same batches. A trained linear projection maps the student's last hidden
    states to the teacher's width. Besides the logs of ``GLUEModule``, the module logs the parts of
    the loss: ``train/label``, ``train/soft`` and ``train/hidden``.

    Args:
        classifier: the student: a transformers model for sequence classification.
        task: what is predicted and how it is scored.
        settings: epochs, learning rate and other training settings.
        teacher: classifier that was fine-tuned on the same task; frozen, and not a submodule.
        distill: weights of the parts of the loss, and the temperature.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        task: Task,
        settings: FinetuneSettings,
        teacher: PreTrainedModel,
        distill: TaskDistillSettings = TaskDistillSettings(),
    ) -> None:
        super().__init__(classifier, task, settings)
        assert teacher.config.num_labels == task.num_labels
        self.distill = distill
        self._teacher: Any = (teacher,)  # in a tuple: parameters() and checkpoints must not see it
        self.projection = nn.Linear(classifier.config.hidden_size, teacher.config.hidden_size)

    @property
    def teacher(self) -> Any:
        """The fine-tuned teacher."""
        return self._teacher[0]

    def on_fit_start(self) -> None:
        """Fit the projection by least squares: a random one would give misleading gradients."""
        self.teacher.to(self.device).eval()
        if not self.trainer.ckpt_path:
            self._begin_projection()
        super().on_fit_start()

    def on_fit_end(self) -> None:
        """Move the teacher to the CPU, which frees the device for the next fit."""
        self.teacher.to("cpu")

    def _begin_projection(self) -> None:
        self.classifier.eval()
        pairs = []
        loader: Any = self.trainer.train_dataloader
        for batch in itertools.islice(loader, _BATCHES_TO_BEGIN_WITH):
            batch = {name: value.to(self.device) for name, value in batch.items()}
            with torch.no_grad():
                states = [
                    _last_state(classify(model, batch, True))
                    for model in (self.classifier, self.teacher)
                ]
            pairs.append([state[batch["attention_mask"].bool()] for state in states])
        ours, theirs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        weights = ridge_map(ours, theirs)
        with torch.no_grad():
            self.projection.weight.copy_(weights[:-1].T)
            self.projection.bias.copy_(weights[-1])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the training loss of a batch, a scalar, and log the parts of the loss."""
        with torch.no_grad():
            theirs = classify(self.teacher, batch, True)
        ours = classify(self.classifier, batch, True)
        outputs = self.outputs(ours)
        parts = {
            "label": self.label_loss(outputs, batch["labels"]),
            "soft": soft_loss(outputs, self.outputs(theirs), self.distill.temperature),
            "hidden": hidden_loss(
                self.projection(_last_state(ours)),
                _last_state(theirs),
                batch["attention_mask"].bool(),
            ),
        }
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        return task_loss(**parts, settings=self.distill)


def _last_state(answer: Any) -> Tensor:
    return answer.hidden_states[-1]


def load_task_teacher(source: str, task: Task, *students: Teacher) -> PreTrainedModel:
    """Load a teacher that was fine-tuned on a task, in eval mode and frozen.

    Args:
        source: a folder, such as ``model/`` of an earlier fine-tuning, or a name on the hub.
        task: the task on which the teacher must have been fine-tuned.
        students: the encoders that will learn from the teacher; they must have the teacher's
            tokenizer.

    Raises:
        UserError: the teacher does not exist, has no trained head for this task, has its classes in
            another order, or has another tokenizer than a student.
    """
    found = find_teacher(source)
    config: Any = found.config
    names = class_names(config)
    order = class_order(task, names)
    refused = ""
    if not has_classifier(config):
        refused = f"is not fine-tuned: it has no head for {task.name!r}"
    elif config.problem_type == "multi_label_classification":
        refused = "predicts several labels at once: give a classifier that predicts one"
    elif config.num_labels != task.num_labels:
        refused = (
            f"has {config.num_labels} outputs, and {task.name!r} needs {task.num_labels}: "
            "give one that was fine-tuned on it"
        )
    elif order and order != sorted(order):
        refused = (
            f"has the classes {', '.join(names)}, and {task.name!r} has "
            f"{', '.join(task.label_names)}: give one with the same order"
        )
    if refused:
        raise UserError(f"{source!r} {refused}.")
    if order is None:
        warn_of_names(task, names, source)
    for student in students:
        refuse_other_inputs(student, found)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            found.source,
            config=found.config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a broken checkpoint raises anything
        raise UserError(
            f"The teacher {source!r} cannot be loaded ({first_line(error)}): use another "
            "classifier."
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"The weights of the teacher {source!r} lack the tensor "
            f"{sorted(info['missing_keys'])[0]!r}: give a classifier that was saved after "
            "fine-tuning."
        )
    refuse_no_values(source, model)
    model.requires_grad_(False)
    return model.eval()
