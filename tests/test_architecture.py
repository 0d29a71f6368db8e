"""The layout of kdnas/: the order of its packages, and what no file may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kdnas"

# The reading order, foundations first: a package imports only from itself and from packages above it.
ORDER = "system models training data distillation tasks deploy nas report commands api cli".split()
LIGHT = "api.py"  # what ``kdnas/__init__.py`` imports, so it imports nothing of ours before it is called

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
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def package_of(name: str) -> str:
    """``nas`` of ``nas/search.py``, ``api`` of ``api.py``; empty for ``__init__.py`` and ``__main__.py``."""
    first = name.split("/")[0].removesuffix(".py")
    return "" if first.startswith("__") else first


def layout_faults(root: Path) -> Iterator[str]:
    found = {package_of(name) for name, _ in sources(root)} - {""}
    yield from (f"{name} is not in the order" for name in sorted(found - set(ORDER)))
    yield from (f"{name} is in the order, but not there" for name in ORDER if name not in found)


def order_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        package = package_of(name)
        place = ORDER.index(package) if package in ORDER else len(ORDER)
        for imported in imports(tree):
            first, _, rest = imported.partition(".")
            target = rest.split(".")[0]
            if imported.startswith("."):
                yield f"{name} imports {imported}: write kdnas. in full"
            elif (
                first == "kdnas"
                and target in ORDER
                and ORDER.index(target) > place
                and name != LIGHT
            ):
                yield f"{name} imports {imported}, which is not above it"
            elif first == "kdnas" and target and target not in (*ORDER, "__version__"):
                yield f"{name} imports {imported}, which is no package of the order"


def optuna_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        if not name.startswith(("nas/", "report/")) and any(
            i.split(".")[0] == "optuna" for i in imports(tree)
        ):
            yield f"{name} imports optuna"


def init_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        if name.endswith("__init__.py"):
            for node in tree.body:
                is_door = isinstance(node, ast.ImportFrom) and node.module == "kdnas.api"
                is_constant = isinstance(node, ast.Expr | ast.Assign) and isinstance(
                    node.value, ast.Constant
                )
                if not (is_door or is_constant):
                    yield f"{name}:{node.lineno} does more than name a version"


def import_time_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        for node in tree.body:
            calls = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            targets = node.targets if isinstance(node, ast.Assign) else []
            sets = any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets)
            if name != "__main__.py" and (calls or sets):
                yield f"{name}:{node.lineno} acts when it is imported"


def unsafe_faults(root: Path) -> Iterator[str]:
    for name, tree in sources(root):
        yield from (f"{name} imports {i}" for i in imports(tree) if i.split(".")[0] in PICKLERS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                keywords = {
                    (k.arg, k.value.value)
                    for k in node.keywords
                    if isinstance(k.value, ast.Constant)
                }
                for keyword, value in sorted(keywords & UNSAFE_KEYWORDS):
                    yield f"{name}:{node.lineno} passes {keyword}={value}"
                if (
                    ast.unparse(node.func) == "torch.load"
                    and ("weights_only", True) not in keywords
                ):
                    yield f"{name}:{node.lineno} calls torch.load without weights_only=True"


def test_every_package_is_in_the_order():
    assert list(layout_faults(ROOT)) == []


def test_packages_import_only_from_packages_above_them():
    assert list(order_faults(ROOT)) == []


def test_optuna_is_imported_by_the_search_and_its_report_only():
    assert list(optuna_faults(ROOT)) == []


def test_init_files_are_nearly_empty():
    assert list(init_faults(ROOT)) == []


def test_importing_a_module_does_nothing():
    assert list(import_time_faults(ROOT)) == []


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    assert list(unsafe_faults(ROOT)) == []


def make_tree(root: Path, name: str = "system/errors.py", text: str = '"""Nothing."""') -> Path:
    """A package without a fault, but for the one file that is given."""
    for package in ORDER:
        path = root / ("api.py" if package == "api" else f"{package}/__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""Nothing."""\n')
    (root / "__init__.py").write_text('"""A package."""\n\n__version__ = "1"\n')
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)
    return root


