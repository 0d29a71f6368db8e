"""Initialise a smaller student from its teacher's layers, one linear map at a time.

A linear map is an ``nn.Linear`` module or a part of one. Each map of the student is fitted by least
squares so that its outputs reproduce the teacher's queries, keys, values, neurons or hidden states
on calibration rows (a sample of the training rows). The stream is what flows from layer to layer:
the hidden states of the real tokens. "Flat" tensors hold the N real tokens of all calibration rows
one after the other. Shapes: B rows, T padded tokens, H_t and H_s the widths of teacher and student,
L layers, A heads, D dimensions of a head.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from kdnas.data.datamodule import Batch
from kdnas.distillation.losses import masked_softmax, ridge_map, within_half
from kdnas.models.arch import kept_layers
from kdnas.models.encoders import embed, embedding_mapping, embedding_norm, encode
from kdnas.models.families import arch_of, attention_part, family_of
from kdnas.models.layers import Even
from kdnas.training.precision import autocast

# How often ALBERT's shared layer is fitted again, on the inputs that it then gets at each depth.
ROUNDS = 2


def start_embeddings(student: PreTrainedModel, teacher: PreTrainedModel, basis_TS: Tensor) -> None:
    """Initialise a student's embeddings to give nearly the teacher's outputs times ``basis_TS``.

    A layer norm is gamma * centred(x) / std(x) + beta. The teacher's gamma and centring are linear,
    so they are multiplied into the student's embedding tables. The student's gamma is the same
    number in all dimensions: the mean ratio of a word's std in the student's table to its std in
    the teacher's. If a linear map follows the tables (ALBERT, ELECTRA), the tables are copied and
    this map is projected. If student and teacher have the same width, everything is copied.

    Args:
        student: the student, changed in place.
        teacher: the teacher, of the same family.
        basis_TS: matrix (H_t, H_s) that projects the teacher's hidden states to the student's
            width.
    """
    ours: Any = student.embeddings
    theirs: Any = teacher.embeddings
    mapping, source = embedding_mapping(student), embedding_mapping(teacher)
    if len(basis_TS) == basis_TS.shape[1]:
        ours.load_state_dict(theirs.state_dict())
        if mapping is not None:
            mapping.load_state_dict(source.state_dict())
        return
    if mapping is not None:
        ours.load_state_dict(theirs.state_dict())
        mapping.weight.copy_(basis_TS.T @ source.weight)
        mapping.bias.copy_(basis_TS.T @ source.bias)
        return
    # A student as narrow as its teacher's tables has no map behind them, so the teacher's map goes
    # into the tables.
    fold, shift = (
        (basis_TS, 0.0) if source is None else (source.weight.T @ basis_TS, source.bias @ basis_TS)
    )
    norm, their_norm = embedding_norm(student), embedding_norm(teacher)
    centred = their_norm.weight[:, None] * fold
    centred = centred - centred.mean(0)
    for name, table in theirs.named_children():
        if isinstance(table, nn.Embedding):
            getattr(ours, name).weight.copy_(table.weight @ centred)
    models: tuple[Any, Any] = (student, teacher)
    words, their_words = (model.get_input_embeddings().weight for model in models)
    norm.weight.fill_(float((words.std(-1) / their_words.std(-1)).nanmean()))
    if norm.bias is not None:
        norm.bias.copy_(their_norm.bias @ fold + shift)


def copied_tables(student: PreTrainedModel) -> frozenset[str]:
    """Return the names of embedding parameters that train at the learning rates of copied ones.

    These are the embedding parameters of models with a linear map after the embedding tables
    (ALBERT, ELECTRA). Other embeddings train like new parameters even if they are copies, because
    the layers after them are not copies (LOG.md).
    """
    if embedding_mapping(student) is None:
        return frozenset()
    embeddings: Any = student.embeddings
    return frozenset(f"embeddings.{name}" for name, _ in embeddings.named_parameters())


def narrow(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
) -> tuple[tuple[int, ...], ...]:
    """Initialise a student's embeddings and layers from its teacher's, by least squares.

    Each student layer is made from one teacher layer, chosen by ``kept_layers``. The student
    layer replaces a group: this teacher layer and the left-out layers that follow it. Let x be the
    teacher's hidden states, and B, (H_t, H_s), the first principal components of x after the
    embeddings and after each group. These components are rotated so that nothing is lost when a
    layer norm removes the mean. The student's hidden states z should equal ``B^T x``.

    Student layers are fitted in order, each on the z that the layers before it give. All linear
    maps are fitted by ridge regression. The targets of the query, key and value maps are the
    teacher's queries, keys and values, of the heads that change x most. The target of the output
    maps of attention and feed-forward part is ``sigma B^T norm(x) - z``, where sigma is the
    standard deviation by which the teacher's layer norm divides: then the student's layer norm
    gives nearly ``B^T norm(x)``. The scale and shift of layer norms are fitted for each dimension.
    In the target of the feed-forward output map, x is taken after the group, so the map also
    replaces the left-out layers, as far as a linear map can. Families other than BERT differ in
    some steps (``_STEPS``).

    If the student is as wide as its teacher, B is the identity, the heads and neurons that change x
    most are copied, and least squares correct each copied map.

    Args:
        student: the student, changed in place.
        teacher: the teacher, of the same family.
        rows: batches of training rows for the least squares; 20,000 tokens are enough for a student
            of width 192, and 60,000 are a little better (LOG.md).

    Returns:
        For each student layer, the numbers of the teacher heads that its heads were made from.

    Source: SliceGPT (Ashkboos et al. 2024) for the PCA of hidden states; the other choices were
        measured (LOG.md).
    """
    is_as_wide = student.config.hidden_size == teacher.config.hidden_size
    narrower, as_wide = _STEPS.get(teacher.config.model_type, (_Narrowing, _SameWidth))
    return (as_wide if is_as_wide else narrower)(student, teacher, rows).run()


@dataclass(frozen=True)
class TeacherStream:
    """A teacher's hidden states on N tokens of training rows, used to initialise all its students.

    Args:
        states: layer -> hidden states after that layer, (N, H_t), in float16; -1: the embedding
            output, in float32.
        scales: for each layer norm that ends a layer, the standard deviation by which the norm
            divides each token's states, (N, 1).
        is_raw: whether the states are not layer-normed, as between the layers of pre-norm models.
    """

    states: dict[int, Tensor]
    scales: list[Tensor]
    is_raw: bool = False
    _covariances: dict[int, Tensor] = field(default_factory=dict)

    def covariance(self, layer: int) -> Tensor:
        """Return the covariance of the hidden states after a layer, scaled to trace 1, (H_t, H_t).

        In pre-norm models (``is_raw``), the states are layer-normed first, and their mean is not
        subtracted: the linear maps after the norm have no bias that could restore the mean.
        """
        if layer not in self._covariances:
            states = self.states[layer].float()
            if self.is_raw:
                normed = F.layer_norm(states, states.shape[-1:])
                covariance = (normed.T @ normed).double()
            else:
                covariance = torch.cov(states.T).double()
            self._covariances[layer] = covariance / covariance.trace()
        return self._covariances[layer]

    @classmethod
    def of(cls, teacher: PreTrainedModel, rows: Sequence[Batch]) -> "TeacherStream":
        """Run a teacher once over the rows, and return its hidden states and norm scales."""
        _, embedded = _embedded(teacher, rows)
        norms = _last_norms(teacher)
        num_layers, is_raw = teacher.config.num_hidden_layers, family_of(teacher.config).norm_first
        states: list[list[Tensor]] = [[] for _ in range(num_layers)]
        scales: list[list[Tensor]] = [[] for _ in norms]
        inputs: list[Tensor] = []
        with ExitStack() as hooks:
            for norm in dict.fromkeys(norms):
                hooks.enter_context(
                    norm.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
                )
            for batch in rows:
                mask = batch["attention_mask"].bool()
                with autocast(teacher.device.type):
                    outputs = list(encode(teacher, batch).hidden_states[1:])  # type: ignore[index]
                if is_raw:
                    outputs[-1] = inputs[-1]  # transformers returns it after the final norm
                for i, output in enumerate(outputs):
                    # In float16: otherwise all layers of a wide teacher would take gigabytes.
                    states[i].append(within_half(output[mask]).half())
                for scale, before in zip(scales, inputs, strict=True):
                    scale.append(before[mask].float().std(-1, correction=0, keepdim=True))
                inputs.clear()
        return cls(
            {-1: embedded} | dict(enumerate(map(torch.cat, states))),
            [torch.cat(parts) for parts in scales],
            is_raw,
        )


def _last_norms(teacher: Any) -> list[nn.Module]:
    """Return the norm that ends each teacher layer; in pre-norm models, only the final norm."""
    family = family_of(teacher.config)
    if family.norm_first:
        return [teacher.final_norm]
    norms = [layer.get_submodule(family.names.output_norm) for layer in family.layers(teacher)]
    if getattr(teacher, "encoder", None) is not None and getattr(teacher.encoder, "conv", None):
        norms[0] = teacher.encoder.conv.LayerNorm
    return norms


class CalibrationRows(list[Batch]):
    """A list of batches, with a cache of a teacher's hidden states on them.

    All students of a search are initialised on the same rows.
    """

    def __init__(self, rows: Iterable[Batch]) -> None:
        super().__init__(rows)
        self._last: tuple[PreTrainedModel, TeacherStream] | None = None

    def stream(self, teacher: PreTrainedModel) -> TeacherStream:
        """Return the teacher's hidden states on these rows, computed on the first call."""
        if self._last is None or self._last[0] is not teacher:
            self._last = teacher, TeacherStream.of(teacher, self)
        return self._last[1]


