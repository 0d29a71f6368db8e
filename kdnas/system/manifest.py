"""Write ``manifest.json``, a list of the files of a folder with their hashes, and check it.

A finished run, fit, comparison or export has a manifest.
"""

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from kdnas import __version__
from kdnas.system.errors import UserError
from kdnas.system.files import MANIFEST, file_sha256, read_json, write_json

LIBRARIES = ("torch", "transformers", "lightning", "optuna", "onnxruntime", "numpy")


def version(library: str) -> str | None:
    """Return the version of a library; None: it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the ``manifest.json`` of a folder.

    The manifest has the size and SHA-256 of every file in the folder, and the versions of
    libraries. Files that are added later are not in it, so write it last.

    Args:
        folder: folder whose files to list.
        about: further entries of the manifest, such as the command.
    """
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in _files(folder, folder / MANIFEST)
    }
    versions = {"kdnas": __version__, "python": platform.python_version()}
    versions |= {name: found for name in LIBRARIES if (found := version(name))}
    write_json(folder / MANIFEST, {**about, "versions": versions, "files": files})


def renew(path: Path) -> None:
    """Update the manifests in the parent folders of a path that kdnas has rewritten.

    Entries of other files stay, so ``verify`` still reports other files that somebody has changed.
    Folders without a kdnas manifest are skipped.

    Args:
        path: path of a rewritten file, or of a folder whose content was rewritten.
    """
    path = path.resolve()
    made = [path]
    for folder in path.parents:
        known = _ours(folder / MANIFEST)
        if known is None:
            continue
        files = {
            name: entry
            for name, entry in known["files"].items()
            if not _is_within(folder / name, made)
        }
        found = (file for place in made for file in ([place] if place.is_file() else _files(place)))
        files |= {file.relative_to(folder).as_posix(): _entry(file) for file in found}
        write_json(folder / MANIFEST, known | {"files": files})
        made.append(folder / MANIFEST)  # listed by the manifests of the folders around it


def _ours(path: Path) -> dict[str, Any] | None:
    """Read a manifest; return None if it is missing, damaged, or was not written by kdnas."""
    try:
        values = _read(path) if os.path.isfile(path) else {}
    except (UserError, OSError):
        return None
    versions = values.get("versions")
    return values if isinstance(versions, dict) and "kdnas" in versions else None


def _is_within(path: Path, places: Iterable[Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UserError(
            f"{str(path)!r} is not a manifest of kdnas, since it lists no files: give another "
            "folder."
        )
    return dict(values)


def _entry(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        return {"link": os.readlink(path)}
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _files(folder: Path, but: Path | None = None) -> Iterator[Path]:
    """Yield the files and links in a folder, except ``but``, locks and hidden files."""
    for place, folders, names in os.walk(folder):  # does not follow links
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(
            [*names, *(name for name in folders if (Path(place) / name).is_symlink())]
        ):
            path = Path(place) / name
            if not name.startswith(".") and not name.endswith(".lock") and path != but:
                yield path


def verify(folder: Path) -> tuple[int, list[str]]:
    """Compare a folder with its manifest; files outside the folder are never read.

    Returns:
        The number of files in the manifest, and a line for each fault. A fault is a file that is
            missing, has changed, has become a link or leads out of the folder, or is not in the
            manifest. File names are quoted as by ``repr``, since they may be malicious.

    Raises:
        UserError: there is no manifest, or it is not valid.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no manifest.json, so it holds no finished run or export: finish "
            "it first, or give another folder."
        )
    files = _read(path)["files"]
    faults = []
    for name, entry in files.items():
        target = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            faults.append(f"{name!r}: leaves the folder")
        elif any(part.is_symlink() for part in target.parents if folder in part.parents):
            faults.append(f"{name!r}: is a link")
        elif target.is_symlink():
            if entry != _entry(target):
                faults.append(
                    f"{name!r}: is a link"
                    if "link" not in entry
                    else f"{name!r}: links to another file"
                )
            elif not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
                faults.append(f"{name!r}: links out of the folder")
        elif not target.is_file():
            faults.append(f"{name!r}: is missing")
        elif entry != (found := _entry(target)):
            faults.append(
                f"{name!r}: has changed since it was written ({found['bytes']:,} bytes now)"
            )
    names = {str(path.relative_to(folder)) for path in _files(folder, path)}
    return len(files), faults + [
        f"{name!r}: is not in the manifest" for name in sorted(names - files.keys())
    ]
