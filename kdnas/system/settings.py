"""The settings that a folder was made with, which must not change later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdnas.system.errors import UserError
from kdnas.system.files import read_json, write_json


def keep_settings(path: Path, asked: Mapping[str, Any], whose: str, remedy: str) -> None:
    """Write the settings of a folder to a file; if the file exists, they must equal it.

    Args:
        path: path of the JSON file.
        asked: the settings, a flat mapping of JSON values.
        whose: what was made with the settings in the file, as the subject of the error message,
            such as ``The run 'x'``.
        remedy: what the user can do instead of going back to the settings in the file, as the end
            of the error message.

    Raises:
        UserError: a setting differs from the file; the message names all that differ, each with
            both values.
    """
    plain = json.loads(json.dumps(asked))
    if path.exists():
        refuse_difference(read_json(path), plain, whose, remedy)
    else:
        write_json(path, plain)


def refuse_difference(
    known: Mapping[str, Any], asked: Mapping[str, Any], whose: str, remedy: str
) -> None:
    """Raise an error if settings differ from those with which something was made.

    Args:
        known: settings with which it was made.
        asked: settings that are wanted now.
        whose: what was made, as the subject of the error message.
        remedy: what the user can do instead of going back to ``known``, as the end of the error
            message.

    Raises:
        UserError: a setting differs; the message names all that differ, each with both values.
    """
    shown = [
        f"{key}: {known.get(key)!r} there, {asked.get(key)!r} now"
        for key in {**known, **asked}
        if known.get(key) != asked.get(key)
    ]
    if shown:
        raise UserError(
            f"{whose} was made with other settings ({'; '.join(shown)}): go back to them, or {remedy}."
        )
