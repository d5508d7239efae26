"""Reads the cluster from the environment variables that `srun` sets for each task.

    SLURM_STEP_ID                   set if `srun` started this process
    SLURM_STEP_NUM_TASKS            the number of tasks of the step
    SLURM_STEP_NODELIST             its nodes, e.g. gpu[001-003,007],login
    SLURM_STEP_TASKS_PER_NODE       the tasks on each node, e.g. 2(x3),1
    SLURM_PROCID, SLURM_LOCALID     the rank of this task, overall and on its node
    SLURM_JOB_ID                    the ports are derived from it

These determine which task runs where if consecutive ranks share a node (`block`, the
default). Steps with `--distribution=cyclic`, `plane` or `arbitrary` are rejected.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

from launch.cluster import hardware
from launch.errors import UsageError

_FIRST_PORT = 15000
_PORTS = 16  # of a step on a node
_STEPS = 1021  # prime; the last port is 31335, below Linux's ephemeral ports


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of several tasks, seen from one of them."""

    nodes: tuple[str, ...]
    tasks: tuple[int, ...]  # number on each node
    rank: int
    first_port: int

    @property
    def workers(self) -> tuple[str, ...]:
        """The address of each task, in the order of their ranks."""
        return tuple(
            f"{node}:{self.first_port + local}"
            for node, count in zip(self.nodes, self.tasks, strict=True)
            for local in range(count)
        )

    @property
    def place(self) -> tuple[int, int]:
        """This task's rank on its node, and how many tasks run there."""
        first = 0
        for count in self.tasks:
            if self.rank < first + count:
                return self.rank - first, count
            first += count
        raise LookupError(f"no node has rank {self.rank}")


def read(environ: Mapping[str, str]) -> Step | None:
    """Returns the step of this process; None if it is the only task, or in no step.

    Raises:
        UsageError: the variables are inconsistent, or ranks are not in blocks.
    """
    if "SLURM_STEP_ID" not in environ:
        return None
    total = _whole(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default="1")
    if total < 2:
        return None
    _, nodes = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    name, tasks = _first(environ, *names)
    rank = _whole(environ, "SLURM_PROCID")
    step = Step(expand_nodes(nodes), _counts(name, tasks), rank, _first_port(environ))
    if len(step.nodes) != len(step.tasks) or sum(step.tasks) != total or rank >= total:
        raise UsageError(
            "Slurm's variables are inconsistent. Received: "
            f"{total} tasks, nodes {nodes}, {name}={tasks}, SLURM_PROCID={rank}. "
            "Start the step with srun, and do not change its variables."
        )
    _check_blocks(environ, step)
    return step


def expand_nodes(text: str) -> tuple[str, ...]:
    """Returns the nodes of an expression like `gpu[001-003,007],cpu[1-2]x[1,3],login`.

    Raises:
        UsageError: it cannot be parsed.
    """
    entry = r"(?:[^\[\],\s]|\[[\d,-]+\])+"
    if not re.fullmatch(rf"{entry}(?:,{entry})*", text):
        raise _no_node_list(text)
    nodes: list[str] = []
    for match in re.finditer(entry, text):
        # "cpu[1-2]x[1,3]" splits into "cpu", "1-2", "x", "1,3", "".
        parts: list[str] = re.split(r"\[(.*?)\]", match[0])
        choices = [[part] for part in parts]
        choices[1::2] = [_numbers(part, text) for part in parts[1::2]]
        nodes += ["".join(chosen) for chosen in itertools.product(*choices)]
    return tuple(nodes)


def share_of_gpus(environ: Mapping[str, str], step: Step) -> str | None:
    """Returns this task's share of its node's GPUs, for CUDA_VISIBLE_DEVICES.

    None if there is nothing to divide: fewer than two GPUs, one task per node, or GPUs
    that Slurm has already bound to tasks.

    Raises:
        UsageError: tasks would get unequal numbers, which TensorFlow cannot train with.
    """
    local, count = step.place
    gpus = _visible_gpus(environ)
    if max(step.tasks) == 1 or len(gpus) < 2 or _bound(environ):
        return None
    if len(set(step.tasks)) > 1 or len(gpus) % count:
        raise UsageError(
            "The tasks of this step would get unequal numbers of GPUs. Received: "
            f"GPUs {','.join(gpus)} for {count} tasks on this node; tasks per node: "
            f"{', '.join(map(str, step.tasks))}. Give srun --gpus-per-task=N, or the "
            "same number of tasks on each node, which must divide its GPUs."
        )
    return hardware.divide_gpus(gpus, count)[local]


def _numbers(text: str, expression: str) -> list[str]:
    """Returns the numbers of `001-003,007`, with their leading zeros."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise _no_node_list(expression)
        first, last = match[1], match[2] or match[1]
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return numbers


def _counts(name: str, text: str) -> tuple[int, ...]:
    """Returns the counts of `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UsageError(
                f"Slurm's tasks per node cannot be parsed. Received: {name}={text}. "
                "The format is 2(x3),1."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def _check_blocks(environ: Mapping[str, str], step: Step) -> None:
    # "block:cyclic,Pack": over nodes, then over sockets and cores.
    distribution = environ.get("SLURM_DISTRIBUTION", "block")
    kind = re.split(r"[:,=]", distribution)[0]
    local = _whole(environ, "SLURM_LOCALID")
    if kind in ("cyclic", "plane", "arbitrary") or local != step.place[0]:
        raise UsageError(
            "Ranks must be distributed over nodes in blocks. Received: "
            f"SLURM_DISTRIBUTION={distribution}, task {step.rank} is number {local} on "
            "its node. Give srun --distribution=block."
        )


def _first_port(environ: Mapping[str, str]) -> int:
    """Returns the port of a node's first task; two steps on a node rarely collide."""
    job = _whole(environ, "SLURM_JOB_ID", "SLURM_JOBID", default="0")
    step = _whole(environ, "SLURM_STEP_ID")
    return _FIRST_PORT + _PORTS * ((job + 131 * step) % _STEPS)


def _visible_gpus(environ: Mapping[str, str]) -> list[str]:
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
    text = next((environ[name] for name in names if name in environ), "")
    gpus = [gpu.strip() for gpu in text.split(",") if gpu.strip()]
    return [] if set(gpus) & {"-1", "NoDevFiles"} else gpus


def _bound(environ: Mapping[str, str]) -> bool:
    """Whether an option of srun has given each task its own GPUs."""
    if {"SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU"} & set(environ):
        return True
    binding = environ.get("SLURM_GPU_BIND") or environ.get("SLURM_TRES_BIND", "none")
    per_task = environ.get("SLURM_TRES_PER_TASK", "")
    return not binding.endswith("none") or "gpu" in per_task


def _first(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    for name in names:
        if name in environ:
            return name, environ[name]
    raise UsageError(
        f"A variable of Slurm is missing. Received: no {names[0]}. "
        "Start the step with srun, and do not change its variables."
    )


def _whole(environ: Mapping[str, str], *names: str, default: str | None = None) -> int:
    if default is not None and not set(names) & set(environ):
        return int(default)
    name, value = _first(environ, *names)
    if not value.isdecimal():
        raise UsageError(
            f"A variable of Slurm is not a whole number. Received: {name}={value}. "
            "Start the step with srun, and do not change its variables."
        )
    return int(value)


def _no_node_list(text: str) -> UsageError:
    return UsageError(
        f"Slurm's list of nodes cannot be parsed. Received: {text}. "
        "The format is gpu[001-003,007],login."
    )
