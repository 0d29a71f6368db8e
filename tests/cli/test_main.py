"""The command line: what it teaches, and the one line that bad input gets."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from optuna.trial import FrozenTrial, TrialState
from transformers import AutoModel, BertConfig, BertModel

import kdnas
from kdnas.cli.main import COMMANDS, main
from kdnas.commands import jobs
from kdnas.commands.config import SearchConfig
from kdnas.distillation.objectives import HiddenStates
from kdnas.models.arch import StudentArch
from kdnas.nas.study import read_study
from kdnas.nas.trials import in_words
from kdnas.system.errors import CandidateFailed, ParityError, UserError
from kdnas.system.manifest import verify
from kdnas.system.signals import HungUp, Terminated
from tests.conftest import make_rows, save_teacher, write_task

KNOWN = ["--teacher=quickstart", "--text=b"]  # which the parser takes


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with exit code 2."""
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("kdnas: ")
    return error


@pytest.fixture
def search(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A small search in this process; what comes later on the command line wins."""
    return [
        "search",
        f"--teacher={tiny_teacher}",
        f"--text={text_file}",
        f"--root={tmp_path / 'logs'}",
        f"--states.folder={tmp_path / 'states'}",
        "--workers=0",
        "--data.max_length=24",
        "--latency.length=16",
        "--latency.min_seconds=0.01",
        "--search.n_trials=1",
        "--search.num_epochs=1",
    ]


def test_what_ended_while_nobody_looked_is_written_down_by_the_next_start(
    search: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "logs" / "kdnas"
    assert main([*search, "--search.n_trials=5", "--quiet"]) == 0
    kept = sorted(run.glob("trial_*/*.safetensors"))
    folders = {path.parent for path in kept}
    (worst, *_) = sorted(set(run.glob("trial_*")) - folders)
    (worst / "weights.safetensors").write_bytes(b"as if its parent had been killed")
    for name in ("manifest.json", "best_student.yaml", "trials.csv"):
        (run / name).unlink()
    assert main([*search, "--search.n_trials=5", "--quiet"]) == 0
    assert sorted(run.glob("trial_*/*.safetensors")) == kept and len(folders) == 3
    assert len((run / "trials.csv").read_text().splitlines()) == 6


def test_the_best_of_a_search_that_was_prolonged_and_stopped_after_its_last_candidate_is_the_best_of_all(
    search: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "logs" / "kdnas"
    assert main([*search, "--search.n_trials=3", "--quiet"]) == 0
    best = (run / "best_student.yaml").read_text()
    others = [
        trial
        for trial in read_study(run / "study.db", "kdnas").trials
        if trial.state.name == "COMPLETE"
    ]
    worse = min(others, key=lambda trial: trial.value)
    StudentArch.from_dict(worse.user_attrs["arch"]).to_yaml(run / "best_student.yaml")
    (run / "manifest.json").unlink()
    assert main([*search, "--search.n_trials=3", "--quiet"]) == 0
    assert (run / "best_student.yaml").read_text() == best and verify(run)[1] == []


# ``kdnas`` on a machine on which a forward pass always takes as many milliseconds as the model has layers times width.
# ``kdnas`` on a machine on which a forward pass always takes as many milliseconds as the model has
# layers times width.
BY_THE_TABLE = """
import sys
from kdnas.cli import main as cli

def search(args):
    from kdnas.deploy import latency

    def measure(models, settings):
        shapes = [model.config for model in models]
        products = [shape.num_hidden_layers * shape.hidden_size for shape in shapes]
        return [latency.Latency(product / 10, 0.01, 9) for product in products]

    latency.measure_latency = measure
    known(args)

known, cli.COMMANDS["search"] = cli.COMMANDS["search"], search
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_is_the_unbroken_one_where_latency_is_a_table(
    search: list[str], tmp_path: Path
) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        options = [f"--name={name}", "--search.n_trials=7", "--search.budget.speedup=2", "--quiet"]
        program = [sys.executable, "-c", BY_THE_TABLE, *search, *options]
        return subprocess.Popen(program, env=os.environ | {"KDNAS_CPU_MATMULS": "float32"})

    def trials(name: str) -> list[FrozenTrial]:
        with suppress(UserError):
            study = read_study(tmp_path / "logs" / name / "study.db", name)
            return study.get_trials(deepcopy=False)
        return []

    def is_running(number: int) -> bool:
        """Whether this trial or a later one is trained now."""
        folder = tmp_path / "logs" / "broken"
        running = [t.number for t in trials("broken")[number:] if t.state == TrialState.RUNNING]
        return any((folder / f"trial_{found:04d}/progress.json").exists() for found in running)

    assert start("unbroken").wait() == 0
    for number in (1, 4):
        process = start("broken")
        while not is_running(number):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert start("broken").wait() == 0
    unbroken, broken = (
        [(t.number, t.params, t.value, in_words(t)) for t in trials(name)]
        for name in ("unbroken", "broken")
    )
    assert broken == unbroken and {"refused", "finished"} <= {word for *_, word in unbroken}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == main(["--quiet", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(COMMANDS) == 13
    assert all(f"kdnas {command}" in shown for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{kdnas.__version__}\n"


@pytest.mark.parametrize("command", ["run", "search"])
def test_help_of_a_command_teaches_units_and_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help", "all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "for each search candidate, above 0 and below 1. (type: float, default: 0.3)" in shown
    assert "largest size of the stored states, in GB" in shown


def test_every_config_is_parsed_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "quickstart": "run",
        "search": "search",
        "glue": "glue",
        "fit": "fit",
        "original": "run",
        "original_fit": "fit",
    }
    assert {path.stem for path in Path("configs").glob("*")} == set(commands)
    monkeypatch.chdir(tmp_path)
    for name, command in commands.items():
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    command,
                    "-c" if command == "fit" else "--config",
                    f"configs/{name}.yaml",
                    "--print_config",
                ]
            )
        assert ended.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)


