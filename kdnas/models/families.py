"""The supported families of encoders, and how each differs from BERT (docs/families.md).

Shapes: B rows, T tokens, A heads, D dimensions of a head, H the width.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from kdnas.models.arch import StudentArch, kept_layers
from kdnas.system.errors import UserError, nearest


@dataclass(frozen=True)
class LayerNames:
    """Names of the linear maps and layer norms within a transformer layer.

    If ``query``, ``key`` and ``value`` are the same name, one map computes all three, in this
    order. If the map ``intermediate`` has twice as many outputs as the map ``output`` has inputs,
    the second half of these outputs are gates for the first half.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    output: str = "output.dense"
    output_norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class Family:
    """A family of encoders, described by how it differs from BERT.

    Args:
        title: name of the family, such as ``BERT``.
        layers: function from a model to its transformer layers, in order (ALBERT's shared layers
            are repeated).
        names: names of the parts of a layer.
        fields: field of ``StudentArch`` -> its name in the family's config, if that differs.
        follows: function from the teacher's config and a student's shape to further config fields
            that must change with the shape.
        max_length: function from a config to the longest input, in tokens.
        build: arguments for ``AutoModel`` that leave out the pooler (an unused one breaks DDP).
        mapping: name of the linear map from embedding width to hidden size; None: there is none.
        scores: function from a model, a layer number, queries and keys (B, A, T, D) to attention
            scores before the softmax, (B, A, T, T). None: ``q k^T / sqrt(D)``.
        own_mask: whether the model accepts only attention masks of shape (B, T), not additive ones.
        norm_first: whether layer norms come before attention and feed-forward part, not after.
        even_heads: whether a head needs an even size (rotary positions use pairs of dimensions).
    """

    title: str
    layers: Callable[[Any], list[nn.Module]] = lambda model: list(model.encoder.layer)
    names: LayerNames = LayerNames()
    fields: Mapping[str, str] = field(default_factory=dict)
    follows: Callable[[Any, StudentArch], dict[str, Any]] = lambda config, arch: {}
    max_length: Callable[[Any], int] = lambda config: config.max_position_embeddings
    build: Mapping[str, Any] = field(default_factory=lambda: {"add_pooling_layer": False})
    mapping: str | None = None
    scores: Callable[[Any, int, Tensor, Tensor], Tensor] | None = None
    own_mask: bool = False
    norm_first: bool = False
    even_heads: bool = False


def dot_scores(query_BATD: Tensor, key_BATD: Tensor, parts: int = 1) -> Tensor:
    """Return attention scores ``q(n) k(m)^T / sqrt(D * parts)``, (B, A, T, T).

    ``parts`` is the number of score terms that are added up, as in DeBERTa.
    """
    return (query_BATD * (query_BATD.shape[-1] * parts) ** -0.5) @ key_BATD.transpose(-1, -2)


