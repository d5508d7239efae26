"""Reads TF_CONFIG, TensorFlow's description of a cluster for one of its processes:

    {"cluster": {"worker": ["a:2222", "b:2222"]},
     "task": {"type": "worker", "index": 0}}

Kubeflow's training operator and Vertex AI add a `chief` (`master` in older releases),
keys of their own, and evaluator tasks that the cluster does not list.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from launch.errors import UsageError

_CHIEFS = ("chief", "master")
_JOBS = (*_CHIEFS, "worker", "evaluator")
_FORM = (
    '{"cluster": {"worker": ["host:port", ...]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclasses.dataclass(frozen=True)
class Task:
    """The content of TF_CONFIG: the workers, chief first, and the index of this one."""

    workers: tuple[str, ...]
    index: int
    evaluator: bool = False


def parse(text: str) -> Task | None:
    """Reads the value of TF_CONFIG; None if it describes no cluster.

    Raises:
        UsageError: it is malformed, or uses parameter servers.
    """
    config = _load(text)
    cluster = _object(config, "cluster")
    _check_jobs(cluster)
    jobs = {name: _addresses(name, value) for name, value in cluster.items()}
    chief = _chief(jobs)
    workers = (*jobs.get(chief, ()), *jobs.get("worker", ()))
    if not workers:
        return None
    task = _object(config, "task")
    kind = _kind(task)
    if kind == "evaluator":
        return Task(workers, 0, evaluator=True)
    index = _index(task, kind, len(jobs.get(kind, ())))
    return Task(workers, index + (len(jobs.get(chief, ())) if kind == "worker" else 0))


def _load(text: str) -> Mapping[str, Any]:
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"TF_CONFIG is not valid JSON ({error}). Received: TF_CONFIG={text}. "
            f"Write it as {_FORM}."
        ) from error
    if not isinstance(loaded, dict):
        raise _malformed("TF_CONFIG is not a JSON object", text)
    return loaded


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None and key == "cluster":
        return {}
    if not isinstance(value, dict):
        raise _malformed(f'TF_CONFIG has no object "{key}"', f"{key}={value!r}")
    return value


def _check_jobs(cluster: Mapping[str, Any]) -> None:
    if cluster.get("ps"):
        raise UsageError(
            "Parameter servers are not supported. "
            f"Received: ps={cluster['ps']!r} in TF_CONFIG. "
            "Start the same processes as workers, without ps."
        )
    for name in cluster:
        if name not in (*_JOBS, "ps"):
            raise UsageError(
                "The cluster of TF_CONFIG has a job of unknown type. "
                f"Received: {name}={cluster[name]!r}. Name it worker or chief."
            )


def _addresses(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(a, str) for a in value):
        raise UsageError(
            "A job of TF_CONFIG is not a list of addresses. "
            f'Received: {name}={value!r}. Write it as "{name}": ["host:port", ...].'
        )
    return tuple(value)


def _chief(jobs: Mapping[str, tuple[str, ...]]) -> str:
    """Returns the job name of the chief, `chief` or `master`."""
    chiefs = [(name, address) for name in _CHIEFS for address in jobs.get(name, ())]
    if len(chiefs) > 1:
        raise UsageError(
            "A cluster has one chief. Received: "
            f"{', '.join(f'{name} {address}' for name, address in chiefs)} "
            "in TF_CONFIG. Make the others workers."
        )
    return chiefs[0][0] if chiefs else "chief"


def _kind(task: Mapping[str, Any]) -> str:
    kind = task.get("type")
    if kind not in _JOBS:
        raise UsageError(
            "The task of TF_CONFIG has no known type. "
            f"Received: task type={kind!r}. Give one of {', '.join(_JOBS)}."
        )
    return kind


def _index(task: Mapping[str, Any], kind: str, count: int) -> int:
    index = task.get("index")
    if isinstance(index, str) and index.isdecimal():  # as some operators write it
        index = int(index)
    if type(index) is not int or not 0 <= index < count:  # True is an int, too
        raise UsageError(
            f"The task of TF_CONFIG is not in the cluster, which has {count} of type "
            f"{kind}. Received: task index={task.get('index')!r}. "
            "Count each type from 0, and list every process in the cluster."
        )
    return index


def _malformed(what: str, received: str) -> UsageError:
    return UsageError(f"{what}. Received: {received}. Write TF_CONFIG as {_FORM}.")
