"""Times distfit and its peers on the same work: on replicas, and on workers.

    python -m benchmarks.run
    python -m benchmarks.run --workloads=mlp --replicas=2 --fused=10 --rounds=3
    python -m benchmarks.run --workers 2 --workloads cnn --fused 1 --rounds 5

Replicas: 1, 2 and 4 virtual devices of one process. Workers: 2 processes of one replica
and one core each, which communicate over loopback; each has as many rows as a worker
alone on one core, which is measured for comparison.

Each contender has a process of its own, or one for each worker. One contender computes
at a time: a round is an epoch of each, in turn, so that other load on the machine
affects all alike. Rounds are repeated, and medians reported. Written to
`runs/benchmark/`: results.json, with every single time; results.md, tables; plots.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import sys
import time

from benchmarks import contenders, machine, report
from benchmarks.process import Group

WORKLOADS = ("mlp", "cnn")
FUSED_ON_REPLICAS = (1, 10, 50)
FUSED_ON_WORKERS = (1, 10)
MIN_ROUNDS = 3
TIMEOUT = (
    240.0  # Seconds; the first answer of a process includes importing and tracing.
)

Groups = dict[tuple[str, int], Group]


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    options.workdir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    cells = _cells(options)
    weights = [_weight(cell) for cell in cells.values()]
    rows: list[dict] = []
    for index, (name, cell) in enumerate(cells.items()):
        now = time.monotonic()
        deadline = now + (end - now) * weights[index] / sum(weights[index:])
        rows += _measure(name, cell, options, deadline)
        report.write(options.workdir, {"machine": machine.facts(), "rows": rows})
    print(report.tables(rows))
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
    add(
        "--workers",
        nargs="+",
        type=int,
        default=(1, 2),
        help="1 stands for the replicas of one process",
    )
    add(
        "--fused",
        nargs="+",
        type=int,
        help="steps per execution, by default "
        f"{FUSED_ON_REPLICAS} on replicas and {FUSED_ON_WORKERS} on workers",
    )
    add("--rounds", type=int, default=7)
    add(
        "--minutes",
        type=float,
        default=20,
        help=f"rounds are reduced, to {MIN_ROUNDS} at least, to take about this time",
    )
    add("--contenders", nargs="+", choices=contenders.NAMES, default=contenders.NAMES)
    add(
        "--batches",
        choices=("fixed", "any"),
        default="fixed",
        help="whether the input pipeline declares a fixed batch size",
    )
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    return parser.parse_args(argv)


def _cells(options) -> dict[str, list[dict]]:
    """The rows to measure side by side, without times yet, by name."""
    cells = {}
    for workers in options.workers:
        for workload in options.workloads:
            if workers > 1:
                name = f"{workload}, {workers} workers"
                cells[name] = _rows_on_workers(workload, workers, options)
                continue
            for replicas in options.replicas:
                name = f"{workload}, {replicas} replica(s)"
                cells[name] = _rows_on_replicas(workload, replicas, options)
    return {name: rows for name, rows in cells.items() if rows}


def _rows_on_replicas(workload: str, replicas: int, options) -> list[dict]:
    return [
        {
            "workload": workload,
            "replicas": replicas,
            "fused": fused,
            "contender": name,
            "seconds_per_step": [],
        }
        for fused in options.fused or FUSED_ON_REPLICAS
        for name in options.contenders
        if contenders.on_replicas(name, replicas)
    ]


def _rows_on_workers(workload: str, cluster: int, options) -> list[dict]:
    """A contender's worker alone comes right before its workers together."""
    return [
        {
            "workload": workload,
            "replicas": workers,
            "workers": workers,
            "cluster": cluster,
            "fused": fused,
            "contender": name,
            "seconds_per_step": [],
        }
        for fused in options.fused or FUSED_ON_WORKERS
        for name in options.contenders
        if contenders.on_workers(name, fused)
        for workers in (1, cluster)
    ]


def _weight(rows: list[dict]) -> int:
    """The weight of a cell's share of the time: workers have more to measure."""
    return 2 if "workers" in rows[0] else 1


def _measure(name: str, rows: list[dict], options, deadline: float) -> list[dict]:
    """Measures the rows of a cell and returns them."""
    with contextlib.ExitStack() as stack:
        groups = {
            key: stack.enter_context(_group(row, options))
            for key, row in {_key(row): row for row in rows}.items()
            if contenders.is_installed(row["contender"])
        }
        _progress(f"{name}: starting")
        _prepare(groups, rows)
        for done in range(options.rounds):
            if done >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            _progress(f"{name}: round {done + 1}")
            _run_round(groups, rows, done)
    return rows


def _key(row: dict) -> tuple[str, int]:
    """Identifies the processes of a cell."""
    return row["contender"], row.get("workers", 0)


def _group(row: dict, options) -> Group:
    contender, workers = _key(row)
    place = (row["workload"], str(row["replicas"]), options.batches)
    return Group(contender, *place, workers=workers, timeout=TIMEOUT)


def _prepare(groups: Groups, rows: list[dict]) -> None:
    """Imports, builds and traces everything: not timed, so several at once."""

    def prepare(key: tuple[str, int]) -> None:
        for row in rows:
            if _key(row) == key:
                _keep(row, groups[key].ask(fused=row["fused"]))

    for row in rows:
        if _key(row) not in groups:
            row["failure"] = "not installed"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(prepare, groups))


def _run_round(groups: Groups, rows: list[dict], number: int) -> None:
    """Times every row once. Each round begins with a different row."""
    for fused in dict.fromkeys(row["fused"] for row in rows):
        turn = [row for row in rows if row["fused"] == fused and "failure" not in row]
        start = number % max(len(turn), 1)
        for row in turn[start:] + turn[:start]:
            _keep(row, groups[_key(row)].ask(fused=fused))


def _keep(row: dict, answer: dict) -> None:
    if "error" in answer:
        row["failure"] = f"fails: {answer['error']}"
    elif answer:
        row["seconds_per_step"].append(answer["seconds_per_step"])
        row["logs"] = answer["logs"]
    if "all" in answer:
        row.setdefault("all_workers", []).append(answer["all"])


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
