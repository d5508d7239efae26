"""Which modules may import which; private names and exchanges are in one place each."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "distfit").rglob("*.py"))
# From the bottom: a file imports only from files in layers below its own.
LAYERS = [
    ("_keras",),
    ("partition", "cluster.workers"),
    ("training.batch", "training.checks", "training.inputs", "training.logs"),
    ("training.checkpoint", "training.randomness", "training.shares"),
    (
        "training.compiling",
        "training.data_clock",
        "training.finite",
        "training.iterators",
        "training.passes",
        "training.reading",
    ),
    ("training.global_batches",),
    ("training.state",),
    ("strategy", "training.predictions"),
    ("callbacks", "training.eager", "training.shards"),
    ("training.data", "training.driver", "training.predict_driver"),
    ("training.drivers",),
    ("cluster.agreement",),
    ("training.epochs", "training.resuming", "training.saving"),
    ("training.loop", "training.training"),
    ("training.fitting",),
    ("model",),
    ("verification",),
    ("__init__",),
    ("datasets",),
    ("models",),
]
# The same within `partition`.
PARTITION = [
    ("exchanges", "layouts", "registry", "tracing"),
    ("findings", "program"),
    ("values",),
    ("emission",),
    ("rules",),
    ("step",),
]


def _levels(layers):
    return {name: level for level, names in enumerate(layers) for name in names}


def _layer(module, levels):
    """The layer of `module`, a dotted name without `distfit`; else that of the top."""
    names = [module]
    while "." in names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return next((name for name in names if name in levels), "__init__")


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
    own = _layer(".".join(_module(path)), levels)
    assert own != "__init__" or path.name == "__init__.py", "It has no layer yet."
    for name in _imported(path):
        package, _, module = name.partition(".")
        assert package != "launch"
        if package != "distfit" or not module:
            continue
        other = _layer(module, levels)
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
        "run/earlier.py",
        "run/ledger.py",
        "run/worker.py",
        "run/setup.py",
        "run/saving.py",
        "run/metrics_log.py",
        "run/verification.py",
        "watchdog/heartbeat.py",
    }
    folder = ROOT / "launch"
    for path in folder.rglob("*.py"):
        roots = {name.split(".")[0] for name in _imported(path)}
        if roots & {"tensorflow", "keras", "distfit"}:
            assert path.relative_to(folder).as_posix() in allowed, path
