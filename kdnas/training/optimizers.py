"""Muon for the matrices of a student's layers, AdamW for the rest, as one optimizer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.system.errors import UserError


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers as one, for Lightning, schedules and checkpoints.

    Muon takes the orthogonalised momentum of a matrix as its step, so every direction of a matrix
    moves alike. With one seed and one rate of AdamW, a small student's held-out loss ended at
    0.458, and at 0.501 with AdamW alone; fine-tuned they were the same within the noise (LOG.md).

    Args:
        muon_groups: parameter groups of matrices, each with ``lr``.
        adamw_groups: parameter groups of everything else, each with ``lr`` and ``weight_decay``.
        weight_decay: Muon's weight decay.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
        step's size is matched to AdamW's as in Liu et al. 2025, "Muon is scalable for LLM
        training", section 2.2.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        weight_decay: float,
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw_groups, fused=True)]
        if muon_groups:
            muon = torch.optim.Muon(
                muon_groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both step; the closure is called once."""
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
        """Load both parts; their groups are then new objects, and taken over again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of each parameter, by name: ``<parameter>/exp_avg`` and the like."""
        return {
            f"{name}/{key}": tensor
            for name, parameter in module.named_parameters()
            for part in self.parts
            for key, tensor in part.state.get(parameter, {}).items()
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
