"""Workers wait for each other before TensorFlow does."""

import socket
import threading
import time

import pytest

from launch.cluster import local
from launch.cluster.discovery import Cluster
from launch.run import rendezvous


def clusters(count, host="127.0.0.1"):
    """Returns a cluster of free ports of this host, as each of its workers sees it."""
    workers = tuple(f"{host}:{port}" for port in local.free_ports(count))
    return [Cluster(workers, i, "a test") for i in range(count)]


def port_of(cluster):
    return int(cluster.address.rpartition(":")[2])


class Worker:
    """A worker in a thread. Once all are there, it listens as TensorFlow does."""

    def __init__(self, cluster, **options):
        self.notes = []
        self.server = None
        self.thread = threading.Thread(target=self._run, args=(cluster, options))
        self.thread.daemon = True
        self.thread.start()

    def _run(self, cluster, options):
        rendezvous.wait_for_others(cluster, self.notes.append, **options)
        # TensorFlow listens on all addresses of the host.
        self.server = socket.create_server(
            ("", port_of(cluster)), family=socket.AF_INET6, dualstack_ipv6=True
        )

    def is_there(self, within=20.0):
        self.thread.join(within)
        return not self.thread.is_alive()


@pytest.fixture
def start():
    """`start(cluster)` starts a worker; none listens afterwards."""
    workers = []

    def start(cluster, **options):
        workers.append(Worker(cluster, **options))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.is_there():
            worker.server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_workers_meet_whoever_comes_first(start, host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    first, second, third = clusters(3, host)
    workers = [start(first), start(third)]
    assert not workers[0].is_there(within=0.7)
    assert workers[0].notes[-1] == "waiting for worker 1 to join"
    workers.append(start(second))
    assert all(worker.is_there() for worker in workers)


def test_a_worker_whose_tensorflow_listens_already_is_there(start):
    first, second = clusters(2)
    with socket.create_server(("127.0.0.1", port_of(second))):
        worker = start(first)
        assert worker.is_there()
    assert worker.notes == []


def test_whom_it_waits_for_is_noted_when_it_changes_and_said_once(start, capsys):
    first, second, third = clusters(3)
    waiting = start(first, said_after=0.3)
    assert not waiting.is_there(within=1.5)
    assert waiting.notes == ["waiting for workers 1, 2 to join"]
    addresses = f"{second.address}, {third.address}"
    expected = f"launch: waiting for 2 other workers to join: {addresses}\n"
    assert capsys.readouterr().err == expected
    others = [start(second)]
    time.sleep(0.7)
    others.append(start(third))
    assert all(worker.is_there() for worker in (waiting, *others))
    assert waiting.notes[1:] == ["waiting for worker 2 to join"]


def test_a_worker_alone_waits_for_nobody(start):
    (only,) = clusters(1)
    assert start(only).is_there()


def test_a_port_that_was_taken_meanwhile_is_an_error():
    first, _ = clusters(2)
    port = port_of(first)
    with socket.create_server(("", port)), pytest.raises(OSError, match=str(port)):
        rendezvous.wait_for_others(first, lambda phase: None)
