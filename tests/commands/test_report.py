"""``kdnas report`` through the command line, on studies that are written down, not searched."""

import re
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from kdnas.cli.main import main
from kdnas.system.files import Run, write_json, write_text
from kdnas.system.manifest import write_manifest
from tests.report.test_page import CONFIG, Page, add, svgs, trained, whole

IDENTITY = {
    "teacher": "abc",
    "text": "def",
    "search.num_epochs": 2,
    "search.alpha": -0.06,
    "space": [1, 2],
}


def search(
    root: Path, name: str, losses: list[float], identity: dict | None = None, **config: object
) -> Run:
    """A run whose search has trained candidates with these losses."""
    run = whole(root, name) if name == "done" else Run(root, name)
    write_text(run.config, yaml.safe_dump(CONFIG | {"name": name, "root": str(root)} | config))
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{run.study_db}", direction="maximize"
    )
    write_json(run.made_with, IDENTITY | (identity or {}))
    for layers, loss in enumerate(losses, 1):
        add(study, TrialState.COMPLETE, 1 - loss, **trained(layers, layers + 0.5, loss, 1 - loss))
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    search(root, "done", [0.5, 0.25], sampler="tpe", search={"n_trials": 2})
    search(root, "begun", [0.375, 0.4375, 0.125], sampler="lstm", search={"n_trials": 9})
    search(
        root,
        "other",
        [0.5],
        {
            "teacher": "xyz",
            "search.alpha": -0.1,
            "space": [],
            "loss": "other",
            "trainer.precision": "32-true",
        },
        teacher="<b>big</b>",
    )
    return root


def test_runs_stand_beside_each_other_on_one_page_and_in_one_table(root, capsys):
    assert main(["report", "--root", str(root), "--run", "done", "--run", "begun"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        "sampler tpe lstm",
        "search.n_trials 2 9",
        "stage fine-tuned searching",
        "candidates trained 2 3",
        "student 2 x 64, 2 heads 3 x 64, 2 heads",
        "reward 0.7500 0.8750",
        "loss 0.2500 0.1250",
        "speed-up 5.0x 5.7x",
        "score 0.776 -",
        "share kept (%) 97.0 -",
    ):
        assert line.split() in lines, line
    assert not any(line and line[0] in ("teacher", "name", "Losses") for line in lines), (
        "only what differs"
    )
    html = (root / "comparison.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "begun has the best candidate: reward 0.8750, loss 0.1250" in page.text
    progress, fronts = svgs(html)
    assert set(re.findall("<title>(.*?)</title>", progress)) == {
        "done: 0.7500 after 2 candidates",
        "begun: 0.8750 after 3 candidates",
    }
    assert sorted(tip[:14] for tip in re.findall("<title>(.*?)</title>", fronts)) == [
        "begun, trial 0", "begun, trial 1", "begun, trial 2", "done, trial 0:", "done, trial 1:"
    ]  # fmt: skip
    assert len({attrs["id"] for _, attrs in page.tags if "id" in attrs}) > 4
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_what_makes_no_fair_comparison_is_said(root, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert (
        main(["report", "--root", str(root), "--run", "begun", "other", "--output", str(output)])
        == 0
    )
    told = capsys.readouterr().out
    text = Page(output.read_text(encoding="utf-8")).text
    for shown in (told, text):
        assert "The runs have different teachers." in shown
        assert (
            "Losses and rewards cannot be compared, because these settings differ: teacher, search.alpha, "
            "loss, trainer.precision." in shown
        )
    assert "<b>big</b>" in text and "has the best candidate" not in text
    assert str(output) in told


def test_one_run_is_reported_anew_and_stays_as_its_manifest_says(root, capsys):
    run = Run(root, "done")
    write_text(run.report, "old")
    write_manifest(run.folder, {"name": "done"})
    assert main(["report", "--root", str(root), "--run", "done"]) == 0
    assert "keeps 97 % of its teacher" in run.report.read_text(encoding="utf-8")
    assert main(["verify", str(run.folder)]) == 0
    write_text(
        run.folder / "another.yaml", "changed"
    )  # by somebody else: a new report makes nothing else right
    assert main(["report", "--root", str(root), "--run", "done"]) == 0
    assert main(["verify", str(run.folder)]) == 2
    assert "'another.yaml': is not in the manifest" in capsys.readouterr().out


def test_a_database_is_that_of_the_runs_which_had_one(tmp_path, capsys):
    search(tmp_path, "local", [0.5])
    run = search(tmp_path, "shared", [0.375, 0.25], storage="postgresql://me:***@host/studies")
    url = f"sqlite:///{run.study_db.rename(tmp_path / 'studies.db')}"
    report = ["report", "--root", str(tmp_path), "--storage", url]
    assert main([*report, "--run", "shared", "--run", "local"]) == 0
    assert "candidates trained 2 1".split() in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
    assert main([*report, "--run", "shared"]) == 0
    assert main([*report, "--run", "local"]) == 2, "of one run it is what the user says"


def spoil(path: str, content: bytes | None):
    def apply(run: Run) -> None:
        (run.folder / path).unlink(missing_ok=True)
        if content is not None:
            (run.folder / path).write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("apply", "options", "message"),
    [
        (None, ["--run", "don"], r"There is no run 'don' in '.*'. Did you mean 'done'\?"),
        (
            lambda run: write_text(run.root / "version_0" / "config.yaml", "trainer: {}"),
            ["--run", "version_1"],
            r"There is no run 'version_1' in '.*'. Choose from: done\.",
        ),
        (
            None,
            ["--run", "done", "done"],
            r"run is \['done', 'done'\]: give at least one run, each once",
        ),
        (None, ["--run", "a/b"], "The run name 'a/b' is not valid"),
        (
            None,
            ["--run", "done", "--storage", "sqlite:////no/such.db"],
            "There is no study in 'sqlite:////no/such.db'",
        ),
        (
            None,
            ["--run", "done", "--storage", "no url"],
            "The study's database 'no url' cannot be read",
        ),
        (
            spoil("study.db", None),
            ["--run", "done"],
            "There is no study in '.*study.db': no search was started there",
        ),
        (
            spoil("study.db", b""),
            ["--run", "done"],
            "The study's database '.*study.db' cannot be read",
        ),
        (
            spoil("study.db", b"x" * 999),
            ["--run", "done"],
            "study.db' cannot be read .*not a database",
        ),
        (
            spoil("config.yaml", b"name: lost"),
            ["--run", "done"],
            "There is no study 'lost' in '.*study.db'",
        ),
        (spoil("config.yaml", b"["), ["--run", "done"], "Cannot read '.*config.yaml'"),
        (spoil("glue/results.json", b"{"), ["--run", "done"], "results.json' is damaged"),
    ],
)
def test_a_run_that_cannot_be_reported_gets_one_line(apply, options, message, tmp_path, capsys):
    run = search(tmp_path, "done", [0.5, 0.25])
    if apply:
        apply(run)
    assert main(["report", "--root", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
