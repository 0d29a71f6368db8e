"""Files of the current folder are imported where a class path names them, and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdnas
from kdnas.cli.main import main
from kdnas.cli.parser import values_in

# What the libraries look for, and find in the current folder if it is on the path; one of the
# standard library's, which a process of ours would find there; and one of ours.
DECOYS = ["triton", "librosa", "torchvision", "peft", "kernels", "flash_attn", "tokenize", "rows"]
SCRIPT = ["-c", "import sys; sys.path.pop(0)\nfrom kdnas.cli.main import main; sys.exit(main())"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with files that write down that they ran."""
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + ' ')\n"
    for name in DECOYS:
        (tmp_path / f"{name}.py").write_text(ran)
    start = "from kdnas.distillation.start import FromTeacher\nimport my_package.other\n"
    (tmp_path / "my_kd.py").write_text(f"{start}\nclass Quiet(FromTeacher): pass\n{ran}")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "other.py").write_text(ran)
    return tmp_path


def run(place: Path, how: list[str], *args: object) -> tuple[list[str], str]:
    """What ran of the folder's files, and what was said."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    env |= {"PYTHONPATH": str(Path(kdnas.__file__).parents[1])}
    command = [sys.executable, *how, *map(str, args)]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    ran = place / "ran"
    return (ran.read_text().split() if ran.exists() else []), done.stdout + done.stderr


@pytest.mark.parametrize("how", [["-m", "kdnas"], SCRIPT], ids=["module", "script"])
def test_a_file_that_is_called_like_a_library_s_option_does_not_run(how, place, tiny_teacher):
    if how != SCRIPT:
        (place / "tokenize.py").unlink()  # Python itself looks for it, before kdnas begins
    ran, said = run(place, how, "space", f"--teacher={tiny_teacher}")
    assert "num_hidden_layers" in said
    assert ran == []


def test_a_module_that_a_class_path_names_runs_and_no_other(place, text_file, tiny_teacher):
    (place / "rows.txt").write_text(text_file.read_text())
    config = place / "my.yaml"
    config.write_text("recipe: {start: {class_path: my_kd.Quiet}}\nname: my_package.none\n")
    args = [f"--teacher={tiny_teacher}", "--text=rows.txt", f"--config={config}"]
    ran, said = run(place, SCRIPT, "search", *args, "--latency.length=99")
    assert ran == ["my_package.other", "my_kd"]
    assert "latency.length is 99" in said


@pytest.mark.slow
def test_a_process_of_the_pool_finds_it_too_and_no_other(place, text_file, tiny_teacher):
    small = ["--data.max_length=16", "--latency.length=16", "--latency.min_seconds=0.01"]
    args = [f"--teacher={tiny_teacher}", f"--text={text_file}", "--recipe.start=my_kd.Quiet"]
    args += ["--name=my_package.x"]  # as a dotted name it lets the module's own import be found
    ran, said = run(place, SCRIPT, "search", *args, *small, "--search.n_trials=1", "--workers=1")
    assert "Best student" in said, said
    assert set(ran) == {"my_package.other", "my_kd"} and len(ran) > 2


def test_class_paths_are_looked_for_in_options_and_yaml_alike(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("recipe: {start: {class_path: a.A}}\ntrainer: {callbacks: [b.B]}\n")
    args = ["--config", str(path), "--sampler=c.C", "--recipe.start", '{"class_path": "d.D"}', "{"]
    assert list(values_in(args)) == [
        "",
        {"recipe": {"start": {"class_path": "a.A"}}, "trainer": {"callbacks": ["b.B"]}},
        "c.C",
        "",
        {"class_path": "d.D"},
    ]


@pytest.mark.parametrize("how", ["pipe", "device", "folder"])
def test_a_config_that_is_no_file_is_refused(how, tmp_path, capsys):
    path = Path("/dev/zero") if how == "device" else tmp_path / "a.yaml"
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    assert main(["search", f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error


@pytest.mark.parametrize(
    "args",
    [
        ["search", "--recipe=PIPE"],
        ["search", "--space", "PIPE"],
        ["search", '--data={"text": "PIPE"}'],
        ["search", "--config=a.yaml"],
        ["fit", "--model.arch=PIPE"],
        ["fit", "--trainer", "PIPE"],
    ],
)
def test_a_pipe_is_no_value_of_any_option(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("PIPE")
    Path("a.yaml").write_text("recipe: PIPE\n")
    assert main(args) == 2
    assert (
        capsys.readouterr().err == "kdnas: 'PIPE' is a pipe or a device: give a file or a folder.\n"
    )
