"""What a folder was made with: a name stands for one set of settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdnas.system.errors import UserError
from kdnas.system.files import read_json, write_json


def keep_settings(path: Path, asked: Mapping[str, Any], whose: str, remedy: str) -> None:
    """Write down what a folder is made with; where that is there already, refuse other settings.

    Args:
        path: of the file.
        asked: flat, plain JSON.
        whose: what it is the settings of, as a sentence begins.
        remedy: what else than going back to them helps.

    Raises:
        UserError: with every setting that differs, what is known and what is asked for.
    """
    plain = json.loads(json.dumps(asked))
    if path.exists():
        refuse_difference(read_json(path), plain, whose, remedy)
    else:
        write_json(path, plain)


def refuse_difference(
    known: Mapping[str, Any], asked: Mapping[str, Any], whose: str, remedy: str
) -> None:
    """Refuse settings that differ; arguments and errors are those of ``keep_settings``."""
    shown = [
        f"{key}: {known.get(key)!r} there, {asked.get(key)!r} now"
        for key in {**known, **asked}
        if known.get(key) != asked.get(key)
    ]
    if shown:
        raise UserError(
            f"{whose} was made with other settings ({'; '.join(shown)}): go back to them, or {remedy}."
        )
