"""Finished results that the study's database could not take, kept beside the run until it can."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from kdnas.system.errors import UserError
from kdnas.system.files import read_json, write_json

log = logging.getLogger(__name__)

KEPT = ("set_trial_user_attr", "set_trial_system_attr", "set_trial_intermediate_value")


def keep_result(
    folder: Path,
    study: str,
    number: int,
    written: list[list[Any]],
    value: float,
    since: float | None = None,
) -> Path:
    """Write down a finished trial that the database could not take; ``take_up`` gives it to it.

    Args:
        folder: of the run.
        study: its name.
        number: of the trial.
        written: what was written of it, as ``PatientStorage`` keeps it.
        value: of the trial.
        since: when it began, by which it is told from another one of this number, in a study that was made anew.
    """
    path = folder / f"unsent_{number:04d}.json"
    write_json(
        path, {"study": study, "number": number, "since": since, "written": written, "value": value}
    )
    return path


def take_up(storage: Any, study_id: int) -> None:
    """Give a study of a ``PatientStorage`` the results that were kept, each once; those of others are left alone."""
    for path in sorted(storage.folder.glob("unsent_*.json")) if storage.folder else ():
        try:
            known = path, path.stat().st_mtime_ns
            if known in storage.foreign:
                continue
            kept = read_json(path)
            study_name, number, written, value = (
                kept[key] for key in ("study", "number", "written", "value")
            )
        except FileNotFoundError:  # another start was faster
            continue
        except (KeyError, TypeError, UserError):
            log.warning("%s is no result that was kept: move it away.", path)
            storage.foreign.add(known)
            continue
        if study_name != storage.get_study_name_from_id(study_id):
            continue
        try:
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            if kept.get("since") not in (None, storage.get_trial(trial_id).user_attrs.get("since")):
                raise KeyError(number)
            for name, *args in written:
                if name in KEPT:
                    getattr(storage, name)(trial_id, *args)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
            log.info("Trial %d: its result, which the database could not take, is stored.", number)
        except UpdateFinishedTrialError:
            if (
                storage.get_trial(trial_id).state != TrialState.COMPLETE
            ):  # by another, which took it up too
                log.warning(
                    "Trial %d was given up by another worker before its result came.", number
                )
        except KeyError:
            log.warning(
                "%s is of a study that is gone: in this one there is no trial %d, or another.",
                path,
                number,
            )
            storage.foreign.add(known)
            continue
        with suppress(OSError):  # another's, or not ours to remove: it is stored
            path.unlink()
