"""The manifest of a run, and what ``kdnas verify`` finds."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdnas.cli.main import main
from kdnas.system.errors import UserError
from kdnas.system.files import Run, write_text
from kdnas.system.manifest import renew, verify, write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "logs", "a")
    write_text(run.report, "<p>report</p>")
    write_text(run.student / "model.onnx", "weights")
    write_text(run.folder / "run.lock", "")
    write_text(run.folder / ".report.html.x1", "half")
    write_manifest(run.folder, {"name": "a", "command": ["kdnas", "run"]})
    return run


def test_a_manifest_has_size_and_hash_of_each_file_and_what_made_it(run):
    values = json.loads(run.manifest.read_text())
    assert set(values["files"]) == {"report.html", "student/model.onnx"}
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert values["files"]["student/model.onnx"] == {"bytes": 7, "sha256": sha256}
    assert values["command"] == ["kdnas", "run"] and values["name"] == "a"
    assert {"kdnas", "python", "torch", "transformers"} <= set(values["versions"])
    assert verify(run.folder) == (2, [])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    copy = path.with_name(".copy")
    path.rename(copy)
    path.symlink_to(copy)


def link_folder(path: Path) -> None:
    os.rename(path.parent, path.parent.parent.parent / "moved")
    path.parent.symlink_to(path.parent.parent.parent / "moved")


@pytest.mark.parametrize(
    ("damage", "faults"),
    [
        (flip, ["'student/model.onnx': has changed since it was written (7 bytes now)"]),
        (
            lambda path: path.write_bytes(b""),
            ["'student/model.onnx': has changed since it was written (0 bytes now)"],
        ),
        (lambda path: path.unlink(), ["'student/model.onnx': is missing"]),
        (link, ["'student/model.onnx': is a link"]),
        (link_folder, ["'student/model.onnx': is a link", "'student': is not in the manifest"]),
        (
            lambda path: path.with_name("evil.py").touch(),
            ["'student/evil.py': is not in the manifest"],
        ),
    ],
)
def test_verify_finds_every_change_and_names_it(damage, faults, run, capsys):
    damage(run.student / "model.onnx")
    assert verify(run.folder)[1] == faults
    assert main(["verify", "a", f"--root={run.root}"]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == faults
    assert (
        shown.err.startswith(f"kdnas: {str(run.folder)!r} does not match its manifest")
        and shown.err.count("\n") == 1
    )


def test_names_that_others_chose_are_shown_on_any_terminal(run):
    for name in (b"\xff.bin", b"\x1b[2J", b"two\nlines"):
        Path(os.fsdecode(os.fsencode(run.folder) + b"/" + name)).touch()
    values = json.loads(run.manifest.read_text())
    values["files"]["\ud800\x1b]0;title\a"] = {"bytes": 1, "sha256": "0"}
    run.manifest.write_text(json.dumps(values))
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "kdnas", "verify", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == [
        r"'\ud800\x1b]0;title\x07': is missing",
        r"'\x1b[2J': is not in the manifest",
        r"'two\nlines': is not in the manifest",
        r"'\udcff.bin': is not in the manifest",
    ]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "student/../../secret", "a\0b"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(name, run, tmp_path):
    (tmp_path / "logs" / "secret").write_text("x")
    values = json.loads(run.manifest.read_text())
    values["files"][name] = {"bytes": 1, "sha256": "0"}
    run.manifest.write_text(json.dumps(values))
    assert verify(run.folder)[1] == [f"{name!r}: leaves the folder"]


def test_a_whole_run_is_told_by_name_and_by_folder(run, capsys):
    for place in (["a", f"--root={run.root}"], [str(run.folder)]):
        assert main(["verify", *place]) == 0
        assert capsys.readouterr().out.startswith(
            f"2 files of {str(run.folder)!r} match its manifest.\n"
        )


def test_what_is_made_anew_is_in_the_manifests_of_all_folders_around_it(run, tmp_path):
    (tmp_path / "manifest.json").write_text('{"files": {}, "versions": null}')  # another program's
    write_manifest(run.student, {})
    write_manifest(run.folder, {})
    write_text(run.student / "again" / "model.onnx", "more")
    assert len(verify(run.folder)[1]) == len(verify(run.student)[1]) == 1
    renew(run.student / "again")
    assert verify(run.student) == (2, []) and verify(run.folder) == (4, [])
    write_text(run.report, "another")
    renew(run.report)
    assert verify(run.folder) == (4, [])
    write_text(run.student / "again" / "model.onnx", "changed")
    renew(run.report)
    assert len(verify(run.folder)[1]) == 1, "nothing else is made right"
    assert (tmp_path / "manifest.json").read_text() == '{"files": {}, "versions": null}'


def test_a_link_is_one_that_stays_within_and_leads_where_it_led(run, tmp_path):
    last = run.folder / "last.ckpt"
    last.symlink_to("report.html")
    write_manifest(run.folder, {})
    assert verify(run.folder) == (3, [])
    for target, fault in {
        "student/model.onnx": "links to another file",
        "nowhere": "links to another file",
    }.items():
        last.unlink()
        last.symlink_to(target)
        assert verify(run.folder)[1] == [f"'last.ckpt': {fault}"]
    last.unlink()
    assert verify(run.folder)[1] == ["'last.ckpt': is missing"]
    (tmp_path / "secret").write_text("x")
    last.symlink_to(tmp_path / "secret")
    write_manifest(run.folder, {})
    assert verify(run.folder)[1] == ["'last.ckpt': links out of the folder"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {"a": 1}}', '{"files": []}'])
def test_what_is_no_manifest_is_refused(content, run):
    run.manifest.write_text(content)
    with pytest.raises(UserError, match="manifest.json' is not a manifest"):
        verify(run.folder)
    run.manifest.unlink()
    with pytest.raises(UserError, match="logs/a' has no manifest.json"):
        verify(run.folder)


@pytest.mark.parametrize("arguments", [[], ["../a"], ["nothing"], ["a", "--rot=x"]])
def test_a_bad_call_of_verify_gets_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
