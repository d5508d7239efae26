"""Environment variables for the workers of a cluster on this host."""

import contextlib
import json
import os
import socket
from collections.abc import Sequence

from launch.cluster import proxy
from launch.cluster.hardware import GPU_VARIABLE, Share

_HOST = "127.0.0.1"


def environments(shares: Sequence[Share]) -> list[dict[str, str]]:
    """Returns each worker's environment: this process's variables and its own.

    Args:
        shares: the cores and GPUs of each worker.
    """
    addresses = [f"{_HOST}:{port}" for port in free_ports(len(shares))]
    return [
        {**os.environ, **_own(addresses, index, share)}
        for index, share in enumerate(shares)
    ]


def _own(addresses: list[str], index: int, share: Share) -> dict[str, str]:
    task = {"type": "worker", "index": index}
    config = {"cluster": {"worker": addresses}, "task": task}
    variables = {
        "TF_CONFIG": json.dumps(config),
        "PYTHONUNBUFFERED": "1",
        **proxy.exemption(os.environ, [_HOST]),
    }
    if share.gpus is not None:
        variables[GPU_VARIABLE] = share.gpus
    return variables


def free_ports(count: int) -> list[int]:
    """Returns ports that are free on all of this host's addresses: workers bind all."""
    with contextlib.ExitStack() as stack:
        # All are bound before any is released, so that no port is chosen twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
