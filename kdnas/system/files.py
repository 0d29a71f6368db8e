"""The paths of a run, and functions to write files and folders that appear whole or not at all."""

import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from kdnas.system.errors import UserError, causes, first_line
from kdnas.system.yaml import read_yaml, refuse_special

MANIFEST = "manifest.json"
# Suffix of the hidden name of a folder that is being replaced. It is longer than the random part of tempfile's names,
# which so cannot be mistaken for it.
ASIDE = "_set_aside"
# Folders beside the runs, in the folder of all runs.
INPUTS = "inputs"  # objects that were given from Python
SHARED = ("tokens", "teacher_states", INPUTS)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Run:
    """The paths of a run, which is in the folder ``<root>/<name>/``.

    A run has five stages. A stage is finished when its last file exists: ``best_student.yaml``
    (search), ``full_kd/result.json`` (full KD), ``glue/results.json`` (fine-tuning), the folder
    ``student/`` (export) and ``report.html`` (report). Each of these appears whole or not at all.
    The run is finished when they and ``manifest.json`` exist.

    Args:
        root: folder of all runs, normally ``lightning_logs``.
        name: name of the run: at most 100 letters, digits, ``_``, ``-`` and ``.``, without ``-`` or
            ``.`` at the beginning.

    Raises:
        UserError: the name is not valid, or is that of a folder that all runs share.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"The run name {name!r} is not valid: use at most 100 letters, digits, '_', '-', '.', "
                "and no '-' or '.' first."
            )
        if name in SHARED:
            raise UserError(
                f"The run name {name!r} is the folder that all runs share: choose another."
            )
        self.name = name
        self.root = Path(root)
        self.folder = self.root / name
        self.tokens, self.states, _ = (self.root / shared for shared in SHARED)
        self.config = self.folder / "config.yaml"
        self.made_with = self.folder / "made_with.json"
        self.choice = self.folder / "time_budget.json"  # only of a run with a time budget
        self.text = self.folder / "text"
        self.study_db = self.folder / "study.db"
        self.trials_csv = self.folder / "trials.csv"
        self.best_student = self.folder / "best_student.yaml"
        self.full_kd = self.folder / "full_kd"
        self.glue = self.folder / "glue"
        self.student = self.folder / "student"
        self.report = self.folder / "report.html"
        self.manifest = self.folder / MANIFEST

    def trial(self, number: int) -> Path:
        """Return the folder of a trial, such as ``trial_0007``."""
        return self.folder / f"trial_{number:04d}"

    @property
    def stillness(self) -> Path:
        """Path of the lock that pauses training on this machine while latency is measured.

        The lock is on a local disk, because each training step acquires it.
        """
        key = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"kdnas-{os.getuid()}-{key}-stillness.lock"

    def check_writable(self) -> None:
        """Check, before training, that the run's folder can be written to.

        No file is left behind.

        Raises:
            UserError: no file can be made in the folder (or, if it does not exist, in its nearest
                parent that does); the folder is a link; or a link in the folder leads out of it.
        """
        self.refuse_links()
        check_writable(self.folder, "--root")

    def refuse_links(self) -> None:
        """Raise an error if the run's folder is a link or contains links to places outside it.

        Otherwise kdnas could change files outside the folder.

        Raises:
            UserError: there is such a link.
        """
        if os.path.islink(self.folder):
            raise UserError(
                f"{str(self.folder)!r} is a link to {os.readlink(self.folder)!r}: give the name "
                "and the --root of that run instead."
            )
        home = self.folder.resolve()
        for path in links_in(self.folder):
            if not Path(os.path.realpath(path)).is_relative_to(home):
                raise UserError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, outside the run's folder: "
                    "replace the link with a copy, or remove it."
                )

    @contextmanager
    def alone(self, remedy: str) -> Iterator[None]:
        """Context manager that locks the run, so that no other process works on it.

        Args:
            remedy: what the user can do if another process holds the lock, as the end of the error
                message.

        Raises:
            UserError: another process works on the run; the message names the process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path := self.folder / "run.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
            raise UserError(
                f"The run {self.name!r} is in use by {holder:.200}: {remedy}."
            ) from error
        try:
            with placed(path):
                path.write_text(
                    f"process {os.getpid()} of {platform.node()}, since {time.strftime('%F %T')}"
                )
            yield
        finally:
            lock.release()

    def refuse_other_kind(self, is_comparison: bool) -> None:
        """Raise an error if a search's folder is used for a comparison of models, or the reverse.

        Only the ``config.yaml`` of a comparison has the key ``model``.

        Args:
            is_comparison: whether the folder is to be used for a comparison (``kdnas glue``) or for
                a search.

        Raises:
            UserError: the folder was used for the other kind, or its ``config.yaml`` cannot be
                read.
        """
        if self.config.exists() and ("model" in read_yaml(self.config)) != is_comparison:
            ours, theirs = (
                ("a comparison", "a search") if is_comparison else ("a search", "a comparison")
            )
            raise UserError(
                f"{str(self.folder)!r} was made as the folder of {theirs}, and cannot be used for "
                f"{ours}: give another --name."
            )


