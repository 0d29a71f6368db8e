"""A command in a child: what a candidate's death costs, how signals get there, and that nothing outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdnas.system import supervisor

# ``kdnas search`` with another body, in a process without torch.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from kdnas.cli import main as cli
from kdnas.system import supervisor

NOTES = sys.argv[1]

def note(text):
    with open(NOTES, "a") as file:
        file.write(f"{text} {os.getpid()}\\n")

def search(args):
    earlier = supervisor.EARLIER
    note(f"begun {','.join(earlier.deaths.values())}")
    body(earlier)

def told(number, frame):
    note(f"told {signal.Signals(number).name}")

def wait_for_signals():
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    note("ready")
    while not os.path.exists(NOTES + ".end"):
        time.sleep(0.02)

supervisor.LAST_SECONDS = PATIENCE
cli.COMMANDS["search"] = search
BODY
sys.argv[1:] = ["search"]
code = cli.main()
note("ended")
sys.exit(code)
"""


def program(body: str, notes: Path, last_seconds: float = 60) -> list[str]:
    lines = "def body(earlier):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    return [
        sys.executable,
        "-c",
        PROGRAM.replace("BODY", lines).replace("PATIENCE", str(last_seconds)),
        str(notes),
    ]


def seen(notes: Path) -> list[str]:
    """What was noted, without the numbers of processes."""
    return (
        [line.rpartition(" ")[0].strip() for line in notes.read_text().splitlines()]
        if notes.exists()
        else []
    )


def wait_for(notes: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in seen(notes):
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.02)


DIE = """
if len(earlier.deaths) < 2:
    with supervisor.candidate():
        os.kill(os.getpid(), signal.SIGSEGV if not earlier.deaths else signal.SIGKILL)
assert earlier.seconds > 0
"""


