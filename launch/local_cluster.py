"""What the environment tells each worker of a cluster on this host."""

import contextlib
import json
import os
import socket
from collections.abc import Sequence

from launch.hardware import GPU_VARIABLE, Share


def environments(shares: Sequence[Share]) -> list[dict[str, str]]:
    """Returns the environment variables of each worker: this process's, and its own."""
    addresses = _addresses(len(shares))
    return [_environment(addresses, i, share) for i, share in enumerate(shares)]


def _environment(addresses: list[str], index: int, share: Share) -> dict[str, str]:
    cluster = {"worker": addresses}
    config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
    own = {"TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1"}
    if share.gpus is not None:
        own[GPU_VARIABLE] = share.gpus
    return {**os.environ, **own}


def _addresses(count: int) -> list[str]:
    """Returns addresses of this host whose ports are free."""
    with contextlib.ExitStack() as stack:
        # All are bound before the first is let go, so that none is chosen twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
