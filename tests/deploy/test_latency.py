import itertools
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig

import kdnas.deploy.latency
from kdnas.deploy.latency import (
    ArchLatency,
    Latency,
    LatencyMeter,
    LatencySettings,
    measure_latency,
)
from kdnas.deploy.onnx import write_deployed
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, max_length, num_parameters, student_config
from kdnas.system.errors import CandidateFailed, UserError

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64)
FAST = LatencySettings(length=8, min_seconds=0.01)
CONFIG = BertConfig(vocab_size=9, pad_token_id=3, max_position_embeddings=40)


class Probe(nn.Module):
    """Does some work, and hands what it sees to ``look``."""

    def __init__(self, look=lambda module, batch: None, repeats: int = 1) -> None:
        super().__init__()
        self.config = CONFIG
        self.linear = nn.Linear(128, 128)
        self.frozen = nn.Dropout().eval()
        self.look = look
        self.repeats = repeats

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        self.look(self, batch)
        hidden = torch.ones(64, 128)
        for _ in range(self.repeats):
            hidden = self.linear(hidden)
        return hidden


class Elsewhere(Probe):
    """Comes from another device, without a GPU: its weight is on ``meta``, and can be given a value."""

    def __init__(self, look=lambda module, batch: None) -> None:
        super().__init__(look)
        self.to("meta")

    def to(self, device: str | torch.device) -> "Elsewhere":
        self.linear.weight = nn.Parameter(torch.ones(128, 128, device=device))
        self.linear.bias = None
        return self


