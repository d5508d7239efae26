"""Who may import whom, and that only one file touches private names or all_reduce."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "distfit").rglob("*.py"))
# From the bottom: a file imports only from files in layers below its own.
LAYERS = [
    ("_keras",),
    ("collectives",),
    ("workers",),
    ("predictions",),
    ("data", "metrics", "random", "normalization", "optimizers", "finite"),
    ("losses", "strategy", "callbacks"),
    ("probe", "build"),
    ("driver",),
    ("agreement",),
    ("loop",),
    ("model",),
    ("verification",),
    ("__init__",),
    ("datasets",),
    ("models",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(path):
    return path.relative_to(ROOT / "distfit").with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = _module(path)
    for name in _imported(path):
        parts = name.split(".")
        assert parts[0] != "launch"
        if parts[0] != "distfit" or len(parts) == 1:
            continue
        other = parts[1] if parts[1] in LEVEL else "__init__"
        if other != own:
            assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_and_exchanges_are_in_one_file(path):
    text = path.read_text()
    if path.name != "_keras.py":
        assert "keras.src" not in text
        assert "tensorflow.python" not in text
    if path.name != "collectives.py":
        assert "context.all_reduce(" not in text


def test_launch_imports_tensorflow_only_where_a_worker_runs():
    allowed = {
        "worker.py",
        "parts.py",
        "heartbeat.py",
        "saving.py",
        "metrics_log.py",
        "verification.py",
    }
    for path in (ROOT / "launch").glob("*.py"):
        roots = {name.split(".")[0] for name in _imported(path)}
        if roots & {"tensorflow", "keras", "distfit"}:
            assert path.name in allowed, path.name
