"""Eight virtual CPU devices for every test, and the strategies on them.

If TF_CONFIG makes this process one of several workers, as in
integration/test_on_workers.py, all of them run the same tests, and a strategy of more
than one replica is that of the workers. Each has REPLICAS_PER_WORKER replicas.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import contextlib
import functools
import gc
import pathlib

import hypothesis
import keras
import pytest
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

import distfit
from distfit.cluster import workers
from distfit.strategy import make_virtual_devices

VIRTUAL_DEVICES = 8


def _create_cluster() -> tf.distribute.Strategy:
    """The strategy of the workers, each with its replicas on virtual CPU devices.

    TensorFlow supports more than one device per worker only if they are GPUs.
    """
    replicas = int(os.environ.get("REPLICAS_PER_WORKER", "1"))
    devices = make_virtual_devices(replicas) if replicas > 1 else ["CPU:0"]

    def local_devices(self, cluster_resolver, worker_device):
        return tuple(f"{worker_device}/device:{device}" for device in devices), "CPU"

    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    extended._initialize_local_devices = local_devices
    return distfit.create_strategy("multi_worker")


# Before any test module is imported: TensorFlow fixes its devices at its first use.
CLUSTER = _create_cluster() if "TF_CONFIG" in os.environ else None
if CLUSTER is None:
    make_virtual_devices(VIRTUAL_DEVICES)


gc.freeze()  # Imported objects stay.
# A graph is many objects that stay until its test ends: collecting costs 5 % else.
gc.set_threshold(50_000, 20, 100)

# The same examples in each run, so that failures come from the change under test.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@functools.cache
def _strategy(replicas: int) -> tf.distribute.Strategy:
    if CLUSTER is not None and replicas > 1:
        return CLUSTER
    devices = [f"CPU:{i}" for i in range(replicas)]
    name = "one_device" if replicas == 1 else "mirrored"
    return distfit.create_strategy(name, devices=devices)


@pytest.fixture(scope="session")
def make_strategy():
    """`make_strategy(n)`: a strategy with n replicas on virtual CPU devices."""
    return _strategy


def pytest_collection_modifyitems(config, items):
    """Leaves out tests that workers cannot run, or would only repeat."""
    if CLUSTER is None:
        unwanted = [item for item in items if item.get_closest_marker("workers")]
    else:
        numbers = (None, CLUSTER.num_replicas_in_sync)
        unwanted = [item for item in items if _replicas_of(item) not in numbers]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = _spread([item for item in items if item not in unwanted])


def _spread(items):
    """Spreads the files that start processes over the run, so that few run at a time.

    Others use the cores while these wait. Long files come early, and those of the
    partition, which are short, at the end: no core is idle there.
    """
    files: dict[pathlib.Path, list] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups: tuple[list, list] = [], []
    for file in reversed(files.values()):
        groups[file[0].get_closest_marker("integration") is None].append(file)
    placed = [
        (i / len(group), file) for group in groups for i, file in enumerate(group)
    ]
    return [item for _, file in sorted(placed, key=lambda p: p[0]) for item in file]


def _replicas_of(item) -> int | None:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("replicas")


@pytest.fixture(autouse=True)
def clean_session():
    """Every test starts with the same names and seeds.

    Memory is left to the garbage collector: a full collection before each test would
    take longer than many a test.
    """
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    yield
    if CLUSTER is not None:
        _meet_again(workers.of(CLUSTER))


def _meet_again(team: workers.Workers) -> None:
    """Waits for the other workers, which may be at another place after a failed test.

    They learn of it at their next exchange, fail as well and come here, too.
    """
    for _ in range(100):
        with contextlib.suppress(RuntimeError):
            team.tell("the end of a test")
            return
