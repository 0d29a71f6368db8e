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

import pytest
import torch
import yaml
from kdnas.nas.storage import read_study
from optuna.trial import FrozenTrial, TrialState
from transformers import AutoModel, BertConfig, BertModel

import kdnas
import kdnas.commands.run
from kdnas.cli.main import COMMANDS, main
from kdnas.data.datamodule import Batch
from kdnas.distillation.objectives import HiddenStates
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.nas.trials import in_words
from kdnas.system.errors import UserError
from kdnas.system.files import this_host
from kdnas.system.manifest import verify
from kdnas.system.signals import HungUp, Terminated
from kdnas.training.trainer import WholeFiles
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
    """A small search; what comes later on the command line wins."""
    return [
        "search",
        f"--teacher={tiny_teacher}",
        f"--text={text_file}",
        f"--root={tmp_path / 'logs'}",
        f"--states.folder={tmp_path / 'states'}",
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
BY_THE_TABLE = """
import sys
from kdnas.cli import main as cli

def search(args):
    from kdnas.deploy import latency

    def measure(models, settings):
        shapes = [model.config for model in models]
        return [latency.Latency(shape.num_hidden_layers * shape.hidden_size / 10, 0.01, 9) for shape in shapes]

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
        return subprocess.Popen(
            program, start_new_session=True, env=os.environ | {"KDNAS_CPU_MATMULS": "float32"}
        )

    def trials(name: str) -> list[FrozenTrial]:
        with suppress(UserError):
            return read_study(tmp_path / "logs" / name / "study.db", name).get_trials(
                deepcopy=False
            )
        return []

    assert start("unbroken").wait() == 0

    def is_there(number: int) -> bool:
        """Whether a candidate runs that was not killed before: twice is too often."""
        running = [t.user_attrs for t in trials("broken")[number:] if t.state == TrialState.RUNNING]
        return any("arch" in attrs and "retry_of" not in attrs for attrs in running)

    for number in (1, 4):
        process = start("broken")
        while not is_there(number):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start("broken").wait() == 0
    unbroken, broken = (
        [(t.params, t.value, in_words(t)) for t in trials(name) if t.state != TrialState.FAIL]
        for name in ("unbroken", "broken")
    )
    assert broken == unbroken and {"refused", "finished"} <= {word for *_, word in unbroken}
    assert len(trials("broken")) > len(trials("unbroken")), "at least one was killed within"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == main(["--quiet", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(COMMANDS) == 11
    assert all(f"kdnas {command}" in shown for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{kdnas.__version__}\n"


@pytest.mark.parametrize("command", ["run", "search"])
def test_help_of_a_command_teaches_units_and_defaults(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "that a candidate of the search sees, above 0 and below 1. (type: float, default: 0.3)"
        in shown
    )
    assert "disk budget for one of them, in GB" in shown


def test_every_config_is_parsed_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "quickstart": "run",
        "search": "search",
        "glue": "glue",
        "fit": "fit",
        "original": "fit",
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
    assert done.stderr == "kdnas: 'serch' is no command. Did you mean 'search'?\n"


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
    assert error.startswith("kdnas: The teacher's hidden states are not numbers (NaN): take")


def test_a_line_that_cannot_be_written_changes_no_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Broken())
    assert main(["searh"]) == 2


def test_misspelt_option_of_fit_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(
        ["fit", "--config", "configs/fit.yaml", "--model.recipe.learnin_rate=1"], capsys
    )
    assert "learnin_rate" in error and "Did you mean 'learning_rate'?" in error


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
    assert "recipe.objective, HiddenStates, cannot be asked of 1 layers x 32 wide" in error
    assert "KeyError: 'no width of 32'; mend it, or leave such students out of the space." in error
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.mini_fraction=0", "mini_fraction is 0"),
        ("--data.seed=7", "data.seed is 7, but it is set by --seed: give that."),
        ("--data.mini_fraction=1.5", "mini_fraction is 1.5"),
        ("--data.max_length=4000", "max_length is 4000"),
        ("--search.n_trials=0", "search.n_trials is 0"),
        ("--search.alpha=0.5", "alpha is 0.5"),
        ("--search.budget.speedup=0", "speedup is 0"),
        ("--search.budget.speedup=1e9", "the fastest possible, 1 layers x 32 wide"),
        ("--search.budget.num_parameters=100", "the fastest possible, 1 layers x 32 wide"),
        ("--sampler=lstn", "There is no sampler 'lstn'"),
        ("--sampler=lstn", "Choose from: gp, lstm, lstm-original, nsgaii, random, tpe."),
        (
            "--sampler=optuna.samplers.TPESampler2",
            "There is no sampler 'optuna.samplers.TPESampler2'",
        ),
        ("--sampler=optuna.pruners.NopPruner", "is no sampler"),
        (
            '--sampler={"class_path": "optuna.samplers.TPESampler", "init_args": {"seeds": 1}}',
            "does not take",
        ),
        ("--pruner=medium", "There is no pruner 'medium'"),
        ("--workers=0", "workers is 0"),
        ("--time-budget=0", "time_budget is 0"),
        (
            "--space.hidden_size=[128]",
            "space.hidden_size has 128: a student has from 1 to its teacher's 64",
        ),
        ("--space.hidden_size=[33]", "space.hidden_size has 33 and space.num_attention_heads 2"),
        ("--space.num_hidden_layers=[]", "space.num_hidden_layers is empty"),
        (
            "--space.hidden_act=[rellu]",
            "space.hidden_act has 'rellu', which is unknown. Did you mean 'relu'?",
        ),
        ("--latency.length=4000", "length of latency is 4000"),
        ("--latency.device=tpu", "'tpu'"),
        ("--trainer.devices=2", "devices is 2"),
        ("--trainer.strategy=ddp", "strategy is 'ddp'"),
        ("--trainer.accelerator=tpu-9", "accelerator is 'tpu-9'"),
        ("--teacher=/nowhere/at/all", "'/nowhere/at/all' does not exist"),
        ("--teacher=nobody/nothing", "'nobody/nothing' was not found"),
        ("--text=/nowhere.txt", "/nowhere.txt"),
        ("--name=../elsewhere", "'../elsewhere'"),
        ("--root=/dev/null/logs", "/dev/null/logs"),
        ("--root=/proc/kdnas", "Cannot write to '/proc/kdnas/kdnas'"),
        ("--states.folder=/proc/states", "Cannot write to '/proc/states'"),
        (f"--latency.batch_size={10**30}", f"batch_size of latency is {10**30}"),
        ("--data.max_lenght=9", "Did you mean 'max_length'?"),
        ("--dta.max_length=9", "Choose from: candidate_timeout, config, data, "),
        ("--task=stsb", "--task=stsb. It is an option of `kdnas run`."),
        ("--full_kd.num_epochs=3", "--full_kd.num_epochs=3. It is an option of `kdnas run`."),
        ("--recipe.start=my_kd.Quiet", "No module named 'my_kd'"),
    ],
)
def test_bad_value_gets_one_line_and_makes_nothing(
    option: str, message: str, search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*search, option], capsys)
    assert not (tmp_path / "logs").exists() and not (tmp_path / "states").exists()
    if option.startswith(("--trainer.devices", "--trainer.strategy")):
        assert "DDP in `kdnas fit`" in refused(["run", *search[1:], option], capsys)


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
    assert "`kdnas search --help` explains" in error or "give its keys" in error


def test_a_long_message_of_the_parser_is_cut_but_keeps_the_key_and_the_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "glue.yaml").write_text("model: [x]\ntask: [rte]\ngrid: 17\n")
    error = refused(["glue", f"--config={tmp_path / 'glue.yaml'}"], capsys)
    assert len(error) < 500 and "grid" in error and "value: 17" in error and " ... " in error


def test_force_new_takes_the_next_free_name_and_keeps_it_after_a_crash(
    search: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdnas.commands import run as pipeline
    from kdnas.system import supervisor

    names: list[str] = []
    monkeypatch.setattr(pipeline, "search", lambda config, console: names.append(config.name))
    for taken in ([], ["kdnas"], ["kdnas-2"]):
        for name in taken:
            (tmp_path / "logs" / name).mkdir(parents=True)
        assert main([*search, "--force-new"]) == 0
    for name in ("kdnas-3", "kdnas-4"):  # its own, and one that another has begun since
        (tmp_path / "logs" / name).mkdir()
    monkeypatch.setitem(supervisor.EARLIER.deaths, 77, "SIGSEGV")
    assert main([*search, "--force-new"]) == 0
    assert main(search) == 0
    assert names == ["kdnas", "kdnas-2", "kdnas-3", "kdnas-3", "kdnas"]


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
    assert names == ["mine-2"] and "Begun anew" not in caplog.text


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


def test_a_strategy_that_cuts_a_student_is_refused_before_anything_is_made(
    tmp_path: Path, tiny_teacher: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fit.yaml"
    config.write_text(
        FIT.format(
            devices=2, strategy="fsdp", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    by_class = "--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"
    for options, name in (([], "fsdp"), ([by_class], "FSDPStrategy")):
        error = refused(["fit", "--config", str(config), *options], capsys)
        assert f"strategy is '{name}': give 'ddp' for several devices, or 'auto'" in error
    assert list(tmp_path.iterdir()) == [config]


def test_disk_that_is_too_small_is_refused(
    search: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdnas.distillation import state_cache as cache

    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 12})()
    )
    assert main(search) == 2
    assert "12 are free" in capsys.readouterr().err.splitlines()[-1]


FIT = """
trainer:
  max_epochs: 2
  accelerator: cpu
  precision: 32-true
  devices: {devices}
  strategy: {strategy}
  num_sanity_val_steps: 0
  enable_progress_bar: false
  default_root_dir: {folder}
model:
  teacher: {teacher}
  arch: {{num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 64, intermediate_size: 64, hidden_act: gelu}}
  states: {{folder: {folder}/states}}
  recipe: {{objective: {{class_path: kdnas.distillation.objectives.HiddenStates}}}}
data:
  text: {text}
  folder: {folder}/tokens
  settings: {{max_length: 24, batch_tokens: 256}}
"""


SEEN = """
import lightning.pytorch as pl


class Seen(pl.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(f"{self.folder}/{trainer.current_epoch}-{trainer.global_rank}.txt", "a") as file:
            print(*batch["sample_ids"].tolist(), file=file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "accelerator",
    [
        "cpu",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
def test_fit_on_two_processes_is_that_of_one_with_the_same_batches(
    accelerator: str,
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdnas.distillation.module import HiddenStateDistillModule, Recipe
    from kdnas.models.arch import StudentArch

    (tmp_path / "seen.py").write_text(SEEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept").mkdir()

    def command(name: str, devices: int, strategy: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        config = folder / "fit.yaml"
        options = dict(
            devices=devices, strategy=strategy, folder=folder, teacher=tiny_teacher, text=text_file
        )
        lines = FIT.format(**options).splitlines()
        config.write_text(
            "\n".join(line for line in lines if "recipe" not in line)
        )  # the default one
        kept = [
            f"--model.states.folder={tmp_path}/kept/states",
            f"--data.folder={tmp_path}/kept/tokens",
        ]
        callback = ["--trainer.callbacks=seen.Seen", f"--trainer.callbacks.folder={folder}"]
        return [
            "fit",
            "--config",
            str(config),
            f"--trainer.accelerator={accelerator}",
            *kept,
            *callback,
        ]

    def result(name: str) -> HiddenStateDistillModule:
        (checkpoint,) = (tmp_path / name / "lightning_logs").rglob("*.ckpt")
        return HiddenStateDistillModule.load_from_checkpoint(
            checkpoint, teacher=str(tiny_teacher), arch=StudentArch(2, 2, 64, 64), recipe=Recipe()
        )

    def seen(name: str, epoch: int, rank: int) -> list[list[int]]:
        lines = (tmp_path / name / f"{epoch}-{rank}.txt").read_text().splitlines()
        return [[int(number) for number in line.split()] for line in lines]

    paths = os.pathsep.join([str(tmp_path), str(Path(kdnas.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "kdnas", *command("two", 2, "ddp")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    for kept in ("states", "tokens"):
        assert len([path for path in (tmp_path / "kept" / kept).iterdir() if path.is_dir()]) == 1, (
            "both share one"
        )
    batches: list[Batch] = []

    def both_ranks(self: HiddenStateDistillModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        """The loss of two batches together, at the second of them; accumulated over two it is halved."""
        batches.append(batch)
        if batch_idx % 2 == 0:
            return 0 * next(self.parameters()).sum()
        sums, counts = map(sum, zip(*(self(*self.views(one)) for one in batches), strict=True))
        batches.clear()
        return 2 * (sums / counts * self._weights("variance")).sum()

    monkeypatch.setattr(HiddenStateDistillModule, "training_step", both_ranks)
    assert main([*command("one", 1, "auto"), "--trainer.accumulate_grad_batches=2"]) == 0
    for epoch in range(2):
        ranks, alone = [seen("two", epoch, rank) for rank in range(2)], seen("one", epoch, 0)
        assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone
        assert sorted(sum(alone, [])) == list(range(len(sum(alone, [])))), "each row once"
    two, one = result("two"), result("one")
    assert [row["epoch"] for row in two.history] == [0, 1]
    assert two.history[1]["loss"] < two.history[0]["loss"]
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_fit_in_one_process_logs_every_layer_and_validate_finds_the_same(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved_by, save = [], WholeFiles.save_checkpoint

    def watch(self, checkpoint, path, storage_options=None):
        saved_by.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeFiles, "save_checkpoint", watch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tmp_path / "fit.yaml"
    config.write_text(
        FIT.format(
            devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    assert main(["fit", "--config", str(config)]) == 0
    (events,) = (tmp_path / "lightning_logs").rglob("events.out.tfevents.*")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    for layer in (0, 2, 3):  # last: 2, 3; skip: 0, 2
        assert f"teacher_layer_{layer}/contextual_share" in tags
        assert f"teacher_layer_{layer}/r2" in tags
    assert {"val/loss", "val/contextual_share", "val/sentence_r2"} <= set(tags)
    saved = yaml.safe_load(next((tmp_path / "lightning_logs").rglob("config.yaml")).read_text())
    assert saved["model"]["arch"]["hidden_size"] == 64
    (encoder,) = (tmp_path / "lightning_logs").rglob("encoder")
    assert AutoModel.from_pretrained(encoder).config.hidden_size == 64
    assert (
        find_teacher(str(encoder)).tokenizer.get_vocab()
        == find_teacher(str(tiny_teacher)).tokenizer.get_vocab()
    )
    assert main(["verify", str(encoder.parent)]) == 0
    (checkpoint,) = (tmp_path / "lightning_logs").rglob("*.ckpt")
    assert checkpoint.name in saved_by
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0
    shown = re.search(r"val/loss\D+([\d.]+)", capsys.readouterr().out)
    loss = EventAccumulator(str(events)).Reload().Scalars("val/loss")[-1].value
    assert shown and float(shown[1]) == pytest.approx(loss, rel=1e-4)


def test_a_fit_that_slurm_queues_again_goes_through_and_another_in_its_job_replaces_nothing(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    config = tmp_path / "fit.yaml"
    config.write_text(
        FIT.format(
            devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    kept = ("+=ModelCheckpoint", ".every_n_train_steps=2", ".save_last=link")  # docs/scale.md: true
    fit = [
        "fit",
        "--config",
        str(config),
        *(f"--trainer.callbacks{part}" for part in kept),
        "--ckpt_path=last",
    ]
    checkpoints = tmp_path / "lightning_logs" / "version_4711" / "checkpoints"
    assert main(fit) == 0
    made = {path.name: path.stat().st_mtime_ns for path in checkpoints.glob("epoch*")}
    (saved,) = tmp_path.rglob("config.yaml")
    assert saved.parent.name == "version_4711"
    before = saved.read_bytes()
    assert main(fit) == 0  # from its last step, so no step is made again
    assert made == {path.name: path.stat().st_mtime_ns for path in checkpoints.glob("epoch*")}
    checkpoint = saved.parent / "checkpoints" / "last.ckpt"
    assert main([*fit, "--ckpt_path", str(checkpoint)]) == 0
    assert main(["validate", *fit[1:], "--ckpt_path", str(checkpoint)]) == 0
    assert main(["verify", str(saved.parent)]) == 0  # with the curves of both
    assert saved.read_bytes() == before
    student = (saved.parent / "encoder" / "model.safetensors").read_bytes()
    error = refused([*fit, "--model.arch.hidden_size=32"], capsys)
    assert (
        "version_4711/config.yaml' is of a fit with another model.arch.hidden_size: give" in error
    )
    assert (
        saved.parent / "encoder" / "model.safetensors"
    ).read_bytes() == student and saved.read_bytes() == before


@pytest.mark.parametrize(
    ("logger", "is_own"), [("false", False), ("TensorBoardLogger", False), ("CSVLogger", True)]
)
def test_a_fit_writes_a_manifest_where_the_folder_is_its_own_and_leaves_other_programs_theirs(
    logger: str, is_own: bool, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "fit.yaml"
    config.write_text(
        FIT.format(
            devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    options = [f"--trainer.logger={logger}"]
    if logger != "false":
        options.append(f"--trainer.logger.save_dir={tmp_path}")
    if logger == "TensorBoardLogger":
        options += ["--trainer.logger.name=", "--trainer.logger.version="]
    if logger == "CSVLogger":
        options.append("--trainer.logger.version=7")
    assert main(["fit", "--config", str(config), *options]) == 0
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'
    (encoder,) = tmp_path.rglob("encoder")
    assert (encoder.parent != tmp_path) is is_own
    if is_own:
        assert main(["verify", str(encoder.parent)]) == 0
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        assert (
            main(["validate", "--config", str(config), *options, "--ckpt_path", str(checkpoint)])
            == 0
        )
        assert main(["verify", str(encoder.parent)]) == 0, "with the figures of the validation"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", *KNOWN, "--finetune.seed=7"], "finetune.seed is 7, but it is set by --seed: give"),
        (
            ["space", "--teacher=quickstart", "--data.seed=7"],
            "data.seed is 7, but it is set by --seed: give that.",
        ),
        (
            ["glue", "--model=a", "--task=rte", "--finetune.seed=7"],
            "finetune.seed is 7, but it is set by --seeds, how",
        ),
    ],
)
def test_a_seed_that_another_option_sets_is_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(args, capsys)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_options_of_the_lightning_cli_take_dashes_as_completion_offers_them(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--seed-everything=7", "--ckpt-path=best", "--print-config"])
    assert end.value.code in (None, 0)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed_everything"], shown["ckpt_path"]) == (7, "best")


STOPS = """
import lightning.pytorch as pl


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise KeyboardInterrupt
"""


def test_a_stopped_fit_names_its_newest_checkpoint_and_goes_on_from_it(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "fit.yaml"
    config.write_text(
        FIT.format(
            devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    kept = (
        "+=ModelCheckpoint",
        ".every_n_train_steps=2",
        ".save_last=true",
    )  # as docs/scale.md has it
    every_second = [f"--trainer.callbacks{part}" for part in kept]
    assert (
        main(["fit", "--config", str(config), *every_second, "--trainer.callbacks+=stops.Stops"])
        == 130
    )
    (checkpoint,) = re.findall(r"goes on with --ckpt_path (\S+)", caplog.text)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    half = Path(checkpoint).with_name(
        f".last.ckpt.{this_host()}-{2**22 + 1}.abcdefgh"
    )  # as a kill leaves it
    half.touch()
    assert main(["fit", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert not half.exists()
    steps = {
        torch.load(path, weights_only=True)["global_step"]
        for path in tmp_path.rglob("epoch=*.ckpt")
    }
    assert max(steps) > 3


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_that_would_execute_is_refused_in_one_line(
    command: str,
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, checkpoint = tmp_path / "fit.yaml", tmp_path / "evil.ckpt"
    config.write_text(
        FIT.format(
            devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
        )
    )
    torch.save({"state_dict": Payload(tmp_path / "ran")}, checkpoint)
    error = refused([command, "--config", str(config), "--ckpt_path", str(checkpoint)], capsys)
    assert "evil.ckpt' is damaged or holds more than tensors" in error
    # Settings in a checkpoint are not ours: Lightning would import the class, and store where they say.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    objective = {
        "recipe": {"objective": {"class_path": "evil.X"}},
        "states": {"folder": str(tmp_path / "theirs")},
    }
    theirs = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": objective}
    for found, words in (
        (theirs, "The checkpoint is of another student or objective: "),
        ({"state_dict": {}}, "is no checkpoint of a fit"),
    ):
        torch.save(found, checkpoint)
        assert words in refused(
            [command, "--config", str(config), "--ckpt_path", str(checkpoint)], capsys
        )
    assert "evil" not in sys.modules and not (tmp_path / "theirs").exists()
    error = refused([command, "--config", str(config), "--ckpt_path=memory://evil.ckpt"], capsys)
    assert "ckpt_path is 'memory://evil.ckpt': there is no such file" in error
    assert not (tmp_path / "ran").exists()


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


def test_another_machine_s_settings_of_training_are_refused_by_the_study(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = f"--storage=sqlite:///{tmp_path}/shared.db"
    assert main([*search, shared]) == 0
    capsys.readouterr()
    other = [*search, shared, f"--root={tmp_path / 'other'}"]
    assert main([*other, "--trainer.precision=32-true", "--trainer.gradient_clip_val=0.5"]) == 2
    told = "trainer.precision: the default there, '32-true' now; trainer.gradient_clip_val: the default there, 0.5 now"
    assert told in capsys.readouterr().err
    assert main(other) == 0


def test_a_finished_search_again_changes_nothing_and_a_reason_is_shown_as_it_is(
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail_first(self, trial, arch):
        if trial.number == 0:
            raise RuntimeError("[enforce fail at x] [/y]")
        return evaluate(self, trial, arch)

    evaluate = kdnas.commands.run.Evaluator.__call__
    monkeypatch.setattr(kdnas.commands.run.Evaluator, "__call__", fail_first)
    assert main(search) == 0
    shown = capsys.readouterr()
    assert "failed, RuntimeError: [enforce fail at x] [/y]" in shown.out
    assert "enforce fail" not in shown.err + caplog.text  # once is enough
    assert main([*search, "--name=quiet", "--quiet"]) == 0
    assert (
        capsys.readouterr().out == ""
        and caplog.text.count("failed, RuntimeError: [enforce fail at x] [/y]") == 1
    )

    def files() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "logs").rglob("*")
            if path.suffix != ".lock"
        }

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
    assert shown.err.endswith("The pruner ended every candidate: give another, or --pruner none.\n")
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


def test_a_worker_says_once_what_a_candidate_failed_of(
    search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--recipe.learning_rate=1e38",
        "--recipe.copied_learning_rate=1e38",
        "--data.batch_tokens=64",
    ]
    assert main([*search, *options, "--candidate-timeout=5"]) == 1
    shown = capsys.readouterr()
    (log,) = (tmp_path / "logs" / "kdnas").glob("worker_*_0.log")
    told = log.read_text()
    assert "Traceback" not in told and "because of the following error" not in told
    for text in (shown.out, told):
        assert (
            len(re.findall(r"(?m)^trial +\d+  .*: failed, the .* is (?:nan|inf)", text))
            == 5
            == text.count("failed,")
        )
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
        "smallest" in shown
        and "1 layers" in shown
        and "largest" in shown
        and "random rows" in shown
    )


def stages(shown: str) -> list[str]:
    """The stages in the table of a dry run."""
    return re.findall(r"(?m)^│ (\w.*?) +│ +\d+\.\d", shown)


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
        "fine-tuning, teacher",
        "fine-tuning, student and random start",
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
    from kdnas.nas.candidate import Budget

    from kdnas.distillation.state_cache import StateCache

    assert main([*search, "--search.budget.speedup=0.01"]) == 0
    monkeypatch.setattr(
        StateCache, "num_bytes", lambda cache, *rows: 3_000_000_000
    )  # large enough to be seen
    assert main([*search, "--search.budget.speedup=0.01", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert stages(shown) == ["reading the text", "teacher states", "1 candidates", "in all"]
    line = next(line for line in shown.splitlines() if "teacher states" in line)
    assert " 0.0 " in line and "0.97 GB" in line, "a third of the rows"
    fewest = iter(["the first glance"])  # the smallest student alone is within the budget
    monkeypatch.setattr(
        Budget, "violation", lambda *args: (0.0, "") if next(fewest, None) else (1.0, "slow")
    )
    assert main([*search, "--dry-run", "--name=other"]) == 0
    assert "1 candidates" in capsys.readouterr().out


MISSPELT = {
    "run": ("smpler", "sampler"),
    "search": ("teachr", "teacher"),
    "space": ("teachr", "teacher"),
    "latency": ("bakend", "backend"),
    "export": ("studnet", "student"),
    "glue": ("sedes", "seeds"),
    "fit": ("modle", "model"),
    "validate": ("trainr", "trainer"),
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
    command = (
        [command, "--config", "configs/fit.yaml"] if command in ("fit", "validate") else [command]
    )
    (tmp_path / "mine.yaml").write_text(f"{wrong}: x\n")
    ways = [[f"--{wrong}", "x"], [f"--{wrong}=x"]] + (
        [] if command == ["verify"] else [["--config", "mine.yaml"]]
    )
    for way in ways:
        assert main([*command, *way]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1, shown.err
        assert wrong in shown.err and f"Did you mean {right!r}?" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
