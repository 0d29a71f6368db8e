"""A teacher is its whole checkpoint, and nothing of it is read, run or named elsewhere."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kdnas.cli.main import main
from kdnas.deploy.export import load_student
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.models.families import FAMILIES
from kdnas.system.errors import UserError
from tests.conftest import make_config, make_tokenizer, save_teacher

SAFE = "model.safetensors"


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / SAFE)
    change(state)
    save_file(state, folder / SAFE, metadata={"format": "pt"})


def in_shards(folder: Path, **index: Any) -> Path:
    """The folder with its weights in two shards, and what their index says beside that."""
    state = load_file(folder / SAFE)
    (folder / SAFE).unlink()
    names = {key: f"part{number % 2}.safetensors" for number, key in enumerate(state)}
    for name in set(names.values()):
        tensors = {key: tensor for key, tensor in state.items() if names[key] == name}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    path = folder / f"{SAFE}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names} | index))
    return path


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher, to be broken."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


def refused(folder: Path) -> str:
    """The one line with which a teacher is refused, as a student to export too, in seconds."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        find_teacher(str(folder)).load()
    with pytest.raises(UserError):
        load_student(folder)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A teacher is its whole checkpoint


def test_weights_that_the_model_has_no_use_for_are_refused_by_name(folder):
    name = "encoder.layer.0.attention.self.distance_embedding.weight"
    edit_weights(folder, lambda state: state.update({name: torch.ones(79, 32)}))
    assert f"hold {name!r}, which a model of its config.json does not use" in refused(folder)


def test_a_config_of_fewer_layers_than_the_file_is_refused(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "hold 'encoder.layer.1.attention" in refused(folder)
    assert "and 45 more, which a model of its config.json does not use" in refused(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_heads_and_poolers_of_every_family_are_left_out(family, tmp_path):
    for head in (
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ):
        try:
            head.from_config(make_config(family)).save_pretrained(tmp_path)
        except ValueError:  # the family has no such head
            continue
        make_tokenizer().save_pretrained(tmp_path)
        find_teacher(str(tmp_path)).load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(value, dtype, folder):
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["encoder.layer.2.output.dense.bias"] = torch.full((64,), value, dtype=dtype)

    edit_weights(folder, spoil)
    assert (
        "have NaN or infinity in 'encoder.layer.2.output.dense.bias': use another checkpoint."
        in refused(folder)
    )
    with pytest.raises(UserError, match="NaN or infinity"):
        load_classifier(folder, 2)


def test_a_layer_of_zeros_is_refused_by_name(folder):
    edit_weights(folder, lambda state: state["encoder.layer.3.output.dense.weight"].zero_())
    assert "The tensor 'encoder.layer.3.output.dense.weight'" in refused(folder)


def test_a_norm_of_zeros_is_refused_by_name(folder):
    edit_weights(folder, lambda state: state["encoder.layer.1.output.LayerNorm.weight"].zero_())
    assert "The tensor 'encoder.layer.1.output.LayerNorm.weight'" in refused(folder)


def test_token_types_of_zeros_are_none(folder):
    key = "embeddings.token_type_embeddings.weight"
    edit_weights(folder, lambda state: state[key].zero_())
    find_teacher(str(folder)).load()


ABSURD = {
    "hidden_size": 10**6,
    "num_hidden_layers": 10**6,
    "intermediate_size": 10**6,
    "vocab_size": 10**9,
    "max_position_embeddings": 10**9,
    "num_labels": 10**9,
    "num_attention_heads": 0,
    "layer_norm_eps": float("nan"),
    "initializer_range": float("inf"),
}


@pytest.mark.parametrize("key", ABSURD)
def test_an_absurd_size_ends_a_search_in_seconds_and_leaves_nothing(
    key, folder, text_file, tmp_path, capsys
):
    edit_json(folder / "config.json", **{key: ABSURD[key]})
    assert key in refused(folder) or "has the value" in refused(folder)
    root = tmp_path / "logs"
    args = ["search", f"--teacher={folder}", f"--text={text_file}", f"--root={root}"]
    started = time.monotonic()
    assert main(args) == 2
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err.count("\n") == 1
    assert not root.exists()


@pytest.mark.parametrize(
    "family, key", [("albert", "embedding_size"), ("deberta-v2", "conv_kernel_size")]
)
def test_far_more_parameters_than_the_file_has_are_refused_before_they_are_made(
    family, key, tmp_path, monkeypatch
):
    save_teacher(tmp_path, family)
    edit_json(tmp_path / "config.json", **{key: 10**6 - 1})
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    assert "parameters, but its weights have" in refused(tmp_path)


def test_weights_that_are_not_whole_leave_nothing_either(folder, text_file, tmp_path, capsys):
    edit_weights(folder, lambda state: state["encoder.layer.0.output.dense.weight"].zero_())
    root = tmp_path / "logs"
    args = ["search", f"--teacher={folder}", f"--text={text_file}", f"--root={root}"]
    assert main(args) == 2
    assert "all zero" in capsys.readouterr().err
    assert not root.exists()


def test_a_key_that_is_given_twice_in_a_config_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"hidden_size": 32,', 1))
    assert "the key 'hidden_size' is given twice" in refused(folder)


def test_a_quantized_checkpoint_is_refused(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "config.json sets quantization_config, " in refused(folder)


# Nothing outside the folder


def test_shards_load_as_one_file_does(folder, tiny_teacher):
    in_shards(folder)
    assert find_teacher(str(folder)).sha256() == find_teacher(str(tiny_teacher)).sha256()


@pytest.mark.parametrize(
    "how", ["../outside.safetensors", "absolute", "sub/../../outside", "", "."]
)
def test_an_index_that_leaves_its_folder_is_refused_before_anything_is_opened(
    how, folder, tiny_teacher, opened
):
    outside = folder.parent / "outside.safetensors"
    shutil.copyfile(tiny_teacher / SAFE, outside)
    how = str(outside) if how == "absolute" else how
    index = in_shards(folder, weight_map=dict.fromkeys(load_file(outside), how))
    opened.clear()
    assert (
        refused(folder) == f"{str(index)!r} refers to {how!r}, which is not in the same folder: "
        "use a checkpoint whose files are in one folder."
    )
    assert str(outside) not in opened


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 1}, {"a": None}, {"a": "gone"}])
def test_an_index_that_names_no_shards_is_refused(weight_map, folder):
    index = in_shards(folder, weight_map=weight_map)
    assert str(index) in refused(folder)


