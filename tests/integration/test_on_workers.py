"""The tests of the library, run by the workers of a real cluster on loopback.

Each worker is a pytest process that runs the same tests in the same order, so models
that are compared with one device train on all of them. See tests/conftest.py.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from breadth import only_exhaustive, pick

pytestmark = pytest.mark.integration

TESTS = pathlib.Path(__file__).resolve().parents[1]
SECONDS = 1200  # a hard limit; each takes one to five minutes on an idle machine
START = (
    "import pathlib, sys; from launch.supervisor import supervisor; "
    "sys.exit(supervisor.run(sys.argv[3:], num_workers=int(sys.argv[1]), "
    "workdir=pathlib.Path(sys.argv[2]), command=[sys.executable, '-m', 'pytest']))"
)


def run_tests(folder, num_workers, *arguments, replicas=1):
    """Runs pytest on each worker and returns how many tests each of them passed.

    Args:
        folder: The working folder of the run.
        num_workers: Number of workers.
        arguments: Arguments of pytest.
        replicas: Number of replicas of each worker.
    """
    options = ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=300"]
    result = subprocess.run(
        [sys.executable, "-c", START, str(num_workers), str(folder)]
        + [*options, *arguments],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "REPLICAS_PER_WORKER": str(replicas),
            # Several runs of pytest must not clean up one folder at the same time.
            "PYTEST_DEBUG_TEMPROOT": str(folder),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    logs = [folder / "logs" / f"worker-{i}.log" for i in range(num_workers)]
    texts = [log.read_text() for log in logs]
    assert result.returncode == 0, "\n".join([result.stderr, *texts])[-20_000:]
    found = [re.search(r"(\d+) passed", text) for text in texts]
    return [int(match[1]) if match else 0 for match in found]


# Beside test_workers.py: data, logs, loss scales, state and errors, where workers are
# more than replicas of one process.
FILES = (
    "test_accumulation.py",
    "test_cases.py",
    "test_data.py",
    "test_errors.py",
    "test_logs.py",
    "test_mixed_precision.py",
    "test_state.py",
)
FEW = [
    *("test_workers", "all_skip"),
    *("eager_branch", "table_beside"),
    *("bring", "scalar_beside and open", "unknown_length"),
    *("not_finite", "batches_without_rows and 2-unknown", "state_from_rows"),
    *("counts_are_exact", "scope_is_counted"),
]
# By default two workers run all of these, as importing TensorFlow takes some time.
RUNS = pick(
    [["test_workers.py", *FILES]],
    [["test_workers.py"], [f for f in FILES if f != "test_errors.py"]],
)


@pytest.mark.parametrize("files", RUNS, ids=lambda files: f"{len(files)} files")
def test_two_workers_agree_and_equal_one_device(tmp_path, files):
    """And are told when they cannot."""
    chosen = pick(["-k", " or ".join(f"({name})" for name in FEW)], [])
    paths = [f"tests/{name}" for name in files]
    passed = run_tests(tmp_path, 2, *paths, "-m", "not slow", *chosen)
    assert passed[0] == passed[1] > pick([70], [40])[0]


@only_exhaustive
@pytest.mark.parametrize("num_workers, classes", [(2, "Step or Eval"), (3, "Custom")])
def test_the_classes_of_the_guide_equal_one_device(tmp_path, num_workers, classes):
    """Uneven batches, some with fewer rows than workers; 1 and 4 fused steps."""
    arguments = ("tests/test_guide_classes.py", "-k", classes)
    passed = run_tests(tmp_path, num_workers, *arguments)
    assert passed == [passed[0]] * num_workers and passed[0] >= 1


def test_two_workers_of_two_replicas_equal_one_device(tmp_path):
    files = ["tests/test_workers.py", *pick([], ["tests/test_guide_classes.py"])]
    names = "shards or exchange or without_any or stand_in"
    more = f"{names} or WeightedStep or rows or backup or on_batch or drop"
    chosen = ("-k", *pick([names], [more]))
    passed = run_tests(tmp_path, 2, *files, *chosen, replicas=2)
    assert passed[0] == passed[1] > pick([6], [15])[0]
