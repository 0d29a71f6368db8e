"""The contract of every row of the table of families, and what is in no row."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    CLIPConfig,
    DebertaConfig,
    GPT2Config,
    PreTrainedModel,
    T5Config,
    ViTConfig,
)
from transformers.activations import ACT2FN

from kdnas.cli.main import main
from kdnas.data.datamodule import DataSettings, KDDataModule
from kdnas.deploy.export import _check_parity, load_student
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.deploy.onnx import write_onnx
from kdnas.distillation.attention import AttentionRelations
from kdnas.distillation.losses import attention_divergence, ridge_map
from kdnas.distillation.module import DEFAULT_OBJECTIVE, HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import WeightedSum
from kdnas.distillation.start import FromEmbeddings, FromTeacher, RandomStart, Start, Started
from kdnas.distillation.teacher_states import StatesSettings
from kdnas.models.arch import StudentArch, kept_layers
from kdnas.models.encoders import (
    FAMILIES,
    Teacher,
    build_classifier,
    build_student,
    embed,
    encode,
    find_teacher,
    load_classifier,
    max_length,
    refuse_other_inputs,
    state_sha256,
    student_config,
)
from kdnas.models.families import arch_of, family_of, titles
from kdnas.nas.space import SearchSpace
from kdnas.system.errors import UserError
from tests.conftest import (
    CONFIGS,
    MORE_CONFIGS,
    VOCAB,
    make_batch,
    make_config,
    make_rows,
    make_tokenizer,
    save_teacher,
    view_of,
)

TITLES = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ALBERT, ELECTRA, DistilBERT, MPNet, DeBERTa-v2/v3, ModernBERT"
# Nothing as in the teacher (4 layers, 2 heads, 64 wide, 128 intermediate, gelu).
ARCH = StudentArch(
    num_hidden_layers=3,
    num_attention_heads=1,
    hidden_size=48,
    intermediate_size=80,
    hidden_act="relu",
)
NARROW = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64
)
ROWS = [make_batch(16, seed, length=20) for seed in range(10, 16)]


def test_there_are_ten_rows_and_a_tiny_teacher_of_each():
    assert list(FAMILIES) == list(dict.fromkeys([*FAMILIES, *CONFIGS, *MORE_CONFIGS]))
    assert len(FAMILIES) == len(CONFIGS) + len(MORE_CONFIGS) == 10
    assert titles() == TITLES


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of each family, as after training: no bias is 0, and no layer norm the identity."""
    folder = save_teacher(tmp_path_factory.mktemp("teacher") / name, name)
    model = AutoModel.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is not None:
            module.bias.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return find_teacher(str(folder))


