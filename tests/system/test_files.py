"""Run folders, files that appear whole, and the two kinds of error."""

import errno
import itertools
import json
import os
import platform
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdnas.cli.main import main
from kdnas.system.errors import CandidateFailed, UserError, causes, nearest
from kdnas.system.files import (
    Run,
    is_alive,
    new_file,
    new_folder,
    owned,
    placed,
    read_json,
    sweep,
    temporary_folder,
    this_host,
    write_json,
    write_text,
)
from tests.conftest import examples


@pytest.mark.parametrize("name", ["quickstart", "a", "7", "_x", "a.b-c_D", "x" * 100])
def test_plain_names_are_valid(name):
    assert Run("logs", name).folder == Path("logs") / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "a\n", "é", "a\\b", "x" * 101, "tokens"],
)
def test_names_that_are_no_plain_names_are_refused(name):
    with pytest.raises(UserError) as caught:
        Run("logs", name)
    assert repr(name) in str(caught.value)


@examples(200)
@given(st.one_of(st.text(), st.text("ab/.\\\0\n-_~%é", max_size=6)))
def test_any_name_is_refused_or_one_folder_within_the_root(name):
    with tempfile.TemporaryDirectory() as parent:
        try:
            run = Run(root := f"{parent}/logs", name)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and os.listdir(parent) == []
        else:
            assert os.path.normpath(run.folder) == f"{root}/{name}" and "/" not in name
            run.check_writable()
            assert os.listdir(parent) == []
            write_text(run.config, name)
            assert {str(path) for path in Path(parent).rglob("*")} == {
                root,
                f"{root}/{name}",
                str(run.config),
            }


def test_making_a_run_touches_no_disk(tmp_path):
    run = Run(tmp_path / "logs", "a")
    run.check_writable()
    assert list(tmp_path.iterdir()) == []


def test_the_artefacts_have_their_promised_names():
    run = Run("logs", "quickstart")
    names = [
        run.config,
        run.study_db,
        run.trials_csv,
        run.best_student,
        run.full_kd,
        run.glue,
        run.student,
        run.report,
    ]
    assert [str(path.relative_to("logs/quickstart")) for path in names] == [
        "config.yaml",
        "study.db",
        "trials.csv",
        "best_student.yaml",
        "full_kd",
        "glue",
        "student",
        "report.html",
    ]
    assert [run.trial(number).name for number in (7, 12345)] == ["trial_0007", "trial_12345"]


def test_the_lock_of_each_step_is_on_this_machines_own_disk_and_one_users(tmp_path, monkeypatch):
    run = Run(tmp_path, "a")
    assert run.stillness.parent == Path(tempfile.gettempdir())
    monkeypatch.chdir(tmp_path)
    assert Run(".", "a").stillness == run.stillness != Run(".", "b").stillness
    mine = run.stillness
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert run.stillness != mine, "another user's cannot be opened"


def test_two_processes_do_not_make_the_same_run(tmp_path):
    code = "import sys; from kdnas.system.files import Run\n"
    code += "with Run(sys.argv[1], 'a').alone('wait'): print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        message = f"^The run 'a' is in use by process {other.pid} of .*: wait.$"
        with pytest.raises(UserError, match=message), Run(tmp_path, "a").alone("wait"):
            pass
        with Run(tmp_path, "b").alone("wait"):
            other.kill()
    with Run(tmp_path, "a").alone("wait"):
        pass


def test_a_folder_that_is_a_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=r"logs/a' \(Not a directory"):
        Run(tmp_path / "logs", "a").check_writable()


def test_a_folder_that_nobody_can_write_to_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"Cannot write to '/proc/kdnas/a'.*at '/proc'"):
        Run("/proc/kdnas", "a").check_writable()


