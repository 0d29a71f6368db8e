"""Every path of a run, and the one way to write a file: beside its target, then renamed."""

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
ASIDE = "_set_aside"  # how a hidden name ends of what is about to be replaced; longer than what is drawn
# Beside the runs, below their root.
INPUTS = "inputs"  # objects that were given from Python
SHARED = ("tokens", "teacher_states", INPUTS)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Run:
    """The folder ``<root>/<name>/`` of one study.

    A stage is done when its last file is there: ``best_student.yaml`` (search),
    ``full_kd/result.json``, ``glue/results.json``, the folder ``student/`` (export) and
    ``report.html``. Each appears whole or not at all, and the whole run is done when they are
    there, and ``manifest.json`` beside them.

    Args:
        root: the folder of all runs, normally ``lightning_logs``.
        name: letters, digits, ``_``, ``-`` and ``.``; at most 100; no path.

    Raises:
        UserError: the name is not such a name, or that of a folder that all runs share.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"The run name {name!r} is not valid: use letters, digits, '_', '-', '.' (at most 100, no '.' first)."
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
        self.choice = self.folder / "time_budget.json"  # of a run that is to end in time
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
        """The folder of a trial: ``trial_0007``."""
        return self.folder / f"trial_{number:04d}"

    @property
    def stillness(self) -> Path:
        """The lock of this user's workers of this machine; on its own disk, for it is taken at each step."""
        key = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"kdnas-{os.getuid()}-{key}-stillness.lock"

    def check_writable(self) -> None:
        """Fail now, not after training, where nothing can be written. Leaves nothing behind.

        Raises:
            UserError: the folder is a link, or one in it leads out of it, or it takes no new file,
                or the nearest parent does not.
        """
        self.refuse_links()
        check_writable(self.folder, "--root")

    def refuse_links(self) -> None:
        """Refuse a run with links that lead out of it: nothing is written or deleted through them.

        Raises:
            UserError: with the first.
        """
        if os.path.islink(self.folder):
            raise UserError(
                f"{str(self.folder)!r} is a link to {os.readlink(self.folder)!r}: "
                "name the run that it leads to, and its --root."
            )
        home = self.folder.resolve()
        for path in links_in(self.folder):
            if not Path(os.path.realpath(path)).is_relative_to(home):
                raise UserError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, out of its run: "
                    "put there what it leads to, or remove it."
                )

    @contextmanager
    def alone(self, remedy: str) -> Iterator[None]:
        """Two processes must not make the same run; ``remedy`` is what the second one may do instead.

        Raises:
            UserError: another process makes it; with who that is.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path := self.folder / "run.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
            raise UserError(
                f"The run {self.name!r} is being made by {holder:.200}: {remedy}."
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
        """A folder is a comparison's, whose config names models, or a search's or a run's, and never both.

        Raises:
            UserError: it is of the other kind, or its config cannot be read.
        """
        if self.config.exists() and ("model" in read_yaml(self.config)) != is_comparison:
            ours, theirs = (
                ("a comparison", "a search") if is_comparison else ("a search", "a comparison")
            )
            raise UserError(
                f"{str(self.folder)!r} is the folder of {theirs}, not of {ours}: give another --name."
            )


def links_in(folder: Path) -> Iterator[Path]:
    """Every link in a folder and in the folders in it; none is followed."""
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            if os.path.islink(path := Path(place, name)):
                yield path


def free_name(root: str | Path, name: str) -> str:
    """The first of ``name``, ``name-2``, ``name-3``, ... that no run has.

    Args:
        root: the folder of all runs.
        name: of a run.

    Raises:
        UserError: the name is not such a name.
    """
    number = 1
    while Run(root, _numbered(name, number)).folder.exists():
        number += 1
    return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number < 2 else f"{name}-{number}"


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that takes no new file; where it is not there, the nearest parent. Leaves nothing behind.

    Args:
        folder: to write to.
        option: that names another.

    Raises:
        UserError: with the place and the reason.
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
    """The folder itself, or the nearest of its parents that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException) -> OSError | None:
    """That a disk is full, if an error came from it: whoever tidies up after that may miss a file."""
    found = (one for one in causes(error) if isinstance(one, OSError) and one.errno in FULL)
    return next(found, None)