def _albert_layers(model: Any) -> list[nn.Module]:
    groups, depth = model.encoder.albert_layer_groups, model.config.num_hidden_layers
    return [groups[i * len(groups) // depth].albert_layers[0] for i in range(depth)]


def _mpnet_scores(model: Any, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """Return MPNet's attention scores, with a bias per distance and head that all layers share."""
    bias = model.encoder.compute_position_bias(query[:, 0])
    return dot_scores(query, key) + bias.to(query.dtype)


def _deberta_scores(model: Any, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """Return DeBERTa's scores: query times key, plus products of each with relative positions."""
    attention = model.encoder.layer[layer].attention.self
    parts = 1 + len({"c2p", "p2c"} & set(attention.pos_att_type))
    scores = dot_scores(query, key, parts)
    if attention.relative_attention:
        positions = attention.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), None, model.encoder.get_rel_embedding(), parts
        )
        scores = scores + positions.view_as(scores)
    return scores


def _modernbert_scores(model: Any, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """Return ModernBERT's attention scores: with rotary positions, and within a local window."""
    module = model.layers[layer]
    places = torch.arange(query.shape[2], device=query.device)
    cos, sin = model.rotary_emb(query, places[None], module.attention_type)
    scores = dot_scores(*apply_rotary_pos_emb(query, key, cos, sin))
    window = module.attn.sliding_window
    if window is None:
        return scores
    is_outside = (places[:, None] - places).abs() >= window
    return scores.masked_fill(is_outside, torch.finfo(scores.dtype).min)


def _own_width(config: Any, arch: StudentArch) -> dict[str, Any]:
    """Return the config field of the embeddings' width for a student that needs its own, else {}.

    If the teacher's embeddings are as wide as its hidden states, a student's embeddings are as wide
    as the student's hidden states; otherwise they are as wide as the teacher's embeddings.
    """
    if config.embedding_size == config.hidden_size:
        return {"embedding_size": arch.hidden_size}
    return {}


def _deberta_follows(config: Any, arch: StudentArch) -> dict[str, Any]:
    sizes = {"pooler_hidden_size": arch.hidden_size}
    if hasattr(config, "attention_head_size"):
        sizes["attention_head_size"] = arch.hidden_size // arch.num_attention_heads
    return sizes


def _modernbert_follows(config: Any, arch: StudentArch) -> dict[str, Any]:
    kept = kept_layers(arch.num_hidden_layers, config.num_hidden_layers)
    types = [
        config.layer_types[layer] for layer in kept
    ]  # a copied layer keeps its attention window
    return {"layer_types": (types * arch.num_hidden_layers)[: arch.num_hidden_layers]}


# Positions are counted from the padding id, which is 1 in all published checkpoints.
_ROBERTA = Family(
    title="RoBERTa",
    max_length=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
)

# model_type of config.json -> family
FAMILIES: Mapping[str, Family] = {
    "bert": Family(title="BERT"),
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, title="XLM-RoBERTa"),
    "camembert": replace(_ROBERTA, title="CamemBERT"),
    "albert": Family(
        title="ALBERT",
        layers=_albert_layers,
        names=LayerNames(
            query="attention.query",
            key="attention.key",
            value="attention.value",
            attention_output="attention.dense",
            attention_norm="attention.LayerNorm",
            intermediate="ffn",
            output="ffn_output",
            output_norm="full_layer_layer_norm",
        ),
        mapping="encoder.embedding_hidden_mapping_in",
    ),
    "electra": Family(title="ELECTRA", follows=_own_width, build={}, mapping="embeddings_project"),
    "distilbert": Family(
        title="DistilBERT",
        layers=lambda model: list(model.transformer.layer),
        names=LayerNames(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            attention_norm="sa_layer_norm",
            intermediate="ffn.lin1",
            output="ffn.lin2",
            output_norm="output_layer_norm",
        ),
        fields={
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "hidden_size": "dim",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        build={},
    ),
    "mpnet": Family(
        title="MPNet",
        names=LayerNames(
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention_output="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ),
        max_length=lambda config: config.max_position_embeddings - 2,  # the padding id is 1
        scores=_mpnet_scores,
    ),
    "deberta-v2": Family(
        title="DeBERTa-v2/v3",
        names=LayerNames(
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
        ),
        follows=_deberta_follows,
        build={},
        scores=_deberta_scores,
        own_mask=True,
    ),
    "modernbert": Family(
        title="ModernBERT",
        layers=lambda model: list(model.layers),
        names=LayerNames(
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            attention_output="attn.Wo",
            attention_norm="attn_norm",
            intermediate="mlp.Wi",
            output="mlp.Wo",
            output_norm="mlp_norm",
        ),
        fields={"hidden_act": "hidden_activation"},
        follows=_modernbert_follows,
        build={},
        scores=_modernbert_scores,
        own_mask=True,
        norm_first=True,
        even_heads=True,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the ``Family`` (BERT, RoBERTa, ...) of a model's config."""
    return find_family(config.model_type)


def find_family(model_type: Any) -> Family:
    """Return the ``Family`` for a config's ``model_type``; raise a UserError if there is none."""
    if str(model_type) not in FAMILIES:
        raise UserError(
            f"The model family {model_type!r} is not supported: give an encoder ({titles()})."
        )
    return FAMILIES[model_type]


def titles() -> str:
    """Return the names of all supported families, for a message."""
    return ", ".join(family.title for family in FAMILIES.values())


def max_length(config: PreTrainedConfig) -> int:
    """Return the longest input, in tokens, that a model of this config accepts."""
    return family_of(config).max_length(config)


def marks_pairs(config: PreTrainedConfig) -> bool:
    """Return whether a model marks the second sentence of a pair by ``token_type_ids``."""
    return getattr(config, "type_vocab_size", 0) > 1


def refuse_relative_positions(name: str, config: PreTrainedConfig) -> None:
    """Raise an error if ``config`` has BERT's relative positions, which transformers 5 drops."""
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(
            f"{name!r} has position_embedding_type {kind!r}, which transformers 5 does not "
            "support: use a model with absolute positions."
        )


def has_classifier(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint of this config has a sequence classification head."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return a classifier's class names, in the order of its outputs.

    The ids in the config need not start at 0; only their order counts.
    """
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    """Write class names, in the order of the classifier's outputs, into the classifier's config."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}


def match_marks(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Make a tokenizer return ``token_type_ids`` if and only if the model uses them.

    ALBERT's tokenizer omits them although ALBERT uses them; other models reject them.
    """
    names = list(tokenizer.model_input_names)
    if not marks_pairs(config):
        names = [name for name in names if name != "token_type_ids"]
    elif "token_type_ids" not in names:
        names.append("token_type_ids")
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names  # this is what is saved


def arch_of(config: PreTrainedConfig) -> StudentArch:
    """Return the architecture that a config describes, whatever its family calls the fields."""
    names = family_of(config).fields
    values = {f.name: getattr(config, names.get(f.name, f.name)) for f in fields(StudentArch)}
    return StudentArch(**values)


def check_heads(config: PreTrainedConfig, width: int, num_heads: int) -> None:
    """Raise an error if the family needs an even head size, but ``width / num_heads`` is odd."""
    family = family_of(config)
    if family.even_heads and width // num_heads % 2:
        raise UserError(
            f"hidden_size {width} and num_attention_heads {num_heads} make heads of size "
            f"{width // num_heads}, but {family.title} needs an even size: change one of the two."
        )


def student_config(teacher_config: PreTrainedConfig, arch: StudentArch) -> PreTrainedConfig:
    """Return a student's config: the teacher's with the student's shape.

    Vocabulary, positions, padding id and the layer norms' eps stay the same. An activation that
    transformers does not know raises a UserError.
    """
    family = family_of(teacher_config)
    if arch.hidden_act not in ACT2FN:
        raise UserError(
            f"The activation {arch.hidden_act!r} is unknown.{nearest(arch.hidden_act, ACT2FN)}"
        )
    check_heads(teacher_config, arch.hidden_size, arch.num_attention_heads)
    config = copy.deepcopy(teacher_config)
    # A fine-tuned teacher's values do not hold for the student.
    config.architectures = None
    config.problem_type = None
    config.num_labels = 2
    values = {family.fields.get(name, name): value for name, value in arch.to_dict().items()}
    for name, value in (values | family.follows(teacher_config, arch)).items():
        setattr(config, name, value)
    return config


def attention_part(family: Family, layer: nn.Module, part: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight (H, H) and the bias (H) or None of a layer's query, key or value map.

    Args:
        family: the family of the model.
        layer: the transformer layer.
        part: ``query``, ``key`` or ``value``.
    """
    names = family.names
    linear: Any = layer.get_submodule(getattr(names, part))
    if names.query != names.key:
        return linear.weight, linear.bias
    third = ("query", "key", "value").index(part)
    bias = None if linear.bias is None else linear.bias.chunk(3)[third]
    return linear.weight.chunk(3)[third], bias