@pytest.fixture(scope="module")
def module(
    teacher: Teacher, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> HiddenStateDistillModule:
    """A narrower student, distilled by the default recipe and one more objective; ``module.trainer`` is its Trainer."""
    root = tmp_path_factory.mktemp("fit")
    (root / "rows.txt").write_text("\n".join(make_rows(30)))
    settings = DataSettings(
        max_length=20, batch_tokens=120, held_out_fraction=0.3, pair_share=0.5, masked_share=0.5
    )
    data = KDDataModule(str(folder), str(root / "rows.txt"), settings)
    objective = WeightedSum(
        [*DEFAULT_OBJECTIVE.objectives, AttentionRelations(num_heads=4)],
        [*DEFAULT_OBJECTIVE.weights, 0.5],
    )
    torch.manual_seed(0)
    module = HiddenStateDistillModule(
        teacher, NARROW, Recipe(objective), StatesSettings(str(root / "states"))
    )
    quiet = dict(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, precision="bf16-mixed", num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, datamodule=data)
    return module


# The teacher


def test_the_teacher_is_its_checkpoint_without_pooler_frozen_and_float32(
    teacher: Teacher, folder: Path
):
    model = teacher.load()
    saved = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == {name for name in saved if "pooler" not in name} and len(loaded) > 15
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    assert not model.training and {(p.requires_grad, p.dtype) for p in model.parameters()} == {
        (False, torch.float32)
    }
    assert list(arch_of(teacher.config).to_dict().values())[:4] == [4, 2, 64, 128]


def test_hidden_states_are_the_embedding_and_every_layer_whatever_the_padding(teacher: Teacher):
    batch = make_batch()
    states = encode(teacher.model, batch).hidden_states
    assert [tuple(state.shape) for state in states] == [(3, 12, 64)] * 5
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(embed(teacher.model, batch)[real], states[0][real])
    torch.testing.assert_close(states[4], encode(teacher.model, batch).last_hidden_state)
    last = {key: batch[key][2:, :5] for key in ("input_ids", "attention_mask", "token_type_ids")}
    assert last["attention_mask"].all() and not batch["attention_mask"][2, 5:].any()
    for padded, alone in zip(states, encode(teacher.model, last).hidden_states, strict=True):
        torch.testing.assert_close(padded[2:, :5], alone, rtol=1e-4, atol=1e-5)
    assert len({float(state[real].mean()) for state in states}) == 5


def test_the_longest_input_is_read(teacher: Teacher, name: str):
    longest = max_length(teacher.config)
    assert longest == {"roberta": 36, "xlm-roberta": 36, "camembert": 36, "mpnet": 38}.get(name, 40)
    assert encode(teacher.model, make_batch(1, length=longest)).hidden_states[-1].shape == (
        1,
        longest,
        64,
    )


def test_a_fine_tuned_teacher_s_encoder_is_taken(teacher: Teacher, folder: Path, tmp_path: Path):
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=5, problem_type="regression"
    )
    classifier.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    tuned = find_teacher(str(tmp_path))
    assert (
        "ForSequenceClassification" in tuned.config.architectures[0]
        and tuned.config.num_labels == 5
    )
    assert tuned.sha256() == teacher.sha256()
    ours, theirs = (
        student_config(t.config, ARCH).to_dict() | {"_name_or_path": ""} for t in (tuned, teacher)
    )
    assert ours == theirs  # no labels of the teacher's own
    for labels in (2, 5):
        again = load_classifier(tmp_path, labels)
        assert (
            again(torch.tensor([[1, 9, 2]])).logits.shape == (1, labels)
            and again.config.problem_type is None
        )
        assert torch.equal(
            again.get_input_embeddings().weight, teacher.model.get_input_embeddings().weight
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_float32(folder: Path, tmp_path: Path, dtype: torch.dtype):
    AutoModel.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
        dtype
    }
    teacher = find_teacher(str(tmp_path))
    for model in (
        teacher.load(),
        build_student(teacher.config, NARROW),
        load_classifier(tmp_path, 2),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# The student


def layer_numbers(state: dict[str, Tensor]) -> set[str]:
    return {part for name in state for part in name.split(".")[:4] if part.isdigit()}


@pytest.mark.parametrize("arch", [ARCH, NARROW], ids=["odd", "narrow"])
def test_the_student_has_exactly_the_shape_that_was_asked_for(
    teacher: Teacher, name: str, arch: StudentArch, tmp_path: Path
):
    before = copy.deepcopy(teacher.config.to_dict())
    student = build_student(teacher.config, arch)
    assert teacher.config.to_dict() == before
    student.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    # From the weights that others will load, not from the config.
    shared = name == "albert"
    assert len(layer_numbers(state)) == (1 if shared else arch.num_hidden_layers)
    names, family = FAMILIES[name].names, FAMILIES[name]
    end = f"{names.query}.weight"
    prefix = next(key for key in state if key.endswith(end)).removesuffix(end)
    shapes = {
        part: tuple(state[f"{prefix}{getattr(names, part)}.weight"].shape)
        for part in ("intermediate", "output")
    }
    gates = 2 if name == "modernbert" else 1
    assert shapes == {
        "intermediate": (gates * arch.intermediate_size, arch.hidden_size),
        "output": (arch.hidden_size, arch.intermediate_size),
    }
    output = encode(student.eval(), make_batch())
    assert [state.shape[-1] for state in output.hidden_states] == [arch.hidden_size] * (
        arch.num_hidden_layers + 1
    )
    student.set_attn_implementation("eager")
    maps = encode(student, make_batch(), maps=True).attentions
    assert [tuple(m.shape) for m in maps] == [
        (3, arch.num_attention_heads, 12, 12)
    ] * arch.num_hidden_layers
    activation = type(ACT2FN[arch.hidden_act])
    for layer in family.layers(student):
        assert any(isinstance(part, activation) for part in layer.modules())
    assert arch_of(AutoConfig.from_pretrained(tmp_path)) == arch


def test_the_student_keeps_what_is_not_its_shape(teacher: Teacher, name: str):
    student = build_student(teacher.config, ARCH)
    words = student.get_input_embeddings()
    assert len(words.weight) == len(VOCAB) and words.padding_idx == (1 if name == "mpnet" else 3)
    eps = 1e-12 if name == "distilbert" else 3e-6
    assert {part.eps for part in student.modules() if isinstance(part, nn.LayerNorm)} == {eps}
    assert max_length(student.config) == max_length(teacher.config)
    five = {FAMILIES[name].fields.get(key, key) for key in ARCH.to_dict()}
    following = {
        "architectures",
        "dtype",
        "layer_types",
        "pooler_hidden_size",
        "attention_head_size",
    }
    kept = {
        key: value for key, value in teacher.config.to_dict().items() if key not in five | following
    }
    assert kept.items() <= student.config.to_dict().items() and len(kept) > 12


def test_a_classifier_of_the_student_is_built_and_leaves_the_config_alone(teacher: Teacher):
    config = student_config(teacher.config, ARCH)
    before = copy.deepcopy(config.to_dict())
    batch = {
        name: tensor
        for name, tensor in make_batch().items()
        if name in ("input_ids", "attention_mask")
    }
    assert build_classifier(config, num_labels=5)(**batch).logits.shape == (3, 5)
    assert config.to_dict() == before


def test_every_point_of_the_search_space_is_built(name: str):
    config = make_config(name, num_hidden_layers=2)
    space, found = SearchSpace.from_teacher(config), 0
    batch = {
        key: make_batch(1, length=6)[key].to("meta") for key in ("input_ids", "attention_mask")
    }
    with torch.device("meta"):
        for arch in space:
            student = build_student(config, arch)
            assert arch_of(student.config) == arch
            found += arch_of(student.config) == arch
    assert found == len(space) == 2 * 2 * len(space.choices["hidden_size"]) * 3 * 2 and found >= 48
    for width in space.choices["hidden_size"]:
        for heads in space.choices["num_attention_heads"]:
            arch = StudentArch(2, heads, width, space.choices["intermediate_size"][0])
            output = build_student(config, arch)(
                **{key: torch.ones(1, 6, dtype=torch.long) for key in batch}
            )
            assert output.last_hidden_state.shape == (1, 6, width)


def test_latency_is_measured(teacher: Teacher):
    meter = LatencyMeter(
        teacher.config, LatencySettings(length=max_length(teacher.config), min_seconds=1e-3)
    )
    measured = meter.measure(NARROW)
    assert 0 < measured.student.median_ms < math.inf and 0 < measured.teacher.median_ms < math.inf
    assert measured.num_parameters == sum(
        p.numel() for p in build_classifier(student_config(teacher.config, NARROW)).parameters()
    )


# Attention, recomputed from stored states


@torch.no_grad()
def test_attention_and_values_are_what_the_model_itself_attends_to(teacher: Teacher):
    model, family, batch = teacher.model, family_of(teacher.config), make_batch(length=30)
    contexts: list[Tensor] = []
    outputs = dict.fromkeys(family.layers(model))  # ALBERT's is one
    hooks = [
        layer.get_submodule(family.names.attention_output).register_forward_hook(
            lambda part, inputs, output: contexts.append(inputs[0])
        )
        for layer in outputs
    ]
    view = view_of(model, batch)
    for hook in hooks:
        hook.remove()
    assert len(contexts) == 4
    for layer, context in enumerate(contexts):
        maps, values = view.attention(layer), view.heads(layer, "value", 2)
        assert not maps[
            ~view.mask_BT[:, None, None, :].expand_as(maps) & view.mask_BT[:, None, :, None]
        ].any()
        found = (maps @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found[view.mask_BT], context[view.mask_BT], rtol=1e-4, atol=1e-4)
        chosen = torch.tensor([1, 0, 1])
        torch.testing.assert_close(view.attention(layer, chosen), maps[:, chosen])


# The start


def started(teacher: Teacher, start: Start, arch: StudentArch) -> tuple[PreTrainedModel, Started]:
    torch.manual_seed(0)
    student = build_student(teacher.config, arch).eval()
    before = state_sha256(teacher.model.state_dict())
    done = start(student, teacher.model, ROWS)
    assert state_sha256(teacher.model.state_dict()) == before
    return student, done


@torch.no_grad()
def last_states(model: PreTrainedModel, rows: list) -> Tensor:
    return torch.cat(
        [view_of(model, batch).real(model.config.num_hidden_layers - 1) for batch in rows]
    )


def test_at_equal_shape_the_start_is_the_teacher(teacher: Teacher):
    student, done = started(teacher, FromTeacher(), arch_of(teacher.config))
    torch.testing.assert_close(last_states(student, ROWS), last_states(teacher.model, ROWS))
    assert (
        done.copied == {name for name, _ in student.named_parameters()}
        and done.heads == ((0, 1),) * 4
    )
    for arch in (StudentArch(3, 1, 64, 48), StudentArch(4, 1, 64, 128, "relu")):
        student, done = started(teacher, FromTeacher(), arch)
        assert last_states(student, ROWS).isfinite().all()
        assert [len(heads) for heads in done.heads] == [1] * arch.num_hidden_layers


def test_of_a_wide_feed_forward_part_the_neurons_that_do_something_are_kept(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kdnas.distillation.narrowing.autocast", lambda device: nullcontext())
    pruned = copy.copy(teacher)
    model = copy.deepcopy(teacher.model)
    object.__setattr__(pruned, "__dict__", pruned.__dict__ | {"model": model})
    family = family_of(teacher.config)
    dead = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:80]
    for layer in set(family.layers(model)):
        layer.get_submodule(family.names.output).weight.data[:, dead] = 0
    student, _ = started(
        pruned, FromTeacher(), replace(arch_of(teacher.config), intermediate_size=48)
    )
    most = 1e-2  # least squares add what is lacking: the error of float16
    torch.testing.assert_close(
        last_states(student, ROWS), last_states(model, ROWS), rtol=most, atol=most
    )


@torch.no_grad()
def test_a_narrower_start_knows_more_than_the_embeddings_and_they_more_than_chance(
    teacher: Teacher,
):
    held_out = make_batch(24, 99, length=20)
    theirs = view_of(teacher.model, held_out)
    words, attention = {}, {}
    for start in (FromTeacher(), FromEmbeddings(), RandomStart()):
        student, done = started(teacher, start, NARROW)
        ours = view_of(student, held_out)
        weight = ridge_map(ours.real(-1), theirs.real(-1), 1e-3).float()
        words[type(start)] = float(
            (torch.addmm(weight[-1], ours.real(-1), weight[:-1]) - theirs.real(-1)).square().mean()
        )
        attention[type(start)] = float(
            attention_divergence(ours.attention(0), theirs.attention(0), ours.mask_BT)
        )
        if type(start) is FromTeacher:
            assert done.heads is not None and len(done.heads) == NARROW.num_hidden_layers
    assert words[FromEmbeddings] < 0.8 * words[RandomStart]
    assert words[FromTeacher] < 0.8 * words[RandomStart]
    assert attention[FromTeacher] < 0.5 * attention[FromEmbeddings]


@pytest.mark.parametrize("sizes", [(64, 64), (64, 32), (32, 32), (32, 64)])
def test_tables_of_their_own_width_start_in_every_combination(
    sizes: tuple[int, int], tmp_path: Path
):
    """ELECTRA's map behind the tables: there, there alone, folded into the tables, or nowhere."""
    width, tables = 64, sizes[1]
    teacher = find_teacher(str(save_teacher(tmp_path, "electra", embedding_size=tables)))
    arch = StudentArch(2, 2, 32 if sizes[0] == 32 else 48, 64)
    student, _ = started(teacher, FromEmbeddings(), arch)
    own = tables != width
    assert student.config.embedding_size == (tables if own else arch.hidden_size)
    assert hasattr(student, "embeddings_project") is (own and tables != arch.hidden_size)
    batch = make_batch(24, 99, length=20)
    with torch.no_grad():
        ours, theirs = (
            embed(model, batch)[batch["attention_mask"].bool()]
            for model in (student, teacher.model)
        )
    weight = ridge_map(ours, theirs, 1e-6).float()
    error = (torch.addmm(weight[-1], ours, weight[:-1]) - theirs).square().mean() / theirs.var(
        0
    ).mean()
    assert error < 0.3


# Distillation with the default recipe


def test_the_default_recipe_works_and_leaves_the_teacher_as_it_was(
    module, teacher: Teacher, folder: Path
):
    assert len(module.history) == 2 and all(
        0 < epoch["loss"] < math.inf for epoch in module.history
    )
    assert teacher.sha256() == find_teacher(str(folder)).sha256()


def test_a_step_lowers_the_loss_and_gives_every_parameter_a_gradient(
    module: HiddenStateDistillModule,
):
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    batch, losses = module.trainer.datamodule.rows[0, np.arange(8)], []
    for _ in range(3):
        losses.append(module.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        assert not [
            name for name, parameter in module.named_parameters() if parameter.grad is None
        ]  # DDP refuses others
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@torch.no_grad()
def test_padding_changes_no_loss(module):
    module.eval()
    data = module.trainer.datamodule
    rows = data.rows.lengths.argsort()[[0, 1, -1]]
    batch = data.rows[0, rows]
    assert batch["attention_mask"][0].sum() < batch["attention_mask"].shape[1]
    together, _ = module(*module.views(batch))
    alone = [module(*module.views(data.rows[0, rows[i : i + 1]]))[0] for i in range(3)]
    torch.testing.assert_close(together, sum(alone), rtol=1e-3, atol=1e-5)
    batch["input_ids"][batch["attention_mask"] == 0] = 17
    torch.testing.assert_close(module(*module.views(batch))[0], together, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_no_teacher(module, tmp_path: Path):
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "criterion"}
    student = {name.removeprefix("student.") for name in state if name.startswith("student.")}
    assert student == module.student.state_dict().keys()


# What is deployed


def test_the_student_loads_without_kdnas_and_its_onnx_graph_equals_torch(
    teacher: Teacher, name: str, tmp_path: Path
):
    depth = 2 if name == "modernbert" else 1  # its second layer has a window
    student, _ = started(teacher, FromTeacher(), replace(NARROW, num_hidden_layers=depth))
    student.save_pretrained(tmp_path / "encoder")
    found = AutoModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in student.state_dict().items())
    classifier = load_classifier(tmp_path / "encoder", 3).eval()
    classifier.save_pretrained(tmp_path / "tuned")
    # One that gives token types to all, as BERT's; the models of four families refuse them.
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "tuned")
    loaded, tokenizer = load_student(tmp_path / "tuned")
    assert ("token_type_ids" in tokenizer("the river")) is (
        getattr(student.config, "type_vocab_size", 0) > 1
    )
    assert tokenizer.model_max_length == max_length(teacher.config)
    write_onnx(loaded, tmp_path / "model.onnx", tokenizer.model_input_names)
    assert 0 < _check_parity(loaded, tokenizer, tmp_path / "model.onnx", 1e-4) < 1e-4
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "tuned", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert state_sha256(plain.state_dict()) == state_sha256(classifier.state_dict())
    assert str(teacher.source) not in (tmp_path / "tuned" / "config.json").read_text()


