"""Finds the cluster that this process is a worker of, and checks its description.

The first of these that describes a cluster is used:

1. `--workers=host:port,... --worker_index=i`;
2. TF_CONFIG (tf_config.py), which `launch` also sets for the workers it starts;
3. Slurm, in a step with several tasks (slurm.py);
4. a Kubernetes Job with `completionMode: Indexed`: JOB_COMPLETION_INDEX is the index of
   this pod, `--num_workers` the number of pods. Their host names follow from this
   pod's, `<job>-<index>.<service>.<namespace>.svc...`, which needs a headless service.
   They listen on port 2222.

Workers that 1 or 2 put on one host share its GPUs, unless CUDA_VISIBLE_DEVICES is set.
Mistakes are reported here, without TensorFlow, which would wait forever for a missing
worker, or abort the process. Anyone who can reach a worker's port can run code in it:
TensorFlow does not authenticate connections.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launch.cluster import hardware, proxy, slurm, tf_config
from launch.cluster.hardware import GPU_VARIABLE
from launch.errors import UsageError

KUBERNETES_PORT = 2222
# How long host names may take to resolve. The containers of a job start one after the
# other, and in Kubernetes DNS lags behind them.
_SECONDS = 10.0
_SECONDS_IN_KUBERNETES = 60.0
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(%\w+)?\]|[\w.-]+):(?P<port>\d{1,5})")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, seen from one of them.

    Attributes:
        workers: their addresses `host:port` by rank; the first is the chief.
        index: the rank of this process.
        source: where the description came from, for messages.
        local_index, local_workers: its rank among the workers on its host, and how many
            they are.
        evaluator: whether this process takes no part in training.
        gpus: the GPUs of this worker, for CUDA_VISIBLE_DEVICES; None: all visible ones.
    """

    workers: tuple[str, ...]
    index: int
    source: str
    local_index: int = 0
    local_workers: int = 1
    evaluator: bool = False
    gpus: str | None = None

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @property
    def is_chief(self) -> bool:
        return self.index == 0 and not self.evaluator

    @property
    def address(self) -> str:
        return self.workers[self.index]

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Returns the environment variables that describe the cluster to TensorFlow.

        In them the chief is always worker 0, whatever the source.

        Args:
            environ: the current environment variables.
        """
        task = {"type": "worker", "index": self.index}
        config = {"cluster": {"worker": list(self.workers)}, "task": task}
        hosts = [host_and_port(address)[0] for address in self.workers]
        exempt = proxy.exemption(environ, hosts)
        variables = {"TF_CONFIG": json.dumps(config), **exempt}
        if self.gpus is not None:
            variables[GPU_VARIABLE] = self.gpus
        return variables

    def __str__(self) -> str:
        number = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}"
        return (
            f"cluster: {number}, from {self.source}; "
            f"this is worker {self.index} at {self.address}"
        )


def discover(
    environ: Mapping[str, str],
    *,
    workers: str | None = None,
    worker_index: int | None = None,
    num_workers: int | None = None,
    hostname: Callable[[], str] = socket.getfqdn,
    gpus: Callable[[], list[str]] = hardware.own_gpus,
) -> Cluster | None:
    """Returns the cluster that this process belongs to, None if nothing describes one.

    Args:
        environ: the environment variables.
        workers, worker_index, num_workers: the flags of these names.
        hostname: returns the fully qualified name of this host.
        gpus: returns the GPUs of this host.

    Raises:
        UsageError: the description is malformed, or --num_workers contradicts it.
    """
    found = _from_flags(workers, worker_index) or _from_tf_config(environ)
    if found is not None:
        found = _with_share_of_gpus(found, environ, gpus)
    else:
        found = _from_slurm(environ)
        found = found or _from_kubernetes(environ, num_workers, hostname)
    if found is None:
        return None
    _check_addresses(found)
    if num_workers not in (None, found.num_workers):
        raise UsageError(
            f"{found.source} describes a cluster of a different size. Received: "
            f"--num_workers={num_workers}, and {found.num_workers} workers "
            f"{', '.join(found.workers)}. Leave --num_workers out."
        )
    return found


def check_reachable(
    cluster: Cluster,
    *,
    environ: Mapping[str, str] = os.environ,
    resolve: Callable[[str, int], Any] = socket.getaddrinfo,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Checks that this worker's port is free and that the workers' addresses differ.

    Names that do not resolve are retried for 10 s, in Kubernetes for 60 s.

    Args:
        cluster: the cluster to check.
        environ: the environment variables.
        resolve: does what `socket.getaddrinfo` does with a host and a port.
        clock: returns the time in seconds.
        sleep: sleeps for a number of seconds.

    Raises:
        UsageError: the first problem that is found.
    """
    _check_port_is_free(cluster)
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environ
    seconds = _SECONDS_IN_KUBERNETES if in_kubernetes else _SECONDS
    began = clock()
    known = _resolved(cluster.workers, resolve)
    if missing := [a for a in cluster.workers if a not in known]:
        print(
            f"launch: waiting up to {seconds:.0f} s for these hosts to resolve: "
            f"{', '.join(missing)}",
            file=sys.stderr,
            flush=True,
        )
    while missing and clock() - began < seconds:
        sleep(1.0)
        known |= _resolved(missing, resolve)
        missing = [address for address in missing if address not in known]
    if missing:
        raise UsageError(
            "Some hosts of the cluster do not resolve. Received: "
            f"{', '.join(missing)} from {cluster.source}. Correct the names, or add "
            "them to DNS or to this host's /etc/hosts."
        )
    _check_all_differ(cluster, [known[address] for address in cluster.workers])


