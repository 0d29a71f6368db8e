"""Checkpoints: whole, and a fit that was stopped goes on from them as if nothing had been."""

import resource
import tempfile
from pathlib import Path

import pytest
import torch

from kdnas.system.errors import UserError
from kdnas.system.jobs import Stopped
from kdnas.training.checkpoints import KeepLast, check_checkpoint
from kdnas.training.trainer import fit, fit_resumable, make_trainer
from tests.training.test_trainer import Call, Data, Steep, fail, settings


def keep_a_checkpoint(folder: Path) -> Path:
    """The one after the first epoch."""
    last = folder / "last.ckpt"
    fit(make_trainer(settings(), folder, 1, [KeepLast(last)]), Steep(), Data())
    return last


@pytest.mark.parametrize("num_whole_epochs", [1, 2])
def test_a_fit_goes_on_after_its_last_whole_epoch_and_ends_as_an_unbroken_one(
    tmp_path, num_whole_epochs
):
    def fail_later(trainer, module):
        if trainer.current_epoch == num_whole_epochs and trainer.global_step % 3 == 2:
            raise ZeroDivisionError

    whole, resumed = Steep(), Steep()
    fit_resumable(settings(), tmp_path / "whole", 3, whole, Data())
    with pytest.raises(ZeroDivisionError):
        fit_resumable(settings(), tmp_path / "fit", 3, Steep(), Data(), [Call(fail_later)])
    steps = []
    look = Call(lambda trainer, module: steps.append((trainer.current_epoch, trainer.global_step)))
    fit_resumable(settings(), tmp_path / "fit", 3, resumed, Data(), [look])
    assert steps == [(step // 3, step + 1) for step in range(3 * num_whole_epochs, 9)]
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_fit_that_is_asked_to_stop_keeps_the_step_that_it_is_at(tmp_path):
    def ask(trainer, module):
        if trainer.global_step == 4:
            (tmp_path / "stop").touch()

    with pytest.raises(Stopped):
        fit_resumable(settings(), tmp_path, 3, Steep(), Data(), [Call(ask)])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 2, 3]), (300.0, [2, 3])])
def test_a_checkpoint_is_written_after_a_while_before_validation_and_after_an_epoch(
    tmp_path, seconds, expected
):
    last, saved = tmp_path / "last.ckpt", []
    keep = KeepLast(last, seconds)
    trainer = make_trainer(settings(), tmp_path / "fit", 1, [keep])
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path: saved.append(trainer.global_step) or save(path)
    fit(trainer, Steep(), Data())
    assert saved == expected


def test_random_numbers_of_a_gpu_go_on_too(tmp_path, monkeypatch):
    kept, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    for was_there, is_there in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=was_there: found)
        state = KeepLast(tmp_path / "last.ckpt").state_dict()
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_there: found)
        resumed = KeepLast(tmp_path / "last.ckpt")
        resumed.load_state_dict(state)
        resumed.on_train_start(None, None)
        assert torch.equal(torch.get_rng_state(), state["random"])
    assert given == [kept]  # not where either has no GPU


# TensorBoard's writer is a thread, and fails there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_that_the_disk_cannot_take_leaves_the_one_before_and_nothing_else(
    tmp_path, monkeypatch
):
    last = keep_a_checkpoint(tmp_path)
    before = last.read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = set(tmp_path.rglob("*"))

    def fill(trainer, module):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))

    try:
        with pytest.raises(OSError, match="File too large") as full:
            fit_resumable(settings(), tmp_path, 2, Steep(), Data(), [Call(fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert full.value.filename in (str(last), str(tmp_path))
    assert last.read_bytes() == before
    left = set(tmp_path.rglob("*")) - files
    assert {path.name.partition(".out.")[0] for path in left} <= {"events", "progress.json"}


def test_what_is_no_checkpoint_or_damaged_is_refused_by_name(tmp_path):
    last = keep_a_checkpoint(tmp_path)
    assert check_checkpoint(last)["global_step"] == 3
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"^'{last}' is damaged .*: delete it to start over"):
        check_checkpoint(last)
    torch.save({"state_dict": {}}, last)
    with pytest.raises(UserError, match=f"^'{last}' is not a checkpoint of a fit: delete it"):
        check_checkpoint(last)
    torch.save({"state_dict": fail, "pytorch-lightning_version": "2"}, last)
    with pytest.raises(UserError, match=f"^'{last}' is damaged or holds more than tensors"):
        check_checkpoint(last)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    keep_a_checkpoint(tmp_path)
    monkeypatch.setattr(KeepLast, "FORMAT", KeepLast.FORMAT + 1)
    with pytest.raises(UserError, match="was written by another version of kdnas: delete it"):
        fit_resumable(settings(), tmp_path, 2, Steep(), Data())
