"""Several optimizers as one: Muon for matrices, Adam by rows for a table of words, AdamW for the rest."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.system.errors import UserError


def muon(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Muon:
    """An optimizer of matrices: each takes its orthogonalised momentum as its step.

    So every direction of a matrix moves alike. With one seed and one rate of AdamW, a small
    student's held-out loss ended at 0.458, and at 0.501 with AdamW alone; fine-tuned they were the
    same within the noise (LOG.md).

    Args:
        groups: parameter groups, each with ``lr``.
        weight_decay: of all.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
        step's size is matched to AdamW's as in Liu et al. 2025, "Muon is scalable for LLM
        training", section 2.2.
    """
    return torch.optim.Muon(groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def take_rows(model: PreTrainedModel) -> None:
    """Have the gradient of a model's table of words hold the rows of a batch alone.

    On a CPU the whole table takes a fifth of a step of eight rows (LOG.md). The rows are then for
    ``torch.optim.SparseAdam``, which leaves the others, and what it knows of them, as they are.
    """
    table = model.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        table.sparse = True


def is_by_rows(model: PreTrainedModel, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the table of words, after ``take_rows``."""
    table = model.get_input_embeddings()
    return isinstance(table, nn.Embedding) and table.sparse and parameter is table.weight


def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip the norm of all gradients together, also of those by rows; give what it was."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a word may be in a batch twice
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class JointOptimizer(torch.optim.Optimizer):
    """Several of torch's optimizers as one, for Lightning, schedules and checkpoints.

    Args:
        parts: each with parameters of its own.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """All step; the closure is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load all parts; their groups are then new objects, and taken over again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of each parameter, by name: ``<parameter>/exp_avg`` and the like."""
        return {
            f"{name}/{key}": torch.as_tensor(value, dtype=torch.float32)
            for name, parameter in module.named_parameters()
            for part in self.parts
            for key, value in part.state.get(parameter, {}).items()
        }

    def load_tensors(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over another optimizer's state for such a module; the rates stay as they are.

        Raises:
            UserError: a tensor belongs to no parameter that is trained here, or has another shape.
        """
        parts = {
            parameter: part
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        parameters = dict(module.named_parameters())
        for place, tensor in tensors.items():
            name, _, key = place.rpartition("/")
            parameter = parameters.get(name)
            part = None if parameter is None else parts.get(parameter)
            if parameter is None or part is None or tensor.shape not in (parameter.shape, ()):
                raise UserError(
                    f"The optimizer's {place!r} of shape {tuple(tensor.shape)} is of another "
                    "student: delete the file that holds it to begin without it."
                )
            part.state[parameter][key] = tensor.to(parameter.device)


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may take a parameter: a matrix in ``student``, but no embedding table."""
    is_table = re.search("embedding|attention_bias", name)
    return parameter.ndim == 2 and name.startswith("student.") and not is_table
