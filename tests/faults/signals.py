"""Signals: a command ends in time, with its code, and goes on later."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import torch

from tests.faults.checks import kill_all, steps_told
from tests.faults.harness import Bench, Row, fault
from tests.faults.kills import outcome

CODES = {SIGTERM: 143, SIGINT: 130, SIGUSR1: 143}


def stop(row: Row, process: subprocess.Popen[str], number: int, of: str, times: int = 1) -> None:
    """Signal a whole process group: it must end within 10 s, after two signals within 5."""
    what, begun = f"{of}, {times} x {signal.Signals(number).name}", time.monotonic()
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        time.sleep(0.05)
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        error = kill_all(process)
    wait = time.monotonic() - begun
    row.tried += 1
    row.waited(wait)
    row.fault("undetected", f"{what}: it took {wait:.1f} s", wait > (10 if times == 1 else 5))
    is_right = process.returncode == CODES[signal.Signals(number)] and "Traceback" not in error
    row.fault("undetected", f"{what}: exit {process.returncode}, {error}", not is_right)


@fault("F04", "SIGTERM, SIGINT, SIGUSR1, once and twice, in search, full KD and fine-tuning")
def signals(bench: Bench, row: Row) -> None:
    stop_fits(bench, row)
    cases = [(SIGTERM, 1, 0), (SIGTERM, 1, 2)]
    if not bench.quick:
        cases = [(s, times, n) for s in CODES for times in (1, 2) for n in (0, 2)] * 7
    for number, times, num_workers in cases:
        name, slots = bench.new_name(), bench.random.choice((1, 1, 1, 2))
        parts = [f"--data.num_workers={num_workers}", f"--workers={slots}"]
        args = bench.search(name, "--search.num_epochs=100000", *parts)
        process = bench.start(args)
        bench.wait_for_trial(process, name)
        time.sleep(bench.random.uniform(0, 2))
        stop(row, process, number, " ".join(parts), times)
        if times == 1:
            bench.check_stopped(row, name, {})
        else:
            bench.check_traces(row, name)  # the second signal does not wait for anything


def stop_fits(bench: Bench, row: Row) -> None:
    """One run is stopped in full KD and in fine-tuning, and keeps every step of both."""
    epochs = 8 if bench.quick else 40  # enough that it is not over before it is stopped
    options = [f"--full_kd.num_epochs={epochs}", f"--finetune.num_epochs={epochs}"]
    if not bench.quick:
        bench.succeed(row, "unbroken", bench.job(whole := bench.new_name(), *options))
    for number in (SIGUSR1,) if bench.quick else [*CODES] * 5:
        run = bench.run(name := bench.new_name())
        num_workers = bench.random.choice((0, 2))
        args = bench.job(name, *options, f"--data.num_workers={num_workers}")
        for folder in (run / "full_kd", run / "glue"):
            process = bench.start(args)
            while process.poll() is None and not list(folder.rglob("last.ckpt")):
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, 0.3))
            stop(row, process, number, f"{args[-1]}, in {folder.name}")
            kept = [(steps_of(path), steps_told(path.parent)) for path in folder.rglob("last.ckpt")]
            is_short = not kept or any(steps < told for steps, told in kept)
            row.fault("lost", f"in {folder.name}, steps kept and made: {kept}", is_short)
        bench.go_on(row, f"signals {number}", args, {})
        is_equal = bench.quick or outcome(bench, name) == outcome(bench, whole)
        row.fault("unequal", f"after signals {number}", not is_equal)


def steps_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])