def test_a_candidate_that_kills_its_process_leaves_the_command_alive(tmp_path):
    done = subprocess.run(program(DIE.strip(), tmp_path / "notes"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path / "notes") == [
        "begun",
        "begun SIGSEGV",
        "begun SIGSEGV,SIGKILL, perhaps out of memory",
        "ended",
    ]
    assert (
        "The process died (SIGSEGV) with its candidate; another one takes its place." in done.stderr
    )


def test_another_death_ends_the_command_with_one_line(tmp_path):
    body = "with supervisor.candidate():\n    pass\nos.kill(os.getpid(), signal.SIGABRT)"
    done = subprocess.run(program(body, tmp_path / "notes"), capture_output=True, text=True)
    assert (done.returncode, seen(tmp_path / "notes")) == (1, ["begun", "ended"])
    assert done.stderr == "kdnas: the process died (SIGABRT); the same command goes on from here.\n"


@pytest.mark.parametrize(
    ("arguments", "begins", "told"),
    [
        (
            "'search', '--force-new'",
            "supervisor.remember('mine-2')",
            "; the same command goes on from here, with --name mine-2 for --force-new.",
        ),
        ("'search', '--force-new'", "pass", "."),
        ("'search', '--dry-run'", "pass", "."),
    ],
)
def test_it_is_said_how_to_go_on_with_what_was_begun_anew(tmp_path, arguments, begins, told):
    lines = program(f"{begins}\nos.kill(os.getpid(), signal.SIGABRT)", tmp_path / "notes")
    lines[2] = lines[2].replace('sys.argv[1:] = ["search"]', f"sys.argv[1:] = [{arguments}]")
    done = subprocess.run(lines, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"kdnas: the process died (SIGABRT){told}\n")


def test_an_exit_code_is_handed_on_and_what_follows_is_done_once(tmp_path):
    done = subprocess.run(
        program("raise OSError('no disk')", tmp_path / "notes"), capture_output=True, text=True
    )
    assert (done.returncode, seen(tmp_path / "notes")) == (3, ["begun", "ended"])


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the parent", "to both"])
def test_a_signal_comes_once(send, second, tmp_path):
    notes = tmp_path / "notes"
    process = subprocess.Popen(program("wait_for_signals()", notes), start_new_session=True)
    wait_for(notes, "ready")
    send(process.pid, signal.SIGTERM)
    wait_for(notes, "told SIGTERM")
    time.sleep(2 * supervisor.WAIT_SECONDS)
    send(process.pid, second)
    time.sleep(3 * supervisor.WAIT_SECONDS)
    Path(f"{notes}.end").touch()
    assert process.wait(timeout=30) == 0
    assert seen(notes) == ["begun", "ready", "told SIGTERM", f"told {second.name}", "ended"]


def test_a_second_ctrl_c_while_the_interpreter_ends_is_no_traceback(tmp_path):
    notes = tmp_path / "notes"
    body = "import atexit\natexit.register(lambda: note('ends') or time.sleep(20))\nnote('ready')\ntime.sleep(60)"
    process = subprocess.Popen(
        program(body, notes), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    for moment in ("ready", "ends"):
        wait_for(notes, moment)
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=15)
    assert process.returncode == 130 and "Traceback" not in error and "interrupted" in error


def test_a_second_signal_ends_a_child_whose_native_code_hears_of_none(tmp_path):
    notes = tmp_path / "notes"
    body = "signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.SIGNALS)\nnote('ready')\ntime.sleep(60)"
    process = subprocess.Popen(
        program(body, notes, supervisor.LAST_SECONDS), stderr=subprocess.PIPE, text=True
    )
    wait_for(notes, "ready")
    for _ in range(2):
        process.terminate()
        time.sleep(2 * supervisor.WAIT_SECONDS)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (
        143,
        "kdnas: interrupted; the same command goes on from here.\n",
    )


def test_a_process_that_hears_no_signal_is_not_waited_for_at_the_end(tmp_path):
    body = """import multiprocessing
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("deaf")
    time.sleep(120)
multiprocessing.get_context("fork").Process(target=deaf, daemon=True).start()
while "deaf" not in open(NOTES).read():
    time.sleep(0.02)"""
    done = subprocess.run(program(body, tmp_path / "notes"), timeout=30)
    assert (done.returncode, seen(tmp_path / "notes")) == (0, ["begun", "deaf", "ended"])


def test_a_signal_before_anything_has_begun_ends_both(tmp_path):
    notes = tmp_path / "notes"
    body = "note('ready')\ntime.sleep(60)"
    process = subprocess.Popen(program(body, notes), stderr=subprocess.PIPE, text=True)
    wait_for(notes, "ready")
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (
        143,
        "kdnas: interrupted; the same command goes on from here.\n",
    )


HANG = """
from kdnas.system.signals import stop_of
if heard := signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    signal.signal(signal.SIGHUP, told)
note("ready")
while not os.path.exists(NOTES + ".end"):
    time.sleep(0.02)
note("kept")
if heard:
    raise stop_of(signal.SIGHUP)
""".strip()


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_is_closed_ends_it_unless_nohup_keeps_that_away(is_ignored, tmp_path):
    """A shell and the system send a signal each, and the second is no request to end at once."""
    notes = tmp_path / "notes"
    process = subprocess.Popen(
        [
            "sh",
            "-c",
            "trap '' HUP; exec \"$@\"" if is_ignored else 'exec "$@"',
            "sh",
            *program(HANG, notes, 0.1),
        ],
        start_new_session=True,
    )
    wait_for(notes, "ready")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(2 * supervisor.WAIT_SECONDS)
    Path(f"{notes}.end").touch()
    assert process.wait(timeout=30) == (0 if is_ignored else 129)
    assert seen(notes) == [
        "begun",
        "ready",
        *["told SIGHUP"] * (0 if is_ignored else 2),
        "kept",
        "ended",
    ]


def test_the_child_ends_with_its_parent(tmp_path):
    notes = tmp_path / "notes"
    process = subprocess.Popen(program("note('ready')\ntime.sleep(60)", notes))
    wait_for(notes, "ready")
    child = int(notes.read_text().split()[-1])
    assert child != process.pid
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "it goes on alone"
        time.sleep(0.02)


def test_where_torch_is_loaded_there_is_no_child():
    assert "torch" in sys.modules
    assert supervisor.supervise(os.getpid, lambda: ".") == os.getpid()


def test_a_call_from_python_stays_in_its_process(tmp_path):
    code = "import os, sys; from kdnas.cli import main as cli; cli.COMMANDS['search'] = lambda args: print(os.getpid()); "
    code += "print(os.getpid()); assert cli.main(['search']) == 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(set(done.stdout.split())) == 1, done.stderr