def test_a_config_that_is_here_comes_before_the_one_that_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/search.yaml").write_text("teacher: quickstart\ntext: mine\n")
    with pytest.raises(SystemExit):
        main(["search", "--config=configs/search.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["text"] == "mine"
    for command in ("run", "fit"):
        error = refused([command, "--config=configs/quickstrat.yaml"], capsys)
        assert (
            error
            == "kdnas: There is no 'configs/quickstrat.yaml'. Did you mean 'configs/quickstart.yaml'?\n"
        )


@pytest.mark.parametrize(
    ("options", "models", "seeds"),
    [
        (["--config=a.yaml", "--config=b.yaml"], ["b"], 2),
        (["--config=b.yaml", "--config=a.yaml"], ["a"], 2),
        (["--model", "x", "--model=y", "--seeds=3", "--config=a.yaml"], ["a"], 3),
        (["--config=a.yaml", "--model", "x", "y", "--seeds=3", "--config=b.yaml"], ["b"], 2),
        (["--config=b.yaml", "--seeds=3", "--model", "x", "--model", "y"], ["x", "y"], 3),
        (["--model=x", "--config=b.yaml", "--model", "y", "1"], ["y", "1"], 2),
    ],
)
def test_what_comes_later_wins(
    options: list[str],
    models: list[str],
    seeds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model: [a]\n")
    Path("b.yaml").write_text("model: [b]\nseeds: 2\n")
    with pytest.raises(SystemExit):
        main(["glue", *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["model"], found["seeds"]) == (models, seeds)


def test_quiet_and_log_level_go_with_every_command(
    search: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*search, "--quiet", "--search.budget.speedup=0.01"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["--log-level=debug", *search, "--search.n_trials=0"]) == 2
    assert "Traceback" in caplog.text and "n_trials is 0" in capsys.readouterr().err
    caplog.clear()
    assert main([*search, "--search.n_trials=0"]) == 2
    assert caplog.text == ""
    capsys.readouterr()
    assert "argument --log-level: invalid choice: 'loud'" in refused(
        ["--log-level=loud", *search], capsys
    )
    assert "There is no command" in refused(["--quiet"], capsys)


def test_what_is_logged_stands_above_the_bars_of_a_live_display() -> None:
    code = """
import logging
from rich.console import Console
from rich.progress import Progress
from kdnas.cli.main import show_logs
show_logs()
log = logging.getLogger("kdnas")
log.setLevel("INFO")
log.info("before")
with Progress(console=Console(force_terminal=True)) as progress:
    progress.add_task("search", total=2)
    log.info("within")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "before\n"
    assert "within\n" in done.stdout and "search" in done.stdout.partition("within")[2]


def test_module_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "kdnas", "serch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "kdnas: 'serch' is not a command. Did you mean 'search'?\n"


def test_a_class_may_be_in_a_file_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_kd.py").write_text("")
    code = "from kdnas.cli.main import main; raise SystemExit(main())"  # as the console script, with -P
    options = ["search", "--teacher=quickstart", "--text=b", "--recipe.start=my_kd.Quiet"]
    paths = os.pathsep.join(
        [str(Path(kdnas.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    command, env = [sys.executable, "-P", "-c", code, *options], os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "module 'my_kd' has no attribute 'Quiet'" in done.stderr


def test_missing_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "text" in refused(["run", "--teacher=quickstart"], capsys)
    assert "model.teacher" in refused(["fit", "--data.text=x"], capsys)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("recipe: {learnin_rate: 1}", "learning_rate"),
        ("teachr: x", "teacher"),
        ("data: {maxlength: 3}", "max_length"),
    ],
)
def test_misspelt_yaml_key_names_the_nearest(
    key: str, nearest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"text: y\n{key}\n")
    assert f"Did you mean {nearest!r}?" in refused(["run", "--config", str(path)], capsys)


@pytest.mark.parametrize("max_gb", [1, 0])
def test_a_teacher_with_a_weight_that_is_no_number_is_refused(
    max_gb: int, search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_teacher(tmp_path / "teacher")
    broken = AutoModel.from_pretrained(folder)
    broken.encoder.layer[1].output.dense.weight.data[3, 5] = torch.nan
    broken.save_pretrained(folder)
    capsys.readouterr()
    error = refused(
        [*search, f"--teacher={folder}", f"--states.max_gb={max_gb}", "--quiet"], capsys
    )
    assert (
        "have NaN or infinity in 'encoder.layer.1.output.dense.weight': use another checkpoint."
        in error
    )


def test_a_line_that_cannot_be_written_changes_no_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Broken())
    assert main(["searh"]) == 2


def test_what_an_objective_raises_before_anything_is_trained_is_told_in_one_line(
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_narrow(self: HiddenStates, student: object, teacher: object) -> None:
        raise KeyError(f"no width of {student.config.hidden_size}")  # type: ignore[attr-defined]

    monkeypatch.setattr(HiddenStates, "criterion", too_narrow)
    error = refused(
        [*search, "--recipe.objective=kdnas.distillation.objectives.HiddenStates"], capsys
    )
    assert (
        "recipe.objective, HiddenStates, does not work for the student 1 layer x 32 wide" in error
    )
    assert (
        "KeyError: 'no width of 32'. Correct it, or exclude such students by --space options."
        in error
    )
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.mini_fraction=0", "mini_fraction is 0"),
        (
            "--data.seed=7",
            "data.seed is 7, but the option --seed sets this seed: give --seed instead.",
        ),
        ("--data.mini_fraction=1.5", "mini_fraction is 1.5"),
        ("--data.max_length=4000", "max_length is 4000"),
        ("--search.n_trials=0", "search.n_trials is 0"),
        ("--search.alpha=0.5", "alpha is 0.5"),
        ("--search.budget.speedup=0", "speedup is 0"),
        ("--search.budget.speedup=1e9", "the fastest possible, 1 layer x 32 wide"),
        ("--search.budget.num_parameters=100", "the fastest possible, 1 layer x 32 wide"),
        ("--sampler=lstn", "There is no sampler 'lstn'"),
        ("--sampler=lstn", "Choose from: gp, lstm, lstm-original, nsgaii, random, tpe."),
        (
            "--sampler=optuna.samplers.TPESampler2",
            "There is no sampler 'optuna.samplers.TPESampler2'",
        ),
        ("--sampler=optuna.pruners.NopPruner", "is not a sampler"),
        (
            '--sampler={"class_path": "optuna.samplers.TPESampler", "init_args": {"seeds": 1}}',
            "cannot be created with",
        ),
        ("--pruner=medium", "There is no pruner 'medium'"),
        ("--workers=-1", "workers is -1"),
        ("--candidate_timeout=5", "candidate_timeout needs worker processes on this machine"),
        ("--time-budget=0", "time_budget is 0"),
        (
            "--space.hidden_size=[128]",
            "space.hidden_size has 128: give values from 1 to the teacher's 64",
        ),
        (
            "--space.hidden_size=[33]",
            "space.num_attention_heads has 2, which does not divide the 33",
        ),
        ("--space.num_hidden_layers=[]", "space.num_hidden_layers is empty"),
        (
            "--space.hidden_act=[rellu]",
            "space.hidden_act has 'rellu', which transformers does not know. Did you mean 'relu'?",
        ),
        ("--latency.length=4000", "latency.length is 4000"),
        ("--latency.device=tpu", "'tpu'"),
        ("--trainer.devices=2", "trainer.devices is 2, but only full KD of `kdnas run`"),
        ("--trainer.devices=0", "trainer.devices is 0: give at least 1."),
        ("--trainer.logger=CSVLoger", "CSVLoger"),
        (
            '--trainer.logger={class_path: CSVLogger, init_args: {save_dirr: "{folder}"}}',
            "save_dirr",
        ),
        ("--trainer.callbacks+=nowhere.Mine", "No module named 'nowhere'"),
        (
            "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: x, mode: up}}]",
            "EarlyStopping cannot be created: `mode` can be min, max, got up.",
        ),
        ("--trainer.accelerator=tpu-9", "accelerator is 'tpu-9'"),
        ("--teacher=/nowhere/at/all", "There is no folder '/nowhere/at/all': give one"),
        ("--teacher=nobody/nothing", "There is no folder 'nobody/nothing' here, and"),
        ("--text=/nowhere.txt", "/nowhere.txt"),
        ("--name=../elsewhere", "'../elsewhere'"),
        ("--root=/dev/null/logs", "/dev/null/logs"),
        ("--root=/proc/kdnas", "Cannot write to '/proc/kdnas/kdnas'"),
        ("--states.folder=/proc/states", "Cannot write to '/proc/states'"),
        (f"--latency.batch_size={10**30}", f"latency.batch_size is {10**30}"),
        ("--data.max_lenght=9", "Did you mean 'max_length'?"),
        ("--dta.max_length=9", "Did you mean 'data'?"),
        ("--task=stsb", "--task is an option of `kdnas run`."),
        ("--task-distill=true", "--task_distill is an option of `kdnas run`."),
        ("--full_kd.num_epochs=3", "--full_kd.num_epochs is an option of `kdnas run`."),
        ("--search.loss=mean", "search.loss"),
        ("--latency.when=never", "latency.when"),
        ("--recipe.start=my_kd.Quiet", "No module named 'my_kd'"),
    ],
)
def test_bad_value_gets_one_line_and_makes_nothing(
    option: str, message: str, search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*search, option], capsys)
    assert not (tmp_path / "logs").exists() and not (tmp_path / "states").exists()


def test_a_class_path_over_one_with_arguments_in_yaml_is_told(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"class_path": "kdnas.nas.sampler.LSTMSampler", "init_args": {"num_candidates": 2}}
    (tmp_path / "lstm.yaml").write_text(json.dumps({"sampler": spec}))
    asked = [*search, f"--config={tmp_path / 'lstm.yaml'}", f"--sampler={json.dumps(spec)}"]
    assert "change the class in the YAML file" in refused(asked, capsys)


@pytest.mark.parametrize(
    "option",
    [
        "data.max_length=long",
        "search.budget.speedup=fast",
        "recipe.dropout=maybe",
        "space.hidden_size=[a]",
        "states.precision=int4",
        "recipe.objective=Hiden",
        "recipe.objective.mappping=1",
        "recipe.start=kdnas.distillation.start.Evn",
        "search=3",
    ],
)
@pytest.mark.parametrize("way", ["option", "yaml"])
def test_a_value_that_the_parser_refuses_is_told_with_its_key_and_where_it_is_explained(
    way: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = option.partition("=")
    given = f"--{option}"
    if way == "yaml":
        path = tmp_path / "mine.yaml"
        *groups, last = name.split(".")
        text = "".join(f"{' ' * i}{group}:\n" for i, group in enumerate(groups))
        path.write_text(f"{text}{' ' * len(groups)}{last}: {value}\n")
        given = f"--config={path}"
    error = refused(["search", *KNOWN, given], capsys)
    key, told = name.removesuffix(".mappping"), "mappping" if "mappping" in name else value
    assert key in error and told.strip("[]") in error
    assert "`kdnas search --help all` explains" in error or "it is a group of options" in error


def test_a_long_message_of_the_parser_is_cut_but_keeps_the_key_and_the_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "glue.yaml").write_text("model: [x]\ntask: [rte]\ngrid: 17\n")
    error = refused(["glue", f"--config={tmp_path / 'glue.yaml'}"], capsys)
    assert len(error) < 500 and "grid" in error and "value: 17" in error and " ... " in error


def test_force_new_takes_the_next_free_name(
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names: list[str] = []

    def stopped(config: SearchConfig, console: object) -> None:
        names.append(config.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("kdnas.commands.run.search", stopped)
    for taken in ("kdnas", "kdnas-2", "kdnas-3"):
        assert main([*search, "--force-new"]) == 130
        told = f"run the same command again to resume, with --name {taken} in place of --force-new."
        assert told in capsys.readouterr().err
        (tmp_path / "logs" / taken).mkdir(parents=True)
    assert main(search) == 130
    assert names == ["kdnas", "kdnas-2", "kdnas-3", "kdnas"]


@pytest.mark.parametrize("look", ["--dry-run", "--smoke"])
def test_force_new_counts_where_nothing_is_begun_too(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names: list[str] = []
    monkeypatch.setattr("kdnas.cli.main._plan", lambda config: names.append(config.name))
    monkeypatch.setattr(
        "kdnas.commands.smoke.smoke", lambda config, console: names.append(config.name)
    )
    (tmp_path / "mine").mkdir()
    assert main(["run", *KNOWN, f"--root={tmp_path}", "--name=mine", "--force-new", look]) == 0
    assert names == ["mine-2"] and "Started a new run" not in caplog.text


def test_under_torchrun_a_search_is_refused(
    search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is 2" in refused(search, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no usable row"),
        (b" \n\n \n", "no usable row"),
        (b"fine\nbad \xff\n", "row 2"),
        (b"only one\n", "one"),
    ],
)
def test_bad_text_gets_one_line(
    content: bytes,
    message: str,
    search: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert message in refused([*search, f"--text={path}"], capsys)
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").mkdir()  # a folder that was there stays
    assert message in refused([*search, f"--text={path}"], capsys)
    assert not list((tmp_path / "logs").iterdir())


def test_missing_column_lists_those_there_are(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": row, "title": "x"}) + "\n" for row in make_rows(9)))
    error = refused([*search, f"--text={path}"], capsys)
    assert "'text'" in error and "body" in error and "title" in error


def test_bad_teachers_get_one_line(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    whole = weights.read_bytes()
    own = [*search, f"--teacher={teacher}"]
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(own, capsys)
    weights.write_bytes(whole)
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refused(own, capsys)
    decoder = tmp_path / "decoder"
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, is_decoder=True)
    ).save_pretrained(decoder)
    (decoder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    assert "decoder" in refused([*search, f"--teacher={decoder}"], capsys)
    assert not (tmp_path / "logs").exists()


def test_disk_that_is_too_small_is_refused(
    search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdnas.distillation import state_cache as cache

    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 12})()
    )
    assert main(search) == 2
    assert "12 are free" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["run", *KNOWN, "--finetune.seed=7"],
            "finetune.seed is 7, but the option --seed sets this seed: give",
        ),
        (
            ["space", "--teacher=quickstart", "--data.seed=7"],
            "data.seed is 7, but the option --seed sets this seed: give --seed instead.",
        ),
        (
            ["glue", "--model=a", "--task=rte", "--finetune.seed=7"],
            "finetune.seed is 7, but the option --seeds sets this seed: give",
        ),
    ],
)
def test_a_seed_that_another_option_sets_is_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(args, capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("mend it"), 2),
        (CandidateFailed("no luck"), 1),
        (ParityError("other numbers"), 1),
        (MemoryError("none left"), 1),
        (OSError(errno.EIO, "Input/output error"), 3),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
        (HungUp(), 129),
    ],
)
def test_every_way_to_end_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "space", fail)
    assert main(["space"]) == code
    told = capsys.readouterr().err
    assert told.startswith("kdnas: ") and told.count("\n") == 1


@pytest.mark.parametrize(("stop", "code"), [(HungUp, 129), (Terminated, 3)])
def test_a_closed_terminal_cannot_be_written_to_but_a_disk_that_fails_while_it_ends_is_told(
    stop: type[BaseException],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unwind(args: list[str]) -> None:
        try:
            raise stop
        finally:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(COMMANDS, "space", unwind)
    assert main(["space"]) == code
    assert ("Input/output error" in capsys.readouterr().err) is (code == 3)


@pytest.mark.parametrize(
    ("number", "to_group", "workers", "code"),
    [
        (signal.SIGTERM, False, 0, 143),
        (signal.SIGINT, True, 1, 130),
        pytest.param(signal.SIGINT, False, 0, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, 1, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, True, 1, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, True, 1, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_a_search_in_one_line_and_its_trial_goes_on_under_its_number(
    number: signal.Signals,
    to_group: bool,
    workers: int,
    code: int,
    search: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    run = tmp_path / "logs" / "kdnas"
    endless = [*search, "--search.num_epochs=100000", f"--workers={workers}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kdnas", *endless],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    request.addfinalizer(process.kill)
    deadline = time.monotonic() + 120
    while not list(run.glob("trial_0000/events*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.endswith("\nkdnas: interrupted; run the same command again to resume.\n")
    assert "Traceback" not in error
    assert psutil.wait_procs(children, timeout=60)[1] == []
    (trial,) = read_study(run / "study.db", "kdnas").trials
    assert trial.state == TrialState.RUNNING and not (run / "trial_0000/result.json").exists()


def test_disk_that_fills_up_ends_with_one_line_and_goes_on(
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from kdnas.distillation import state_cache as cache

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", full)
        assert main(search) == 3
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert main(search) == 0


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@nowhere.invalid/db", "nonsense", "sqlite:////nowhere/at/all.db"]
)
def test_a_database_that_cannot_be_reached_gets_one_line_without_its_password(
    url: str, search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*search, f"--storage={url}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kdnas: The database ") and "secret" not in error
    assert not list((tmp_path / "logs").rglob("config.yaml"))
    assert "postgres" not in url or not (tmp_path / "logs").exists()


def test_a_finished_search_again_changes_nothing_and_a_reason_is_shown_as_it_is(
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail_first(config, number, arch):
        if number == 0:
            raise RuntimeError("[enforce fail at x] [/y]")
        return train(config, number, arch)

    train = jobs.train_candidate
    monkeypatch.setattr(jobs, "train_candidate", fail_first)
    assert main(search) == 0
    shown = capsys.readouterr()
    assert "failed, RuntimeError: [enforce fail at x] [/y]" in shown.out
    assert "enforce fail" not in shown.err + caplog.text  # once is enough
    assert main([*search, "--name=quiet", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert caplog.text.count("failed, RuntimeError: [enforce fail at x] [/y]") == 1

    def files() -> dict[Path, int]:
        found = (tmp_path / "logs").rglob("*")
        return {path: path.stat().st_mtime_ns for path in found if path.suffix != ".lock"}

    before = files()
    assert main(search) == 0
    assert "Best student" in capsys.readouterr().out
    assert files() == before


def test_what_a_pruner_ended_is_shown_with_its_loss(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruner = '{"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 0.999}}'
    assert main([*search, f"--pruner={pruner}", "--search.num_epochs=2"]) == 2
    shown = capsys.readouterr()
    assert re.search(r"stopped early, held-out loss \d\.\d+ after epoch 1 of 2\n", shown.out)
    assert shown.err.endswith(
        "The pruner ended every candidate: give another pruner, or --pruner none.\n"
    )
    assert "after epoch 1 of 2" in (tmp_path / "logs" / "kdnas" / "trials.csv").read_text()


def test_a_search_that_tried_every_student_is_finished(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [
        "num_hidden_layers=[1]",
        "num_attention_heads=[2]",
        "hidden_size=[32]",
        "intermediate_size=[64]",
    ]
    exhausted = [*search, *(f"--space.{choice}" for choice in one), "--search.n_trials=9"]
    assert main(exhausted) == 0  # of two activations
    manifest = tmp_path / "logs" / "kdnas" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert main(exhausted) == 0
    assert "Search: 2 candidates are done." in capsys.readouterr().out
    assert manifest.stat().st_mtime_ns == before


def test_what_is_no_terminal_gets_plain_lines_one_a_trial(search: list[str]) -> None:
    command = [sys.executable, "-m", "kdnas", *search, "--search.n_trials=2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"FORCE_COLOR": "", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr)
    assert len(re.findall(r"(?m)^trial +\d+  ", done.stdout)) == 2


def test_what_candidates_fail_of_is_said_once_each(
    search: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--recipe.learning_rate=1e38",
        "--recipe.copied_learning_rate=1e38",
        "--data.batch_tokens=64",
    ]
    assert main([*search, *options]) == 1
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    failures = re.findall(r"(?m)^trial +\d+  .*: failed, the .* is (?:nan|inf)", shown.out)
    assert len(failures) == 5 == shown.out.count("failed,")
    assert "Every candidate failed" in shown.err


def test_space_shows_choices_sizes_and_costs(
    tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--teacher={tiny_teacher}",
        "--data.max_length=16",
        "--data.batch_tokens=64",
        "--latency.length=16",
    ]
    assert (
        main(["space", *options, "--space.num_hidden_layers=[1,3]", "--latency.min_seconds=0.01"])
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "72 students" in shown
        and "num_hidden_layers: [1, 3]" in shown
        and "hidden_act: ['gelu', 'relu']" in shown
    )
    assert (
        "smallest" in shown and "1 layer x" in shown and "largest" in shown and "speed-up" in shown
    )


def stages(shown: str) -> list[str]:
    """The stages in the table of a dry run."""
    return re.findall(r"(?m)^(\w.*?) +\d+\.\d ", shown)


def test_a_dry_run_says_what_a_run_will_need_and_leaves_nothing(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "run",
        *search[1:],
        f"--task={write_task(tmp_path / 'task')}",
        "--finetune.max_length=24",
        "--dry-run",
    ]
    before = sorted(tmp_path.rglob("*"))
    assert main(command) == 0
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert stages(shown) == [
        "reading the text",
        "teacher states",
        "1 candidates",
        "teacher states, other rows",
        "full KD",
        "fine-tuning",
        "export",
        "in all",
    ]
    for heading in ("minutes", "disk", "memory", "120 of 120 rows", "of the disk are free"):
        assert heading in " ".join(shown.split())
    assert "give one of them" in refused([*command, "--smoke"], capsys)


def test_dashes_and_underscores_are_the_same_in_options(
    search: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--time-budget=-1", "--time_budget=-1"):
        assert "time_budget is -1" in refused([*search, option], capsys)


def test_a_dry_run_counts_no_stored_states_and_only_students_within_the_budget(
    search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdnas.distillation.state_cache import StateCache
    from kdnas.nas.budget import Budget

    assert main([*search, "--search.budget.speedup=0.01"]) == 0
    monkeypatch.setattr(
        StateCache, "num_bytes", lambda cache, *rows: 3_000_000_000
    )  # large enough to be seen
    assert main([*search, "--search.budget.speedup=0.01", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert stages(shown) == ["reading the text", "teacher states", "1 candidates", "in all"]
    line = next(line for line in shown.splitlines() if "teacher states" in line)
    gigabytes = float(re.findall(r"([\d.]+) GB", line)[0])
    assert " 0.0 " in line and gigabytes == pytest.approx(1.0, abs=0.1), "a third of the rows"
    fewest = iter(["the first glance"])  # the smallest student alone is within the budget
    monkeypatch.setattr(
        Budget, "violation", lambda *args: (0.0, "") if next(fewest, None) else (1.0, "slow")
    )
    assert main([*search, "--dry-run", "--name=other"]) == 0
    assert "1 candidates" in capsys.readouterr().out


LIGHTNING = ("fit", "validate", "test", "predict")
MISSPELT = {
    "run": ("smpler", "sampler"),
    "search": ("teachr", "teacher"),
    "space": ("teachr", "teacher"),
    "latency": ("bakend", "backend"),
    "export": ("studnet", "student"),
    "glue": ("sedes", "seeds"),
    "fit": ("modle", "model"),
    "validate": ("trainr", "trainer"),
    "test": ("dat", "data"),
    "predict": ("ckpt_pth", "ckpt_path"),
    "report": ("ouput", "output"),
    "verify": ("rot", "root"),
}


@pytest.mark.parametrize("command", MISSPELT)
def test_a_misspelt_option_or_key_of_every_command_names_the_nearest(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert MISSPELT.keys() == COMMANDS.keys() - {"completion"}
    monkeypatch.chdir(tmp_path)
    wrong, right = MISSPELT[command]
    command = [command, "--config", "configs/fit.yaml"] if command in LIGHTNING else [command]
    (tmp_path / "mine.yaml").write_text(f"{wrong}: x\n")
    ways = [[f"--{wrong}", "x"], [f"--{wrong}=x"]] + (
        [] if command in (["report"], ["verify"]) else [["--config", "mine.yaml"]]
    )
    for way in ways:
        assert main([*command, *way]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1, shown.err
        assert wrong in shown.err and f"Did you mean {right!r}?" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


ABBREVIATED = {
    "run": ("--samp", "sampler"),
    "search": ("--data.col", "column"),
    "space": ("--teach", "teacher"),
    "latency": ("--back", "backend"),
    "export": ("--out", "output"),
    "glue": ("--seed", "seeds"),
    "fit": ("--trainer.max_epoch", "max_epochs"),
    "validate": ("--model.recipe.learning_rat", "learning_rate"),
    "test": ("--data.colum", "column"),
    "predict": ("--ckpt", "ckpt_path"),
    "report": ("--outpu", "output"),
    "verify": ("--roo", "root"),
}


@pytest.mark.parametrize("command", ABBREVIATED)
def test_an_abbreviated_option_is_a_typo(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ABBREVIATED.keys() == COMMANDS.keys() - {"completion"}
    short, whole = ABBREVIATED[command]
    error = refused([command, short, "3"], capsys)
    assert short in error and f"Did you mean {whole!r}?" in error
