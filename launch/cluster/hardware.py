"""Divides the CPU cores and GPUs of a host among its workers.

Without this, every worker would start threads for all cores and take memory on all
GPUs. The GPU driver is not queried: the parent of the workers must not hold a GPU.
"""

import dataclasses
import os
import pathlib
import re

from launch.errors import UsageError

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Share:
    """One worker's share of its host.

    Attributes:
        cores: the numbers of its cores; empty where the platform cannot bind them.
        gpus: the value of CUDA_VISIBLE_DEVICES; None: leave it unchanged.
    """

    cores: tuple[int, ...]
    gpus: str | None


def divide(num_workers: int, root: pathlib.Path = pathlib.Path("/")) -> list[Share]:
    """Divides the cores and GPUs that this process may use.

    Args:
        num_workers: the number of shares.
        root: where /dev and /proc are.

    Raises:
        UsageError: there are GPUs, but fewer than workers.
    """
    cores = divide_cores(own_cores(), num_workers)
    gpus = divide_gpus(own_gpus(root), num_workers)
    return [Share(*share) for share in zip(cores, gpus, strict=True)]


def own_cores() -> list[int]:
    """Returns the cores that this process may use; none if that is unknown."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return []
    return sorted(os.sched_getaffinity(0))


def divide_cores(cores: list[int], num_workers: int) -> list[tuple[int, ...]]:
    """Gives each worker neighbouring cores: they share caches and memory.

    With more workers than cores, each worker gets one core, round-robin.
    """
    count = len(cores)
    if 0 < count < num_workers:
        return [(cores[i % count],) for i in range(num_workers)]
    ends = [count * i // num_workers for i in range(num_workers + 1)]
    return [tuple(cores[ends[i] : ends[i + 1]]) for i in range(num_workers)]


def own_gpus(root: pathlib.Path = pathlib.Path("/")) -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Like CUDA, stops at the first entry that is not a GPU, such as -1.
    """
    given = os.environ.get(GPU_VARIABLE)
    if given is None:
        return [str(i) for i in range(_installed_gpus(root))]
    names = [name.strip() for name in given.split(",")]
    real = [bool(re.fullmatch(r"\d+|(GPU|MIG)-.+", name)) for name in names]
    return names[: [*real, False].index(False)]


def divide_gpus(gpus: list[str], num_workers: int) -> list[str | None]:
    """Gives each worker the same number of neighbouring GPUs; a remainder stays idle.

    Workers with different numbers of replicas cannot train together.

    Raises:
        UsageError: there are GPUs, but fewer than workers.
    """
    if not gpus:
        return [None] * num_workers
    each = len(gpus) // num_workers
    if each == 0:
        raise UsageError(
            "Each worker needs its own GPU. "
            f"Received: --num_workers={num_workers}, GPUs {', '.join(gpus)}. "
            f"Start at most {len(gpus)}, or set {GPU_VARIABLE}=-1 to use the CPU."
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(num_workers)]


def _installed_gpus(root: pathlib.Path) -> int:
    devices = root.glob("dev/nvidia[0-9]*")
    count = sum(path.name[len("nvidia") :].isdigit() for path in devices)
    return count or len(list(root.glob("proc/driver/nvidia/gpus/*")))