def links_in(folder: Path) -> Iterator[Path]:
    """Yield every link in a folder and its subfolders; links are not followed."""
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            if os.path.islink(path := Path(place, name)):
                yield path


def free_name(root: str | Path, name: str) -> str:
    """Return the first of ``name``, ``name-2``, ``name-3``, ... that is not the name of a run.

    Args:
        root: folder of all runs.
        name: wanted name.

    Raises:
        UserError: ``name`` is not valid for a run.
    """
    number = 1
    while Run(root, _numbered(name, number)).folder.exists():
        number += 1
    return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number < 2 else f"{name}-{number}"


def check_writable(folder: Path, option: str) -> None:
    """Check that a file can be made in a folder, or in its nearest parent that exists.

    No file is left behind.

    Args:
        folder: folder to write to; it may not exist yet.
        option: option by which the user can give another folder, for the error message.

    Raises:
        UserError: no file can be made; the message has the folder and the reason.
    """
    place = folder
    try:
        place = nearest_folder(folder)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write to {str(folder)!r} ({error.strerror} at {str(place)!r}): "
            f"choose another folder with {option}, or change its permissions."
        ) from error


def nearest_folder(folder: Path) -> Path:
    """Return the folder itself if it exists, else its nearest parent that does."""
    while not folder.exists():
        folder = folder.parent
    return folder


FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException) -> OSError | None:
    """Return the disk-full error among an error and its causes; None: there is none.

    The causes matter because the clean-up after a full disk may raise another error.
    """
    found = (one for one in causes(error) if isinstance(one, OSError) and one.errno in FULL)
    return next(found, None)


