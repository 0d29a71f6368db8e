"""Files that execute code where they are loaded carelessly."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from safetensors.torch import load

from tests.faults.checks import is_one_line
from tests.faults.harness import Bench, Row, fault, name_of


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@contextmanager
def spoilt_teacher(bench: Bench) -> Iterator[Path]:
    folder = bench.folder / "spoilt"
    shutil.copytree(bench.teacher, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def yaml_tag(bench: Bench) -> str:
    touch = "!!python/object/apply:pathlib.Path"
    return f"name: {touch}.touch [{touch} ['{bench.canary}']]\n"


@fault("F16", "pickles and YAML tags that execute: weights, checkpoints, states, configs, results")
def pickles(bench: Bench, row: Row) -> None:
    payload = {"state_dict": Payload(bench.canary)}
    with spoilt_teacher(bench) as folder:
        weights, states = folder / "pytorch_model.bin", f"--states.folder={folder / 'states'}"
        tensors = load((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        torch.save(payload, weights)
        args = bench.search(bench.new_name(), f"--teacher={folder}", states, "--search.n_trials=1")
        bench.refuse(
            row,
            "weights",
            args,
            f"'{weights}' is truncated, or holds Python objects other than tensors",
        )
        torch.save(tensors, weights)
        bench.succeed(row, "weights of tensors alone", args)

    torch.save(payload, checkpoint := bench.folder / "evil.ckpt")
    arch = '{"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32'
    options = {
        "model.teacher": bench.teacher,
        "model.arch": f'{arch}, "intermediate_size": 64}}',
        "data.text": bench.text,
        "ckpt_path": checkpoint,
    }
    args = ["fit", *(f"--{key}={value}" for key, value in options.items())]
    bench.refuse(row, "checkpoint of fit", args, f"'{checkpoint}' is damaged or holds")
    checkpoint.unlink()

    run = bench.run(bench.reference)
    (shard,) = bench.states.rglob("*.bin")
    stored = shard.read_bytes()
    torch.save(payload, shard)
    error = bench.succeed(row, "shard", bench.search(bench.new_name()))
    row.tried += 1
    is_mended = f"{shard} is damaged" in error and shard.read_bytes() == stored
    row.fault("undetected", f"shard: {error}", not is_mended)
    bench.look_at_canary(row, "shard")

    (config := bench.folder / "a.yaml").write_text(yaml_tag(bench))
    words = "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply"
    bench.refuse(row, "config", ["search", f"--config={config}"], words)
    known = (run / "manifest.json").read_bytes()
    torch.save(payload, run / "manifest.json")
    bench.refuse(row, "manifest", ["verify", str(run)], f"'{run / 'manifest.json'}' is damaged")
    (run / "manifest.json").write_bytes(known)
    bench.succeed(row, "manifest as it was", ["verify", str(run)])
    if not bench.quick:
        pickles_in_run(bench, row)


def pickles_in_run(bench: Bench, row: Row) -> None:
    """The same in each file that a run goes on from: refused in a line, or the file is made again."""
    args, whole = bench.stopped_run()
    run, last = bench.run(name_of(args)), Path("full_kd/last.ckpt")
    state, evil = torch.load(whole / last, weights_only=True), Payload(bench.canary)
    array = io.BytesIO()
    numpy.save(array, numpy.array([evil], dtype=object), allow_pickle=True)

    def saved(value: object) -> bytes:
        torch.save(value, content := io.BytesIO())
        return content.getvalue()

    callbacks = state["callbacks"] | {"random": evil}
    tag = yaml_tag(bench).encode()
    carriers = {
        "checkpoint": ([run / last], saved(evil)),
        "optimizer's state": ([run / last], saved(state | {"optimizer_states": [evil]})),
        "random state": ([run / last], saved(state | {"callbacks": callbacks})),
        "weights": ([*run.glob("trial_*/weights.safetensors")], saved(evil)),
        "moments": ([*run.glob("trial_*/optimizer.safetensors")], saved(evil)),
        "results": ([*run.glob("trial_*/result.json")], saved(evil)),
        "config of the run": ([run / "config.yaml"], tag),
        "best student": ([run / "best_student.yaml"], tag),
        "tokens": ([*(bench.logs / "tokens").glob("*/variant00.bin")], array.getvalue()),
        "shards": ([*bench.states.rglob("*.bin")], array.getvalue()),
        "database": ([run / "study.db"], saved(evil)),
    }
    made_again = ("tokens", "shards", "database")
    for what, (paths, content) in carriers.items():
        if what in ("weights", "moments"):
            (run / last).unlink()  # else they are not read
        known = {path: path.read_bytes() for path in paths}
        for path in paths:
            path.write_bytes(content)
        code, error = bench.call(args)
        row.tried += 1
        is_mended = code == 0 and any(path.read_bytes() != content for path in known)
        is_told = code == 2 and is_one_line(error) and any(f"{path}'" in error for path in paths)
        is_right = is_mended if what in made_again else is_told
        row.fault("undetected", f"{what}: exit {code}, {error}", not is_right)
        bench.look_at_canary(row, what)
        for path, stored in known.items():
            path.write_bytes(stored)
        shutil.rmtree(run)
        shutil.copytree(whole, run)


@fault("F17", "code in a checkpoint, with an answer on stdin and without")
def remote_code(bench: Bench, row: Row) -> None:
    code = f"import pathlib\npathlib.Path({str(bench.canary)!r}).touch()\n"
    classes = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    for answer in (lambda *_: "y", mock.Mock(side_effect=EOFError)):
        with spoilt_teacher(bench) as folder, mock.patch("builtins.input", answer):
            (folder / "evil.py").write_text(code)
            for name in ("config.json", "tokenizer_config.json"):
                config = json.loads((folder / name).read_text()) | {"auto_map": classes}
                (folder / name).write_text(json.dumps(config))
            args = bench.search(bench.new_name(), f"--teacher={folder}", "--search.n_trials=1")
            bench.succeed(row, "a known model, whose code is left alone", args)
            bench.look_at_canary(row, "a known model")
            config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil"}
            (folder / "config.json").write_text(json.dumps(config))
            bench.refuse(row, "an unknown one", args, "'evil' is not supported")
