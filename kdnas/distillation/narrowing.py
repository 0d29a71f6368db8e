"""A smaller student made from its teacher's layers, map by map, by least squares.

Shapes: B rows, T padded tokens, N real tokens of all calibration rows, H_t and H_s the widths of
teacher and student.
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
from kdnas.training.precision import autocast


def start_embeddings(student: PreTrainedModel, teacher: PreTrainedModel, basis_TS: Tensor) -> None:
    """Give a student the teacher's embedding output in another basis.

    Layer norm is gamma * centred(x) / std(x) + beta. gamma and the centring are linear, so they go
    into the tables; what is left of gamma is how much smaller the projected vector is than the
    centred one. Tables of a width of their own stay as they are, and the map behind them is
    projected. A student as wide as its teacher gets all of them as they are.

    Args:
        student: changed in place.
        teacher: of the same family.
        basis_TS: from the teacher's stream to the student's, (H_t, H_s).
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
    # A student as narrow as the tables of its teacher has no map, so the teacher's goes into the
    # tables.
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
    """The names of the tables that always remain the teacher's: those of a width of their own.

    Others may be its copies too, but what follows them is not, so they learn as new ones (LOG.md).
    """
    if embedding_mapping(student) is None:
        return frozenset()
    embeddings: Any = student.embeddings
    return frozenset(f"embeddings.{name}" for name, _ in embeddings.named_parameters())


def narrow(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
) -> tuple[tuple[int, ...], ...]:
    """Give a student the teacher's layers in a smaller basis, map by map, by least squares.

    Let x_l be the teacher's stream after layer l and B (H_t, H_s) the principal components of it
    over the layers that count, turned so that every column is free of the mean that a layer norm
    takes away. The student's stream shall be ``B^T x``. For each student layer, in order, from its
    own stream z: queries, keys and values are the ridge regression of the kept teacher heads' on z;
    the output maps are that of ``sigma B^T norm(x) - z``, where sigma is the scale that the
    teacher's layer norm divides by; layer norms take a scale and a shift for each dimension. Where
    teacher layers are left out, the second output map aims at the input of the next source layer,
    so it does their work too as far as a linear map can.

    A student as wide as its teacher keeps the stream as it is, so B is the identity, and the kept
    heads and neurons are copied: least squares only add to each map what the copies lack. What did
    nothing can be left out without loss.

    Args:
        student: post-norm, with layers of its own; changed in place.
        teacher: of the same family.
        rows: to calibrate on; 20,000 tokens do for a width of 192, and three times as many do a
            little better (LOG.md).

    Returns:
        For each student layer, the teacher's heads that its heads were made from.

    Source: PCA of the stream as in SliceGPT (Ashkboos et al. 2024), the rest is measured in
        ``LOG.md``.
    """
    is_as_wide = student.config.hidden_size == teacher.config.hidden_size
    narrower, as_wide = _STEPS.get(teacher.config.model_type, (_Narrowing, _SameWidth))
    return (as_wide if is_as_wide else narrower)(student, teacher, rows).run()


