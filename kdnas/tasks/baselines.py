"""Two baselines for a student: static token vectors, and the teacher with fewer layers."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from kdnas.distillation.start import copy_layers
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher, build_classifier, encode, find_teacher, load_classifier
from kdnas.models.families import student_config
from kdnas.system.files import new_file

WIDTH = 256  # of a token's vector; the teacher's width if that is less
# Standard deviation of the vectors, as small as in an encoder's embedding tables, and factor of the
# head's inputs. With these, an encoder's learning rate suits both vectors and head (chosen on
# held-out training rows, LOG.md).
SPREAD, GAIN = 0.02, 10.0
TOKENS_AT_ONCE = 1024


class StaticForSequenceClassification(nn.Module):
    """Baseline classifier without layers: a linear head on the mean of static token vectors.

    It has the interface of a transformers classifier. For a sentence pair, the head sees the
    layer-normed mean of each sentence and the elementwise product of both. For a single sentence,
    the second mean and the product are 0.

    Args:
        config: the config of the teacher, whose tokenizer is used.
        separator: id of the token that ends a sentence.
        num_labels: number of outputs.
    """

    def __init__(self, config: PreTrainedConfig, separator: int, num_labels: int) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.config.num_labels = num_labels
        width = min(WIDTH, config.hidden_size)
        # For ``usual_learning_rate``, which reads both: the rate of one layer of this width.
        self.config.hidden_size, self.config.num_hidden_layers = width, 1
        self.separator = separator
        self.vectors = nn.Embedding(config.vocab_size, width)
        self.head = nn.Linear(3 * self.vectors.embedding_dim, num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """Return logits (B, num_labels); token types and ``output_hidden_states`` are ignored."""
        vectors_BTH = self.vectors(input_ids)
        ends_BT = input_ids == self.separator
        is_second_BT = ends_BT.cumsum(1) > 0
        is_word_BT = attention_mask.bool() & ~ends_BT
        parts_BPT = torch.stack([is_word_BT & ~is_second_BT, is_word_BT & is_second_BT], 1)
        sums_BPH = parts_BPT.to(vectors_BTH.dtype) @ vectors_BTH
        # The layer norm of a sum equals that of the mean.
        first_BH, second_BH = F.layer_norm(sums_BPH, sums_BPH.shape[-1:]).unbind(1)
        features = torch.cat([first_BH, second_BH, first_BH * second_BH], -1)
        return SequenceClassifierOutput(logits=self.head(GAIN * features))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the module with the token vectors; transformers' models have this method, too."""
        return self.vectors

    def set_attn_implementation(self, name: str) -> None:
        """Do nothing: this classifier has no attention."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the weights alone: with a ``config.json`` the folder would look like an encoder."""
        save_file(self.state_dict(), folder / "model.safetensors")


@torch.no_grad()
def token_vectors(teacher: Teacher) -> Tensor:
    """Return a static vector for each token of the teacher's vocabulary, shape (V, width).

    The vector of token id v is ``log(1 + v) P' (h_v - mean h)``; all vectors together are scaled to
    a standard deviation of ``SPREAD``. h_v is the teacher's last hidden state of token v in the
    input [CLS] v [SEP]; P holds the first ``WIDTH`` principal components of all h. The logarithm
    gives frequent tokens less weight, as most vocabularies are sorted by frequency. The vectors of
    special tokens are 0.

    Source: Tulkens & van Dongen 2024, "Model2Vec: Fast State-of-the-Art Static Embeddings".
    """
    ranks, tokenizer = torch.arange(teacher.config.vocab_size), teacher.tokenizer
    pieces = []
    for ids in ranks.split(TOKENS_AT_ONCE):
        first, last = (
            torch.full_like(ids, token)
            for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        )
        rows = torch.stack([first, ids, last], 1)
        batch = {
            "input_ids": rows,
            "attention_mask": torch.ones_like(rows),
            "token_type_ids": torch.zeros_like(rows),
        }
        states = encode(teacher.model, batch).hidden_states
        assert states is not None
        pieces.append(states[-1][:, 1])
    vectors = torch.cat(pieces)
    vectors = vectors - vectors.mean(0)
    _, components = torch.linalg.eigh(vectors.T @ vectors)  # eigenvalues in ascending order
    vectors = vectors @ components[:, -WIDTH:] * ranks.log1p()[:, None]
    vectors[tokenizer.all_special_ids] = 0
    return vectors * SPREAD / vectors.std()


def static_classifier(source: str, kept: Path, num_labels: int) -> StaticForSequenceClassification:
    """Build the baseline without layers: a classifier on the mean of one fixed vector per token.

    The vectors are the teacher's ``token_vectors``.

    Args:
        source: the teacher: a folder, a Hugging Face name or ``quickstart``.
        kept: safetensors file that caches the vectors; written if it does not exist.
        num_labels: number of outputs.
    """
    teacher = find_teacher(source)
    if not kept.exists():
        content = save({"vectors": token_vectors(teacher)})
        with new_file(kept) as file:
            file.write(content)
    separator: Any = teacher.tokenizer.sep_token_id
    model = StaticForSequenceClassification(teacher.config, separator, num_labels)
    model.vectors.weight = nn.Parameter(load(kept.read_bytes())["vectors"])
    return model


@torch.no_grad()
def cut_classifier(source: str, arch: StudentArch, num_labels: int) -> PreTrainedModel:
    """Build the layer-cut baseline: some of the teacher's layers, unchanged, and a new head.

    The layers are the teacher's first and last ones. Embeddings and pooler are copied, too.

    Args:
        source: the teacher: a folder or a Hugging Face name.
        arch: shape of the result; ``kept_layers`` chooses the layers for its depth.
        num_labels: number of outputs.
    """
    teacher = load_classifier(source, num_labels)
    cut = build_classifier(student_config(teacher.config, arch), num_labels)
    encoder: Any = cut.base_model
    whole: Any = teacher.base_model
    copy_layers(encoder, whole)
    return cut
