"""The study of a search opens in optuna-dashboard."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from kdnas.cli.main import main
from kdnas.models.arch import StudentArch


@pytest.fixture
def study_db(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> Path:
    """Of a search with two candidates."""
    options = [
        f"--teacher={tiny_teacher}",
        f"--text={text_file}",
        f"--root={tmp_path}",
        "--name=tiny",
    ]
    options += ["--data.max_length=24", "--latency.length=16", "--latency.min_seconds=0.01"]
    options += [
        "--search.n_trials=2",
        "--search.num_epochs=1",
        f"--states.folder={tmp_path / 'states'}",
    ]
    assert main(["search", "--quiet", *options]) == 0
    return tmp_path / "tiny" / "study.db"


@pytest.fixture
def dashboard(study_db: Path) -> Iterator[str]:
    """The address of a dashboard of the study, which ends with the test."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    assert command, "optuna-dashboard is not installed: pip install '.[dashboard]'"
    process = subprocess.Popen(
        [command, f"sqlite:///{study_db}", "--port", str(port), "--server", "wsgiref"]
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(url: str) -> Any:
    """The JSON at an address, once there is one."""
    for _ in range(3000):
        try:
            with urlopen(url, timeout=300) as answer:
                return json.load(answer)
        except URLError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.mark.slow
def test_the_dashboard_shows_the_study_its_trials_and_the_best(dashboard: str) -> None:
    (study,) = ask(f"{dashboard}/api/studies")["study_summaries"]
    assert study["study_name"] == "tiny" and study["directions"] == ["maximize"]
    shown = ask(f"{dashboard}/api/studies/{study['study_id']}")
    assert [trial["state"] for trial in shown["trials"]].count("Complete") == 2
    best = max(trial["values"][0] for trial in shown["trials"] if trial["state"] == "Complete")
    assert [trial["values"] for trial in shown["best_trials"]] == [[best]]
    names = {param["name"] for param in shown["trials"][0]["params"]}
    assert names == {field.name for field in fields(StudentArch)}