def room(error: OSError) -> str:
    """Return a full disk's free space as text for an error message; ``""`` for other errors."""
    if error.errno not in FULL or not isinstance(error.filename, str):
        return ""
    place = nearest_folder(Path(error.filename).parent)  # new_folder may have removed it
    return f" ({shutil.disk_usage(place).free:,} bytes are free there)"


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """Context manager that sets the file name of an OSError to ``path`` if the error has none.

    The error of a failed write, for instance, has none.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Context manager to write a file: readers see the old file or the whole new one, never a part.

    It gives a temporary file in the same folder, which is renamed to ``path`` at the end. After an
    exception the temporary file is removed and an old file is kept.

    Raises:
        UserError: ``path`` is a folder, a pipe or a device.
    """
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    with _removed_if_it_fails(Path(temporary), path):
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        _sync(Path(temporary))  # the content must be on the disk before the name is
        os.replace(temporary, path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def this_host() -> str:
    """Return an identifier of the machine or container, in which process ids are unique.

    It is made of the machine's name and, on Linux, of the machine's id and the namespace of process
    ids. Several machines can have the same name, and several containers can run on a machine.
    """
    host = platform.node()
    with suppress(OSError):
        host += f"-{Path('/etc/machine-id').read_text().strip()[:8]}"
    with suppress(OSError):
        host += f"-{os.stat('/proc/self/ns/pid').st_ino:x}"
    return host


def owned(name: str) -> str:
    """Return a prefix for the name of a temporary file or folder, with this process's id.

    ``sweep`` uses the id to recognise what a killed process has left.

    Args:
        name: beginning of the prefix, such as the final name of the file or folder.
    """
    return f"{name}.{this_host()}-{os.getpid()}."


def _prefix(path: Path) -> str:
    return f".{owned(path.name)}"


@contextmanager
def _removed_if_it_fails(temporary: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        # For a full disk, safetensors has its own class of error, and tokenizers raises a bare Exception.
        is_theirs = isinstance(error, SafetensorError) or type(error) is Exception
        if is_theirs and (found := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        with placed(path):
            raise


def sweep(folder: Path, pattern: str = "**/.*") -> None:
    """Remove temporary files and folders that killed processes of this machine have left.

    If a process was killed while it replaced a folder, the old folder gets its name back.

    Args:
        folder: folder to search.
        pattern: glob pattern of the temporary files and folders; only those whose names have a
            prefix from ``owned`` are removed. The default finds hidden ones, also in subfolders.
    """
    mine = re.compile(rf"\.?(.+)\.{re.escape(this_host())}-(\d+)\.\w+")
    home = folder.resolve()
    for path in list(folder.glob(pattern)):
        if not path.parent.resolve().is_relative_to(home):
            continue  # a link leads there
        if (found := mine.fullmatch(path.name)) and not is_alive(int(found[2])):
            with suppress(OSError):  # it is another user's, or another process was faster
                if path.name.endswith(ASIDE) and not path.with_name(found[1]).exists():
                    os.replace(path, path.with_name(found[1]))
                else:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a ``TemporaryDirectory``, after removing those that killed kdnas processes left."""
    sweep(Path(tempfile.gettempdir()), "kdnas.*")
    return tempfile.TemporaryDirectory(prefix=owned("kdnas"))


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine; a zombie does not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def write_text(path: Path, text: str) -> None:
    """Write text to a file; readers see the old file or the whole new one."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; readers see the old file or the whole new one.

    Raises:
        ValueError: the value contains NaN or infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not valid JSON, or is a folder, a pipe or a device.
    """
    refuse_special(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({first_line(error)}): delete it and repeat the command, "
            "which makes it again."
        ) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object; a duplicate key is an error.

    It is an ``object_pairs_hook`` for ``json.loads``, which by default takes the last value of a
    duplicate key.

    Args:
        pairs: keys and values of the object.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.100} is given twice")
        found[key] = value
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path | os.DirEntry[str]) -> list[int]:
    """Return a file's stamp: its size in bytes and its modification time in ns.

    While the stamp is the same, the file is taken to be unchanged.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_stamps(path: Path) -> dict[str, list[Any]]:
    """Read the stamps (size, modification time) of files that were already checked by hashing.

    A file with the same stamp need not be hashed again.

    Args:
        path: JSON file that maps names of files to stamps.

    Returns:
        The content of ``path``; empty if ``path`` is missing or damaged.
    """
    try:
        return dict(read_json(path))
    except (FileNotFoundError, UserError, TypeError, ValueError):
        return {}


class KeptFile(io.FileIO):
    """A file that stays open, so that parts of it can be read even after the file was deleted.

    It is closed when Python deletes this object.
    """

    def piece(self, start: int, size: int) -> bytes:
        """Read ``size`` bytes from byte ``start``; several processes may do so at once."""
        return os.pread(self.fileno(), size, start)

    def __del__(self) -> None:
        self.close()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context manager to write a folder that appears whole or not at all.

    It gives a temporary folder to fill, which is renamed to ``path`` at the end and replaces an old
    folder there. After an exception the temporary folder is removed and the old folder is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    with _removed_if_it_fails(temporary, path):
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.rglob("*"):
            file.chmod(
                0o755 if file.is_dir() else 0o644
            )  # safetensors makes files for the owner only
            _sync(file)
        _sync(temporary)
        if path.exists():
            _exchange(temporary, path)
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, path)
        _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders; if this fails midway, ``other`` gets its name back."""
    aside = Path(tempfile.mkdtemp(dir=other.parent, prefix=_prefix(other), suffix=ASIDE))
    os.replace(other, aside)
    try:
        os.replace(one, other)
    except BaseException:
        os.replace(aside, other)
        raise
    os.replace(aside, one)


def short_names(sources: Sequence[str]) -> list[str]:
    """Shorten paths to as few of their last parts as keep the paths distinct.

    For example, ``x/a/student`` and ``x/b/student`` become ``a/student`` and ``b/student``. If two
    paths are equal, all are returned as they are.
    """
    parts = [Path(source).parts for source in sources]
    longest = max(map(len, parts), default=1)
    ends = [["/".join(part[-length:]) for part in parts] for length in range(1, longest + 1)]
    return next((names for names in ends if len(set(names)) == len(names)), list(sources))