CHECKS = [
    layout_faults,
    order_faults,
    optuna_faults,
    init_faults,
    import_time_faults,
    unsafe_faults,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_tree_without_a_fault_passes(check, tmp_path):
    assert list(check(make_tree(tmp_path))) == []


def test_packages_above_and_its_own_may_be_imported_in_every_way(tmp_path):
    text = "import kdnas.system.errors\nfrom kdnas import __version__\nfrom kdnas.models.arch import StudentArch"
    assert list(order_faults(make_tree(tmp_path, "models/hub.py", text))) == []


@pytest.mark.parametrize(
    ("check", "name", "text", "fault"),
    [
        (layout_faults, "helpers.py", "", "helpers is not in the order"),
        (
            order_faults,
            "data/pairs.py",
            "from kdnas.cli.main import main",
            "kdnas.cli.main.main, which is not above",
        ),
        (
            order_faults,
            "data/pairs.py",
            "import kdnas.nas.space",
            "data/pairs.py imports kdnas.nas.space, which is",
        ),
        (
            order_faults,
            "data/pairs.py",
            "def f():\n    from kdnas.nas import space",
            "kdnas.nas.space, which is not",
        ),
        (
            order_faults,
            "data/pairs.py",
            "from kdnas.helpers import x",
            "kdnas.helpers.x, which is no package",
        ),
        (
            order_faults,
            "data/pairs.py",
            "from . import errors",
            "data/pairs.py imports ..errors: write kdnas. in full",
        ),
        (
            order_faults,
            "nas/__init__.py",
            "from kdnas.cli import main",
            "kdnas.cli.main, which is not above",
        ),
        (
            optuna_faults,
            "deploy/onnx.py",
            "from optuna.trial import Trial",
            "deploy/onnx.py imports optuna",
        ),
        (
            optuna_faults,
            "deploy/onnx.py",
            "def f():\n    import optuna as o",
            "deploy/onnx.py imports optuna",
        ),
        (init_faults, "data/__init__.py", "import torch", "data/__init__.py:1 does more"),
        (init_faults, "data/__init__.py", '"""Doc."""\nx = f()', "data/__init__.py:2 does more"),
        (
            import_time_faults,
            "deploy/latency.py",
            "torch.set_num_threads(1)",
            "deploy/latency.py:1 acts",
        ),
        (
            import_time_faults,
            "cli/main.py",
            "import os\nos.environ['A'] = 'b'",
            "cli/main.py:2 acts",
        ),
        (
            import_time_faults,
            "cli/main.py",
            "import torch\ntorch.backends.x = True",
            "cli/main.py:2 acts",
        ),
        (unsafe_faults, "deploy/onnx.py", "import pickle", "deploy/onnx.py imports pickle"),
        (
            unsafe_faults,
            "deploy/onnx.py",
            "from joblib import load",
            "deploy/onnx.py imports joblib.load",
        ),
        (
            unsafe_faults,
            "deploy/onnx.py",
            "f(trust_remote_code=True)",
            "onnx.py:1 passes trust_remote_code=True",
        ),
        (
            unsafe_faults,
            "deploy/onnx.py",
            "torch.load(p)",
            "onnx.py:1 calls torch.load without weights_only=True",
        ),
        (
            unsafe_faults,
            "deploy/onnx.py",
            "torch.load(p, weights_only=False)",
            "onnx.py:1 passes weights_only=False",
        ),
        (
            unsafe_faults,
            "deploy/onnx.py",
            "np.load(p, allow_pickle=True)",
            "onnx.py:1 passes allow_pickle=True",
        ),
    ],
)
def test_each_check_finds_its_fault(check, name, text, fault, tmp_path):
    assert any(fault in found for found in check(make_tree(tmp_path, name, text)))


def test_a_package_that_is_gone_is_found(tmp_path):
    root = make_tree(tmp_path)
    (root / "report" / "__init__.py").unlink()
    assert list(layout_faults(root)) == ["report is in the order, but not there"]