@pytest.fixture
def one_thread():
    """The threads of torch, back afterwards also where a test fails."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_more_work_takes_longer_whatever_the_order():
    light, heavy = measure_latency([Probe(), Probe(repeats=50)], FAST)
    heavy_again, light_again = measure_latency([Probe(repeats=50), Probe()], FAST)
    assert light.median_ms * 5 < heavy.median_ms
    assert light_again.median_ms * 5 < heavy_again.median_ms
    for latency in (light, heavy):
        assert latency.median_ms > 0 and latency.iqr_ms >= 0 and latency.num_runs >= 3


def test_times_are_milliseconds_and_rates_a_second(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(kdnas.deploy.latency.time, "perf_counter", lambda: 0.25 * next(ticks))
    (latency,) = measure_latency(
        [Probe()], LatencySettings(batch_size=2, length=8, min_seconds=0.01)
    )
    assert latency == Latency(
        250.0, 0.0, 3, p95_ms=250.0, tokens_per_second=64.0, sequences_per_second=8.0
    )


def test_quantiles_are_those_of_single_passes():
    # Two batches, of 2 rows with 3 and 5 tokens and of 1 row with 7, ten passes each.
    times = [value for i in range(10) for value in (0.001 * (i + 1), 0.011 + 0.001 * i)]
    latency = kdnas.deploy.latency._summary(times, [[3, 5], [7]])
    assert latency.median_ms == pytest.approx(10.5)
    assert latency.iqr_ms == pytest.approx(4.5)  # within a batch: that one is longer is no noise
    assert latency.p95_ms == pytest.approx(19.05)
    assert latency.num_runs == 20
    assert latency.tokens_per_second == pytest.approx(15 / (0.0055 + 0.0155))
    assert latency.sequences_per_second == pytest.approx(3 / (0.0055 + 0.0155))


def test_models_take_turns_in_several_rounds():
    seen: list[str] = []
    first = Probe(lambda *_: seen.append("first"))
    second = Probe(lambda *_: seen.append("second"))
    measure_latency([first, second], FAST)
    turns = [name for name, _ in itertools.groupby(seen)]
    assert turns == ["first", "second"] * (len(turns) // 2)
    assert len(turns) >= 2 * (1 + 3)


def test_a_slow_model_gets_three_rounds_and_not_ten():
    runs: list[int] = []
    measure_latency(
        [Probe(lambda *_: runs.append(1), repeats=100)], LatencySettings(length=8, min_seconds=1e-6)
    )
    assert len(runs) == 2 * (1 + 3)


@pytest.mark.usefixtures("one_thread")
def test_the_model_sees_the_batch_and_the_mode_that_were_asked_for():
    seen = []

    def look(module, batch):
        modes = (
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
        )
        seen.append(
            (
                batch,
                modes,
                [part.training for part in module.modules()],
                module.linear.weight.device.type,
            )
        )

    torch.set_num_threads(1)
    with torch.autocast("cpu"):
        measure_latency(
            [Elsewhere(look)],
            LatencySettings(batch_size=3, length=17, num_threads=2, min_seconds=1e-6),
        )
    batch, modes, training, device = seen[0]
    assert modes == (True, False, 2)
    assert training == [False, False, False]
    assert device == "cpu"
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].equal(torch.ones(3, 17, dtype=torch.long))
    assert set(batch["input_ids"].unique().tolist()) == set(range(9)) - {3}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("fails", [False, True])
def test_models_come_back_in_the_mode_and_on_the_device_they_came_in(fails):
    def look(module, batch):
        if fails:
            raise FloatingPointError("in forward")

    model, away = Probe(look), Elsewhere(look)
    away.eval()
    if fails:
        with pytest.raises(FloatingPointError):
            measure_latency([model, away], FAST)
    else:
        measure_latency([model, away], FAST)
    assert (model.training, model.linear.training, model.frozen.training) == (True, True, False)
    assert not any(part.training for part in away.modules())
    assert model.linear.weight.device.type == "cpu"
    assert away.linear.weight.device.type == "meta"
    assert not away.linear.weight.is_inference()  # else it could never be trained again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_can_be_measured_on_a_gpu_and_trained_afterwards():
    model = build_classifier(CONFIG)
    settings = LatencySettings(device="cuda", length=8, min_seconds=0.01)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.device.type))
    measure_latency([model], settings)
    assert set(seen) == {"cuda"}
    assert model.device.type == "cpu" and model.training
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([1])).loss.backward()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", True),
        ("length", 1),
        ("length", 8.5),
        ("num_threads", 0),
        ("min_seconds", 0),
        ("min_seconds", math.nan),
        ("min_seconds", math.inf),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"latency.{name} is {value!r}"):
        LatencySettings(**{name: value})


@pytest.mark.parametrize("device", ["cuda:99", "meta", "warp", ""])
def test_a_device_that_torch_does_not_see_is_refused(device):
    with pytest.raises(
        UserError, match=f"latency.device is {device!r}, but torch has no such device here"
    ):
        LatencySettings(device=device)


def test_without_a_gpu_cuda_is_refused_and_the_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(
        UserError,
        match="latency.device is 'cuda', but torch has no such device here. Choose from: cpu.",
    ):
        LatencySettings(device="cuda")


def test_every_visible_gpu_has_a_name(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert LatencySettings(device="cuda").device == "cuda"
    assert LatencySettings(device="cuda:1").device == "cuda:1"
    with pytest.raises(UserError, match=r"'cuda:2'.*Did you mean 'cuda:\d'"):
        LatencySettings(device="cuda:2")


def test_a_batch_longer_than_the_model_is_refused_with_both_numbers(any_teacher: Path):
    config = AutoConfig.from_pretrained(any_teacher)
    longest = max_length(config)
    settings = LatencySettings(length=longest + 1)
    with pytest.raises(
        UserError, match=f"latency.length is {longest + 1}, .* takes at most {longest} tokens"
    ):
        measure_latency([build_classifier(config)], settings)
    with pytest.raises(
        UserError, match=f"latency.length is {longest + 1}, .* takes at most {longest} tokens"
    ):
        LatencyMeter(config, settings)


def test_the_meter_measures_every_family_at_its_longest(any_teacher: Path):
    config = AutoConfig.from_pretrained(any_teacher)
    measured = LatencyMeter(
        config, LatencySettings(length=max_length(config), min_seconds=0.01)
    ).measure(ARCH)
    assert measured.num_parameters == num_parameters(build_classifier(student_config(config, ARCH)))
    assert measured.student.median_ms > 0 and measured.teacher.median_ms > 0


def test_the_meter_measures_the_deployed_graphs_once(tiny_teacher: Path, monkeypatch):
    calls = []

    def fake(models, settings):
        calls.append(models)
        return [Latency(2.0, 0.1, 10), Latency(5.0, 0.2, 20)]

    monkeypatch.setattr(kdnas.deploy.latency, "measure_latency", fake)
    config = AutoConfig.from_pretrained(tiny_teacher)
    meter = LatencyMeter(config, FAST)
    first = meter.measure(ARCH)
    assert meter.measure(StudentArch(**ARCH.to_dict())) is first
    assert (first.student.median_ms, first.teacher.median_ms, first.speedup) == (2.0, 5.0, 2.5)
    other = StudentArch(2, 2, 32, 64)
    meter.measure(other)
    assert len(calls) == 2
    (student, teacher), (other_student, same_teacher) = calls
    assert same_teacher is teacher
    for model, layers, width in ((student, 1, 32), (other_student, 2, 32), (teacher, 4, 64)):
        assert type(model).__name__ == "BertForSequenceClassification"
        assert (len(model.bert.encoder.layer), model.config.hidden_size) == (layers, width)


def test_a_remembered_value_is_not_measured(tiny_teacher: Path, monkeypatch):
    monkeypatch.setattr(kdnas.deploy.latency, "measure_latency", None)
    meter = LatencyMeter(AutoConfig.from_pretrained(tiny_teacher), FAST)
    value = ArchLatency(Latency(1.0, 0.0, 1), Latency(4.0, 0.0, 1), 7)
    meter.remember(ARCH, value)
    assert meter.measure(ARCH) is value


def test_measuring_does_not_change_what_is_drawn_next(tiny_teacher: Path):
    meter = LatencyMeter(AutoConfig.from_pretrained(tiny_teacher), FAST)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    meter.measure(ARCH)
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("median", [math.nan, math.inf, 0.0, -1.0])
def test_a_median_that_is_no_time_fails_the_candidate(
    tiny_teacher: Path, monkeypatch, role, median
):
    latencies = {"student": Latency(2.0, 0.1, 10), "teacher": Latency(5.0, 0.2, 20)} | {
        role: Latency(median, 0.0, 1)
    }
    monkeypatch.setattr(
        kdnas.deploy.latency, "measure_latency", lambda models, settings: list(latencies.values())
    )
    meter = LatencyMeter(AutoConfig.from_pretrained(tiny_teacher), FAST)
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(
            CandidateFailed, match=f"the {role}'s latency was measured as {median} ms"
        ):
            meter.measure(ARCH)


# Backends


@pytest.fixture
def lengths_file(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.jsonl"
    path.write_text('5\n{"length": 9}\n\n17\n3\n')
    return path


@pytest.fixture(scope="module")
def graphs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graph of a classifier in both precisions."""
    folder = tmp_path_factory.mktemp("graphs")
    write_deployed(
        build_classifier(AutoConfig.from_pretrained(tiny_teacher)).eval(), folder, int8=True
    )
    return folder


