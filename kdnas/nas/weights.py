"""The weights and optimizer states of the best candidates, from which full KD continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from safetensors.torch import save

from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.nas.trials import Study, trained
from kdnas.system.files import file_sha256, new_file

WEIGHTS, OPTIMIZER = KEPT = ("weights.safetensors", "optimizer.safetensors")
# Number of candidates whose weights are kept: the best ones.
MOST_KEPT = 3


def save_weights(
    module: HiddenStateDistillModule, trainer: pl.Trainer, folder: Path
) -> dict[str, str]:
    """Write the weights of a candidate and the state of its optimizer, each to a file.

    Args:
        module: module of the candidate, after its fit.
        trainer: Trainer of the fit, which has the optimizer.
        folder: folder of the trial.

    Returns:
        The SHA-256 of the two files, as ``weights_sha256`` and ``optimizer_sha256``.
    """
    optimizer: Any = trainer.optimizers[0]
    hashes = {}
    for name, tensors in ((WEIGHTS, module.state_dict()), (OPTIMIZER, optimizer.tensors(module))):
        with new_file(folder / name) as file:
            file.write(save(tensors))
        hashes[f"{Path(name).stem}_sha256"] = file_sha256(folder / name)
    return hashes


def drop_weights(study: Study, folder: Callable[[int], Path]) -> None:
    """Delete the weights and optimizer states of all but the three candidates of highest reward.

    Args:
        study: study of the search.
        folder: maps a trial's number to its folder.
    """
    for trial in sorted(trained(study), key=lambda trial: trial.value or 0.0)[:-MOST_KEPT]:
        for name in KEPT:
            (folder(trial.number) / name).unlink(missing_ok=True)
