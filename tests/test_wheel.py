"""What is built from the sources: complete, and running away from them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = [
    ".git",
    "lightning_logs",
    *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split()),
]


def build(kind: str, source: Path, folder: Path) -> Path:
    """A ``wheel`` or ``sdist`` of the sources, by the build backend as it is installed."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: building writes beside what it reads."""
    folder = tmp_path_factory.mktemp("clone") / "kdnas"
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))


@pytest.fixture(scope="module")
def unpacked(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    before = files_of(sources)
    with tarfile.open(build("sdist", sources, folder)) as archive:
        archive.extractall(folder, filter="data")
    (inside,) = (path for path in folder.iterdir() if path.is_dir())
    assert before - files_of(inside) == set(), "MANIFEST.in forgets these"
    return inside


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist as installers do."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_all_of_the_package_and_the_configs_and_nothing_else(
    sources: Path, wheel: Path
) -> None:
    configs = {f"kdnas/cli/configs/{path.name}" for path in (sources / "configs").iterdir()}
    wanted = {
        f"kdnas/{name}"
        for name in files_of(sources / "kdnas")
        if not name.startswith("cli/configs/")
    } | configs
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == wanted
    assert len(configs) >= 5
    kinds = {Path(name).suffix for name in names}
    assert {".txt", ".j2", ".typed", ".yaml"} < kinds, "help pages, templates, configs"


@pytest.mark.slow
def test_an_installed_wheel_runs_away_from_the_repository(
    wheel: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    subprocess.run([*pip, "--target", site, wheel], check=True)

    def output(*command: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            map(str, command), cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    kdnas = site / "bin" / "kdnas"
    assert output(sys.executable, "-c", "import kdnas; print(kdnas.__file__)").startswith(str(site))
    assert "kdnas run " in output(kdnas, "--help")
    assert "kdnas run --config configs/quickstart.yaml" in output(kdnas, "run", "--help")
    options = [
        f"--teacher={tiny_teacher}",
        f"--text={text_file}",
        "--data.max_length=24",
        "--data.batch_tokens=64",
    ]
    options += ["--latency.length=16", "--latency.min_seconds=0.01", "--search.budget.speedup=0.01"]
    assert " students" in output(kdnas, "space", "--config", "configs/search.yaml", *options)
