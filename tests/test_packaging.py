"""What is declared, what is locked, and what is imported agree."""

import ast
import configparser
import importlib.metadata
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import kdnas

ROOT = Path(__file__).parents[1]
# Needed, though not imported by name: Lightning's logger, Optuna's sampler gp.
NOT_IMPORTED = {"tensorboard", "scipy"}
# Imported where an option asks for it; the message names the extra.
OPTIONAL = {"distributed", "onnxruntime", "sentence-transformers"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = (line for line in text.splitlines() if not line.startswith(("#", "-r ")))
    return [Requirement(line) for line in lines if line.strip()]


def install_requires() -> list[Requirement]:
    return requirements(setup_cfg()["options"]["install_requires"])


def everything_declared() -> list[Requirement]:
    extras = setup_cfg()["options.extras_require"].values()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [
        *install_requires(),
        *(r for extra in extras for r in requirements(extra)),
        *map(Requirement, build),
    ]


def locked(*files: str) -> dict[str, Version]:
    return {
        canonicalize_name(line.name): Version(str(line.specifier).removeprefix("=="))
        for file in files
        for line in requirements((ROOT / file).read_text(encoding="utf-8"))
    }


def third_party(files: Iterable[Path]) -> set[str]:
    """The distributions that files import, in functions too."""
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    ours = (file.stem for place in ("benchmarks", "tests") for file in ROOT.glob(f"{place}/*.py"))
    names -= {*sys.stdlib_module_names, "benchmarks", "kdnas", "tests", *ours}
    return {canonicalize_name(distributions[name][0]) for name in names}


def unmet(declared: Iterable[Requirement], lock: dict[str, Version]) -> list[str]:
    return [
        str(requirement)
        for requirement in declared
        if (version := lock.get(canonicalize_name(requirement.name))) is None
        or version not in requirement.specifier
    ]


def test_the_console_command_is_a_function():
    (command,) = setup_cfg()["options.entry_points"]["console_scripts"].split("\n")[1:]
    name, _, target = command.partition(" = ")
    assert name == "kdnas"
    assert callable(pkgutil.resolve_name(target))


def test_every_third_party_import_is_declared_and_every_dependency_is_used():
    used = third_party((ROOT / "kdnas").rglob("*.py")) - OPTIONAL | NOT_IMPORTED
    assert used == {canonicalize_name(requirement.name) for requirement in install_requires()}


def test_what_an_option_needs_is_in_an_extra_of_the_users():
    extras = setup_cfg()["options.extras_require"]
    users = "\n".join(extras[name] for name in extras if name != "dev")
    assert {canonicalize_name(r.name) for r in requirements(users)} >= OPTIONAL


def test_every_third_party_import_of_the_tests_is_declared():
    used = third_party((ROOT / "tests").rglob("*.py"))
    assert (
        used - {canonicalize_name(requirement.name) for requirement in everything_declared()}
        == set()
    )


def test_third_party_imports_are_found_in_functions_and_by_distribution(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import os\nimport yaml.nodes\nfrom kdnas import runs\ndef f():\n    from sklearn.svm import SVC\n"
    )
    assert third_party([file]) == {"pyyaml", "scikit-learn"}


def test_the_locks_satisfy_every_declared_range():
    users = [
        *install_requires(),
        *requirements(setup_cfg()["options.extras_require"]["quickstart"]),
    ]
    assert unmet(users, locked("requirements.txt")) == []
    assert unmet(everything_declared(), locked("requirements.txt", "requirements-dev.txt")) == []
    assert len(everything_declared()) > len(users) > 10


def test_the_users_lock_is_whole_and_has_nothing_of_the_contributors():
    """Each line is needed, and what it needs is there, as the installed packages say."""
    extras = setup_cfg()["options.extras_require"]["quickstart"]
    todo, needed = [*install_requires(), *requirements(extras)], set()
    while todo:
        requirement = todo.pop()
        asked = {"", *requirement.extras}
        if (key := (canonicalize_name(requirement.name), *sorted(asked))) in needed:
            continue
        needed.add(key)
        below = map(Requirement, importlib.metadata.requires(requirement.name) or [])
        todo += [
            one
            for one in below
            if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in asked)
        ]
    names, lock = {name for name, *_ in needed}, set(locked("requirements.txt"))
    assert lock - names == set()
    # A build of torch for GPUs brings its own.
    assert [one for one in names - lock if not one.startswith(("cuda", "nvidia", "triton"))] == []


