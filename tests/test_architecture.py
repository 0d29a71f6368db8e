"""The layout of kdnas/: one ordered list, and what no file may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kdnas"

# The reading order: a file imports only from files above it.
ORDER = """
errors.py
pages.py
tables.py
safe_yaml.py
hub.py
predict.py
signals.py
supervisor.py
runs.py
teacher_files.py
manifest.py
arch.py
families.py
models.py
graph.py
precision.py
data/masking.py
data/readers.py
data/corpus.py
data/pairs.py
data/loader.py
data/tokens.py
data/datamodule.py
distill/layer_map.py
distill/losses.py
distill/narrowing.py
student_init.py
distill/objectives.py
distill/attention.py
distill/sentences.py
distill/cache.py
distill/metrics.py
distill/teacher.py
distill/optimizers.py
progress.py
training.py
distill/curves.py
distill/module.py
latency.py
nas/reward.py
nas/space.py
nas/record.py
nas/controller.py
nas/sampler.py
nas/callbacks.py
nas/candidate.py
nas/unsent.py
nas/storage.py
nas/search.py
nas/trials.py
nas/workers.py
pictures.py
nas/board.py
glue/rows.py
glue/tasks.py
glue/scores.py
glue/batches.py
glue/finetune.py
glue/task_distill.py
quantize.py
sentence_export.py
card.py
export.py
trust.py
report.py
config.py
latency_table.py
export_job.py
report_job.py
job.py
pipeline.py
comparison.py
api.py
smoke.py
rates.py
plan.py
options.py
fit_job.py
cli.py
__main__.py
""".split()

MAX_LINES = 400
CALLABLE = "distill/__init__.py"  # `from kdnas import distill` is a function and a package
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_KEYWORDS = {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True)}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package by its path in the list, parsed."""
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported name, in functions too: ``a.b`` for ``from a import b``; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def layout_faults(root: Path) -> Iterator[str]:
    found = {name for name, _ in sources(root) if not name.endswith("__init__.py")}
    yield from (f"{name} is not in the list" for name in sorted(found - set(ORDER)))
    yield from (f"{name} is in the list, but not there" for name in ORDER if name not in found)


def order_faults(root: Path) -> Iterator[str]:
    modules = {"kdnas." + name.removesuffix(".py").replace("/", "."): place for place, name in enumerate(ORDER)}
    for name, tree in sources(root):
        # An __init__.py imports nothing of ours, but for the two behind `from kdnas import distill, search`.
        stands_for = "cli.py" if name in ("__init__.py", CALLABLE) else name
        place = ORDER.index(stands_for) if stands_for in ORDER else -1
        for imported in imports(tree):
            if imported.startswith("."):
                yield f"{name} imports {imported}: write kdnas. in full"
            elif imported.split(".")[0] == "kdnas" and imported != "kdnas.__version__":
                target = modules.get(imported, modules.get(imported.rpartition(".")[0]))
                if target is None:
                    yield f"{name} imports {imported}, which is no file of the list"
                elif target >= place:
                    yield f"{name} imports {imported}, which is not above it"


def optuna_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        if not name.startswith("nas/") and any(i.split(".")[0] == "optuna" for i in imports(tree)):
            yield f"{name} imports optuna"


def init_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        if name.endswith("__init__.py") and name != CALLABLE:
            for node in tree.body:
                is_door = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
                is_typing = isinstance(node, ast.ImportFrom) and node.module == "typing"
                is_constant = isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Constant)
                if not (is_door or is_typing or is_constant):
                    yield f"{name}:{node.lineno} does more than name a version"


def import_time_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        for node in tree.body:
            calls = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            targets = node.targets if isinstance(node, ast.Assign) else []
            sets = any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets)
            if name not in ("__main__.py", CALLABLE) and (calls or sets):
                yield f"{name}:{node.lineno} acts when it is imported"


def name_faults(root: Path) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name, _ in sources(root):
        base = name.rpartition("/")[2]
        if base != "__init__.py" and seen.setdefault(base, name) != name:
            yield f"{name} has the same name as {seen[base]}"


