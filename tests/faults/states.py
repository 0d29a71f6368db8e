"""The teacher's stored states: damaged, built by two at once, older or newer than they look."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.checks import kill_all, times
from tests.faults.harness import Bench, Row, fault, name_of


def damages(shard: Path, other: Path) -> dict[str, Callable[[], Any]]:
    content = shard.read_bytes()
    number, _, suffix = shard.name.partition(".")

    def flip(place: int) -> None:
        changed = bytearray(content)
        changed[place] ^= 1
        shard.write_bytes(changed)

    def swap() -> None:
        shard.write_bytes(other.read_bytes())
        other.write_bytes(content)

    return {
        "first bit": lambda: flip(0),
        "middle bit": lambda: flip(len(content) // 2),
        "last bit": lambda: flip(-1),
        "one byte less": lambda: shard.write_bytes(content[:-1]),
        "empty": lambda: shard.write_bytes(b""),
        "one byte more": lambda: shard.write_bytes(content + b"\0"),
        "swapped": swap,
        "gone": shard.unlink,
        "another's name": lambda: shard.rename(
            shard.with_name(f"{number}.{other.name.partition('.')[2]}")
        ),
        "half written": lambda: shard.rename(shard.with_name(f".{number}.{suffix}.partial")),
    }


@fault("F08", "a stored shard that is damaged, cut, swapped, gone, renamed or half written")
def shards(bench: Bench, row: Row) -> None:
    folder, whole = bench.folder / "two_shards", bench.new_name()
    options = (f"--states.folder={folder}", "--data.num_mask_variants=2", "--search.num_epochs=2")
    bench.succeed(row, "unharmed", bench.search(whole, *options))
    pair = sorted(folder.rglob("*.bin"))
    known = {path: path.read_bytes() for path in pair}
    for shard, other in (pair,) if bench.quick else (pair, pair[::-1]):
        for what, damage in list(damages(shard, other).items())[:: 8 if bench.quick else 1]:
            before = times([other])
            damage()
            row.tried += 1
            bench.go_on(row, what, bench.search(bench.new_name(), *options), {}, like=whole)
            stored = {path: path.read_bytes() for path in sorted(folder.rglob("*.bin"))}
            row.fault("undetected", what, stored != known)
            again = what != "swapped" and times([other]) != before
            row.fault("unequal", f"{what}: the other shard was stored again", again)


@fault("F09", "two searches store a teacher's states at once; in half, one is killed", quick=False)
def two_builders(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018
    (whole,) = bench.states.rglob("*.bin")
    for number in range(1 if bench.quick else 20):
        states = bench.folder / f"states{number}"
        searches = [bench.search(bench.new_name(), f"--states.folder={states}") for _ in range(2)]
        processes = [bench.start(args) for args in searches]
        if number % 2 == 0:  # the one that computes, or the one that waits
            while processes[0].poll() is None and not states.exists():
                time.sleep(0.002)
            time.sleep(bench.random.uniform(0, 0.1))
            kill_all(processes[0])
            processes[0] = bench.start(searches[0])
        for args, process in zip(searches, processes, strict=True):
            _, error = process.communicate()
            row.tried += 1
            bench.check(row, name_of(args), {}, error)
        stored = [(path.name, path.read_bytes()) for path in states.rglob("*.bin")]
        is_equal = stored == [(whole.name, whole.read_bytes())]
        row.fault("unequal", [name for name, _ in stored], not is_equal)
