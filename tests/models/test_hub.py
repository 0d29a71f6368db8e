"""A hub that is away is the network's fault (exit code 3), a name that it has not got is the user's (2)."""

import errno
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import AutoModel, AutoTokenizer

from kdnas.cli.main import main
from kdnas.commands.export import check_hub, push
from kdnas.data.corpus import load_corpus
from kdnas.models.encoders import find_teacher
from kdnas.models.hub import HubAway, refuse_away
from kdnas.system.errors import UserError
from kdnas.tasks.tasks import load_task


class ClientError(Exception):
    """As those of the HTTP client: no OSError."""


def no_answer(*args, **kwargs):
    try:
        raise socket.gaierror(-2, "Name or service not known")
    except OSError as error:
        raise ClientError("no route to host\nmore") from error


def not_found(*args, **kwargs):
    raise answered(404)


def answered(status: int) -> Exception:
    error = ClientError("an answer")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch):
    """As if HF_HUB_OFFLINE were not set, and the hub did what is asked of it."""
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)

    def answer(reply):
        for name in ("model_info", "dataset_info", "whoami", "create_repo"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, reply)

    return answer


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("x"),
        TimeoutError("x"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        answered(503),
        answered(429),
    ],
)
def test_no_answer_is_the_networks_fault(error, online, monkeypatch):
    with pytest.raises(
        HubAway, match=r"A thing, and the .* cannot be reached \(.*\): do that, or try again later"
    ):
        refuse_away(error, "A thing", "do that")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    refuse_away(error, "A thing", "do that")


@pytest.mark.parametrize(
    "error", [answered(404), answered(401), ValueError("x"), FileNotFoundError("x")]
)
def test_an_answer_is_the_users_affair(error, online):
    refuse_away(error, "A thing", "do that")


USES = {
    "There is no folder 'some/model' here": lambda: find_teacher("some/model"),
    "There is no file or folder 'some/set' here": lambda: load_corpus("some/set"),
    "There is no folder 'rte' here": lambda: load_task("rte"),
    "Nothing was pushed to 'me/small'": lambda: check_hub("me/small"),
    "Nothing was pushed to 'me/small' ": lambda: push(Path("mine"), "me/small"),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_hub_tells_them_apart(use, online):
    online(no_answer)
    with pytest.raises(
        HubAway, match=rf"{use.strip()}, and the .* cannot be reached \(no route to host\): "
    ):
        USES[use]()
    online(not_found)
    with pytest.raises(UserError, match="an answer"):
        USES[use]()


@pytest.mark.parametrize(("part", "what"), [(AutoTokenizer, "tokenizer"), (AutoModel, "weights")])
def test_a_download_that_breaks_off_is_the_networks_fault(
    part, what, online, tiny_teacher, monkeypatch
):
    online(lambda *args, **kwargs: None)
    config = tiny_teacher / "config.json"
    monkeypatch.setattr("kdnas.models.encoders.cached_file", lambda *args: config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(part, "from_pretrained", no_answer)
    with pytest.raises(HubAway, match=f"^The {what} of 'some/model'"):
        find_teacher("some/model").load()


def test_the_exit_code_is_3_and_nothing_is_made(online, tmp_path, text_file, capsys):
    online(no_answer)
    args = ["search", "--teacher=some/model", f"--text={text_file}", f"--root={tmp_path / 'logs'}"]
    assert main(args) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "HF_HUB_OFFLINE=1 for one in the cache" in error
    online(not_found)
    assert main(args) == 2
    assert (
        "There is no folder 'some/model' here, and it was not found on the hub: an answer; give a folder"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
