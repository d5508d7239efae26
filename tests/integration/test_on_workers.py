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
from breadth import pick

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


def test_two_workers_agree_and_are_told_when_they_cannot(tmp_path):
    passed = run_tests(tmp_path, 2, "tests/test_workers.py")
    assert passed[0] == passed[1] > 40


def test_what_equals_one_device_on_replicas_does_so_on_two_workers(tmp_path):
    """The cases, and what is specific to workers: data, logs, loss scales, state."""
    files = (
        "test_accumulation.py",
        "test_cases.py",
        "test_data.py",
        "test_logs.py",
        "test_mixed_precision.py",
        "test_state.py",
    )
    names = "overflow or bring or shard or eager or beside or on_batch or state"
    names += " or contrastive or gan or normalization or unknown"
    # Of several kinds of data, sizes and types, the one that takes most to get right.
    names = (
        f"({names}) and not (fixed or generator or pydataset or 1-unknown or float32)"
    )
    chosen = pick(["-k", names], [])
    passed = run_tests(
        tmp_path, 2, *(f"tests/{name}" for name in files), "-m", "not slow", *chosen
    )
    assert passed[0] == passed[1] > pick([20], [90])[0]


@pytest.mark.parametrize(
    "num_workers, classes",
    pick([(3, "CustomEval")], [(2, "Step or Eval"), (3, "Custom")]),
)
def test_the_classes_of_the_guide_equal_one_device(tmp_path, num_workers, classes):
    """Uneven batches, some with fewer rows than workers; 1 and 4 fused steps."""
    arguments = ("tests/test_guide_classes.py", "-k", classes)
    passed = run_tests(tmp_path, num_workers, *arguments)
    assert passed == [passed[0]] * num_workers and passed[0] >= 1


def test_two_workers_of_two_replicas_equal_one_device(tmp_path):
    files = ("tests/test_workers.py", "tests/test_guide_classes.py")
    names = "WeightedStep or shards or rows or exchange or backup or on_batch or drop"
    passed = run_tests(tmp_path, 2, *files, "-k", names, replicas=2)
    assert passed[0] == passed[1] > 15