def _from_flags(workers: str | None, index: int | None) -> Cluster | None:
    if (workers is None) != (index is None):
        given = f"--workers={workers}" if index is None else f"--worker_index={index}"
        raise UsageError(
            "--workers and --worker_index go together. "
            f"Received: {given} alone. Give both, or neither."
        )
    if workers is None or index is None:
        return None
    addresses = tuple(address.strip() for address in workers.split(","))
    if not 0 <= index < len(addresses):
        raise UsageError(
            f"No worker has that index. Received: --worker_index={index}, with "
            f"{len(addresses)} in --workers={workers}. Count them from 0."
        )
    return _located(Cluster(addresses, index, "--workers"))


def _from_tf_config(environ: Mapping[str, str]) -> Cluster | None:
    text = environ.get("TF_CONFIG", "").strip()
    task = tf_config.parse(text) if text else None
    if task is None:
        return None
    found = Cluster(task.workers, task.index, "TF_CONFIG", evaluator=task.evaluator)
    return found if task.evaluator else _located(found)


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    step = slurm.read(environ)
    if step is None:
        return None
    gpus = slurm.share_of_gpus(environ, step)
    return _located(Cluster(step.workers, step.rank, "Slurm", gpus=gpus))


def _from_kubernetes(
    environ: Mapping[str, str], num_workers: int | None, hostname: Callable[[], str]
) -> Cluster | None:
    text = environ.get("JOB_COMPLETION_INDEX")
    if text is None:
        return None
    if num_workers is None:
        raise UsageError(
            "The size of this pod's indexed Job is unknown. Received: "
            f"JOB_COMPLETION_INDEX={text}, no --num_workers. Give --num_workers=N, the "
            "completions of the Job, or unset JOB_COMPLETION_INDEX if each pod is a "
            "separate run."
        )
    if not text.isdecimal() or int(text) >= num_workers:
        raise UsageError(
            "JOB_COMPLETION_INDEX must be a number below --num_workers. Received: "
            f"JOB_COMPLETION_INDEX={text}, --num_workers={num_workers}. Give the "
            "completions of the Job, which must equal its parallelism."
        )
    pod, _, domain = hostname().rstrip(".").partition(".")
    if not domain or not pod.endswith(f"-{text}"):
        raise UsageError(
            f"The pod's name is not <job>-{text}.<service>.<namespace>.svc. Received: "
            f"{'.'.join(filter(None, (pod, domain)))}. Make a headless Service for the "
            "Job's pods, and set its name as `subdomain` in the pod template."
        )
    job = pod.removesuffix(f"-{text}")
    hosts = (f"{job}-{i}.{domain}" for i in range(num_workers))
    workers = tuple(f"{host}:{KUBERNETES_PORT}" for host in hosts)
    return Cluster(workers, int(text), "Kubernetes indexed Job")


