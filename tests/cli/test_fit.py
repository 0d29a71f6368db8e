"""``kdnas fit`` and ``kdnas validate``: Lightning's command line on our module and data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModel

import kdnas
from kdnas.cli.main import main
from kdnas.data.corpus import load_corpus
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.system.files import this_host
from kdnas.training.checkpoints import WholeFiles
from tests.cli.test_main import refused

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
  max_length: 24
  batch_tokens: 256
"""


@pytest.fixture
def fit_config(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> Path:
    """A small fit in one process."""
    path = tmp_path / "fit.yaml"
    options = dict(
        devices=1, strategy="auto", folder=tmp_path, teacher=tiny_teacher, text=text_file
    )
    path.write_text(FIT.format(**options))
    return path


def test_misspelt_option_of_fit_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(
        ["fit", "--config", "configs/fit.yaml", "--model.recipe.learnin_rate=1"], capsys
    )
    assert "learnin_rate" in error and "Did you mean 'learning_rate'?" in error


def test_a_strategy_that_cuts_a_student_is_refused_before_anything_is_made(
    fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", str(fit_config), "--trainer.devices=2", "--trainer.strategy"]
    by_class = "lightning.pytorch.strategies.FSDPStrategy"
    for strategy, name in (("fsdp", "fsdp"), (by_class, "FSDPStrategy")):
        error = refused([*fit, strategy], capsys)
        assert (
            f"strategy is '{name}', but each device must hold a whole student: give 'ddp'" in error
        )
    assert list(tmp_path.iterdir()) == [fit_config]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--trainer.max_epochs=-3", "You passed in -3)"),
        ("--trainer.devices=0", "devices='0')` value is not a valid input"),
        pytest.param(
            "--trainer.accelerator=gpu",
            "No supported gpu backend found",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("--trainer.accelerator=abacus", "invalid accelerator name: `accelerator='abacus'`"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches is 0: give at least 1"),
        ("--trainer.val_check_interval=1000", "`val_check_interval` (1000) must be less than"),
        ("--optimizer=Adam", "It would replace the recipe's optimizer: set the recipe's"),
        ("--lr_scheduler=StepLR", "It would replace the recipe's optimizer: set the recipe's"),
        ("--data.text=nowhere.txt", "'nowhere.txt'"),
        (
            "--trainer.overfit_batches=7",
            "overfit_batches is 7, which kdnas does not support: give --trainer.limit_train_batches",
        ),
    ],
)
def test_what_a_fit_cannot_take_gets_one_line_and_leaves_no_folder(
    option: str, words: str, fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(["fit", "--config", str(fit_config), option], capsys)
    assert not list(tmp_path.rglob("version_*"))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_student_is_not_measured(
    command: str, fit_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused([command, "--config", str(fit_config)], capsys)
    assert "ckpt_path is missing" in error and "give a checkpoint of `kdnas fit`" in error


def test_the_data_of_a_fit_is_named_as_in_a_search_and_a_fit_that_never_validates_says_so(
    fit_config: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"words": row} for row in text_file.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = [f"--data.text={tmp_path / 'rows.jsonl'}", "--data.column=words"]
    fit = ["fit", "--config", str(fit_config), *text]
    assert main([*fit, "--trainer.max_steps=1"]) == 0
    assert "max_steps is 1" in caplog.text and "nothing will be validated" in caplog.text
    caplog.clear()
    assert main(fit) == 0
    assert "nothing will be validated" not in caplog.text


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
def test_fit_on_two_processes_is_that_of_one(
    accelerator: str,
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kdnas.distillation.module import HiddenStateDistillModule, Recipe

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
            # Muon computes in bfloat16, and would blow up what the ranks round otherwise.
            "--model.recipe.matrix_learning_rate=null",
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
    assert "sync_dist" not in done.stderr
    for kept in ("states", "tokens"):
        assert len([path for path in (tmp_path / "kept" / kept).iterdir() if path.is_dir()]) == 1, (
            "both share one"
        )
    assert main(command("one", 1, "auto")) == 0
    seen_rows = []
    for epoch in range(2):
        ranks, alone = [seen("two", epoch, rank) for rank in range(2)], seen("one", epoch, 0)
        together = [sorted(sum(step, [])) for step in zip(*ranks, strict=True)]
        assert together == [sorted(batch) for batch in alone]
        seen_rows.append(sorted(sum(alone, [])))
    assert seen_rows[0] == seen_rows[1] == sorted(set(seen_rows[0])), "each row once"
    two, one = result("two"), result("one")
    assert [row["epoch"] for row in two.history] == [0, 1]
    assert two.history[1]["loss"] != two.history[0]["loss"], "it trained"
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_by_attention_alone(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    """Some tensors of the last layer get no gradient, for which DDP waits unless it is told."""
    config = tmp_path / "fit.yaml"
    options = dict(devices=2, strategy="ddp", folder=tmp_path, teacher=tiny_teacher, text=text_file)
    written = FIT.format(**options)
    config.write_text(written.replace("objectives.HiddenStates", "attention.AttentionMaps"))
    done = subprocess.run(
        [sys.executable, "-m", "kdnas", "fit", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(kdnas.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lightning_logs/version_0/encoder/model.safetensors").exists()


def test_fit_in_one_process_logs_every_layer_and_validate_finds_the_same(
    fit_config: Path,
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

    assert main(["fit", "--config", str(fit_config)]) == 0
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
    assert main(["validate", "--config", str(fit_config), "--ckpt_path", str(checkpoint)]) == 0
    shown = re.search(r"val/loss\D+([\d.]+)", capsys.readouterr().out)
    loss = EventAccumulator(str(events)).Reload().Scalars("val/loss")[-1].value
    assert shown and float(shown[1]) == pytest.approx(loss, rel=1e-4)

    assert main(["test", "--config", str(fit_config), "--ckpt_path", str(checkpoint)]) == 0
    shown = re.search(r"test/loss\D+([\d.]+)", capsys.readouterr().out)
    assert shown and float(shown[1]) == pytest.approx(loss, rel=1e-4)
    assert main(["predict", "--config", str(fit_config), "--ckpt_path", str(checkpoint)]) == 0
    (written,) = tmp_path.rglob("vectors.parquet")
    found = pq.read_table(written).to_pydict()
    assert found["text"] == list(load_corpus(str(text_file)).held_out)
    student = AutoModel.from_pretrained(encoder).eval()
    for text, vector in zip(found["text"], found["vector"], strict=True):
        batch = find_teacher(str(encoder)).tokenizer(
            text, truncation=True, max_length=24, return_tensors="pt"
        )
        with torch.no_grad():
            mean = student(**batch).last_hidden_state[0].mean(0)
        assert vector == pytest.approx(mean.tolist(), abs=1e-5)


def test_a_fit_that_slurm_queues_again_goes_through_and_another_in_its_job_replaces_nothing(
    fit_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    kept = ("+=ModelCheckpoint", ".every_n_train_steps=2", ".save_last=link")  # docs/scale.md: true
    fit = [
        "fit",
        "--config",
        str(fit_config),
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
        "version_4711/config.yaml' belongs to a fit with another model.arch.hidden_size: give"
        in error
    )
    assert (
        saved.parent / "encoder" / "model.safetensors"
    ).read_bytes() == student and saved.read_bytes() == before


@pytest.mark.parametrize(
    ("logger", "is_own"), [("false", False), ("TensorBoardLogger", False), ("CSVLogger", True)]
)
def test_a_fit_writes_a_manifest_where_the_folder_is_its_own_and_leaves_other_programs_theirs(
    logger: str, is_own: bool, fit_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    options = [f"--trainer.logger={logger}"]
    if logger != "false":
        options.append(f"--trainer.logger.save_dir={tmp_path}")
    if logger == "TensorBoardLogger":
        options += ["--trainer.logger.name=", "--trainer.logger.version="]
    if logger == "CSVLogger":
        options.append("--trainer.logger.version=7")
    assert main(["fit", "--config", str(fit_config), *options]) == 0
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'
    (encoder,) = tmp_path.rglob("encoder")
    assert (encoder.parent != tmp_path) is is_own
    if is_own:
        made = json.loads((encoder.parent / "manifest.json").read_text())
        known = json.loads((encoder / "config.json").read_text())
        assert made["teacher_sha256"] == known["teacher_sha256"]
        assert main(["verify", str(encoder.parent)]) == 0
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        assert (
            main(
                ["validate", "--config", str(fit_config), *options, "--ckpt_path", str(checkpoint)]
            )
            == 0
        )
        assert main(["verify", str(encoder.parent)]) == 0, "with the figures of the validation"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
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
    fit_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = (
        "+=ModelCheckpoint",
        ".every_n_train_steps=2",
        ".save_last=true",
    )  # as docs/scale.md has it
    every_second = [f"--trainer.callbacks{part}" for part in kept]
    assert (
        main(
            ["fit", "--config", str(fit_config), *every_second, "--trainer.callbacks+=stops.Stops"]
        )
        == 130
    )
    (checkpoint,) = re.findall(r"repeat the command with --ckpt_path (\S+)", caplog.text)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    half = Path(checkpoint).with_name(
        f".last.ckpt.{this_host()}-{2**22 + 1}.abcdefgh"
    )  # as a kill leaves it
    half.touch()
    assert main(["fit", "--config", str(fit_config), "--ckpt_path", checkpoint]) == 0
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
    fit_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Payload(tmp_path / "ran")}, checkpoint)
    error = refused([command, "--config", str(fit_config), "--ckpt_path", str(checkpoint)], capsys)
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
        (theirs, "The checkpoint does not fit this student and loss: "),
        ({"state_dict": {}}, "is not a checkpoint of a fit"),
    ):
        torch.save(found, checkpoint)
        assert words in refused(
            [command, "--config", str(fit_config), "--ckpt_path", str(checkpoint)], capsys
        )
    assert "evil" not in sys.modules and not (tmp_path / "theirs").exists()
    error = refused(
        [command, "--config", str(fit_config), "--ckpt_path=memory://evil.ckpt"], capsys
    )
    assert "ckpt_path is 'memory://evil.ckpt', but this file does not exist" in error
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("save_top_k", [1, -1])
def test_a_full_disk_is_told_as_one(
    save_top_k: int, fit_config: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file of a fit meets it first, and whatever that makes others say."""
    options = f"{{save_last: true, save_top_k: {save_top_k}, every_n_train_steps: 1}}"
    saving = f"{{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {options}}}"
    args = ["fit", "--config", str(fit_config), f"--trainer.callbacks=[{saving}]"]
    for left in (1_500_000, 700_000, 100_000):
        (small_disk / "ballast").write_bytes(bytes(2_000_000 - left))
        assert main([*args, f"--trainer.default_root_dir={small_disk}"]) == 3
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "No space left on device" in error and "bytes are free there)" in error, error
        shutil.rmtree(small_disk / "lightning_logs", ignore_errors=True)