@pytest.mark.parametrize("target", ["../elsewhere", "b"])
def test_a_run_that_is_a_link_is_refused(target, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs" / "b").mkdir(parents=True)
    link = tmp_path / "logs" / "a"
    link.symlink_to(target)
    with pytest.raises(UserError, match=f"{link}' is a link to '{target}': give the name"):
        Run(tmp_path / "logs", "a").check_writable()
    assert main(["report", "--run=a", f"--root={link.parent}"]) == 2
    assert capsys.readouterr().err.startswith(f"kdnas: '{link}' is a link to ")


LINKS = [
    "trial_0000",
    "search",
    "study.db",
    "run.lock",
    "full_kd/last.ckpt",
    "glue/x/y",
    "report.html",
]


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_or_deleted_through_a_link_out_of_a_run(
    name, tmp_path, tiny_teacher, text_file, capsys
):
    outside = tmp_path / "outside"
    (outside / "trial_0000").mkdir(parents=True)
    (outside / "precious").write_text("precious")
    link = tmp_path / "logs" / "a" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / ("precious" if "." in name else ""))
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    made = [f"--teacher={tiny_teacher}", f"--text={text_file}"]
    commands = {
        "search": made,
        "run": made,
        "glue": [f"--model={tiny_teacher}", "--task=sst2"],
        "export": ["--run=a"],
        "report": ["--run=a"],
    }
    for command, options in commands.items():
        given = ["--name=a"] * (command in ("search", "run", "glue"))
        assert main([command, *given, f"--root={tmp_path / 'logs'}", *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"kdnas: {str(link)!r} is a link to ") and error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    assert [path for path in (tmp_path / "logs").rglob("*") if path.is_file()] in ([], [link])


def test_a_link_within_a_run_is_none_out_of_it(tmp_path):
    run = Run(tmp_path, "a")
    (run.folder / "trial_0000").mkdir(parents=True)
    (run.folder / "latest").symlink_to("trial_0000")
    run.check_writable()


def test_a_sweep_follows_no_link(tmp_path):
    left = f".{owned('x')}".replace(str(os.getpid()), "999999999")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / f"{left}abc").write_text("precious")
    (tmp_path / "root" / "version_0").mkdir(parents=True)
    (tmp_path / "root" / "version_0" / f"{left}abc").write_text("left")
    (tmp_path / "root" / "version_1").symlink_to(tmp_path / "outside")
    sweep(tmp_path / "root", "version_*/**/.*")
    assert len(list((tmp_path / "outside").iterdir())) == 1
    assert not list((tmp_path / "root" / "version_0").iterdir())


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission_is_refused(mode):
    user = os.geteuid()
    with (
        tempfile.TemporaryDirectory() as parent
    ):  # not tmp_path, which another user cannot even reach
        os.chmod(parent, mode)
        try:
            if user == 0:  # permissions do not bind root
                os.seteuid(65534)
            with pytest.raises(
                UserError, match=f"Cannot write to '{parent}/logs/a' .Permission denied"
            ):
                Run(f"{parent}/logs", "a").check_writable()
        finally:
            os.seteuid(user)


def test_text_is_written_whole_with_its_parents_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "één\n")
    write_text(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"
    assert [child.name for child in path.parent.iterdir()] == ["b.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_nothing_but_a_file_is_replaced(kind, tmp_path):
    path = tmp_path / "page.html"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(UserError, match="page.html' is a folder, a pipe or a device"):
        write_text(path, "text")
    assert os.path.samestat(path.lstat(), before) and list(tmp_path.iterdir()) == [path]


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"loss": 0.1, "history": [{"epoch": 0}], "name": "é", "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text()) == value


@pytest.mark.parametrize("content", [b"", b'{"loss": 0.', b"\xff", b"[" * 100_000])
def test_damaged_json_is_refused_by_name_with_the_remedy(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/a.json' is damaged .*: delete it"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_has_not(value, tmp_path):
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_appears_at_the_end_only(tmp_path):
    target = tmp_path / "runs" / "student"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert [child.name for child in target.parent.iterdir()] == ["student"]
    assert (target / "a").read_text() == "1"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "old").write_text("1")
    with new_folder(target) as folder:
        (folder / "new").write_text("2")
        assert (target / "old").exists()
    assert [child.name for child in target.iterdir()] == ["new"]
    assert [child.name for child in tmp_path.iterdir()] == ["student"]


def test_whichever_call_fails_old_or_new_is_there_whole(tmp_path, monkeypatch):
    """Every call that reaches the disk fails once, the first, the second, ..., until nothing fails any more."""
    write_text(tmp_path / "file", "old")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("old")
    calls: list[str] = []

    def failing(name, real, number):
        def call(*args, **options):
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **options)

        return call

    for number in itertools.count(1):
        calls.clear()
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "chmod", "open", "rmdir"):
                patch.setattr(os, name, failing(name, getattr(os, name), number))
            try:
                write_text(tmp_path / "file", f"new {number}")
                with new_folder(tmp_path / "folder") as folder:
                    (folder / "a").write_text(f"new {number}")
                    (folder / "b").touch()
            except OSError as error:
                assert error.errno == errno.EIO
        text, other = (tmp_path / "file").read_text(), (tmp_path / "folder" / "a").read_text()
        assert {text, other} <= {"old", *(f"new {n}" for n in range(1, number + 1))}
        assert (tmp_path / "folder" / "b").exists() == (other != "old")
        if len(calls) < number:
            break
    assert text == other == f"new {number}" and number > 12


def test_what_a_killed_process_has_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path):
    kill = "import os; from pathlib import Path; from kdnas.system.files import *; folder = Path(os.sys.argv[1])\n"
    kill += "with new_folder(folder / 'student') as new, new_file(folder / 'a' / 'b.json'):\n"
    kill += "    (new / 'half').touch(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", kill, str(tmp_path)]).returncode == -9
    (tmp_path / ".gitignore").touch()
    assert len(list(tmp_path.rglob(".*"))) == 3
    with new_folder(tmp_path / "other") as alive:
        sweep(tmp_path)
        assert sorted(tmp_path.rglob(".*")) == sorted([alive, tmp_path / ".gitignore"])


