"""Rows of results, and statistics of them.

A row is a dict: workload, replicas, fused, contender, seconds_per_step (a list, one for
each round), and failure, a line, if it failed. Rows of workers also have workers, their
number, and cluster: the number of workers that a worker alone is compared with.
"""

import re
import statistics

LABELS = {
    "distfit": "distfit",
    "hand_written": "hand-written loop",
    "hand_written_flat": "hand-written loop, flat buffer",
    "stock_keras": "stock Keras",
    "stock_keras_default": "stock Keras, default reduction",
    "tf_keras": "tf_keras",
    "orbit": "Orbit",
    "torch_ddp": "PyTorch DDP",
}
COLORS = {
    "distfit": "#0072b2",
    "hand_written": "#000000",
    "hand_written_flat": "#56b4e9",
    "stock_keras": "#d55e00",
    "stock_keras_default": "#f0b48c",
    "tf_keras": "#999999",
    "orbit": "#009e73",
    "torch_ddp": "#cc79a7",
}
SLOW = 1.5  # times the median: an epoch that takes longer is slow.


def contenders(rows: list[dict]) -> list[str]:
    """The contenders in the rows, in the order of the labels."""
    present = {row["contender"] for row in rows}
    return [name for name in LABELS if name in present]


def median(row: dict | None) -> float | None:
    """The median time of a step in seconds; None if there is none."""
    if row is None or "failure" in row or not row["seconds_per_step"]:
        return None
    return statistics.median(row["seconds_per_step"])


def quartiles(row: dict) -> tuple[float, float]:
    """The first and the third quartile of the time of a step in seconds."""
    times = row["seconds_per_step"]
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, method="inclusive")
    return first, third


def slow_share(row: dict) -> float:
    """The share of epochs that took more than `SLOW` times the median."""
    times = row["seconds_per_step"]
    limit = SLOW * statistics.median(times)
    return sum(time > limit for time in times) / len(times)


def ratio(over: dict | None, under: dict | None) -> float | None:
    """The time of a step in one row, as a multiple of that in another."""
    times = median(over), median(under)
    return None if None in times else times[0] / times[1]


def time_cell(row: dict | None, notes: list[str], unit: float, digits: int) -> str:
    """The median and the quartiles, or why there are none."""
    if row is None:
        return "–"
    if "failure" in row:
        kind, _, reason = row["failure"].partition(": ")
        return f"{kind} ({_note(reason, notes)})" if reason else kind
    middle = median(row)
    if middle is None:
        return "–"
    times = [f"{time / unit:.{digits}f}" for time in (middle, *quartiles(row))]
    return f"{times[0]} ({times[1]}–{times[2]})"


def ratio_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _note(reason: str, notes: list[str]) -> int:
    """The number of a footnote. Reasons may differ in numbers of nodes and devices."""
    keys = [re.sub(r"_?\d+", "", note) for note in [*notes, reason]]
    number = keys.index(keys[-1]) + 1
    if number > len(notes):
        notes.append(reason)
    return number


def rounds(rows: list[dict]) -> str:
    """The number of rounds, or their range, as text."""
    counts = sorted({len(r["seconds_per_step"]) for r in rows if "failure" not in r})
    return " to ".join(map(str, counts[:1] + counts[1:][-1:])) or "no"


def markdown(lines: list[list[str]], left: int, notes: list[str]) -> str:
    """A table whose first line is its head, and footnotes.

    Args:
        lines: The cells.
        left: Number of left-aligned columns.
        notes: The footnotes.
    """
    rule = ["---"] * left + ["--:"] * (len(lines[0]) - left)
    body = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    footer = "".join(f"\n{i}. {note}" for i, note in enumerate(notes, 1))
    return f"{body}\n" + (f"{footer}\n" if footer else "")
