"""Several optimizers as one: Muon for matrices, Adam by rows for words, AdamW for the rest."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.system.errors import UserError

# Polynomials a s + b s^3 + c s^5 of a singular value s, one after the other: of all that are three
# such, their product is the nearest to 1 on [0.005, 1], 0.5 to 1.5.
STEPS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))
MARGIN = 1.01  # of the norm: bfloat16 may round a singular value of 1 to more; torch has none
MOMENTUM = 0.95  # Nesterov's, as torch's

Polynomials = Sequence[tuple[float, float, float]]


def orthogonalised(matrices_BMN: Tensor, steps: Polynomials = STEPS) -> Tensor:
    """Matrices with their singular vectors, and singular values near 1, in bfloat16.

    Args:
        matrices_BMN: of one shape, (B, M, N).
        steps: coefficients a, b, c of each step.
    """
    is_tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    x = matrices_BMN.bfloat16()
    x = x.mT.contiguous() if is_tall else x
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Each matrix takes its orthogonalised momentum as its step, so all its directions move alike.

    Matrices of one shape are orthogonalised together, in three steps where ``torch.optim.Muon``
    takes five (LOG.md). With one seed and one rate of AdamW, a small student's held-out loss ended
    at 0.458, and at 0.501 with AdamW alone; fine-tuned they were the same within the noise.

    Args:
        groups: parameter groups of matrices, each with ``lr``.
        weight_decay: of all.
        steps: of ``orthogonalised``.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
        step's size is matched to AdamW's as in Liu et al. 2025, "Muon is scalable for LLM
        training", section 2.2; its polynomials are made as in Amsel et al. 2025, "The Polar
        Express".
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        weight_decay: float,
        steps: Polynomials = STEPS,
    ) -> None:
        super().__init__(groups, {"weight_decay": weight_decay})
        self.steps = steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for matrices in by_shape.values():
                self._step(matrices, group["lr"], group["weight_decay"])

    def _step(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        gradients: list[Any] = [matrix.grad for matrix in matrices]
        known = [self.state[matrix] for matrix in matrices]
        for state, matrix in zip(known, matrices, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [state["momentum_buffer"] for state in known]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))
        moves = orthogonalised(updates, self.steps).to(updates.dtype).unbind()
        size = 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - rate * decay)
        torch._foreach_add_(matrices, moves, alpha=-rate * size)


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


def adam_by_rows(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam for tables whose gradients are by rows; each group with ``lr``.

    There is no momentum. By momentum a dense Adam goes on moving the word of one batch while it is
    absent, ten times as far as in its own step; by rows the first step has to do it all.
    """
    return torch.optim.SparseAdam(groups, betas=(0.0, 0.999))


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
        """Load all parts; their groups are then new objects, and taken over again.

        Raises:
            UserError: the state is of other optimizers: a GPU has none by rows.
        """
        if len(state_dict.get("parts", ())) != len(self.parts):
            raise UserError(
                "The checkpoint is of other optimizers, as another kind of device has them: go on "
                "there, or delete it to begin anew."
            )
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
