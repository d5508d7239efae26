"""`python -m launch --num_workers=2` as a user starts it: what it does, how it ends."""

import json
import os
import re
import signal
import subprocess
import time

import job
import marked
import pytest
from breadth import only_exhaustive, pick

pytestmark = pytest.mark.integration

# In each of them, worker 1 differs from worker 0.
MODULE = """
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
import tensorflow as tf
from mine import Batches, build, rows


def worker():
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


class Hangs(Batches):
    def __getitem__(self, i):
        if i == 20 and worker() == 1:
            time.sleep(1000)  # here
        return super().__getitem__(i)


class Dies(Batches):
    def __getitem__(self, i):
        if i == 20 and worker() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class NotANumber(Batches):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        if i == 4:
            y[5] = np.nan  # Of 8 rows, the last 4 are those of replica 1.
        return x, y


def in_order(batches):
    spec = (tf.TensorSpec([8, 3]), tf.TensorSpec([8, 1]))
    return tf.data.Dataset.from_generator(
        lambda: (batches[i] for i in range(len(batches))), output_signature=spec
    )


def hangs(config):
    return in_order(Hangs()), None


def dies(config):
    return in_order(Dies()), None


def not_a_number(config):
    return in_order(NotANumber()), None


def quits(config):
    if worker() == 1:
        sys.exit("no data here")
    return rows(config)


def longer_on_one(config):
    (x, y), validation = rows(config)
    cut = 40 if worker() == 1 else 48
    return (x[:cut], y[:cut]), validation
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "theirs.py").write_text(MODULE)
    return job.write_module(tmp_path)


def launch(folder, *flags, module="theirs", dataset="rows"):
    """Runs it to its end; no process that it started may be left."""
    command = [*job.command("--num_workers=2", *flags), f"--dataset={module}:{dataset}"]
    with marked.environment(**job.variables()) as environ:
        del environ["TF_CPP_MIN_LOG_LEVEL"]  # The output is checked.
        result = subprocess.run(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=job.SECONDS,
        )
        assert marked.left(environ, within=1.0) == {}
    return result


def log(folder, worker):
    return (folder / "out" / "logs" / f"worker-{worker}.log").read_text()


def test_two_workers_train_and_evaluate_to_the_numbers_of_one_device(folder):
    result = launch(folder, module="mine")
    assert (result.returncode, result.stderr) == (0, "")
    job.check_as_on_one_device(folder)
    assert result.stdout.startswith("cluster: 2 workers, from TF_CONFIG; this is wor")
    assert result.stdout.count("Epoch 1/3") == 1
    assert "MultiWorkerMirroredStrategy" in result.stdout
    names = {path.name for path in (folder / "out").iterdir()}
    results = {"checkpoints", "config.json", "metrics.jsonl", "model.json"}
    assert names == {*results, "model.keras", "logs", ".lock"}
    assert log(folder, 0) == result.stdout and "replicas" not in log(folder, 1)
    command = ["evaluate", "--workdir=out", "--model=mine:build", "--num_workers=2"]
    evaluated = launch(folder, *command, module="mine")
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    line = next(x for x in evaluated.stdout.splitlines() if x.startswith("loss"))
    last = job.epochs(folder)[-1]["val_loss"]
    assert float(line.split()[1]) == pytest.approx(last, rel=1e-4)


def test_the_first_to_fail_is_named_last(folder):
    result = launch(folder, module="mine", dataset="broken")
    assert result.returncode == 1
    expected = "launch: worker 1 failed first, with"
    assert result.stderr.splitlines()[-1].startswith(expected), result.stderr
    assert "a mistake in the data of worker 1" in result.stderr
    assert "mine.py" in result.stderr and "launch: failed" not in log(folder, 0)


# The report is that of test_root_cause.py, the exit code that of test_exit_codes.py.
@only_exhaustive
def test_a_worker_that_ends_itself_with_a_text_is_named_with_it(folder):
    result = launch(folder, dataset="quits")
    assert result.returncode == 1
    expected = "launch: worker 1 failed first, with SystemExit: no data here"
    assert result.stderr.splitlines()[-1] == expected
    assert log(folder, 1).endswith("launch: no data here\n")


# Small scripts are killed in test_supervisor.py.
@only_exhaustive
def test_a_worker_that_is_killed_is_named(folder):
    result = launch(folder, dataset="dies")
    assert result.returncode == 1
    assert "worker 1 was killed by SIGKILL" in result.stderr.splitlines()[-1]


def test_a_worker_that_hangs_is_named_with_its_step_and_stack(folder):
    result = launch(folder, "--stall_timeout=6", dataset="hangs")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("launch: No progress for 6 s."), result.stderr
    found = re.search(
        r"worker 1 in step (\d+)(, making its data)?, while worker 0", last
    )
    assert found and 18 <= int(found[1]) <= 21, last  # Batches are prefetched.
    (line,) = [n for n, s in enumerate(MODULE.splitlines(), 1) if s.endswith("# here")]
    assert f'theirs.py", line {line} in __getitem__' in log(folder, 1)
    # The other dumps its stacks as well, unless it first sees that this one is gone.
    assert re.search("most recent call first|another worker is gone", log(folder, 0))


# Workers run the test of test_errors.py that says the same.
@only_exhaustive
def test_a_loss_that_is_not_a_number_names_the_replica_of_its_worker(folder):
    result = launch(folder, "--steps_per_epoch=9", dataset="not_a_number")
    assert result.returncode == 1
    assert "step 5 on replica 1" in result.stderr.splitlines()[-1], result.stderr


# The error is that of test_workers.py; test_launch.py and test_supervisor.py have what
# becomes of such an error in one process, and of one that all workers have.
@only_exhaustive
def test_workers_with_different_data_are_refused_in_one_line(folder):
    result = launch(folder, dataset="longer_on_one")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    expected = "number of batches of the data: 6 on worker 0, 5 on worker 1"
    assert expected in result.stderr
    assert not (folder / "out" / "metrics.jsonl").exists()


# A process alone is interrupted in test_launch.py, scripts in test_supervisor.py.
@pytest.mark.parametrize(
    "number, code",
    pick([(signal.SIGTERM, 143)], [(signal.SIGINT, 130), (signal.SIGTERM, 143)]),
)
def test_a_signal_ends_all_workers(folder, number, code):
    command = [*job.command("--num_workers=2"), "--dataset=mine:endless"]
    with marked.environment(**job.variables()) as environ:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # If the tests run in the background, children would ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        _wait_for_steps(folder, process, 5)
        began = time.monotonic()
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
        assert marked.left(environ, within=1.0) == {}
    assert process.returncode == code, err
    assert err.splitlines()[-1] in ("launch: interrupted", "launch: terminated")


def _wait_for_steps(folder, process, count):
    path = folder / "out" / "logs" / "worker-0.progress.json"
    deadline = time.monotonic() + job.SECONDS
    while not path.exists() or json.loads(path.read_text())["step"] < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
