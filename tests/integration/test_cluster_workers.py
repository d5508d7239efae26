"""Unsupervised workers of a cluster: how they end when another does not come."""

import json
import signal
import subprocess
import time

import job
import marked
import pytest

from launch.cluster import local

pytestmark = pytest.mark.integration

# Worker 1 keeps sending heartbeats, so TensorFlow waits for it.
MODULE = """
import json
import os
import time

from mine import Batches


class Hangs(Batches):
    count = 0  # of batches, which come in any order

    def __getitem__(self, i):
        self.count += 1
        worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        if worker == 1 and self.count == 20:
            time.sleep(1000)
        return super().__getitem__(i)


def hangs(config):
    return Hangs(), None
"""


class Workers:
    """Workers on free ports of this host."""

    def __init__(self, folder, environ, count):
        self.folder = job.write_module(folder)
        (folder / "theirs.py").write_text(MODULE)
        self.processes = {}
        self._environ = environ
        self._ports = local.free_ports(count)

    def start(self, index, *flags):
        workers = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        place = (f"--workers={workers}", f"--worker_index={index}")
        with open(self._log(index), "w") as log:
            self.processes[index] = subprocess.Popen(
                [*job.command(*place, *flags), "--dataset=theirs:hangs"],
                cwd=self.folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def end(self, index):
        """Returns the exit code and the output."""
        code = self.processes[index].wait(job.SECONDS)
        return code, self._log(index).read_text()

    def wait_for_steps(self, count):
        path = self.logs / "worker-0.progress.json"
        deadline = time.monotonic() + job.SECONDS
        while not path.exists() or json.loads(path.read_text())["step"] < count:
            assert time.monotonic() < deadline and self.processes[0].poll() is None
            time.sleep(0.1)

    @property
    def logs(self):
        return self.folder / "out" / "logs"

    def _log(self, index):
        return self.folder / f"log-{index}"


@pytest.fixture
def workers(tmp_path):
    """Two workers that are not started yet; none is left afterwards."""
    with marked.environment(**job.variables()) as environ:
        made = Workers(tmp_path, environ, 2)
        yield made
    for process in made.processes.values():
        process.wait()


def test_a_worker_that_nobody_joins_ends_and_says_for_whom_it_has_waited(workers):
    workers.logs.mkdir(parents=True)
    old = {"worker": 1, "step": 57, "phase": "between steps", "entered": 57}
    old |= {"time": 5.0, "alive": 6.0, "pid": 1, "host": "a-host", "reading": False}
    (workers.logs / "worker-1.progress.json").write_text(json.dumps(old))
    workers.start(0, "--stall_timeout=12")
    code, log = workers.end(0)
    assert code == 1
    assert "launch: waiting for 1 other worker to join: 127.0.0.1:" in log
    assert "in wait_for_others" in log
    assert log.splitlines()[-1] == (
        "launch: No progress for 12 s. Received: worker 0 waiting for worker 1 to "
        "join, worker 1 without a progress file in the working folder. See the stacks "
        "in each worker's stderr: workers may start late, have ended for good, or not "
        "reach each other."
    )


def test_sigterm_ends_workers_that_wait_for_each_other_in_a_step(workers):
    for index in range(2):
        workers.start(index, "--stop_timeout=6")
    workers.wait_for_steps(10)
    time.sleep(3)  # Steps take a hundredth of that.
    for index in range(2):
        began = time.monotonic()
        workers.processes[index].send_signal(signal.SIGTERM)
        code, log = workers.end(index)
        assert code == 143 and time.monotonic() - began < 20, log
        error = json.loads((workers.logs / f"worker-{index}.error.json").read_text())
        assert (error["type"], error["code"]) == ("SystemExit", 143)
        if index == 0:
            expected = "before it has saved: --stop_timeout=6 has passed"
            assert log.endswith(f"launch: ended by SIGTERM, {expected}\n")
