"""Two hosts with addresses of their own: a worker on each, joined by TF_CONFIG."""

import json
import signal
import subprocess
import sys
import time

import job
import marked
import namespaces
import pytest
from breadth import only_exhaustive

pytestmark = pytest.mark.integration

WORKERS = [f"{address}:2222" for address in namespaces.ADDRESSES]

# Nothing listens there: workers must reach each other without the proxy.
PROXY = {"http_proxy": "http://127.0.0.1:9"}

# Sends a byte there and back.
SERVER = """
import socket
server = socket.create_server(("10.77.0.2", 2223))
print("ready", flush=True)
connection, _ = server.accept()
for _ in range(5):
    connection.sendall(connection.recv(1))
"""
CLIENT = """
import socket, time
connection = socket.create_connection(("10.77.0.2", 2223))
times = []
for _ in range(5):
    began = time.monotonic()
    connection.sendall(b"?")
    connection.recv(1)
    times.append(time.monotonic() - began)
print(min(times))
"""


class Run:
    """A worker on each of two hosts, which share a folder."""

    def __init__(self, hosts, folder, environ, **options):
        self.folder = job.write_module(folder)
        self.processes = [
            self._start(hosts, i, {**environ, "TF_CONFIG": _tf_config(i)}, **options)
            for i in range(2)
        ]

    def _start(self, hosts, index, environ, **options):
        with open(self.folder / f"log-{index}", "w") as log:
            return subprocess.Popen(
                hosts.command(index, *job.command(**options)),
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, index):
        return (self.folder / f"log-{index}").read_text()

    def logs(self):
        return "\n".join(map(self.log, range(2)))

    def wait(self):
        deadline = time.monotonic() + job.SECONDS
        return [p.wait(max(deadline - time.monotonic(), 0)) for p in self.processes]

    def wait_for_steps(self, count):
        """Waits until the chief has recorded step `count` or later."""
        path = self.folder / "out" / "logs" / "worker-0.progress.json"
        deadline = time.monotonic() + job.SECONDS
        while not path.exists() or json.loads(path.read_text())["step"] < count:
            assert time.monotonic() < deadline, self.logs()
            assert self.processes[0].poll() is None, self.logs()
            time.sleep(0.1)


def _tf_config(index):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": WORKERS}, "task": task})


@pytest.fixture
def start(tmp_path):
    """`start(hosts, ...)` starts a worker on each; none is left afterwards."""
    made = []
    with marked.environment(**job.variables(), **PROXY) as environ:

        def start(hosts, **options):
            made.append(Run(hosts, tmp_path, environ, **options))
            return made[-1]

        yield start
    for run in made:
        run.wait()


def _round_trip(hosts):
    server = subprocess.Popen(
        hosts.command(1, sys.executable, "-c", SERVER), stdout=subprocess.PIPE
    )
    try:
        server.stdout.readline()
        client = hosts.command(0, sys.executable, "-c", CLIENT)
        return float(subprocess.run(client, capture_output=True, timeout=20).stdout)
    finally:
        server.kill()
        server.communicate()


def test_workers_on_two_hosts_train_to_the_numbers_of_one_device(start, tmp_path):
    """Over a slow network."""
    with namespaces.hosts(delay=0.02) as hosts:
        assert _round_trip(hosts) >= 0.04
        run = start(hosts)
        assert run.wait() == [0, 0], run.logs()
    assert f"2 workers, from TF_CONFIG; this is worker 0 at {WORKERS[0]}" in run.log(0)
    job.check_as_on_one_device(tmp_path)


# With the chief ends what TensorFlow coordinates the workers by. By default one is cut
# off, as below, and workers of one host are killed.
@only_exhaustive
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_ends_the_one_on_the_other_host(start, killed):
    with namespaces.hosts() as hosts:
        run = start(hosts, dataset="endless")
        run.wait_for_steps(20)
        run.processes[killed].kill()
        began = time.monotonic()
        codes = run.wait()
        seconds = time.monotonic() - began
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, -signal.SIGKILL), run.logs()
    assert seconds < 60  # measured: 2.2 and 4.5 s


def test_a_host_that_is_cut_off_ends_both_workers(start):
    with namespaces.hosts() as hosts:
        run = start(hosts, dataset="endless")
        run.wait_for_steps(20)
        hosts.cut()
        began = time.monotonic()
        codes = run.wait()
        seconds = time.monotonic() - began
    assert 0 not in codes, run.logs()
    assert seconds < 90  # measured: 21 s