@dataclass(frozen=True)
class TeacherStream:
    """What a teacher gives on the calibration rows, flat; the same for all of its students.

    Args:
        states: after each layer, -1 the embeddings, (N, H_t); all but those in float16.
        scales: how large the stream is before each layer's last norm, which divides by that, (N,
            1).
    """

    states: dict[int, Tensor]
    scales: list[Tensor]
    _covariances: dict[int, Tensor] = field(default_factory=dict)

    def covariance(self, layer: int) -> Tensor:
        """The covariance of the states after a layer, over its trace: (H_t, H_t), float64."""
        if layer not in self._covariances:
            covariance = torch.cov(self.states[layer].float().T).double()
            self._covariances[layer] = covariance / covariance.trace()
        return self._covariances[layer]

    @classmethod
    def of(cls, teacher: PreTrainedModel, rows: Sequence[Batch]) -> "TeacherStream":
        """By one pass over the rows."""
        _, embedded = _embedded(teacher, rows)
        layers = family_of(teacher.config).layers(teacher)
        states: list[list[Tensor]] = [[] for _ in layers]
        scales: list[list[Tensor]] = [[] for _ in layers]
        inputs: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in layers:
                norm = layer.get_submodule(family_of(teacher.config).names.output_norm)
                hooks.enter_context(
                    norm.register_forward_hook(lambda _, args, out: inputs.append(args[0]))
                )
            for batch in rows:
                mask = batch["attention_mask"].bool()
                with autocast(teacher.device.type):
                    outputs = encode(teacher, batch).hidden_states[1:]  # type: ignore[index]
                for i, output in enumerate(outputs):
                    # In half precision: all layers of a wide teacher are gigabytes otherwise.
                    states[i].append(within_half(output[mask]).half())
                    scales[i].append(inputs[i][mask].float().std(-1, correction=0, keepdim=True))
                inputs.clear()
        return cls(
            {-1: embedded} | dict(enumerate(map(torch.cat, states))),
            [torch.cat(parts) for parts in scales],
        )


class CalibrationRows(list[Batch]):
    """Rows to calibrate on, with a teacher's stream on them, which all students share."""

    def __init__(self, rows: Iterable[Batch]) -> None:
        super().__init__(rows)
        self._last: tuple[PreTrainedModel, TeacherStream] | None = None

    def stream(self, teacher: PreTrainedModel) -> TeacherStream:
        """The teacher's stream, computed once; its weights must not change afterwards."""
        if self._last is None or self._last[0] is not teacher:
            self._last = teacher, TeacherStream.of(teacher, self)
        return self._last[1]


