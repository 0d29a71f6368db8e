"""What the docs tell readers to write does what they say, and the site is built from them without a warning."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdnas.cli.help import page
from kdnas.cli.main import COMMANDS, main
from kdnas.models.arch import StudentArch
from kdnas.training.precision import trainer_precision
from tests.conftest import make_rows, save_teacher, write_table, write_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a command cannot do without; --print_config does not ask for it.
NEEDED = {"run": {"teacher", "text"}, "search": {"teacher", "text"}, "space": {"teacher"}}
NEEDED |= {"glue": {"model"}, "latency": {"model"}}
NEEDED |= dict.fromkeys(("fit", "validate", "test", "predict"), {"config"})
# The same run, in seconds.
TINY = {
    "workers": 0,
    "data.max_length": 24,
    "data.batch_tokens": 256,
    "search.n_trials": 2,
    "search.num_epochs": 1,
    "search.budget.speedup": 0.01,
    "full_kd.num_epochs": 1,
    "finetune.num_epochs": 1,
    "finetune.max_length": 24,
    "latency.length": 16,
    "latency.min_seconds": 0.01,
}

# Of what others do with a run: the options that make it quick.
QUICKLY = {
    "glue": [
        "--workers=0",
        "--finetune.num_epochs=1",
        "--latency.length=16",
        "--latency.min_seconds=0.01",
        "--seeds=1",
    ],
    "latency": ["--min_seconds=0.01"],
    "space": ["--data.max_length=24", "--latency.length=16", "--latency.min_seconds=0.01"],
    "export": [],
    "report": [],
}

# Figures in prose that were not measured: settings and arithmetic.
NOT_MEASURED = {"0.05", "0.06", "4.2 %"}


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, in order: language and text."""
    return [
        found
        for found in re.findall(r"(?ms)^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"))
        if found[0] in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each ``kdnas`` in fenced or indented lines of a page."""
    lines = re.findall(r"(?m)^ {4}\S.*", text)
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```", text):
        lines += block.splitlines()
    for line in lines:
        if found := re.search(r"(?:^|[ /])kdnas ([a-z].*)", line):
            yield shlex.split(found[1], comments=True)


def answer(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, output and error of a command."""
    capsys.readouterr()
    try:
        code: object = main(args)
    except SystemExit as end:  # after --print_config
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def my_kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's ``my_kd.py`` and ``my_kd.yaml``, and our configs."""
    code, ((_, config),) = (
        blocks(ROOT / "docs/extend.md", "python"),
        blocks(ROOT / "docs/extend.md", "yaml"),
    )
    assert len(code) == 5
    (tmp_path / "my_kd.py").write_text("\n\n".join(text for _, text in code))
    (tmp_path / "my_kd.yaml").write_text(config)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_kd", None)


def test_own_mapping_objective_start_and_callback_train(
    my_kd: Path, tiny_teacher: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--model.teacher={tiny_teacher}",
        f"--data.text={text_file}",
        "--trainer.max_epochs=2",
    ]
    options += [
        "--model.arch.num_hidden_layers=2",
        "--model.arch.num_attention_heads=2",
        "--model.arch.hidden_size=32",
    ]
    options += [
        "--model.arch.intermediate_size=64",
        "--data.max_length=24",
        "--data.batch_tokens=256",
    ]
    options += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "configs/fit.yaml", "--config", "my_kd.yaml", *options]) == 0
    shares = re.findall(r"contextual share (-?[\d.]+)", capsys.readouterr().out)
    assert len(shares) == 2
    saved = yaml.safe_load(next((my_kd / "lightning_logs").rglob("config.yaml")).read_text())
    assert saved["trainer"]["precision"] == trainer_precision("cpu"), "what was measured is kept"
    objective = saved["model"]["recipe"]["objective"]["init_args"]["objectives"]
    assert [part["class_path"].rpartition(".")[2] for part in objective] == [
        "HiddenStates",
        "Direction",
    ]