@pytest.mark.parametrize("backend", ["torch", "torch-bf16", "onnxruntime"])
def test_a_model_is_measured_by_a_backend_and_comes_back_as_it_was(tiny_teacher: Path, backend):
    model = build_classifier(student_config(AutoConfig.from_pretrained(tiny_teacher), ARCH)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (latency,) = measure_latency(
        [model], LatencySettings(backend=backend, length=8, min_seconds=0.01)
    )
    assert 0 < latency.median_ms <= latency.p95_ms
    assert latency.tokens_per_second == pytest.approx(8 * latency.sequences_per_second)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(
        value.dtype == torch.float32 and value.equal(before[name])
        for name, value in model.state_dict().items()
    )


def test_bf16_is_in_bfloat16():
    seen = []

    class Bf16(Probe):
        def forward(self, **batch):
            seen.append(self.linear.weight.dtype)

    measure_latency([Bf16()], LatencySettings(backend="torch-bf16", length=8, min_seconds=1e-6))
    assert set(seen) == {torch.bfloat16}


def test_the_graph_is_in_eight_bits_where_that_is_asked_for(graphs: Path):
    kinds = {
        path.name: {t.data_type for t in onnx.load(path).graph.initializer}
        for path in graphs.glob("*.onnx")
    }
    assert kinds.keys() == {"model.onnx", "model.int8.onnx"}
    assert (
        onnx.TensorProto.INT8 in kinds["model.int8.onnx"]
        and onnx.TensorProto.INT8 not in kinds["model.onnx"]
    )
    assert (graphs / "model.int8.onnx").stat().st_size < 0.6 * (
        graphs / "model.onnx"
    ).stat().st_size


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-int8"])
def test_the_meter_writes_its_teacher_once_and_every_student(
    tiny_teacher: Path, graphs: Path, monkeypatch, backend
):
    written, opened = [], []
    open_session = kdnas.deploy.latency.open_session

    def write(model, folder, int8):
        written.append((model.config.hidden_size, model.training, int8))
        return graphs / ("model.int8.onnx" if int8 else "model.onnx")

    def watch(path, num_threads):
        opened.append((path.name, num_threads))
        return open_session(path, num_threads)

    monkeypatch.setattr(kdnas.deploy.latency, "write_deployed", write)
    monkeypatch.setattr(kdnas.deploy.latency, "open_session", watch)
    settings = LatencySettings(backend=backend, length=8, num_threads=2, min_seconds=0.01)
    meter = LatencyMeter(AutoConfig.from_pretrained(tiny_teacher), settings)
    assert meter.measure(ARCH).speedup > 0
    meter.measure(StudentArch(2, 2, 32, 64))
    int8 = backend == "onnxruntime-int8"
    assert sorted(written) == [(32, False, int8), (32, False, int8), (64, False, int8)]
    assert opened == [("model.int8.onnx" if int8 else "model.onnx", 2)] * 4


def test_a_workload_is_a_sample_of_real_lengths_with_padding(lengths_file: Path):
    seen = []
    settings = LatencySettings(lengths=str(lengths_file), batch_size=2, min_seconds=1e-6)
    (latency,) = measure_latency(
        [Probe(lambda _, batch: seen.append(batch["attention_mask"].clone()))], settings
    )
    assert sorted(itertools.chain(*settings.batches())) == [3, 5, 9, 17]
    shapes = {tuple(mask.sum(1).tolist()): mask.shape[1] for mask in seen}
    assert set(shapes) == {tuple(batch) for batch in settings.batches()}
    assert all(width == max(rows) for rows, width in shapes.items())
    assert latency.tokens_per_second == pytest.approx(latency.sequences_per_second * 34 / 4)


def test_a_long_workload_is_sampled_and_a_short_one_is_one_batch(tmp_path: Path):
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(f"{i + 1}\n" for i in range(1000)))
    batches = LatencySettings(lengths=str(path), batch_size=4).batches()
    assert [len(batch) for batch in batches] == [4] * 32
    assert batches == LatencySettings(lengths=str(path), batch_size=4).batches()
    assert max(map(max, batches)) > 900 and min(map(min, batches)) < 100
    path.write_text("4\n5\n")
    assert sorted(LatencySettings(lengths=str(path), batch_size=8).batches()[0]) == [4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("3\n0\n", "has 0"),
        ("true\n", "has True"),
        ('{"size": 3}\n', "has None"),
        ("3\nx\n", "read"),
    ],
)
def test_a_file_of_lengths_that_is_none_is_refused(tmp_path: Path, text, message):
    path = tmp_path / "lengths.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"latency.lengths: .*{message}"):
        LatencySettings(lengths=str(path)).batches()
    with pytest.raises(UserError, match="cannot read '/nowhere.jsonl'"):
        LatencySettings(lengths="/nowhere.jsonl").batches()


def test_a_real_length_beyond_the_positions_is_refused(lengths_file: Path, tiny_teacher: Path):
    lengths_file.write_text("5\n41\n")
    with pytest.raises(
        UserError, match="latency.length is 41 in .*lengths.jsonl', .* takes at most 40 tokens"
    ):
        LatencyMeter(
            AutoConfig.from_pretrained(tiny_teacher), LatencySettings(lengths=str(lengths_file))
        )


def test_a_backend_that_is_unknown_or_elsewhere_is_refused(monkeypatch):
    with pytest.raises(
        UserError,
        match="latency.backend is 'onnx', which is unknown. Choose from: cuda, onnxruntime",
    ):
        LatencySettings(backend="onnx")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(
        UserError, match="latency.device is 'cuda', but torch has no such device here"
    ):
        LatencySettings(backend="cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert LatencySettings(backend="cuda").device == "cuda"
    with pytest.raises(
        UserError, match="latency.backend is onnxruntime, which runs on the CPU, not on 'cuda'"
    ):
        LatencySettings(backend="onnxruntime", device="cuda")