def _embedded(model: PreTrainedModel, rows: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """What goes into the embedding's layer norm, and what comes out of it, flat."""
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
    """What the parts of a teacher layer give on the calibration rows, flat (N, ...)."""

    query: Tensor
    key: Tensor
    value: Tensor
    before_attention_norm: Tensor
    attention: Tensor
    intermediate: Tensor  # before the activation
    activity: Tensor  # of each neuron: root of the mean square, (I,)


class _Narrowing:
    """The steps of ``narrow`` for a student that is narrower than its teacher."""

    adds = False  # whether least squares add to what a map has, or replace it

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> None:
        self.student, self.teacher, self.rows = student, teacher, rows
        self.ours, self.theirs = arch_of(student.config), arch_of(teacher.config)
        self.masks = [batch["attention_mask"].bool() for batch in rows]

        self.family = family_of(teacher.config)
        self.names = self.family.names
        self.layers = self.family.layers(student)
        self.sources = self.family.layers(teacher)

        shared = rows if isinstance(rows, CalibrationRows) else CalibrationRows(rows)
        self.stream = shared.stream(teacher)
        self._last_run: tuple[int, _LayerRun] | None = None

    def run(self) -> tuple[tuple[int, ...], ...]:
        sources = kept_layers(len(self.layers), len(self.sources))
        ends = [source - 1 for source in sources[1:]] + [len(self.sources) - 1]
        self.basis = self._basis([-1, *ends])

        z = self._embeddings()
        heads = self._heads(sources)
        self._shared(heads)
        for number, (source, end) in enumerate(zip(sources, ends, strict=True)):
            z = self._layer(number, source, end, heads[number], z)
        return tuple(map(tuple, heads))

    def _basis(self, layers: list[int]) -> Tensor:
        """Principal components (H_t, H_s) of the stream after these layers, each counted alike."""
        width = self.ours.hidden_size
        total = torch.stack([self.stream.covariance(layer) for layer in layers]).sum(0)
        components = torch.linalg.eigh(total)[1][:, 1 - width :].float()

        # The student's norms remove the mean over dimensions. So the components are turned to be
        # orthogonal to it, and there is one fewer than H_s.
        turn = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        turn[:, 0] = 1.0
        beside_mean = torch.linalg.qr(turn)[0][:, 1:]
        return components @ beside_mean.to(components.device).T

    def _embeddings(self) -> Tensor:
        """Make the student's embeddings; their output, (N, H_s)."""
        start_embeddings(self.student, self.teacher, self.basis)
        before, z = _embedded(self.student, self.rows)
        if embedding_mapping(self.student) is not None:
            return z
        target = self.stream.states[-1] @ self.basis
        return _fit_norm(embedding_norm(self.student), before, target)

    def _heads(self, sources: list[int]) -> list[list[int]]:
        """Of each layer the teacher's heads that move the stream most, in ascending order."""
        importance = self._importance(sources)
        most = importance.topk(self.ours.num_attention_heads, dim=1).indices
        return most.sort(dim=1).values.tolist()

    def _importance(self, sources: list[int]) -> Tensor:
        """How much the values of each head move the stream, (L_s, A_t)."""
        return torch.stack([self._moved(source) for source in sources])

    def _shared(self, heads: list[list[int]]) -> None:
        """Make what all layers share; by default nothing."""

    def _layer(self, number: int, source: int, end: int, heads: list[int], z: Tensor) -> Tensor:
        """Make one student layer; the stream after it."""
        layer = self.layers[number]
        names, part = self.names, layer.get_submodule
        neurons = self._important_neurons(source)
        self._prepare(layer, source, heads, neurons)

        z = self._attention(number, source, heads, z)

        inner = self._fit(part(names.intermediate), z, self._run(source).intermediate[:, neurons])
        target, wanted = self._output_goal(end)
        self._last_run = None  # large, and not needed any more
        activated = ACT2FN[self.ours.hidden_act](inner)
        z = z + self._fit(part(names.output), activated, wanted - z)
        return _fit_norm(part(names.output_norm), z, target)

    def _attention(self, number: int, source: int, heads: list[int], z: Tensor) -> Tensor:
        """Make the attention of a student layer; the stream after its norm."""
        names, part = self.names, self.layers[number].get_submodule
        num_heads = self.ours.num_attention_heads
        queries, keys, values = self._cut(source, heads)
        query = self._fit(part(names.query), z, queries, num_heads)
        key = self._fit(part(names.key), z, keys, num_heads)
        value = self._fit(part(names.value), z, values, num_heads)

        context = self._attend(self.student, number, query, key, value)
        target, wanted = self._attention_goal(source)
        z = z + self._fit(part(names.attention_output), context, wanted - z)
        return _fit_norm(part(names.attention_norm), z, target)

    def _prepare(self, layer: nn.Module, source: int, heads: list[int], neurons: Tensor) -> None:
        """Of a head larger than the teacher's, what is left over must not change the scores."""
        for parameter in layer.get_submodule(self.names.key).parameters():
            parameter.zero_()

    def _fit(self, linear: Any, inputs: Tensor, targets: Tensor, num_heads: int = 1) -> Tensor:
        return fit_linear(linear, inputs, targets, num_heads, adds=self.adds)

    def _attention_goal(self, source: int) -> tuple[Tensor, Tensor]:
        """What the student's attention norm should give, and what should go into it."""
        run = self._run(source)
        scale = run.before_attention_norm.std(-1, correction=0, keepdim=True)
        return self._goal(self._part(source, self.names.attention_norm), run.attention, scale)

    def _output_goal(self, end: int) -> tuple[Tensor, Tensor]:
        """The same of the norm that ends the student's layer."""
        after = self.stream.states[end].float()
        norm = self._part(end, self.names.output_norm)
        return self._goal(norm, after, self.stream.scales[end])

    def _goal(self, norm: Any, after: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        target = after @ self.basis
        direction = (target - norm.bias @ self.basis) / norm.weight.abs().mean()
        direction -= direction.mean(-1, keepdim=True)
        return target, scale * direction

    def _part(self, source: int, name: str) -> Any:
        return self.sources[source].get_submodule(name)

    def _run(self, source: int) -> _LayerRun:
        """A teacher layer on its own input; the last one is kept."""
        if self._last_run is None or self._last_run[0] != source:
            self._last_run = None  # free it first
            self._last_run = source, self._teacher_layer(source)
        return self._last_run[1]

    def _teacher_layer(self, source: int) -> _LayerRun:
        names, part = self.names, self.sources[source].get_submodule
        x = self.stream.states[source - 1].float()
        with autocast(x.device.type):
            query, key, value = (
                part(name)(x).float() for name in (names.query, names.key, names.value)
            )
            context = self._attend(self.teacher, source, query, key, value)
            before_norm = x + part(names.attention_output)(context).float()
            attention = part(names.attention_norm)(before_norm).float()
            intermediate = part(names.intermediate)(attention)
            activated = ACT2FN[self.theirs.hidden_act](intermediate)
        activity = activated.float().square().mean(0).sqrt()
        return _LayerRun(query, key, value, before_norm, attention, intermediate, activity)

    def _attend(
        self, model: PreTrainedModel, number: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """What a model's layer attends to, within each row, over real tokens; flat, (N, A * D)."""
        num_heads = model.config.num_attention_heads
        sizes = [int(mask.sum()) for mask in self.masks]
        contexts = []
        rows = (x.split(sizes) for x in (query, key, value))
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
        """The variance of what each head's values add to the stream, (A_t,)."""
        num_heads = self.theirs.num_attention_heads
        weight, _ = attention_part(self.family, self.sources[source], "value")
        out = self._part(source, self.names.attention_output).weight
        values_ADH = weight.unflatten(0, (num_heads, -1))
        out_AHD = out.unflatten(1, (num_heads, -1)).transpose(0, 1)
        inputs_HH = self.stream.covariance(source - 1).float()
        covariance_ADD = values_ADH @ inputs_HH @ values_ADH.transpose(1, 2)
        return (out_AHD @ covariance_ADD * out_AHD).sum((1, 2))

    def _important_neurons(self, source: int) -> Tensor:
        out = self._part(source, self.names.output)
        importance = self._run(source).activity * (out.weight.T @ self.basis).norm(dim=1)
        return importance.topk(self.ours.intermediate_size).indices.sort().values

    def _cut(self, source: int, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the kept heads, in as many dimensions as a student's head."""
        num_theirs = self.theirs.num_attention_heads
        size = self.ours.hidden_size // self.ours.num_attention_heads
        run = self._run(source)
        query, key, value = (x.chunk(num_theirs, -1) for x in (run.query, run.key, run.value))
        weights = self._part(source, self.names.attention_output).weight.chunk(num_theirs, -1)

        cut: list[tuple[Tensor, Tensor, Tensor]] = []
        for head in heads:
            # Attention divides by the root of a head's size: the scores stay as they are.
            rescale = (size / query[head].shape[-1]) ** 0.25
            q, k = _best_factors(query[head] * rescale, key[head] * rescale, size)
            v, _ = _best_factors(value[head], weights[head], size)
            cut.append((q, k, v))
        q, k, v = (torch.cat(parts, -1) for parts in zip(*cut, strict=True))
        return q, k, v


class _SameWidth(_Narrowing):
    """The same for a student as wide as its teacher: copies, and what they lack is added."""

    adds = True

    def _basis(self, layers: list[int]) -> Tensor:
        return torch.eye(self.ours.hidden_size, device=self.stream.states[-1].device)

    def _embeddings(self) -> Tensor:
        start_embeddings(self.student, self.teacher, self.basis)
        return _embedded(self.student, self.rows)[1]

    def _prepare(self, layer: nn.Module, source: int, heads: list[int], neurons: Tensor) -> None:
        """Copy the kept heads and neurons; the norms are fitted."""
        super()._prepare(layer, source, heads, neurons)
        names, width = self.names, self.ours.hidden_size
        our_size = width // self.ours.num_attention_heads
        their_size = width // self.theirs.num_attention_heads
        places = torch.arange(width).view(-1, our_size)[:, :their_size].flatten()
        kept = torch.arange(width).view(-1, their_size)[heads].flatten()
        same_scores = (our_size / their_size) ** 0.25  # attention divides by sqrt(head size)

        to: Any
        of: Any
        for name, to, of, factor in (
            (names.query, places, kept, same_scores),
            (names.key, places, kept, same_scores),
            (names.value, places, kept, 1.0),
            (names.intermediate, slice(None), neurons, 1.0),
        ):
            target: Any = layer.get_submodule(name)
            origin = self._part(source, name)
            target.weight[to] = origin.weight[of] * factor
            target.bias[to] = origin.bias[of] * factor

        for name, to, of in (
            (names.attention_output, places, kept),
            (names.output, slice(None), neurons),
        ):
            target, origin = layer.get_submodule(name), self._part(source, name)
            target.weight.zero_()
            target.weight[:, to] = origin.weight[:, of]
            target.bias.copy_(origin.bias)

    def _attention_goal(self, source: int) -> tuple[Tensor, Tensor]:
        run = self._run(source)
        return run.attention, run.before_attention_norm

    def _output_goal(self, end: int) -> tuple[Tensor, Tensor]:
        run = self._run(end)
        with autocast(run.attention.device.type):
            activated = ACT2FN[self.theirs.hidden_act](run.intermediate)
            moved = self._part(end, self.names.output)(activated).float()
        return self.stream.states[end].float(), run.attention + moved


class _OneSetOfHeads(_Narrowing):
    """MPNet: all layers share a number for each distance and head, so they keep the same heads."""

    def _importance(self, sources: list[int]) -> Tensor:
        importance = super()._importance(sources)
        return importance.sum(0).expand_as(importance)

    def _shared(self, heads: list[list[int]]) -> None:
        ours, theirs = (
            model.encoder.relative_attention_bias.weight for model in (self.student, self.teacher)
        )
        ours.copy_(theirs[:, heads[0]])


class _OneSetOfHeadsSameWidth(_SameWidth, _OneSetOfHeads):
    pass


# model_type -> for a student that is narrower than its teacher, and for one as wide
_STEPS: Mapping[str, tuple[type[_Narrowing], type[_SameWidth]]] = {
    "mpnet": (_OneSetOfHeads, _OneSetOfHeadsSameWidth),
}


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    """(N, D) of real tokens as (B, T, D), with 0 elsewhere."""
    padded = flat.new_zeros(*mask.shape, flat.shape[-1])
    padded[mask] = flat
    return padded


def _fit_norm(norm: Any, before: Tensor, target: Tensor) -> Tensor:
    """Scale and shift of a layer norm by least squares; what it then gives."""
    normed = F.layer_norm(before, before.shape[-1:], eps=norm.eps)
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
    """Set a linear map to the ridge regression, and return its output.

    Of a head with more outputs than targets only the first ones are set. With ``adds`` the map
    stays, and the regression of what it lacks is added.
    """
    outputs = torch.arange(linear.out_features, device=targets.device).view(num_heads, -1)
    outputs = outputs[:, : targets.shape[1] // num_heads].flatten()
    weight, bias = linear.weight[outputs], linear.bias[outputs]
    if adds:
        targets = targets.float() - F.linear(inputs.float(), weight, bias)
    found = ridge_map(inputs, targets, strength).float()
    linear.weight[outputs] = found[:-1].T + (weight if adds else 0)
    linear.bias[outputs] = found[-1] + (bias if adds else 0)
    return F.linear(inputs.float(), linear.weight, linear.bias)


def _best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of at most ``rank`` columns whose product is closest to ``left right^T``."""
    if left.shape[-1] <= rank:
        return left, right
    _, left_root = torch.linalg.qr(left)
    _, right_root = torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(left_root @ right_root.T)
    root = s[:rank].sqrt()
    # left = Q R, so Q = left R^-1; the triangular system may be singular: least squares.
    return (
        left @ torch.linalg.pinv(left_root) @ u[:, :rank] * root,
        right @ torch.linalg.pinv(right_root) @ vh.T[:, :rank] * root,
    )