def _located(cluster: Cluster) -> Cluster:
    """Fills in this worker's rank among the workers on its host."""
    hosts = [address.rpartition(":")[0].lower() for address in cluster.workers]
    here = hosts[cluster.index]
    return dataclasses.replace(
        cluster,
        local_index=hosts[: cluster.index].count(here),
        local_workers=hosts.count(here),
    )


def _with_share_of_gpus(
    cluster: Cluster, environ: Mapping[str, str], gpus: Callable[[], list[str]]
) -> Cluster:
    """Fills in its GPUs if workers on its host would otherwise take the same ones.

    With fewer GPUs than workers, nothing changes: containers on one host, each with its
    own GPU, do not see each other's.
    """
    count = cluster.local_workers
    if count == 1 or cluster.evaluator or GPU_VARIABLE in environ:
        return cluster
    found = gpus()
    if len(found) < count:
        return cluster
    share = hardware.divide_gpus(found, count)[cluster.local_index]
    return dataclasses.replace(cluster, gpus=share)


def _check_addresses(cluster: Cluster) -> None:
    for address in cluster.workers:
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 2**16:
            raise UsageError(
                "A worker's address is not host:port, with a port from 1 to 65535. "
                f"Received: {address!r} from {cluster.source}. "
                "Write it as host:2222 or [::1]:2222."
            )
    written = [{host_and_port(address.lower())} for address in cluster.workers]
    _check_all_differ(cluster, written)


def _check_all_differ(
    cluster: Cluster, places: Iterable[Iterable[tuple[str, int]]]
) -> None:
    """Checks that no two workers have the same host and port."""
    workers: dict[tuple[str, int], list[str]] = {}
    for address, own in zip(cluster.workers, places, strict=True):
        for place in own:
            workers.setdefault(place, []).append(address)
    for addresses in workers.values():
        if len(addresses) > 1:
            spelled = list(dict.fromkeys(address.lower() for address in addresses))
            same = "more than once" if len(spelled) == 1 else "which are the same"
            raise UsageError(
                "Each worker needs its own address. Received: "
                f"{', '.join(spelled)} {same} from {cluster.source}. "
                "Give workers on one host different ports."
            )


def _check_port_is_free(cluster: Cluster) -> None:
    port = host_and_port(cluster.address)[1]
    # All of the host's addresses, as TensorFlow listens on all of them.
    error = _bind(socket.AF_INET, "", port)
    ipv6_error = _bind(socket.AF_INET6, "::", port)
    if ipv6_error is not None and ipv6_error.errno == errno.EADDRINUSE:
        error = ipv6_error  # any other error: this host has no IPv6
    if error is None:
        return
    taken = error.errno == errno.EADDRINUSE
    why = "is in use" if taken else f"cannot be opened ({error.strerror})"
    raise UsageError(
        f"This worker's port {why}. Received: worker {cluster.index} at "
        f"{cluster.address} from {cluster.source}. "
        "Stop the process that listens on it, or give the worker another port."
    )


def _bind(family: int, host: str, port: int) -> OSError | None:
    """Returns the error of binding this port; None if it is free."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A connection in TIME_WAIT does not keep a server from listening.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # IPv4 is checked separately
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
    except OSError as error:
        return error
    return None


def _resolved(
    addresses: Iterable[str], resolve: Callable[[str, int], Any]
) -> dict[str, set[tuple[str, int]]]:
    """Returns the IP addresses and ports of each `host:port` that resolves."""
    known = {}
    for address in addresses:
        # UnicodeError if a label of the host name is too long.
        with contextlib.suppress(OSError, UnicodeError):
            found = resolve(*host_and_port(address))
            known[address] = {place[:2] for *_, place in found}
    return known


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `host:port`; an IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
