"""Muon for matrices, sparse Adam for word embeddings, and several optimizers as one."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.system.errors import UserError
from kdnas.training.precision import bf16_is_faster

# Coefficients of polynomials a s + b s^3 + c s^5, applied to a singular value s one after the other.
# Of all compositions of three such, this one is nearest to 1 on [0.005, 1]: between 0.5 and 1.5.
STEPS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978))
MARGIN = 1.01  # divides the norm, since bfloat16 may round a singular value of 1 up; torch has none
MOMENTUM = 0.95  # Nesterov momentum, as in torch.optim.Muon

Polynomials = Sequence[tuple[float, float, float]]


def orthogonalised(matrices_BMN: Tensor, steps: Polynomials = STEPS) -> Tensor:
    """Orthogonalise matrices: keep their singular vectors, and bring the singular values near 1.

    Each matrix X is divided by its Frobenius norm. Then each step sets
    ``X <- a X + b (X X^T) X + c (X X^T)^2 X``.

    Args:
        matrices_BMN: B matrices of one shape, (B, M, N).
        steps: coefficients a, b, c of each step.

    Returns:
        The orthogonalised matrices, (B, M, N), in bfloat16 or, where that is slower, in float32.
    """
    is_tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    is_bf16 = bf16_is_faster(matrices_BMN.device.type)
    x = matrices_BMN.to(torch.bfloat16 if is_bf16 else torch.float32)
    x = x.mT.contiguous() if is_tall else x
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon: updates each matrix by its orthogonalised momentum, equally in all directions.

    A step sets a matrix W of shape (M, N) to
    ``(1 - lr * weight_decay) W - 0.2 * lr * sqrt(max(M, N)) * orthogonalised(momentum)``.

    Matrices of one shape are orthogonalised together, in three steps where ``torch.optim.Muon``
    takes five. A small student reached a held-out loss of 0.458 with Muon, and of 0.501 with AdamW
    alone; after fine-tuning, the difference was within the noise (LOG.md).

    Args:
        groups: parameter groups that hold only matrices, each group with its ``lr``.
        weight_decay: weight decay of all matrices.
        steps: coefficients for ``orthogonalised``.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the size
        of a step is matched to AdamW's as in Liu et al. 2025, "Muon is scalable for LLM training",
        section 2.2; the polynomials are made as in Amsel et al. 2025, "The Polar Express".
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
        """Update all matrices that have a gradient; ``closure`` is ignored."""
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
    """Make the gradient of a model's word embeddings sparse, with rows only for words in the batch.

    On a CPU, updating the whole table takes a fifth of a training step of eight sentences (LOG.md).
    Sparse gradients need ``torch.optim.SparseAdam``, which leaves other words' rows and optimizer
    states unchanged.
    """
    table = model.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        table.sparse = True


def is_by_rows(model: PreTrainedModel, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the word embeddings of ``model``, and these have sparse gradients."""
    table = model.get_input_embeddings()
    return isinstance(table, nn.Embedding) and table.sparse and parameter is table.weight


def adam_by_rows(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make a SparseAdam without momentum, for embedding tables with sparse gradients.

    In dense Adam, momentum moves a word's row also in later steps whose batches lack the word.
    SparseAdam moves a row only in a step whose batch has the word. Without momentum, that step
    makes the whole move.

    Args:
        groups: parameter groups of embedding tables only, each group with its ``lr``.
    """
    return torch.optim.SparseAdam(groups, betas=(0.0, 0.999))


def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip the total norm of all gradients, dense and sparse, in place.

    Args:
        parameters: parameters whose gradients to clip.
        most: largest total norm; if it is exceeded, all gradients are scaled down to it.

    Returns:
        The total norm before clipping, a scalar.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # adds up rows of a word that occurs twice
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, for Lightning, learning-rate schedules and checkpoints.

    Args:
        parts: the optimizers, each with its own parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all optimizers, and return the loss that the closure returns.

        ``closure`` computes the loss and all gradients, and is called once. None: the gradients
        are there already, and the result is None.
        """
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
        """Load the states of all optimizers, as the method ``state_dict`` returned them.

        Raises:
            UserError: the state has another number of optimizers, for instance because it was saved
                on another kind of device: only CPUs use SparseAdam.
        """
        if len(state_dict.get("parts", ())) != len(self.parts):
            raise UserError(
                "The checkpoint was saved with other optimizers, probably on another kind of "
                "device (CPU or GPU): continue on that kind, or delete the checkpoint to start "
                "over."
            )
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading has replaced the groups by new objects.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the optimizer state of each parameter as float32 tensors.

        Args:
            module: module whose parameters these optimizers train.

        Returns:
            Tensors by names such as ``<parameter>/exp_avg``, where ``<parameter>`` is the
                parameter's name in the module.
        """
        return {
            f"{name}/{key}": torch.as_tensor(value, dtype=torch.float32)
            for name, parameter in module.named_parameters()
            for part in self.parts
            for key, value in part.state.get(parameter, {}).items()
        }

    def load_tensors(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load a state that the method ``tensors`` returned; learning rates stay as they are.

        Args:
            module: module whose parameters these optimizers train.
            tensors: the state, which comes from a module with parameters of the same shapes.

        Raises:
            UserError: a tensor belongs to no parameter that these optimizers train, or has another
                shape than its parameter.
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
                    f"The optimizer state {place!r}, of shape {tuple(tensor.shape)}, does not fit "
                    "this student: delete the file of optimizer states to continue without them."
                )
            part.state[parameter][key] = tensor.to(parameter.device)


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may train a parameter: it must be a matrix of a student's layers.

    Args:
        name: name of the parameter in a module that has the student as ``student``. For an
            embedding table, recognised by its name, the result is False.
        parameter: the parameter.
    """
    is_table = re.search("embedding|attention_bias", name)
    return parameter.ndim == 2 and name.startswith("student.") and not is_table
