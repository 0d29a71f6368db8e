"""What is refused before torch is imported: the same as by the parsers, and nothing that they take."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdnas.cli import main
from kdnas.config import GlueConfig, RunConfig, as_plain, flat
from kdnas.early import LEAST, _Options, refuse_early, refuse_fewer
from kdnas.errors import UserError
from kdnas.pages import EXAMPLES

MISSPELT = {
    "run": ("smpler", "sampler"),
    "search": ("teachr", "teacher"),
    "space": ("teachr", "teacher"),
    "latency": ("bakend", "backend"),
    "export": ("studnet", "student"),
    "glue": ("seed", "seeds"),
    "fit": ("modle", "model"),
    "validate": ("trainr", "trainer"),
    "report": ("ouput", "output"),
    "verify": ("rot", "root"),
}


@pytest.mark.parametrize("command", EXAMPLES)
def test_a_misspelt_option_or_key_of_every_command_names_the_nearest(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(MISSPELT) == len(EXAMPLES) == 10
    path = tmp_path / "mine.yaml"
    wrong, right = MISSPELT[command]
    for name, hint in ((wrong, f"Did you mean {right!r}?\n"), ("misspelt", "Choose from: ")):
        path.write_text(f"{name}: x\n")
        ways = [[f"--{name}", "x"], [f"--{name}=x"]] + ([] if command == "verify" else [["--config", str(path)]])
        for way in ways:
            assert main([command, *way]) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and shown.err.count("\n") == 1
            assert (f"{name!r}" if "--config" in way else f"'--{name}'") in shown.err
            assert hint in shown.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("search", ["--workers", "0"], "workers is 0: give at least 1"),
        ("search", ["--workers=2", "--workers=-1"], "workers is -1: give at least 1"),
        ("search", ["--data.max-lenght=9"], "'--data.max_lenght'. Did you mean 'data.max_length'"),
        ("search", ["--serach.n_trials=9"], "'--serach.n_trials'. Did you mean 'search'"),
        ("search", ["--time-budget", "long"], "time_budget is 'long': give a number"),
        ("search", ["--search.n_trials", "many"], "search.n_trials is 'many': give a whole number"),
        ("search", ["--states.precision=int4"], "states.precision is 'int4': give one of float16, int8"),
        ("search", ["--sampler", "lstn"], "There is no sampler 'lstn'.*Did you mean 'lstm'.*Choose from: gp, lstm, "),
        ("run", ["--pruner=medium"], "There is no pruner 'medium'.*Did you mean 'median'"),
        ("run", ["--config=configs/serch.yaml"], "'configs/serch.yaml'. Did you mean 'configs/search.yaml'"),
        ("run", ["--smoke", "--dry-run"], "Give --teacher, --text; `kdnas run --help`"),
        ("run", ["--config", "configs/search.yaml", "--full_kd.num_epochs=0"], "full_kd.num_epochs is 0"),
        ("fit", ["--data.text=x", "--model.teacher=x", "--model.arch=x"], None),
        ("fit", ["--data.text=x", "--model.teacher=x"], "Give --model.arch.num_hidden_layers, "),
        ("fit", ["-c", "configs/fit.yaml", "--model.recipe.dropot=true"], "Did you mean 'model.recipe.dropout'"),
        ("validate", ["--ckpt_path=x"], None),
        ("glue", ["--model", "x", "--grid", "--text-column=a", "--seeds=3"], None),
        ("export", ["--as", "sentence-transformers", "--force"], None),
        ("search", ["--workers", "0", "--help"], None),
        ("search", ["--print_config"], None),
        ("search", ["--teacher=a", "--text=b", "--workers=0x1", "--sampler=mine.py", "--time-budget=null"], None),
        ("search", ["--teacher=a", "--text=b", "--search.alpha", "-0.1", "--recipe.objective.any=1"], None),
        ("search", ["--config", "no.yaml"], None),
    ],
)
def test_what_is_certain_is_refused_and_the_rest_left_to_the_parser(command: str, args: list[str], message: str | None):
    if message is None:
        refuse_early(command, args)
    else:
        with pytest.raises(UserError, match=message):
            refuse_early(command, args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search: {n_trials: 0}", "search.n_trials is 0"),
        ("sampler: lstn", "There is no sampler 'lstn'"),
        ("sampler: {class_path: x, init_args: {any: 1}}", None),
        ("recipe: {objective: {class_path: x, init_args: {any: 1}}}", None),
        ("recipe: {learnin_rate: 1}", "'learnin_rate' for 'recipe' of '.*mine.yaml'. Did you mean 'learning_rate'"),
        ("search: {budget: {speedupp: 1}}", "'speedupp' for 'search.budget' of .*Did you mean 'speedup'"),
        ("search.n_trals: 3", "Did you mean 'search.n_trials'"),
        ("search: other.yaml", None),
        ("3: x", "There is no key '3'"),
        ("a: 1\na: 2", None),
    ],
)
def test_keys_of_yaml(text: str, message: str | None, tmp_path: Path) -> None:
    (path := tmp_path / "mine.yaml").write_text(f"{text}\n")
    args = ["--teacher=a", "--text=b", "--config", str(path)]
    if message is None:
        refuse_early("search", args)
    else:
        with pytest.raises(UserError, match=message):
            refuse_early("search", args)


def test_what_is_shipped_or_saved_passes(tmp_path: Path) -> None:
    commands = {"quickstart": "run", "search": "search", "glue": "glue", "fit": "fit", "original": "fit"}
    for name, command in commands.items():
        refuse_early(command, ["--config", f"configs/{name}.yaml"])
    whole = as_plain(RunConfig(teacher="a", text="b"))
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    refuse_early("run", [f"--config={path}"])
    path.write_text("model: {teacher: a, arch: b}\ndata: {tokenizer: a, text: b}\n")  # as fit saves what is linked
    refuse_early("fit", [f"--config={path}"])


def test_the_pages_have_every_option() -> None:
    for command, config in (("run", RunConfig(teacher="a", text="b")), ("glue", GlueConfig(model=["a"], task=["b"]))):
        options = _Options.of(command)
        names = [name.partition(".class_path")[0].partition(".init_args")[0] for name in flat(as_plain(config))]
        assert set(names) <= options.kinds.keys() and len(names) > 30
        assert set(options.required) == {name for name in ("teacher", "text", "model") if name in names}
        assert {name: options.kinds[name] for name in LEAST if name in names} == {n: "int" for n in LEAST if n in names}


@pytest.mark.parametrize("key", LEAST)
def test_fewer_than_the_least_are_refused(key: str) -> None:
    refuse_fewer(key, 1)
    with pytest.raises(UserError, match=f"{key} is 0: give at least 1"):
        refuse_fewer(key, 0)


def test_torch_is_not_imported() -> None:
    code = """
import sys
from kdnas.cli import main
for args in (["search", "--workers=0"], ["search", "--sampler=lstn"], ["fit", "--misspelt"], ["glue"], ["verify", "x"]):
    assert main(args) == 2
assert not {"torch", "transformers", "optuna"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 5, done.stderr