def _embedded(model: PreTrainedModel, rows: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Embed the rows; return the real tokens' states before and after the norm, both (N, width)."""
    before: list[Tensor] = []
    with embedding_norm(model).register_forward_hook(
        lambda module, inputs, output: before.append(inputs[0])
    ):
        after = [embed(model, batch) for batch in rows]
    masks = [batch["attention_mask"].bool() for batch in rows]
    flat = [
        torch.cat([t[mask] for t, mask in zip(ts, masks, strict=True)]) for ts in (before, after)
    ]
    return flat[0], flat[1]


class _LayerRun(NamedTuple):
    """Intermediate results of one teacher layer on the calibration rows: a tensor (N, ...) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    before_attention_norm: Tensor
    attention: Tensor
    intermediate: Tensor  # before the activation
    activity: Tensor  # of each neuron, after the activation: root mean square, (I,)


class _Narrowing:
    """Steps to initialise a student that is narrower than its teacher, by least squares.

    In all methods, ``z`` holds the student's hidden states, (tokens, width).
    """

    adds = False  # whether least squares correct the map that is there, or replace it

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> None:
        self.student, self.teacher, self.rows = student, teacher, rows
        self.ours, self.theirs = arch_of(student.config), arch_of(teacher.config)
        self.masks = [batch["attention_mask"].bool() for batch in rows]
        self.sizes = [int(mask.sum()) for mask in self.masks]

        self.family = family_of(teacher.config)
        self.names = self.family.names
        self.layers = self.family.layers(student)
        self.sources = self.family.layers(teacher)

        shared = rows if isinstance(rows, CalibrationRows) else CalibrationRows(rows)
        self.stream = shared.stream(teacher)
        self._last_run: tuple[int, _LayerRun] | None = None

    def run(self) -> tuple[tuple[int, ...], ...]:
        sources = self._kept()
        ends = [source - 1 for source in sources[1:]] + [len(self.sources) - 1]
        self.basis = self._basis([-1, *ends])

        z = self._embeddings()
        heads = self._heads(sources)
        self._shared(heads)
        self._layers(sources, ends, heads, z)
        return tuple(map(tuple, heads))

    def _kept(self) -> list[int]:
        """Return the numbers of the teacher layers from which the student's layers are made."""
        return kept_layers(len(self.layers), len(self.sources))

    def _layers(
        self, sources: list[int], ends: list[int], heads: list[list[int]], z: Tensor
    ) -> None:
        """Fit the student's layers, first to last; z: output of the embeddings, (tokens, width)."""
        for number, (source, end) in enumerate(zip(sources, ends, strict=True)):
            z = self._layer(number, source, end, heads[number], z)

    def _basis(self, layers: list[int]) -> Tensor:
        """Return the first H_s principal components of the hidden states after these layers.

        All layers have the same weight. The shape is (teacher's width, student's width H_s).
        """
        width = self.ours.hidden_size
        total = torch.stack([self.stream.covariance(layer) for layer in layers]).sum(0)
        components = torch.linalg.eigh(total)[1][:, 1 - width :].float()

        # The student's norms remove the mean over dimensions. So the components are rotated to be
        # orthogonal to it, which leaves room for H_s - 1 of them.
        turn = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        turn[:, 0] = 1.0
        beside_mean = torch.linalg.qr(turn)[0][:, 1:]
        return components @ beside_mean.to(components.device).T

    def _embeddings(self) -> Tensor:
        """Initialise the student's embeddings, and return their output, (tokens, width)."""
        start_embeddings(self.student, self.teacher, self.basis)
        before, z = _embedded(self.student, self.rows)
        if embedding_mapping(self.student) is not None:
            return z
        target = self.stream.states[-1] @ self.basis
        return _fit_norm(embedding_norm(self.student), before, target)

    def _heads(self, sources: list[int]) -> list[list[int]]:
        """Return for each teacher layer the heads that change the hidden states most, ascending."""
        importance = self._importance(sources)
        most = importance.topk(self.ours.num_attention_heads, dim=1).indices
        return most.sort(dim=1).values.tolist()

    def _importance(self, sources: list[int]) -> Tensor:
        """Return how much each head of these teacher layers changes the hidden states, (L, A)."""
        return torch.stack([self._moved(source) for source in sources])

    def _shared(self, heads: list[list[int]]) -> None:
        """Fit parameters that all layers of a model share; most families have none."""

    def _layer(self, number: int, source: int, end: int, heads: list[int], z: Tensor) -> Tensor:
        """Fit one student layer, and return the student's hidden states after it, (tokens, width).

        Args:
            number: number of the student layer.
            source: number of the teacher layer from which the student layer is made.
            end: number of the teacher layer whose output the student layer's output should match.
            heads: numbers of the heads of teacher layer ``source`` that the student layer gets.
            z: the student's hidden states before the layer, (tokens, width).
        """
        layer = self.layers[number]
        names, part = self.names, layer.get_submodule
        neurons = self._important_neurons(source)
        self._prepare(layer, source, heads, neurons)

        z = self._attention(number, source, heads, z)

        norm = part(names.output_norm)
        kept = self._run(source).intermediate[:, self._outputs(neurons)]
        inner = self._fit(part(names.intermediate), self._read(norm, z), kept)
        target, wanted = self._output_goal(end)
        self._last_run = None  # large, and not needed any more
        activated = self._activate(inner, self.ours.hidden_act)
        z = z + self._fit(part(names.output), activated, wanted - z)
        return self._settle(norm, z, target)

    def _attention(self, number: int, source: int, heads: list[int], z: Tensor) -> Tensor:
        """Fit a student layer's attention and its norm; return their output, (tokens, width)."""
        layer = self.layers[number]
        norm = layer.get_submodule(self.names.attention_norm)
        queries, keys, values = self._cut(source, heads)
        inputs = self._read(norm, z)
        query = self._fit_scores(layer, "query", inputs, queries)
        key = self._fit_scores(layer, "key", inputs, keys)
        value = self._fit_heads(layer, "value", inputs, values)

        context = self._attend(self.student, number, query, key, value)
        target, wanted = self._attention_goal(source)
        output = layer.get_submodule(self.names.attention_output)
        z = z + self._fit(output, context, wanted - z)
        return self._settle(norm, z, target)

    def _prepare(self, layer: nn.Module, source: int, heads: list[int], neurons: Tensor) -> None:
        """Set key maps to 0, so that unused head dimensions do not change attention scores."""
        for linear in self._score_maps(layer, "key"):
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()

    def _fit(self, linear: Any, inputs: Tensor, targets: Tensor, num_heads: int = 1) -> Tensor:
        return fit_linear(linear, inputs, targets, num_heads, adds=self.adds)

    def _fit_heads(self, layer: nn.Module, part: str, inputs: Tensor, targets: Tensor) -> Tensor:
        """Fit a layer's query, key or value map (``part``) to targets; return its output."""
        linear = _Linear(*attention_part(self.family, layer, part))
        return self._fit(linear, inputs, targets, self.ours.num_attention_heads)

    def _score_maps(self, layer: Any, part: str) -> list[Any]:
        """Return the linear maps of a layer that compute its queries or keys (``part``)."""
        return [_Linear(*attention_part(self.family, layer, part))]

    def _fit_scores(self, layer: Any, part: str, inputs: Tensor, targets: Tensor) -> Tensor:
        """Fit a layer's query or key maps (``part``) to targets; return their output for tokens."""
        return self._fit_heads(layer, part, inputs, targets)

    # Pre-norm families (norms before the parts of a layer) override the next methods.

    def _read(self, norm: Any, z: Tensor) -> Tensor:
        """Return the input of attention or feed-forward: z, after the norm in pre-norm families."""
        return z

    def _settled(self, norm: Any, before: Tensor) -> Tensor:
        """Return teacher states ``before`` after ``norm``; in pre-norm families, unchanged."""
        return norm(before)

    def _settle(self, norm: Any, z: Tensor, target: Tensor) -> Tensor:
        """Fit the norm after an attention or feed-forward part, and return its output.

        The norm's input is ``z``, and its output should be ``target``. Pre-norm families have no
        norm there: nothing is fitted, and ``z`` is returned.
        """
        return _fit_norm(norm, z, target)

    def _outputs(self, neurons: Tensor) -> Tensor:
        """Return the indices of these neurons in the output of the intermediate linear map."""
        return neurons

    def _activate(self, inner: Tensor, hidden_act: str) -> Tensor:
        return ACT2FN[hidden_act](inner)

    def _attention_goal(self, source: int) -> tuple[Tensor, Tensor]:
        """Return least-squares targets for the output and the input of an attention norm."""
        run = self._run(source)
        scale = run.before_attention_norm.std(-1, correction=0, keepdim=True)
        return self._goal(self._part(source, self.names.attention_norm), run.attention, scale)

    def _output_goal(self, end: int) -> tuple[Tensor, Tensor]:
        """Return least-squares targets for the output and the input of a student layer's last norm.

        They are computed from the teacher's hidden states after layer ``end``, each of shape
        (tokens, student's width).
        """
        after = self.stream.states[end].float()
        return self._goal(_last_norms(self.teacher)[end], after, self.stream.scales[end])

    def _goal(self, norm: Any, after: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        target = after @ self.basis
        direction = (target - norm.bias @ self.basis) / norm.weight.abs().mean()
        direction -= direction.mean(-1, keepdim=True)
        return target, scale * direction

    def _part(self, source: int, name: str) -> Any:
        return self.sources[source].get_submodule(name)

    def _run(self, source: int) -> _LayerRun:
        """Run one teacher layer on the teacher's own hidden states; the last result is cached."""
        if self._last_run is None or self._last_run[0] != source:
            self._last_run = None  # free the previous result first
            self._last_run = source, self._teacher_layer(source)
        return self._last_run[1]

    def _teacher_layer(self, source: int) -> _LayerRun:
        names, layer = self.names, self.sources[source]
        part = layer.get_submodule
        x = self.stream.states[source - 1].float()
        with autocast(x.device.type):
            read = self._read(part(names.attention_norm), x)
            query, key = (self._scored(layer, name, read).float() for name in ("query", "key"))
            value = F.linear(read, *attention_part(self.family, layer, "value")).float()
            context = self._attend(self.teacher, source, query, key, value)
            before_norm = x + part(names.attention_output)(context).float()
            attention = self._settled(part(names.attention_norm), before_norm).float()
            intermediate = part(names.intermediate)(self._read(part(names.output_norm), attention))
            activated = self._activate(intermediate, self.theirs.hidden_act)
        activity = activated.float().square().mean(0).sqrt()
        return _LayerRun(query, key, value, before_norm, attention, intermediate, activity)

    def _scored(self, layer: Any, part: str, read: Tensor) -> Tensor:
        """Compute a teacher layer's queries or keys (``part``) from its input ``read``.

        In DeBERTa, the queries or keys of the relative position embeddings follow as more rows.
        """
        return F.linear(read, *attention_part(self.family, layer, part))

    def _attend(
        self, model: PreTrainedModel, number: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Compute attention within each row, without the output map; return (N, A * D)."""
        num_heads = model.config.num_attention_heads
        contexts = []
        rows = (x[: len(value)].split(self.sizes) for x in (query, key, value))
        for mask, *flat in zip(self.masks, *rows, strict=True):
            q, k, v = (
                _padded(x, mask).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in flat
            )
            if self.family.scores is None:
                context = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
            else:
                context = masked_softmax(self.family.scores(model, number, q, k), mask) @ v
            contexts.append(context.transpose(1, 2).flatten(2)[mask])
        return torch.cat(contexts).float()

    def _moved(self, source: int) -> Tensor:
        """Return the variance that each head's values add to the hidden states, (heads,)."""
        num_heads = self.theirs.num_attention_heads
        weight, _ = attention_part(self.family, self.sources[source], "value")
        out = self._part(source, self.names.attention_output).weight
        values_ADH = weight.unflatten(0, (num_heads, -1))
        out_AHD = out.unflatten(1, (num_heads, -1)).transpose(0, 1)
        inputs_HH = self._input_covariance(source).float()
        covariance_ADD = values_ADH @ inputs_HH @ values_ADH.transpose(1, 2)
        return (out_AHD @ covariance_ADD * out_AHD).sum((1, 2))

    def _input_covariance(self, source: int) -> Tensor:
        return self.stream.covariance(source - 1)

    def _important_neurons(self, source: int) -> Tensor:
        out = self._part(source, self.names.output)
        importance = self._run(source).activity * (out.weight.T @ self.basis).norm(dim=1)
        return importance.topk(self.ours.intermediate_size).indices.sort().values

    def _cut(self, source: int, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return these teacher heads' queries, keys and values, cut to the student's head size."""
        num_theirs = self.theirs.num_attention_heads
        size = self.ours.hidden_size // self.ours.num_attention_heads
        run = self._run(source)
        query, key, value = (x.chunk(num_theirs, -1) for x in (run.query, run.key, run.value))
        weights = self._part(source, self.names.attention_output).weight.chunk(num_theirs, -1)

        cut: list[tuple[Tensor, Tensor, Tensor]] = []
        for head in heads:
            # Attention divides by the root of the head size, so this keeps the scores.
            rescale = (size / query[head].shape[-1]) ** 0.25
            q, k = self._cut_scores(query[head] * rescale, key[head] * rescale, size)
            v, _ = _best_factors(value[head], weights[head], size)
            cut.append((q, k, v))
        q, k, v = (torch.cat(parts, -1) for parts in zip(*cut, strict=True))
        return q, k, v

    def _cut_scores(self, query: Tensor, key: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Reduce a head's queries and keys to ``size`` dimensions, with q k^T nearly unchanged."""
        return _best_factors(query, key, size)

    def _places(self, size: int, their_size: int) -> Tensor:
        """Return, for each dimension of a teacher's head, its index in a student's head."""
        return torch.arange(their_size)


class _SameWidth(_Narrowing):
    """Steps to initialise a student that is as wide as its teacher.

    Linear maps are copied, and the copies then corrected by least squares.
    """

    adds = True

    def _basis(self, layers: list[int]) -> Tensor:
        return torch.eye(self.ours.hidden_size, device=self.stream.states[-1].device)

    def _embeddings(self) -> Tensor:
        start_embeddings(self.student, self.teacher, self.basis)
        return _embedded(self.student, self.rows)[1]

    def _prepare(self, layer: nn.Module, source: int, heads: list[int], neurons: Tensor) -> None:
        """Copy these heads and feed-forward neurons, and the norms, of teacher layer ``source``."""
        super()._prepare(layer, source, heads, neurons)
        names, origin, width = self.names, self.sources[source], self.ours.hidden_size
        size = width // self.ours.num_attention_heads
        their_size = width // self.theirs.num_attention_heads
        starts = size * torch.arange(self.ours.num_attention_heads)[:, None]
        places = (starts + torch.arange(their_size)).flatten()
        score_places = (starts + self._places(size, their_size)).flatten()
        kept = torch.arange(width).view(-1, their_size)[heads].flatten()
        same_scores = (size / their_size) ** 0.25  # attention divides by the root of the head size

        for part in ("query", "key"):
            for ours, theirs in zip(
                self._score_maps(layer, part), self._score_maps(origin, part), strict=True
            ):
                _copy_outputs(ours, theirs, score_places, kept, same_scores)
        value, their_value = (
            _Linear(*attention_part(self.family, of, "value")) for of in (layer, origin)
        )
        _copy_outputs(value, their_value, places, kept)
        inner, their_inner = (of.get_submodule(names.intermediate) for of in (layer, origin))
        rows = self._outputs(neurons)
        everything = torch.arange(len(rows))
        _copy_outputs(inner, their_inner, everything, rows)

        target: Any
        source_map: Any
        for name, inputs, of in (
            (names.attention_output, places, kept),
            (names.output, slice(None), neurons),
        ):
            target, source_map = layer.get_submodule(name), origin.get_submodule(name)
            target.weight.zero_()
            target.weight[:, inputs] = source_map.weight[:, of]
            if target.bias is not None:
                target.bias.copy_(source_map.bias)
        for name in (names.attention_norm, names.output_norm):
            layer.get_submodule(name).load_state_dict(origin.get_submodule(name).state_dict())

    def _attention_goal(self, source: int) -> tuple[Tensor, Tensor]:
        run = self._run(source)
        return run.attention, run.before_attention_norm

    def _output_goal(self, end: int) -> tuple[Tensor, Tensor]:
        run = self._run(end)
        with autocast(run.attention.device.type):
            activated = self._activate(run.intermediate, self.theirs.hidden_act)
            moved = self._part(end, self.names.output)(activated).float()
        before = run.attention + moved
        return self._settled(self._part(end, self.names.output_norm), before), before


class _OneSetOfHeads(_Narrowing):
    """Steps to initialise a student for which the same heads are chosen in all teacher layers.

    These are the heads that change the hidden states most, summed over layers.
    """

    def _importance(self, sources: list[int]) -> Tensor:
        importance = super()._importance(sources)
        return importance.sum(0).expand_as(importance)


class _Distances(_OneSetOfHeads):
    """Steps to initialise an MPNet student, whose layers share one table of position biases."""

    def _shared(self, heads: list[list[int]]) -> None:
        models: tuple[Any, Any] = (self.student, self.teacher)
        ours, theirs = (model.encoder.relative_attention_bias.weight for model in models)
        ours.copy_(theirs[:, heads[0]])


class _DistancesSameWidth(_SameWidth, _Distances):
    """Steps to initialise an MPNet student that is as wide as its teacher."""


class _Positions(_Narrowing):
    """Steps to initialise a DeBERTa student, which has queries and keys of relative positions.

    They are made from a table of position embeddings that all layers share. The table is projected
    to the student's width. Some DeBERTa models have a convolution beside the first layer. A
    narrower student's convolution starts near 0: an activation follows it in each dimension, so it
    cannot be projected like a linear map.
    """

    def _shared(self, heads: list[list[int]]) -> None:
        ours, theirs = self._encoder(self.student), self._encoder(self.teacher)
        if not ours.relative_attention:
            return
        table = theirs.get_rel_embedding() @ self.basis
        ours.rel_embeddings.weight.copy_(table)
        if "layer_norm" in ours.norm_rel_ebd:
            _fit_norm(ours.LayerNorm, table, table)

    def _layer(self, number: int, source: int, end: int, heads: list[int], z: Tensor) -> Tensor:
        after = super()._layer(number, source, end, heads, z)
        conv = self._encoder(self.student).conv
        return after if number or conv is None else self._convolution(conv, end, z, after)

    def _convolution(self, conv: Any, end: int, before: Tensor, after: Tensor) -> Tensor:
        """Initialise the convolution; return the student's states after it, (tokens, width)."""
        for parameter in conv.conv.parameters():
            parameter.mul_(1e-4)  # weights that are all 0 would be refused as damaged
        return _fit_norm(conv.LayerNorm, after, self.stream.states[end].float() @ self.basis)

    def _score_maps(self, layer: Any, part: str) -> list[Any]:
        """Return the query or key maps (``part``) of tokens and, if any, of relative positions.

        Both can be the same map.
        """
        attention = layer.attention.self
        own = getattr(attention, f"{part}_proj")
        if not attention.relative_attention:
            return [own]
        beside = own if attention.share_att_key else getattr(attention, f"pos_{part}_proj", None)
        return [own] if beside is None else [own, beside]

    def _scored(self, layer: Any, part: str, read: Tensor) -> Tensor:
        own, *beside = self._score_maps(layer, part)
        positions = [linear(self._positions(self.teacher, len(read))) for linear in beside]
        return torch.cat([own(read), *positions])

    def _fit_scores(self, layer: Any, part: str, inputs: Tensor, targets: Tensor) -> Tensor:
        own, *beside = self._score_maps(layer, part)
        num_heads, num_tokens = self.ours.num_attention_heads, len(inputs)
        if not beside:
            return self._fit(own, inputs, targets, num_heads)
        positions = self._positions(self.student, num_tokens)
        if own in beside:
            return self._fit(own, torch.cat([inputs, positions]), targets, num_heads)[:num_tokens]
        self._fit(beside[0], positions, targets[num_tokens:], num_heads)
        return self._fit(own, inputs, targets[:num_tokens], num_heads)

    def _positions(self, model: PreTrainedModel, num_tokens: int) -> Tensor:
        """Return the relative position embeddings, repeated to about ``num_tokens`` rows."""
        table: Tensor = self._encoder(model).get_rel_embedding()
        return table.repeat(max(1, num_tokens // len(table)), 1)

    def _encoder(self, model: Any) -> Any:
        return model.encoder


class _PositionsSameWidth(_SameWidth, _Positions):
    """Steps to initialise a DeBERTa student that is as wide as its teacher."""

    def _shared(self, heads: list[list[int]]) -> None:
        ours, theirs = self._encoder(self.student), self._encoder(self.teacher)
        for name in ("rel_embeddings", "LayerNorm"):
            if hasattr(ours, name):
                getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())

    def _convolution(self, conv: Any, end: int, before: Tensor, after: Tensor) -> Tensor:
        if end > 0:  # the target includes the work of later layers, which the convolution cannot do
            return super()._convolution(conv, end, before, after)
        conv.load_state_dict(self._encoder(self.teacher).conv.state_dict())
        rows = zip(self.masks, before.split(self.sizes), after.split(self.sizes), strict=True)
        return torch.cat(
            [conv(_padded(x, mask), _padded(y, mask), mask.long())[mask] for mask, x, y in rows]
        )


class _NormFirst(_Narrowing):
    """Steps to initialise a ModernBERT student: pre-norm, with gates and rotary positions.

    Hidden states between layers are not normed. So the output of each part (attention,
    feed-forward) is fitted to the teacher's hidden states after the part, projected to the
    student's width, minus the student's hidden states before it. The scales of norms are multiplied
    into the maps after them. Rotary positions rotate dimensions i and i + D/2 of a head together,
    like one complex number, by ``theta ** (-2 i / D)`` per token. For a smaller head, teacher
    dimensions with nearly the same rotation are merged into one.
    """

    def _layer(self, number: int, source: int, end: int, heads: list[int], z: Tensor) -> Tensor:
        z = super()._layer(number, source, end, heads, z)
        if number == len(self.layers) - 1:
            models: tuple[Any, Any] = (self.student, self.teacher)
            ours, theirs = (model.final_norm for model in models)
            _fit_norm(ours, z, theirs(self.stream.states[end].float()) @ self.basis)
        return z

    def _input_covariance(self, source: int) -> Tensor:
        norm = self._part(source, self.names.attention_norm)
        return torch.cov(self._read(norm, self.stream.states[source - 1].float()).T)

    def _attention_goal(self, source: int) -> tuple[Tensor, Tensor]:
        wanted = self._run(source).attention @ self.basis
        return wanted, wanted

    def _output_goal(self, end: int) -> tuple[Tensor, Tensor]:
        wanted = self.stream.states[end].float() @ self.basis
        return wanted, wanted

    def _read(self, norm: Any, z: Tensor) -> Tensor:
        return norm(z)

    def _settled(self, norm: Any, before: Tensor) -> Tensor:
        return before

    def _settle(self, norm: Any, z: Tensor, target: Tensor) -> Tensor:
        return z

    def _outputs(self, neurons: Tensor) -> Tensor:
        return torch.cat([neurons, neurons + self.theirs.intermediate_size])

    def _activate(self, inner: Tensor, hidden_act: str) -> Tensor:
        neurons, gates = inner.chunk(2, -1)
        return ACT2FN[hidden_act](neurons) * gates

    def _cut_scores(self, query: Tensor, key: Tensor, size: int) -> tuple[Tensor, Tensor]:
        q, k = (torch.complex(*x.chunk(2, -1)) for x in (query, key))
        places = self._places(size, query.shape[-1])[: q.shape[-1]]
        cut = q.new_zeros(2, len(q), size // 2)
        for place in places.unique():
            alike = places == place
            left, right = _best_factors(q[:, alike], k[:, alike].conj(), 1)
            cut[:, :, place] = torch.stack([left[:, 0], right[:, 0].conj()])
        less_query, less_key = torch.cat([cut.real, cut.imag], -1)
        return less_query, less_key

    def _places(self, size: int, their_size: int) -> Tensor:
        """Return, for each dimension of a teacher's head, the student's with the nearest rotation.

        ``size`` and ``their_size`` are the head sizes of student and teacher.
        """
        nearest = (torch.arange(their_size // 2) * size / their_size).round().long()
        first = nearest.clamp_max(size // 2 - 1)
        return torch.cat([first, first + size // 2])


class _NormFirstSameWidth(_SameWidth, _NormFirst):
    """Steps to initialise a ModernBERT student that is as wide as its teacher."""


class _OneLayer(_OneSetOfHeads):
    """Steps to initialise an ALBERT student, whose one shared layer is applied ``depth`` times.

    The layer is fitted to all of its passes at once; each pass uses its own part of the calibration
    rows. In the first round, the layer's inputs are the teacher's hidden states, projected to the
    student's width; in later rounds, they are the student's own hidden states at each pass. All
    passes replace about the same number of teacher layers, because one layer cannot do much in one
    pass and little in another (LOG.md).
    """

    def _kept(self) -> list[int]:
        ends = [end for (end,) in Even()(len(self.layers), len(self.sources))]
        return [0, *(end + 1 for end in ends[:-1])]

    def _layers(
        self, sources: list[int], ends: list[int], heads: list[list[int]], z: Tensor
    ) -> None:
        whole, masks, depth = self.stream, self.masks, len(sources)
        depths = self._depths(depth)

        def stacked(of_layers: Mapping[int, Tensor], layers: list[int]) -> Tensor:
            shares = zip(layers, depths, strict=True)
            return torch.cat([of_layers[layer][share] for layer, share in shares])

        # The stream as of a teacher with two layers: inputs of sources, inputs of ends, ends.
        before_sources, before_ends = ([i - 1 for i in numbers] for numbers in (sources, ends))
        states = [stacked(whole.states, layers) for layers in (before_sources, before_ends, ends)]
        scales = stacked(dict(enumerate(whole.scales)), ends)
        self.stream = TeacherStream(dict(enumerate(states, -1)), [scales, scales])
        self.masks = [mask[i::depth] for i in range(depth) for mask in masks]
        self.sizes = [int(mask.sum()) for mask in self.masks]

        self._layer(0, 0, 1, heads[0], states[0].float() @ self.basis)
        for _ in range(ROUNDS):
            given: list[Any] = [encode(self.student, batch).hidden_states for batch in self.rows]
            flat = {
                i: torch.cat([of[i][mask] for of, mask in zip(given, masks, strict=True)])
                for i in range(depth)
            }
            self._layer(0, 0, 1, heads[0], stacked(flat, list(range(depth))))

    def _depths(self, depth: int) -> list[Tensor]:
        """Divide the rows among the passes of ALBERT's layer; return one token mask per pass."""
        places = [torch.arange(len(mask))[:, None].expand_as(mask)[mask] for mask in self.masks]
        return [torch.cat(places) % depth == i for i in range(depth)]


class _OneLayerSameWidth(_SameWidth, _OneLayer):
    """Steps to initialise an ALBERT student that is as wide as its teacher."""


# model_type -> steps for a student that is narrower than its teacher, and for one as wide
_STEPS: Mapping[str, tuple[type[_Narrowing], type[_SameWidth]]] = {
    "mpnet": (_Distances, _DistancesSameWidth),
    "albert": (_OneLayer, _OneLayerSameWidth),
    "deberta-v2": (_Positions, _PositionsSameWidth),
    "modernbert": (_NormFirst, _NormFirstSameWidth),
}


class _Linear(NamedTuple):
    """Weight and bias of a linear map, or of a slice of its outputs."""

    weight: Tensor
    bias: Tensor | None


def _copy_outputs(ours: Any, theirs: Any, to: Tensor, of: Tensor, factor: float = 1.0) -> None:
    """Set ``ours.weight[to] = theirs.weight[of] * factor``, and the bias likewise, in place."""
    ours.weight[to] = theirs.weight[of] * factor
    if ours.bias is not None:
        ours.bias[to] = theirs.bias[of] * factor


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    """Return vectors (N, D) of the real tokens as a padded tensor (B, T, D), with 0 at padding."""
    padded = flat.new_zeros(*mask.shape, flat.shape[-1])
    padded[mask] = flat
    return padded


def _fit_norm(norm: Any, before: Tensor, target: Tensor) -> Tensor:
    """Fit a layer norm's scale and shift from inputs ``before`` to a target; return its output."""
    normed = F.layer_norm(before, before.shape[-1:], eps=norm.eps)
    if norm.bias is None:
        scale = (normed * target).mean(0) / normed.square().mean(0).clamp_min(1e-6)
        norm.weight.copy_(scale)
        return normed * scale
    mean, target_mean = normed.mean(0), target.mean(0)
    centred = normed - mean
    variance = centred.square().mean(0).clamp_min(1e-6)
    norm.weight.copy_((centred * (target - target_mean)).mean(0) / variance)
    norm.bias.copy_(target_mean - norm.weight * mean)
    return normed * norm.weight + norm.bias


@torch.no_grad()
def fit_linear(
    linear: Any,
    inputs: Tensor,
    targets: Tensor,
    num_heads: int = 1,
    strength: float = 3e-2,
    adds: bool = False,
) -> Tensor:
    """Set a linear map to the ridge regression of targets on inputs, and return its output.

    Args:
        linear: the map, changed in place; its outputs are split evenly among ``num_heads`` heads.
        inputs: shape (N, D).
        targets: shape (N, num_heads * K). If K is smaller than a head of the map, only the head's
            first K outputs are set.
        num_heads: number of heads.
        strength: weight of the penalty, as in ``ridge_map``.
        adds: pull the weights towards their previous values instead of 0.
    """
    outputs = torch.arange(len(linear.weight), device=targets.device).view(num_heads, -1)
    outputs = outputs[:, : targets.shape[1] // num_heads].flatten()
    prior = linear.weight[outputs].T if adds else None
    has_constant = linear.bias is not None
    found = ridge_map(inputs, targets, strength, prior, has_constant).float()
    linear.weight[outputs] = found[:-1].T
    if has_constant:
        linear.bias[outputs] = found[-1]
    return F.linear(inputs.float(), linear.weight, linear.bias)


def _best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a and b, of at most ``rank`` columns, with ``a b^T`` closest to ``left right^T``."""
    if left.shape[-1] <= rank:
        return left, right
    _, left_root = torch.linalg.qr(left)
    _, right_root = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(left_root @ right_root.T)
    root = s[:rank].sqrt()
    # left = Q R, so Q = left R^-1; R may be singular, hence the pseudo-inverse.
    return (
        left @ torch.linalg.pinv(left_root) @ u[:, :rank] * root,
        right @ torch.linalg.pinv(right_root) @ vh.T[:, :rank] * root,
    )