def room(error: OSError) -> str:
    """What to add to an error: where a disk is full, how much is free there; else nothing."""
    if error.errno not in FULL or not isinstance(error.filename, str):
        return ""
    place = nearest_folder(Path(error.filename).parent)  # a new folder that failed is removed again
    return f" ({shutil.disk_usage(place).free:,} bytes are free there)"


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """An error of the disk that does not say where it was, as that of a write, says it."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that readers see the old one or the new one, never a part.

    The temporary file lies beside its target: a rename works within one file system only.

    Raises:
        UserError: a folder, a pipe or a device is there, which the file would replace.
    """
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    with _removed_if_it_fails(Path(temporary), path):
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        _sync(Path(temporary))  # what it holds is on the disk before, and the name afterwards
        os.replace(temporary, path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def this_host() -> str:
    """Where the number of a process means that process: this machine, and on Linux its namespace of numbers.

    Machines can share one name, and containers one machine; none sees a process of the others.
    """
    host = platform.node()
    with suppress(OSError):
        host += f"-{Path('/etc/machine-id').read_text().strip()[:8]}"
    with suppress(OSError):
        host += f"-{os.stat('/proc/self/ns/pid').st_ino:x}"
    return host


def owned(name: str) -> str:
    """How temporary names of this process begin, so that others can tell whether it is alive."""
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
        # For a full disk safetensors has an error of its own, and tokenizers a bare one; a write does not say where.
        is_theirs = isinstance(error, SafetensorError) or type(error) is Exception
        if is_theirs and (found := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        with placed(path):
            raise


def sweep(folder: Path, pattern: str = "**/.*") -> None:
    """Remove what processes of this machine that were killed have left: by default, what is half written.

    A folder that was about to be replaced gets its name back.

    Args:
        folder: to look into.
        pattern: of names that began as ``owned`` says.
    """
    mine = re.compile(rf"\.?(.+)\.{re.escape(this_host())}-(\d+)\.\w+")
    home = folder.resolve()
    for path in list(folder.glob(pattern)):
        if not path.parent.resolve().is_relative_to(home):
            continue  # a link leads there
        if (found := mine.fullmatch(path.name)) and not is_alive(int(found[2])):
            with suppress(OSError):  # another user's, or another start was faster
                if path.name.endswith(ASIDE) and not path.with_name(found[1]).exists():
                    os.replace(path, path.with_name(found[1]))
                else:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for what is not kept, removed with the object; those of killed processes go first."""
    sweep(Path(tempfile.gettempdir()), "kdnas.*")
    return tempfile.TemporaryDirectory(prefix=owned("kdnas"))


def is_alive(pid: int) -> bool:
    """Whether a process of this number lives on this machine; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def write_text(path: Path, text: str) -> None:
    """``new_file`` of text."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of indented JSON. NaN and infinity are refused: JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that ``write_json`` wrote.

    Raises:
        UserError: somebody else wrote it, or the disk has damaged it.
    """
    refuse_special(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({first_line(error)}): delete it, and the same command makes it again."
        ) from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object for ``json.loads``, which of a key given twice would take the last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.100} is given twice")
        found[key] = value
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path | os.DirEntry[str]) -> list[int]:
    """A file's size and time of change: another stamp, and its bytes may be others."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_stamps(path: Path) -> dict[str, list[Any]]:
    """The stamps that ``write_json`` wrote of files when their bytes were last checked, by name.

    So what one process has hashed, no other hashes again. Nothing where they are gone or damaged.
    """
    try:
        return dict(read_json(path))
    except (FileNotFoundError, UserError, TypeError, ValueError):
        return {}


class KeptFile(io.FileIO):
    """A file that is read piece by piece, and stays readable where its name is removed; closed with its last user."""

    def piece(self, start: int, size: int) -> bytes:
        """So many bytes from a place; processes and threads do not disturb each other."""
        return os.pread(self.fileno(), size, start)

    def __del__(self) -> None:
        self.close()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears whole: fill the one that is yielded, and it is renamed to ``path`` at the end.

    An exception removes it. A folder that is there already changes places with it only then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    with _removed_if_it_fails(temporary, path):
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for its owner alone
            _sync(file)
        _sync(temporary)
        if path.exists():
            _exchange(temporary, path)
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, path)
        _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Two folders change names, in three steps that are taken back if one fails."""
    aside = Path(tempfile.mkdtemp(dir=other.parent, prefix=_prefix(other), suffix=ASIDE))
    os.replace(other, aside)
    try:
        os.replace(one, other)
    except BaseException:
        os.replace(aside, other)
        raise
    os.replace(aside, one)


def short_names(sources: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart: ``a/student`` and ``b/student``, or ``teacher``."""
    parts = [Path(source).parts for source in sources]
    longest = max(map(len, parts), default=1)
    ends = [["/".join(part[-length:]) for part in parts] for length in range(1, longest + 1)]
    return next((names for names in ends if len(set(names)) == len(names)), list(sources))
