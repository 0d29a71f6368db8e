"""The baselines: static vectors by hand and by scikit-learn, and layers that are the teacher's."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from kdnas.deploy.latency import LatencySettings, measure_latency
from kdnas.models.encoders import FAMILIES, encode, find_teacher, load_classifier
from kdnas.models.families import arch_of
from kdnas.tasks import baselines
from kdnas.tasks.baselines import (
    StaticForSequenceClassification,
    cut_classifier,
    static_classifier,
    token_vectors,
)
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import load_task
from kdnas.training.trainer import TrainerSettings
from tests.conftest import VOCAB, make_config, make_tokenizer, save_teacher, write_task


def test_a_text_is_the_mean_of_its_words_and_a_pair_both_and_their_product():
    model = StaticForSequenceClassification(make_config(), 2, 3).eval()
    words = model.vectors.weight.detach()
    ids = torch.tensor([[1, 7, 9, 2, 3, 3], [1, 7, 2, 8, 9, 2]])  # 2: [SEP], 3: [PAD]
    found = model(ids, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])).logits
    norm = partial(F.layer_norm, normalized_shape=(64,))
    alone, first, second = (norm(words[places].mean(0)) for places in ([1, 7, 9], [1, 7], [8, 9]))
    nothing = torch.zeros(64)
    expected = torch.stack(
        [
            torch.cat([alone, nothing, nothing]),
            torch.cat([first, second, first * second]),
        ]
    )
    assert torch.allclose(found, model.head(10 * expected), atol=2e-3)


def test_a_tokens_vector_is_the_teachers_in_principal_components_by_its_rank(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(baselines, "WIDTH", 16)
    teacher = find_teacher(str(tiny_teacher))
    found = token_vectors(teacher)
    rows = torch.tensor([[1, token, 2] for token in range(len(VOCAB))])
    batch = {"input_ids": rows, "attention_mask": rows * 0 + 1, "token_type_ids": rows * 0}
    states = encode(teacher.model, batch).hidden_states[-1][:, 1]
    expected = torch.tensor(PCA(16).fit_transform(states)).flip(-1)
    expected = expected * torch.log(1 + torch.arange(len(VOCAB)))[:, None]
    is_special = torch.tensor(
        [token in teacher.tokenizer.all_special_ids for token in range(len(VOCAB))]
    )
    assert found.shape == (len(VOCAB), 16) and not found[is_special].any() and is_special.sum() == 5
    expected[is_special] = 0
    expected = (0.02 * expected / expected.std()).float()
    assert torch.allclose(found.abs(), expected.abs(), atol=1e-5)


def test_vectors_are_computed_once_learn_and_are_measured_by_each_backend(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = tmp_path / "vectors.safetensors"
    model = static_classifier(str(tiny_teacher), kept, 2)
    monkeypatch.setattr(baselines, "token_vectors", None)
    again = static_classifier(str(tiny_teacher), kept, 2)
    assert torch.equal(model.vectors.weight, again.vectors.weight)
    task = load_task(str(write_task(tmp_path / "task", ("sentence1", "sentence2"))))
    before = model.vectors.weight.detach().clone()
    settings = FinetuneSettings(num_epochs=1, learning_rate=1e-3, max_length=32)
    trainer = TrainerSettings("cpu")
    result = evaluate_glue(
        model, make_tokenizer(), task, settings, folder=tmp_path / "fit", trainer_settings=trainer
    )
    size = 64 * len(VOCAB) + 2 * (3 * 64 + 1)
    assert (result["num_parameters"], result["megabytes"]) == (size, 4 * size / 1e6)
    assert not torch.equal(model.vectors.weight, before)
    for backend in ("torch", "torch-bf16", "onnxruntime-int8"):
        how = LatencySettings(backend, length=8, min_seconds=0.001)
        (latency,) = measure_latency([again], how)
        assert latency.median_ms > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_cut_is_the_teachers_first_layers_and_its_last(family: str, tmp_path: Path):
    source = str(save_teacher(tmp_path / family, family))
    teacher = load_classifier(source, 2)
    cut = cut_classifier(source, replace(arch_of(teacher.config), num_hidden_layers=3), 2)
    ours, theirs = (FAMILIES[family].layers(model.base_model) for model in (cut, teacher))
    assert len(ours) == 3
    for layer, number in zip(ours, (0, 1, 3), strict=True):
        known = theirs[number].state_dict()
        assert all(torch.equal(value, known[name]) for name, value in layer.state_dict().items())
    embeddings, known = (model.base_model.embeddings.state_dict() for model in (cut, teacher))
    assert all(torch.equal(value, known[name]) for name, value in embeddings.items())
