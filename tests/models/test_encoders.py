"""Teachers and students, and every checkpoint that cannot be a teacher; all families are in test_families.py."""

import builtins
import copy
import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from kdnas.cli.main import main
from kdnas.models import encoders as models
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    build_classifier,
    build_student,
    embed,
    encode,
    family_of,
    find_teacher,
    load_classifier,
    max_length,
    num_parameters,
    state_sha256,
    student_config,
)
from kdnas.system.errors import UserError
from tests.conftest import VOCAB, make_batch, make_tokenizer

ARCH = StudentArch(
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_size=48,
    intermediate_size=80,
    hidden_act="relu",
)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickled(folder: Path) -> Path:
    """The folder with its weights as pytorch_model.bin instead."""
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    return path


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    """A copy of the tiny teacher, to be broken."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


# Teachers


def test_a_teacher_loads_frozen_in_eval_mode_as_float32_without_pooler(any_teacher):
    teacher = find_teacher(str(any_teacher))
    model = teacher.load()
    assert not model.training
    assert model.pooler is None
    assert {parameter.requires_grad for parameter in model.parameters()} == {False}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(model(torch.tensor([[1, 9, 2]]), output_hidden_states=True).hidden_states) == 5
    assert teacher.tokenizer.mask_token_id == VOCAB.index("[MASK]")
    assert teacher.model is teacher.model


def test_a_teacher_has_the_weights_of_its_checkpoint(any_teacher):
    saved = load_file(any_teacher / "model.safetensors")
    loaded = find_teacher(str(any_teacher)).load().state_dict()
    assert len(loaded) == len([name for name in saved if "pooler" not in name]) > 20
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())


def test_a_half_precision_checkpoint_loads_as_float32(folder):
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.float16
    }
    teacher = find_teacher(str(folder))
    student = build_student(teacher.config, ARCH)
    for model in (
        teacher.load(),
        student,
        build_classifier(student.config),
        load_classifier(folder, 2),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_pytorch_checkpoint_loads(zipped, folder, tiny_teacher):
    path = only_pickled(folder)
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    teacher = find_teacher(str(folder))
    assert teacher.sha256() == find_teacher(str(tiny_teacher)).sha256()


def test_the_longest_input_is_what_the_position_table_holds(any_teacher):
    teacher = find_teacher(str(any_teacher))
    longest = max_length(teacher.config)
    model = teacher.load()
    assert model(torch.full((1, longest), 9)).last_hidden_state.shape == (1, longest, 64)
    with pytest.raises((RuntimeError, IndexError)):
        model(torch.full((1, longest + 1), 9))


def test_the_table_names_each_familys_layers_and_the_parts_of_them_in_running_order(any_teacher):
    model = find_teacher(str(any_teacher)).load()
    family = family_of(model.config)
    layers = family.layers(model)
    assert len(layers) == 4
    assert len({id(layer) for layer in layers}) == (1 if model.config.model_type == "albert" else 4)
    parts = [layers[0].get_submodule(name) for name in vars(family.names).values()]
    shapes = [tuple(part.weight.shape) for part in parts]
    assert shapes == [*[(64, 64)] * 4, (64,), (128, 64), (64, 128), (64,)]
    ran = []
    for part in parts:
        part.register_forward_hook(lambda part, inputs, output: ran.append(part))
    model(torch.tensor([[1, 9, 10, 2]]))
    assert ran[:8] == parts and len(ran) == 8 * (4 if model.config.model_type == "albert" else 1)


def test_encode_gives_the_embedding_and_every_layer_whatever_the_padding(any_teacher):
    model = find_teacher(str(any_teacher)).load()
    batch = {
        "input_ids": torch.tensor([[1, 9, 10, 2, 11, 2], [1, 12, 2, 3, 3, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]),
    }
    states = encode(model, batch).hidden_states
    assert [state.shape for state in states] == [(2, 6, 64)] * 5
    short = encode(model, {name: tensor[1:, :3] for name, tensor in batch.items()}).hidden_states
    torch.testing.assert_close(states[-1][1:, :3], short[-1])
    single = encode(
        model, batch | {"token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    ).hidden_states
    marked = model.config.type_vocab_size > 1
    assert marked is (model.config.model_type != "roberta")
    assert (
        (single[0] - states[0]).abs()[0, 4:].min() > 0
        if marked
        else torch.equal(single[-1], states[-1])
    )


def test_quickstart_is_the_packaged_minilm():
    teacher = find_teacher("quickstart")
    assert teacher.config.model_type == "bert"
    assert (teacher.config.num_hidden_layers, teacher.config.hidden_size) == (6, 384)
    assert len(teacher.tokenizer) == teacher.config.vocab_size == 30522


# Students


@pytest.mark.parametrize(
    "arch",
    [ARCH, StudentArch(1, 1, 16, 32), StudentArch(4, 2, 64, 128)],
    ids=["smaller", "smallest", "as the teacher"],
)
def test_a_student_has_exactly_the_shape_that_was_asked_for(arch, any_teacher):
    config = find_teacher(str(any_teacher)).config
    before = config.to_dict()
    student = build_student(config, arch)
    family = family_of(config)
    layers = family.layers(student)
    assert len(layers) == arch.num_hidden_layers
    for layer in layers:
        up, down = (
            layer.get_submodule(name) for name in (family.names.intermediate, family.names.output)
        )
        assert up.weight.shape == (arch.intermediate_size, arch.hidden_size)
        assert down.weight.shape == (arch.hidden_size, arch.intermediate_size)
        heads = {
            m.num_attention_heads for m in layer.modules() if hasattr(m, "num_attention_heads")
        }
        assert heads == {arch.num_attention_heads}
        assert any(isinstance(module, type(ACT2FN[arch.hidden_act])) for module in layer.modules())
    assert config.to_dict() == before
    assert student.config is not config

    states = student(torch.tensor([[1, 9, 10, 2]]), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(1, 4, arch.hidden_size)] * (
        arch.num_hidden_layers + 1
    )
    assert student.training
    assert student.pooler is None


def test_a_student_keeps_what_is_not_its_shape(any_teacher):
    config = find_teacher(str(any_teacher)).config
    student = build_student(config, ARCH)
    words = student.get_input_embeddings()
    embedding_size = 16 if config.model_type == "albert" else ARCH.hidden_size
    assert words.weight.shape == (len(VOCAB), embedding_size)
    assert words.padding_idx == 3
    assert student.embeddings.position_embeddings.weight.shape == (40, embedding_size)
    num_types = 1 if config.model_type == "roberta" else 3
    assert student.embeddings.token_type_embeddings.weight.shape == (num_types, embedding_size)
    assert {m.eps for m in student.modules() if isinstance(m, torch.nn.LayerNorm)} == {3e-6}
    five = set(ARCH.to_dict())
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in five | {"architectures", "dtype"}
    }
    assert kept.items() <= student.config.to_dict().items()
    assert len(kept) > 20


def test_a_saved_student_is_a_plain_checkpoint_and_names_no_teacher(any_teacher, tmp_path):
    student = build_student(find_teacher(str(any_teacher)).config, ARCH)
    student.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert state_sha256(loaded.state_dict()) == state_sha256(student.state_dict())
    assert str(any_teacher) not in (tmp_path / "config.json").read_text()


def test_an_unknown_activation_is_refused_with_the_nearest(tiny_teacher):
    config = find_teacher(str(tiny_teacher)).config
    with pytest.raises(UserError, match="The activation 'gellu' is unknown. Did you mean 'gelu'"):
        student_config(config, StudentArch(1, 1, 16, 32, "gellu"))


def test_a_config_of_another_family_is_refused():
    with pytest.raises(
        UserError, match="'gpt2' is not supported: give an encoder .BERT, RoBERTa, .*, ModernBERT"
    ):
        family_of(GPT2Config())


def test_a_classifier_has_as_many_outputs_as_labels_and_leaves_the_config_alone(any_teacher):
    config = student_config(find_teacher(str(any_teacher)).config, ARCH)
    before = copy.deepcopy(config.to_dict())
    classifier = build_classifier(config, num_labels=5)
    assert classifier(torch.tensor([[1, 9, 2]])).logits.shape == (1, 5)
    assert config.to_dict() == before


def test_a_classifier_from_a_checkpoint_has_its_encoder(any_teacher):
    classifier = load_classifier(any_teacher, num_labels=1)
    saved = load_file(any_teacher / "model.safetensors")
    encoder = classifier.base_model.state_dict()
    shared = encoder.keys() & saved.keys()
    assert all(torch.equal(encoder[name], saved[name]) for name in shared)
    assert len(shared) == len([name for name in saved if "pooler" not in name or name in encoder])
    assert classifier(torch.tensor([[1, 9, 2]])).logits.shape == (1, 1)


def test_shared_parameters_count_once():
    layer = torch.nn.Linear(3, 2)
    assert num_parameters(torch.nn.Sequential(layer, layer)) == 8


def test_the_hash_of_a_state_is_that_of_names_shapes_types_and_values():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5), "c": torch.zeros(0)}
    same = {name: state[name].clone() for name in ("c", "b", "a")}
    assert state_sha256(state) == state_sha256(same)
    others = [
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].T.contiguous().T + 1},
        state | {"b": torch.tensor(2.5)},
        state | {"b": torch.tensor(1.5, dtype=torch.float64)},
        {"A": state["a"], "b": state["b"], "c": state["c"]},
        {"a": state["a"], "b": state["b"]},
    ]
    assert len({state_sha256(other) for other in [state, *others]}) == 7
    assert state_sha256({"a": state["a"].T}) == state_sha256({"a": state["a"].T.contiguous()})


# What cannot be a teacher


def refused(source: object) -> str:
    """The one line with which a teacher is refused before its weights are read."""
    with pytest.raises(UserError) as caught:
        find_teacher(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no/such", "~/no", "no/such/folder"])
def test_a_folder_that_does_not_exist_is_refused(name):
    assert refused(name).startswith(f"There is no folder {name!r}: give one, a hub name")


@pytest.mark.parametrize(
    "name", ["nobody-kdnas/nothing", "nothing-kdnas", "two words", "x" * 300, "a\nb"]
)
def test_a_name_that_the_hub_does_not_have_is_refused(name):
    assert refused(name).startswith(
        f"There is no folder {name!r} here, and it was not found in the hub's cache (HF_HUB_OFFLINE is set): "
    )


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert refused(folder).startswith(f"{str(folder)!r} has no config.json: give the folder of")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"not json"])
def test_a_config_that_is_no_json_is_refused(content, folder):
    (folder / "config.json").write_bytes(content)
    assert f"{str(folder)!r} has a bad config.json: " in refused(folder)


def test_a_config_that_is_no_mapping_is_refused(folder):
    (folder / "config.json").write_text("[1]")
    assert f"{str(folder)!r} has a bad config.json: " in refused(folder)


def test_a_config_with_a_bad_value_is_refused(folder):
    edit_json(folder / "config.json", hidden_size="wide")
    assert f"{str(folder)!r} has a bad config.json: " in refused(folder)
    assert "'hidden_size' expected int, got str (value: 'wide')" in refused(folder)


@pytest.mark.parametrize("model_type", ["bart", "no-such-type", None, 7])
def test_another_family_is_refused(model_type, folder):
    edit_json(folder / "config.json", model_type=model_type)
    assert refused(folder).startswith(
        f"{str(folder)!r} cannot be used. The model family {model_type!r} is not supported: give an encoder (BERT, "
    )


def test_a_decoder_of_another_family_is_refused(tmp_path):
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(VOCAB))).save_pretrained(
        tmp_path
    )
    make_tokenizer().save_pretrained(tmp_path)
    assert "family 'gpt2' is not supported" in refused(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"is_decoder": True},
        {"architectures": ["BertLMHeadModel"]},
        {"architectures": ["BertModel", "BertForCausalLM"]},
    ],
)
def test_a_decoder_of_a_known_family_is_refused(values, folder):
    edit_json(folder / "config.json", **values)
    assert f"{str(folder)!r} is a decoder (bert): give an encoder (BERT, RoBERTa, " in refused(
        folder
    )


def test_relative_positions_are_refused_for_their_weights_would_be_dropped(folder, capsys):
    edit_json(folder / "config.json", position_embedding_type="absolute")
    find_teacher(str(folder))
    edit_json(folder / "config.json", position_embedding_type="relative_key")
    assert "has position_embedding_type 'relative_key', which" in refused(folder)
    assert main(["export", f"--student={folder}"]) == 2
    assert "has position_embedding_type 'relative_key', which" in capsys.readouterr().err


def test_odd_types_in_a_config_are_named_where_they_matter(folder):
    edit_json(folder / "config.json", architectures=1)
    find_teacher(str(folder))
    edit_json(folder / "config.json", is_decoder="false")
    assert "is_decoder" in refused(folder)


@pytest.mark.parametrize("damage", ["snapshots", "refs/main"])
def test_a_damaged_cache_of_the_hub_is_told_in_one_line(damage, tmp_path, monkeypatch):
    place = tmp_path / "models--a--b" / damage
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\xff")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "There is no folder 'a/b' here, and it was not found in the hub's cache" in refused(
        "a/b"
    )


def test_a_file_that_cannot_be_looked_at_is_not_there(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(300 * "n")
    assert "has no tokenizer" in refused(folder)


def test_a_folder_without_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert f"{str(folder)!r} has no tokenizer: put tokenizer.json into" in refused(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "Odd"}}']
)
def test_a_tokenizer_that_does_not_load_is_refused(content, folder):
    (folder / "tokenizer.json").write_text(content)
    assert f"The tokenizer of {str(folder)!r} cannot be loaded (" in refused(folder)


def test_a_tokenizer_of_python_alone_is_refused(folder, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    message = (
        f"The tokenizer of {str(folder)!r} is a slow, pure-Python one (TokenizersBackend): "
        "use a model that has a tokenizer.json."
    )
    assert message in refused(folder)


@pytest.mark.parametrize("token", ["mask_token", "pad_token"])
def test_a_tokenizer_without_mask_or_padding_is_refused(token, folder):
    tokenizer = make_tokenizer()
    setattr(tokenizer, token, None)
    tokenizer.save_pretrained(folder)
    assert f"The tokenizer of {str(folder)!r} has no mask or no padding token" in refused(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["kdnas"])
    tokenizer.save_pretrained(folder)
    size = len(VOCAB)
    assert f"{str(folder)!r} has {size + 1} tokens, but the model only {size}:" in refused(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert f"{str(folder)!r} has no weights: put model.safetensors into" in refused(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_truncated_safetensors_are_refused(num_bytes, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert refused(folder).startswith(f"{str(path)!r} is truncated or not a safetensors file (")


def test_a_pointer_in_place_of_weights_is_refused(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is truncated or not a safetensors file (" in refused(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 1000, -100])
def test_a_truncated_pytorch_checkpoint_is_refused(num_bytes, folder):
    path = only_pickled(folder)
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert refused(folder).startswith(
        f"{str(path)!r} is truncated, or holds Python objects other than tensors:"
    )


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [lambda value, path: path.write_bytes(pickle.dumps(value, 2)), torch.save]
)
def test_a_pickled_payload_is_refused_and_does_not_run(save, folder, tmp_path):
    mark = tmp_path / "ran"
    save({"weights": Payload(mark)}, only_pickled(folder))
    assert "objects other than tensors" in refused(folder)
    assert not mark.exists()
    with pytest.raises(pickle.UnpicklingError):
        AutoModel.from_pretrained(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # so the payload does run where it is let


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_neither_runs_nor_asks(file, folder, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    edit_json(folder / file, auto_map=auto_map)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    assert type(find_teacher(str(folder)).load()).__name__ == "BertModel"
    edit_json(folder / "config.json", model_type="evil")
    assert "family 'evil' is not supported" in refused(folder)
    assert not mark.exists()


def test_missing_weights_are_refused_by_name(folder):
    edit_weights(
        folder, lambda state: [state.pop(f"encoder.layer.{i}.output.dense.bias") for i in (1, 3)]
    )
    with pytest.raises(
        UserError,
        match=r"lack 'encoder.layer.1.output.dense.bias'.*and 1 more tensors\): use a complete",
    ):
        find_teacher(str(folder)).load()


def test_weights_of_another_shape_are_refused_by_name(folder):
    edit_weights(folder, lambda state: state.update({"embeddings.LayerNorm.bias": torch.zeros(5)}))
    with pytest.raises(
        UserError, match=r"'embeddings.LayerNorm.bias', or its shape differs .*and 0 more"
    ):
        find_teacher(str(folder)).load()


def test_fewer_layers_in_the_weights_than_in_the_config_are_refused(folder):
    edit_json(folder / "config.json", num_hidden_layers=5)
    with pytest.raises(UserError, match=r"lack 'encoder.layer.4.attention"):
        find_teacher(str(folder)).load()


def test_a_config_that_no_model_can_be_made_of_is_refused(folder):
    edit_json(folder / "config.json", num_attention_heads=5)
    with pytest.raises(UserError, match=rf"The weights of '{folder}' cannot be loaded \(.*64.*5"):
        find_teacher(str(folder)).load()


def test_quickstart_with_other_weights_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    message = refused("quickstart")
    assert "sha256 d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa" in message
    assert models.QUICKSTART_SHA256 in message


def test_quickstart_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused("quickstart") == "'quickstart' is not installed: pip install '.[quickstart]'."


def test_looking_at_a_teacher_reads_no_weights(folder, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    assert isinstance(find_teacher(str(folder)).config, type(AutoConfig.from_pretrained(folder)))


def test_embed_is_the_first_of_encode_s_states(any_teacher):
    model = find_teacher(str(any_teacher)).load()
    batch = make_batch()
    torch.testing.assert_close(embed(model, batch), encode(model, batch).hidden_states[0])
