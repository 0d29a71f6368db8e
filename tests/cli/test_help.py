"""Help pages and completions: shown without torch, and never older than the parsers."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import capture_parser

import kdnas
from kdnas.cli.help import head, known_options, page, short_page, summary
from kdnas.cli.main import COMMANDS, main

CLI = Path(kdnas.__file__).parent / "cli"


EVERYWHERE = """\
with every command:
  --quiet               no progress: warnings and errors alone; the answers of latency, space, verify
                        and --dry-run are still printed
  --log-level LEVEL     debug, info (the default), warning or error
"""


# Commands that share groups of options, by the file that has those.
SHARED = {
    "search": ("run", "search", "space"),
    "lightning": ("fit", "validate", "test", "predict"),
}


def with_shared(shown: dict[str, str]) -> dict[str, str]:
    """What parsers say, the groups that several have put into a file of their own."""
    files = {}
    for name, commands in SHARED.items():
        first, *others = (shown[command].split("\n\n") for command in commands)
        is_shared = [all(group in other for other in others) for group in first]
        begin = is_shared.index(True)
        end = is_shared.index(False, begin) if False in is_shared[begin:] else len(is_shared)
        shared = "\n\n".join(first[begin:end])
        files[f"{name}.txt"] = f"{shared}\n"
        for command in commands:
            assert shared in shown[command], "they follow each other"
            shown[command] = shown[command].replace(shared, f'--8<-- "kdnas/cli/{name}.txt"')
    return files


def made() -> dict[str, str]:
    """The pages and the list of options, as the parsers are now."""
    said, heads, lines = {}, {}, []
    for command in COMMANDS:
        if command == "completion":
            continue
        parser = capture_parser(COMMANDS[command], [])
        parser.usage = argparse.SUPPRESS
        heads[command] = head(command)
        said[command] = "\n".join(
            line.rstrip() for line in parser.format_help().strip().splitlines()
        )

        actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        options = {"--quiet", "--log-level"}.union(*(action.option_strings for action in actions))
        if command == "export":
            options.add("--as")  # the parser knows it as --format
        options = {option for option in options if option.startswith("--")}
        lines.append(" ".join([command, *sorted(options)]))
    texts = with_shared(said) | {"options.txt": "\n".join(lines) + "\n"}
    for command, by_hand in heads.items():
        texts[f"pages/{command}.txt"] = "\n\n".join([by_hand, said[command], EVERYWHERE])
    return texts


def test_pages_are_what_the_parsers_say() -> None:
    # In a process of its own: parsers list the subclasses that are imported.
    code = "import json; from tests.cli.test_help import made; print(json.dumps(made()))"
    env = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    for name, text in json.loads(done.stdout.splitlines()[-1]).items():
        if os.environ.get("WRITE_PAGES"):
            (CLI / name).write_text(text, encoding="utf-8")
        assert (CLI / name).read_text(encoding="utf-8") == text, (
            "make the pages anew: WRITE_PAGES=1 pytest tests/cli/test_help.py"
        )


def test_every_command_has_a_page_that_begins_with_its_summary() -> None:
    assert {path.stem for path in (CLI / "pages").iterdir()} == set(COMMANDS)
    assert len(COMMANDS) == 13
    for command in COMMANDS:
        first, examples, *_ = page(command).split("\n\n")
        assert first == f"kdnas {command}: {summary(command)}"
        assert f"kdnas {command} " in examples


def test_help_fits_two_screens_and_names_options_as_the_parsers_have_them() -> None:
    for command in COMMANDS:
        shown = short_page(command)
        assert shown.startswith(head(command))
        assert shown.count("\n") <= 60 and max(map(len, shown.splitlines())) <= 120
        if shown == page(command):
            continue
        assert f"`kdnas {command} --help all`" in shown
        entries = re.split(r"\n  (?=--)", head(command).partition("most used options:")[2])[1:]
        assert 5 <= len(entries) <= 15
        for entry in entries:
            name = "--" + entry.split()[0][2:].replace("-", "_")
            assert name in known_options()[command], entry
            if default := re.search(r"default: .*(?=\))", " ".join(entry.split())):
                generated = page(command).removeprefix(head(command))
                explained = generated.partition(f"\n  {name} ")[2].partition("\n  --")[0]
                said = " ".join(explained.split())
                assert re.search(rf"{re.escape(default[0])}[,)]", said), entry


def test_help_all_shows_the_whole_page(capsys: pytest.CaptureFixture[str]) -> None:
    for args, shown in ((["--help"], short_page("run")), (["--help", "all"], page("run"))):
        assert main(["run", *args]) == 0
        assert capsys.readouterr().out == shown


def test_help_and_completion_do_not_import_torch() -> None:
    code = "import sys; from kdnas.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for args in (["run", "--help"], ["completion", "bash"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "kdnas" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("kdnas se", "search"),
        ("kdnas search --search.n_t", "--search.n_trials"),
        ("kdnas search --time-b", "--time-budget"),
        ("kdnas search --time_b", "--time_budget"),
        ("kdnas glue --log", "--log-level"),
        ("kdnas export --a", "--as"),
        ("kdnas fit --ckpt-", "--ckpt-path"),
        ("kdnas run --text my.p", "my.parquet"),
        ("kdnas fit --data.text my.p", "my.parquet"),
        ("kdnas completion z", "zsh"),
    ],
)
def test_bash_completes_commands_options_and_files(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "completion.bash"
    (tmp_path / "my.parquet").touch()
    assert main(["completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    place = len(words.split()) - 1
    command = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={place}; _shtab_kdnas; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [expected], done.stderr


def test_bash_completes_files_wherever_nothing_else_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["completion", "bash"]) == 0
    assert "complete -o bashdefault -o default " in capsys.readouterr().out


def test_completion_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--help"]) == main(["completion", "-h"]) == 0
    assert 'eval "$(kdnas completion bash)"' in capsys.readouterr().out


@pytest.mark.parametrize("args", [["cmd"], [], ["bash", "zsh"]])
def test_an_unknown_shell_gets_one_line(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bash" in error and (len(args) != 1 or args[0] in error)