def test_every_command_of_the_pages_is_one(my_kd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    # Help pages have columns of commands, options and words.
    texts += [
        re.sub(
            r"(?m)^ *(kdnas \w+) *(.*?)(?: {3}.*)?$", r"    \1 \2", page(command).split("\n\n")[1]
        )
        for command in COMMANDS
        if command != "completion"
    ]
    found = [args for text in texts for args in commands(text)]
    assert len(found) > 60
    for command, *args in found:
        lacking = {f"--{name}" for name in NEEDED.get(command, ())} - {
            arg.partition("=")[0] for arg in args
        }
        assert not lacking or "--config" in args, (command, args)
    for name in ("mine", "quickstart"):
        Path("lightning_logs", name).mkdir(parents=True)
        StudentArch(3, 6, 384, 1536, "gelu").to_yaml(
            Path("lightning_logs", name, "best_student.yaml")
        )
    # Who names a teacher of their own has a shape for it, too: the file's are the quickstart's.
    fits = [
        args
        for args in found
        if args[0] == "fit" and "my.parquet" in args and "my_kd.yaml" not in args
    ]
    assert len(fits) > 5 and all("--model.teacher" in args for args in fits)
    # All of one command at once, for a parser takes its time: every option is there, and so is every file of YAML.
    for command in {*COMMANDS, *(args[0] for args in found)} - {"report", "verify", "completion"}:
        together = [arg for name, *args in found if name == command for arg in args]
        code, _, error = answer([command, *together, "--print_config"], capsys)
        assert together and code == 0, error
    for args in found:
        if args[0] in ("verify", "completion"):
            code, _, error = answer(args, capsys)
            assert code == 0 or re.search("has no manifest.json|no folder '", error), error


def test_options_targets_and_yaml_in_the_prose_are_there(
    my_kd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--print_config", "--quiet", "--log-level", "--as", "--help", "--config"}
    options |= {option for name in COMMANDS for option in re.findall(r"--[\w.]+", page(name))}
    makefile = (ROOT / "Makefile").read_text()
    num_options = 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for inline in re.findall(
            r"(?<!`)`((?:kdnas|--)[^`\n]*)`", re.sub(r"(?ms)^```.*?^```", "", text)
        ):
            words = inline.split()
            assert words[0] != "kdnas" or len(words) == 1 or words[1] in {*COMMANDS, "COMMAND"}, (
                path.name,
                inline,
            )
            for option in re.findall(r"(?:^|\s)(--[\w.-]+)", inline):
                num_options += 1
                spellings = (option, "--" + option[2:].replace("-", "_"))
                is_group = option.endswith(".") and any(
                    known.startswith(option) for known in options
                )  # --data.*
                assert is_group or options.intersection(spellings), (path.name, inline)
        for target in re.findall(r"`make ([a-z]+)|^(?: {4}|)make ([a-z]+)", text, re.MULTILINE):
            assert f"\n{''.join(target)}:" in makefile, (path.name, target)
        for _, block in blocks(path, "yaml"):
            if path.name != "extend.md" and "--8<--" not in block:
                Path("block.yaml").write_text(block)
                asked = (
                    ["run", "--teacher=a", "--text=b"],
                    ["glue", "--model=a"],
                    ["fit", "--config=configs/fit.yaml"],
                )
                options_of_block = ["--config=block.yaml", "--print_config"]
                assert any(answer([*args, *options_of_block], capsys)[0] == 0 for args in asked), (
                    path.name,
                    block,
                )
    assert num_options > 50


@pytest.mark.slow
def test_what_the_pages_run_runs(my_kd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(Path("bert-base-uncased"), max_position_embeddings=160)
    write_table(Path("my.parquet"), text=make_rows(120))
    reviews = [f"{row},{number % 5}\n" for number, row in enumerate(make_rows(60))]
    Path("mine.csv").write_text("review,stars\n" + "".join(reviews))
    write_task(Path("my_task"))
    ran_commands = Counter[str]()
    found = [
        args
        for args in commands((ROOT / "docs/tutorial.md").read_text())
        if args[:2] == ["run", "--teacher"]
    ]
    run, smoke, dry_run = found
    assert smoke == [*run, "--smoke"] and dry_run == [*run, "--dry-run"]
    ours = [args for args in commands((ROOT / "docs/extend.md").read_text()) if "--sampler" in args]
    assert [ours[0][3], ours[0][5]] == [
        "--sampler",
        "--recipe.start",
    ]  # a run takes them as a search does
    assert main([*run, *ours[0][3:], *(f"--{name}={value}" for name, value in TINY.items())]) == 0
    rows = Path("lightning_logs/mine/trials.csv").read_text().splitlines()
    depths = [
        int(row.split(",")[rows[0].split(",").index("num_hidden_layers")]) for row in rows[1:]
    ]
    assert depths[0] == 4 and depths[1] <= 2, (
        "the rule's shape comes first, then those of ShallowFirst"
    )
    for name in ("quickstart", "other"):
        shutil.copytree("lightning_logs/mine", Path("lightning_logs", name))
    elsewhere = {
        "stsb",
        "rte",
        "quickstart",
        "DIR",
        "--hub-repo",
        "my-finetuned-teacher/",
        "[192,384]",
    }
    told = [args for path in PAGES for args in commands(path.read_text(encoding="utf-8"))]
    told = [args for args in told if args[0] in QUICKLY and not elsewhere.intersection(args)]
    for name in map(list, dict.fromkeys(map(tuple, told))):
        assert main([*name, *QUICKLY[name[0]]]) == 0, name
        ran_commands[name[0]] += 1
    assert (
        min(ran_commands[name] for name in QUICKLY) > 0
        and Path("deployed/model.int8.onnx").exists()
    )

    files = (ROOT / "docs/reference/files.md").read_text().partition("Without `--task`")[0]
    names = re.findall(r"(?m)^\| `([\w./]+)` \|", files)
    assert len(names) > 10
    names.remove("time_budget.json")  # of a run that measured what it needs
    assert [name for name in names if not Path("lightning_logs/mine", name).exists()] == []

    ran = Counter[str]()
    for path in PAGES:
        if path.name in ("README.md", "extend.md"):  # tests/test_api.py, and above
            continue
        names_of_page: dict[str, object] = {}
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))
            for language, text in blocks(path, "python", "pycon", "bash"):
                if language == "python":
                    exec(compile(text, str(path), "exec"), names_of_page)
                elif language == "pycon":
                    example = doctest.DocTestParser().get_doctest(
                        text, names_of_page, path.name, str(path), 0
                    )
                    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
                    names_of_page |= example.globs
                else:
                    for line in re.findall(r"(?m)^kdnas verify.*", text):
                        assert main(shlex.split(line)[1:]) == 0
                    for line in re.findall(r"(?m)^python \S*predict.py.*", text):
                        command = line.replace("python", sys.executable)
                        done = subprocess.run(command, shell=True, capture_output=True, text=True)
                        assert done.returncode == 0 and '"probability"' in done.stdout, done.stderr
                        ran["predict.py"] += 1
                ran[language] += 1
            sys.modules.pop("predict", None)
    assert ran["python"] > 8 and ran["pycon"] > 3 and ran["predict.py"] > 2, ran


def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")
    }
    assert len(pages) == len(PAGES)  # of README.md none, and one for what is not found
    for name, text in pages.items():
        assert not re.search(
            r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""", text
        ), name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
    for folder, target, suffix in (
        ("kdnas/cli/pages", "commands", ".txt"),
        ("configs", "configs", ".yaml"),
    ):
        text = (ROOT / f"docs/reference/{target}.md").read_text()
        included = set(re.findall(rf'--8<-- "{folder}/(\w+){suffix}"', text))
        assert included == {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}
    assert "shared_projection" in pages["reference/distillation/index.html"], "docstrings are there"


def test_quoted_figures_are_those_of_the_results() -> None:
    def figures(text: str) -> set[str]:
        unit = r"(?: ?(?:%|x\b|ms\b|times|minutes))"
        return set(re.findall(rf"(?<![\w.])\d{{1,3}}\.(?:\d{{2,3}}(?![\w.])|\d+{unit})", text))

    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    rows = [set(re.findall(r"\d+\.\d+", line)) for line in results.splitlines()]
    log = set(re.findall(r"\d+\.\d+", (ROOT / "LOG.md").read_text(encoding="utf-8")))
    assert [row - log for row in rows if not row <= log] == []

    known = figures(results) | NOT_MEASURED
    # scale.md computes its figures; the others are what is compared with.
    apart = {"scale.md", "results.md", "faults.md", "LOG.md"}
    num_rows = num_figures = 0
    for path in PAGES:
        if path.name in apart:
            continue
        text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
        text = re.sub(r"(?m)`[^`\n]*`|^ {4}\S.*|Python 3[\d., or]*", "", text)
        for line in text.splitlines():
            if line.startswith("|"):
                row = set(re.findall(r"\d+\.\d+", line))
                assert any(row <= other for other in rows), (path.name, line)
                num_rows += bool(row)
            else:
                assert figures(line) <= known, (path.name, line)
                num_figures += len(figures(line))
    assert num_rows > 30 and num_figures > 20
