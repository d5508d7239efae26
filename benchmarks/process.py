"""A worker process as the parent sees it: started when needed, ended in any case."""

import json
import pathlib
import select
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Process:
    """A `benchmarks.worker`; a context manager that kills it at the end.

    Args:
        arguments: The command line of the worker.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, *arguments: str, timeout: float):
        self._command = [sys.executable, "-m", "benchmarks.worker", *arguments]
        self._timeout = timeout
        self._child: subprocess.Popen | None = None
        self._stderr = tempfile.TemporaryFile()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception) -> None:
        self._end()
        self._stderr.close()

    def ask(self, **order) -> dict:
        """Sends an order and waits for the answer.

        A process that dies or does not answer in time is ended, answers with an error,
        and is started anew by the next order.
        """
        if self._child is None:
            self._start()
        try:
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
        except BrokenPipeError:
            return {"error": self._post_mortem()}
        ready, _, _ = select.select([self._child.stdout], [], [], self._timeout)
        if not ready:
            self._end()
            return {"error": f"no answer within {self._timeout:.0f} seconds"}
        line = self._child.stdout.readline()
        return json.loads(line) if line else {"error": self._post_mortem()}

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )

    def _post_mortem(self) -> str:
        code = self._child.wait(timeout=self._timeout)
        self._end()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"the process ended with exit code {code}: {last.strip()}"

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()
        self._child = None
