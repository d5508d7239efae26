"""How long `fit()` takes to finish its first step: distfit and stock Keras.

    python -m benchmarks.first_step
    python -m benchmarks.first_step --workloads=resnet50 --replicas 1 2 4 --rounds 3

Both train the same functional model, on replicas that are virtual devices of one
process. The time is from the call of `fit()` until the loss of the first step is known,
in a fresh process: it is spent on tracing and on TensorFlow's preparation. Processes
run one at a time, in turn. Written to `runs/benchmark/`: first_step.json, with every
single time, and first_step.md, a table.
"""

import argparse
import json
import pathlib
import statistics
import sys

from benchmarks import machine
from benchmarks.process import Group
from benchmarks.rows import LABELS, markdown

WORKLOADS = {
    "mlp": "MLP 32-16-1, batch 32",
    "cnn": "MNIST CNN, batch 64",
    "resnet50": "ResNet-50, 32 × 32, batch 8",
    "transformer": "transformer, 4 layers, batch 32",
}
CONTENDERS = ("distfit", "stock_keras")
TIMEOUT = 900.0  # Seconds.


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    options.workdir.mkdir(parents=True, exist_ok=True)
    rows = _rows(options)
    for number in range(options.rounds):
        for row in rows:
            _measure(row, number)
            _write(options.workdir, rows)
    print(table(rows))
    print(f"Written to {options.workdir}/")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=("resnet50", "transformer"),
    )
    add("--replicas", nargs="+", type=int, default=(1, 2, 4, 8))
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    add("--rounds", type=int, default=1)
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    return parser.parse_args(argv)


def _rows(options) -> list[dict]:
    """The rows to measure, without times yet."""
    return [
        {
            "workload": workload,
            "replicas": replicas,
            "contender": name,
            "seconds": [],
        }
        for workload in options.workloads
        for replicas in options.replicas
        for name in options.contenders
    ]


def _measure(row: dict, number: int) -> None:
    if "failure" in row:
        return
    place = (row["contender"], row["workload"], str(row["replicas"]))
    print(f"round {number + 1}: {' '.join(place)}", file=sys.stderr, flush=True)
    with Group(*place, module="benchmarks.first_step_worker", timeout=TIMEOUT) as group:
        answer = group.ask()
    if "error" in answer:
        row["failure"] = answer["error"]
    else:
        row["seconds"].append(answer["seconds"])
        row["logs"] = answer["logs"]


def _write(folder: pathlib.Path, rows: list[dict]) -> None:
    facts = machine.facts()
    results = {"machine": facts, "rows": rows}
    (folder / "first_step.json").write_text(json.dumps(results, indent=1) + "\n")
    measured = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = f"Measured on: {measured}.\n\n{table(rows)}"
    (folder / "first_step.md").write_text(text)


def table(rows: list[dict]) -> str:
    """A Markdown table: a line for each workload and number of replicas."""
    notes: list[str] = []
    lines = [["workload", "replicas", *(LABELS[name] for name in CONTENDERS), "ratio"]]
    for (workload, replicas), found in _by_case(rows).items():
        cells = [_cell(found.get(name), notes) for name in CONTENDERS]
        ratio = _ratio(*(found.get(name) for name in CONTENDERS))
        lines.append([WORKLOADS[workload], str(replicas), *cells, ratio])
    caption = (
        "Seconds from `fit()` to the loss of the first step, median of the rounds."
    )
    return f"{caption}\n\n{markdown(lines, 1, notes)}"


def _by_case(rows: list[dict]) -> dict[tuple[str, int], dict[str, dict]]:
    cases: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        case = cases.setdefault((row["workload"], row["replicas"]), {})
        case[row["contender"]] = row
    return cases


def _median(row: dict | None) -> float | None:
    if row is None or "failure" in row or not row["seconds"]:
        return None
    return statistics.median(row["seconds"])


def _cell(row: dict | None, notes: list[str]) -> str:
    if row is not None and "failure" in row:
        notes.append(row["failure"])
        return f"fails ({len(notes)})"
    middle = _median(row)
    return "–" if middle is None else f"{middle:.1f}"


def _ratio(over: dict | None, under: dict | None) -> str:
    one, other = _median(over), _median(under)
    return "–" if one is None or other is None else f"{one / other:.2f}"


if __name__ == "__main__":
    main()