def test_a_kill_between_the_renames_gives_the_old_folder_back(
    tmp_path,
):
    kill = "import os; from pathlib import Path; from kdnas.system.files import *\n"
    kill += "replace, left = os.replace, [int(os.sys.argv[2])]\n"
    kill += "def until(*paths):\n    left[0] -= 1\n    replace(*paths) if left[0] >= 0 else os.kill(os.getpid(), 9)\n"
    kill += "os.replace = until\n"
    kill += "with new_folder(Path(os.sys.argv[1])) as new:\n    (new / 'new').touch()"
    target = tmp_path / "student"
    for num_renames, code, kept in ((0, -9, "old"), (1, -9, "old"), (2, -9, "new"), (3, 0, "new")):
        with new_folder(target) as folder:
            (folder / "old").touch()
        assert (
            subprocess.run([sys.executable, "-c", kill, str(target), str(num_renames)]).returncode
            == code
        )
        sweep(tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
            "student",
            f"student/{kept}",
        ]


def test_the_next_temporary_folder_sweeps_those_of_killed_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill = "import os; from kdnas.system.files import temporary_folder; folder = temporary_folder(); os.kill(os.getpid(), 9)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", kill], env=environment).returncode == -9
    (dead,) = tmp_path.iterdir()
    container = (
        f"kdnas.{platform.node()}-f0000abc-{2**22 + 1}.abcdefgh"  # its numbers mean nothing here
    )
    others = {
        tmp_path / "kdnas.elsewhere-7.abcdefgh",
        tmp_path / container,
        tmp_path / dead.name.replace("kdnas", "other"),
    }
    for other in others:
        other.mkdir()
    with temporary_folder() as alive, temporary_folder() as second:
        assert set(tmp_path.iterdir()) == {Path(alive), Path(second), *others}
    assert set(tmp_path.iterdir()) == others


def test_a_full_disk_is_an_error_of_the_disk_with_the_place(tmp_path):
    full = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    no_space = pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/student'")
    with no_space as found, new_folder(tmp_path / "student"):
        raise full
    assert found.value.errno == errno.ENOSPC
    no_space = pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/student'")
    with no_space, new_folder(tmp_path / "student"):
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save("/dev/full")
    with pytest.raises(OSError, match=f"Quota exceeded: '{tmp_path}/a'"), new_file(tmp_path / "a"):
        raise OSError(errno.EDQUOT, "Quota exceeded")  # as a write tells it
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/lock'"),
        placed(tmp_path / "lock"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SafetensorError, match="header"), new_folder(tmp_path / "student"):
        raise SafetensorError("header too large")


def test_an_error_that_is_raised_again_by_what_it_caused_has_an_end():
    first, second = ValueError("first"), ValueError("second")
    with pytest.raises(ValueError, match="first"):
        try:
            raise second from first
        except ValueError:
            raise first from None
    first.__context__ = second
    assert list(causes(first)) == [first, second]


def test_a_process_that_has_ended_is_not_alive_though_nobody_has_looked():
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    assert is_alive(os.getpid())
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_new_folder_that_fails_leaves_the_old_one_and_nothing_else(error, tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(error), new_folder(target) as folder:
        (folder / "half").write_text("2")
        raise error
    assert [child.name for child in target.iterdir()] == ["old"]
    assert [child.name for child in tmp_path.iterdir()] == ["student"]


def test_user_errors_are_value_errors_and_failed_candidates_are_not():
    assert issubclass(UserError, ValueError)
    assert not issubclass(CandidateFailed, ValueError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hidden_sice", " Did you mean 'hidden_size'?"),
        ("xyz", " Choose from: heads, hidden_size."),
        (None, " Choose from: heads, hidden_size."),
        (7, " Choose from: heads, hidden_size."),
    ],
)
def test_the_nearest_name_is_offered_else_all_of_them(name, hint):
    assert nearest(name, ["hidden_size", "heads"]) == hint


def test_machines_of_one_name_are_told_apart(monkeypatch):
    names, read = set(), Path.read_text
    for number in ("3d1219c7c4c5", "77d29a4c4404", ""):

        def read_text(path, *args, number=number, **options):
            if path != Path("/etc/machine-id"):
                return read(path, *args, **options)
            if not number:
                raise FileNotFoundError
            return f"{number}\n"

        monkeypatch.setattr(Path, "read_text", read_text)
        names.add(this_host())
    assert len(names) == 3 and all(name.startswith(platform.node()) for name in names)
