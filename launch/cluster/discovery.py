"""Which cluster this process is a worker of: where that is written, and if it holds.

The first of these that describes a cluster counts:

1. `--workers=host:port,... --worker_index=i`;
2. the variable TF_CONFIG (tf_config.py), which `launch` also sets in workers it starts;
3. Slurm, in a step of several tasks (slurm.py);
4. a Kubernetes Job with `completionMode: Indexed`: JOB_COMPLETION_INDEX says which of
   its pods this is, `--num_workers` how many there are, and their names follow from
   the pod's own, `<job>-<index>.<service>.<namespace>.svc...`, where a headless
   service gives it one. They listen on port 2222.

Workers that 1 or 2 put on one host share its GPUs, unless CUDA_VISIBLE_DEVICES is set.
What is wrong with a description is told here, without TensorFlow, which would wait for
workers that never come, or abort the process. Who can reach a worker's port can run
code in it: TensorFlow asks for no password.
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
# How long the names of hosts may take to be known. Containers of one job start one
# after the other; in Kubernetes the name server lags behind them, too.
_SECONDS = 10.0
_SECONDS_IN_KUBERNETES = 60.0
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(%\w+)?\]|[\w.-]+):(?P<port>\d{1,5})")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run, seen from one of them.

    Attributes:
        workers: their addresses `host:port` by rank; the first is the chief.
        index: which of them this process is.
        source: what described the cluster, for people.
        local_index, local_workers: which of the workers on its host it is, of how many.
        evaluator: whether this process takes no part in training.
        gpus: the GPUs of this worker, for CUDA_VISIBLE_DEVICES; None: all that it sees.
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
        """Returns the variables from which TensorFlow learns of the cluster.

        Whatever described it, the chief is worker 0 in them.

        Args:
            environ: the environment variables that there are.
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
            f"{found.source} describes a cluster of another size. Received: "
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
    """Checks that this worker's port is free here, and each worker at another address.

    Names that are not known yet are asked for again for 10 s, in Kubernetes for 60 s.

    Args:
        cluster: what is checked.
        environ: the environment variables.
        resolve: returns what `socket.getaddrinfo` does for a host and a port.
        clock: counts seconds.
        sleep: lets so many seconds pass.

    Raises:
        UsageError: with the first thing that is wrong.
    """
    _check_port_is_free(cluster)
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in environ
    seconds = _SECONDS_IN_KUBERNETES if in_kubernetes else _SECONDS
    began = clock()
    known = _resolved(cluster.workers, resolve)
    if missing := [a for a in cluster.workers if a not in known]:
        print(
            f"launch: waiting up to {seconds:.0f} s for the addresses of hosts "
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
            f"No address is known for hosts of the cluster. Received: "
            f"{', '.join(missing)} from {cluster.source}. Correct the names, or make "
            "them known to this host's resolver."
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
            f"There is no worker of that index. Received: --worker_index={index}, with "
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
            "This is a pod of an indexed Job of unknown size. Received: "
            f"JOB_COMPLETION_INDEX={text}, no --num_workers. Give --num_workers=N, the "
            "completions of the Job; unset JOB_COMPLETION_INDEX if each pod is a run "
            "of its own."
        )
    if not text.isdecimal() or int(text) >= num_workers:
        raise UsageError(
            "The Job has another number of pods. Received: "
            f"JOB_COMPLETION_INDEX={text}, --num_workers={num_workers}. Give the "
            "completions of the Job, which are as many as its parallelism."
        )
    pod, _, domain = hostname().rstrip(".").partition(".")
    if not domain or not pod.endswith(f"-{text}"):
        raise UsageError(
            f"The pod's name is not <job>-{text}.<service>.<namespace>.svc. Received: "
            f"{'.'.join(filter(None, (pod, domain)))}. Make a headless Service for the "
            "Job's pods, and name it as `subdomain` of the pod template."
        )
    job = pod.removesuffix(f"-{text}")
    hosts = (f"{job}-{i}.{domain}" for i in range(num_workers))
    workers = tuple(f"{host}:{KUBERNETES_PORT}" for host in hosts)
    return Cluster(workers, int(text), "Kubernetes indexed Job")


def _located(cluster: Cluster) -> Cluster:
    """Fills in which of the workers on its host this one is."""
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
    """Fills in its GPUs where others on its host would take the same ones.

    Fewer GPUs than workers are left alone: containers of one host, each with a GPU of
    its own, do not see those of the others.
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
    """Checks that no two workers have a place, a host and a port, in common."""
    workers: dict[tuple[str, int], list[str]] = {}
    for address, own in zip(cluster.workers, places, strict=True):
        for place in own:
            workers.setdefault(place, []).append(address)
    for addresses in workers.values():
        if len(addresses) > 1:
            spelled = list(dict.fromkeys(address.lower() for address in addresses))
            same = "more than once" if len(spelled) == 1 else "which are the same"
            raise UsageError(
                "Each worker has an address of its own. Received: "
                f"{', '.join(spelled)} {same} from {cluster.source}. "
                "Give workers on one host different ports."
            )


def _check_port_is_free(cluster: Cluster) -> None:
    port = host_and_port(cluster.address)[1]
    # TensorFlow listens on all of the host's addresses, too.
    error = _bind(socket.AF_INET, "", port)
    ipv6_error = _bind(socket.AF_INET6, "::", port)
    if ipv6_error is not None and ipv6_error.errno == errno.EADDRINUSE:
        error = ipv6_error  # any other: this host has no IPv6
    if error is None:
        return
    taken = error.errno == errno.EADDRINUSE
    why = "is in use" if taken else f"cannot be opened ({error.strerror})"
    raise UsageError(
        f"This worker's port {why}. Received: worker {cluster.index} at "
        f"{cluster.address} from {cluster.source}. "
        "End the process that listens on it, or give the worker another port."
    )


def _bind(family: int, host: str, port: int) -> OSError | None:
    """Returns why nothing can listen there, or None."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A connection that was just closed does not keep a server from listening.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # IPv4 is looked at by itself
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
    except OSError as error:
        return error
    return None


def _resolved(
    addresses: Iterable[str], resolve: Callable[[str, int], Any]
) -> dict[str, set[tuple[str, int]]]:
    """Returns the IP addresses and ports of those `host:port` whose host is known."""
    known = {}
    for address in addresses:
        # The latter for a label that is too long.
        with contextlib.suppress(OSError, UnicodeError):
            found = resolve(*host_and_port(address))
            known[address] = {place[:2] for *_, place in found}
    return known


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `host:port`; an IPv6 address loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
