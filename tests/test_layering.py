"""Who may import whom, and that one place touches private names and one exchanges."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "distfit").rglob("*.py"))
# From the bottom: a file imports only from files in layers below its own.
LAYERS = [
    ("_keras",),
    ("partition", "workers"),
    ("build", "predictions", "shares"),
    ("data", "finite", "strategy"),
    ("callbacks", "driver"),
    ("agreement",),
    ("loop",),
    ("model",),
    ("verification",),
    ("__init__",),
    ("datasets",),
    ("models",),
]
# The same within `partition`. At its end, `emission` imports the rules so that they
# are known.
PARTITION = [
    ("exchanges", "layouts", "tracing"),
    ("findings", "program"),
    ("emission",),
    ("rules",),
    ("step",),
]


def _levels(layers):
    return {name: level for level, names in enumerate(layers) for name in names}


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(path):
    return path.relative_to(ROOT / "distfit").with_suffix("").parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    levels = _levels(LAYERS)
    own = _module(path)[0]
    for name in _imported(path):
        parts = name.split(".")
        assert parts[0] != "launch"
        if parts[0] != "distfit" or len(parts) == 1:
            continue
        other = parts[1] if parts[1] in levels else "__init__"
        if other != own:
            assert levels[other] < levels[own], f"{own} imports {other}"


PARTS = [path for path in FILES if _module(path)[0] == "partition"]


@pytest.mark.parametrize("path", PARTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_within_the_partition_go_downwards(path):
    levels = _levels(PARTITION)
    own = _module(path)[1]
    for name in _imported(path):
        parts = name.split(".")
        if parts[0] != "distfit":
            continue
        assert parts[1] in ("_keras", "partition")
        if parts[1] == "_keras" or parts[2] == own:
            continue
        if (own, parts[2]) != ("emission", "rules"):
            assert levels[parts[2]] < levels[own], f"{own} imports {parts[2]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_and_exchanges_are_in_one_place(path):
    """`exchanges` sums and gathers; how TensorFlow does it is in `_keras/graphs`."""
    text = path.read_text()
    module = ".".join(_module(path))
    if not module.startswith("_keras"):
        assert "keras.src" not in text
        assert "tensorflow.python" not in text
    if module != "_keras.graphs":
        assert "batch_reduce_to(" not in text
    if module not in ("_keras.graphs", "partition.exchanges"):
        assert "sum_over_replicas(" not in text
    assert ".all_reduce(" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_attribute_of_a_class_or_module_is_replaced(path):
    """`import distfit` leaves Keras and TensorFlow as they were."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = getattr(node, "targets", [])
        for target in targets:
            if isinstance(target, ast.Attribute):
                root = ast.unparse(target).split(".")[0]
                assert root not in ("keras", "tf", "tensorflow"), ast.unparse(node)


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
