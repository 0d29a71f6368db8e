"""Muon for the matrices of a student's layers, AdamW for the rest, as one optimizer."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers behind one: Lightning, schedules and checkpoints see a single one.

    Muon takes the orthogonalised momentum of a matrix as its step, so every direction of a matrix moves alike. By it a
    small student learned in two epochs what AdamW did not teach it in eight (LOG.md).

    Args:
        muon_groups: parameter groups of matrices, each with ``lr``.
        adamw_groups: parameter groups of everything else, each with ``lr`` and ``weight_decay``.
        weight_decay: Muon's.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the step's size is matched to
        AdamW's as in Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
    """

    def __init__(
        self, muon_groups: list[dict[str, Any]], adamw_groups: list[dict[str, Any]], weight_decay: float
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw_groups, fused=True)]
        if muon_groups:
            muon = torch.optim.Muon(muon_groups, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both; their groups are new objects, so they are taken over again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may take a parameter of a module whose student is ``student``: a matrix, no table, no projection."""
    return parameter.ndim == 2 and name.startswith("student.") and not re.search("embeddings|attention_bias", name)
