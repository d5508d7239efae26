"""Waits until all workers of a cluster are up, before TensorFlow joins them.

TensorFlow waits for a missing worker forever, without a word and holding the GIL:
neither a signal nor a watchdog could end that. Here a worker counts as up when
something listens on its port: at first a socket of this module, and soon TensorFlow's
server. Nothing is sent.
"""

import socket
import sys
import time
from collections.abc import Callable, Sequence

from launch.cluster.discovery import Cluster, host_and_port
from launch.watchdog import progress

_SAID_AFTER = 10.0  # seconds
_POLL = 0.2  # seconds
_LOOPBACK = "127.0.0.1"
_CONNECTING = 1.0  # seconds, at most


def wait_for_others(
    cluster: Cluster,
    note: Callable[[str], object],
    *,
    said_after: float = _SAID_AFTER,
) -> None:
    """Returns when all workers of the cluster have called it, or have joined already.

    Args:
        cluster: the cluster, seen from this worker.
        note: called with a phase, such as "waiting for worker 1 to join", each time
            that this changes.
        said_after: seconds after which that is also printed, with the addresses.

    Raises:
        OSError: this worker's port is in use.
    """
    began, said = time.monotonic(), False
    missing = [i for i in range(cluster.num_workers) if i != cluster.index]
    noted: list[int] = []
    # Each other worker connects once, and no connection is accepted.
    with _listen(cluster.address, backlog=cluster.num_workers):
        while missing := [i for i in missing if not _listens(cluster.workers[i])]:
            if missing != noted:
                noted = missing
                note(progress.waiting_for(missing))
            if not said and time.monotonic() - began > said_after:
                said = True
                _say(cluster, missing)
            time.sleep(_POLL)


def _say(cluster: Cluster, missing: Sequence[int]) -> None:
    addresses = ", ".join(cluster.workers[i] for i in missing)
    print(
        f"launch: waiting for {len(missing)} other worker{'s' * (len(missing) > 1)} "
        f"to join: {addresses}",
        file=sys.stderr,
        flush=True,
    )


def _listen(address: str, backlog: int) -> socket.socket:
    """Listens on all addresses of this host, as TensorFlow does, or on loopback alone.

    The latter where the cluster is on this host: TensorFlow itself cannot.
    """
    host, port = host_and_port(address)
    if host == _LOOPBACK:
        return socket.create_server((host, port), backlog=backlog)
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        backlog=backlog,
    )


def _listens(address: str) -> bool:
    try:
        with socket.create_connection(host_and_port(address), _CONNECTING) as made:
            # A connection to a free port of this host may connect to itself.
            return made.getsockname() != made.getpeername()
    except OSError:
        return False
