"""The teacher's hidden states: from a cache, or computed per batch if it would be too large."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from kdnas.data.datamodule import Batch, KDDataModule
from kdnas.data.loader import LengthGroupedBatches
from kdnas.data.tokens import located, real_tokens
from kdnas.distillation.losses import ridge_map, within_half
from kdnas.distillation.metrics import TOKEN_STRENGTH, RidgeProbe
from kdnas.distillation.state_cache import BatchStates, Precision, StateCache, cache_key
from kdnas.models.encoders import Teacher, embed, encode
from kdnas.system.errors import UserError
from kdnas.system.files import read_json, write_json
from kdnas.training.precision import autocast, autocast_dtype

log = logging.getLogger(__name__)

# On a CPU up to 10 % faster than 4,096 for short rows: the CPU's caches hold the activations
# (LOG.md).
CPU_BATCH_TOKENS = 2048
# Enough to fit a map of 769 x 768 numbers; takes a 6-layer teacher a few seconds on two cores.
STATS_TOKENS = 30_000


@dataclass(frozen=True)
class LayerStats:
    """What a student's errors on one teacher layer are compared with, averaged over dimensions.

    Args:
        variance: variance of the layer's hidden states on training rows.
        held_out_variance: variance of the layer's hidden states on held-out rows.
        held_out_mse_context_free: mean squared error, on held-out rows, of a linear map from the
            teacher's embedding output to this layer, which was fitted on training rows.
    """

    variance: float
    held_out_variance: float
    held_out_mse_context_free: float


@dataclass(frozen=True)
class ShareEnds:
    """The mean squared errors for which ``contextual_share`` is 0 and 1.

    Both are errors of a regularised linear map (``RidgeProbe``) to the teacher's last layer.

    Args:
        context_free: error of the map from the teacher's embedding output (share 0).
        teacher: error of the map from the last layer itself (share 1); above 0, because the map is
            regularised.
    """

    context_free: float
    teacher: float


@dataclass(frozen=True)
class StatesSettings:
    """Where and how the teacher's hidden states are stored.

    Args:
        folder: folder of the stored states, with a subfolder for each teacher and text; safe to
            delete. By default ``teacher_states`` in the folder of all runs.
        max_gb: largest size of the stored states, in GB. If they would be larger, nothing is stored
            and the teacher runs on each batch. 0: never store.
        precision: precision of the stored numbers; int8 takes half the disk, with a rounding error
            of 1e-4 to 3e-4 of the states' variance.
    """

    folder: str | None = None
    max_gb: float = 20.0
    precision: Precision = "float16"

    def __post_init__(self) -> None:
        if not self.max_gb >= 0:
            raise UserError(
                f"max_gb is {self.max_gb}: give a size in GB, or 0 to store no teacher states."
            )


class LiveTeacher:
    """Computes the teacher's hidden states on each batch, instead of reading stored ones."""

    def __init__(self, model: PreTrainedModel, precision: str = "auto") -> None:
        self.model, self.precision = model, precision

    @torch.no_grad()  # not inference_mode, whose tensors cannot enter autograd
    def __call__(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """Return for each layer the hidden states (N, H) of a batch's N real tokens."""
        device = batch["input_ids"].device
        with autocast(device.type, self.precision):
            states = encode(self.model.to(device), batch).hidden_states  # type: ignore[arg-type]
        assert states is not None
        real = real_tokens(batch)
        return [states[layer + 1].flatten(0, 1)[real] for layer in layers]


StateSource = Callable[[Batch, Sequence[int]], list[Tensor]]  # a StateCache or a LiveTeacher


@dataclass(eq=False)
class TeacherStates:
    """Gives a teacher's hidden states, stored or computed, and values to compare errors with.

    Args:
        source: a ``StateCache`` (stored) or a ``LiveTeacher`` (computed).
        layers: teacher layers that ``source`` has, ascending.
        hidden_size: width of the teacher.
        stats: layer -> its variance and other values with which errors on that layer are compared.
        ends: the errors for which ``contextual_share`` is 0 and 1.
    """

    source: StateSource
    layers: list[int]
    hidden_size: int
    stats: dict[int, LayerStats]
    ends: ShareEnds

    def __call__(self, batch: Batch, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return layer -> hidden states of a batch's real tokens, (N, H), on the batch's device.

        By default, the layers are ``self.layers``.
        """
        layers = self.layers if layers is None else layers
        ahead = batch.get("states", {})
        if ahead.keys() >= set(layers):
            return {layer: ahead[layer] for layer in layers}
        device = batch["input_ids"].device
        states = [state.to(device) for state in self.source(batch, layers)]
        return dict(zip(layers, states, strict=True))

    def prepare(self, batch: Batch, layers: Sequence[int], pin: bool) -> Batch:
        """Return a copy of a batch with the stored hidden states and the indices of real tokens.

        Args:
            batch: a batch on the CPU.
            layers: teacher layers whose states are added, if they are stored.
            pin: whether to pin the batch's memory, so that a GPU can copy it asynchronously.
        """
        ready = located(batch)
        if isinstance(self.source, StateCache):
            ready["states"] = self(batch, layers)
        return pinned(ready) if pin else ready


def pinned(batch: Any) -> Any:
    """Return a batch (or a tensor) in pinned memory, which a GPU can copy asynchronously."""
    if isinstance(batch, dict):
        return {name: pinned(value) for name, value in batch.items()}
    return batch.pin_memory()


def state_cache(
    teacher: Teacher,
    data: KDDataModule,
    layers: Iterable[int],
    settings: StatesSettings,
    device: str = "cpu",
    precision: str = "auto",
) -> StateCache:
    """Return the ``StateCache`` of these teacher layers, without computing or reading any states.

    Args:
        teacher: the teacher.
        data: data module after ``setup``.
        layers: teacher layers, from 0; -1 is the embedding output.
        settings: where and how hidden states are stored.
        device: device that the teacher runs on.
        precision: the Trainer's precision.
    """
    wanted = sorted(set(layers))
    order = data.draw_order()
    computed_in = autocast_dtype(torch.device(device).type, precision)
    key = cache_key(teacher.sha256(), data.rows, wanted, settings.precision, order, computed_in)
    folder = Path(settings.folder or "lightning_logs/teacher_states") / key
    return StateCache(
        folder, data.rows, wanted, teacher.config.hidden_size, settings.precision, order
    )


def open_states(
    teacher: Teacher,
    data: KDDataModule,
    layers: Iterable[int],
    settings: StatesSettings = StatesSettings(),
    device: str = "cpu",
    precision: str = "auto",
) -> TeacherStates:
    """Return the teacher's hidden states for the data's rows; compute and store missing ones.

    Args:
        teacher: the teacher.
        data: data module after ``setup``; states of its training rows and held-out rows are needed.
        layers: teacher layers, from 0; -1 is the embedding output.
        settings: where states are stored, and how much disk they may take.
        device: device that the teacher runs on.
        precision: the Trainer's precision; with 32-true, the teacher is in float32 on a GPU too.

    Raises:
        UserError: the states fit in ``settings.max_gb``, but not on the disk.
    """
    cache = state_cache(teacher, data, layers, settings, device, precision)
    source = _build(cache, LiveTeacher(teacher.model, precision), data, settings, device)

    # The file name tells on how many rows, and in which batches, the values were measured.
    num_rows, batch_tokens = len(data.select("mini").train_ids()), data.settings.batch_tokens
    file = cache.folder / f"measured_{num_rows}_{batch_tokens}.json"
    measured = _read_measured(file)
    if measured is None:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / "lock"):
            measured = _read_measured(file, has_lock=True)  # another process may have done it
            if measured is None:
                measured = measure(teacher.model, source, cache.layers, data, device)
                _write_measured(file, *measured)
    return TeacherStates(source, cache.layers, teacher.config.hidden_size, *measured)


def _build(
    cache: StateCache, live: LiveTeacher, data: KDDataModule, settings: StatesSettings, device: str
) -> StateSource:
    """Return ``cache``, built for the needed rows, or ``live`` if ``max_gb`` is too little."""
    row_ids = _needed(data)
    gb, missing_gb = cache.num_bytes(row_ids) / 1e9, cache.num_missing_bytes(row_ids) / 1e9
    if gb > settings.max_gb:
        log.info(
            "The teacher runs live: its states would take %.1f GB, the budget is %.1f GB.",
            gb,
            settings.max_gb,
        )
        return live

    found = (
        f"{missing_gb:.2f} GB of them are computed now" if missing_gb else "all of them are there"
    )
    if missing_gb and not cache.folder.exists() and any(cache.folder.parent.glob("*/lock")):
        found += (
            " (the caches beside it are for another teacher, text or setting, and are not used)"
        )
    log.info("Teacher states: %.2f GB in %s, %s", gb, cache.folder, found)

    cache.build(*_computing(cache, live, data, device), row_ids)
    return cache


def _needed(data: KDDataModule) -> np.ndarray:
    return np.concatenate([data.train_ids(), data.held_out_ids()])


def _computing(
    cache: StateCache, live: LiveTeacher, data: KDDataModule, device: str
) -> tuple[BatchStates, int]:
    """Return arguments of ``cache.build``: a function from batch to states, and tokens a batch."""
    batch_tokens = data.settings.batch_tokens
    if device == "cpu":
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
    return lambda batch: live(_to(batch, device), cache.layers), batch_tokens


def build_share(
    cache: StateCache,
    teacher: Teacher,
    data: KDDataModule,
    device: str,
    precision: str,
    share: int,
    num_shares: int,
) -> None:
    """Compute one device's share of the teacher states that ``open_states`` needs.

    Args:
        cache: the cache, from ``state_cache``.
        teacher: the teacher.
        data: data module after ``setup``.
        device: device that the teacher runs on.
        precision: the Trainer's precision.
        share: number of this share, from 0.
        num_shares: number of shares, one for each device.
    """
    live = LiveTeacher(teacher.model, precision)
    computing = _computing(cache, live, data, device)
    cache.build_share(*computing, _needed(data), share, num_shares)


def is_missing(cache: StateCache, data: KDDataModule, settings: StatesSettings) -> bool:
    """Return whether ``open_states`` has to compute and store hidden states that are needed.

    False if all are stored already, or if they exceed ``max_gb``, so that none are stored.
    """
    row_ids = _needed(data)
    is_within = cache.num_bytes(row_ids) / 1e9 <= settings.max_gb
    return is_within and cache.num_missing_bytes(row_ids) > 0


def _sha256(path: Path, value: Any) -> str:
    """Return a hash of a JSON value, the name of its file ``path``, and that of the folder."""
    bound = [path.parent.name, path.name, value]
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _write_measured(path: Path, stats: dict[int, LayerStats], ends: ShareEnds) -> None:
    layers = {str(layer): asdict(values) for layer, values in stats.items()}
    plain = {"layers": layers, "ends": asdict(ends)}
    write_json(path, plain | {"sha256": _sha256(path, plain)})


def _read_measured(
    path: Path, has_lock: bool = False
) -> tuple[dict[int, LayerStats], ShareEnds] | None:
    """Read stored results of ``measure``; None if the file is missing or damaged."""
    try:
        found = read_json(path)
        if found.pop("sha256") == _sha256(path, found):
            stats = {int(layer): LayerStats(**values) for layer, values in found["layers"].items()}
            return stats, ShareEnds(**found["ends"])
    except FileNotFoundError:
        return None
    except (UserError, KeyError, TypeError, AttributeError):
        pass
    if has_lock:  # warn only once
        log.warning("%s is damaged; it is measured again.", path)
    return None


def _to(batch: Batch, device: str) -> Batch:
    tensors = cast(dict[str, Tensor], batch)
    return cast(Batch, {name: tensor.to(device) for name, tensor in tensors.items()})


def measure(
    model: PreTrainedModel,
    source: StateSource,
    layers: Sequence[int],
    data: KDDataModule,
    device: str,
) -> tuple[dict[int, LayerStats], ShareEnds]:
    """Measure what students' errors are compared with; it is the same for every split and rank.

    Args:
        model: the teacher's encoder.
        source: gives the teacher's hidden states of a batch.
        layers: teacher layers, ascending; ``ShareEnds`` is measured on the last.
        data: data module after ``setup``.
        device: device that the teacher runs on.

    Returns:
        A dictionary from each layer to its ``LayerStats``, and the ``ShareEnds``.
    """
    model.to(device)  # type: ignore[arg-type]
    stats = _stats(model, source, layers, data, device)
    return stats, _ends(model, source, layers[-1], data, device)


@torch.no_grad()
def _ends(
    model: PreTrainedModel, source: StateSource, layer: int, data: KDDataModule, device: str
) -> ShareEnds:
    """Measure the errors for which ``contextual_share`` is 0 and 1, on the held-out rows."""
    width = model.config.hidden_size
    # sync_on_compute is off: one rank measures while the others wait.
    context_free, teacher = (
        RidgeProbe(width, width, TOKEN_STRENGTH, sync_on_compute=False).to(device) for _ in range(2)
    )
    for index in _batches(data, data.held_out_ids()):
        batch = _to(data.rows[index], device)
        target = source(batch, [layer])[0].to(device)
        context_free.update(embed(model, batch)[batch["attention_mask"].bool()], target)
        teacher.update(target, target)
    return ShareEnds(*(float(probe.compute()[0]) for probe in (context_free, teacher)))


@torch.no_grad()
def _stats(
    model: PreTrainedModel,
    source: StateSource,
    layers: Sequence[int],
    data: KDDataModule,
    device: str,
) -> dict[int, LayerStats]:
    """Measure each layer's variance, and the error of predicting its states without context.

    The prediction is a linear map from the embedding output. It is fitted on about ``STATS_TOKENS``
    tokens of the training rows of the ``mini`` split, and its error is measured on as many tokens
    of the held-out rows. The result maps each layer to its ``LayerStats``.
    """
    embedded, states = [], []
    for ids in (data.select("mini").train_ids(), data.held_out_ids()):
        batches = [_to(batch, device) for batch in sample_batches(data, ids, STATS_TOKENS)]
        words = [embed(model, batch)[batch["attention_mask"].bool()].cpu() for batch in batches]
        embedded.append(torch.cat(words))
        # Half precision, and one layer at a time below: a wide teacher's states are gigabytes.
        sampled = [
            [within_half(state).half().cpu() for state in source(batch, layers)]
            for batch in batches
        ]
        states.append([torch.cat(parts) for parts in zip(*sampled, strict=True)])

    stats = {}
    for layer, *halves in zip(layers, *states, strict=True):
        train, held_out = (half.float() for half in halves)
        weight = ridge_map(embedded[0], train).float()
        predicted = torch.addmm(weight[-1], embedded[1], weight[:-1])
        stats[layer] = LayerStats(
            variance=float(train.var(0, correction=0).mean()),
            held_out_variance=float(held_out.var(0, correction=0).mean()),
            held_out_mse_context_free=float((predicted - held_out).square().mean()),
        )
    return stats


def sample_batches(data: KDDataModule, sample_ids: np.ndarray, num_tokens: int) -> list[Batch]:
    """Return batches of a random sample of rows, with about ``num_tokens`` real tokens in all.

    The sample is drawn from the rows with the numbers ``sample_ids``, and is the same on all ranks.
    If these rows have fewer tokens, all are used.
    """
    chosen = np.random.default_rng(0).permutation(sample_ids)
    chosen = chosen[: np.searchsorted(np.cumsum(data.rows.lengths[chosen]), num_tokens) + 1]
    return [data.rows[index] for index in _batches(data, chosen)]


def _batches(data: KDDataModule, sample_ids: np.ndarray) -> LengthGroupedBatches:
    """Return batches of these rows, grouped by length and unshuffled; all of them on this rank."""
    return LengthGroupedBatches(
        data.rows.padded_lengths, sample_ids, data.settings.batch_tokens, shuffle=False
    )
