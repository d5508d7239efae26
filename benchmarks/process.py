"""Worker processes: started by the parent when needed, and always ended by it."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from typing import IO

from launch.cluster import hardware, local

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTLE = 2.0  # Seconds that other workers get to fail after one has.


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        environment: Its environment variables.
        cores: The CPU cores it may use; empty for those of this process.
    """

    environment: dict[str, str]
    cores: tuple[int, ...] = ()

    def bind(self) -> None:
        """Binds the calling process to the cores."""
        os.sched_setaffinity(0, self.cores)


def places(workers: int) -> list[Place]:
    """The places of some workers, each with a core and a free port.

    0 stands for one process that is not a worker. A worker alone is bound to a core and
    gets no TF_CONFIG.
    """
    alone = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    if workers == 0:
        return [Place(alone)]
    cores = hardware.divide_cores(hardware.own_cores()[:workers], workers)
    if workers == 1:
        return [Place(alone, cores[0])]
    shares = [hardware.Share(own, None) for own in cores]
    told = local.environments(shares)
    return [Place(*place) for place in zip(told, cores, strict=True)]


class Group:
    """The workers of a contender, as a context manager that kills them.

    Args:
        arguments: The command line of the workers.
        module: The module that they run.
        workers: Number of workers, or 0 for one process that is not bound to a core.
        timeout: Seconds that an answer may take.
    """

    def __init__(
        self,
        *arguments: str,
        module: str = "benchmarks.worker",
        workers: int = 0,
        timeout: float,
    ):
        self._command = [sys.executable, "-m", module, *arguments]
        self._workers = workers
        self._timeout = timeout
        self._children: list[_Child] = []

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def ask(self, **order) -> dict:
        """Sends an order to all workers and waits for their answers.

        Returns:
            The answer of the chief. With several workers, `all` has every answer. An
            error is that of the first to fail. It ends several workers; a single
            process only if it has died or not answered in time. The next order starts
            them again.
        """
        if not self._children:
            self._children = [
                _Child(self._command, place) for place in places(self._workers)
            ]
        for child in self._children:
            child.send(order)
        answers = self._answers()
        answer = _joined(answers)
        missing = len(answers) < len(self._children)
        dead = any(child.ended for child in self._children)
        if missing or dead or ("error" in answer and len(self._children) > 1):
            self._end()
        if missing and "error" not in answer:
            answer = {"error": f"no answer within {self._timeout:.0f} seconds"}
        return answer

    def _answers(self) -> dict[int, dict]:
        """Answers by worker, in the order they came."""
        answers: dict[int, dict] = {}
        deadline = time.monotonic() + self._timeout
        while waiting := {
            child.stdout: index
            for index, child in enumerate(self._children)
            if index not in answers
        }:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select(list(waiting), [], [], left)
            if not ready:
                break
            for stream in ready:
                index = waiting[stream]
                answers[index] = self._children[index].answer()
                if "error" in answers[index]:
                    deadline = min(deadline, time.monotonic() + SETTLE)
        return answers

    def _end(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.close()
        self._children = []


def _joined(answers: dict[int, dict]) -> dict:
    """Joins the answers of all workers."""
    for answer in answers.values():
        if "error" in answer:
            return answer
    chief = answers.get(0, {})
    if len(answers) < 2 or not chief:
        return chief
    ordered = [answers[index] for index in sorted(answers)]
    if not all(agree(chief["logs"], other["logs"]) for other in ordered):
        logs = ", ".join(str(other["logs"]) for other in ordered)
        return {"error": f"workers disagree: {logs}"}
    return {**chief, "all": ordered}


def agree(logs: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two workers report the same, up to rounding."""
    return logs.keys() == other.keys() and all(
        math.isclose(logs[name], other[name], rel_tol=1e-5, abs_tol=1e-7)
        for name in logs
    )


class _Child:
    """A running process."""

    def __init__(self, command: list[str], place: Place):
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self.ended = False
        self._popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env=place.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            preexec_fn=place.bind if place.cores else None,
        )
        self.stdout = self._popen.stdout

    def send(self, order: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # Then `answer` reports its end.
            self._popen.stdin.write(json.dumps(order).encode() + b"\n")

    def answer(self) -> dict:
        """Reads the answer, which must have begun to arrive."""
        line = self.stdout.readline()
        return json.loads(line) if line else {"error": self._post_mortem()}

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        self._popen.wait()
        self._popen.stdin.close()
        self.stdout.close()
        self._stderr.close()

    def _post_mortem(self) -> str:
        """Why it has closed its output, and so ended."""
        self.ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(SETTLE)
        self.kill()
        code = self._popen.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"the process ended with exit code {code}: {last.strip()}"
