"""What is kept of a candidate's training, for full KD to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from safetensors.torch import save

from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.nas.trials import Study, trained
from kdnas.system.files import file_sha256, new_file

WEIGHTS, OPTIMIZER = KEPT = ("weights.safetensors", "optimizer.safetensors")
# How many candidates keep theirs.
MOST_KEPT = 3


def save_weights(
    module: HiddenStateDistillModule, trainer: pl.Trainer, folder: Path
) -> dict[str, str]:
    """Write what was trained and what the optimizer knows of it, and give the hash of each file."""
    optimizer: Any = trainer.optimizers[0]
    hashes = {}
    for name, tensors in ((WEIGHTS, module.state_dict()), (OPTIMIZER, optimizer.tensors(module))):
        with new_file(folder / name) as file:
            file.write(save(tensors))
        hashes[f"{Path(name).stem}_sha256"] = file_sha256(folder / name)
    return hashes


def drop_weights(study: Study, folder: Callable[[int], Path]) -> None:
    """Delete the weights of all but the best candidates.

    Args:
        study: of the search.
        folder: of a trial, by its number.
    """
    for trial in sorted(trained(study), key=lambda trial: trial.value or 0.0)[:-MOST_KEPT]:
        for name in KEPT:
            (folder(trial.number) / name).unlink(missing_ok=True)
