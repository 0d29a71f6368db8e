"""Where the minutes of the main job go: each stage of ``kdnas run`` on the quickstart.

    python benchmarks/job.py [--quick] [--json PATH] [--config PATH] [other options of kdnas run]

For each stage: seconds; the share of one core that all processes of the job used together, in percent; real tokens a
second that were trained on (teacher states and scoring not counted); seconds that the FLOPs of these tokens would take
at the machine's peak, the fastest matmul on all cores; the peak of the memory that all processes held (shared pages
once); and what the run and its teacher's states then take on the disk. Nothing else should run meanwhile.
"""

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common  # isort: skip (before torch)

import psutil
from rich.console import Console
from rich.table import Table
from step import measure_matmuls, student_flops

from kdnas.cli.parser import read_config
from kdnas.commands import run as job
from kdnas.commands.config import RunConfig
from kdnas.commands.inputs import Inputs
from kdnas.models.arch import StudentArch
from kdnas.models.families import arch_of
from kdnas.system.files import Run, read_json, write_json
from kdnas.tasks.batches import GLUEDataModule

STAGES = {
    "load_inputs": "reading",
    "search_stage": "search",
    "full_kd_stage": "full KD",
    "finetune_stage": "fine-tuning",
    "export_stage": "export",
    "write_report": "report",
}
LOOK_SECONDS, MEMORY_SECONDS = 0.5, 5.0
QUICK = (
    "--data.max_length=16 --finetune.max_length=16 --latency.length=16 --latency.min_seconds=0.1 "
    "--search.n_trials=2 --search.num_epochs=1 --search.budget.speedup=1.5 "
    "--full_kd.num_epochs=1 --finetune.num_epochs=1 --finetune.batch_size=64"
).split()


@dataclass
class Watch:
    """Adds up what this process and all that it has started use."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    _cpu: dict[int, float] = field(default_factory=dict)  # seconds by process, ended ones too
    _peak: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Look again and again, in a thread."""
        ended = threading.Event()

        def look() -> None:
            last = 0.0
            while not ended.wait(LOOK_SECONDS):
                self._look(with_memory=time.monotonic() - last > MEMORY_SECONDS)
                last = time.monotonic() if time.monotonic() - last > MEMORY_SECONDS else last

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _look(self, with_memory: bool) -> None:
        memory = 0.0
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
                if with_memory:
                    memory += process.memory_full_info().pss
        self._peak = max(self._peak, memory)

    def timed(self, name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        """The same stage; what it uses is written down."""

        def call(*args: Any) -> Any:
            self._look(with_memory=False)
            began, before, self._peak = time.monotonic(), sum(self._cpu.values()), 0.0
            result = stage(*args)
            self._look(with_memory=True)
            seconds = time.monotonic() - began
            share = 100 * (sum(self._cpu.values()) - before) / seconds
            memory = self._peak / 1e9
            self.stages.append(
                {"name": name, "seconds": seconds, "cpu_share": share, "peak_memory_gb": memory}
            )
            return result

        return call


@dataclass(frozen=True)
class Work:
    """Real tokens that a stage trains on, and the FLOPs of the matmuls on them."""

    tokens: int
    flops: int

    @classmethod
    def of(cls, lengths: list[int], arch: StudentArch, num_epochs: int) -> "Work":
        """Forward and backward."""
        return cls(num_epochs * sum(lengths), 3 * num_epochs * student_flops(lengths, arch))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.flops + other.flops)