# What is in no row, or does not fit


OTHERS = {
    "gpt2": GPT2Config(n_layer=1, n_embd=8, n_head=1),
    "t5": T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2),
    "vit": ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    ),
    "clip": CLIPConfig(),
    "deberta": DebertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("command", ["run", "fit"])
def test_another_kind_of_teacher_is_refused_before_anything_is_made(
    other: str,
    command: str,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
):
    OTHERS[other].save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = {
        "run": [f"--teacher={tmp_path}/teacher", f"--text={text_file}", "--name=other"],
        "fit": [
            f"--model.teacher={tmp_path}/teacher",
            f"--model.arch={ARCH.to_dict()}",
            f"--data.text={text_file}",
        ],
    }
    assert main([command, *options[command]]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kdnas: '") and line.endswith(
        f"' cannot be used. The model family {other!r} is not supported: give an encoder ({TITLES})."
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_decoder_of_a_family_is_refused_with_the_families(tmp_path: Path):
    folder = save_teacher(tmp_path, "electra", is_decoder=True)
    with pytest.raises(UserError, match=rf"is a decoder \(electra\): give an encoder \({TITLES}\)"):
        find_teacher(str(folder))


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("bert", {"pad_token_id": 0}, "has the pad_token_id 3, but the model's config.json has 0:"),
        (
            "modernbert",
            {"cls_token_id": 4},
            "has the cls_token_id 1, but the model's config.json has 4:",
        ),
        (
            "modernbert",
            {"sep_token_id": 9},
            "has the sep_token_id 2, but the model's config.json has 9:",
        ),
        ("mpnet", {"vocab_size": 20}, f"has {len(VOCAB)} tokens, but the model only 20:"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    family: str, values: dict, message: str, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        find_teacher(str(save_teacher(tmp_path, family, **values)))


def test_a_token_beyond_the_vocabulary_is_refused_however_few_there_are(tmp_path: Path):
    save_teacher(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(
        file.read_text().replace(f'"doctor": {len(VOCAB) - 1}', f'"doctor": {len(VOCAB) + 8}')
    )
    with pytest.raises(
        UserError, match=f"has {len(VOCAB) + 9} tokens, but the model only {len(VOCAB)}:"
    ):
        find_teacher(str(tmp_path))


def test_roberta_s_usable_length_is_positions_minus_2():
    for family in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        assert max_length(make_config(family, max_position_embeddings=514, pad_token_id=1)) == 512
    assert max_length(make_config("bert", max_position_embeddings=512, pad_token_id=1)) == 512


def test_a_student_that_reads_otherwise_is_refused_with_the_reason(tmp_path: Path):
    teacher = find_teacher(str(save_teacher(tmp_path / "teacher")))
    refuse_other_inputs(find_teacher(str(save_teacher(tmp_path / "same", "distilbert"))), teacher)
    shorter = find_teacher(str(save_teacher(tmp_path / "shorter", max_position_embeddings=30)))
    with pytest.raises(
        UserError,
        match="shorter' reads text differently from its teacher .*: it takes 30 tokens, its teacher 40",
    ):
        refuse_other_inputs(shorter, teacher)
    for name, change in (("other", lambda text: text.replace("river", "rover")), ("case", _lower)):
        file = save_teacher(tmp_path / name) / "tokenizer.json"
        file.write_text(change(file.read_text()))
    with pytest.raises(
        UserError,
        match=rf"its tokenizer has other tokens \({len(VOCAB)}, the teacher's {len(VOCAB)}\)",
    ):
        refuse_other_inputs(find_teacher(str(tmp_path / "other")), teacher)
    with pytest.raises(UserError, match=r"its tokenizer reads 'The Café opens at 8.' as \[1, 6, "):
        refuse_other_inputs(find_teacher(str(tmp_path / "case")), teacher)


def _lower(text: str) -> str:
    return text.replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')


def test_a_text_read_by_another_tokenizer_is_refused(tmp_path: Path, text_file: Path):
    teacher = save_teacher(tmp_path / "teacher")
    other = save_teacher(tmp_path / "other", max_position_embeddings=30)
    data = KDDataModule(str(other), str(text_file), DataSettings(max_length=20))
    module = HiddenStateDistillModule(str(teacher), NARROW, Recipe(start=RandomStart()))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(
        UserError,
        match="other' reads text differently from its teacher .*: it takes 30 tokens, its teacher 40",
    ):
        trainer.fit(module, datamodule=data)


def test_a_layer_that_is_a_copy_attends_as_far_as_its_original():
    config = make_config("modernbert", num_hidden_layers=7)  # of which 0, 3 and 6 see all
    far = {True: "full_attention", False: "sliding_attention"}
    for depth in range(1, 8):
        kept = kept_layers(depth, 7)
        student = student_config(config, replace(ARCH, num_hidden_layers=depth))
        assert student.layer_types == [far[layer % 3 == 0] for layer in kept]


def test_heads_of_an_odd_size_are_refused_where_positions_are_rotations():
    config = make_config("modernbert")
    with pytest.raises(
        UserError,
        match="hidden_size 34 and num_attention_heads 2 make heads of size 17, but ModernBERT needs",
    ):
        build_student(config, replace(ARCH, hidden_size=34, num_attention_heads=2))
    space = SearchSpace.from_teacher(config)
    with pytest.raises(
        UserError, match="hidden_size 34 and num_attention_heads 2 make heads of size 17"
    ):
        space.replaced({"hidden_size": [34], "num_attention_heads": [2]}, config)
    odd = SearchSpace.from_teacher(
        make_config("modernbert", hidden_size=136, num_attention_heads=4)
    )
    assert odd.choices["hidden_size"] == [136]  # not 68 and 102, whose heads would be 17 wide
    assert (
        len(
            SearchSpace.from_teacher(
                make_config("bert", hidden_size=136, num_attention_heads=4)
            ).choices["hidden_size"]
        )
        > 1
    )