def length_faults(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES:
            yield f"{path.relative_to(root).as_posix()} has {num_lines} lines"


def unsafe_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        yield from (f"{name} imports {i}" for i in imports(tree) if i.split(".")[0] in PICKLERS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                keywords = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
                for keyword, value in sorted(keywords & UNSAFE_KEYWORDS):
                    yield f"{name}:{node.lineno} passes {keyword}={value}"
                if ast.unparse(node.func) == "torch.load" and ("weights_only", True) not in keywords:
                    yield f"{name}:{node.lineno} calls torch.load without weights_only=True"


def test_every_file_is_in_the_list_and_every_entry_is_a_file():
    assert list(layout_faults(ROOT)) == []


def test_files_import_only_from_files_above_them():
    assert list(order_faults(ROOT)) == []


def test_optuna_is_imported_under_nas_only():
    assert list(optuna_faults(ROOT)) == []


def test_init_files_are_nearly_empty():
    assert list(init_faults(ROOT)) == []


def test_importing_a_module_does_nothing():
    assert list(import_time_faults(ROOT)) == []


def test_basenames_are_unique():
    assert list(name_faults(ROOT)) == []
    assert len({name.rpartition("/")[2] for name in ORDER}) == len(ORDER)


def test_no_file_is_longer_than_the_limit():
    assert list(length_faults(ROOT)) == []


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    assert list(unsafe_faults(ROOT)) == []


def make_tree(root: Path, name: str = "errors.py", text: str = '"""Nothing."""') -> Path:
    """A package without a fault, but for the one file that is given."""
    for other in ORDER:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_text('"""Nothing."""\n')
    (root / "__init__.py").write_text('"""A package."""\n\n__version__ = "1"\n')
    (root / name).write_text(text)
    return root


CHECKS = [
    layout_faults,
    order_faults,
    optuna_faults,
    init_faults,
    import_time_faults,
    name_faults,
    length_faults,
    unsafe_faults,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_tree_without_a_fault_passes(check, tmp_path):
    assert list(check(make_tree(tmp_path))) == []


def test_files_above_may_be_imported_in_every_way(tmp_path):
    text = "import kdnas.errors\nfrom kdnas import __version__, errors\nfrom kdnas.errors import UserError"
    assert list(order_faults(make_tree(tmp_path, "runs.py", text))) == []


@pytest.mark.parametrize(
    ("check", "name", "text", "fault"),
    [
        (layout_faults, "helpers.py", "", "helpers.py is not in the list"),
        (order_faults, "runs.py", "from kdnas.cli import main", "kdnas.cli.main, which is not above it"),
        (order_faults, "runs.py", "import kdnas.arch", "runs.py imports kdnas.arch, which is not above it"),
        (order_faults, "runs.py", "from kdnas import arch", "runs.py imports kdnas.arch, which is not above it"),
        (order_faults, "runs.py", "def f():\n    from kdnas.nas import space", "kdnas.nas.space, which is not above"),
        (order_faults, "runs.py", "from kdnas import runs", "runs.py imports kdnas.runs, which is not above it"),
        (order_faults, "runs.py", "from kdnas.helpers import x", "kdnas.helpers.x, which is no file"),
        (order_faults, "runs.py", "from . import errors", "runs.py imports ..errors: write kdnas. in full"),
        (order_faults, "nas/__init__.py", "from kdnas.nas import search", "kdnas.nas.search, which is not above"),
        (optuna_faults, "pipeline.py", "from optuna.trial import Trial", "pipeline.py imports optuna"),
        (optuna_faults, "latency.py", "def f():\n    import optuna as o", "latency.py imports optuna"),
        (init_faults, "data/__init__.py", "import torch", "data/__init__.py:1 does more"),
        (init_faults, "data/__init__.py", '"""Doc."""\nx = f()', "data/__init__.py:2 does more"),
        (import_time_faults, "latency.py", "torch.set_num_threads(1)", "latency.py:1 acts"),
        (import_time_faults, "cli.py", "import os\nos.environ['A'] = 'b'", "cli.py:2 acts"),
        (import_time_faults, "cli.py", "import torch\ntorch.backends.x = True", "cli.py:2 acts"),
        (name_faults, "nas/cache.py", "", "nas/cache.py has the same name as distill/cache.py"),
        (length_faults, "export.py", "x = 1\n" * 401, "export.py has 401 lines"),
        (unsafe_faults, "export.py", "import pickle", "export.py imports pickle"),
        (unsafe_faults, "export.py", "from joblib import load", "export.py imports joblib.load"),
        (unsafe_faults, "export.py", "f(trust_remote_code=True)", "export.py:1 passes trust_remote_code=True"),
        (unsafe_faults, "export.py", "torch.load(p)", "export.py:1 calls torch.load without weights_only=True"),
        (unsafe_faults, "export.py", "torch.load(p, weights_only=False)", "export.py:1 passes weights_only=False"),
        (unsafe_faults, "export.py", "np.load(p, allow_pickle=True)", "export.py:1 passes allow_pickle=True"),
    ],
)
def test_each_check_finds_its_fault(check, name, text, fault, tmp_path):
    assert any(fault in found for found in check(make_tree(tmp_path, name, text)))


def test_an_entry_without_a_file_is_found(tmp_path):
    root = make_tree(tmp_path)
    (root / "report.py").unlink()
    assert list(layout_faults(root)) == ["report.py is in the list, but not there"]