def work_of(config: RunConfig, inputs: Inputs) -> dict[str, Work]:
    """What each stage of a finished run has trained on."""
    run, lengths = inputs.run, inputs.data.rows.lengths
    mini = lengths[inputs.data.select("mini").train_ids()].tolist()
    whole = lengths[inputs.data.select("full").train_ids()].tolist()
    done = [read_json(path) for path in sorted(run.folder.glob("trial_*/result.json"))]
    trained = [StudentArch.from_dict(one["params"]) for one in done if one["state"] == "COMPLETE"]
    search = sum((Work.of(mini, arch, config.search.num_epochs) for arch in trained), Work(0, 0))
    student = StudentArch.from_yaml(run.best_student)
    found = {"search": search, "full KD": Work.of(whole, student, config.full_kd.num_epochs)}
    if inputs.task:
        settings, tokenizer = config.finetune, inputs.teacher.tokenizer
        data = GLUEDataModule(inputs.task, tokenizer, max_length=settings.max_length)
        data.setup()
        rows = [len(row["input_ids"]) for row in data.rows["train"]]
        cut = StudentArch.from_yaml(run.glue / "layer_cut" / "shape.yaml")
        archs = [arch_of(inputs.teacher.config), student, student, cut]
        found["fine-tuning"] = sum(
            (Work.of(rows, arch, settings.num_epochs) for arch in archs),
            Work(settings.num_epochs * sum(rows), 0),  # the static vectors
        )
    return found


def measure(config: RunConfig, console: Console) -> dict[str, Any]:
    """Do the whole job in a folder of its own."""
    peak = max(matmul["gflops"] for matmul in measure_matmuls(1.0))
    watch, loaded = Watch(), []
    for function, name in STAGES.items():
        setattr(job, function, watch.timed(name, getattr(job, function)))
    load = job.load_inputs
    job.load_inputs = lambda *args: loaded.append(load(*args)) or loaded[-1]  # type: ignore[func-returns-value]
    began = time.monotonic()
    with watch.running():
        job.run_stages(config, console)
    seconds = time.monotonic() - began
    work, run = work_of(config, loaded[0]), Run(config.root, config.name)
    for stage in watch.stages:
        done = work.get(stage["name"])
        stage["tokens_per_second"] = done.tokens / stage["seconds"] if done else None
        stage["flop_seconds"] = done.flops / peak / 1e9 if done else None
    sizes = {"run": _gigabytes(run.folder), "teacher states": _gigabytes(run.states)}
    return {
        "machine": common.machine(),
        "peak_gflops": peak,
        "stages": watch.stages,
        "total_minutes": seconds / 60,
        "disk_gb": sizes,
        "models": read_json(run.glue / "results.json")["models"],
    }


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def show(results: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(
        "stage", "seconds", "CPU", "tokens/s", "FLOPs at peak (s)", "memory (GB)", title="The job"
    )
    for stage in results["stages"]:
        tokens, flops = stage["tokens_per_second"], stage["flop_seconds"]
        table.add_row(
            stage["name"],
            f"{stage['seconds']:.1f}",
            f"{stage['cpu_share']:.0f} %",
            f"{tokens:,.0f}" if tokens else "",
            f"{flops:.1f}" if flops else "",
            f"{stage['peak_memory_gb']:.2f}",
        )
    console.print(table)
    disk = ", ".join(f"{name} {size:.2f} GB" for name, size in results["disk_gb"].items())
    console.print(f"{results['total_minutes']:.1f} minutes; on the disk: {disk}.")
    kept = {name: row["share_kept"] for name, row in results["models"].items()}
    console.print("Share kept: " + ", ".join(f"{name} {kept[name]:.1%}" for name in kept) + ".")


def main(args: list[str] | None = None) -> None:
    """Measure, show and write."""
    options = common.options("job", "Times the stages of the main job.", text=False)
    options.add_argument("--config", default="configs/quickstart.yaml", help="of kdnas run")
    chosen, more = options.parse_known_args(args)
    common.quieten()
    console = Console()
    common.OUTPUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=common.OUTPUT))
    try:
        asked = [f"--config={chosen.config}", f"--root={folder}", *(QUICK if chosen.quick else [])]
        config, _ = read_config(RunConfig, "run", [*asked, *more])
        results = {"quick": chosen.quick, **measure(config, console)}
    finally:
        shutil.rmtree(folder)
    show(results, console)
    write_json(chosen.json, results)
    console.print(f"Figures: {chosen.json}")


if __name__ == "__main__":
    main()