@pytest.mark.parametrize("key", ["transformers_weights", "configuration_files"])
def test_a_config_that_names_other_files_is_refused(key, folder, tiny_teacher, opened):
    outside = folder.parent / "config.4.0.0.json"
    shutil.copyfile(tiny_teacher / "config.json", outside)
    edit_json(folder / "config.json", **{key: [f"../{outside.name}"]})
    opened.clear()
    assert f"config.json sets {key}, " in refused(folder)
    assert outside.name not in [Path(path).name for path in opened]


def test_a_tokenizer_of_another_folder_is_refused(folder, opened):
    outside = folder.parent / "tokenizer.4.0.0.json"
    shutil.copyfile(folder / "tokenizer.json", outside)
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=[f"../{outside.name}"])
    opened.clear()
    assert f"refers to '../{outside.name}', which is not in the same folder" in refused(folder)
    assert outside.name not in [Path(path).name for path in opened]


def test_an_adapter_which_names_its_base_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../outside"}')
    assert "is an adapter" in refused(folder)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "vocab.txt", SAFE, "x.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_pipe_or_a_device_in_a_checkpoint_is_refused(kind, file, folder, monkeypatch):
    (folder / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "device":
        (folder / file).symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(folder)  # the name of a socket is short
        socket.socket(socket.AF_UNIX).bind(file)
    assert f"{str(folder / file)!r} is a pipe or a device" in refused(folder)


# No code by name


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_how_attention_is_computed_is_not_the_checkpoint_s_to_say(key, folder, tiny_teacher):
    edit_json(folder / "config.json", **{key: "kernels-community/evil"})
    teacher = find_teacher(str(folder))
    models = [teacher.load(), load_classifier(folder, 2), load_student(folder)[0]]
    assert {model.config._attn_implementation for model in models} == {"sdpa"}
    assert teacher.sha256() == find_teacher(str(tiny_teacher)).sha256()
