"""Times distfit and its peers on the same work, on 1, 2 and 4 replicas of this CPU.

    python -m benchmarks.run
    python -m benchmarks.run --workloads=mlp --replicas=2 --fused=10 --rounds=3

Each contender is a process of its own. One of them computes at a time: a round is an
epoch of each, in turn, so that a busy moment of the machine hits all alike. Rounds are
repeated, and medians reported. Written to `runs/benchmark/`: results.json, with every
single time; results.md, a table; results.png.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import time

from benchmarks import contenders, report
from benchmarks.process import Process

WORKLOADS = ("mlp", "cnn")
MIN_ROUNDS = 3
TIMEOUT = (
    240.0  # Seconds; the first answer of a process includes importing and tracing.
)


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    options.workdir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    cells = [(w, r) for w in options.workloads for r in options.replicas]
    rows: list[dict] = []
    for index, (workload, replicas) in enumerate(cells):
        now = time.monotonic()
        deadline = now + (end - now) / (len(cells) - index)
        rows += _measure(workload, replicas, options, deadline)
        report.write(options.workdir, {"machine": _machine(), "rows": rows})
    print(report.table(rows))
    print(f"Written to {options.workdir}/")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    add("--replicas", nargs="+", type=int, default=(1, 2, 4))
    add("--fused", nargs="+", type=int, default=(1, 10, 50), help="steps per execution")
    add("--rounds", type=int, default=7)
    add(
        "--minutes",
        type=float,
        default=12,
        help=f"rounds are cut, down to {MIN_ROUNDS}, to keep to about this time",
    )
    add("--contenders", nargs="+", choices=contenders.NAMES, default=contenders.NAMES)
    add(
        "--batches",
        choices=("fixed", "any"),
        default="fixed",
        help="whether the input pipeline promises batches of a fixed size",
    )
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    return parser.parse_args(argv)


def _measure(workload, replicas, options, deadline) -> list[dict]:
    """Measures all contenders on a workload and a number of replicas."""
    rows = [
        {
            "workload": workload,
            "replicas": replicas,
            "fused": fused,
            "contender": name,
            "seconds_per_step": [],
        }
        for fused in options.fused
        for name in options.contenders
        if contenders.takes_part(name, replicas)
    ]
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(name, workload, replicas, options))
            for name in dict.fromkeys(row["contender"] for row in rows)
            if contenders.is_installed(name)
        }
        _progress(f"{workload}, {replicas} replica(s): starting")
        _prepare(processes, rows)
        for done in range(options.rounds):
            if done >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            _progress(f"{workload}, {replicas} replica(s): round {done + 1}")
            _run_round(processes, rows, done)
    return rows


def _process(name, workload, replicas, options) -> Process:
    return Process(name, workload, str(replicas), options.batches, timeout=TIMEOUT)


def _prepare(processes: dict[str, Process], rows: list[dict]) -> None:
    """Has everything imported, built and traced: not timed, so several at once."""

    def prepare(name: str) -> None:
        for row in rows:
            if row["contender"] == name:
                _keep(row, processes[name].ask(fused=row["fused"]))

    for row in rows:
        if row["contender"] not in processes:
            row["failure"] = "not installed"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(prepare, processes))


def _run_round(processes: dict[str, Process], rows: list[dict], number: int) -> None:
    """Times every row once. Each round begins with another contender."""
    for fused in dict.fromkeys(row["fused"] for row in rows):
        turn = [row for row in rows if row["fused"] == fused and "failure" not in row]
        start = number % max(len(turn), 1)
        for row in turn[start:] + turn[:start]:
            _keep(row, processes[row["contender"]].ask(fused=fused))


def _keep(row: dict, answer: dict) -> None:
    if "error" in answer:
        row["failure"] = f"fails: {answer['error']}"
    elif answer:
        row["seconds_per_step"].append(answer["seconds_per_step"])
        row["logs"] = answer["logs"]


def _machine() -> dict:
    """What the numbers depend on beside the code."""
    packages = ("tensorflow", "keras", "tf_keras", "tf-models-official")
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
