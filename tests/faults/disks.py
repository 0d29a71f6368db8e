"""Disks: full, limited, failing at the N-th call, and read-only."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.checks import has, is_one_line
from tests.faults.harness import Bench, NotRun, Row, fault, name_of


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotRun(f"no disk can be mounted: {error}") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


@fault("F05", "a disk that is full, or fills up, under the teacher's states or a run; then larger")
def full_disk(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018 (its states lie elsewhere)
    sizes = {"states": (64,), "run": (420,)}
    if not bench.quick:
        sizes = {"states": (32, 64, 128, 256), "run": range(20, 460, 40)}
    for what, kilobytes in ((what, size) for what, each in sizes.items() for size in each):
        with tmpfs(bench.folder / "small", f"size={kilobytes}k") as disk:
            name = bench.new_name()
            bench.roots |= {name: disk} if what == "run" else {}
            more = [f"--states.folder={disk}"] if what == "states" else []
            args = bench.search(name, *more)
            code, error = bench.call(args)
            row.tried += 1
            row.expect(f"{kilobytes} kB", code, error, (2, 3), " are free")
            known = bench.results(name)
            enlarge(disk)
            bench.go_on(row, f"{kilobytes} kB", args, known)


@fault("F06", "a limit on the size of files in a search; then none", quick=False)
def file_limit(bench: Bench, row: Row) -> None:
    for half in range(20, 40, 6 if bench.quick else 1):  # 1 kB to 740 kB
        args, size = bench.search(name := bench.new_name()), int(2 ** (half / 2))
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        code, error = bench.call_alone(args, preexec_fn=limit)
        row.tried += code != 0
        row.expect(f"{size} bytes", code, error, (0, 3))
        bench.go_on(row, f"{size} bytes", args, bench.results(name))


SYSTEM_CALLS = ("fsync,fdatasync", "pwrite64", "rename,renameat2", "ftruncate", "write")


@fault("F07", "the N-th system call of a search, and of what follows it, fails, once", quick=False)
def failing_calls(bench: Bench, row: Row) -> None:
    if not shutil.which("strace"):
        raise NotRun("needs strace")
    numbers = (3,) if bench.quick else (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)
    for call in SYSTEM_CALLS[: 2 if bench.quick else None]:
        for number in numbers:
            args = bench.search(name := bench.new_name())
            if not fails(bench, row, args, call, number):
                break
            bench.go_on(row, f"{call} {number}", args, bench.results(name))
    if not row.tried:
        raise NotRun("strace may not look into processes here")
    if not bench.quick:
        failing_calls_of_a_run(bench, row)


def fails(bench: Bench, row: Row, args: list[str], call: str, number: int) -> bool:
    """Run a command whose N-th call of a thread fails; whether there were so many."""
    trace = bench.folder / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "-o", str(trace), f"--trace={call}"]
    code, error = bench.call_alone(
        args, before=[*strace, f"--inject={call}:error=EIO:when={number}"]
    )
    if not has(trace, b"(INJECTED)"):
        return False
    row.tried += 1
    # The call that fails in another thread may be the telling of the first.
    lines = trace.read_text(errors="replace").splitlines()
    is_lost = any('write(2, "kdnas: ' in line and "(INJECTED)" in line for line in lines)
    is_right = code == 0 or (code == 3 and (is_one_line(error) or is_lost))
    row.fault("undetected", f"{call} {number} of {args[0]}: exit {code}, {error}", not is_right)
    return True


def failing_calls_of_a_run(bench: Bench, row: Row) -> None:
    """In full KD, fine-tuning, export and report: the next start ends with the same weights."""
    args, whole = bench.stopped_run()
    run = bench.run(name_of(args))
    bench.succeed(row, "unharmed", args)
    weights = (run / "student" / "model.safetensors").read_bytes()
    for call in SYSTEM_CALLS:
        for number in (1, 3, 8, 21, 55, 144):
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            if not fails(bench, row, args, call, number):
                break
            bench.go_on(row, f"{call} {number}", args, {})
            is_equal = (run / "student" / "model.safetensors").read_bytes() == weights
            row.fault("unequal", f"{call} {number}: other weights", not is_equal)


@fault("F32", "an output folder that cannot be written to: told at the start")
def read_only(bench: Bench, row: Row) -> None:
    def refuse(what: str, option: str, words: str, call: Callable | None = None) -> None:
        bench.refuse(row, what, bench.search(bench.new_name(), option), words, call)

    refuse("run", "--root=/proc/kdnas", "Cannot write to")
    refuse("states", "--states.folder=/proc/kdnas", "Cannot write to")
    with row.part(), tmpfs(bench.folder / "disk", "ro") as disk:
        refuse("disk", f"--root={disk}", "Read-only file system")
    if bench.quick:
        return
    (folder := bench.folder / "closed").mkdir()
    with row.part():
        if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
            raise NotRun("no folder can be made immutable")
        refuse("an immutable folder", f"--root={folder}", "Operation not permitted")
        subprocess.run(["chattr", "-i", folder], check=True)
    folder.chmod(0o555)
    # Root ignores modes, but for this capability.
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    alone = partial(bench.call_alone, before=drop if os.getuid() == 0 else [])
    refuse("mode 0555", f"--root={folder}", "Permission denied", alone)