def test_a_lock_outside_a_range_is_found():
    assert unmet(
        [Requirement("a<2"), Requirement("B_b>=1")], {"a": Version("2"), "b-b": Version("1")}
    ) == ["a<2"]
    assert unmet([Requirement("a<2")], {}) == ["a<2"]


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_the_locks_name_exact_public_versions_only(file):
    lines = [
        line
        for line in (ROOT / file).read_text().splitlines()
        if not line.startswith("#") and line != "-r requirements.txt"
    ]
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)
    ] == []
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
    assert ("torch==2.13.0" in lines) == (file == "requirements.txt")


def test_every_dependency_is_explained_to_contributors():
    rows = re.findall(
        r"^\| (\w[\w, -]*) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    explained = {canonicalize_name(name) for row in rows for name in row.split(", ")} - {
        "package",
        "ours",
    }
    assert explained == {canonicalize_name(r.name) for r in everything_declared()} - {"setuptools"}


def test_what_is_written_by_hand_is_there_and_has_a_reason():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n### By hand")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == table.count("\n| `") > 10
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kdnas").rglob("*.py"))
    assert [
        name for name, _, _ in rows if not re.search(rf"^(class|def) {name}\b", code, re.MULTILINE)
    ] == []


def test_every_extra_is_named_where_it_is_needed_and_no_other():
    files = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *(ROOT / "kdnas").rglob("*.py")]
    named = {
        extra
        for file in files
        for extra in re.findall(r"pip install '\.\[([\w-]+)\]'", file.read_text(encoding="utf-8"))
    }
    assert named == set(setup_cfg()["options.extras_require"]) - {"dev"}
    assert len(named) == 6


def test_files_that_are_not_python_are_shipped():
    globs = [glob.strip() for glob in setup_cfg()["options.package_data"]["kdnas"].split(",")]
    names = [
        path.relative_to(ROOT / "kdnas").as_posix()
        for path in (ROOT / "kdnas").rglob("*")
        if path.is_file()
    ]
    others = [name for name in names if not name.endswith((".py", ".pyc"))]
    assert "py.typed" in others
    assert [
        name
        for name in others
        if not any(fnmatch(f"/{name}", f"*{glob.lstrip('*')}") for glob in globs)
    ] == []


def test_the_changelog_is_a_kept_one_and_has_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Changelog"
    releases = [line for line in lines if line.startswith("## ")]
    assert re.fullmatch(
        rf"## \[{kdnas.__version__}\] - (unreleased|\d{{4}}-\d\d-\d\d)", releases[0]
    )
    kinds = {line for line in lines if line.startswith("###")}
    assert kinds <= {
        f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


def test_it_can_be_cited():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert (cff["version"], cff["license"]) == (
        kdnas.__version__,
        setup_cfg()["metadata"]["license_expression"],
    )


def test_the_forms_for_issues_ask_in_fields_of_their_own():
    forms = [
        path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir() if path.stem != "config"
    ]
    assert {path.name for path in forms} == {"bug.yml", "feature.yml"}
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        assert {field["type"] for field in form["body"]} == {"textarea"}
        assert all(field["attributes"]["label"] for field in form["body"])
        assert len({field["id"] for field in form["body"]}) == len(form["body"]) > 2


def test_a_commit_passes_the_tools_of_make_lint():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))[
        "repos"
    ]
    assert repo["repo"] == "local"
    hooks = [hook["entry"].removesuffix(" --force-exclude") for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert hooks == re.findall(r"^\t@(\.venv/bin/(?:ruff \w+|mypy))", makefile, re.MULTILINE)
    assert len(hooks) == 3


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "LOG.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
)
def test_the_papers_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text) > 100
    assert not re.search(r"@[A-Z]+@", text), "a figure was not filled in"
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / link).exists(), link
